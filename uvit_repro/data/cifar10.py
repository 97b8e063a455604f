"""CIFAR-10, read from its own files without unpickling them, its content checked."""

import pickletools
from pathlib import Path

import numpy as np

from uvit_repro.config import DataConfig
from uvit_repro.data.fetch import how_to_get, missing
from uvit_repro.data.files import printable
from uvit_repro.data.images import (
    Data,
    canonical,
    check_content,
    check_size,
    ordered_sum,
    to_tensors,
)
from uvit_repro.data.npz import read_npz

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
PIXELS = 3 * 32 * 32


def find_cifar10(
    root,  # the folder of the data sets
) -> Path:  # a folder cifar-10-batches-py, or the folder of train.npz and test.npz
    "Where CIFAR-10 is, or `FileNotFoundError` with the command that fetches it."
    root = Path(root)
    for p in (root / "cifar-10-batches-py", root / "cifar10" / "cifar-10-batches-py"):
        if p.is_dir():
            return p
    if (root / "cifar10" / "train.npz").is_file():
        return root / "cifar10"
    looked = "cifar-10-batches-py, cifar10/cifar-10-batches-py, cifar10/train.npz"
    raise missing("cifar10", root, f"not under {root} (looked for {looked})")


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of a pickled batch. Nothing is unpickled: the stream's constants are
    listed, and those behind the keys `data` and `labels` are taken."""
    key, labels, pixels = "", [], b""
    for opcode, value, _ in pickletools.genops(path.read_bytes()):
        if isinstance(value, (str, bytes)):
            if value in ("data", "labels", "batch_label", "filenames"):
                key = value
            elif key == "data" and len(value) >= PIXELS:
                pixels = value.encode("latin-1") if isinstance(value, str) else value
        elif key == "labels" and opcode.stack_after == [pickletools.pyint]:
            labels.append(value)
    x = np.frombuffer(pixels, np.uint8).reshape(len(labels), 3, 32, 32)
    return x.transpose(0, 2, 3, 1), np.array(labels, np.int64)


def load_cifar10(
    cfg: DataConfig,  # img_size 32, in_chans 3, holdout 0
    root,  # the folder of the data sets
) -> Data:  # 50,000 training and 10,000 test images, in canonical order
    "CIFAR-10 with its own test split (Section 5.1), its content checked."
    check_size("cifar10", (32, 32, 3), cfg, own_test_split=True)
    where, splits = find_cifar10(root), []
    pickled = where.name == "cifar-10-batches-py"
    for names in (TRAIN, TEST) if pickled else (["train.npz"], ["test.npz"]):
        parts = []
        for name in names:
            try:
                read = _read_batch if pickled else read_npz
                parts.append(read(where / name)[:2])
            except Exception as e:  # damage shows in many ways
                raise ValueError(
                    f"cifar10: {printable(where / name)} is missing or damaged "
                    f"({type(e).__name__}). Remove its folder. {how_to_get('cifar10', root)}"
                ) from None
        splits.append(canonical(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))))
    sha256 = ordered_sum(*splits)
    check_content("cifar10", sha256, printable(where))
    train, test = (to_tensors(*split) for split in splits)
    return Data("cifar10", *train, *test, 10, list(CLASSES), sha256)
