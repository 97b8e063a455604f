"Training as a function of its experiment: killed and resumed it ends at the same weights; damaged and foreign checkpoints; the released code's steps."

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from uvit_repro.config import SMOKE, experiment, with_overrides
from uvit_repro.data.files import CheckpointError, load_tensors
from uvit_repro.data.images import open_data
from uvit_repro.train import golden_training, load_weights, read_log, train

CHILD = """
import sys, torch
from pathlib import Path
from uvit_repro.config import SMOKE, with_overrides
from uvit_repro.data.images import open_data
from uvit_repro.train import Progress, train
torch.set_num_threads(1)
Progress.__init__.__defaults__ = (print, 0.0)
exp, data = open_data(with_overrides(SMOKE, n_steps=40, checkpoint_seconds=0.0, log_every=1, attention="math", precision=sys.argv[2]))
train(exp, data, Path(sys.argv[1]), lambda line: print(line, flush=True))
"""


def child(folder, precision, kill_at=None):
    "Train in another process; with `kill_at`, send SIGKILL as that step is reported. Returns the lines it printed."
    p = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), precision], stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in p.stdout:
        lines.append(line.strip())
        if (
            kill_at is not None
            and line.startswith("step")
            and int(line.split()[1].split("/")[0]) >= kill_at
        ):
            p.send_signal(signal.SIGKILL)
            break
    p.stdout.close()
    assert p.wait() == (0 if kill_at is None else -signal.SIGKILL)
    return lines


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_three_times_ends_at_the_same_weights(tmp_path, precision):
    steps = sorted(
        random.Random(os.urandom(4)).sample(range(2, 39), 3 if precision == "bf16" else 1)
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    child(whole, precision)
    for k in steps:
        child(broken, precision, k)
    assert not (broken / "weights-0000040.safetensors").exists()
    assert any(line.startswith("resumed at step") for line in child(broken, precision)), (
        f"killed at {steps}"
    )
    for step in (10, 40):
        a, b = (
            load_tensors(whole / f"weights-{step:07d}.safetensors"),
            load_tensors(broken / f"weights-{step:07d}.safetensors"),
        )
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a), (
            f"killed at {steps}: other weights at step {step}"
        )
    assert read_log(whole)[["step", "loss", "lr"]].equals(read_log(broken)[["step", "loss", "lr"]])


@pytest.mark.parametrize("name", ["train_vpsde", "train_discrete_class"])
def test_twenty_steps_of_the_released_code(name):
    diff = golden_training(name)
    assert max(diff.values()) < 1e-4, diff
    assert diff["lr"] < 1e-12


def test_pairing_survives_a_change_of_the_model():
    "Two variants of one seed see the same images, times and noise, and share the parameters that both have."
    from uvit_repro.data.images import Batches
    from uvit_repro.diffusion import Diffusion
    from uvit_repro.train import build_model, sample_times_and_noise

    exp, data = open_data(SMOKE)
    other = with_overrides(exp, skip="none", time="adaln")
    for e in (exp, other):
        assert e.seed == 0
    a, b = (Batches(data, 16, e.seed, False, 0.1, 10).at(7) for e in (exp, other))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    d = Diffusion(exp.diffusion)
    x, y = (sample_times_and_noise(e.seed, 7, (16, 1, 8, 8), d, "cpu") for e in (exp, other))
    assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    assert not torch.equal(x[1], sample_times_and_noise(1, 7, (16, 1, 8, 8), d, "cpu")[1])
    m, n = dict(build_model(exp).named_parameters()), dict(build_model(other).named_parameters())
    shared = [k for k in m if k in n and m[k].shape == n[k].shape and k != "pos_embed"]
    assert len(shared) > 15 and all(torch.equal(m[k], n[k]) for k in shared)


def test_weights_of_another_run_are_refused(tmp_path):
    exp, data = open_data(with_overrides(SMOKE, n_steps=4, attention="math"))
    train(exp, data, tmp_path, lambda s: None)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(with_overrides(exp, embed_dim=16), tmp_path, 4)
    (tmp_path / "weights-0000004.safetensors").write_bytes(
        before["weights-0000004.safetensors"][:500]
    )
    with pytest.raises(CheckpointError, match="truncated"):
        load_weights(exp, tmp_path, 4)
    assert {p.name for p in tmp_path.iterdir()} == set(before)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    exp, data = open_data(
        with_overrides(SMOKE, n_steps=6, precision="fp32", attention="math", log_every=1)
    )
    for flag in (False, True):
        train(with_overrides(exp, use_checkpoint=flag), data, tmp_path / str(flag), lambda s: None)
    a, b = (read_log(tmp_path / str(f)).loss for f in (False, True))
    assert (a - b).abs().max() < 1e-6
