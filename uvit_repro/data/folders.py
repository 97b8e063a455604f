"""Images in folders: a user's own, CelebA, ImageNet. Each file is read once and kept in an index."""

import hashlib
import io
import json
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import DataConfig, ParameterError, digest, project_root
from uvit_repro.data.fetch import how_to_get, missing
from uvit_repro.data.files import printable, run_lock, write_atomic
from uvit_repro.data.images import (
    Data,
    check_no_holdout,
    check_size,
    from_arrays,
    hold_out,
    locate,
    walk,
)
from uvit_repro.data.store import Progress, cached_array

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
GREY, PALETTE = ("L", "LA", "La"), ("P", "PA")
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


def _to_8bit(im) -> tuple:
    "An image of more than 8 bits per channel as 8-bit grey, and what it was."
    from PIL import Image

    if im.mode != "F" and not im.mode.startswith("I"):
        was = "grey" if im.mode in GREY else "palette" if im.mode in PALETTE else im.mode
        return im, "black and white" if im.mode == "1" else was.rstrip("AaXx")
    a = np.nan_to_num(np.asarray(im).astype(np.float64))
    if im.mode == "F":
        a = (a - a.min()) / (np.ptp(a) or 1) * 65535
    grey = Image.fromarray(np.rint(a.clip(0, 65535) / 257).astype(np.uint8))
    return grey, "floating point" if im.mode == "F" else "16-bit grey"


def decode(
    raw: bytes,  # a file
    in_chans: int,  # 1: grey, 3: RGB
) -> tuple:  # (PIL image in mode L or RGB, [(what was done, detail)])
    "Decode an image file, upright, without alpha, in the wanted mode. Raises unless it is whole."
    from PIL import Image, ImageOps

    if not raw:
        raise ValueError("empty file")
    Image.init()  # all plugins; MPO comes with JPEG
    im, done = Image.open(io.BytesIO(raw), formats=FORMATS), []
    frames = getattr(im, "n_frames", 1)
    if frames > 1:
        im.seek(0)
        done.append(("first frame used", f"of {frames}"))
    deep = ", 16 bits per channel" if ";16" in str(im.tile) else ""  # Pillow keeps the upper 8
    try:
        turn = im.getexif().get(274, 1)
    except Exception:
        turn = 1
        done.append(("EXIF not readable, not applied", ""))
    im.load()
    if turn in range(2, 9):
        im = ImageOps.exif_transpose(im)
        done.append(("turned as EXIF says", f"orientation {turn}"))
    im, was = _to_8bit(im)
    if im.has_transparency_data:
        white = Image.new("RGBA", im.size, "white")
        im = Image.alpha_composite(white, im.convert("RGBA")).convert("RGB")
        done.append(("alpha put on white", ""))
    mode, name = ("L", "grey") if in_chans == 1 else ("RGB", "RGB")
    if was + deep != name:
        done.append((f"converted to {name}", f"was {was}{deep}"))
    return im.convert(mode), done


def read_image(
    path,  # an image file
    img_size: int,  # side of the result
    in_chans: int = 3,  # 1 or 3
    crop=prepare,  # function of an image and img_size
) -> tuple:  # (uint8 (H, W, C), sha256 of the file, [(what was done, detail)])
    "Read, decode and prepare one file. Raises when it is not whole."
    if not os.path.isfile(path):
        raise FileNotFoundError("no regular file" if os.path.lexists(path) else "no such file")
    raw = Path(path).read_bytes()
    im, done = decode(raw, in_chans)
    if min(im.size) < img_size:
        done.append(("enlarged", f"from {im.size[0]}x{im.size[1]}"))
    return crop(im, img_size), hashlib.sha256(raw).hexdigest(), done


@dataclass(frozen=True)
class Entry:
    "What reading an image file showed."

    sha256: str = ""  # of the file; empty when it can't be used
    problem: str = ""  # why it can't
    done: tuple = ()  # (what was done, detail)


def _attempt(read, path) -> tuple[Entry, np.ndarray | None]:
    "A file's entry and image: a bad file must not stop a run."
    from PIL import UnidentifiedImageError

    try:
        image, sha256, done = read(path)
        return Entry(sha256, "", tuple(map(tuple, done))), image
    except UnidentifiedImageError:
        return Entry(problem="no image in a known format"), None
    except Exception as e:
        return Entry(problem=f"{type(e).__name__}: {e}".splitlines()[0][:120]), None


