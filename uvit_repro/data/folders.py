"""Images in folders: a user's own, CelebA, ImageNet. An index keeps what was read."""

import hashlib
import io
import json
import os
import re
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import DataConfig, ParameterError, digest, project_root
from uvit_repro.data.fetch import how_to_get, missing
from uvit_repro.data.files import printable, run_lock
from uvit_repro.data.images import (
    Data,
    check_size,
    from_arrays,
    hold_out,
    locate,
    walk,
)
from uvit_repro.data.store import Progress, cached_array

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
RESIDENT_BYTES = 2 << 30  # larger sets are streamed from their files
INDEXED_FROM = 5000  # files of a user's folder from which an index is kept
THREADS = min(16, os.cpu_count() or 1)


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


def celeba_crop(
    im,  # PIL image, RGB, 178x218
    side: int,  # of the result
) -> np.ndarray:  # uint8 (side, side, 3)
    "The released code's window around the face, resized."
    from PIL import Image

    if im.size != (178, 218):
        raise ValueError(f"{im.size[0]}x{im.size[1]} pixels, where img_align_celeba has 178x218")
    face = im.crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return np.array(face.resize((side, side), Image.BILINEAR))


def _to_8bit(im):
    "An image of more than 8 bits per channel as 8-bit grey."
    from PIL import Image

    if im.mode != "F" and not im.mode.startswith("I"):
        return im
    a = np.nan_to_num(np.asarray(im).astype(np.float64))
    if im.mode == "F":
        a = (a - a.min()) / (np.ptp(a) or 1) * 65535
    return Image.fromarray(np.rint(a.clip(0, 65535) / 257).astype(np.uint8))


def decode(
    raw: bytes,  # a file
    in_chans: int,  # 1: grey, 3: RGB
) -> tuple:  # (PIL image in mode L or RGB, [what was done])
    "Decode an image file, upright, without alpha, in the wanted mode. Raises unless it is whole."
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not raw:
        raise ValueError("empty file")
    Image.init()  # all plugins; MPO comes with JPEG
    try:
        im, done = Image.open(io.BytesIO(raw), formats=FORMATS), []
    except UnidentifiedImageError:
        raise ValueError("no image in a known format") from None
    if getattr(im, "n_frames", 1) > 1:
        im.seek(0)
        done.append("first frame used")
    turn = 1
    with suppress(Exception):  # damaged EXIF is not applied
        turn = im.getexif().get(274, 1)
    im.load()
    if turn in range(2, 9):
        im = ImageOps.exif_transpose(im)
        done.append("turned as EXIF says")
    mode, im = "L" if in_chans == 1 else "RGB", _to_8bit(im)
    if im.has_transparency_data:
        white = Image.new("RGBA", im.size, "white")
        im = Image.alpha_composite(white, im.convert("RGBA"))
        done.append("alpha put on white")
    elif im.mode != mode:
        done.append(f"converted to {mode}")
    return im.convert("RGB").convert(mode) if im.mode == "RGBA" else im.convert(mode), done


def read_image(
    path,  # an image file
    img_size: int,  # side of the result
    in_chans: int = 3,  # 1 or 3
    crop=prepare,  # function of an image and img_size
) -> tuple:  # (uint8 (H, W, C), sha256 of the file, [what was done])
    "Read, decode and prepare one file. Raises when it is not whole."
    if not os.path.isfile(path):
        raise FileNotFoundError("no regular file" if os.path.lexists(path) else "no such file")
    raw = Path(path).read_bytes()
    im, done = decode(raw, in_chans)
    if min(im.size) < img_size:
        done.append("enlarged")
    return crop(im, img_size), hashlib.sha256(raw).hexdigest(), done


@dataclass(frozen=True)
class ImageFile:
    "A file, and what reading it showed."

    path: Path
    label: str = ""  # name of its class
    sha256: str = ""  # of the file; empty when it can't be used
    problem: str = ""  # why it can't
    done: tuple = ()  # what was done to it


def _attempt(read, file: ImageFile) -> tuple[ImageFile, np.ndarray | None]:
    "A file as it is now, and its image: a bad file must not stop a run."
    try:
        image, sha256, done = read(file.path)
    except Exception as e:
        problem = f"{type(e).__name__}: {e}".splitlines()[0][:120]
        return ImageFile(file.path, file.label, "", problem), None
    return ImageFile(file.path, file.label, sha256, "", tuple(done)), image


