"CelebA and ImageNet from their layouts on disk: splits, crops, labels, the index, and what is refused."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from uvit_repro.config import CONFIGS, ParameterError, experiment
from uvit_repro.data import imagesets as S
from uvit_repro.data.images import DATASETS, load_folder, prepare

CELEBA, IMAGENET = CONFIGS["CelebA 64x64 U-ViT-S/4"].data, CONFIGS["ImageNet 64x64 U-ViT-M/4"].data
WNIDS = ("n02102040", "n01440764", "n01443537")


def picture(seed, w=178, h=218):
    "Smooth colours, another one for each seed."
    g = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(g).resize((w, h), Image.BICUBIC)


def celeba(root, counts=(7, 2, 3)):
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    rows = [k for k, n in enumerate(counts) for _ in range(n)]
    for i, k in enumerate(rows):
        picture(i).save(base / "img_align_celeba" / f"{i + 1:06d}.jpg")
    (base / "list_eval_partition.txt").write_text(
        "".join(f"{i + 1:06d}.jpg {k}\n" for i, k in enumerate(rows))
    )
    return base, dict(enumerate(counts))


def imagenet(root, each=3, val=1):
    base = root / "imagenet"
    for j, w in enumerate(WNIDS):
        for split, n in (("train", each), ("val", val)):
            (base / split / w).mkdir(parents=True)
            for i in range(n):
                picture(100 * j + i + 50 * (split == "val"), 150 + 10 * i, 120).save(
                    base / split / w / f"{w}_{i}.JPEG"
                )
    return base


# ---------------------------------------------------------------- CelebA
def test_celeba_splits_and_crop(tmp_path):
    base, counts = celeba(tmp_path)
    data = S.load_celeba64(CELEBA, tmp_path, counts, tmp_path / "cache")
    assert (len(data), data.test_images.shape, data.num_classes, data.notes) == (
        7,
        (3, 3, 64, 64),
        0,
        [],
    )
    crop = transforms.Compose(
        [lambda im: transforms.functional.crop(im, 57, 25, 128, 128), transforms.Resize(64)]
    )
    for i, x in [(1, data.train_images[0]), (7, data.train_images[6]), (10, data.test_images[0])]:
        assert np.array_equal(
            np.array(crop(Image.open(base / "img_align_celeba" / f"{i:06d}.jpg"))),
            x.permute(1, 2, 0).numpy(),
        )


def test_celeba_is_whole_or_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="list_eval_partition.txt"):
        S.load_celeba64(CELEBA, tmp_path)
    base, counts = celeba(tmp_path)
    with pytest.raises(
        ValueError, match="names 7, 2 and 3 images .*CelebA has 162770, 19867 and 19962"
    ):
        S.load_celeba64(CELEBA, tmp_path, cache_dir=tmp_path / "cache")
    (base / "img_align_celeba" / "000008.jpg").unlink()  # validation: not used, not missed
    assert len(S.load_celeba64(CELEBA, tmp_path, counts, tmp_path / "cache")) == 7
    (base / "img_align_celeba" / "000012.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 12 images .*first is 000012.jpg"):
        S.load_celeba64(CELEBA, tmp_path, counts, tmp_path / "cache")
    (base / "list_eval_partition.txt").write_text("000001.jpg train\n")
    with pytest.raises(ValueError, match="line 1: '000001.jpg train'"):
        S.load_celeba64(CELEBA, tmp_path, None)