def _to_stderr(line: str):
    print(line, file=sys.stderr, flush=True)


def read_all(files: list, read, say=None):
    "(entry, image) of each file, read in threads."
    progress = Progress(len(files), "images read", say or _to_stderr)
    with ThreadPoolExecutor(THREADS) as pool:
        for k in range(0, len(files), 512):
            for result in pool.map(partial(_attempt, read), files[k : k + 512]):
                yield result
                progress(1)


def _line(name: str, state: tuple, entry: Entry) -> bytes:
    "One line of the index, with a checksum in front."
    text = json.dumps([name, state, astuple(entry)])
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _read_index(path: Path) -> tuple[dict, bool]:
    "{name: (size and time, entry)}, and whether every line was whole and the only one of its name."
    known, tidy = {}, True
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            name, state, (sha256, problem, done) = json.loads(line[9:])
            entry = tuple(state), Entry(sha256, problem, tuple(map(tuple, done)))
            whole = line == _line(name, *entry)
        except (ValueError, TypeError):
            whole = False
        if whole:
            tidy &= name not in known
            known[name] = entry
        else:
            tidy = False
    return known, tidy


def _state(path) -> tuple:
    "Size and time of change of a file; zeros where there is none."
    try:
        s = os.stat(path)
    except OSError:
        return 0, 0
    return s.st_size, s.st_mtime_ns


def index_files(
    cache: Path,  # folder of the index, one for each set
    base: Path,  # names are relative to it
    files: list,  # the candidates
    read,  # function of a path, as `read_image`
    say=None,  # progress; None: the error stream
) -> list[Entry]:
    "Read the files that the index lacks. A second process waits for the first."
    path, names = cache / "index.jsonl", [os.path.relpath(f, base) for f in files]
    with ExitStack() as held:
        try:
            held.enter_context(run_lock(cache, say or _to_stderr))
            out = held.enter_context(open(path, "ab"))
        except OSError:
            out = held.enter_context(open(os.devnull, "wb"))  # a folder that can't be written
        known, tidy = _read_index(path)
        if not tidy:
            out.write(b"\n")  # whatever stands there ends here
        with ThreadPoolExecutor(THREADS) as pool:
            states = list(pool.map(_state, files, chunksize=1024))
        todo = [i for i, n in enumerate(names) if known.get(n, ((),))[0] != states[i]]
        results = read_all([files[i] for i in todo], read, say)
        for i, (entry, _) in zip(todo, results, strict=True):
            tidy &= names[i] not in known
            known[names[i]] = states[i], entry
            out.write(_line(names[i], states[i], entry))
            out.flush()
        if (not tidy or len(known) != len(files)) and out.name == str(path):
            lines = [_line(n, *known[n]) for n in names]
            write_atomic(path, lambda p: p.write_bytes(b"".join(lines)))
    return [known[n][1] for n in names]


def cache_folder(name: str, base: Path, cache_dir=None) -> Path:
    "Where the index of a set is kept."
    root = Path(cache_dir or project_root() / "results" / "cache")
    return root / f"{name}-{digest(str(Path(base).resolve()), 8)}"


def _pixels(cache: Path, split: str, files: list, entries: list[Entry], read) -> Tensor:
    "The prepared images of usable files, uint8 (N, C, H, W), from a cache where possible."

    def decode_all():
        images = [image for _, image in read_all(files, read)]
        for f, image in zip(files, images, strict=True):
            if image is None:
                raise ValueError(f"{printable(f)} is no longer readable")
        return np.stack(images).transpose(0, 3, 1, 2)

    side = read.keywords["img_size"]
    if not files:
        return torch.empty((0, 3, side, side), dtype=torch.uint8)
    key = digest([side, [e.sha256 for e in entries]], 16)
    return torch.from_numpy(cached_array(cache / f"pixels-{split}.npy", key, decode_all))


def content_sum(
    rows,  # (class, sha256 of the file) of each image
    name: str = "",  # how they are prepared; empty: a user's folder
) -> str:  # hexadecimal
    "The checksum of a set's content, independent of names and order of files."
    h = hashlib.sha256(f"{name}\n".encode() if name else b"")
    for c, sha256 in sorted(rows):
        h.update(f"{c}\0{sha256}\n".encode("utf-8", "surrogateescape"))
    return h.hexdigest()


