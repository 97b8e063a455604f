"""Images become one canonical uint8 set with a sum of its content; batches are a function of (seed, step); damaged files are named, and they do not stop a run."""

import hashlib
import io
import itertools
import math
import os
import sys
import time
import warnings
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import (
    CONTENT,
    DATASETS,
    PATHS,
    DataConfig,
    Experiment,
    ParameterError,
    data_root,
    key_seed,
    resolve_name,
)


@dataclass(eq=False, repr=False)
class Data:
    "A data set, opened. Objects are shared between callers: do not write into them."

    name: str  # a key of DATASETS
    train_images: Tensor | None  # uint8 (N, C, H, W); None when streamed
    train_labels: Tensor  # int64 (N,); zeros when unlabelled
    test_images: Tensor  # uint8 (M, C, H, W), M may be 0
    test_labels: Tensor  # int64 (M,)
    num_classes: int  # labels are 0..num_classes-1; 0: unlabelled
    class_names: list[str]  # one for each class
    sha256: str  # sum of the content, whatever path it came from
    notes: list[str] = field(default_factory=list)  # `kind: file (detail)`; see `summary`
    stream: torch.utils.data.Dataset | None = None  # large sets: item i is (uint8 (C, H, W), label)
    inputs: object = None  # latents (chapter 07): read(index, mirror) gives moments (B, 2C, h, w); what the network is trained on in place of pixels
    test_inputs: Tensor | None = (
        None  # held-out images as the network sees them, float32 (M, C, h, w); None: their pixels
    )
    decode: object = None  # function from latents (B, C, h, w) and the name of a decoder (empty: the default) to pixels uint8 (B, *shape), on the same device
    texts: object = (
        None  # captions (chapter 08): read(index, u), test(index), prompts(n), prompt(i), null
    )
    pixels_sha256: str = (
        ""  # sum of the set whose pixels these are, where `sha256` is that of their latents
    )
    judge: object = None  # function from samples uint8 (N, *shape), in the order of `prompts`, to statistics of its own

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.test_images.shape[1:])

    def __len__(self) -> int:
        return len(self.train_labels)

    def __repr__(self):
        where = (
            "as latents"
            if self.inputs is not None
            else "in memory"
            if self.stream is None
            else "streamed from files"
        )
        return (
            f"Data {self.name}: {len(self)} training images ({where}), {len(self.test_labels)} held out, shape {self.shape}, "
            f"{self.num_classes or 'no'} classes, sum {self.sha256[:12]}, {len(self.notes)} notes"
        )


def to_model(
    u8: Tensor,  # uint8 images, any shape
) -> Tensor:  # float32 in [-1, 1]
    "Scale pixels for the network: x/127.5 - 1 (setup, section 6)."
    return u8.float() / 127.5 - 1


def to_uint8(
    x: Tensor,  # images in [-1, 1], values outside are clamped
) -> Tensor:  # uint8
    "Samples as pixels: clamp, scale, round (setup, section 5)."
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(
    u8,  # uint8 images (N, C, H, W), tensor or array, C 1 or 3
    nrow: int,  # images in a row
    pad: int = 1,  # white pixels between images
    scale: int = 1,  # each pixel becomes scale x scale
) -> np.ndarray:  # uint8 (H, W, 3)
    "Images side by side, row by row."
    u8 = u8.detach().cpu().numpy() if isinstance(u8, Tensor) else np.asarray(u8)
    if u8.dtype != np.uint8 or u8.ndim != 4 or u8.shape[1] not in (1, 3):
        raise ValueError(
            f"image_grid: got {u8.dtype} of shape {u8.shape}; wanted uint8 (N, 1 or 3, H, W), see to_uint8"
        )
    n, _, h, w = u8.shape
    grid = np.full(
        (math.ceil(n / nrow) * (h + pad) + pad, nrow * (w + pad) + pad, 3), 255, np.uint8
    )
    for i, im in enumerate(u8):
        y, x = (i // nrow) * (h + pad) + pad, (i % nrow) * (w + pad) + pad
        grid[y : y + h, x : x + w] = im.transpose(1, 2, 0)
    return grid.repeat(scale, 0).repeat(scale, 1)


def show_images(
    u8,  # uint8 images (N, C, H, W)
    nrow: int,  # images in a row
    ax=None,  # axes to draw on; None: new ones
    title=None,  # above the picture
):  # the axes
    "Draw a grid of images without axes."
    import matplotlib.pyplot as plt

    grid = image_grid(u8, nrow)
    if ax is None:
        ax = plt.subplots(
            figsize=(min(12, 0.6 * nrow), min(12, 0.6 * nrow) * grid.shape[0] / grid.shape[1])
        )[1]
    ax.imshow(grid, interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title, fontsize=10)
    return ax


def save_png(
    array: np.ndarray,  # uint8 (H, W, 3), as from `image_grid`
    path,  # file to write; its folder is made
) -> Path:  # the file
    "Write a picture as a PNG file."
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, format="PNG")
    return path