def _read_all(files: list[ImageFile], read):
    "(file as it is now, its image) of each file, read in threads."
    progress = Progress(len(files), "images read", partial(print, file=sys.stderr, flush=True))
    with ThreadPoolExecutor(THREADS) as pool:
        for k in range(0, len(files), 512):
            for result in pool.map(partial(_attempt, read), files[k : k + 512]):
                yield result
                progress(1)


def _line(name: str, state: list, file: ImageFile) -> bytes:
    "One line of the index, with a checksum in front."
    text = json.dumps([name, state, [file.sha256, file.problem, file.done]])
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _read_index(path: Path) -> dict:
    "{name: (size and time, [checksum, problem, what was done])}; damaged lines are left out."
    known = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            if int(line[:8], 16) == zlib.crc32(line[9:]):
                name, state, found = json.loads(line[9:])
                known[name] = state, found
    return known


def _state(file: ImageFile) -> list:
    "Size and time of change; zeros where there is no file."
    try:
        s = os.stat(file.path)
    except OSError:
        return [0, 0]
    return [s.st_size, s.st_mtime_ns]


def index_files(
    cache: Path | None,  # folder of the index, one for each set; None: no index
    base: Path,  # names are relative to it
    files: list,  # (class, path) of the candidates
    read,  # function of a path, as `read_image`
) -> list[ImageFile]:
    "Read the files that the index lacks. A second process waits for the first."
    files = [ImageFile(path, label) for label, path in files]
    if cache is None:
        return [file for file, _ in _read_all(files, read)]
    with ExitStack() as held:
        try:
            held.enter_context(run_lock(cache, partial(print, file=sys.stderr, flush=True)))
            out = held.enter_context(open(cache / "index.jsonl", "ab"))
        except OSError:
            out = held.enter_context(open(os.devnull, "wb"))  # a folder that can't be written
        known = _read_index(cache / "index.jsonl")
        out.write(b"\n")  # ends what a killed process began
        with ThreadPoolExecutor(THREADS) as pool:
            states = list(pool.map(_state, files, chunksize=1024))
        names, todo = [os.path.relpath(f.path, base) for f in files], []
        for i, name in enumerate(names):
            state, found = known.get(name, (None, None))
            if state == states[i]:
                sha256, problem, done = found
                files[i] = replace(files[i], sha256=sha256, problem=problem, done=tuple(done))
            else:
                todo.append(i)
        for i, (file, _) in zip(todo, _read_all([files[i] for i in todo], read), strict=True):
            files[i] = file
            out.write(_line(names[i], states[i], file))
            out.flush()
    return files


def cache_folder(name: str, base: Path, cache_dir=None) -> Path:
    "Where the index of a set is kept."
    root = Path(cache_dir or project_root() / "results" / "cache")
    return root / f"{name}-{digest(str(Path(base).resolve()), 8)}"


def usable_files(cache: Path | None, base: Path, files: list, read, notes: list[str]) -> list:
    "The files that can be read, as `index_files`; what was found is added to the notes."
    found = index_files(cache, base, files, read)
    for f in found:
        name = _label(f.path, base)
        if f.problem:
            notes.append(f"left out, not readable: {name} ({printable(f.problem)})")
        notes += [f"{what}: {name}" for what in f.done]
    return [f for f in found if not f.problem]


def _pixels(cache: Path | None, split: str, files: list[ImageFile], read) -> Tensor:
    "The prepared images of usable files, uint8 (N, C, H, W), from a cache where there is one."

    def decode_all():
        images = [image for _, image in _read_all(files, read)]
        for f, image in zip(files, images, strict=True):
            if image is None:
                raise ValueError(f"{printable(f.path)} is no longer readable")
        return np.stack(images).transpose(0, 3, 1, 2)

    side, channels = read.keywords["img_size"], read.keywords["in_chans"]
    if not files:
        return torch.empty((0, channels, side, side), dtype=torch.uint8)
    if cache is None:
        return torch.from_numpy(decode_all())
    key = digest([side, channels, [f.sha256 for f in files]], 16)
    return torch.from_numpy(cached_array(cache / f"pixels-{split}.npy", key, decode_all))


