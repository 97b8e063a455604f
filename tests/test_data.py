"""Images: checksums, splits, CIFAR-10 and npz files, opening, batches."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_repro.config import CONTENT, LAPTOP, DataConfig, ParameterError, experiment
from uvit_repro.data import cifar10
from uvit_repro.data.digits import load_digits
from uvit_repro.data.files import (
    DamagedFile,
    printable,
    read_checked_json,
    write_atomic,
    write_checked_json,
)
from uvit_repro.data.images import (
    Batches,
    Data,
    canonical,
    hold_out,
    image_grid,
    open_data,
    ordered_sum,
    to_model,
    to_uint8,
)
from uvit_repro.data.npz import load_npz

CIFAR = experiment("gpu").data


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------- files
def test_a_flipped_bit_of_checked_json_is_found(tmp_path):
    path = write_checked_json(tmp_path / "x.json", {"rows": 3, "scale": 0.1, "file": tmp_path})
    assert read_checked_json(path) == {"rows": 3, "scale": 0.1, "file": str(tmp_path)}
    raw = path.read_bytes()
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedFile, match=r"x\.json is damaged"):
            read_checked_json(path)


def test_a_full_disk_names_the_file(tmp_path):
    def write(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left.*result\.npy"):
        write_atomic(tmp_path / "result.npy", write)
    assert list(tmp_path.iterdir()) == []


WRITERS = {  # what fills a file up to a limit of 20,000 bytes and fails there
    "torch": "import torch; write = lambda p: torch.save({'x': torch.zeros(9999)}, p)",
    "safetensors": "import torch; from safetensors.torch import save_file; "
    "write = lambda p: save_file({'x': torch.zeros(9999)}, p)",
    "numpy": "import numpy as np; write = lambda p: np.savez(p, x=np.zeros(9999))",
    "text": "write = lambda p: p.write_text('x' * 99999, encoding='utf-8')",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_size_limit_names_the_file_whoever_writes(tmp_path, writer):
    "torch.save raises a RuntimeError without a name."
    code = f"""
import resource, signal, sys
from uvit_repro.data.files import write_atomic
{WRITERS[writer]}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_atomic(sys.argv[1] + "/result.npz", write)
except OSError as e:
    print(e.filename)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == str(tmp_path / "result.npz"), out.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_file_names_are_printed_escaped():
    assert printable("a\nb\x1b[31m.png") == r"a\nb\x1b[31m.png"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\udce9" and printable("é") == "é"


# ---------------------------------------------------------------- checksums and splits
def test_canonical_order_is_independent_of_the_order_given():
    rng = np.random.default_rng(0)
    x, y, m = (
        rng.integers(0, 2, (200, 2, 2, 1), np.uint8),
        rng.integers(0, 3, 200),
        rng.permutation(200),
    )
    assert all(map(np.array_equal, canonical(x, y), canonical(x[m], y[m])))
    keys = [x.reshape(200, 4)[:, k] for k in (3, 2, 1, 0)] + [y]
    by_numpy = np.lexsort(keys)
    assert ordered_sum(canonical(x, y)) == ordered_sum((x[by_numpy], y[by_numpy]))
    assert ordered_sum(canonical(x, y)) != ordered_sum(canonical(x, y[::-1]))


def test_digits_are_whole_and_checked(monkeypatch):
    d = load_digits(LAPTOP.data)
    assert (len(d), len(d.test_labels), d.shape, d.sha256) == (
        1500,
        297,
        (1, 8, 8),
        CONTENT["digits"],
    )
    x = torch.cat([d.train_images, d.test_images]).permute(0, 2, 3, 1).numpy()
    y = torch.cat([d.train_labels, d.test_labels]).numpy()
    assert ordered_sum(canonical(x, y)) == CONTENT["digits"]  # nothing lost, nothing twice
    monkeypatch.setitem(CONTENT, "digits", "0" * 64)
    with pytest.raises(ValueError, match="is not digits"):
        load_digits(LAPTOP.data)


def test_holdout_is_proportional_and_keyed_by_content():
    y = np.repeat([0, 1, 2, 5], [70, 20, 9, 1])
    train, test = hold_out(y, 10, "x")
    assert np.bincount(y[test], minlength=6).tolist() == [7, 2, 1, 0, 0, 0]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))
    assert torch.equal(test, hold_out(y, 10, "x")[1])
    assert not torch.equal(test, hold_out(y, 10, "y")[1])
    with pytest.raises(ParameterError, match="at most 99"):
        hold_out(y, 100, "x")


