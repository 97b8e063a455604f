"""Autoencoders, the store of latents, latents as data sets, `uvit-repro encode`."""

import argparse
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from uvit_repro.config import CONFIGS, LAPTOP, DataConfig, ParameterError, experiment
from uvit_repro.data import digits as digits_module
from uvit_repro.data.autoencoder import (
    Autoencoder,
    digits_autoencoder,
    enlarge,
    find_autoencoder,
    from_released,
    halve,
    load_autoencoder,
)
from uvit_repro.data.digits import digits_store, load_digits
from uvit_repro.data.encode import (
    Encoding,
    add_encode_arguments,
    data_source,
    encode_images,
    merge_statistics,
    open_source,
    run_encode,
    shard_statistics,
)
from uvit_repro.data.folders import load_folder
from uvit_repro.data.images import Data, draw_latents, open_data, to_model, to_uint8
from uvit_repro.data.latent_sets import (
    Inputs,
    LatentStore,
    find_imagenet256,
    from_store,
    load_imagenet256,
    load_latents,
)
from uvit_repro.data.store import Store, StoreError
from uvit_repro.latents import class_spread, train_digits_autoencoder

HOW = Encoding(batch=10, shard_rows=50, pixels=True)
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
SMALL_VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "layers_per_block": 2,
}


def released_weights(seed=0):  # noqa: C901  (many small helpers)
    "Random weights under the names of the latent-diffusion code."
    g, s = torch.Generator().manual_seed(seed), {}

    def conv(name, o, i, k):
        s[f"{name}.weight"] = torch.randn(o, i, k, k, generator=g) / (i * k * k) ** 0.5
        s[f"{name}.bias"] = 0.1 * torch.randn(o, generator=g)

    def norm(name, c):
        s[f"{name}.weight"] = 1 + 0.1 * torch.randn(c, generator=g)
        s[f"{name}.bias"] = 0.1 * torch.randn(c, generator=g)

    def block(name, i, o):
        for k, c in ((1, i), (2, o)):
            norm(f"{name}.norm{k}", c)
            conv(f"{name}.conv{k}", o, c, 3)
        if i != o:
            conv(f"{name}.nin_shortcut", o, i, 1)

    def level(name, sample, widths, blocks):
        for b in range(blocks):
            block(f"{name}.block.{b}", widths[min(b, 1)], widths[1])
        if sample:
            conv(f"{name}.{sample}", widths[1], widths[1], 3)

    conv("encoder.conv_in", 32, 3, 3)
    level("encoder.down.0", "downsample.conv", (32, 32), 2)
    level("encoder.down.1", "", (32, 64), 2)
    conv("decoder.conv_in", 64, 4, 3)
    level("decoder.up.1", "upsample.conv", (64, 64), 3)
    level("decoder.up.0", "", (64, 32), 3)
    for side, width, out in (("encoder", 64, 8), ("decoder", 32, 3)):
        block(f"{side}.mid.block_1", 64, 64)
        block(f"{side}.mid.block_2", 64, 64)
        norm(f"{side}.mid.attn_1.norm", 64)
        for n in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{n}", 64, 64, 1)
        norm(f"{side}.norm_out", width)
        conv(f"{side}.conv_out", out, width, 3)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    return s


