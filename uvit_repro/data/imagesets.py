"""The paper's two 64x64 sets from their usual layouts on disk: the released crop and resizing, a check of what lies there, and an index that reads every file once."""

import hashlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import DataConfig, ParameterError, digest, project_root
from uvit_repro.data.files import run_lock, write_atomic
from uvit_repro.data.images import (
    Data,
    FolderStream,
    _classes,
    _fits,
    _label,
    _try_read,
    decode,
    hold_out,
    list_folder,
)


def celeba_crop(
    im,  # PIL image, RGB, 178x218
) -> np.ndarray:  # uint8 (64, 64, 3)
    "The released window around the face, resized (setup, section 6). `ValueError` for an image of another size."
    from PIL import Image

    if im.size != (178, 218):
        raise ValueError(f"{im.size[0]}x{im.size[1]} pixels, where img_align_celeba has 178x218")
    return np.array(
        im.crop((89 - 64, 121 - 64, 89 + 64, 121 + 64)).resize((64, 64), Image.BILINEAR)
    )


def read_celeba(
    path,  # a file of img_align_celeba
):  # (uint8 (64, 64, 3), sum of the file, [(what was done, detail)]), or the reason why not, as text
    "Read and prepare one image of CelebA."
    try:
        raw = Path(path).read_bytes()
        im, done = decode(raw, 3)
        return celeba_crop(im), hashlib.sha256(raw).hexdigest(), done
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0][:120]


def read_index(
    path: Path,  # index.jsonl
) -> tuple[
    dict, bool
]:  # {name: (size, time, sum, reason, what was done)}, and whether every line was good and the only one of its name
    "What is known about files; lines that are damaged count as not there, later lines win."
    known, tidy = {}, True
    if not path.exists():
        return known, tidy
    with open(path, "rb") as f:
        for line in f:
            try:
                name, size, mtime, sha, why, done = json.loads(line)
                tidy &= name not in known and line.endswith(b"\n")
                known[name] = (size, mtime, sha, why, tuple(map(tuple, done)))
            except (ValueError, TypeError):
                tidy = False
    return known, tidy


def _line(name, entry) -> bytes:
    return (json.dumps([name, *entry]) + "\n").encode()


def _stat(f) -> tuple:
    "Size and time of change of a file; zeros where there is none."
    try:
        s = os.stat(f)
    except OSError:
        return 0, 0
    return s.st_size, s.st_mtime_ns


def index_files(
    folder: Path,  # of the index, one for each set
    base: Path,  # names are relative to it
    files: list,  # the candidates
    read,  # read(path) -> (image, sum, [(what was done, detail)]), or the reason why not
    say=None,  # told about the progress every 15 seconds; None: the error stream
    piece=512,  # files between two writes
) -> list:  # for each file (sum, reason, what was done); one of sum and reason is ""
    "Read the files that the index does not know, in threads, and keep what was found. A second process waits for the first."
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    with run_lock(Path(folder), say), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        path, names = Path(folder) / "index.jsonl", [os.path.relpath(f, base) for f in files]
        known, tidy = read_index(path)
        stats = [
            s
            for part in pool.map(
                lambda k: [_stat(f) for f in files[k : k + 1024]], range(0, len(files), 1024)
            )
            for s in part
        ]
        todo = [i for i, n in enumerate(names) if known.get(n, ())[:2] != stats[i]]
        start = last = time.monotonic()
        with open(path, "ab") as out:
            if not tidy:
                out.write(b"\n")  # whatever stands there ends here
            for k in range(0, len(todo), piece):
                for i, got in zip(
                    part := todo[k : k + piece], pool.map(lambda i: read(files[i]), part)
                ):
                    tidy &= names[i] not in known
                    known[names[i]] = (
                        *stats[i],
                        *(
                            ("", got, ())
                            if isinstance(got, str)
                            else (got[1], "", tuple(map(tuple, got[2])))
                        ),
                    )
                    out.write(_line(names[i], known[names[i]]))
                out.flush()
                os.fsync(out.fileno())
                if (now := time.monotonic()) - last > 15 and (n := k + len(part)) < len(todo):
                    last = now
                    say(
                        f"read {n} of {len(todo)} new files of {base}, {(now - start) / n * (len(todo) - n) / 60:.0f} minutes left"
                    )
        if not tidy or len(known) != len(files):
            write_atomic(path, lambda p: p.write_bytes(b"".join(_line(n, known[n]) for n in names)))
        return [known[n][2:] for n in names]