def test_celeba_other_sizes_and_damage_are_named(tmp_path):
    base, counts = celeba(tmp_path)
    f = base / "img_align_celeba"
    picture(1, 200, 200).save(f / "000002.jpg")
    (f / "000003.jpg").write_bytes((f / "000004.jpg").read_bytes()[:900])
    data = S.load_celeba64(CELEBA, tmp_path, counts, tmp_path / "cache")
    assert (
        len(data) == 5
        and len(data.notes) == 2
        and "200x200 pixels, where img_align_celeba has 178x218" in data.notes[0]
    )
    for i in range(1, 8):
        (f / f"{i:06d}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="no usable image among 7"):
        S.load_celeba64(CELEBA, tmp_path, counts, tmp_path / "cache")


def test_wrong_sizes_are_refused(tmp_path):
    for load, cfg in ((S.load_celeba64, CELEBA), (S.load_imagenet64, IMAGENET)):
        with pytest.raises(ParameterError, match="img_size = 32"):
            load(replace(cfg, img_size=32), tmp_path)
    with pytest.raises(ParameterError, match="test split of its own"):
        S.load_celeba64(replace(CELEBA, holdout=5), tmp_path)


# ---------------------------------------------------------------- ImageNet
def test_imagenet_labels_and_preparation(tmp_path):
    base = imagenet(tmp_path)
    data = S.load_imagenet64(IMAGENET, tmp_path, None, tmp_path / "cache")
    theirs = ImageFolder(base / "train")
    assert (
        data.class_names[:3] == sorted(WNIDS) == theirs.classes
        and data.num_classes == 1000
        and data.train_images is None
    )
    assert [str(f) for f in data.stream.files] == [
        p for p, _ in theirs.samples
    ] and data.train_labels.tolist() == theirs.targets
    assert (
        np.array_equal(data.stream[4][0].permute(1, 2, 0).numpy(), prepare(theirs[4][0], 64))
        and data.stream[4][1] == theirs[4][1]
    )
    assert data.test_labels.tolist() == [0, 1, 2] and np.array_equal(
        data.test_images[2].permute(1, 2, 0).numpy(),
        prepare(Image.open(base / "val" / "n02102040" / "n02102040_0.JPEG"), 64),
    )


def test_a_part_of_imagenet_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="(?s)imagenet/train is not there.*ILSVRC2012_devkit_t12.tar.gz.*torchvision.datasets import ImageNet",
    ):
        S.imagenet_folder(tmp_path)
    base = imagenet(tmp_path)
    assert S.imagenet_folder(tmp_path) == base / "train"
    with pytest.raises(
        ValueError, match="3 class folders .*ImageNet has 1000.*dataset = folder:"
    ) as e:
        S.load_imagenet64(IMAGENET, tmp_path, cache_dir=tmp_path / "cache")
    advised = str(e.value).partition("dataset = ")[2].split(" ")[0]
    assert (
        len(load_folder(replace(IMAGENET, dataset=advised, num_classes=0), ".")) == 9
        and not (tmp_path / "cache").exists()
    )
    (base / "train" / "n01440764" / "n01440764_0.JPEG").rename(base / "train" / "loose.JPEG")
    (base / "train" / "extra").mkdir()
    picture(0).save(base / "train" / "extra" / "a.jpg")
    data = S.load_imagenet64(IMAGENET, tmp_path, 3, tmp_path / "cache")
    assert (
        len(data) == 8
        and any("not a class of ImageNet, ignored: extra" in n for n in data.notes)
        and any("8 usable for training, the whole set has 1281167" in n for n in data.notes)
    )
    for p in (base / "train").iterdir():
        if p.is_dir():
            p.rename(p.with_name("x" + p.name))
    with pytest.raises(FileNotFoundError, match="has no folder like n01440764"):
        S.imagenet_folder(tmp_path)


def test_imagenet_validation_images(tmp_path):
    base = imagenet(tmp_path)
    whole = S.load_imagenet64(IMAGENET, tmp_path, None, tmp_path / "cache")
    for f in list((base / "val").glob("*/*")):
        f.rename(base / "val" / f.name)  # as the archive unpacks
    for d in list((base / "val").glob("n*")):
        if d.is_dir():
            d.rmdir()
    data = S.load_imagenet64(IMAGENET, tmp_path, None, tmp_path / "cache")
    assert (
        len(data.test_images) == 0
        and data.shape == (3, 64, 64)
        and data.sha256 == whole.sha256
        and any("has no folder of a class" in n for n in data.notes)
    )
    part = S.load_imagenet64(replace(IMAGENET, holdout=3), tmp_path, None, tmp_path / "cache")
    assert (len(part), len(part.stream), part.test_labels.tolist()) == (6, 6, [0, 1, 2])