# ---------------------------------------------------------------- CIFAR-10
def short(text: str) -> bytes:
    return b"U" + bytes([len(text)]) + text.encode()


def python2_batch(images: np.ndarray, labels: list) -> bytes:
    "A batch as Python 2 pickled it: byte strings, an array rebuilt by a call, appended integers."
    raw = images.tobytes()
    data = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short("b")
    data += b"\x87R(K\x01" + b"M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", 3072)
    data += b"\x86cnumpy\ndtype\n" + short("u1") + b"K\x00K\x01\x87R(K\x03" + short("|") + b"NNN"
    data += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(raw)) + raw
    names = b"".join(short(f"x_{i}.png") for i in range(len(labels)))
    items = (
        short("data")
        + data
        + b"tb"
        + short("labels")
        + b"]("
        + b"".join(b"K" + bytes([y]) for y in labels)
    )
    items += b"e" + short("batch_label") + short("batch 1 of 5") + short("filenames") + b"]("
    return b"\x80\x02}(" + items + names + b"eu."


def made_cifar10(where, n=20) -> list:
    "CIFAR-10's files with n images each; the splits."
    where.mkdir(parents=True)
    parts = []
    for k, name in enumerate(cifar10.TRAIN + cifar10.TEST):
        x, y = random_images(n, 3072, seed=k), np.random.default_rng(k).integers(0, 10, n).tolist()
        (where / name).write_bytes(python2_batch(x, y))
        parts.append((x.reshape(n, 3, 32, 32).transpose(0, 2, 3, 1), np.array(y)))
    train = tuple(np.concatenate(v) for v in zip(*parts[:5], strict=True))
    return [train, parts[5]]