def content_sum(
    files: list[ImageFile],
    name: str = "",  # how they are prepared; empty: a user's folder
) -> str:  # hexadecimal
    "The checksum of a set's content, independent of names and order of files."
    h = hashlib.sha256(f"{name}\n".encode() if name else b"")
    for label, sha256 in sorted((f.label, f.sha256) for f in files):
        h.update(f"{label}\0{sha256}\n".encode("utf-8", "surrogateescape"))
    return h.hexdigest()


def _label(path: Path, base: Path) -> str:
    return printable(path.relative_to(base).as_posix())


def _class_folders(base: Path) -> list[Path]:
    return sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_folder(
    base: Path,  # the folder
) -> tuple[list, list[str]]:  # [(class name or "", file)] and notes
    "The images of a folder, one class for each sub-folder; nothing is decoded."
    classes, errors = _class_folders(base), []
    loose = sorted(p for p in base.iterdir() if not p.name.startswith(".") and p not in classes)
    found = [("", f) for f in loose]
    for c in classes:
        found += [(c.name, folder / n) for folder, names in walk(c, errors.append) for n in names]
    images = [(c, f) for c, f in found if f.name.lower().endswith(EXTENSIONS)]
    inside = [(c, f) for c, f in images if c]
    notes = [f"left out, not readable: {_label(Path(e.filename), base)} (folder)" for e in errors]
    beside = [_label(f, base) for c, f in images if inside and not c]
    notes += [f"left out, beside the class folders: {name}" for name in beside]
    others = [_label(f, base) for _, f in found if not f.name.lower().endswith(EXTENSIONS)]
    notes += [f"not an image, ignored: {name}" for name in others]
    return inside or images, notes


class FolderStream(torch.utils.data.Dataset):
    """Images read from their files: item i is (uint8 (C, H, W), label). A file that went bad or
    changed is replaced by the next good one, image and label together."""

    def __init__(
        self,
        files: list[ImageFile],
        names: list[str],  # of the classes
        read,  # function of a path, as `read_image`
        strict: bool = False,  # raise instead of replacing
    ):
        self.files, self.read, self.strict, self.warned = files, read, strict, False
        self.number = {c: i for i, c in enumerate(names)}

    def __len__(self):
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        "The label of each image; 0 where there are no classes."
        return torch.tensor([self.number.get(f.label, 0) for f in self.files])

    def __getitem__(self, i):
        i = range(len(self))[i]
        for j in chain(range(i, len(self)), range(i)):
            known = self.files[j]
            file, image = _attempt(self.read, known)
            if file.sha256 == known.sha256:
                x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
                return x, self.number.get(file.label, 0)
            state = file.problem or "its content changed"
            what = f"{printable(file.path)} is no longer what it was ({state})"
            if self.strict:
                raise ValueError(f"{what}; run the command again")
            if not self.warned:
                self.warned = True
                text = f"{what}; such files are replaced by the next good one. This is said once."
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        first = printable(self.files[0].path)
        raise FileNotFoundError(f"none of the {len(self)} image files is usable, first {first}")

    def read_range(self, a: int, b: int) -> Tensor:
        "Images a .. b-1, uint8 (b-a, C, H, W), read in threads."
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack([x for x, _ in pool.map(self.__getitem__, range(a, b))])


def _streamed(name: str, whole: FolderStream, cfg: DataConfig, notes: list, held=None) -> Data:
    "A set that is read from its files, its held-out images in memory."
    files, names, read = whole.files, list(whole.number), whole.read
    sha256 = content_sum(files, "" if name == "folder" else name)
    train, test = hold_out(whole.labels, cfg.holdout, sha256)
    if held is None:
        away = [files[i] for i in test]
        held = _pixels(None, "test", away, read), whole.labels[test]
    stream = FolderStream([files[i] for i in train], names, read)
    return Data(name, None, stream.labels, *held, len(names), names, sha256, notes, stream)