def content_sum(
    name: str,  # of the set: how its images are prepared
    rows,  # (class, sum of the file) of each training image
) -> str:  # hexadecimal
    "The sum of a set's content, independent of names and order of files."
    h = hashlib.sha256(f"{name}\n".encode())
    for c, sha in sorted(rows):
        h.update(f"{c}\0{sha}\n".encode("utf-8", "surrogateescape"))
    return h.hexdigest()


def prepared(
    folder: Path,  # of the index
    files: list,  # readable files
    sums: list,  # their sums
    read,  # as for `index_files`
    side: int,  # of the prepared images
) -> Tensor:  # uint8 (N, 3, side, side)
    "Decode files once; read the array the next time."
    path = Path(folder) / f"pixels-{digest([side, sums], 16)}.npy"
    if not path.exists():
        images = np.empty((len(files), 3, side, side), np.uint8)

        def fill(i):
            images[i] = read(files[i])[0].transpose(2, 0, 1)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for k in range(0, len(files), 4096):
                list(pool.map(fill, range(k, min(k + 4096, len(files)))))
        write_atomic(path, lambda p: np.save(p, images))
    return torch.from_numpy(np.load(path))


def index_folder(
    name: str,
    base: Path,  # the set, and where its files are
    cache_dir=None,  # None: results/cache in the project
) -> Path:
    "Where the index of a set is kept."
    return (
        Path(cache_dir or project_root() / "results" / "cache")
        / f"{name}-{digest(str(Path(base).resolve()), 8)}"
    )


def _notes(base: Path, files: list, rows: list) -> list[str]:
    "What was found in files, as other sets say it."
    said = lambda f, why, done: (
        [f"left out, not readable: {_label(f, base)} ({why})"]
        if why
        else [f"{w}: {_label(f, base)}" + (f" ({d})" if d else "") for w, d in done]
    )
    return [n for f, (_, why, done) in zip(files, rows) for n in said(f, why, done)]


CELEBA = {0: 162_770, 1: 19_867, 2: 19_962}  # training, validation, test


def fetch_celeba(root) -> str:
    "How CelebA gets to where it is looked for."
    fetch = f"import torchvision; torchvision.datasets.CelebA({str(root)!r}, split='all', download=True)"
    return (
        f'Fetch it (1.4 GB; needs the package gdown) with\n    python -c "{fetch}"\nor put img_align_celeba.zip and list_eval_partition.txt '
        f"(https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html) into {Path(root) / 'celeba'} and unzip the first there"
    )


def find_celeba64(
    root,  # the folder of the data sets
) -> Path:  # its celeba/
    "Where CelebA is, or `FileNotFoundError` with what is missing and how to get it."
    base = Path(root) / "celeba"
    listed, images = base / "list_eval_partition.txt", base / "img_align_celeba"
    if missing := [
        p for p, there in ((listed, listed.is_file()), (images, images.is_dir())) if not there
    ]:
        raise FileNotFoundError(
            f"celeba64 is not under {root}: {' and '.join(map(str, missing))} not there. {fetch_celeba(root)}\nor set UVIT_DATA (parameter data_root) to the folder that has it"
        )
    return base