def test_cifar10_from_its_own_files(tmp_path, monkeypatch):
    splits = made_cifar10(tmp_path / "cifar-10-batches-py")
    x, y = splits[1]
    as_pickle = pickle.loads(
        (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes(), encoding="latin1"
    )
    assert as_pickle["labels"] == y.tolist()  # the made file is what pickle takes it for
    total = ordered_sum(*(canonical(*s) for s in splits))
    with pytest.raises(ValueError, match="is not cifar10") as e:
        cifar10.load_cifar10(CIFAR, tmp_path)
    assert total in str(e.value)
    monkeypatch.setitem(CONTENT, "cifar10", total)
    d = cifar10.load_cifar10(CIFAR, tmp_path)
    assert (len(d), d.test_images.shape, d.class_names[3]) == (100, (20, 3, 32, 32), "cat")
    assert np.array_equal(d.test_images.permute(0, 2, 3, 1).numpy(), canonical(x, y)[0])
    other = tmp_path / "other" / "cifar10"
    other.mkdir(parents=True)
    for name, (x, y) in zip(("train", "test"), splits, strict=True):
        np.savez(other / f"{name}.npz", images=x[::-1], labels=y[::-1])
    same = cifar10.load_cifar10(CIFAR, tmp_path / "other")
    assert same.sha256 == d.sha256 and torch.equal(same.train_images, d.train_images)


def test_cifar10_files_execute_nothing(tmp_path):
    where = tmp_path / "cifar-10-batches-py"
    made_cifar10(where)
    proof = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    (where / "data_batch_1").write_bytes(pickle.dumps({"data": Hostile(), "labels": [1, 2]}))
    with pytest.raises(ValueError, match="data_batch_1 is missing or damaged"):
        cifar10.load_cifar10(CIFAR, tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("harm", ("cut", "gone", "folder"))
def test_damaged_cifar10_is_named(tmp_path, harm):
    where = tmp_path / "cifar-10-batches-py"
    made_cifar10(where)
    file = where / "data_batch_3"
    raw = file.read_bytes()
    file.unlink()
    if harm == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif harm == "folder":
        file.mkdir()
    with pytest.raises(ValueError, match=r"(?s)data_batch_3 is missing.*download=True"):
        cifar10.load_cifar10(CIFAR, tmp_path)


def test_missing_cifar10(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)cifar10/train\.npz.*download=True"):
        open_data(experiment("gpu", data_root=str(tmp_path)))
    with pytest.raises(ParameterError, match="holdout = 0"):
        cifar10.load_cifar10(replace(CIFAR, holdout=3), tmp_path)
    with pytest.raises(ParameterError, match="-p img_size 32"):
        cifar10.load_cifar10(replace(CIFAR, img_size=16), tmp_path)


def test_real_cifar10():
    root = os.environ.get("UVIT_DATA", "")
    try:
        cifar10.find_cifar10(root)
    except FileNotFoundError:
        pytest.skip("UVIT_DATA has no CIFAR-10")
    _, d = open_data(experiment("gpu", data_root=root))
    assert d.sha256 == CONTENT["cifar10"] and d.train_labels.bincount().tolist() == [5000] * 10


# ---------------------------------------------------------------- npz
GOOD = random_images(4, 8, 8, 1)
SMALL = DataConfig(dataset="npz:x.npz", img_size=8, in_chans=1)
MISFITS = (
    ({"x": GOOD}, "none called `images`"),
    ({"images": GOOD.astype(np.float32)}, "float32"),
    ({"images": GOOD[..., 0]}, r"\(4, 8, 8\)"),
    ({"images": GOOD[:, :, :6]}, "8x6"),
    ({"images": GOOD.repeat(3, -1)}, "-p in_chans 3"),
    ({"images": GOOD[:0]}, "N must be above 0"),
    ({"images": GOOD, "labels": np.arange(3)}, r"shape \(4,\)"),
    ({"images": GOOD, "labels": np.arange(4) - 1}, "from -1"),
    ({"images": GOOD, "labels": np.arange(4) * 1.0}, "float64"),
    ({"images": GOOD, "labels": np.array(list("abcd"), object)}, "not usable"),
    ({"images": GOOD, "labels": np.arange(4) * 10**6}, "number the classes"),
)


@pytest.mark.parametrize("arrays, message", MISFITS, ids=[m for _, m in MISFITS])
def test_npz_misfits_name_the_file(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as e:
        load_npz(SMALL, tmp_path)
    assert "x.npz" in str(e.value)


def lying(path):
    "An array of a terabyte in a file of a kilobyte."
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 1)}
    with zipfile.ZipFile(path, "w") as z, z.open("images.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, header)
        f.write(bytes(1000))


def bomb(path):
    "A header that announces four gigabytes in a file of some hundred bytes."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open("images.npy", "w") as f:
        f.write(bytes(1000))
    raw = path.read_bytes()
    size = struct.pack("<I", 0xFFFFFFFE)
    at = raw.rindex(b"PK\x01\x02") + 24
    path.write_bytes(raw[:at] + size + raw[at + 4 :])


@pytest.mark.parametrize("make", (lying, bomb), ids=lambda f: f.__name__)
def test_npz_that_would_fill_the_memory(tmp_path, make):
    make(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz: not usable as npz: .*(promises|unpack|header)"):
        load_npz(SMALL, tmp_path)


def test_damaged_or_foreign_npz(tmp_path):
    f = tmp_path / "x.npz"
    np.savez(f, images=random_images(50, 8, 8, 1))
    whole = f.read_bytes()
    bent = whole[:1500] + bytes([whole[1500] ^ 255]) + whole[1501:]
    for content in (whole[:1500], bent, b"", b"text", pickle.dumps({"images": 1})):
        f.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz: not usable as npz"):
            load_npz(SMALL, tmp_path)
    with open(f, "wb") as h:
        np.save(h, np.zeros(3))
    with pytest.raises(ValueError, match="bare array"):
        load_npz(SMALL, tmp_path)
    f.unlink()
    with pytest.raises(FileNotFoundError, match="looked for"):
        load_npz(SMALL, tmp_path)
    f.mkdir()
    with pytest.raises(ValueError, match=r"x\.npz is a folder"):
        load_npz(SMALL, tmp_path)


def test_npz_of_known_content_keeps_its_identity(tmp_path):
    d = load_digits(replace(LAPTOP.data, holdout=0))
    m = np.random.default_rng(0).permutation(1797)
    images = d.train_images.permute(0, 2, 3, 1).numpy()[m]
    np.savez(tmp_path / "d.npz", images=images, labels=d.train_labels.numpy()[m], extra=np.ones(2))
    exp = replace(LAPTOP, data=replace(LAPTOP.data, dataset=f"npz:{tmp_path}/d.npz", num_classes=0))
    exp, opened = open_data(exp)
    assert opened.sha256 == CONTENT["digits"] and exp.data.num_classes == 10
    assert exp.run_id == LAPTOP.run_id and "extra" in opened.notes[0]
    assert torch.equal(opened.train_images, load_digits(LAPTOP.data).train_images)


# ---------------------------------------------------------------- opening
@pytest.fixture
def folder(tmp_path):
    for c, k in (("b", 5), ("a", 6)):
        (tmp_path / "set" / c).mkdir(parents=True)
        for i in range(k):
            image = Image.fromarray(random_images(36, 40, 3, seed=10 * k + i))
            image.save(tmp_path / "set" / c / f"{i}.png")
    return tmp_path / "set"


def test_open_data(folder, tmp_path):
    exp = experiment("gpu", f"folder:{folder}", img_size=16)
    opened, d = open_data(exp)
    assert opened.data.num_classes == 2 and opened.data.data_sha256 == d.sha256
    assert open_data(LAPTOP)[1] is open_data(replace(LAPTOP, seed=4))[1]
    elsewhere = experiment("gpu", "folder:set", img_size=16, data_root=str(tmp_path))
    assert open_data(elsewhere)[0].run_id == opened.run_id  # content, not path
    more = open_data(replace(exp, data=replace(exp.data, num_classes=4)))[1]
    assert (more.num_classes, more.class_names) == (4, ["a", "b", "2", "3"])
    Image.new("RGB", (20, 20)).save(folder / "a" / "new.png")
    assert len(open_data(exp)[1]) == 12
    with pytest.raises(ValueError, match="bring back the old ones"):
        open_data(opened)
    with pytest.raises(ParameterError, match="set num_classes = 2"):
        open_data(replace(exp, data=replace(exp.data, num_classes=1)))
    with pytest.raises(ParameterError, match="has no labels"):
        open_data(experiment("gpu", f"folder:{folder}/a", img_size=16, condition="class"))


@pytest.mark.parametrize("name", ("celeba64", "imagenet64", "imagenet256", "mscoco256"))
def test_missing_sets_say_where_they_were_looked_for_and_how_to_get_them(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match=f"(?s){name[:6]}.*{tmp_path}.*\n    .*\nor set UVIT"
    ):
        open_data(experiment("paper", name, data_root=str(tmp_path)))


# ---------------------------------------------------------------- batches
def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch_size", (1, 4, 7, 33))
def test_every_image_once_per_epoch(batch_size):
    x, none = torch.zeros(7, 1, 1, 2, dtype=torch.uint8), torch.zeros(0, 1, 1, 2).byte()
    d = Data("npz", x, torch.arange(7), none, torch.zeros(0).long(), 7, [], "")
    b = Batches(d, batch_size, seed=3, flip=False, p_uncond=0, null_class=None)
    ids = torch.cat([b.at(s)[1] for s in range(28)])
    epochs = [tuple(ids[7 * e : 7 * e + 7].tolist()) for e in range(len(ids) // 7)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len(set(epochs)) > 1


def test_batches_are_a_function_of_seed_and_step():
    d = load_digits(LAPTOP.data)
    kw = {"batch_size": 64, "flip": True, "p_uncond": 0.2, "null_class": 10}
    a, b = Batches(d, seed=1, **kw), Batches(d, seed=1, **kw)
    first = {s: a.at(s) for s in (0, 700, 23, 24, 1)}
    torch.manual_seed(5)
    for s in reversed(first):
        assert same(first[s], b.at(s)) and same(first[s], next(b.iterate(s)))
    assert not same(first[0], Batches(d, seed=2, **kw).at(0))
    plain = Batches(d, seed=1, **{**kw, "flip": False, "p_uncond": 0}).at(0)
    kept = first[0][1] != 10
    assert torch.equal(first[0][1][kept], plain[1][kept]) and 0 < (~kept).sum() < 40
    pairs = list(zip(first[0][0], plain[0], strict=True))
    mirrored = [torch.equal(x, y.flip(-1)) for x, y in pairs]
    assert 15 < sum(mirrored) < 50
    assert all(m or torch.equal(x, y) for m, (x, y) in zip(mirrored, pairs, strict=True))
    parts = [Batches(d, seed=1, part=(r, 4), **kw).at(23) for r in range(4)]
    for k in (0, 1):
        assert torch.equal(torch.stack([p[k] for p in parts], 1).flatten(0, 1), first[23][k])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("device", ("cuda", "cuda:0"))
def test_batches_on_a_gpu(device):
    kw = {"batch_size": 4, "seed": 1, "flip": True, "p_uncond": 0.3, "null_class": 10}
    d = load_digits(LAPTOP.data)
    x, y = Batches(d, device=device, **kw).at(3)
    assert x.is_cuda and same((x.cpu(), y.cpu()), Batches(d, **kw).at(3))


def test_scales_and_pictures():
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model(u)), u) and to_model(u).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    grid = image_grid(u.reshape(4, 1, 8, 8), 3, pad=2, scale=2)
    assert grid.shape == (2 * 22, 2 * 32, 3)
    with pytest.raises(ValueError, match="to_uint8"):
        image_grid(torch.zeros(1, 3, 2, 2), 1)
