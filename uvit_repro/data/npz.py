"""A user's own images from an .npz file; nothing in it is unpickled."""

from pathlib import Path

import numpy as np

from uvit_repro.config import DataConfig
from uvit_repro.data.files import npz_names, printable
from uvit_repro.data.images import Data, check_size, from_arrays, locate

MOST_CLASSES = 10_000  # with fewer images than that
WANTED = "Wanted: images uint8 (N, H, W, C) and, for classes, labels (N,) of integers from 0"


def _problem(images: np.ndarray, labels: np.ndarray | None) -> str:
    "What is wrong with a user's arrays; empty: nothing."
    n = len(images) if images.ndim else 0
    if images.dtype != np.uint8 or images.ndim != 4 or not n:
        return f"images is {images.dtype} of shape {images.shape}; N must be above 0"
    if labels is None:
        return ""
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        return f"labels is {labels.dtype} of shape {labels.shape}; wanted integers of shape ({n},)"
    if labels.min() < 0 or labels.max() >= max(n, MOST_CLASSES):
        return f"labels from {labels.min()} to {labels.max()}; number the classes 0..K-1"
    return ""


def read_npz(
    path: Path,  # an .npz file
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:  # images, labels or None, notes
    "The arrays of an .npz file; a `ValueError` names the file and what is wrong with it."
    try:
        with open(path, "rb") as f:
            if f.read(6) == b"\x93NUMPY":
                raise ValueError("one bare array; save it with np.savez(path, images=...)")
        names = npz_names(path)
        if "images" not in names:
            raise ValueError(f"arrays {names}, but none called `images`")
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in names else None
        why = _problem(images, labels)
    except Exception as e:  # zipfile and numpy have many ways to meet damage
        why = (str(e) or type(e).__name__).splitlines()[0][:200]
    if why:
        raise ValueError(f"{printable(path)}: not usable as npz: {why}. {WANTED}")
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
    labels = np.zeros(len(images), int) if labels is None else labels
    return from_arrays("npz", images, labels, K, cfg.holdout, notes)