def canonical(
    images: np.ndarray,  # uint8 (N, H, W, C)
    labels: np.ndarray,  # integers (N,)
) -> tuple[np.ndarray, np.ndarray]:  # the same, sorted by (label, pixel bytes)
    "The canonical order of a labelled set of images: independent of the order given."
    images, labels = np.ascontiguousarray(images), np.asarray(labels)
    keys = [(y, im.tobytes()) for y, im in zip(labels.tolist(), images)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return images[order], labels[order]


def content_sha256(
    *splits,  # (images uint8 (N, H, W, C), labels (N,)) for each split in turn
) -> str:  # hexadecimal sum
    "Sum of the content of a data set: shape, labels and pixels of each split in canonical order."
    return _sum(*(canonical(*s) for s in splits))


def _sum(*splits) -> str:
    "`content_sha256` of splits that are in canonical order already."
    h = hashlib.sha256()
    for images, labels in splits:
        h.update(str(images.shape).encode())
        h.update(labels.astype("<i8").tobytes())
        h.update(images.tobytes())
    return h.hexdigest()


def hold_out(
    labels,  # integers (N,), in canonical order
    n: int,  # images to keep from training, below N
    sha256: str,  # sum of the content: the key of the permutation
) -> tuple[Tensor, Tensor]:  # indices of training and of held-out images, both ascending
    "Split by class in proportion (largest remainder), keyed by content and not by the run's seed."
    labels = np.asarray(labels)
    N = len(labels)
    if n >= N:
        raise ParameterError(
            f"holdout = {n}: there are {N} images, so at most {N - 1} can be held out"
        )
    classes, where, counts = np.unique(labels, return_inverse=True, return_counts=True)
    take, rest = counts * n // N, counts * n % N
    take[np.argsort(-rest, kind="stable")[: n - take.sum()]] += 1
    perm = torch.randperm(
        N, generator=torch.Generator().manual_seed(key_seed("holdout", sha256))
    ).numpy()
    held = np.zeros(N, bool)
    for c in range(len(classes)):
        held[perm[where[perm] == c][: take[c]]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def _fits(what: str, h: int, w: int, c: int, cfg: DataConfig):
    "Raise `ParameterError` when images of fixed size are not what the configuration says."
    if (h, w, c) != (cfg.img_size, cfg.img_size, cfg.in_chans):
        todo = (
            f"add -p img_size {h} -p in_chans {c}"
            if h == w
            else "crop them to squares, or use folder:PATH, which does"
        )
        raise ParameterError(
            f"{what}: images of {h}x{w} pixels and {c} channel(s), but img_size = {cfg.img_size} and in_chans = {cfg.in_chans}; {todo}"
        )


def _classes(what: str, found: int, names: list[str], cfg: DataConfig) -> tuple[int, list[str]]:
    "Number and names of the classes: as found, or more where the configuration says so."
    if cfg.num_classes and found > cfg.num_classes:
        raise ParameterError(
            f"num_classes = {cfg.num_classes}: {what} has labels 0..{found - 1}; set num_classes = {found}, or 0 to take it from the data"
        )
    n = max(found, cfg.num_classes) if found else 0
    return n, names + [str(i) for i in range(len(names), n)]


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    "(N, H, W, C) and (N,) arrays as uint8 (N, C, H, W) and int64 (N,) tensors."
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(
        labels.astype(np.int64)
    )


def _assemble(name, images, labels, cfg, num_classes, names, sha, notes) -> Data:
    "A resident set from arrays in canonical order, `cfg.holdout` images held out."
    x, y = _tensors(images, labels)
    train, test = hold_out(labels, cfg.holdout, sha)
    gone = sorted(set(labels.tolist()) - set(labels[train.numpy()].tolist()))
    notes = notes + [f"class without training image: {names[c]} (all held out)" for c in gone]
    return Data(name, x[train], y[train], x[test], y[test], num_classes, names, sha, notes)


def _check_sum(name: str, sha: str, source: str, cure: str):
    "Raise when a named set is not what its name promises."
    if sha != CONTENT[name]:
        raise ValueError(
            f"{name}: the images read from {source} are not {name}: their sum is {sha}, expected {CONTENT[name]}. {cure}"
        )


def load_digits(
    cfg: DataConfig,  # img_size 8, in_chans 1
    root=None,  # not used: the images are part of scikit-learn
) -> Data:  # 1,797 images less the held-out ones
    "The handwritten digits of scikit-learn (not in the paper; UCI optical recognition of handwritten digits, test part)."
    from sklearn.datasets import load_digits as embedded

    _fits("digits", 8, 8, 1, cfg)
    raw = embedded()
    images, labels = canonical(
        np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None], raw.target
    )
    sha = _sum((images, labels))
    _check_sum("digits", sha, "scikit-learn", "Install an unmodified scikit-learn.")
    return _assemble(
        "digits",
        images,
        labels,
        cfg,
        *_classes("digits", 10, [str(i) for i in range(10)], cfg),
        sha,
        [],
    )


def _fetch_cifar10(root) -> str:
    return f"""python -c "import torchvision; torchvision.datasets.CIFAR10({str(root)!r}, download=True)\""""


def find_cifar10(
    root,  # the folder of the data sets
) -> Path:  # a folder cifar-10-batches-py, or the folder of train.npz and test.npz
    "Where CIFAR-10 is, or `FileNotFoundError` with the command that fetches it."
    root = Path(root)
    for p in (root / "cifar-10-batches-py", root / "cifar10" / "cifar-10-batches-py"):
        if p.is_dir():
            return p
    if all((root / "cifar10" / f"{s}.npz").is_file() for s in ("train", "test")):
        return root / "cifar10"
    raise FileNotFoundError(
        f"cifar10 is not under {root}: looked for cifar-10-batches-py, cifar10/cifar-10-batches-py, "
        "and cifar10/train.npz with cifar10/test.npz. "
        f"Fetch it (163 MB) with\n    {_fetch_cifar10(root)}\nor set UVIT_DATA (parameter data_root) to the folder that has it"
    )


CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def _read_cifar10(where: Path, root) -> list[tuple[np.ndarray, np.ndarray]]:
    "(images, labels) of the two splits as they lie in the files."
    if where.name != "cifar-10-batches-py":
        return [_read_npz(where / f"{s}.npz")[:2] for s in ("train", "test")]
    from torchvision.datasets import CIFAR10

    try:
        return [
            ((d := CIFAR10(where.parent, train=s, download=False)).data, np.array(d.targets))
            for s in (True, False)
        ]
    except RuntimeError as e:
        raise ValueError(
            f"cifar10: files in {where} are missing or damaged ({e}). Remove that folder and run\n    {_fetch_cifar10(root)}"
        ) from None


def load_cifar10(
    cfg: DataConfig,  # img_size 32, in_chans 3, holdout 0
    root,  # the folder of the data sets
) -> Data:  # 50,000 training and 10,000 test images, in canonical order
    "CIFAR-10 with its own test split (Section 5.1), its content checked."
    _fits("cifar10", 32, 32, 3, cfg)
    if cfg.holdout:
        raise ParameterError(
            f"holdout = {cfg.holdout}: cifar10 has a test split of its own; use holdout = 0"
        )
    where = find_cifar10(root)
    splits = _read_cifar10(where, root)
    if any(y is None for _, y in splits):
        raise ValueError(f"cifar10: an array `labels` is missing in {where}/train.npz or test.npz")
    (x, y), (tx, ty) = splits = [canonical(*s) for s in splits]
    sha = _sum(*splits)
    _check_sum("cifar10", sha, str(where), f"Remove them and run\n    {_fetch_cifar10(root)}")
    return Data(
        "cifar10",
        *_tensors(x, y),
        *_tensors(tx, ty),
        *_classes("cifar10", 10, list(CIFAR10_CLASSES), cfg),
        sha,
    )


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    "images, labels (or None) and notes of an .npz file; `ValueError` names what is wrong."
    try:
        z = np.load(path, allow_pickle=False)
        if not isinstance(z, np.lib.npyio.NpzFile):
            raise ValueError("one bare array; save it with np.savez(path, images=...)")
        with z:
            if "images" not in z.files:
                raise ValueError(f"arrays {z.files}, but none called `images`")
            images, labels, other = (
                z["images"],
                z["labels"] if "labels" in z.files else None,
                sorted(set(z.files) - {"images", "labels"}),
            )
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(
            f"{path}: not usable as npz: {str(e).splitlines()[0] if str(e) else type(e).__name__}. "
            "Wanted: images uint8 (N, H, W, C) and, if there are classes, labels (N,) of integers from 0"
        ) from None
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"{path}: images is {images.dtype} of shape {images.shape}; wanted uint8 (N, H, W, C) with N > 0, grey images with C = 1"
        )
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(images),)):
        raise ValueError(
            f"{path}: labels is {labels.dtype} of shape {labels.shape}; wanted integers of shape ({len(images)},), one for each image"
        )
    if labels is not None and labels.min() < 0:
        raise ValueError(f"{path}: labels from {labels.min()} to {labels.max()}; wanted 0..K-1")
    return images, labels, [f"array not used: {n} ({path.name})" for n in other]