def _label(path: Path, base: Path) -> str:
    return printable(path.relative_to(base).as_posix())


def _notes(base: Path, files: list, entries: list[Entry]) -> list[str]:
    "What was found in files."
    notes = []
    for f, e in zip(files, entries, strict=True):
        name = _label(f, base)
        if e.problem:
            notes.append(f"left out, not readable: {name} ({printable(e.problem)})")
        notes += [f"{w}: {name} ({d})" if d else f"{w}: {name}" for w, d in e.done]
    return notes


def list_folder(
    base: Path,  # the folder
) -> tuple[list, list[str]]:  # [(class name or "", file)] and notes
    "The images of a folder, one class for each sub-folder; nothing is decoded."
    classes = _class_folders(base)
    loose = sorted(p for p in base.iterdir() if not p.name.startswith(".") and p not in classes)
    errors = []
    found = [("", f) for f in loose]
    for c in classes:
        found += [(c.name, folder / n) for folder, names in walk(c, errors.append) for n in names]
    images = [(c, f) for c, f in found if f.name.lower().endswith(EXTENSIONS)]
    others = [f for _, f in found if not f.name.lower().endswith(EXTENSIONS)]
    inside = [(c, f) for c, f in images if c]
    notes = [f"left out, not readable: {_label(Path(e.filename), base)} (folder)" for e in errors]
    if inside:
        notes += [
            f"left out, beside the class folders: {_label(f, base)}" for c, f in images if not c
        ]
    if others:
        kinds = Counter(f.suffix.lower() or "no extension" for f in others)
        counts = ", ".join(f"{n} {printable(k)}" for k, n in kinds.most_common(5))
        first = _label(others[0], base)
        notes.append(f"not an image, ignored: {len(others)} file(s) ({counts}; first {first})")
    return inside or images, notes


class FolderStream(torch.utils.data.Dataset):
    """Images read from their files: item i is (uint8 (C, H, W), label). A file that went bad or
    changed is replaced by the next good one, image and label together."""

    def __init__(
        self,
        rows: list,  # (label, file, entry) of each image
        read,  # function of a path, as `read_image`
        strict: bool = False,  # raise instead of replacing
    ):
        self.rows, self.read, self.strict, self.warned = rows, read, strict, False

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        i = range(len(self))[i]
        for j in chain(range(i, len(self)), range(i)):
            label, file, known = self.rows[j]
            entry, image = _attempt(self.read, file)
            if entry.sha256 == known.sha256:
                return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), label
            state = entry.problem or "its content changed"
            what = f"{printable(file)} is no longer what it was ({state})"
            if self.strict:
                raise ValueError(f"{what}; run the command again")
            if not self.warned:
                self.warned = True
                text = f"{what}; such files are replaced by the next good one. This is said once."
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        first = printable(self.rows[0][1])
        raise FileNotFoundError(f"none of the {len(self)} image files is usable, first {first}")

    def read_range(self, a: int, b: int) -> Tensor:
        "Images a .. b-1, uint8 (b-a, C, H, W), read in threads."
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack([x for x, _ in pool.map(self.__getitem__, range(a, b))])


