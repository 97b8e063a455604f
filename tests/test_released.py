"Released checkpoints: which one it is, what it needs, the same images after a kill, what is recorded."

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
from safetensors.torch import save_file

from uvit_repro.config import CONFIGS, SMOKE, ParameterError, eval_id, with_overrides
from uvit_repro.data.files import CheckpointError, sha256_file
from uvit_repro.runs import released as R
from uvit_repro.runs.evaluate import read_samples, samples_folder
from uvit_repro.runs.records import load_results
from uvit_repro.train import build_model, empty_model
from uvit_repro.uvit import UViT

SMALL = with_overrides(SMOKE, num_samples=96, nfe=4, features="digits_cnn")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A small file of the released format, with random weights, and how it is to be evaluated."
    d = tmp_path_factory.mktemp("released")
    torch.save(build_model(SMALL).state_dict(), d / "small.pth")
    (d / "run.json").write_text(json.dumps({"experiment": SMALL.to_dict()}))
    return d


def pixels(run):
    return read_samples(
        samples_folder(run.exp, run.folder, run.exp.train.n_steps, run.exp.evaluation.num_samples)
    )


# ---------------------------------------------------------------- which one
def test_the_ten_are_told_apart():
    for name, exp in CONFIGS.items():
        assert R.identify(empty_model(exp).state_dict()) == name
    assert set(R.RELEASED) == set(CONFIGS) and len({r[1] for r in R.RELEASED.values()}) == 10


@pytest.mark.parametrize(
    "change",
    [
        {"in_chans": 4},
        {"depth": 11},
        {"num_classes": 10},
        {"conv": "none"},
        {"img_size": 16},
        {"patch_size": 1},
        {"embed_dim": 256, "num_heads": 4},
        {"qkv_bias": True},
        {"mlp_time_embed": True},
    ],
)
def test_one_change_makes_it_none_of_the_ten(change):
    kw = {
        **{
            "img_size": 32,
            "patch_size": 2,
            "in_chans": 3,
            "embed_dim": 512,
            "depth": 13,
            "num_heads": 8,
        },
        **change,
    }
    with torch.device("meta"):
        sd = UViT(**kw).state_dict()
    with pytest.raises(CheckpointError, match="none of the ten") as e:
        R.identify(sd)
    field = next(iter(change))
    assert f"CIFAR10 U-ViT-S/2: {field} = {change[field]} instead of" in str(e.value).replace(
        "'", ""
    )