def _locate(dataset: str, root) -> Path:
    "The path after `folder:`, `latents:` or `npz:`: as given, or relative to here, or relative to the folder of the data sets."
    kind, _, given = dataset.partition(":")
    path = Path(given).expanduser()
    places = (
        [path.absolute()]
        if path.is_absolute()
        else [path.absolute(), (Path(root) / path).absolute()]
    )
    for p in places:
        if p.exists():
            if p.is_dir() != (kind != "npz"):
                raise ValueError(
                    f"{p} is a {'folder' if p.is_dir() else 'file'}: folder:PATH takes a folder of images, latents:PATH one of encoded images, npz:PATH a file of arrays"
                )
            return p
    raise FileNotFoundError(
        f"dataset = {dataset!r}: no such {'file' if kind == 'npz' else 'folder'}; looked for {' and '.join(map(str, dict.fromkeys(places)))}"
    )


def load_npz(
    cfg: DataConfig,  # dataset npz:PATH, with the img_size and in_chans of the arrays
    root,  # relative paths are looked for here as well
) -> Data:  # resident
    "A user's arrays."
    path = _locate(cfg.dataset, root)
    images, labels, notes = _read_npz(path)
    _fits(str(path), *images.shape[1:], cfg)
    K = int(labels.max()) + 1 if labels is not None else 0
    if max(len(images), cfg.num_classes) < K:
        raise ValueError(
            f"{path}: labels up to {K - 1} for {len(images)} images; number them 0..K-1, or set num_classes"
        )
    K, names = _classes(str(path), K, [str(i) for i in range(K)], cfg)
    images, labels = canonical(
        images, labels if labels is not None else np.zeros(len(images), np.int64)
    )
    return _assemble("npz", images, labels, cfg, K, names, _sum((images, labels)), notes)