def load_folder(
    cfg: DataConfig,  # dataset folder:PATH, any img_size, in_chans 1 or 3
    root,  # relative paths are looked for here as well
    resident_bytes: int = RESIDENT_BYTES,  # largest prepared set that is kept in memory
) -> Data:  # in memory or streamed
    "A user's own images, one class for each sub-folder, prepared as the paper prepares ImageNet."
    if cfg.in_chans not in (1, 3):
        raise ParameterError(f"in_chans = {cfg.in_chans}: images have 3 channels (RGB) or 1 (grey)")
    base = locate(cfg.dataset, root)
    read = partial(read_image, img_size=cfg.img_size, in_chans=cfg.in_chans)
    found, notes = list_folder(base)
    indexed = len(found) >= INDEXED_FROM
    cache = cache_folder(f"folder{cfg.img_size}x{cfg.in_chans}", base) if indexed else None
    files = usable_files(cache, base, found, read, notes)
    files.sort(key=lambda f: (f.label, f.sha256, str(f.path)))
    if not files:
        text = f"no usable image among {len(found)} candidate(s) ({', '.join(EXTENSIONS)})"
        raise ValueError(f"{printable(base)}: {text}. {' | '.join(notes[:3])}")
    for a, b in pairwise(files):
        if a.sha256 == b.sha256:
            name, other = (_label(f.path, base) for f in (b, a))
            notes.append(f"duplicate, kept: {name} (same bytes as {other})")
    names = sorted({f.label for f in files} - {""})
    empty = [p for p in _class_folders(base) if names and p.name not in names]
    notes += [f"empty class, dropped: {_label(p, base)}" for p in empty]
    whole, size = FolderStream(files, names, read), len(files) * cfg.img_size**2 * cfg.in_chans
    if size > resident_bytes:
        notes.append(f"streamed: {len(files)} images of {size / 2**20:.1f} MiB together")
        return _streamed("folder", whole, cfg, notes)
    x = _pixels(cache, "all", files, read).permute(0, 2, 3, 1).numpy()
    labels, sha256 = whole.labels.numpy(), content_sum(files)
    return from_arrays("folder", x, labels, names, sha256, cfg.holdout, notes)


def find_celeba64(
    root,  # the folder of the data sets
) -> Path:  # its celeba/
    "Where CelebA is, or `FileNotFoundError` with what is missing and how to get it."
    base = Path(root) / "celeba"
    listed, images = base / "list_eval_partition.txt", base / "img_align_celeba"
    absent = [] if listed.is_file() else [listed]
    absent += [] if images.is_dir() else [images]
    if absent:
        raise missing("celeba64", root, f"no {' and no '.join(map(printable, absent))}")
    return base


CELEBA = {0: 162_770, 1: 19_867, 2: 19_962}  # training, validation, test


def celeba_files(
    root,  # the folder of the data sets
    expect=CELEBA,  # images of each split; None: any
) -> dict:  # {0: files of the training split, 1: validation, 2: test}
    "The files of CelebA by split; a missing list or image is an error."
    base = find_celeba64(root)
    listed, images = base / "list_eval_partition.txt", base / "img_align_celeba"
    splits, again = {k: [] for k in CELEBA}, how_to_get("celeba64", root)
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, k = line.strip().partition(" ")
        if k not in ("0", "1", "2"):
            text = f"{line[:80]!r} is not a file name and 0, 1 or 2"
            raise ValueError(f"{printable(listed)}: {text}. {again}")
        splits[int(k)].append(name)
    found = [len(v) for v in splits.values()]
    if expect and found != list(expect.values()):
        text = f"names {found} images (training, validation, test)"
        raise ValueError(f"{printable(listed)} {text}, not {list(expect.values())}. {again}")
    there = {e.name for e in os.scandir(images)}
    gone = [n for k in (0, 2) for n in splits[k] if n not in there]
    if gone:
        text = f"{len(gone)} of {sum(found)} images are not in {printable(images)}"
        raise missing("celeba64", root, f"{text}, first {printable(gone[0])}")
    return {k: [images / n for n in sorted(v)] for k, v in splits.items()}