def test_what_is_no_checkpoint(tmp_path):
    for bad in ({}, {"model": {}}, [1], {"patch_embed.proj.weight": torch.zeros(1, 1, 1, 1)}):
        torch.save(bad, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="not a U-ViT checkpoint"):
            R.evaluate_released(tmp_path / "x.pth", out_dir=tmp_path)
    (tmp_path / "x.pth").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="truncated"):
        R.evaluate_released(tmp_path / "x.pth", out_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        R.evaluate_released(tmp_path / "y.pth", out_dir=tmp_path)
    assert not list(tmp_path.glob("released-*"))


def test_settings_are_the_released_ones():
    sd = lambda n: empty_model(CONFIGS[n]).state_dict()
    for name, exp in CONFIGS.items():
        e = R.released_settings(sd(name))
        assert (
            e.sampling.sampler,
            e.sampling.nfe,
            e.sampling.cfg_scale,
            e.sampling.decoder,
            e.diffusion,
            e.data,
        ) == (
            exp.sampling.sampler,
            exp.sampling.nfe,
            exp.sampling.cfg_scale,
            exp.sampling.decoder,
            exp.diffusion,
            exp.data,
        )
        assert e.sampling.labels == (
            "frequency" if "64x64 U-ViT-" in name and "ImageNet" in name else "uniform"
        )
    with pytest.raises(
        CheckpointError,
        match="the file is not ImageNet 256x256 U-ViT-L/2: .*depth = 29 instead of 21",
    ):
        R.released_settings(sd("ImageNet 256x256 U-ViT-H/2"), "ImageNet 256x256 U-ViT-L/2")


# ---------------------------------------------------------------- one evaluation
def test_evaluation_is_recorded_once(small, tmp_path):
    run = R.evaluate_released(
        small / "small.pth", exp=SMALL, out_dir=tmp_path, sample_batch=40, say=lambda s: None
    )
    assert (
        run.fresh
        and run.run_id.startswith("released-digits-")
        and run.info["status"] == "ok"
        and run.info["files"] == {"checkpoint": sha256_file(small / "small.pth")}
    )
    df = load_results("runs", tmp_path)
    assert (
        set(df.run_id) == {run.run_id}
        and (df.chapter == "04d").all()
        and {"fd_digits_cnn_test", "class_agreement"} <= set(df.metric[df.status == "ok"])
    )
    x, y = pixels(run)
    assert (
        x.shape == (96, 1, 8, 8)
        and y.tolist() == [i % 10 for i in range(96)]
        and (run.folder / "samples.png").exists()
    )
    before = {
        p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file() and p.name != ".lock"
    }
    again = R.evaluate_released(
        small / "small.pth", exp=SMALL, out_dir=tmp_path, sample_batch=40, say=lambda s: None
    )
    assert not again.fresh and before == {
        p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_other_weights_are_another_run(small, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = build_model(replace(SMALL, seed=5))
    torch.save(net.state_dict(), tmp_path / "other.pth")
    kw = {"exp": SMALL, "out_dir": tmp_path, "sample_batch": 96, "say": lambda s: None}
    a, b = (
        R.evaluate_released(small / "small.pth", **kw),
        R.evaluate_released(tmp_path / "other.pth", **kw),
    )
    assert a.run_id != b.run_id and not torch.equal(pixels(a)[0], pixels(b)[0])
    c = R.evaluate_released(tmp_path / "other.pth", **kw, nfe=5)
    assert c.run_id == b.run_id and len(c.measurements().eval_id.unique()) == 2


def test_reference_is_recorded_and_checked_first(small, tmp_path):
    g = np.random.default_rng(0)
    a = g.normal(size=(200, 64))
    kw = {"exp": SMALL, "out_dir": tmp_path, "sample_batch": 96, "say": lambda s: None}
    np.savez(tmp_path / "stats.npz", mu=a.mean(0), sigma=np.cov(a.T))
    np.savez(tmp_path / "bad.npz", mu=a.mean(0))
    (tmp_path / "text.npz").write_text("no")
    for bad, says in (("bad.npz", "sigma"), ("text.npz", "npz"), ("none.npz", "no such file")):
        with pytest.raises((ParameterError, FileNotFoundError), match=says):
            R.evaluate_released(small / "small.pth", reference=tmp_path / bad, **kw)
    assert not list(tmp_path.glob("released-*"))
    plain, run = (
        R.evaluate_released(small / "small.pth", **kw),
        R.evaluate_released(small / "small.pth", reference=tmp_path / "stats.npz", **kw),
    )
    assert (
        run.info["reference"]
        == {"file": "stats.npz", "sha256": sha256_file(tmp_path / "stats.npz")}
        and "--reference" in run.info["command"]
    )
    df = run.measurements()
    df = df[df.metric == "fd_digits_cnn_train"]
    assert len(df) == 2 and df.value.nunique() == 2


def test_failure_is_recorded(small, tmp_path, monkeypatch):
    sd = torch.load(small / "small.pth")
    sd["norm.weight"] = sd["norm.weight"] * float("nan")
    torch.save(sd, tmp_path / "nan.pth")
    with pytest.raises(FloatingPointError):
        R.evaluate_released(tmp_path / "nan.pth", exp=SMALL, out_dir=tmp_path, say=lambda s: None)
    info = json.loads(next(tmp_path.glob("released-*/run.json")).read_text())
    assert info["status"] == "failed" and "FloatingPointError" in info["error"]


# ---------------------------------------------------------------- killed
def test_killed_and_resumed_gives_the_same_images(small, tmp_path):
    "A real process, killed between two shards; the same command goes on, and draws only what is missing."
    command = [
        sys.executable,
        "-m",
        "uvit_repro.runs.released",
        str(small / "small.pth"),
        "--experiment",
        str(small / "run.json"),
        "--num-samples",
        "120",
        "--sample-batch",
        "8",
        "--device",
        "cpu",
        "--set",
        "nfe=20",
        "--out-dir",
    ]
    p = subprocess.Popen(
        command + [str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    shards = lambda: sorted((tmp_path / "killed").glob("*/samples/*/[0-9]*.npy"))
    while len(shards()) < 4 and p.poll() is None:
        time.sleep(0.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert p.returncode == -signal.SIGKILL
    kept = {f.name: f.stat().st_mtime_ns for f in shards()}
    assert 4 <= len(kept) < 15
    run = R.evaluate_released(
        small / "small.pth",
        exp=with_overrides(SMALL, num_samples=120, nfe=20),
        sample_batch=8,
        device="cpu",
        out_dir=tmp_path / "killed",
        say=lambda s: None,
    )
    assert (
        run.fresh
        and len(shards()) == 15
        and all(f.stat().st_mtime_ns == kept[f.name] for f in shards() if f.name in kept)
    )
    whole = R.evaluate_released(
        small / "small.pth",
        exp=with_overrides(SMALL, num_samples=120, nfe=20),
        sample_batch=8,
        device="cpu",
        out_dir=tmp_path / "whole",
        say=lambda s: None,
    )
    assert (
        whole.run_id == run.run_id
        and torch.equal(pixels(run)[0], pixels(whole)[0])
        and torch.equal(pixels(run)[1], pixels(whole)[1])
    )
    assert (
        run.measurements()
        .drop(columns=["run_id"])
        .equals(whole.measurements().drop(columns=["run_id"]))
    )


# ---------------------------------------------------------------- what is not there
def test_imagenet64_without_its_data(tmp_path):
    "A wide model is not needed to see what is asked for: the settings alone."
    exp = R.released_settings(
        empty_model(CONFIGS["ImageNet 64x64 U-ViT-M/4"]).state_dict(),
        data_root=str(tmp_path),
        device="cpu",
    )
    e, data = R.open_released(exp, {"checkpoint": "aa"})
    assert (
        e.sampling.labels == "uniform"
        and any("instead of by frequency" in n for n in data.notes)
        and len(data) == 0
    )
    for k in range(1000):
        (tmp_path / "imagenet" / "train" / f"n{k:08d}").mkdir(parents=True)
        [
            (tmp_path / "imagenet" / "train" / f"n{k:08d}" / f"{i}.JPEG").write_bytes(b"")
            for i in range(1 + (k == 7))
        ]
    stats = tmp_path / "stats.npz"
    np.savez(stats, mu=np.zeros(2048), sigma=np.eye(2048))
    e, data = R.open_released(with_overrides(exp, reference=str(stats)), {"checkpoint": "aa"})
    assert (
        e.sampling.labels == "frequency"
        and len(data) == 1001
        and data.train_labels.bincount()[7] == 2
        and data.train_images is None
        and "class counts" in dict(e.files)
    )


def test_contexts_of_a_text_model(tmp_path):
    exp = with_overrides(
        R.released_settings(
            empty_model(CONFIGS["MS-COCO 256x256 U-ViT-S/2"]).state_dict(),
            data_root=str(tmp_path),
            device="cpu",
        ),
        decoder="",
        num_samples=3,
    )
    with pytest.raises(FileNotFoundError, match="no such file"):
        R.open_released(exp, {}, contexts=tmp_path / "none.safetensors")
    with pytest.raises(
        FileNotFoundError, match="a text model needs its prompts encoded: give contexts"
    ):
        R.open_released(exp, {})
    save_file(
        {"contexts": torch.randn(3, 77, 768), "null": torch.zeros(77, 768)},
        tmp_path / "c.safetensors",
    )
    e, data = R.open_released(exp, {}, contexts=tmp_path / "c.safetensors")
    assert data.texts.prompts(3)[1:3].shape == (2, 77, 768) and dict(e.files)[
        "contexts"
    ] == sha256_file(tmp_path / "c.safetensors")
    with pytest.raises(ParameterError, match="has 3 prompts"):
        R.open_released(with_overrides(exp, num_samples=4), {}, contexts=tmp_path / "c.safetensors")


def test_contexts_from_a_store_of_texts(tmp_path):
    from uvit_repro.data.coco import Texts, encode_texts

    class Encoder:
        length, width, sha256, name = 77, 768, "ee", "made"

        def encode(self, texts):
            return torch.stack([torch.full((77, 768), float(len(t))) for t in texts])

    made = Texts([["a"]], ["bb", "ccc"])
    encode_texts(tmp_path / "store", made, Encoder(), batch=2, shard_rows=2)
    texts, sha = R.open_contexts(tmp_path / "store")
    assert (
        texts.null.abs().max() == 0
        and texts.prompts(2)[0:2][:, 0, 0].tolist() == [2, 3]
        and sha == sha256_file(tmp_path / "store" / "index.json")
    )
    with pytest.raises(ParameterError, match="has 2 prompts"):
        texts.prompts(3)


def test_latent_model_of_the_released_format(tmp_path):
    "A small U-ViT on 4x8x8 latents, a small autoencoder as diffusers saves it, no data set: pixels from its decoder, as by hand."
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kl = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(**kl).eval()
    vae.save_pretrained(tmp_path / "vae")
    paper = CONFIGS["ImageNet 256x256 U-ViT-H/2"]
    exp = replace(
        paper,
        model=replace(SMALL.model, condition="class", conv="none"),
        data=replace(paper.data, img_size=8, num_classes=5),
        sampling=replace(paper.sampling, nfe=3),
        evaluation=replace(paper.evaluation, features="none"),
    )
    torch.save(build_model(exp).state_dict(), tmp_path / "latent.pth")
    kw = {
        "exp": exp,
        "num_samples": 12,
        "sample_batch": 12,
        "out_dir": tmp_path,
        "data_root": tmp_path,
        "device": "cpu",
        "say": lambda s: None,
    }
    with pytest.raises(FileNotFoundError, match="(?s)autoencoder 'ema'.*snapshot_download"):
        R.evaluate_released(tmp_path / "latent.pth", **kw)
    assert not list(tmp_path.glob("released-*"))
    run = R.evaluate_released(tmp_path / "latent.pth", autoencoder=tmp_path / "vae", **kw)
    x, y = pixels(run)
    assert (
        x.shape == (12, 3, 16, 16)
        and y.tolist() == [i % 5 for i in range(12)]
        and set(run.info["files"]) == {"checkpoint", "autoencoder"}
    )
    from uvit_repro.data.images import to_uint8
    from uvit_repro.diffusion import Diffusion
    from uvit_repro.sample import sample
    from uvit_repro.uvit import load_official

    z, _ = sample(
        load_official(tmp_path / "latent.pth", exp.model.num_heads),
        Diffusion(exp.diffusion),
        exp.sampling,
        (4, 8, 8),
        12,
        num_classes=5,
    )
    with torch.no_grad():
        by_hand = to_uint8(vae.decode(z / 0.18215).sample)
    assert (x.int() - by_hand.int()).abs().max() <= 1
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "vae2")
    assert (
        R.evaluate_released(tmp_path / "latent.pth", autoencoder=tmp_path / "vae2", **kw).run_id
        != run.run_id
    )
    AutoencoderKL(**{**kl, "latent_channels": 3}).save_pretrained(tmp_path / "vae3")
    with pytest.raises(ParameterError, match="its latents have 3 channels, the model's have 4"):
        R.evaluate_released(tmp_path / "latent.pth", autoencoder=tmp_path / "vae3", **kw)


def test_import_is_light():
    code = "import sys, uvit_repro.released; print([m for m in ('torchvision', 'sklearn', 'matplotlib', 'PIL', 'pandas', 'diffusers', 'torch_fidelity') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]" and out.stderr == ""