def celeba_files(
    root,  # the folder of the data sets
    expect=CELEBA,  # images of each split; None: any
) -> dict:  # {0: files of the training split, 1: validation, 2: test}
    "The files of CelebA by split. Raises `FileNotFoundError` or `ValueError` with what is missing and how to get it."
    base = find_celeba64(root)
    listed, images = base / "list_eval_partition.txt", base / "img_align_celeba"
    splits = {k: [] for k in CELEBA}
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        name, _, k = line.strip().partition(" ")
        if name and k.strip() not in ("0", "1", "2"):
            raise ValueError(
                f"{listed}, line {number}: {line!r} is not a file name and 0, 1 or 2. {fetch_celeba(root)}"
            )
        if name:
            splits[int(k)].append(name)
    found = {k: len(v) for k, v in splits.items()}
    if expect and found != dict(expect):
        raise ValueError(
            f"{listed} names {found[0]}, {found[1]} and {found[2]} images (training, validation, test); CelebA has {expect[0]}, {expect[1]} and {expect[2]}. {fetch_celeba(root)}"
        )
    there = {e.name for e in os.scandir(images)}
    if gone := [n for k in (0, 2) for n in splits[k] if n not in there]:
        raise FileNotFoundError(
            f"celeba64: {len(gone)} of {sum(found.values())} images are not in {images}, the first is {gone[0]}. {fetch_celeba(root)}"
        )
    return {k: [images / n for n in sorted(v)] for k, v in splits.items()}


def load_celeba64(
    cfg: DataConfig,  # img_size 64, in_chans 3, holdout 0
    root,  # the folder of the data sets
    expect=CELEBA,  # images of each split; None: any (for a part of the set)
    cache_dir=None,  # of the index; None: results/cache
    say=None,  # progress of the first reading
) -> Data:  # in memory
    "CelebA, aligned and cropped, training split, with its test split held out (Section 5.1; setup, section 6)."
    _fits("celeba64", 64, 64, 3, cfg)
    if cfg.holdout:
        raise ParameterError(
            f"holdout = {cfg.holdout}: celeba64 has a test split of its own; use holdout = 0"
        )
    splits, base = celeba_files(root, expect), Path(root) / "celeba" / "img_align_celeba"
    folder = index_folder("celeba64", base, cache_dir)
    files = splits[0] + splits[2]
    rows = index_files(folder, base, files, read_celeba, say)
    found = dict(zip(files, rows))
    usable = {k: [f for f in splits[k] if not found[f][1]] for k in (0, 2)}
    if not usable[0]:
        raise ValueError(
            f"{base}: no usable image among {len(splits[0])} of the training split; "
            + next((f"the first: {why}" for _, why, _ in rows if why), "none is listed")
        )
    pixels = {
        k: prepared(folder, fs, [found[f][0] for f in fs], read_celeba, 64)
        for k, fs in usable.items()
    }
    zeros = {k: torch.zeros(len(fs), dtype=torch.long) for k, fs in usable.items()}
    return Data(
        "celeba64",
        pixels[0],
        zeros[0],
        pixels[2],
        zeros[2],
        0,
        [],
        content_sum("celeba64", (("", found[f][0]) for f in usable[0])),
        _notes(base, files, rows),
    )


IMAGENET = {"classes": 1000, "train": 1_281_167, "val": 50_000}
WNID = re.compile(r"n\d{8}")


def fetch_imagenet(root) -> str:
    "How ImageNet gets to where it is looked for."
    there = Path(root) / "imagenet"
    return (
        f"Register at https://image-net.org/download-images, put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6 GB) into {there}, and run\n"
        f"    python -c \"from torchvision.datasets import ImageNet; [ImageNet({str(there)!r}, split=s) for s in ('train', 'val')]\"\n"
        f"(needs scipy), which makes {there}/train/nXXXXXXXX/*.JPEG and {there}/val/nXXXXXXXX/*.JPEG"
    )


def imagenet_folder(
    root,  # the folder of the data sets
) -> Path:  # its imagenet/train, with at least one class folder
    "Where the training images of ImageNet are, or `FileNotFoundError` with the way to get them there."
    train = Path(root) / "imagenet" / "train"
    if train.is_dir() and any(WNID.fullmatch(e.name) and e.is_dir() for e in os.scandir(train)):
        return train
    state = f"{train} has no folder like n01440764" if train.is_dir() else f"{train} is not there"
    raise FileNotFoundError(
        f"imagenet is not under {root}: {state}. {fetch_imagenet(root)}\nor set UVIT_DATA (parameter data_root) to the folder that has imagenet/"
    )


def find_imagenet64(root) -> Path:
    "ImageNet's pixels, whatever their size: see `imagenet_folder`."
    return imagenet_folder(root)


