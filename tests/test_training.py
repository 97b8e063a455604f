"Training: equal to the released code, resumed bit for bit, only damage counts as damage."

import errno
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from uvit_repro.config import SMOKE, TrainConfig, with_overrides
from uvit_repro.data.files import CheckpointError, load_tensors
from uvit_repro.data.images import Batches, open_data
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.checkpoints import (
    find_checkpoint,
    load_weights,
    save_checkpoint,
    weights_path,
)
from uvit_repro.runs.training import TrainingFailed, checkpoint_interval, train
from uvit_repro.train import (
    EMA,
    Trainer,
    build_model,
    fit,
    golden_training,
    lr_at,
    sample_times_and_noise,
)

SHORT = with_overrides(SMOKE, n_steps=6, precision="fp32", attention="math", log_every=1)
CHILD = """
import sys, torch
from pathlib import Path
from uvit_repro.config import SMOKE, with_overrides
from uvit_repro.data.images import open_data
from uvit_repro.runs import training
torch.set_num_threads(1)
training.PROGRESS_SECONDS = 0.0
exp = with_overrides(SMOKE, n_steps=40, checkpoint_seconds=0.0, log_every=1, attention="math",
                     precision=sys.argv[2])
training.train(*open_data(exp), Path(sys.argv[1]), lambda line: print(line, flush=True))
"""


def quiet(line):
    pass


def child(folder, precision, kill_at=None):
    "Train in another process, killed as step `kill_at` is reported; the lines it printed."
    command = [sys.executable, "-c", CHILD, str(folder), precision]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        step = int(line.split()[1].split("/")[0]) if line.startswith("step") else 0
        if kill_at is not None and step >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == (0 if kill_at is None else -signal.SIGKILL)
    return lines


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_runs_end_at_the_same_weights(tmp_path, precision):
    kills = sorted(random.Random(precision).sample(range(2, 39), 2))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    child(whole, precision)
    for step in kills:
        child(broken, precision, step)
    assert not weights_path(broken, 40).exists()
    assert any(line.startswith("resumed at step") for line in child(broken, precision))
    for step in (10, 40):
        a, b = (load_tensors(weights_path(f, step)) for f in (whole, broken))
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    columns = ["step", "loss", "lr"]
    assert pd.read_csv(whole / "log.csv")[columns].equals(pd.read_csv(broken / "log.csv")[columns])


@pytest.mark.parametrize("name", ["train_vpsde", "train_discrete_class"])
def test_twenty_steps_of_the_released_code(name):
    errors = golden_training(name)
    assert errors["loss"] < 1e-6 and max(errors.values()) < 1e-6


def test_certificate_survives_another_order_of_summation(monkeypatch):
    "Noise of 1e-6 on gradients, as a GPU's sums have, stays within the tolerances."
    from uvit_repro.runs.certificate import TOLERANCES

    init = Trainer.__init__

    def noisy(self, net, *args, **options):
        init(self, net, *args, **options)
        generator = torch.Generator().manual_seed(1)

        def add_noise(p):
            noise = torch.randn(p.grad.shape, generator=generator)
            p.grad.add_(1e-6 * p.grad.abs().max() * noise)

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(add_noise)

    monkeypatch.setattr(Trainer, "__init__", noisy)
    for name in ("train_vpsde", "train_discrete_class"):
        errors = golden_training(name)
        assert 1e-6 < errors["final"] < TOLERANCES["training"] / 2
        assert errors["loss"] < TOLERANCES["losses"] / 2


def test_average_equals_torch():
    net = nn.Linear(5, 3)
    ours, theirs = EMA(net, 0.9), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)  # its first call only copies
    for step in range(7):
        for p in net.parameters():
            p.data.add_(torch.randn_like(p))
        ours.update(step)
        theirs.update_parameters(net)
    for a, b in zip(ours.values, theirs.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_ramp_forgets_the_start():
    net = nn.Linear(5, 3)
    ema, before = EMA(net, 0.999, ramp=True), net.weight.detach().clone()
    net.weight.data.zero_()
    ema.update(0)
    assert torch.allclose(ema.values[0], 0.1 * before)


def test_learning_rate():
    paper = TrainConfig()
    rates = [lr_at(paper, s) for s in (0, 1250, 2500, 499_999)]
    assert rates == [0.0, 1e-4, 2e-4, 2e-4]
    cosine = TrainConfig(
        n_steps=4000, lr=3e-3, warmup_steps=100, lr_schedule="cosine", lr_final=0.02
    )
    assert lr_at(cosine, 2050) == pytest.approx(3e-3 * 1.02 / 2)
    assert lr_at(cosine, 4000) == pytest.approx(3e-3 * 0.02)


def test_pairing_survives_a_change_of_the_model():
    "Two variants of one seed see the same images, times and noise, and share their parameters."
    exp, data = open_data(SMOKE)
    other = with_overrides(exp, skip="none", time="adaln")
    a, b = (Batches(data, 16, e.seed, False, 0.1, 10).at(7) for e in (exp, other))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    diffusion = Diffusion(exp.diffusion)
    first, again, seed1 = (
        sample_times_and_noise(seed, 7, (16, 1, 8, 8), diffusion, "cpu") for seed in (0, 0, 1)
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], seed1[1])
    m, n = dict(build_model(exp).named_parameters()), dict(build_model(other).named_parameters())
    shared = [k for k in m if k in n and m[k].shape == n[k].shape and k != "pos_embed"]
    assert len(shared) > 15 and all(torch.equal(m[k], n[k]) for k in shared)