def run_released(s, side, x):
    "The latent-diffusion code's arithmetic, from the names alone."

    def conv(n, x, stride=1):
        w = s[f"{n}.weight"]
        return F.conv2d(x, w, s[f"{n}.bias"], stride, w.shape[-1] // 2 if stride == 1 else 0)

    def norm(n, x):
        return F.group_norm(x, 32, s[f"{n}.weight"], s[f"{n}.bias"], eps=1e-6)

    def block(n, x):
        h = conv(f"{n}.conv1", F.silu(norm(f"{n}.norm1", x)))
        h = conv(f"{n}.conv2", F.silu(norm(f"{n}.norm2", h)))
        return h + (conv(f"{n}.nin_shortcut", x) if f"{n}.nin_shortcut.weight" in s else x)

    def middle(x):
        x = block(f"{side}.mid.block_1", x)
        y, n = norm(f"{side}.mid.attn_1.norm", x), f"{side}.mid.attn_1"
        q, k, v = (conv(f"{n}.{m}", y).flatten(2) for m in "qkv")
        a = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(-1)
        x = x + conv(f"{n}.proj_out", (v @ a.transpose(1, 2)).view_as(x))
        return block(f"{side}.mid.block_2", x)

    encoder = side == "encoder"
    x = conv(f"{side}.conv_in", x if encoder else conv("post_quant_conv", x))
    x = x if encoder else middle(x)
    for k in (0, 1) if encoder else (1, 0):
        level = f"encoder.down.{k}" if encoder else f"decoder.up.{k}"
        for b in range(2 if encoder else 3):
            x = block(f"{level}.block.{b}", x)
        if encoder and k == 0:
            x = conv(f"{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 2)
        elif not encoder and k == 1:
            x = conv(f"{level}.upsample.conv", F.interpolate(x, scale_factor=2))
    x = middle(x) if encoder else x
    x = conv(f"{side}.conv_out", F.silu(norm(f"{side}.norm_out", x)))
    return conv("quant_conv", x) if encoder else x


def test_the_released_autoencoder_keeps_its_arithmetic():
    weights = released_weights()
    ae = Autoencoder(from_released(weights, SMALL_VAE), "made")
    g = torch.Generator().manual_seed(1)
    u8 = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=g)
    z = torch.randn(2, 4, 16, 16, generator=g)
    assert torch.allclose(ae.encode(u8), run_released(weights, "encoder", to_model(u8)), atol=1e-4)
    image = to_uint8(run_released(weights, "decoder", z))
    assert (ae.decode(z).int() - image.int()).abs().max() <= 1
    assert (ae.factor, ae.shape(32)) == (2, (8, 16, 16))
    whole = {f"first_stage_model.{k}": v for k, v in weights.items()} | {"x": torch.zeros(1)}
    assert Autoencoder(from_released(whole, SMALL_VAE)).sha256 == ae.sha256
    tuned = {k: v + (k == "decoder.conv_out.bias") for k, v in weights.items()}
    other = Autoencoder(from_released(tuned, SMALL_VAE))
    assert other.encoder_sha256 == ae.encoder_sha256 and other.sha256 != ae.sha256
    with pytest.raises(ParameterError, match="not the released autoencoder"):
        from_released({"x": torch.zeros(1)}, SMALL_VAE)
    with pytest.raises(ParameterError, match=r"\(B, 3, H, W\)"):
        ae.encode(u8[:, :1])


def test_autoencoders_are_found_or_the_command_is_named(tmp_path, ae):
    with pytest.raises(FileNotFoundError, match=r"(?s)snapshot_download.*autoencoder_kl_ema.pth"):
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
    (tmp_path / "autoencoders" / "autoencoder_kl.pth").write_bytes(b"half")
    with pytest.raises(ValueError, match="truncated"):
        load_autoencoder("original", tmp_path)


def test_the_digits_autoencoder(ae):
    d = load_digits(LAPTOP.data)
    large = enlarge(d.test_images)
    assert torch.equal(halve(large), d.test_images)
    mean = ae.encode(large).chunk(2, 1)[0]
    assert (halve(ae.decode(mean)).float() - d.test_images.float()).abs().mean() < 3
    few = [train_digits_autoencoder(d.train_images[:64], 2, s).state_dict() for s in (3, 3, 4)]
    same = [all(torch.equal(few[0][k], w[k]) for k in w) for w in few[1:]]
    assert same == [True, False]


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
            if name != "job.json":
                with pytest.raises((StoreError, FileNotFoundError), match=f"{name}|not complete"):
                    Store(store.path).verify()
            capsys.readouterr()
            encode(n=60)
            assert contents(store.path) == before, name
            out = capsys.readouterr().out
            assert damaged is None or name == "job.json" or f"{name}.damaged" in out
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
    assert torch.equal(store.pixels(i), x[i])
    assert torch.equal(pickle.loads(pickle.dumps(store)).read(i, m), store.read(i, m))
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
    assert np.allclose(s["mean"], mean.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(s["std"], mean.std((0, 2, 3), unbiased=False), atol=1e-6)
    std = float((mean.var(unbiased=False) + lv.exp().mean()).sqrt())
    assert s["drawn_std"] == pytest.approx(std, rel=1e-6) and s["scale"] == pytest.approx(1 / std)
    x = np.random.default_rng(0).normal(size=(6, 2, 4, 3, 3))
    parts = [shard_statistics(v) for v in np.split(x, [2])]
    assert merge_statistics(parts)["drawn_std"] == pytest.approx(
        merge_statistics(parts[::-1])["drawn_std"]
    )


def test_other_settings_are_refused(encode, tmp_path, ae):
    encode()
    for change in ({"batch": 25}, {"dtype": "float16"}, {"pixels": False}):
        with pytest.raises(ParameterError, match=next(iter(change))):
            encode(how=replace(HOW, **change))
    for change in ({"dtype": "int8"}, {"batch": 0}, {"shard_rows": 25}):
        with pytest.raises(ParameterError, match="whole batches"):
            encode(tmp_path / "t", replace(HOW, **change))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ParameterError, match="and no store of this"):
        encode(tmp_path / "other")
    with pytest.raises(ParameterError, match="squares of 1"):
        source = data_source(replace(some_digits(), train_images=torch.zeros(140, 3, 8, 8).byte()))
        encode_images(source, ae, tmp_path / "u")
    with pytest.raises(FileNotFoundError, match="no index.json"):
        LatentStore(tmp_path / "other")
    half = encode(tmp_path / "half", Encoding("float16", 10, 50, mirror=False))
    assert (
        half.read(torch.arange(3)).dtype == torch.float16 and half.pixels(torch.arange(3)) is None
    )
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


def test_a_folder_is_encoded_in_the_order_of_its_content(tmp_path, ae):
    pictures(tmp_path / "one")
    how = Encoding(batch=8, shard_rows=8)
    source = open_source(f"folder:{tmp_path / 'one'}", 16, tmp_path, 1)
    store = encode_images(source, ae, tmp_path / "latents", how)
    assert (len(store), store.index["class_names"]) == (24, ["class0", "class1", "class2"])
    assert any("broken.png" in n for n in store.index["notes"])
    cfg = DataConfig(dataset=f"folder:{tmp_path / 'one'}", img_size=16, in_chans=1)
    d = load_folder(cfg, None)
    assert store.index["source"]["sha256"] == d.sha256
    assert torch.equal(store.labels, d.train_labels)
    assert torch.allclose(store.read(torch.arange(24)), ae.encode(d.train_images), atol=1e-4)
    (tmp_path / "one" / "class0" / "00.png").unlink()
    changed = open_source(f"folder:{tmp_path / 'one'}", 16, tmp_path, 1)
    with pytest.raises(ParameterError, match="something else"):
        encode_images(changed, ae, tmp_path / "latents", how)


def test_a_file_that_changes_while_it_is_encoded_stops(tmp_path, ae):
    pictures(tmp_path / "one")
    cfg = DataConfig(dataset=f"folder:{tmp_path / 'one'}", img_size=16, in_chans=1)
    source = data_source(load_folder(cfg, None, resident_bytes=0))
    (tmp_path / "one" / "class2" / "02.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"02\.png is no longer what it was"):
        encode_images(source, ae, tmp_path / "latents", Encoding(batch=8, shard_rows=8))


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
    for name in ("index.json", "job.json", "moments-00000.npy"):
        (store.path / name).write_text("{}", encoding="utf-8")
    assert contents(digits_store(d, ae).path) == good
    monkeypatch.setattr(digits_module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").touch()  # a cache that can't be written
    assert digits_store(d, ae).path.is_relative_to(tmp_path / "tmp")


def test_latents_of_ones_own(encode, tmp_path, ae):
    store = encode()
    cfg = replace(LATENTS, dataset=f"latents:{store.path}", latent_scale=0.5)
    d = load_latents(cfg, None)
    assert (len(d), len(d.test_labels), d.num_classes, d.shape) == (140, 20, 10, (1, 16, 16))
    assert torch.equal(d.test_images, enlarge(some_digits().test_images))
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
    (tmp_path / "imagenet256_latents" / "job.json").touch()
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
    d = load_imagenet256(CONFIGS["ImageNet 256x256 U-ViT-H/2"].data, tmp_path)
    assert (len(d), d.shape, d.class_names) == (2, (3, 256, 256), ["n01440764", "n01443537"])
    moments = d.inputs.read(torch.tensor([1]))
    assert d.decode(draw_latents(moments, torch.zeros(1, 4, 32, 32), 0.18215)).shape[1:] == d.shape


def test_what_the_command_refuses(tmp_path):
    digits = ("--autoencoder", "digits", "--data-root", tmp_path, "--out", tmp_path / "x")
    for words, error in (
        (("images", "--source", "nowhere", *digits), "known are imagenet, mscoco"),
        (("images", "--source", "folder:x", *digits), "needs --img-size"),
        (("images", "--source", "digits", *digits[:-2]), "--out is missing"),
        (("verify", tmp_path), "no store"),
        (("images", "--source", "mscoco", *digits), "curl"),
        (("captions", "--data-root", tmp_path), "curl"),
        (("prompts", "--released", "--out", "p", "--data-root", tmp_path), "hf_hub_download"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            uvit_encode(*words)


def test_class_spread():
    f = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4000) % 4
    assert class_spread(f + 100 * y[:, None], y) == pytest.approx(8**0.5, rel=0.02)
    assert class_spread(torch.ones(6, 3), torch.arange(6) % 2) == 0
