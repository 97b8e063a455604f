"""Folders of images, CelebA, ImageNet: what is read, left out, and kept in a store."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from uvit_repro.config import CONFIGS, DataConfig, ParameterError
from uvit_repro.data import folders
from uvit_repro.data import store as store_module
from uvit_repro.data.folders import (
    PixelStore,
    find_imagenet64,
    load_celeba64,
    load_folder,
    load_imagenet64,
    prepare,
    read_image,
)
from uvit_repro.data.images import Batches
from uvit_repro.data.store import StoreError

CELEBA = CONFIGS["CelebA 64x64 U-ViT-S/4"].data
IMAGENET = CONFIGS["ImageNet 64x64 U-ViT-M/4"].data
WNIDS = ("n02102040", "n01440764", "n01443537")


def noise(w=40, h=36, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image.fromarray(x)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "Stores of large sets are written here."
    root = tmp_path_factory.mktemp("project")
    monkeypatch.setenv("UVIT_REPRO_ROOT", str(root))
    return root / "results" / "cache"


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "set"
    for c, k in (("b", 5), ("a", 6)):
        (base / c).mkdir(parents=True)
        for i in range(k):
            noise(seed=10 * k + i).save(base / c / f"{i}.png")
    return base


def load(base, **kw):
    return load_folder(DataConfig(dataset=f"folder:{base}", **{"img_size": 16, **kw}), ".")


@pytest.fixture
def on_disk(monkeypatch):
    "Makes all sets larger than what is kept in memory."
    return lambda: monkeypatch.setattr(folders, "RESIDENT_BYTES", 0)


def named(notes, kind):
    return sorted(n.partition(": ")[2].split(" (")[0] for n in notes if n.startswith(f"{kind}: "))


# ---------------------------------------------------------------- single files
def cut(path):
    noise().save(path)
    path.write_bytes(path.read_bytes()[:700])


def turned(path):
    exif = Image.Exif()
    exif[274] = 3
    noise().save(path, exif=exif)


def animated(path):
    frames = [noise(seed=k).convert("L") for k in (1, 2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def deep(path):
    Image.fromarray(np.full((40, 40), 257 * 100, np.uint16)).save(path)


def clear(path):
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(path, lossless=True)


def converted(mode):
    return lambda path: noise().convert(mode).save(path)


UNREADABLE = "left out, not readable"
BAD = {  # name: writer
    "cut.jpg": cut,
    "cut.png": cut,
    "empty.gif": Path.touch,
    "words.jpeg": lambda f: f.write_text("no image", encoding="utf-8"),
    "lost.png": lambda f: f.symlink_to(f.parent / "nowhere.png"),
    "pipe.png": os.mkfifo,
    "deep.png": deep,
    "two\nlines.png": Path.touch,
}
GOOD = {
    "grey.png": converted("L"),
    "bits.png": converted("1"),
    "palette.gif": converted("P"),
    "print.jpg": converted("CMYK"),
    "alpha.png": converted("RGBA"),
    "clear.webp": clear,
    "phone.jpg": turned,
    "tiny.bmp": lambda f: noise(5, 9).save(f),
    "one.TIF": lambda f: Image.new("RGB", (1, 1)).save(f, "TIFF"),
    "anim.gif": animated,
    "other.png": lambda f: noise().save(f, "JPEG"),
}


@pytest.mark.parametrize("stored", (False, True), ids=("memory", "store"))
def test_odd_files(folder, stored, on_disk):
    "Damaged files are left out with their label, and named; all others are read."
    for name, write in {**BAD, **GOOD}.items():
        write(folder / "a" / name)
    (folder / "a" / "folder.png").mkdir()
    if stored:
        on_disk()
    d = load(folder)
    assert d.train_labels.bincount().tolist() == [6 + len(GOOD), 5]
    escaped = sorted(f"a/{name}".replace("\n", r"\n") for name in BAD)
    assert named(d.notes, UNREADABLE) == escaped and (d.train_images is None) == stored


def test_values_after_conversion(tmp_path):
    clear(tmp_path / "y.webp")
    assert (read_image(tmp_path / "y.webp", 16, 1)[0] == 255).all()
    turned(tmp_path / "z.png")
    upright = np.rot90(np.asarray(noise()), 2)
    assert np.array_equal(read_image(tmp_path / "z.png", 36)[0], upright[:, 2:38])
    Image.new("RGB", (1, 60_000)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="would become"):
        read_image(tmp_path / "line.png", 64)


# ---------------------------------------------------------------- folders
def test_a_good_folder(folder):
    d = load(folder)
    assert (d.class_names, d.train_labels.tolist(), d.notes) == (["a", "b"], [0] * 6 + [1] * 5, [])
    want = {prepare(Image.open(f), 16).tobytes() for f in (folder / "a").iterdir()}
    x = d.train_images[:6].permute(0, 2, 3, 1).contiguous()
    assert {image.numpy().tobytes() for image in x} == want


def test_other_things_in_a_folder(folder):
    for name in ("empty", "onlybad", ".git", "a/deep/er"):
        (folder / name).mkdir(parents=True)
    for name in ("onlybad/x.png", "a/notes.txt", "a/list.csv"):
        (folder / name).write_text("?", encoding="utf-8")
    for name in ("loose.png", ".git/x.png", "a/._hidden.png", "a/deep/er/x.JPEG"):
        noise(seed=len(name)).save(folder / name)
    (folder / "b" / "copy.png").write_bytes((folder / "b" / "0.png").read_bytes())
    d = load(folder)
    assert d.class_names == ["a", "b"] and d.train_labels.bincount().tolist() == [7, 6]
    assert named(d.notes, "left out, beside the class folders") == ["loose.png"]
    assert named(d.notes, UNREADABLE) == ["onlybad/x.png"]


@pytest.mark.parametrize("place", ("a", "."))
def test_links_in_circles_end(folder, place):
    before = load(folder)
    for n in ("one", "two", "three"):
        (folder / place / n).symlink_to(folder / place, target_is_directory=True)
    start = time.monotonic()
    d = load(folder)
    assert d.sha256 == before.sha256 and len(d) == 11
    folders_seen = list(folders.walk(folder))
    assert len(folders_seen) == 3 and time.monotonic() - start < 30


def test_the_checksum_ignores_names_not_content(folder):
    a = load(folder)
    (folder / "a" / "0.png").rename(folder / "a" / "zzz.png")
    (folder / "b" / "sub").mkdir()
    (folder / "b" / "1.png").rename(folder / "b" / "sub" / "1.png")
    moved = folder.rename(folder.with_name("moved"))
    b = load(moved)
    assert a.sha256 == b.sha256 and torch.equal(a.train_images, b.train_images)
    (moved / "a" / "2.png").rename(moved / "b" / "2b.png")
    assert load(moved).sha256 != a.sha256


def test_folders_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing there"):
        load(tmp_path / "no")
    with pytest.raises(ValueError, match="is a file"):
        load(folder / "a" / "0.png")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.png").touch()
    with pytest.raises(ValueError, match=r"no usable image among 1 candidate.*empty file"):
        load(tmp_path / "bare")
    with pytest.raises(ParameterError, match="in_chans = 4"):
        load(folder, in_chans=4)
    with pytest.raises(ParameterError, match="at most 10"):
        load(folder, holdout=11)
    d = load(folder / "a", holdout=2)
    assert (d.num_classes, len(d), len(d.test_labels)) == (0, 4, 2)


# ---------------------------------------------------------------- large sets
def test_stored_equals_resident(folder, on_disk):
    r = load(folder, holdout=3)
    on_disk()
    s = load(folder, holdout=3)
    assert r.inputs is None and s.train_images is None and r.sha256 == s.sha256
    assert torch.equal(r.test_images, s.test_images)
    assert torch.equal(r.train_labels, s.train_labels) and s.shape == (3, 16, 16)
    kw = {"batch_size": 3, "seed": 1, "flip": True, "p_uncond": 0.3, "null_class": 2}
    R, S = Batches(r, **kw), Batches(s, **kw)
    for step, ahead in zip(range(5, 13), S.iterate(5), strict=False):
        for other in (R.at(step), S.at(step)):
            assert torch.equal(ahead[0], other[0]) and torch.equal(ahead[1], other[1])


def test_a_store_is_read_once_and_follows_the_files(folder, cache, monkeypatch, on_disk):
    on_disk()
    first = load(folder)
    with monkeypatch.context() as m:
        m.setattr(folders, "read_image", lambda *a: pytest.fail("not from the store"))
        assert load(folder).sha256 == first.sha256
    (folder / "a" / "0.png").write_bytes(b"damaged")
    d = load(folder)
    assert len(d) == 10 and d.sha256 != first.sha256 and len(list(cache.iterdir())) == 2


def test_a_damaged_store_is_set_aside_and_made_again(folder, cache, on_disk):
    on_disk()
    first = load(folder).inputs.read(torch.arange(11))
    path = next(cache.glob("*/pixels-00000.npy"))
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 8
    path.write_bytes(raw)
    with pytest.raises(StoreError, match=r"pixels-00000\.npy is damaged.*damaged-1.*Repeat"):
        load(folder).inputs.read(torch.arange(11))
    again = load(folder)
    assert torch.equal(again.inputs.read(torch.arange(11)), first)
    assert PixelStore(path.parent).verify()["rows"] == 11


def test_a_cache_that_cannot_be_written(folder, cache, tmp_path, monkeypatch, on_disk):
    want = load(folder)
    on_disk()
    cache.parent.parent.joinpath("results").touch()
    monkeypatch.setattr(store_module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert load(folder).sha256 == want.sha256
    assert list((tmp_path / "tmp").glob("*/images-*/index.json"))


# ---------------------------------------------------------------- CelebA
def picture(seed, w=178, h=218):
    "Smooth colours, another one for each seed."
    return noise(5, 6, seed).resize((w, h), Image.BICUBIC)


def celeba(root, monkeypatch, counts=(7, 2, 3)):
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    rows = [k for k, n in enumerate(counts) for _ in range(n)]
    for i in range(len(rows)):
        picture(i).save(base / "img_align_celeba" / f"{i + 1:06d}.jpg")
    lines = [f"{i + 1:06d}.jpg {k}\n" for i, k in enumerate(rows)]
    (base / "list_eval_partition.txt").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(folders, "CELEBA", dict(zip("012", counts, strict=True)))
    return base, partial(load_celeba64, CELEBA, root)


def test_celeba_splits_and_crop(tmp_path, monkeypatch):
    base, load_it = celeba(tmp_path, monkeypatch)
    d = load_it()
    assert (len(d), d.test_images.shape, d.notes) == (7, (3, 3, 64, 64), [])
    for i, x in [(1, d.train_images[0]), (7, d.train_images[6]), (10, d.test_images[0])]:
        face = Image.open(base / "img_align_celeba" / f"{i:06d}.jpg")
        face = transforms.functional.crop(face, 57, 25, 128, 128)
        want = np.array(transforms.Resize(64)(face))
        assert np.array_equal(want, x.permute(1, 2, 0).numpy())


def test_celeba_is_whole_or_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition.txt"):
        load_celeba64(CELEBA, tmp_path)
    base, load_it = celeba(tmp_path, monkeypatch)
    with monkeypatch.context() as m, pytest.raises(ValueError, match=r"7.*2.*3.* images"):
        m.setattr(folders, "CELEBA", {"0": 8, "1": 2, "2": 3})
        load_it()
    (base / "img_align_celeba" / "000008.jpg").unlink()  # validation: not used, not missed
    assert len(load_it()) == 7
    (base / "img_align_celeba" / "000012.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 10 images .*first 000012.jpg"):
        load_it()
    (base / "list_eval_partition.txt").write_text("000001.jpg train\n", encoding="utf-8")
    with pytest.raises(ValueError, match="names"):
        load_it()
    with pytest.raises(ParameterError, match="img_size = 32"):
        load_celeba64(replace(CELEBA, img_size=32), tmp_path)
    with pytest.raises(ParameterError, match="test split of its own"):
        load_celeba64(replace(CELEBA, holdout=5), tmp_path)


def test_celeba_other_sizes_and_damage_are_named(tmp_path, monkeypatch):
    base, load_it = celeba(tmp_path, monkeypatch)
    files = base / "img_align_celeba"
    picture(1, 200, 200).save(files / "000002.jpg")
    (files / "000003.jpg").write_bytes((files / "000004.jpg").read_bytes()[:900])
    d = load_it()
    assert len(d) == 5 and len(d.notes) == 2 and "200x200 pixels" in d.notes[0]


# ---------------------------------------------------------------- ImageNet
def imagenet(root, monkeypatch, each=3):
    base = root / "imagenet"
    for j, w in enumerate(WNIDS):
        for split, n in (("train", each), ("val", 1)):
            (base / split / w).mkdir(parents=True)
            for i in range(n):
                image = picture(100 * j + i + 50 * (split == "val"), 150 + 10 * i, 120)
                image.save(base / split / w / f"{w}_{i}.JPEG")
    monkeypatch.setattr(folders, "IMAGENET", {"classes": 3, "train": 9})
    return base, partial(load_imagenet64, IMAGENET, root)


def test_imagenet_labels_and_preparation(tmp_path, monkeypatch):
    base, load_it = imagenet(tmp_path, monkeypatch)
    with monkeypatch.context() as m:
        m.setattr(folders, "RESIDENT_BYTES", 0)
        d, theirs = load_it(), ImageFolder(base / "train")
    assert d.class_names == sorted(WNIDS) == theirs.classes and d.train_images is None
    assert d.train_labels.tolist() == theirs.targets and d.test_labels.tolist() == [0, 1, 2]
    x = d.inputs.read(torch.tensor([4]))[0]
    assert np.array_equal(x.permute(1, 2, 0).numpy(), prepare(theirs[4][0], 64))
    assert load_it().sha256 == d.sha256 and torch.equal(load_it().train_images[4], x)
    held = Image.open(base / "val" / "n02102040" / "n02102040_0.JPEG")
    assert np.array_equal(d.test_images[2].permute(1, 2, 0).numpy(), prepare(held, 64))


def test_a_part_of_imagenet_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"(?s)imagenet/train is not there.*devkit"):
        find_imagenet64(tmp_path)
    base, load_it = imagenet(tmp_path, monkeypatch)
    with monkeypatch.context() as m:
        m.setitem(folders.IMAGENET, "classes", 1000)
        with pytest.raises(ValueError, match="3 class folders .*ImageNet has 1000.*folder:"):
            load_it()
    first = base / "train" / "n01440764" / "n01440764_0.JPEG"
    first.rename(base / "train" / "loose.JPEG")
    (base / "train" / "extra").mkdir()
    picture(0).save(base / "train" / "extra" / "a.jpg")
    d = load_it()
    assert len(d) == 8 and "images: 8 usable of 9, 1 of no class left out" in d.notes
    for p in (base / "train").glob("n*"):
        p.rename(p.with_name(f"x{p.name}"))
    with pytest.raises(FileNotFoundError, match="has no folder like n01440764"):
        find_imagenet64(tmp_path)


def test_imagenet_without_sorted_validation_images(tmp_path, monkeypatch):
    base, load_it = imagenet(tmp_path, monkeypatch)
    whole = load_it()
    for f in list((base / "val").glob("*/*")):
        f.rename(base / "val" / f.name)  # as the archive unpacks
        f.parent.rmdir()
    d = load_it()
    assert len(d.test_images) == 0 and d.shape == (3, 64, 64) and d.sha256 == whole.sha256
    assert any("has no folder of a class" in n for n in d.notes)
    part = load_imagenet64(replace(IMAGENET, holdout=3), tmp_path)
    assert (len(part), part.test_labels.tolist()) == (6, [0, 1, 2])


# ---------------------------------------------------------------- kills and names
KILLED = """
import sys, time
from uvit_repro.config import DataConfig
import uvit_repro.data.folders as folders
read = folders.read_image
def slow(*args):
    time.sleep(0.02)
    with open(sys.argv[2], "a", encoding="utf-8") as log:
        log.write("x\\n")
    return read(*args)