def test_the_loop_stops_and_goes_on():
    exp, data = open_data(SHORT)
    batches = Batches(data, exp.train.batch_size, 0, False, 0.1, 10)
    trainer = Trainer(build_model(exp), Diffusion(exp.diffusion), exp.train)
    steps = []
    for step, loss in fit(trainer, batches, 0, "class"):
        assert loss.dim() == 0
        steps.append(step)
        if step == 3:
            break
    steps += [step for step, _ in fit(trainer, batches, 0, "class")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert list(fit(trainer, batches, 0, "class")) == []


def test_gradient_checkpointing_changes_nothing(tmp_path):
    exp, data = open_data(SHORT)
    for flag in (False, True):
        train(with_overrides(exp, use_checkpoint=flag), data, tmp_path / str(flag), quiet)
    a, b = (pd.read_csv(tmp_path / str(flag) / "log.csv").loss for flag in (False, True))
    assert (a - b).abs().max() < 1e-6


def test_an_exploding_loss_stops_the_run(tmp_path):
    bad = with_overrides(SHORT, lr=1e8, warmup_steps=0, lr_schedule="constant")
    with pytest.raises(TrainingFailed, match="learning rate 1e\\+08.*no checkpoint yet"):
        train(*open_data(bad), tmp_path, quiet)
    assert not list(tmp_path.glob("weights*"))


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def state():
    exp = open_data(SHORT)[0]
    trainer = Trainer(build_model(exp), Diffusion(exp.diffusion), exp.train)
    return {**trainer.state_dict(), "run_id": exp.run_id, "log": {}, "attention": "math"}


def flip_a_bit(path, at=0.6):
    "Damage one bit in the middle of a file."
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["bit", "truncated", "text"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, state, damage):
    save_checkpoint(tmp_path, {**state, "step": 1})
    save_checkpoint(tmp_path, {**state, "step": 2})
    path = tmp_path / "checkpoint.pt"
    if damage == "bit":
        flip_a_bit(path)
    else:
        path.write_bytes(path.read_bytes()[:5000] if damage == "truncated" else b"no")
    said = []
    net = build_model(open_data(SHORT)[0])
    found = find_checkpoint(tmp_path, state["run_id"], net, said.append)
    assert found["step"] == 1
    assert "set aside as checkpoint.pt.damaged-1" in said[0]
    (tmp_path / "checkpoint.prev.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="no earlier checkpoint"):
        find_checkpoint(tmp_path, state["run_id"], net, quiet)
    assert find_checkpoint(tmp_path, state["run_id"], net) is None


@pytest.mark.parametrize(
    "failure",
    [
        PermissionError(errno.EACCES, "denied"),
        OSError(errno.EIO, "disk"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["permission", "disk", "memory", "allocator"],
)
def test_a_good_checkpoint_that_cannot_be_read_now_stays(tmp_path, state, failure, monkeypatch):
    save_checkpoint(tmp_path, state)

    def fail(*args, **options):
        raise failure

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises((OSError, MemoryError)):
        find_checkpoint(tmp_path, state["run_id"], build_model(open_data(SHORT)[0]), quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_checkpoints_of_something_else(tmp_path, state):
    exp = open_data(SHORT)[0]
    for changed, why in (({"run_id": "other"}, "belongs to run other"), ({"net": {}}, "size")):
        save_checkpoint(tmp_path, {**state, **changed})
        with pytest.raises(CheckpointError, match=why):
            find_checkpoint(tmp_path, exp.run_id, build_model(exp), quiet)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_a_checkpoint_is_never_executed(tmp_path):
    exp = open_data(SHORT)[0]
    torch.save({"net": Attack(tmp_path / "attacked")}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="never loaded"):
        find_checkpoint(tmp_path, exp.run_id, build_model(exp), quiet)
    assert not (tmp_path / "attacked").exists()


def test_time_spent_on_checkpoints_is_bounded():
    assert checkpoint_interval(60.0, saving=0.5) == 60.0
    assert checkpoint_interval(60.0, saving=3.0) == pytest.approx(147.0)  # 3 of 150 seconds
    assert checkpoint_interval(0.0, saving=3.0) == 0.0  # asked for after every step


def test_a_longer_run_continues_a_shorter_one(tmp_path):
    exp, data = open_data(with_overrides(SHORT, lr_schedule="constant", keep_checkpoint=True))
    longer = with_overrides(exp, n_steps=9)
    train(exp, data, tmp_path / exp.run_id, quiet)
    lines = []
    train(longer, data, tmp_path / longer.run_id, lines.append)
    assert "resumed at step 6" in lines
    train(longer, data, tmp_path / "alone" / longer.run_id, quiet)
    a, b = (
        load_tensors(weights_path(f / longer.run_id, 9)) for f in (tmp_path, tmp_path / "alone")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_weights_that_do_not_fit_or_are_damaged(tmp_path):
    exp, data = open_data(SHORT)
    train(exp, data, tmp_path, quiet)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(with_overrides(exp, embed_dim=16), tmp_path, 6)
    with pytest.raises(FileNotFoundError, match="kept are \\[6\\]"):
        load_weights(exp, tmp_path, 5)
    path = weights_path(tmp_path, 6)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated"):
        load_weights(exp, tmp_path, 6)


# ---------------------------------------------------------------- devices


def test_a_gpu_has_a_number(monkeypatch):
    from uvit_repro.runs.devices import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "auto", "cuda:0"):
        assert pick_device(name) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="2 CUDA devices"):
        pick_device("cuda:7")
    with pytest.raises(ValueError, match="allowed are auto"):
        pick_device("gpu")


def test_processes_wait_for_fid(monkeypatch):
    import accelerate

    from uvit_repro.runs.devices import join_processes

    given = {}

    def state(**options):
        given.update(options)
        return SimpleNamespace(process_index=1, num_processes=2)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", state)
    assert join_processes(2, torch.device("cpu")).rank == 1
    assert given["timeout"].total_seconds() >= 24 * 3600
