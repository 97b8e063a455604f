"Released files: recognised by their shapes, evaluated once with their own settings, resumed."

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from uvit_repro.cli import main
from uvit_repro.config import CONFIGS, SMOKE, ParameterError, with_overrides
from uvit_repro.data.coco import Texts, encode_texts
from uvit_repro.data.files import CheckpointError, sha256_file
from uvit_repro.data.store import Encoding
from uvit_repro.runs import released
from uvit_repro.runs.evaluate import read_samples, samples_folder
from uvit_repro.runs.released import evaluate_released, identify, open_released, released_settings
from uvit_repro.train import build_model, empty_model
from uvit_repro.uvit import UViT

SMALL = with_overrides(SMOKE, num_samples=96, nfe=4, features="digits_cnn")
CIFAR = {"img_size": 32, "patch_size": 2, "in_chans": 3, "embed_dim": 512, "depth": 13}


def quiet(line):
    pass


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A small file of the released format and its settings; its path has a space."
    folder = tmp_path_factory.mktemp("released") / "my files"
    folder.mkdir()
    torch.save(build_model(SMALL).state_dict(), folder / "small.pth")
    record = json.dumps({"experiment": SMALL.to_dict()})
    (folder / "run.json").write_text(record, encoding="utf-8")
    return folder


def evaluate(path, out_dir, **options):
    "Evaluate a file of the small format."
    options = {"sample_batch": 40, "device": "cpu", **options}
    return evaluate_released(path, exp=SMALL, out_dir=out_dir, say=quiet, **options)


def pixels(run):
    "The samples of an evaluation, and their labels."
    n, step = run.exp.evaluation.num_samples, run.exp.train.n_steps
    return read_samples(samples_folder(run.exp, run.folder, step, n))


def settings(name, **overrides):
    "How one of the ten is evaluated; its weights are empty."
    return released_settings(empty_model(CONFIGS[name]).state_dict(), device="cpu", **overrides)


def test_the_ten_are_told_apart():
    for name, exp in CONFIGS.items():
        assert identify(empty_model(exp).state_dict()) == name