def load_celeba64(
    cfg: DataConfig,  # img_size 64, in_chans 3, holdout 0
    root,  # the folder of the data sets
    expect=CELEBA,  # images of each split; None: any (for a part of the set)
    cache_dir=None,  # of the index; None: results/cache
) -> Data:  # in memory
    "CelebA, aligned and cropped, training split, with its test split held out (Section 5.1)."
    check_size("celeba64", (64, 64, 3), cfg, own_test_split=True)
    splits, base = celeba_files(root, expect), Path(root) / "celeba" / "img_align_celeba"
    cache, notes, sets = cache_folder("celeba64", base, cache_dir), [], []
    read = partial(read_image, img_size=64, in_chans=3, crop=celeba_crop)
    files = [("", f) for k in (0, 2) for f in splits[k]]
    files, train = usable_files(cache, base, files, read, notes), set(splits[0])
    splits = {
        "train": [f for f in files if f.path in train],
        "test": [f for f in files if f.path not in train],
    }
    if not splits["train"]:
        raise ValueError(f"{printable(base)}: no usable image; {' | '.join(notes[:3])}")
    for split, rows in splits.items():
        sets += [_pixels(cache, split, rows, read), torch.zeros(len(rows), dtype=torch.long)]
    return Data("celeba64", *sets, 0, [], content_sum(splits["train"], "celeba64"), notes)


IMAGENET = {"classes": 1000, "train": 1_281_167}
WNID = re.compile(r"n\d{8}")


def imagenet_folder(
    root,  # the folder of the data sets
) -> Path:  # its imagenet/train, with at least one class folder
    "Where the training images of ImageNet are, or `FileNotFoundError` with the way to get them."
    train = Path(root) / "imagenet" / "train"
    if train.is_dir():
        if any(WNID.fullmatch(e.name) and e.is_dir() for e in os.scandir(train)):
            return train
        raise missing("imagenet", root, f"{printable(train)} has no folder like n01440764")
    raise missing("imagenet", root, f"{printable(train)} is not there")


def find_imagenet64(root) -> Path:
    "ImageNet's pixels, whatever their size: see `imagenet_folder`."
    return imagenet_folder(root)


def imagenet_files(
    folder: Path,  # imagenet/train
    expect=IMAGENET["classes"],  # class folders; None: any number
) -> tuple:  # ([(class, file)] sorted, names of the classes, notes)
    "The images of one split by class. `ValueError` when it is a part of ImageNet."
    files, notes = list_folder(folder)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and WNID.fullmatch(p.name))
    other = sorted({c for c, _ in files} - set(names))
    if other:
        shown = ", ".join(printable(c) or "loose files" for c in other[:20])
        notes.append(f"not a class of ImageNet, ignored: {shown}")
    if expect is not None and len(names) != expect:
        text = f"{len(names)} class folders in {printable(folder)}, ImageNet has {expect}"
        raise ValueError(f"{text}: for a part of it use dataset = folder:{folder}, img_size = 64")
    known = set(names)
    return sorted((c, f) for c, f in files if c in known), names, notes


def load_imagenet64(
    cfg: DataConfig,  # img_size 64, in_chans 3; holdout only where there is no val folder
    root,  # the folder of the data sets
    expect=IMAGENET["classes"],  # class folders; None: any number (for tests)
    cache_dir=None,  # of the index; None: results/cache
) -> Data:  # streamed; held-out images in memory
    "ImageNet at 64x64: repeated box halving, bicubic, centre crop (Section 5.1)."
    check_size("imagenet64", (64, 64, 3), cfg)
    train = imagenet_folder(root)
    read = partial(read_image, img_size=64, in_chans=3)
    found, names, notes = imagenet_files(train, expect)
    cache = cache_folder("imagenet64", train, cache_dir)
    files = usable_files(cache, train, found, read, notes)
    if not files:
        raise ValueError(f"{printable(train)}: no usable image; {' | '.join(notes[:3])}")
    if expect and len(files) != IMAGENET["train"]:
        notes.append(f"number of images: {len(files)} usable, ImageNet has {IMAGENET['train']}")
    val, held = train.parent / "val", None
    found = [(c, f) for c, f in list_folder(val)[0] if c in set(names)] if val.is_dir() else []
    if not found:
        state = "has no folder of a class" if val.is_dir() else "is not there"
        notes.append(f"nothing held out: {printable(val)} {state}")
    elif cfg.holdout:
        raise ParameterError(f"holdout = {cfg.holdout}: {val} is held out already; use holdout = 0")
    else:
        cache = cache.with_name(f"{cache.name}-val")
        test = usable_files(cache, val, found, read, notes)
        held = _pixels(cache, "test", test, read), FolderStream(test, names, read).labels
    return _streamed("imagenet64", FolderStream(files, names, read), cfg, notes, held)