folders.read_image, folders.SHARD, folders.THREADS = slow, 10, 1
cfg = DataConfig(dataset="folder:" + sys.argv[1], img_size=16)
folders.RESIDENT_BYTES = 0
print(folders.load_folder(cfg, ".").sha256)
"""


def test_killed_reading_continues(tmp_path):
    "A process is killed three times while it reads; no shard that was finished is read again."
    (tmp_path / "some").mkdir()
    for i in range(60):
        noise(seed=i).save(tmp_path / "some" / f"{i:03d}.png")
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "some"), str(log)]
    for _ in range(3):
        before = log.stat().st_size
        p = subprocess.Popen(command, stdout=subprocess.PIPE)
        while log.stat().st_size < before + 2 * 15 and p.poll() is None:
            time.sleep(0.01)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert p.returncode == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == load(tmp_path / "some").sha256
    assert log.stat().st_size // 2 <= 60 + 3 * 14


def test_names_of_any_kind(tmp_path, on_disk):
    on_disk()
    some = tmp_path / "some"
    some.mkdir()
    for n in (b"a\nb.jpg", b"tab\t.jpg", b'quote".jpg', b"latin\xe9.jpg", "ünïcode.jpg".encode()):
        with open(os.path.join(os.fsencode(some), n), "wb") as f:
            picture(len(n)).save(f, "JPEG")
    for _ in range(2):
        d = load(some)
        assert (len(d), d.notes) == (5, [])
