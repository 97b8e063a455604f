"""Autoencoders, the store of latents, latents as data sets, `uvit-repro encode`."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_repro.config import CONFIGS, LAPTOP, DataConfig, ParameterError, experiment
from uvit_repro.data import store as store_module
from uvit_repro.data.autoencoder import (
    digits_autoencoder,
    enlarge,
    find_autoencoder,
    halve,
    load_autoencoder,
)
from uvit_repro.data.digits import digits_store, load_digits
from uvit_repro.data.encode import (
    add_encode_arguments,
    data_source,
    encode_images,
    file_source,
    latent_statistics,
    open_source,
    run_encode,
    shard_sums,
)
from uvit_repro.data.folders import list_folder
from uvit_repro.data.images import Data, draw_latents, open_data
from uvit_repro.data.latent_sets import (
    LatentStore,
    find_imagenet256,
    from_store,
    load_imagenet,
    load_latents,
)
from uvit_repro.data.store import Encoding, Inputs, Store, StoreError
from uvit_repro.latents import class_spread

HOW = Encoding(batch=10, shard_rows=50)
LATENTS = DataConfig(dataset="latents:x", img_size=8, in_chans=4)


def some_digits(n=140, held=20):
    d = load_digits(LAPTOP.data)
    x, y = d.train_images, d.train_labels
    end = n + held
    return Data("digits", x[:n], y[:n], x[n:end], y[n:end], 10, d.class_names, "1" * 64)


def contents(path):
    skip = (".lock",)
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name not in skip}
    return {n: raw for n, raw in files.items() if "damaged" not in n}


@pytest.fixture(scope="module")
def ae():
    torch.set_num_threads(1)
    return digits_autoencoder()


@pytest.fixture
def encode(tmp_path, ae):
    "Encode some digits; the same call resumes."

    def call(path=tmp_path / "s", how=HOW, **kw):
        return encode_images(data_source(some_digits(**kw), enlarge), ae, path, how, print)

    return call


# ---------------------------------------------------------------- autoencoders
def test_autoencoders_are_found_or_the_command_is_named(tmp_path, ae):
    with pytest.raises(FileNotFoundError, match=r"(?s)snapshot_download.*sd-vae-ft-ema"):
        find_autoencoder("ema", tmp_path)
    with pytest.raises(FileNotFoundError, match="original, ema"):
        load_autoencoder("mine", tmp_path)
    ae.vae.save_pretrained(tmp_path / "autoencoders" / "sd-vae-ft-ema")
    ae.vae.save_pretrained(tmp_path / "mine")
    for name in ("ema", str(tmp_path / "mine")):
        found = load_autoencoder(name, tmp_path)
        assert (found.sha256, found.name) == (ae.sha256, name)
    (tmp_path / "mine" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="can't be used"):
        load_autoencoder(str(tmp_path / "mine"), tmp_path)


def test_the_digits_autoencoder(ae):
    d = load_digits(LAPTOP.data)
    large = enlarge(d.test_images)
    assert torch.equal(halve(large), d.test_images)
    mean = ae.encode(large).chunk(2, 1)[0]
    assert (halve(ae.decode(mean)).float() - d.test_images.float()).abs().mean() < 3


# ---------------------------------------------------------------- the store
KILLED = """
import sys
from test_latents import HOW, data_source, digits_autoencoder, encode_images, enlarge, some_digits
import torch
torch.set_num_threads(1)
source = data_source(some_digits(200, 50), enlarge)
print("ready", flush=True)
encode_images(source, digits_autoencoder(), sys.argv[1], HOW, print)
"""


@pytest.mark.parametrize("seed", range(1))
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, encode, seed):
    start = time.perf_counter()
    encode(tmp_path / "whole", n=200, held=50)
    took, rng = time.perf_counter() - start, np.random.default_rng(seed)
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    assert p.stdout.readline() == b"ready\n"
    time.sleep(took * rng.uniform(0.2, 0.9))
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    assert p.returncode == -signal.SIGKILL
    encode(tmp_path / "killed", n=200, held=50)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_every_damage_is_named_set_aside_and_mended(encode, capsys):
    store = encode(n=60)
    before = contents(store.path)
    for name, raw in before.items():
        file = store.path / name
        for damaged in (raw[:-7] + bytes([raw[-7] ^ 64]) + raw[-6:], raw[:-7], None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            with pytest.raises((StoreError, FileNotFoundError), match=f"{name}|not complete"):
                Store(store.path).verify()
            capsys.readouterr()
            encode(n=60)
            assert contents(store.path) == before, name
            out = capsys.readouterr().out
            assert damaged is None or f"{name}.damaged" in out
    assert len(list(store.path.glob("*.damaged-*"))) == 2 * len(before)


def test_reading_compares_checksums(encode):
    store = encode()
    file = store.path / "moments-00001.npy"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    store = LatentStore(store.path)  # sizes are right
    assert store.read(torch.arange(50)).shape == (50, 8, 8, 8)
    with pytest.raises(StoreError, match=r"moments-00001\.npy is damaged.*damaged-1.*Repeat"):
        store.read(torch.tensor([60]))
    assert len(encode().read(torch.tensor([60]))) == 1


def test_a_store_that_cannot_be_written_is_read(encode, monkeypatch):
    store = encode()

    def refuse(*args, **kw):
        raise PermissionError("read-only")

    for name in ("os.replace", "os.mkdir", "tempfile.mkstemp"):
        monkeypatch.setattr(name, refuse)
    again = LatentStore(store.path)
    assert again.verify()["rows"] == 160
    assert torch.equal(again.read(torch.arange(9)), store.read(torch.arange(9)))


def test_reading(encode, ae):
    store, d = encode(), some_digits()
    x = enlarge(torch.cat([d.train_images, d.test_images]))
    i, m = torch.tensor([159, 0, 77, 77, 50, 49]), torch.tensor([0, 1, 0, 1, 1, 0]).bool()
    want = ae.encode(torch.where(m[:, None, None, None], x[i].flip(-1), x[i]))
    assert torch.allclose(store.read(i, m), want, atol=1e-4)
    part = Inputs(store, torch.tensor([5, 77]))
    both = store.read(torch.tensor([77, 5]))
    assert len(part) == 2 and torch.equal(part.read(torch.tensor([1, 0])), both)
    with pytest.raises(IndexError, match="160"):
        store.read(torch.tensor([160]))
    assert store.read(torch.tensor([], dtype=torch.long)).shape == (0, 8, 8, 8)


def test_statistics(encode):
    store = encode()
    mirror = torch.ones(160, dtype=torch.bool)
    m = torch.cat([store.read(torch.arange(160)), store.read(torch.arange(160), mirror)]).double()
    (mean, lv), s = m.chunk(2, 1), store.index["statistics"]
    std = float((mean.var(unbiased=False) + lv.exp().mean()).sqrt())
    assert s["drawn_std"] == pytest.approx(std, rel=1e-6) and s["scale"] == pytest.approx(1 / std)
    x = np.random.default_rng(0).normal(size=(6, 2, 4, 3, 3))
    parts = [shard_sums(v) for v in np.split(x, [2])]
    assert latent_statistics(parts) == pytest.approx(latent_statistics([shard_sums(x)]))


def test_other_settings_are_refused(encode, tmp_path, ae):
    encode()
    for change in ({"batch": 25}, {"dtype": "float16"}, {"mirror": False}):
        with pytest.raises(ParameterError, match=next(iter(change))):
            encode(how=replace(HOW, **change))
    for change in ({"dtype": "int8"}, {"batch": 0}, {"shard_rows": 25}):
        with pytest.raises(ParameterError, match="whole batches"):
            replace(HOW, **change)
    (tmp_path / "other").mkdir()
    with pytest.raises(ParameterError, match="squares of 1"):
        source = replace(data_source(some_digits()), shape=(3, 8, 8))
        encode_images(source, ae, tmp_path / "u", HOW)
    with pytest.raises(FileNotFoundError, match="no index.json"):
        LatentStore(tmp_path / "other")
    half = encode(tmp_path / "half", Encoding("float16", 10, 50, mirror=False))
    assert half.read(torch.arange(3)).dtype == torch.float16
    with pytest.raises(ParameterError, match="flip = False"):
        half.read(torch.arange(3), torch.ones(3).bool())


def test_moments_out_of_range_are_refused(tmp_path, ae, monkeypatch):
    monkeypatch.setattr(ae, "encode", lambda x: torch.full((len(x), 8, 8, 8), 1e5))
    with pytest.raises(FloatingPointError, match="float16"):
        source = data_source(some_digits(), enlarge)
        encode_images(source, ae, tmp_path / "s", Encoding("float16"))


# ---------------------------------------------------------------- data sets
def pictures(base, n=24):
    for i in range(n):
        f = base / f"class{i % 3}" / f"{i:02d}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        x = np.random.default_rng(i).integers(0, 256, (36, 40), np.uint8)
        Image.fromarray(x).save(f)
    (base / "class1" / "broken.png").write_bytes(b"no image")


def test_a_folder_is_encoded_without_its_damaged_files(tmp_path, ae):
    base, how = tmp_path / "one", Encoding(batch=8, shard_rows=8)
    pictures(base)
    source = open_source(f"folder:{base}", 16, tmp_path, 1)
    store = encode_images(source, ae, tmp_path / "latents", how)
    assert (len(store), store.index["class_names"]) == (24, ["class0", "class1", "class2"])
    assert any("broken.png" in n for n in store.index["notes"])
    assert store.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    x, files = list_folder(base, 16, 1).read()
    assert torch.allclose(store.read(torch.arange(24)), ae.encode(x), atol=1e-4)
    (base / "class0" / "00.png").unlink()
    changed = open_source(f"folder:{base}", 16, tmp_path, 1)
    with pytest.raises(ParameterError, match="something else"):
        encode_images(changed, ae, tmp_path / "latents", how)
    strict = file_source(list_folder(base, 16, 1), "strict", again="Fetch them again")
    with pytest.raises(ValueError, match=r"broken\.png can't be read.*Fetch them again"):
        encode_images(strict, ae, tmp_path / "strict", how)


def test_digits_latents_hold_out_what_digits_hold_out():
    e, data = open_data(experiment("smoke", dataset="digits_latents"))
    _, pixels = open_data(experiment("smoke", dataset="digits"))
    assert torch.equal(data.test_images, pixels.test_images)
    assert torch.equal(data.train_images, pixels.train_images) and len(data.inputs) == 1500
    assert e.data.data_sha256 in ("", data.sha256) and data.pixels_sha256 == pixels.sha256
    large = data.decode.large(data.test_inputs[:9])
    assert torch.equal(halve(large), data.decode(data.test_inputs[:9]))


def test_the_cache_of_digits(tmp_path, monkeypatch, ae):
    monkeypatch.setenv("UVIT_REPRO_ROOT", str(tmp_path))
    d = some_digits()
    store = digits_store(d, ae)
    assert store.path.is_relative_to(tmp_path)
    good = contents(store.path)
    for name in ("index.json", "shard-00000.json", "moments-00000.npy"):
        (store.path / name).write_text("{}", encoding="utf-8")
    assert contents(digits_store(d, ae).path) == good
    monkeypatch.setattr(store_module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").touch()  # a cache that can't be written
    assert digits_store(d, ae).path.is_relative_to(tmp_path / "tmp")


def test_latents_of_ones_own(encode, tmp_path, ae):
    store = encode()
    cfg = replace(LATENTS, dataset=f"latents:{store.path}", latent_scale=0.5)
    d = load_latents(cfg, None)
    assert (len(d), len(d.test_labels), d.num_classes, d.shape) == (140, 20, 10, (1, 16, 16))
    assert len(d.test_images) == 0
    assert torch.equal(d.test_inputs, 0.5 * store.read(torch.arange(140, 160)).chunk(2, 1)[0])
    assert torch.equal(d.decode(d.test_inputs), ae.decode(2 * d.test_inputs))
    with pytest.raises(FileNotFoundError, match="sd-vae-ft-ema"):
        from_store(store, cfg, "latents", tmp_path).decode(d.test_inputs, "ema")
    for change, word in (
        ({"img_size": 16}, "add -p img_size 8 -p in_chans 4"),
        ({"latent_scale": 0.0}, "for unit variance"),
        ({"holdout": 5}, "20 held-out images of its own"),
    ):
        with pytest.raises(ParameterError, match=word):
            load_latents(replace(cfg, **change), None)
    store.index["autoencoder"]["sha256"] = "0" * 64
    with pytest.raises(StoreError, match="name the right one"):
        from_store(store, cfg, "latents").decode(d.test_inputs)


def test_identity_is_of_content_not_of_bits_or_paths(encode, tmp_path):
    a = encode(tmp_path / "a")
    b = encode(tmp_path / "b", Encoding(batch=20, shard_rows=100))
    assert a.sha256 == b.sha256
    assert torch.allclose(a.read(torch.arange(160)), b.read(torch.arange(160)), atol=1e-4)
    assert encode(tmp_path / "c", Encoding("float16", 10, 50)).sha256 != a.sha256


def test_absent_latents_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="uvit-repro encode images --source imagenet"):
        find_imagenet256(tmp_path / "my data")
    (tmp_path / "imagenet256_latents").mkdir()
    with pytest.raises(FileNotFoundError, match="is not complete"):
        find_imagenet256(tmp_path)


# ---------------------------------------------------------------- the command
def uvit_encode(*words):
    parser = argparse.ArgumentParser()
    add_encode_arguments(parser)
    lines = []
    return run_encode(parser.parse_args([str(w) for w in words]), lines.append), lines


def test_imagenet_through_the_command(tmp_path):
    from diffusers import AutoencoderKL

    for k, c in enumerate(("n01440764", "n01443537")):
        f = tmp_path / "imagenet" / "train" / c / "1.JPEG"
        f.parent.mkdir(parents=True)
        x = np.random.default_rng(k).integers(0, 255, (300, 280, 3), dtype=np.uint8)
        Image.fromarray(x).save(f)
    four = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4}
    four["down_block_types"] = ("DownEncoderBlock2D",) * 4
    four["up_block_types"] = ("UpDecoderBlock2D",) * 4
    AutoencoderKL(**four).save_pretrained(tmp_path / "autoencoders" / "sd-v1-vae")
    root = ("--data-root", tmp_path, "--device", "cpu")
    common = ("--batch", 2, "--shard-rows", 4, "--dtype", "float16")
    uvit_encode("images", "--source", "imagenet", "--img-size", 256, *common, *root)
    found, lines = uvit_encode("verify", tmp_path / "imagenet256_latents")
    assert found["rows"] == 2 and lines[-1].startswith("whole: 2 rows")
    d = load_imagenet(CONFIGS["ImageNet 256x256 U-ViT-H/2"].data, tmp_path)
    assert (len(d), d.shape, d.class_names) == (2, (3, 256, 256), ["n01440764", "n01443537"])
    moments = d.inputs.read(torch.tensor([1]))
    assert d.decode(draw_latents(moments, torch.zeros(1, 4, 32, 32), 0.18215)).shape[1:] == d.shape


def test_what_the_command_refuses(tmp_path):
    (tmp_path / "f").write_text("A dog.", encoding="utf-8")
    digits = ("--autoencoder", "digits", "--data-root", tmp_path, "--out", tmp_path / "x")
    for words, error in (
        (("images", "--source", "nowhere", *digits), "known are imagenet, mscoco"),
        (("images", "--source", "folder:x", *digits), "needs --img-size"),
        (("images", "--source", "npz:x", *digits[:-2]), "--out is missing"),
        (("verify", tmp_path), "no store"),
        (("images", "--source", "mscoco", *digits), "curl"),
        (("captions", "--data-root", tmp_path), "curl"),
        (("prompts", "--file", tmp_path / "f", "--out", "p", "--data-root", tmp_path), "hf_hub"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            uvit_encode(*words)


def test_class_spread():
    f = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4000) % 4
    assert class_spread(f + 100 * y[:, None], y) == pytest.approx(8**0.5, rel=0.02)
    assert class_spread(torch.ones(6, 3), torch.arange(6) % 2) == 0