def prepare(
    im,  # PIL image in mode L or RGB
    img_size: int,  # side of the result
) -> np.ndarray:  # uint8 (img_size, img_size, C)
    "Repeated box halving, bicubic to the short side, centre crop (setup, section 6)."
    from PIL import Image

    while min(im.size) >= 2 * img_size:
        im = im.resize(tuple(s // 2 for s in im.size), Image.BOX)
    w, h = (round(s * img_size / min(im.size)) for s in im.size)
    if w * h > max(89_478_485, img_size**2):
        raise ValueError(f"{im.size[0]}x{im.size[1]} pixels would become {w}x{h}")
    a = np.array(im.resize((w, h), Image.BICUBIC))
    y, x = (h - img_size) // 2, (w - img_size) // 2
    return np.ascontiguousarray(a[y : y + img_size, x : x + img_size]).reshape(
        img_size, img_size, -1
    )


EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def to_8bit(
    im,  # PIL image, loaded, any mode
):  # (PIL image of 8 bits per channel, name of what it was or "")
    "Images of 16 bits, integers or floating point as 8-bit grey: 16 bits over 257, floating point stretched over its own range."
    from PIL import Image

    if im.mode != "F" and not im.mode.startswith("I"):
        return im, ""
    a = np.nan_to_num(np.asarray(im).astype(np.float64))
    if im.mode == "F":
        a = (a - a.min()) / (np.ptp(a) or 1) * 65535
    return Image.fromarray(
        np.rint(a.clip(0, 65535) / 257).astype(np.uint8)
    ), "floating point" if im.mode == "F" else "16-bit grey"


MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey",
    "La": "grey",
    "P": "palette",
    "PA": "palette",
}


def decode(
    raw: bytes,  # a file
    in_chans: int,  # 1: grey, 3: RGB
):  # (PIL image in mode L or RGB, [(what was done, detail)])
    "Decode the first frame of an image file, upright, without alpha, in the wanted mode. Raises on anything that is not whole."
    from PIL import Image, ImageOps

    if not raw:
        raise ValueError("empty file")
    Image.init()  # all plugins; MPO comes with JPEG
    im, done = Image.open(io.BytesIO(raw), formats=FORMATS), []
    if (n := getattr(im, "n_frames", 1)) > 1:
        im.seek(0)
        done.append(("first frame used", f"of {n}"))
    wide = ";16" in str(im.tile)  # 16 bits per channel in the file; Pillow keeps the upper 8
    try:
        turn = im.getexif().get(274, 1)
    except Exception:
        turn = 1
        done.append(("EXIF not readable, not applied", ""))
    im.load()
    if turn in range(2, 9):
        im = ImageOps.exif_transpose(im)
        done.append(("turned as EXIF says", f"orientation {turn}"))
    im, was = to_8bit(im)
    want, mode, alpha = "L" if in_chans == 1 else "RGB", im.mode, im.has_transparency_data
    if alpha:
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA")).convert(
            "RGB"
        )
        done.append(("alpha put on white", ""))
    was = was or MODES.get(mode, mode.rstrip("AaXx")) + (", 16 bits per channel" if wide else "")
    if was != MODES.get(want, want):
        done.append((f"converted to {'grey' if in_chans == 1 else 'RGB'}", f"was {was}"))
    return im.convert(want), done


