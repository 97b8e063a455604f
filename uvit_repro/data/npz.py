"""Images from NumPy archives, whose headers are checked before anything is unpacked."""

import zipfile
from pathlib import Path

import numpy as np

from uvit_repro.config import DataConfig
from uvit_repro.data.files import printable
from uvit_repro.data.images import (
    Data,
    canonical,
    check_size,
    from_arrays,
    locate,
    ordered_sum,
)

UNPACKED = 1 << 30  # bytes that any archive may unpack to
MOST_CLASSES = 10_000  # with fewer images than that
EXPANSION = 200  # larger ones at most so many times their own size
WANTED = "Wanted: images uint8 (N, H, W, C) and, for classes, labels (N,) of integers from 0"


def _check_headers(path: Path) -> list[str]:
    "Names of the arrays, once what each header promises is what the archive holds."
    with zipfile.ZipFile(path) as archive:
        entries = [e for e in archive.infolist() if e.filename.endswith(".npy")]
        total = sum(e.file_size for e in entries)
        if total > max(UNPACKED, EXPANSION * path.stat().st_size):
            raise ValueError(f"{path.stat().st_size:,} bytes would unpack to {total:,}")
        for e in entries:
            with archive.open(e) as f:
                version = np.lib.format.read_magic(f)
                read = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}[version]
                shape, _, dtype = getattr(np.lib.format, read)(f)
                promised = f.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
            if not dtype.hasobject and promised != e.file_size:
                raise ValueError(f"{e.filename} promises {promised:,} bytes, has {e.file_size:,}")
    return [e.filename.removesuffix(".npy") for e in entries]


def read_npz(
    path: Path,  # an .npz file
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:  # images, labels or None, notes
    "The arrays of an .npz file; a `ValueError` names the file and what is wrong with it."
    shown = printable(path)
    try:
        with open(path, "rb") as f:
            if f.read(6) == b"\x93NUMPY":
                raise ValueError("one bare array; save it with np.savez(path, images=...)")
        names = _check_headers(path)
        if "images" not in names:
            raise ValueError(f"arrays {names}, but none called `images`")
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in names else None
    except Exception as e:  # zipfile and numpy have many ways to meet damage
        why = (str(e) or type(e).__name__).splitlines()[0][:200]
        raise ValueError(f"{shown}: not usable as npz: {why}. {WANTED}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        found = f"images is {images.dtype} of shape {images.shape}"
        raise ValueError(f"{shown}: {found}; N must be above 0. {WANTED}")
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            found = f"labels is {labels.dtype} of shape {labels.shape}"
            raise ValueError(f"{shown}: {found}; wanted integers of shape ({len(images)},)")
        if labels.min() < 0:
            raise ValueError(f"{shown}: labels from {labels.min()}; wanted 0..K-1")
    unused = sorted(set(names) - {"images", "labels"})
    return images, labels, [f"array not used: {printable(n)} ({path.name})" for n in unused]


def load_npz(
    cfg: DataConfig,  # dataset npz:PATH, with the img_size and in_chans of the arrays
    root,  # relative paths are looked for here as well
) -> Data:  # in memory
    "A user's arrays."
    path = locate(cfg.dataset, root)
    images, labels, notes = read_npz(path)
    check_size(printable(path), images.shape[1:], cfg)
    K = 0 if labels is None else int(labels.max()) + 1
    if max(len(images), MOST_CLASSES) < K:
        text = f"labels up to {K - 1} for {len(images)} images; number the classes 0..K-1"
        raise ValueError(f"{printable(path)}: {text}")
    if labels is None:
        labels = np.zeros(len(images), np.int64)
    images, labels = canonical(images, labels)
    sha256, names = ordered_sum((images, labels)), [str(i) for i in range(K)]
    return from_arrays("npz", images, labels, names, sha256, cfg.holdout, notes)