def load_folder(
    cfg: DataConfig,  # dataset folder:PATH, any img_size, in_chans 1 or 3
    root,  # relative paths are looked for here as well
    resident_bytes: int = RESIDENT_BYTES,  # largest prepared set that is kept in memory
) -> Data:  # in memory or streamed
    "A user's own images, one class for each sub-folder, prepared as the paper prepares ImageNet."
    if cfg.in_chans not in (1, 3):
        raise ParameterError(f"in_chans = {cfg.in_chans}: images have 3 channels (RGB) or 1 (grey)")
    base = locate(cfg.dataset, root)
    found, notes = list_folder(base)
    files = [f for _, f in found]
    read = partial(read_image, img_size=cfg.img_size, in_chans=cfg.in_chans)
    size = len(files) * cfg.img_size**2 * cfg.in_chans
    resident, images = size <= resident_bytes, []
    if resident or len(files) < INDEXED_FROM:
        entries = []
        for entry, image in read_all(files, read):
            entries.append(entry)
            images.append(image if resident else None)
    else:
        cache = cache_folder(f"folder{cfg.img_size}x{cfg.in_chans}", base)
        entries = index_files(cache, base, files, read)
    notes += _notes(base, files, entries) + _duplicates(base, files, entries)
    rows = [
        (c, e.sha256, str(f), i) for i, ((c, f), e) in enumerate(zip(found, entries, strict=True))
    ]
    rows = sorted(row for row in rows if row[1])
    if not rows:
        raise ValueError(
            f"{printable(base)}: no usable image among {len(files)} candidate(s) "
            f"({', '.join(EXTENSIONS)}). {' | '.join(notes[:3])}"
        )
    used, folders = {c for c, *_ in rows}, _class_folders(base)
    notes += [f"empty class, dropped: {_label(p, base)}" for p in folders if p.name not in used]
    sha256, names = content_sum((c, s) for c, s, *_ in rows), sorted(used - {""})
    labels = _numbers(names, rows)
    if resident:
        x = np.stack([images[i] for *_, i in rows])
        return from_arrays("folder", x, labels, names, sha256, cfg.holdout, notes)
    notes.append(f"streamed: {len(rows)} images of {size / 2**20:.1f} MiB together")
    rows = [(y, files[i], entries[i]) for y, (*_, i) in zip(labels.tolist(), rows, strict=True)]
    whole = Data("folder", None, labels, None, None, len(names), names, sha256, notes)
    return _stream(whole, rows, read, cfg)


def _class_folders(base: Path) -> list[Path]:
    return sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))


def _numbers(names: list[str], rows: list) -> np.ndarray:
    "The label of each row, which begins with the name of its class."
    number = {c: i for i, c in enumerate(names)}
    return np.array([number.get(c, 0) for c, *_ in rows])


def _stream(whole: Data, rows: list, read, cfg: DataConfig) -> Data:
    "A set that is read from its files, images held out in memory."
    labels = torch.as_tensor(whole.train_labels)
    train, test = hold_out(labels, cfg.holdout, whole.sha256)
    if whole.test_images is None:
        x = torch.empty((len(test), cfg.in_chans, cfg.img_size, cfg.img_size), dtype=torch.uint8)
        if len(test):
            x = FolderStream([rows[i] for i in test], read).read_range(0, len(test))
        whole = replace(whole, test_images=x, test_labels=labels[test])
    stream = FolderStream([rows[i] for i in train], read)
    return replace(whole, train_labels=labels[train], stream=stream)


def _duplicates(base: Path, files: list, entries: list[Entry]) -> list[str]:
    "Notes on files with the same bytes."
    first, notes = {}, []
    for f, e in zip(files, entries, strict=True):
        name = _label(f, base)
        if e.sha256 and first.setdefault(e.sha256, name) != name:
            notes.append(f"duplicate, kept: {name} (same bytes as {first[e.sha256]})")
    return notes


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
    "The files of CelebA by split. Raises where the list or an image of training or test is missing."
    base, again = find_celeba64(root), how_to_get("celeba64", root)
    listed, images = base / "list_eval_partition.txt", base / "img_align_celeba"
    splits = {k: [] for k in CELEBA}
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        name, _, k = line.strip().partition(" ")
        if name and k.strip() not in ("0", "1", "2"):
            raise ValueError(
                f"{printable(listed)}, line {number}: {line[:80]!r} is not a file name and "
                f"0, 1 or 2. {again}"
            )
        if name:
            splits[int(k)].append(name)
    found = {k: len(v) for k, v in splits.items()}
    if expect and found != dict(expect):
        raise ValueError(
            f"{printable(listed)} names {found[0]}, {found[1]} and {found[2]} images (training, "
            f"validation, test); CelebA has {expect[0]}, {expect[1]} and {expect[2]}. {again}"
        )
    there = {e.name for e in os.scandir(images)}
    gone = [n for k in (0, 2) for n in splits[k] if n not in there]
    if gone:
        total, first = sum(found.values()), printable(gone[0])
        where = f"{len(gone)} of {total} images are not in {printable(images)}, first {first}"
        raise missing("celeba64", root, where)
    return {k: [images / n for n in sorted(v)] for k, v in splits.items()}