# ---------------------------------------------------------------- the index
def test_content_is_independent_of_names_and_depends_on_classes(tmp_path):
    a, b = imagenet(tmp_path / "a"), imagenet(tmp_path / "b")
    load = lambda r: S.load_imagenet64(IMAGENET, r, None, tmp_path / "cache").sha256
    (b / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").rename(b / "train" / WNIDS[0] / "z.JPEG")
    assert load(tmp_path / "a") == load(tmp_path / "b")
    (b / "train" / WNIDS[0] / "z.JPEG").rename(b / "train" / WNIDS[1] / "z.JPEG")
    assert load(tmp_path / "a") != load(tmp_path / "b")


def test_only_changed_files_are_read_again(tmp_path, monkeypatch):
    base = imagenet(tmp_path)
    read, real = [], S._try_read
    monkeypatch.setattr(S, "_try_read", lambda f, *a: (read.append(Path(f).name), real(f, *a))[1])
    load = lambda: S.load_imagenet64(IMAGENET, tmp_path, None, tmp_path / "cache")
    first = load()
    assert sorted(set(read)) == sorted(f.name for f in (base / "train").glob("*/*"))
    read.clear()
    assert load().sha256 == first.sha256 and read == []
    f = base / "train" / WNIDS[1] / f"{WNIDS[1]}_1.JPEG"
    picture(77).save(f)
    assert load().sha256 != first.sha256 and read == [f.name]


@pytest.mark.parametrize("harm", ["cut", "noise", "empty", "twice", "foreign"])
def test_a_damaged_index_is_mended(tmp_path, harm):
    imagenet(tmp_path)
    load = lambda: S.load_imagenet64(IMAGENET, tmp_path, None, tmp_path / "cache")
    first = load()
    path = next(p for p in (tmp_path / "cache").glob("*/index.jsonl") if "val" not in p.parent.name)
    good = path.read_bytes()
    bad = {
        "cut": good[: len(good) // 2],
        "noise": good[:200] + b"\xff\x00\n{}\n[1, 2]\n" + good[200:],
        "empty": b"",
        "twice": good + good,
        "foreign": good + b'["gone.JPEG", 1, 2, "aa", "", []]\n',
    }[harm]
    path.write_bytes(bad)
    assert load().sha256 == first.sha256 and sorted(path.read_bytes().splitlines()) == sorted(
        good.splitlines()
    )


def test_killed_reading_continues(tmp_path):
    "A real process, killed three times while it reads; in the end every file was read about once."
    (tmp_path / "some").mkdir()
    files = [tmp_path / "some" / f"{i:03d}" for i in range(120)]
    for i, f in enumerate(files):
        f.write_text(str(i))
    code = f"""
import time
from pathlib import Path
from uvit_repro.data.imagesets import index_files
def read(f):
    time.sleep(0.01); open({str(tmp_path / "log")!r}, "a").write(Path(f).name + "\\n"); return None, "sum of " + Path(f).name, []
print(len(index_files(Path({str(tmp_path / "index")!r}), Path({str(tmp_path / "some")!r}), sorted(Path({str(tmp_path / "some")!r}).iterdir()), read, piece=8)))
"""
    log = tmp_path / "log"
    count = lambda: len(log.read_text().splitlines()) if log.exists() else 0
    for _ in range(3):
        before = count()
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        while count() < before + 20 and p.poll() is None:
            time.sleep(0.01)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert p.returncode == -signal.SIGKILL
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "120"
    )
    lines = [json.loads(l) for l in (tmp_path / "index" / "index.jsonl").read_text().splitlines()]
    assert sorted(l[0] for l in lines) == [f.name for f in files] and all(
        l[3] == f"sum of {l[0]}" for l in lines
    )
    assert count() <= 120 + 3 * (8 + 16), "more was read again than the pieces under way"


def test_names_of_any_kind(tmp_path):
    (tmp_path / "some").mkdir()
    odd = [b"a\nb.jpg", b"tab\t.jpg", b'quote".jpg', b"latin\xe9.jpg", "ünïcode.jpg".encode()]
    for n in odd:
        picture(len(n)).save(open(os.path.join(os.fsencode(tmp_path / "some"), n), "wb"), "JPEG")
    files, calls = sorted((tmp_path / "some").iterdir()), []
    read = lambda f: (calls.append(f), S._try_read(f, 64, 3))[1]
    rows = S.index_files(tmp_path / "index", tmp_path / "some", files, read)
    assert all(r[0] and not r[1] for r in rows)
    assert (
        S.index_files(tmp_path / "index", tmp_path / "some", files, read) == rows
        and len(calls) == 5
    )


def test_the_names_are_registered():
    for n in ("celeba64", "imagenet64"):
        assert DATASETS[n] == f"uvit_repro.data.imagesets:load_{n}"
    exp = experiment("paper", "celeba64")
    assert (exp.data, exp.data.flip, exp.model.condition) == (CELEBA, True, "none")


def test_import_is_light():
    code = "import sys, uvit_repro.imagesets; print([m for m in ('torchvision', 'sklearn', 'matplotlib', 'PIL', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]" and out.stderr == ""
