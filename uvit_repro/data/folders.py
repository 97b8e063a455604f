"""Images in folders: a user's own, CelebA, ImageNet. Large sets are prepared once, into a store."""

import hashlib
import io
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import DataConfig, ParameterError, digest
from uvit_repro.data.fetch import how_to_get, missing
from uvit_repro.data.files import printable
from uvit_repro.data.images import Data, check_size, hold_out, locate
from uvit_repro.data.store import Inputs, Store, StoreError, in_cache, write_store

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
RESIDENT_BYTES = 2 << 30  # larger sets stay on disk
STORED_FROM = 5000  # files from which a set is prepared once, into a store
SHARD = 4096  # images in a file of that store
THREADS = min(16, os.cpu_count() or 1)


# ---------------------------------------------------------------- one file
def prepare(
    im,  # PIL image in mode L or RGB
    img_size: int,  # side of the result
) -> np.ndarray:  # uint8 (img_size, img_size, C)
    "Repeated box halving, bicubic to the short side, centre crop: the paper's ImageNet."
    from PIL import Image

    while min(im.size) >= 2 * img_size:
        im = im.resize(tuple(s // 2 for s in im.size), Image.BOX)
    w, h = (round(s * img_size / min(im.size)) for s in im.size)
    if w * h > max(MOST_PIXELS, img_size**2):
        raise ValueError(f"{im.size[0]}x{im.size[1]} pixels would become {w}x{h}")
    a = np.array(im.resize((w, h), Image.BICUBIC))
    y, x = (h - img_size) // 2, (w - img_size) // 2
    a = np.ascontiguousarray(a[y : y + img_size, x : x + img_size])
    return a.reshape(img_size, img_size, -1)


def _celeba_crop(im, side: int) -> np.ndarray:
    "The released code's window around the face, resized."
    from PIL import Image

    if im.size != (178, 218):
        raise ValueError(f"{im.size[0]}x{im.size[1]} pixels, where img_align_celeba has 178x218")
    face = im.crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return np.array(face.resize((side, side), Image.BILINEAR))


def _decode(raw: bytes, in_chans: int):
    "An image file as a PIL image, upright, on white, its first frame. Raises unless it is whole."
    from PIL import Image, ImageOps

    if not raw:
        raise ValueError("empty file")
    Image.init()  # all plugins; MPO comes with JPEG
    im = Image.open(io.BytesIO(raw), formats=FORMATS)
    im.load()
    with suppress(Exception):  # damaged EXIF is not applied
        im = ImageOps.exif_transpose(im)
    if im.mode == "F" or im.mode.startswith("I"):
        raise ValueError("more than 8 bits per channel; convert it")
    if im.has_transparency_data:
        white = Image.new("RGBA", im.size, "white")
        im = Image.alpha_composite(white, im.convert("RGBA")).convert("RGB")
    return im.convert("L" if in_chans == 1 else "RGB")


def read_image(
    path,  # an image file
    img_size: int,  # side of the result
    in_chans: int = 3,  # 1 or 3
    crop=prepare,  # function of an image and img_size
) -> tuple[np.ndarray, str]:  # uint8 (H, W, C), sha256 of the file
    "Read, decode and prepare one file. Raises when it is not whole."
    if not os.path.isfile(path):
        raise FileNotFoundError("no regular file" if os.path.lexists(path) else "no such file")
    raw = Path(path).read_bytes()
    return crop(_decode(raw, in_chans), img_size), hashlib.sha256(raw).hexdigest()


# ---------------------------------------------------------------- many files
class ImageFile(NamedTuple):
    "A file, and what reading it showed."

    label: str  # name of its class; empty: none
    name: str  # below the folder of the set
    sha256: str  # of the file; empty when it can't be used
    problem: str  # why it can't


class PixelStore(Store):
    "Prepared images: `read(index)` gives pixels, `files` says what they were made from."

    kind = "images"

    def read(self, index, mirror=None) -> Tensor:
        "uint8 (B, C, H, W); `mirror` is left to the caller."
        return torch.from_numpy(self.rows("pixels", index))

    __getitem__ = read


@dataclass(frozen=True)
class Listing:
    "Image files by class, and how each becomes a square; nothing is decoded yet."

    base: Path  # the folder of the set
    files: list  # (class, path); class "": none
    img_size: int
    in_chans: int = 3
    crop: Callable = prepare  # function of an image and img_size
    notes: list = field(default_factory=list)

    def _attempt(self, entry: tuple[str, Path]) -> tuple[ImageFile, np.ndarray | None]:
        "What reading a file showed, and its image: a bad file must not stop a run."
        label, path = entry
        name = os.path.relpath(path, self.base)
        try:
            image, sha256 = read_image(path, self.img_size, self.in_chans, self.crop)
        except Exception as e:
            problem = f"{type(e).__name__}: {e}".splitlines()[0][:120]
            return ImageFile(label, name, "", problem), None
        return ImageFile(label, name, sha256, ""), image

    def read(self, a=0, b=None) -> tuple[Tensor, list[ImageFile]]:
        "Usable images of files a .. b-1, uint8 (n, C, H, W), and what became of every file."
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(self._attempt, self.files[a:b]))
        shape = (-1, self.img_size, self.img_size, self.in_chans)
        images = np.array([x for _, x in found if x is not None], np.uint8).reshape(shape)
        x = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return torch.from_numpy(x), [file for file, _ in found]

    def key(self) -> str:
        "Changes with names, sizes and times of the files, and with how they are prepared."

        def state(entry):
            with suppress(OSError):
                found = os.stat(entry[1])
                return found.st_size, found.st_mtime_ns

        with ThreadPoolExecutor(THREADS) as pool:
            states = list(pool.map(state, self.files))
        names = [(label, os.path.relpath(path, self.base)) for label, path in self.files]
        how = [str(self.base), self.img_size, self.in_chans, self.crop.__name__]
        return digest([how, names, states], 24)

    def store(self) -> PixelStore:
        "All usable images, read once and kept in results/cache; a killed reader is resumed."
        job = {"kind": "images", "count": len(self.files), "shard_rows": SHARD, "files": self.key()}

        def make_shard(a: int, b: int) -> tuple[dict, dict]:
            pixels, files = self.read(a, b)
            return {"pixels": pixels.numpy()}, {"images": files}

        def make(path: Path) -> PixelStore:
            with suppress(FileNotFoundError, StoreError):
                return PixelStore(path)
            say = partial(print, file=sys.stderr, flush=True)
            write_store(path, job, make_shard, lambda records: ({}, {}), say)
            return PixelStore(path)

        return in_cache(f"images-{job['files']}", make)

    def usable(self) -> tuple[Tensor | PixelStore, list[ImageFile]]:
        "Images of the usable files, from memory or from a store; what was found is noted."
        size = len(self.files) * self.img_size**2 * self.in_chans
        if len(self.files) < STORED_FROM and size <= RESIDENT_BYTES:
            images, files = self.read()
        else:
            images = self.store()
            files = [ImageFile(*f) for record in images.records() for f in record["images"]]
        self.notes.extend(notes_on(files))
        usable = [f for f in files if not f.problem]
        if not usable:
            text = f"no usable image among {len(files)} candidate(s) ({', '.join(EXTENSIONS)})"
            raise ValueError(f"{printable(self.base)}: {text}. {' | '.join(self.notes[:3])}")
        return images, usable

    def as_data(
        self,
        name: str,  # of the set
        usable: tuple,  # images and files, as from `usable`
        split: tuple,  # numbers of training and of held-out images
        classes: list[str],
        sha256: str,  # of the content
    ) -> Data:  # in memory, or read from the store
        "Prepared images as a data set; an image keeps its label."
        (images, files), number = usable, {c: i for i, c in enumerate(classes)}
        labels = torch.tensor([number.get(f.label, 0) for f in files])
        train, test = (torch.as_tensor(numbers).long() for numbers in split)
        held, x, inputs = images[test], None, None
        if len(train) * held.shape[1:].numel() > RESIDENT_BYTES:
            inputs = Inputs(images, train)
        else:
            x = images[train]
        parts = x, labels[train], held, labels[test]
        return Data(name, *parts, len(classes), classes, sha256, self.notes, inputs)


def notes_on(files: list[ImageFile]) -> list[str]:
    "Which files were left out, and why."
    bad = [(printable(f.name), printable(f.problem)) for f in files if f.problem]
    return [f"left out, not readable: {name} ({problem})" for name, problem in bad]


def _content_sum(files: list[ImageFile], name: str = "") -> str:
    "The sha256 of a set's content, independent of names and order of files."
    h = hashlib.sha256(f"{name}\n".encode() if name else b"")
    for label, sha256 in sorted((f.label, f.sha256) for f in files):
        h.update(f"{label}\0{sha256}\n".encode("utf-8", "surrogateescape"))
    return h.hexdigest()


# ---------------------------------------------------------------- a user's folder
def walk(folder: Path, onerror=None):
    "(folder, names of files) below a folder, sorted, without hidden names and circular links."
    seen = {os.path.realpath(p) for p in Path(folder).absolute().parents}
    for path, folders, files in os.walk(folder, followlinks=True, onerror=onerror):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield Path(path), sorted(f for f in files if not f.startswith("."))


def list_folder(
    base: Path,  # the folder
    img_size: int,  # side of the prepared images
    in_chans: int = 3,  # 1 or 3
) -> Listing:
    "The images of a folder, one class for each sub-folder."
    if in_chans not in (1, 3):
        raise ParameterError(f"in_chans = {in_chans}: images have 3 channels (RGB) or 1 (grey)")
    errors, found = [], []
    for top in sorted(p for p in base.iterdir() if not p.name.startswith(".")):
        if top.is_dir():
            inside = walk(top, errors.append)
            found += [(top.name, folder / n) for folder, names in inside for n in names]
        else:
            found.append(("", top))
    images = [(c, f) for c, f in found if f.name.lower().endswith(EXTENSIONS)]
    inside = [(c, f) for c, f in images if c]
    loose = [f for c, f in images if inside and not c]
    notes = [f"left out, not readable: {printable(e.filename)} (folder)" for e in errors]
    notes += [f"left out, beside the class folders: {printable(f.name)}" for f in loose]
    return Listing(base, inside or images, img_size, in_chans, notes=notes)


def load_folder(
    cfg: DataConfig,  # dataset folder:PATH, any img_size, in_chans 1 or 3
    root,  # relative paths are looked for here as well
) -> Data:
    "A user's own images, one class for each sub-folder, prepared as the paper prepares ImageNet."
    listing = list_folder(locate(cfg.dataset, root), cfg.img_size, cfg.in_chans)
    images, files = listing.usable()
    keys = [(f.label, f.sha256, f.name) for f in files]
    order, sha256 = sorted(range(len(files)), key=keys.__getitem__), _content_sum(files)
    split = hold_out([files[i].label for i in order], cfg.holdout, sha256)
    split = [torch.tensor(order)[i] for i in split]
    classes = sorted({f.label for f in files} - {""})
    return listing.as_data("folder", (images, files), split, classes, sha256)


# ---------------------------------------------------------------- CelebA
CELEBA = {"0": 162_770, "1": 19_867, "2": 19_962}  # training, validation, test


def find_celeba64(
    root,  # the folder of the data sets
) -> Path:  # its celeba/
    "Where CelebA is, or `FileNotFoundError` with what is missing and how to get it."
    base = Path(root) / "celeba"
    needed = (base / "list_eval_partition.txt", base / "img_align_celeba")
    absent = [printable(p) for p in needed if not p.exists()]
    if absent:
        raise missing("celeba64", root, f"no {' and no '.join(absent)}")
    return base


def load_celeba64(
    cfg: DataConfig,  # img_size 64, in_chans 3, holdout 0
    root,  # the folder of the data sets
) -> Data:
    "CelebA, aligned and cropped, training split, with its test split held out (Section 5.1)."
    check_size("celeba64", (64, 64, 3), cfg, own_test_split=True)
    base = find_celeba64(root)
    listed, folder = base / "list_eval_partition.txt", base / "img_align_celeba"
    splits = {k: [] for k in CELEBA}
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, k = line.strip().partition(" ")
        splits.setdefault(k, []).append(name)
    found = {k: len(v) for k, v in splits.items()}
    if found != CELEBA:
        text = f"{printable(listed)} names {found} images by split, not {CELEBA}"[:200]
        raise ValueError(f"{text}. {how_to_get('celeba64', root)}")
    wanted, there = sorted(splits["0"]) + sorted(splits["2"]), set(os.listdir(folder))
    gone = [name for name in wanted if name not in there]
    if gone:
        text = f"{len(gone)} of {len(wanted)} images are not in {printable(folder)}"
        raise missing("celeba64", root, f"{text}, first {printable(gone[0])}")
    listing = Listing(folder, [("", folder / n) for n in wanted], 64, crop=_celeba_crop)
    images, files = listing.usable()
    held = set(splits["2"])
    split = [[i for i, f in enumerate(files) if (f.name in held) == want] for want in (False, True)]
    sha256 = _content_sum([files[i] for i in split[0]], "celeba64")
    return listing.as_data("celeba64", (images, files), split, [], sha256)


# ---------------------------------------------------------------- ImageNet
IMAGENET = {"classes": 1000, "train": 1_281_167}
WNID = re.compile(r"n\d{8}")


def find_imagenet64(
    root,  # the folder of the data sets
) -> Path:  # its imagenet/train, with at least one class folder
    "Where the training images of ImageNet are, or `FileNotFoundError` with the way to get them."
    train = Path(root) / "imagenet" / "train"
    if not train.is_dir():
        raise missing("imagenet64", root, f"{printable(train)} is not there")
    if not any(WNID.fullmatch(e.name) and e.is_dir() for e in os.scandir(train)):
        raise missing("imagenet64", root, f"{printable(train)} has no folder like n01440764")
    return train


def load_imagenet64(
    cfg: DataConfig,  # img_size 64, in_chans 3; holdout only where there is no val folder
    root,  # the folder of the data sets
) -> Data:
    "ImageNet at 64x64: repeated box halving, bicubic, centre crop (Section 5.1)."
    check_size("imagenet64", (64, 64, 3), cfg)
    folder = find_imagenet64(root)
    found, val = list_folder(folder, 64), folder.with_name("val")
    names = sorted({c for c, _ in found.files if WNID.fullmatch(c)})
    if len(names) != IMAGENET["classes"]:
        text = f"{len(names)} class folders in {printable(folder)}, ImageNet has 1000"
        raise ValueError(f"{text}: for a part of it use dataset = folder:{folder}, img_size = 64")
    held = list_folder(val, 64).files if val.is_dir() else []
    known, split = set(names), (sorted(found.files), held)
    train, held = ([f for f in files if f[0] in known] for files in split)
    if cfg.holdout and held:
        raise ParameterError(f"holdout = {cfg.holdout}: {val} is held out already; use holdout = 0")
    notes, other = found.notes, len(found.files) - len(train)
    listing = Listing(folder.parent, train + held, 64, notes=notes)
    images, files = listing.usable()
    n = sum(Path(f.name).parts[0] == "train" for f in files)  # these come first
    sha256, split = (
        _content_sum(files[:n], "imagenet64"),
        torch.arange(len(files)).tensor_split([n]),
    )
    notes.append(f"images: {n} usable of {IMAGENET['train']}, {other} of no class left out")
    if not held:
        notes.append(f"nothing held out: {printable(val)} has no folder of a class")
        split = hold_out([f.label for f in files], cfg.holdout, sha256)
    return listing.as_data("imagenet64", (images, files), split, names, sha256)