def imagenet_files(
    folder: Path,  # imagenet/train or imagenet/val
    expect=1000,  # class folders; None: any number
) -> tuple:  # ([(class, file)] sorted, names of the classes, notes)
    "The images of one split by class. `ValueError` when it is a part of ImageNet."
    files, notes = list_folder(folder)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and WNID.fullmatch(p.name))
    if other := sorted({c for c, _ in files} - set(names)):
        notes.append(
            f"not a class of ImageNet, ignored: {', '.join(c or 'loose files' for c in other)}"
        )
    if expect is not None and len(names) != expect:
        raise ValueError(
            f"imagenet64: {len(names)} class folders in {folder}, ImageNet has {expect}, and with another number the labels would mean other classes. "
            f"For a part of ImageNet use dataset = folder:{folder} with img_size = 64; for all of it: {fetch_imagenet(folder.parent.parent)}"
        )
    return sorted((c, f) for c, f in files if c in set(names)), names, notes


def load_imagenet64(
    cfg: DataConfig,  # img_size 64, in_chans 3; holdout only where there is no val folder
    root,  # the folder of the data sets
    expect=IMAGENET["classes"],  # class folders; None: any number (for tests)
    cache_dir=None,
    say=None,  # of the index, None: results/cache; progress of the first reading
) -> Data:  # streamed; held-out images in memory
    "ImageNet at 64x64: repeated box halving, bicubic, centre crop (Section 5.1; setup, section 6)."
    _fits("imagenet64", 64, 64, 3, cfg)
    train = imagenet_folder(root)
    val = train.parent / "val"
    read = lambda f: _try_read(f, 64, 3)
    pairs, names, notes = imagenet_files(train, expect)
    label = {c: i for i, c in enumerate(names)}
    folder = index_folder("imagenet64", train, cache_dir)
    rows = index_files(folder, train, [f for _, f in pairs], read, say)
    notes += _notes(train, [f for _, f in pairs], rows)
    kept = [(c, r[0], f) for (c, f), r in zip(pairs, rows) if not r[1]]
    if not kept:
        raise ValueError(
            f"{train}: no usable image among {len(pairs)}; {notes[0] if notes else 'the class folders are empty'}"
        )
    if expect and len(kept) != IMAGENET["train"]:
        notes.append(
            f"number of images: {len(kept)} usable for training, the whole set has {IMAGENET['train']}"
        )
    labels, sha = (
        np.array([label[c] for c, *_ in kept]),
        content_sum("imagenet64", ((c, s) for c, s, _ in kept)),
    )
    held = _held_out(val, label, folder.with_name(folder.name + "-val"), read, say, notes)
    if held and cfg.holdout:
        raise ParameterError(f"holdout = {cfg.holdout}: {val} is held out already; use holdout = 0")
    stream = lambda index: FolderStream([kept[i][2] for i in index], labels[index], 64, 3)
    ours, away = (
        (np.arange(len(kept)), np.arange(0))
        if not cfg.holdout
        else (i.numpy() for i in hold_out(labels, cfg.holdout, sha))
    )
    if not held:
        held = (
            prepared(folder, [kept[i][2] for i in away], [kept[i][1] for i in away], read, 64),
            torch.from_numpy(labels[away]),
        )
    K, names = _classes(str(train), len(names), names, cfg)
    return Data(
        "imagenet64",
        None,
        torch.from_numpy(labels[ours]),
        *held,
        K,
        names,
        sha,
        notes,
        stream(ours),
    )


def _held_out(val: Path, label: dict, folder: Path, read, say, notes: list):
    "(images, labels) of the validation folder, or None with a note."
    if not val.is_dir() or not (pairs := [(c, f) for c, f in list_folder(val)[0] if c in label]):
        notes.append(
            f"nothing held out: {val} is not there"
            if not val.is_dir()
            else f"nothing held out: {val} has no folder of a class; torchvision.datasets.ImageNet sorts it"
        )
        return None
    files = [f for _, f in pairs]
    rows = index_files(folder, val, files, read, say)
    notes += _notes(val, files, rows)
    ok = [(label[c], r[0], f) for (c, f), r in zip(pairs, rows) if not r[1]]
    return prepared(folder, [f for *_, f in ok], [s for _, s, _ in ok], read, 64), torch.tensor(
        [y for y, *_ in ok]
    )