def _walk(folder: Path, deep: bool = True):
    "(image files, other files, folders that could not be read) under a folder, links followed, hidden names skipped."
    images, others, errors, seen = [], [], [], set()
    for d, subs, names in os.walk(
        folder, followlinks=True, onerror=lambda e: errors.append(Path(e.filename))
    ):
        real = os.path.realpath(d)
        if real in seen:
            subs.clear()
            continue  # a link that leads back
        seen.add(real)
        subs[:] = sorted(s for s in subs if deep and not s.startswith("."))
        for n in sorted(names):
            if not n.startswith("."):
                (images if n.lower().endswith(EXTENSIONS) else others).append(Path(d, n))
    return images, others, errors


def _label(path: Path, base: Path) -> str:
    "A file's name for a report, printable whatever it is."
    return path.relative_to(base).as_posix().encode("utf-8", "replace").decode()


def list_folder(
    base: Path,  # the folder
) -> tuple[list, list[str]]:  # [(class name or "", file)] and notes
    "The candidates of a folder with their classes; nothing is decoded."
    top, others, errors = _walk(base, deep=False)
    subs = sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {p.name: _walk(p) for p in subs}
    files, notes = [(c, f) for c, (images, _, _) in found.items() for f in images], []
    if files:
        notes += [f"left out, beside the class folders: {_label(f, base)}" for f in top]
    else:
        files = [("", f) for f in top]
    others = others + [f for _, o, _ in found.values() for f in o]
    notes += [
        f"left out, not readable: {_label(f, base)} (folder)"
        for f in errors + [f for _, _, e in found.values() for f in e]
    ]
    if others:
        kinds = {}
        for f in others:
            kinds[f.suffix.lower() or "no extension"] = (
                kinds.get(f.suffix.lower() or "no extension", 0) + 1
            )
        told = ", ".join(f"{n} {k}" for k, n in sorted(kinds.items(), key=lambda kn: -kn[1])[:5])
        notes.append(
            f"not an image, ignored: {len(others)} file(s) ({told}; first {_label(others[0], base)})"
        )
    return files, notes


def read_image(
    path,  # an image file
    img_size: int,  # side of the result
    in_chans: int,  # 1 or 3
) -> tuple:  # (uint8 (H, W, C), sum of the file, [(what was done, detail)])
    "Read, decode and prepare one file. Raises when it is not whole."
    if not os.path.isfile(path):
        raise FileNotFoundError("no regular file" if os.path.lexists(path) else "no such file")
    raw = Path(path).read_bytes()
    im, done = decode(raw, in_chans)
    if min(im.size) < img_size:
        done.append(("enlarged", f"from {im.size[0]}x{im.size[1]}"))
    return prepare(im, img_size), hashlib.sha256(raw).hexdigest(), done


def _try_read(path, img_size, in_chans):
    "`read_image`, or the reason why not, as text: a bad file must not stop a run."
    from PIL import UnidentifiedImageError

    try:
        return read_image(path, img_size, in_chans)
    except UnidentifiedImageError:
        return "no image in a known format"
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0][:120]


def scan_folder(
    base: Path,  # the folder
    files: list,  # [(class name, file)], from `list_folder`
    cfg: DataConfig,  # img_size, in_chans
    resident_bytes: int,  # keep prepared images up to this size
) -> tuple[
    list, list[str]
]:  # [(class name, sum of the file, file, image or None)] sorted, and notes
    "Read every file once, in threads; images are dropped again when together they exceed `resident_bytes`."
    from PIL import Image

    Image.init()
    kept, notes, first, room, last = (
        [],
        [],
        {},
        resident_bytes // (cfg.img_size**2 * cfg.in_chans),
        time.monotonic(),
    )
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for k in range(0, len(files), 512):
            part = files[k : k + 512]
            for (c, f), got in zip(
                part, pool.map(lambda cf: _try_read(cf[1], cfg.img_size, cfg.in_chans), part)
            ):
                name = _label(f, base)
                if isinstance(got, str):
                    notes.append(f"left out, not readable: {name} ({got})")
                    continue
                image, sha, done = got
                notes += [
                    f"{what}: {name} ({detail})" if detail else f"{what}: {name}"
                    for what, detail in done
                ]
                if first.setdefault(sha, name) != name:
                    notes.append(f"duplicate, kept: {name} (same bytes as {first[sha]})")
                kept.append((c, sha, str(f), image if len(kept) < room else None))
            if len(kept) > room and kept[0][3] is not None:
                kept = [(c, s, f, None) for c, s, f, _ in kept]
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(
                    f"{base}: {k + len(part)} of {len(files)} files read",
                    file=sys.stderr,
                    flush=True,
                )
    return sorted(kept, key=lambda r: r[:3]), notes