@pytest.mark.parametrize(
    "change",
    [
        {"in_chans": 4},
        {"depth": 11},
        {"num_classes": 10},
        {"conv": "none"},
        {"patch_size": 1},
        {"embed_dim": 256},
        {"qkv_bias": True},
        {"mlp_time_embed": True},
    ],
    ids=str,
)
def test_one_change_makes_it_none_of_the_ten(change):
    with torch.device("meta"):
        sd = UViT(num_heads=8, **{**CIFAR, **change}).state_dict()
    with pytest.raises(CheckpointError, match="none of the ten") as error:
        identify(sd)
    (field, value) = next(iter(change.items()))
    assert f"{field} = {value} instead of" in str(error.value)
    assert len(str(error.value)) < 400


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.pth"
    for bad in ({}, {"model": {}}, [1], {"patch_embed.proj.weight": torch.zeros(1, 1, 1, 1)}):
        torch.save(bad, path)
        with pytest.raises(CheckpointError, match="not a U-ViT checkpoint"):
            evaluate_released(path, out_dir=tmp_path)
    path.write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="truncated"):
        evaluate_released(path, out_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluate_released(tmp_path / "y.pth", out_dir=tmp_path)
    assert not list(tmp_path.glob("released-*"))


def test_settings_are_the_released_ones():
    for name, exp in CONFIGS.items():
        e = settings(name)
        assert (e.sampling, e.diffusion, e.data) == (exp.sampling, exp.diffusion, exp.data)
    huge = empty_model(CONFIGS["ImageNet 256x256 U-ViT-H/2"]).state_dict()
    with pytest.raises(CheckpointError, match="depth = 29 instead of 21"):
        released_settings(huge, CONFIGS["ImageNet 256x256 U-ViT-L/2"])


def test_an_evaluation_is_recorded_once(small, tmp_path):
    run = evaluate(small / "small.pth", tmp_path)
    assert run.fresh and run.run_id.startswith("released-digits-")
    assert run.info["status"] == "ok" and "training" not in run.info
    assert run.info["files"] == {"checkpoint": sha256_file(small / "small.pth")}
    table = run.measurements()
    assert {"fd_digits_cnn_test", "class_agreement"} <= set(table.metric[table.status == "ok"])
    images, labels = pixels(run)
    assert images.shape == (96, 1, 8, 8) and labels.tolist() == [i % 10 for i in range(96)]
    assert (run.folder / "samples.png").exists()
    assert not evaluate(small / "small.pth", tmp_path).fresh


def test_the_recorded_command_repeats_the_evaluation(small, tmp_path):
    "Paths with spaces are quoted, nothing is left for the reader to fill in."
    run = evaluate(small / "small.pth", tmp_path / "my runs", nfe=3)
    words = shlex.split(run.info["command"])
    assert words[:2] == ["uvit-repro", "released"]
    again = subprocess.run(
        [sys.executable, "-m", "uvit_repro.cli", *words[1:]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert str(run.folder) in again.stdout and "class_agreement" in again.stdout
    assert [p.name for p in (tmp_path / "my runs").iterdir()] == [run.run_id]


def test_other_weights_are_another_run(small, tmp_path):
    torch.save(build_model(replace(SMALL, seed=5)).state_dict(), tmp_path / "other.pth")
    a, b = evaluate(small / "small.pth", tmp_path), evaluate(tmp_path / "other.pth", tmp_path)
    assert a.run_id != b.run_id and not torch.equal(pixels(a)[0], pixels(b)[0])
    command = b.info["command"]
    c = evaluate(tmp_path / "other.pth", tmp_path, nfe=5)
    assert c.run_id == b.run_id and len(c.measurements().eval_id.unique()) == 2
    assert c.info["command"] == command


def test_a_reference_is_recorded_and_checked_first(small, tmp_path):
    features = np.random.default_rng(0).normal(size=(200, 64))
    good, bad = tmp_path / "stats.npz", tmp_path / "bad.npz"
    np.savez(good, mu=features.mean(0), sigma=np.cov(features.T))
    np.savez(bad, mu=features.mean(0))
    for path in (bad, tmp_path / "none.npz"):
        with pytest.raises((ParameterError, FileNotFoundError)):
            evaluate(small / "small.pth", tmp_path, reference=path)
    assert not list(tmp_path.glob("released-*"))
    evaluate(small / "small.pth", tmp_path)
    run = evaluate(small / "small.pth", tmp_path, reference=good)
    table = run.measurements()
    table = table[table.metric == "fd_digits_cnn_train"]
    assert len(table) == 2 and table.value.nunique() == 2


def test_a_failure_is_recorded(small, tmp_path):
    sd = torch.load(small / "small.pth")
    sd["norm.weight"] *= float("nan")
    torch.save(sd, tmp_path / "nan.pth")
    with pytest.raises(FloatingPointError):
        evaluate(tmp_path / "nan.pth", tmp_path)
    (path,) = tmp_path.glob("released-*/run.json")
    info = json.loads(path.read_text(encoding="utf-8"))
    assert info["status"] == "failed" and "FloatingPointError" in info["error"]


def test_killed_and_resumed_gives_the_same_images(small, tmp_path):
    "A real process, killed between two shards; the same command draws only what is missing."
    command = [sys.executable, "-m", "uvit_repro.cli", "released", str(small / "small.pth")]
    command += ["--experiment", str(small / "run.json"), "--out-dir", str(tmp_path / "killed")]
    for field, value in {"num-samples": 120, "sample-batch": 8, "device": "cpu", "nfe": 20}.items():
        command += [f"--{field}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def shards():
        return sorted((tmp_path / "killed").glob("*/samples/*/[0-9]*.npz"))

    while len(shards()) < 4 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {f.name: f.stat().st_mtime_ns for f in shards()}
    assert 4 <= len(kept) < 15
    options = {"num_samples": 120, "nfe": 20, "sample_batch": 8}
    run = evaluate(small / "small.pth", tmp_path / "killed", **options)
    assert run.fresh and len(shards()) == 15
    assert all(f.stat().st_mtime_ns == kept[f.name] for f in shards() if f.name in kept)
    whole = evaluate(small / "small.pth", tmp_path / "whole", **options)
    assert torch.equal(pixels(run)[0], pixels(whole)[0])
    assert run.measurements().equals(whole.measurements())


# ---------------------------------------------------------------- what is not here


def test_imagenet64_without_its_data(tmp_path):
    "Enough to sample; its classes can't be counted, and the record says so."
    exp = settings("ImageNet 64x64 U-ViT-M/4", data_root=str(tmp_path))
    e, data = open_released(exp, {"checkpoint": "aa"})
    assert e.sampling.labels == "uniform" and len(data) == 0
    assert any("instead of by frequency" in note for note in data.notes)


def test_prompts_of_a_text_model(tmp_path):
    exp = settings("MS-COCO 256x256 U-ViT-S/2", data_root=str(tmp_path), num_samples=3)
    exp = with_overrides(exp, decoder="")
    with pytest.raises(FileNotFoundError, match="needs its prompts encoded: give contexts"):
        open_released(exp, {})

    class Encoder:
        length, width, sha256, name = 77, 768, "ee", "made"

        def encode(self, texts):
            return torch.stack([torch.full((77, 768), float(len(t))) for t in texts])

    texts = Texts([["a"]], ["bb", "ccc", "dddd"], "made")
    encode_texts(tmp_path / "store", texts, Encoder(), Encoding(batch=2, shard_rows=2), quiet)
    e, data = open_released(exp, {}, contexts=tmp_path / "store")
    assert data.texts.prompts(3)[1:3][:, 0, 0].tolist() == [3, 4] and data.texts.null.max() == 0
    assert dict(e.files)["contexts"] == sha256_file(tmp_path / "store" / "index.json")
    with pytest.raises(ParameterError, match="has 3 prompts"):
        open_released(with_overrides(exp, num_samples=4), {}, contexts=tmp_path / "store")


def test_a_latent_model(tmp_path):
    "A small U-ViT on latents and a small autoencoder: its pixels are those decoded by hand."
    from diffusers import AutoencoderKL

    from uvit_repro.data.images import to_uint8
    from uvit_repro.diffusion import Diffusion
    from uvit_repro.sample import sample

    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    paper = CONFIGS["ImageNet 256x256 U-ViT-H/2"]
    exp = replace(
        paper,
        model=replace(SMALL.model, condition="class", conv="none"),
        data=replace(paper.data, img_size=8, num_classes=5),
        sampling=replace(paper.sampling, nfe=3),
        evaluation=replace(paper.evaluation, features="none"),
    )
    path = tmp_path / "latent.pth"
    torch.save(build_model(exp).state_dict(), path)
    options = {"exp": exp, "num_samples": 12, "sample_batch": 12, "device": "cpu", "say": quiet}
    options |= {"out_dir": tmp_path, "data_root": tmp_path}
    with pytest.raises(FileNotFoundError):
        evaluate_released(path, **options)
    assert not list(tmp_path.glob("released-*"))
    run = evaluate_released(path, autoencoder=tmp_path / "vae", **options)
    images, labels = pixels(run)
    assert images.shape == (12, 3, 16, 16) and labels.tolist() == [i % 5 for i in range(12)]
    assert set(run.info["files"]) == {"checkpoint", "autoencoder"}
    net = released.load_official(path, exp.model.num_heads)
    z, _ = sample(net, Diffusion(exp.diffusion), exp.sampling, (4, 8, 8), 12, num_classes=5)
    with torch.no_grad():
        by_hand = to_uint8(vae.decode(z / 0.18215).sample)
    assert (images.int() - by_hand.int()).abs().max() <= 1
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "vae2")
    assert evaluate_released(path, autoencoder=tmp_path / "vae2", **options).run_id != run.run_id


def test_the_command_refuses_in_one_line(small, capsys):
    path = str(small / "small.pth")
    assert main(["released", path]) == 2
    assert "none of the ten" in capsys.readouterr().err
    assert main(["released", str(Path(path).with_name("absent.pth"))]) == 2
