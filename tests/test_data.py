"Data: sums, splits, files as they lie on disk, batches."

import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_repro.config import (
    CONTENT,
    GPU,
    LAPTOP,
    DataConfig,
    ParameterError,
    experiment,
    with_overrides,
)
from uvit_repro.data import images as D

RNG = np.random.default_rng(0)
CIFAR = GPU.data


def noise(w=40, h=36, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def named(notes, kind):
    return sorted(n.partition(": ")[2].split(" (")[0] for n in notes if n.startswith(kind + ": "))


def hashed(*splits):
    "The sum again, written independently: order by numpy's lexsort over bytes."
    h = hashlib.sha256()
    for x, y in splits:
        o = np.lexsort([x.reshape(len(x), -1)[:, k] for k in range(x[0].size - 1, -1, -1)] + [y])
        x, y = x[o], y[o]
        h.update(str(x.shape).encode())
        h.update(y.astype("<i8").tobytes())
        h.update(x.tobytes())
    return h.hexdigest()


# ---------------------------------------------------------------- sums and splits
def test_import_is_light():
    code = "import sys, uvit_repro.data; print([m for m in ('torchvision', 'sklearn', 'matplotlib', 'PIL', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]" and out.stderr == ""


def test_canonical_is_independent_of_order():
    x, y = RNG.integers(0, 2, (200, 2, 2, 1), dtype=np.uint8), RNG.integers(0, 3, 200)
    m = RNG.permutation(200)
    for a, b in zip(D.canonical(x, y), D.canonical(x[m], y[m])):
        assert np.array_equal(a, b)
    assert (
        D.content_sha256((x, y), (x[:5], y[:5]))
        == D.content_sha256((x[m], y[m]), (x[:5][::-1], y[:5][::-1]))
        == hashed((x, y), (x[:5], y[:5]))
    )
    assert D.content_sha256((x, y)) != D.content_sha256((x, y[::-1]))


def test_digits_have_their_sum():
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = np.rint(raw.images * 255 / 16).astype(np.uint8)[..., None]
    assert hashed((x, raw.target)) == D.content_sha256((x, raw.target)) == CONTENT["digits"]
    d = D.load_digits(LAPTOP.data, None)
    assert (
        d.sha256 == CONTENT["digits"]
        and len(d) == 1500
        and len(d.test_labels) == 297
        and d.shape == (1, 8, 8)
    )
    both = torch.cat([d.train_images, d.test_images]).permute(0, 2, 3, 1).numpy()
    assert (
        D.content_sha256((both, torch.cat([d.train_labels, d.test_labels]).numpy()))
        == CONTENT["digits"]
    )  # nothing lost, nothing twice


def test_changed_digits_are_refused(monkeypatch):
    monkeypatch.setitem(CONTENT, "digits", "0" * 64)
    with pytest.raises(ValueError, match="are not digits"):
        D.load_digits(LAPTOP.data, None)


def test_holdout_is_proportional_and_fixed():
    y = np.repeat([0, 1, 2, 5], [70, 20, 9, 1])
    train, test = D.hold_out(y, 10, "x")
    assert np.bincount(y[test], minlength=6).tolist() == [7, 2, 1, 0, 0, 0] and sorted(
        torch.cat([train, test]).tolist()
    ) == list(range(100))
    assert torch.equal(test, D.hold_out(y, 10, "x")[1]) and not torch.equal(
        test, D.hold_out(y, 10, "y")[1]
    )
    a, b = (D.open_data(replace(LAPTOP, seed=s))[1] for s in (0, 9))
    assert torch.equal(a.test_images, b.test_images)
    with pytest.raises(ParameterError, match="at most 99"):
        D.hold_out(y, 100, "x")


# ---------------------------------------------------------------- CIFAR-10
def fake_batches(where: Path, n=20):
    "torchvision's on-disk format with n images in each batch file; returns the splits."
    where.mkdir(parents=True)
    r = np.random.default_rng(1)
    out = []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        x, y = r.integers(0, 256, (n, 3072), dtype=np.uint8), r.integers(0, 10, n).tolist()
        (where / name).write_bytes(
            pickle.dumps(
                {
                    "batch_label": name,
                    "labels": y,
                    "data": x,
                    "filenames": [f"{i}.png" for i in range(n)],
                }
            )
        )
        out.append((x.reshape(n, 3, 32, 32).transpose(0, 2, 3, 1), np.array(y)))
    (where / "batches.meta").write_bytes(
        pickle.dumps({"label_names": D.CIFAR10_CLASSES, "num_cases_per_batch": n, "num_vis": 3072})
    )
    return (np.concatenate([x for x, _ in out[:5]]), np.concatenate([y for _, y in out[:5]])), out[
        5
    ]


@pytest.fixture
def unchecked(monkeypatch):
    "torchvision without its md5 sums, so that small files of the real format pass."
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [[n, None] for n, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[n, None] for n, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", dict(CIFAR10.meta, md5=None))


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_cifar10_in_torchvisions_format(tmp_path, monkeypatch, unchecked, place):
    splits = fake_batches(tmp_path / place)
    total = hashed(*splits)
    with pytest.raises(ValueError, match="are not cifar10") as e:
        D.load_cifar10(CIFAR, tmp_path)  # wrong pixels in the right format
    assert total in str(e.value) and CONTENT["cifar10"] in str(e.value)
    monkeypatch.setitem(CONTENT, "cifar10", total)
    d = D.load_cifar10(CIFAR, tmp_path)
    assert (len(d), d.test_images.shape, d.num_classes, d.class_names[3]) == (
        100,
        (20, 3, 32, 32),
        10,
        "cat",
    )
    x, y = D.canonical(*splits[0])
    assert (
        np.array_equal(d.train_images.permute(0, 2, 3, 1).numpy(), x)
        and d.train_labels.tolist() == y.tolist()
    )
    (tmp_path / "other" / "cifar10").mkdir(parents=True)  # the same content from .npz files
    for name, (x, y) in zip(("train", "test"), splits):
        np.savez(tmp_path / "other" / "cifar10" / f"{name}.npz", images=x[::-1], labels=y[::-1])
    n = D.load_cifar10(CIFAR, tmp_path / "other")
    assert (
        n.sha256 == d.sha256
        and torch.equal(n.train_images, d.train_images)
        and torch.equal(n.test_labels, d.test_labels)
    )


def test_cifar10_md5_stays_on(tmp_path):
    fake_batches(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match="missing or damaged") as e:
        D.load_cifar10(CIFAR, tmp_path)
    assert "download=True" in str(e.value)


def test_cifar10_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        D.open_data(with_overrides(GPU, data_root=str(tmp_path)))
    for part in (
        f"python -c \"import torchvision; torchvision.datasets.CIFAR10('{tmp_path}', download=True)\"",
        "cifar10/train.npz",
        "cifar-10-batches-py",
    ):
        assert part in str(e.value)
    with pytest.raises(ParameterError, match="holdout = 0"):
        D.load_cifar10(replace(CIFAR, holdout=3), tmp_path)
    with pytest.raises(ParameterError, match="-p img_size 32"):
        D.load_cifar10(replace(CIFAR, img_size=16), tmp_path)


def test_cifar10_real():
    root = os.environ.get("UVIT_DATA", "")
    try:
        D.find_cifar10(root)
    except FileNotFoundError:
        pytest.skip("UVIT_DATA has no CIFAR-10")
    exp, d = D.open_data(with_overrides(GPU, data_root=root))
    assert (
        d.sha256 == CONTENT["cifar10"]
        and len(d) == 50_000
        and d.train_labels.bincount().tolist() == [5000] * 10
        and exp == with_overrides(GPU, data_root=root)
    )
    mean = d.train_images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(
        mean, torch.tensor([0.491400, 0.482158, 0.446531]).double(), atol=1e-6
    )  # the published moments


# ---------------------------------------------------------------- npz
@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros((4, 8, 8, 1), np.uint8)}, "none called `images`"),
        ({"images": np.zeros((4, 8, 8, 1), np.float32)}, "float32"),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, r"\(4, 8, 8\)"),
        ({"images": np.zeros((4, 8, 6, 1), np.uint8)}, "8x6"),
        ({"images": np.zeros((4, 9, 9, 1), np.uint8)}, "-p img_size 9"),
        ({"images": np.zeros((4, 8, 8, 3), np.uint8)}, "-p in_chans 3"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": np.arange(3)}, r"shape \(3,\)"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": np.arange(4) - 1}, "from -1"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": np.arange(4) * 1.0}, "float64"),
        (
            {"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": np.array(list("abcd"), object)},
            "not usable",
        ),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": np.arange(4) * 99}, "number them"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "N > 0"),
    ],
)
def test_npz_misfits(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        D.load_npz(DataConfig(dataset=f"npz:{tmp_path}/x.npz", img_size=8, in_chans=1), tmp_path)


def test_npz_damaged_or_foreign(tmp_path):
    cfg = DataConfig(dataset="npz:x.npz", img_size=8, in_chans=1)
    f = tmp_path / "x.npz"
    np.savez(f, images=RNG.integers(0, 256, (50, 8, 8, 1), dtype=np.uint8))
    whole = f.read_bytes()
    bent = bytearray(whole)
    bent[len(whole) // 2] ^= 255
    for content in (
        whole[: len(whole) // 2],
        bytes(bent),
        b"",
        b"text",
        pickle.dumps({"images": 1}),
    ):
        f.write_bytes(content)
        with pytest.raises(ValueError, match="not usable as npz"):
            D.load_npz(cfg, tmp_path)
    with open(f, "wb") as h:
        np.save(h, np.zeros(3))
    with pytest.raises(ValueError, match="bare array"):
        D.load_npz(cfg, tmp_path)
    f.unlink()
    with pytest.raises(FileNotFoundError, match="looked for"):
        D.load_npz(cfg, tmp_path)


def test_npz_of_known_content_keeps_its_identity(tmp_path):
    from sklearn.datasets import load_digits

    raw = load_digits()
    m = RNG.permutation(1797)
    np.savez(
        tmp_path / "d.npz",
        images=np.rint(raw.images[m] * 255 / 16).astype(np.uint8)[..., None],
        labels=raw.target[m],
        extra=np.ones(2),
    )
    exp, d = D.open_data(with_overrides(LAPTOP, dataset=f"npz:{tmp_path}/d.npz", num_classes=0))
    assert (
        d.sha256 == CONTENT["digits"]
        and exp.data.num_classes == 10
        and exp.run_id == LAPTOP.run_id
        and "extra" in d.notes[0]
    )
    assert torch.equal(d.train_images, D.load_digits(LAPTOP.data, None).train_images)


# ---------------------------------------------------------------- folders
@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "set"
    for c, k in (("b", 5), ("a", 6)):
        (base / c).mkdir(parents=True)
        for i in range(k):
            noise(seed=10 * k + i).save(base / c / f"{i}.png")
    return base


def load(base, **kw):
    resident = kw.pop("resident_bytes", None)
    return D.load_folder(
        DataConfig(dataset=f"folder:{base}", **{"img_size": 16, **kw}), ".", resident
    )


def test_good_folder_has_no_notes(folder):
    d = load(folder)
    assert (
        d.class_names == ["a", "b"]
        and d.train_labels.tolist() == [0] * 6 + [1] * 5
        and d.notes == []
        and d.shape == (3, 16, 16)
    )
    want = {D.prepare(Image.open(f), 16).tobytes() for f in (folder / "a").iterdir()}
    assert {x.permute(1, 2, 0).contiguous().numpy().tobytes() for x in d.train_images[:6]} == want


def exif(n):
    e = Image.Exif()
    e[274] = n
    return e


CASES = {  # name: (writer, kind of note or None, kept)
    "cut.jpg": (
        lambda f: (noise().save(f), f.write_bytes(f.read_bytes()[:700])),
        "left out, not readable",
        False,
    ),
    "cut.png": (
        lambda f: (noise().save(f), f.write_bytes(f.read_bytes()[:700])),
        "left out, not readable",
        False,
    ),
    "empty.gif": (lambda f: f.touch(), "left out, not readable", False),
    "words.jpeg": (lambda f: f.write_text("no image at all"), "left out, not readable", False),
    "lost.png": (lambda f: f.symlink_to(f.parent / "nowhere.png"), "left out, not readable", False),
    "folder.png": (lambda f: f.mkdir(), None, False),
    "pipe.png": (lambda f: os.mkfifo(f), "left out, not readable", False),
    "grey.png": (lambda f: noise().convert("L").save(f), "converted to RGB", True),
    "bits.png": (lambda f: noise().convert("1").save(f), "converted to RGB", True),
    "palette.gif": (lambda f: noise().quantize(7).save(f), "converted to RGB", True),
    "print.jpg": (lambda f: noise().convert("CMYK").save(f), "converted to RGB", True),
    "deep.png": (
        lambda f: Image.fromarray(np.full((40, 40), 257 * 100, np.uint16)).save(f),
        "converted to RGB",
        True,
    ),
    "alpha.png": (lambda f: noise().convert("RGBA").save(f), "alpha put on white", True),
    "clear.webp": (
        lambda f: Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(f, lossless=True),
        "alpha put on white",
        True,
    ),
    "phone.jpg": (lambda f: noise().save(f, exif=exif(3)), "turned as EXIF says", True),
    "tiny.bmp": (lambda f: noise(5, 9).save(f), "enlarged", True),
    "one.TIF": (lambda f: Image.new("RGB", (1, 1)).save(f, "TIFF"), "enlarged", True),
    "anim.gif": (
        lambda f: (
            noise(seed=1)
            .convert("L")
            .save(f, save_all=True, append_images=[noise(seed=2).convert("L")])
        ),
        "first frame used",
        True,
    ),
    "line.png": (lambda f: Image.new("RGB", (1, 65_000)).save(f), "enlarged", True),
    "wrongname.png": (lambda f: noise().save(f, "JPEG"), None, True),
}


@pytest.mark.parametrize("name", CASES)
def test_odd_file(folder, name):
    write, kind, kept = CASES[name]
    write(folder / "a" / name)
    d = load(folder)
    assert len(d) == 11 + kept and (kind is None or named(d.notes, kind) == [f"a/{name}"]), d.notes


def test_long_line_is_refused_not_enlarged_to_gigabytes(folder):
    Image.new("RGB", (1, 60_000)).save(folder / "a" / "line.png")
    assert named(load(folder, img_size=64).notes, "left out, not readable") == ["a/line.png"]


def test_values_after_conversion(folder):
    (folder / "one").mkdir()
    CASES["deep.png"][0](folder / "one" / "x.png")
    assert (D.read_image(folder / "one" / "x.png", 16, 3)[0] == 100).all()
    Image.new("L", (40, 40), 99).save(folder / "one" / "g.png")
    assert (D.read_image(folder / "one" / "g.png", 16, 3)[0] == 99).all()
    CASES["clear.webp"][0](folder / "one" / "y.webp")
    assert (D.read_image(folder / "one" / "y.webp", 16, 1)[0] == 255).all()
    noise(16, 16).save(folder / "one" / "z.png", exif=exif(6))
    assert np.array_equal(
        D.read_image(folder / "one" / "z.png", 16, 3)[0], np.rot90(np.asarray(noise(16, 16)), -1)
    )


def test_other_things_in_a_folder(folder, capsys):
    (folder / "empty").mkdir()
    (folder / "onlybad").mkdir()
    (folder / "onlybad" / "x.png").write_text("?")
    (folder / ".git").mkdir()
    noise().save(folder / ".git" / "x.png")
    (folder / "a" / "notes.txt").write_text("x")
    (folder / "a" / "list.csv").write_text("x")
    noise().save(folder / "loose.png")
    noise().save(folder / "a" / "._hidden.png")
    (folder / "b" / "copy.png").write_bytes((folder / "b" / "0.png").read_bytes())
    (folder / "a" / "deep" / "er").mkdir(parents=True)
    noise(seed=99).save(folder / "a" / "deep" / "er" / "x.JPEG")
    (folder / "a" / "deep" / "loop").symlink_to(folder / "a", target_is_directory=True)
    d = load(folder)
    assert d.class_names == ["a", "b"] and d.train_labels.bincount().tolist() == [7, 6]
    assert named(d.notes, "empty class, dropped") == ["empty", "onlybad"] and named(
        d.notes, "duplicate, kept"
    ) == ["b/copy.png"]
    assert named(d.notes, "left out, beside the class folders") == ["loose.png"] and named(
        d.notes, "left out, not readable"
    ) == ["onlybad/x.png"]
    assert any(
        n.startswith("not an image, ignored: 2 file(s)") and ".txt" in n and ".csv" in n
        for n in d.notes
    ) and not any("hidden" in n or ".git" in n for n in d.notes)
    D.summary(d.notes + [f"kind {i}: f{i}" for i in range(30)] + ["converted to RGB: x"] * 5000)
    out = capsys.readouterr().out
    assert (
        len(out.splitlines()) == 10
        and "5000  converted to RGB: x, x, x ..." in out
        and out.startswith("     1  left out")
    )


def test_folder_sum_ignores_names_not_content(folder):
    a = load(folder)
    (folder / "a" / "0.png").rename(folder / "a" / "zzz.png")
    (folder / "b" / "sub").mkdir()
    (folder / "b" / "1.png").rename(folder / "b" / "sub" / "1.png")
    folder.rename(folder.with_name("moved"))
    b = load(folder.with_name("moved"))
    assert a.sha256 == b.sha256 and torch.equal(a.train_images, b.train_images)
    noise(seed=7).save(folder.with_name("moved") / "a" / "new.png")
    assert load(folder.with_name("moved")).sha256 != a.sha256


def test_folder_errors(folder, tmp_path):
    for base, err, msg in (
        (tmp_path / "no", FileNotFoundError, "no such folder"),
        (folder / "a" / "0.png", ValueError, "is a file"),
    ):
        with pytest.raises(err, match=msg):
            load(base)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.png").write_text("?")
    with pytest.raises(ValueError, match="no usable image among 1 candidate"):
        load(tmp_path / "bare")
    with pytest.raises(ParameterError, match="in_chans = 4"):
        load(folder, in_chans=4)
    with pytest.raises(ParameterError, match="at most 10"):
        load(folder, holdout=11)
    d = load(folder / "a", holdout=2)
    assert (d.num_classes, len(d), len(d.test_labels), d.train_labels.unique().tolist()) == (
        0,
        4,
        2,
        [0],
    )


# ---------------------------------------------------------------- opening
def test_open_data(folder, tmp_path):
    exp = experiment("gpu", f"folder:{folder}", img_size=16)
    with pytest.raises(ValueError, match="open_data"):
        exp.run_id
    e, d = D.open_data(exp)
    assert (
        e.data.num_classes == 2
        and e.data.data_sha256 == d.sha256
        and e.run_id.startswith("folder-")
        and D.open_data(e)[1] is d
        and D.open_data(with_overrides(exp, flip=False, seed=4))[1] is d
    )
    assert (
        D.open_data(experiment("gpu", "folder:set", img_size=16, data_root=str(tmp_path)))[0].run_id
        == e.run_id
    )  # content, not path
    noise(seed=5).save(folder / "a" / "new.png")
    assert len(D.open_data(exp)[1]) == 12
    with pytest.raises(ValueError, match="bring back the old files"):
        D.open_data(e)
    for name in (
        "celeba64",
        "imagenet64",
        "imagenet256",
        "mscoco256",
    ):  # what is not there is named, with the folder that was looked into
        with pytest.raises(FileNotFoundError, match=f"(?s){name[:6]}.*{tmp_path}"):
            D.open_data(experiment("paper", name, data_root=str(tmp_path)))
    with pytest.raises(ParameterError, match="has no labels"):
        D.open_data(experiment("gpu", f"folder:{folder}/a", img_size=16, condition="class"))
    with pytest.raises(ParameterError, match="set num_classes = 2"):
        D.open_data(with_overrides(exp, num_classes=1))
    assert D.open_data(LAPTOP)[0] == LAPTOP


# ---------------------------------------------------------------- batches
def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_streaming_equals_resident(folder):
    r, s = load(folder, holdout=3), load(folder, holdout=3, resident_bytes=0)
    assert (
        r.stream is None
        and s.train_images is None
        and s.notes[-1].startswith("streamed: 11 images")
        and len(s) == len(r) == 8
        and r.sha256 == s.sha256
    )
    assert (
        torch.equal(r.test_images, s.test_images)
        and torch.equal(r.train_labels, s.train_labels)
        and s.shape == (3, 16, 16)
    )
    assert (
        load(folder, resident_bytes=11 * 16 * 16 * 3).stream is None
        and load(folder, resident_bytes=11 * 16 * 16 * 3 - 1).stream is not None
    )
    kw = {"batch_size": 3, "seed": 1, "flip": True, "p_uncond": 0.3, "null_class": 2}
    R, S, W = D.Batches(r, **kw), D.Batches(s, **kw), D.Batches(s, workers=2, **kw)
    state = torch.random.get_rng_state()
    for step, w, r0 in zip(range(5, 13), W.iterate(5), R.iterate(5)):
        assert same(w, R.at(step)) and same(w, S.at(step)) and same(w, r0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_unreadable_later(folder):
    s = load(folder, resident_bytes=0)
    Path(s.stream.files[2]).write_bytes(b"broken")
    Path(s.stream.files[3]).unlink()
    with pytest.warns(RuntimeWarning, match="no longer readable") as w:
        got = [s.stream[i] for i in range(11)]
    assert len(w) == 1 and torch.equal(got[2][0], got[4][0]) and torch.equal(got[3][0], got[4][0])
    Path(s.stream.files[-1]).unlink()
    assert s.stream[10][1] == 0 and torch.equal(
        s.stream[10][0], got[0][0]
    )  # the next one after the last is the first
    for f in s.stream.files:
        Path(f).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="none of the 11"):
        s.stream[0]


def numbered(n):
    return D.Data(
        "npz",
        torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 1, 2),
        torch.arange(n),
        torch.empty(0, 1, 1, 2, dtype=torch.uint8),
        torch.empty(0).long(),
        n,
        [],
        "",
    )


@pytest.mark.parametrize("batch_size", [1, 4, 7, 14, 33])
def test_every_image_once_per_epoch(batch_size):
    b = D.Batches(numbered(7), batch_size, seed=3, flip=False, p_uncond=0, null_class=None)
    ids = torch.cat([b.at(s)[1] for s in range(28)])
    for e in range(len(ids) // 7):
        assert sorted(ids[7 * e : 7 * e + 7].tolist()) == list(range(7))
    assert (
        len({tuple(ids[7 * e : 7 * e + 7].tolist()) for e in range(4)}) > 1
    )  # another order each epoch


def test_at_depends_on_seed_and_step_only():
    d = D.load_digits(LAPTOP.data, None)
    kw = {"batch_size": 64, "flip": True, "p_uncond": 0.2, "null_class": 10}
    a, b = D.Batches(d, seed=1, **kw), D.Batches(d, seed=1, **kw)
    steps = [0, 700, 23, 24, 1]
    first = {s: a.at(s) for s in steps}
    torch.manual_seed(5)
    torch.rand(7)
    for s in reversed(steps):
        assert same(first[s], b.at(s)) and same(first[s], next(b.iterate(s)))
    assert not same(first[0], D.Batches(d, seed=2, **kw).at(0))
    plain = D.Batches(d, seed=1, **{**kw, "flip": False, "p_uncond": 0}).at(
        0
    )  # one choice changes nothing of the others
    kept = first[0][1] != 10
    assert (
        torch.equal(first[0][1][kept], plain[1][kept])
        and 0 < (~kept).sum() < 40
        and first[0][0].min() >= -1
        and first[0][0].dtype == torch.float32
    )
    mirrored = [torch.equal(x, y.flip(-1)) for x, y in zip(first[0][0], plain[0])]
    assert 15 < sum(mirrored) < 50 and all(
        m or torch.equal(x, y) for m, x, y in zip(mirrored, first[0][0], plain[0])
    )
    parts = [D.Batches(d, seed=1, part=(r, 4), **kw).at(23) for r in range(4)]
    assert torch.equal(
        torch.stack([p[0] for p in parts], 1).flatten(0, 1), first[23][0]
    ) and torch.equal(torch.stack([p[1] for p in parts], 1).flatten(), first[23][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_are_the_same_on_cuda(folder):
    for d in (load(folder), load(folder, resident_bytes=0)):
        kw = {"batch_size": 4, "seed": 1, "flip": True, "p_uncond": 0.3, "null_class": 2}
        c, g = D.Batches(d, **kw), D.Batches(d, device="cuda", **kw)
        for s, (x, y) in zip(range(2, 6), g.iterate(2)):
            assert x.is_cuda and same((x.cpu(), y.cpu()), c.at(s)) and same((x, y), g.at(s))


def test_scales_and_pictures(tmp_path):
    u = torch.arange(256, dtype=torch.uint8)
    assert (
        torch.equal(D.to_uint8(D.to_model(u)), u)
        and D.to_model(u).aminmax() == (-1, 1)
        and D.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    )
    g = D.image_grid(u.reshape(4, 1, 8, 8), 3, pad=2, scale=2)
    assert g.shape == (2 * 22, 2 * 32, 3) and np.array_equal(
        np.asarray(Image.open(D.save_png(g, tmp_path / "a" / "b.png"))), g
    )
    with pytest.raises(ValueError, match="to_uint8"):
        D.image_grid(torch.zeros(1, 3, 2, 2), 1)