class FolderStream(torch.utils.data.Dataset):
    "Images read from their files: item i is (uint8 (C, H, W), label). A file that went bad is replaced by the next readable one."

    def __init__(self, files, labels, img_size, in_chans):
        self.files, self.labels, self.img_size, self.in_chans, self.warned = (
            list(files),
            torch.as_tensor(labels),
            img_size,
            in_chans,
            False,
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        i = range(len(self))[i]
        for j in itertools.chain(range(i, len(self)), range(i)):
            got = _try_read(self.files[j], self.img_size, self.in_chans)
            if not isinstance(got, str):
                return torch.from_numpy(np.ascontiguousarray(got[0].transpose(2, 0, 1))), int(
                    self.labels[j]
                )
            if not self.warned:
                warnings.warn(
                    f"{self.files[j]} is no longer readable ({got}); such files are replaced by the next readable one. This is said once.",
                    RuntimeWarning,
                )
                self.warned = True
        raise FileNotFoundError(
            f"none of the {len(self)} image files is readable any more, the first being {self.files[0]}"
        )


RESIDENT_BYTES = 2 << 30  # prepared images beyond this size are streamed


def load_folder(
    cfg: DataConfig,  # dataset folder:PATH, any img_size, in_chans 1 or 3
    root,  # relative paths are looked for here as well
    resident_bytes: int = None,  # largest prepared set that is kept in memory; None: RESIDENT_BYTES
) -> Data:  # resident or streamed
    "A user's own images, one class for each sub-folder, prepared as the paper prepares ImageNet."
    if cfg.in_chans not in (1, 3):
        raise ParameterError(
            f"in_chans = {cfg.in_chans}: images of a folder are read with 3 channels (RGB) or 1 (grey)"
        )
    base, limit = (
        _locate(cfg.dataset, root),
        RESIDENT_BYTES if resident_bytes is None else resident_bytes,
    )
    files, notes = list_folder(base)
    rows, more = scan_folder(base, files, cfg, limit)
    notes += more
    if not rows:
        raise ValueError(
            f"{base}: no usable image among {len(files)} candidate(s) ({', '.join(EXTENSIONS)}). "
            + " | ".join(notes[:3])
        )
    names = sorted({c for c, *_ in rows})
    subs = [p for p in sorted(base.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    notes += [f"empty class, dropped: {_label(p, base)}" for p in subs if p.name not in names]
    h = hashlib.sha256()
    for c, sha, *_ in rows:
        h.update(f"{c}\0{sha}\n".encode("utf-8", "surrogateescape"))
    labels, size = (
        np.array([names.index(c) for c, *_ in rows]),
        len(rows) * cfg.img_size**2 * cfg.in_chans,
    )
    K, names = _classes(str(base), len(names), names, cfg) if names != [""] else (0, [])
    if rows[0][3] is not None:
        return _assemble(
            "folder", np.stack([r[3] for r in rows]), labels, cfg, K, names, h.hexdigest(), notes
        )
    notes.append(
        f"streamed: {len(rows)} images of {size / 2**20:.1f} MiB together (more than {limit / 2**20:.1f} MiB)"
    )
    train, test = hold_out(labels, cfg.holdout, h.hexdigest())
    stream = lambda idx: FolderStream(
        [rows[i][2] for i in idx], labels[idx.numpy()], cfg.img_size, cfg.in_chans
    )
    held = [x for x, _ in stream(test)] if len(test) else []
    held = (
        torch.stack(held)
        if held
        else torch.empty((0, cfg.in_chans, cfg.img_size, cfg.img_size), dtype=torch.uint8)
    )
    return Data(
        "folder",
        None,
        torch.from_numpy(labels)[train],
        held,
        torch.from_numpy(labels)[test],
        K,
        names,
        h.hexdigest(),
        notes,
        stream(train),
    )


def summary(
    notes: list[str],  # of a `Data`
    max_lines: int = 10,  # lines at most
):
    "Print notes by kind with their number and first files."
    kinds = {}
    for n in notes:
        kinds.setdefault(n.partition(": ")[0], []).append(n.partition(": ")[2])
    order = sorted(kinds, key=lambda k: (not k.startswith("left out"), -len(kinds[k])))
    shown = order if len(order) <= max_lines else order[: max_lines - 1]
    for k in shown:
        print(
            f"{len(kinds[k]):6d}  {k}: "
            + ", ".join(kinds[k][:3])
            + (" ..." if len(kinds[k]) > 3 else "")
        )
    if len(shown) < len(order):
        print(
            f"{sum(len(kinds[k]) for k in order[len(shown) :]):6d}  of {len(order) - len(shown)} more kinds; all are in .notes"
        )


def _stamp(cfg: DataConfig, root):
    "What changes when the files behind a data set change: names, sizes and times."
    kind = cfg.dataset.partition(":")[0]
    if kind not in ("cifar10", *PATHS):
        return None
    try:
        where = find_cifar10(root) if kind == "cifar10" else _locate(cfg.dataset, root)
    except (OSError, ValueError):
        return None  # the loader says what is wrong
    files = (
        [where]
        if where.is_file()
        else [where / "index.json"]
        if kind == "latents"
        else [
            Path(d, n)
            for d, _, names in os.walk(where, followlinks=kind == "folder")
            for n in names
        ]
        + [where]
    )
    stat = lambda f: (
        (s.st_size, s.st_mtime_ns) if (s := os.stat(f) if os.path.exists(f) else None) else None
    )
    return _digest(sorted((str(f), stat(f)) for f in files))


def _digest(obj) -> str:
    "sha256 of a printed object."
    return hashlib.sha256(repr(obj).encode("utf-8", "surrogateescape")).hexdigest()


_opened = {}  # (configuration, root, stamp): Data, the latest last


def _open(cfg: DataConfig, root: str) -> Data:
    "Load, or find what was loaded from the same files: at most four sets are kept, each also under its resolved number of classes."
    cfg = replace(
        cfg, flip=True, data_sha256=""
    )  # what does not change the images is not part of the key
    key = (cfg, root, _stamp(cfg, root))
    if key not in _opened:
        data = resolve_name(DATASETS, cfg.dataset.partition(":")[0])(cfg, Path(root))
        for k in [k for k in _opened if k[:2] == key[:2]] + list(_opened)[
            : max(0, len(_opened) - 6)
        ]:
            _opened.pop(k, None)
        _opened[key] = _opened[(replace(cfg, num_classes=data.num_classes), *key[1:])] = data
    return _opened[key]


def open_data(
    exp: Experiment,  # with a data set that this version can load
) -> tuple[
    Experiment, Data
]:  # the experiment with data_sha256 and num_classes filled in, and its images
    "Open the data set of an experiment, under `data_root` or `UVIT_DATA` or data/ in the project."
    cfg, kind = exp.data, exp.data.dataset.partition(":")[0]
    data = _open(cfg, str(data_root(exp.execution.data_root).absolute()))
    if cfg.data_sha256 not in ("", data.sha256):
        raise ValueError(
            f"{cfg.dataset}: the experiment was made with data of sum {cfg.data_sha256[:16]}..., but what lies there now has {data.sha256[:16]}...; "
            "bring back the old files, or leave data_sha256 empty for a new experiment"
        )
    if exp.model.condition == "class" and not data.num_classes:
        raise ParameterError(
            f"condition = 'class', but {cfg.dataset} has no labels: use condition = 'none' with p_uncond = 0 and cfg_scale = 1, or give labels ("
            "folder: one sub-folder for each class; npz: an array `labels`)"
        )
    if exp.model.condition == "text":
        if data.texts is None:
            raise ParameterError(
                f"condition = 'text', but {cfg.dataset} has no captions: the sets with captions are mscoco256 and shapes"
            )
        if (found := tuple(data.texts.null.shape)) != (cfg.text_tokens, cfg.text_dim):
            raise ParameterError(
                f"text_tokens = {cfg.text_tokens}, text_dim = {cfg.text_dim}: the captions of {cfg.dataset} are encoded as {found[0]} x {found[1]}"
            )
    return replace(
        exp,
        data=replace(
            cfg, num_classes=data.num_classes, data_sha256="" if kind in CONTENT else data.sha256
        ),
    ), data


def _generator(*key) -> torch.Generator:
    return torch.Generator().manual_seed(key_seed(*key))


def _send(t: Tensor, device: torch.device) -> Tensor:
    "To the device, without waiting for it."
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


def _collate(items) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def draw_latents(
    moments: Tensor,  # (B, 2C, h, w): mean, then log-variance
    noise: Tensor,  # standard normal, (B, C, h, w)
    scale: float,  # latent_scale
) -> Tensor:  # float32 (B, C, h, w)
    "A latent from its moments (setup, section 6)."
    mean, logvar = moments.float().chunk(2, dim=1)
    return scale * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise)


class Order:
    "Which examples make up each batch: a permutation per epoch, and batches that run across its end."

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed, self.epochs = n, batch_size, seed, {}

    def epoch(self, e: int) -> Tensor:
        "The permutation of one epoch, (N,)."
        if e not in self.epochs:
            if len(self.epochs) > 2:
                self.epochs.clear()
            self.epochs[e] = torch.randperm(self.n, generator=_generator(self.seed, "order", e))
        return self.epochs[e]

    def at(self, step: int) -> Tensor:
        "Indices of the whole batch of a step, (B,)."
        start, out = step * self.batch_size, []
        stop = start + self.batch_size
        while start < stop:
            e, i = divmod(start, self.n)
            out.append(self.epoch(e)[i : i + stop - start])
            start += len(out[-1])
        return torch.cat(out)


def read_ahead(
    read,  # function of a step
    steps,  # iterator of steps
    depth=2,  # how many are read before they are asked for
):
    "(step, read(step)) for each step, read in a thread while the caller computes."
    with ThreadPoolExecutor(1) as pool:
        ahead = deque((s, pool.submit(read, s)) for s in itertools.islice(steps, depth))
        while ahead:
            s, got = ahead.popleft()
            ahead.extend((k, pool.submit(read, k)) for k in itertools.islice(steps, 1))
            yield s, got.result()


class Batches:
    "Training batches: `at(step)` gives (x0 float32 (B, C, H, W), y: labels int64 (B,) or texts float32 (B, L, D)), a pure function of (seed, step)."

    def __init__(
        self,
        data: Data,  # resident, streamed or latent
        batch_size: int,  # images per step, over all processes
        seed: int,  # of the run
        flip: bool,  # random horizontal flip (setup, section 6)
        p_uncond: float,  # conditions replaced by the null condition
        null_class: int,  # its id, num_classes (released: 1000 of 1001 rows)
        device="cpu",  # where batches are put together
        workers: int = 0,  # processes that read a streamed set
        part=(0, 1),  # (rank, processes): rows rank::processes of the global batch
        condition="class",  # what y is: text for encoded captions, else labels
        latent_scale=1.0,  # factor on latents
    ):
        if batch_size < 1 or not len(data):
            raise ParameterError(
                f"batch_size = {batch_size} on {len(data)} training images: both must be at least 1"
            )
        self.data, self.order, self.batch_size, self.seed, self.flip, self.p_uncond = (
            data,
            Order(len(data), batch_size, seed),
            batch_size,
            seed,
            flip,
            p_uncond,
        )
        self.device, self.workers, self.part, self.latent_scale = (
            torch.device(device),
            workers,
            slice(part[0], None, part[1]),
            latent_scale,
        )
        self.texts, self.inputs = data.texts if condition == "text" else None, data.inputs
        self.null = null_class if self.texts is None else self.texts.null.float().to(self.device)
        if p_uncond and self.null is None:
            raise ParameterError(f"p_uncond = {p_uncond} needs the id of the null class")
        self.images = (
            data.train_images.to(self.device)
            if data.stream is None and data.inputs is None
            else None
        )
        self.labels = data.train_labels.to(self.device)

    def uniform(self, what: str, step: int) -> Tensor:
        "Random numbers of this part of a batch, in [0, 1)."
        return torch.rand(self.batch_size, generator=_generator(self.seed, what, step))[self.part]

    def condition(self, step: int, i: Tensor) -> Tensor:
        "Labels, or one of the captions of each image."
        return (
            self.labels[_send(i, self.device)]
            if self.texts is None
            else self.texts.read(i, self.uniform("caption", step))
        )

    def fetch(self, step: int) -> tuple[Tensor, Tensor]:
        "Pixels or moments, and the conditions, as they lie in memory or on disk."
        i = self.order.at(step)[self.part]
        y = self.condition(step, i)
        if self.inputs is not None:
            return self.inputs.read(i, self.uniform("flip", step) < (0.5 if self.flip else 0)), y
        return self.images[_send(i, self.device)] if self.images is not None else torch.stack(
            [self.data.stream[k][0] for k in i.tolist()]
        ), y

    def finish(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        "Flip or draw, drop conditions, scale; randomness of the whole batch, then this part of it."
        x, y = (v if v.device == self.device else _send(v, self.device) for v in (x, y))
        if self.inputs is not None:
            noise = torch.randn(
                (self.batch_size, x.shape[1] // 2, *x.shape[2:]),
                generator=torch.Generator(self.device).manual_seed(
                    key_seed(self.seed, "latent", step)
                ),
                device=self.device,
            )
            x = draw_latents(x, noise[self.part], self.latent_scale)
        else:
            if self.flip:
                x = torch.where(
                    _send(self.uniform("flip", step) < 0.5, self.device)[:, None, None, None],
                    x.flip(-1),
                    x,
                )
            x = to_model(x)
        if self.texts is not None:
            y = y.float()
        if self.p_uncond:
            y = torch.where(
                _send(self.uniform("drop", step) < self.p_uncond, self.device).view(
                    -1, *[1] * (y.dim() - 1)
                ),
                self.null,
                y,
            )
        return x, y

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        return self.finish(step, *self.fetch(step))

    def iterate(self, start_step: int = 0):
        "at(start_step), at(start_step + 1), ... without end. Streamed sets are read ahead by `workers` processes, latents and texts by a thread."
        steps = itertools.count(start_step)
        if self.inputs is None and self.data.stream is not None:
            ahead = self.stream(start_step)
        else:
            ahead = (
                ((s, self.fetch(s)) for s in steps)
                if self.inputs is None and self.texts is None
                else read_ahead(self.fetch, steps)
            )
        for s, (x, y) in ahead:
            yield self.finish(s, x, y)

    def stream(self, start_step: int):
        "(step, (pixels, conditions)) of a streamed set, read by worker processes; the global random state stays as it is."
        steps = lambda: itertools.count(start_step)
        picks = (self.order.at(s)[self.part].tolist() for s in steps())
        loader = torch.utils.data.DataLoader(
            self.data.stream,
            batch_sampler=picks,
            collate_fn=_collate,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        for s, (x, y) in zip(steps(), loader):
            yield (
                s,
                (x, y if self.texts is None else self.condition(s, self.order.at(s)[self.part])),
            )