def load_celeba64(
    cfg: DataConfig,  # img_size 64, in_chans 3, holdout 0
    root,  # the folder of the data sets
    expect=CELEBA,  # images of each split; None: any (for a part of the set)
    cache_dir=None,  # of the index; None: results/cache
) -> Data:  # in memory
    "CelebA, aligned and cropped, training split, with its test split held out (Section 5.1)."
    check_size("celeba64", 64, 64, 3, cfg)
    check_no_holdout(cfg)
    splits, base = celeba_files(root, expect), Path(root) / "celeba" / "img_align_celeba"
    cache = cache_folder("celeba64", base, cache_dir)
    read = partial(read_image, img_size=64, crop=celeba_crop)
    files = splits[0] + splits[2]
    entries = index_files(cache, base, files, read)
    known = dict(zip(files, entries, strict=True))
    usable = {k: [f for f in splits[k] if not known[f].problem] for k in (0, 2)}
    if not usable[0]:
        first = next((e.problem for e in entries if e.problem), "none is listed")
        raise ValueError(
            f"{printable(base)}: no usable image among {len(splits[0])} of the training split; "
            f"the first: {first}"
        )
    sets = []
    for k, split in ((0, "train"), (2, "test")):
        x = _pixels(cache, split, usable[k], [known[f] for f in usable[k]], read)
        sets += [x, torch.zeros(len(x), dtype=torch.long)]
    sha256 = content_sum((("", known[f].sha256) for f in usable[0]), "celeba64")
    return Data("celeba64", *sets, 0, [], sha256, _notes(base, files, entries))


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
        raise ValueError(
            f"imagenet64: {len(names)} class folders in {printable(folder)}, ImageNet has "
            f"{expect}, and with fewer the labels would mean other classes. For a part of "
            f"ImageNet use dataset = folder:{folder} with img_size = 64"
        )
    known = set(names)
    return sorted((c, f) for c, f in files if c in known), names, notes


def load_imagenet64(
    cfg: DataConfig,  # img_size 64, in_chans 3; holdout only where there is no val folder
    root,  # the folder of the data sets
    expect=IMAGENET["classes"],  # class folders; None: any number (for tests)
    cache_dir=None,  # of the index; None: results/cache
) -> Data:  # streamed; held-out images in memory
    "ImageNet at 64x64: repeated box halving, bicubic, centre crop (Section 5.1)."
    check_size("imagenet64", 64, 64, 3, cfg)
    train = imagenet_folder(root)
    read = partial(read_image, img_size=64, in_chans=3)
    pairs, names, notes = imagenet_files(train, expect)
    cache = cache_folder("imagenet64", train, cache_dir)
    kept = _usable(cache, train, pairs, read, notes)
    if not kept:
        raise ValueError(f"{printable(train)}: no usable image; {' | '.join(notes[:3])}")
    if expect and len(kept) != IMAGENET["train"]:
        notes.append(f"number of images: {len(kept)} usable, ImageNet has {IMAGENET['train']}")
    val, held = train.parent / "val", (None, None)
    pairs = [(c, f) for c, f in list_folder(val)[0] if c in set(names)] if val.is_dir() else []
    if not pairs:
        state = "has no folder of a class" if val.is_dir() else "is not there"
        notes.append(f"nothing held out: {printable(val)} {state}")
    elif cfg.holdout:
        raise ParameterError(f"holdout = {cfg.holdout}: {val} is held out already; use holdout = 0")
    else:
        cache = cache.with_name(cache.name + "-val")
        test = _usable(cache, val, pairs, read, notes)
        x = _pixels(cache, "test", [f for _, f, _ in test], [e for *_, e in test], read)
        held = x, torch.from_numpy(_numbers(names, test))
    sha256 = content_sum(((c, e.sha256) for c, _, e in kept), "imagenet64")
    labels = _numbers(names, kept)
    rows = [(y, f, e) for y, (_, f, e) in zip(labels.tolist(), kept, strict=True)]
    whole = Data("imagenet64", None, labels, *held, len(names), names, sha256, notes)
    return _stream(whole, rows, read, cfg)


def _usable(cache: Path, base: Path, pairs: list, read, notes: list[str]) -> list:
    "(class, file, entry) of usable images; what is wrong with the others is added to the notes."
    files = [f for _, f in pairs]
    entries = index_files(cache, base, files, read)
    notes += _notes(base, files, entries)
    rows = [(c, f, e) for (c, f), e in zip(pairs, entries, strict=True)]
    return [row for row in rows if not row[2].problem]
