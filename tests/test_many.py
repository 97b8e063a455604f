"Several processes on one run: the losses, images and measurements of one process; resumed with another number; failures named."

import json
import time

import numpy as np
import pytest
import torch

from uvit_repro.config import SMOKE, ParameterError, with_overrides
from uvit_repro.data.files import load_tensors
from uvit_repro.runs.run import ProcessesFailed, read_samples, run_experiment
from uvit_repro.train import read_log

QUIET = lambda line: None
BASE = with_overrides(
    SMOKE, precision="fp32", attention="math", log_every=1, threads=1, sample_batch=30
)


def weights(run):
    return load_tensors(next(iter(sorted(run.folder.glob("weights-0000020*")))))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_experiment(BASE, tmp_path_factory.mktemp("one"), QUIET)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run_experiment(with_overrides(BASE, processes=2), tmp_path_factory.mktemp("two"), QUIET)


def test_two_processes_train_what_one_trains(alone, together):
    assert (
        together.run_id == alone.run_id
        and together.fresh
        and together.info["training"]["processes"] == 2
    )
    a, b = read_log(alone.folder).loss, read_log(together.folder).loss
    assert len(a) == 20 and (a - b).abs().max() < 1e-5, (a - b).abs().max()
    wa, wb = weights(alone), weights(together)
    assert set(wa) == set(wb) and max((wa[k] - wb[k]).abs().max() for k in wa) < 1e-4


def test_two_processes_draw_and_measure_what_one_does(alone, tmp_path):
    "The same weights, sampled and measured by two processes: the same images to the last bit, the same numbers."
    folder = tmp_path / alone.run_id
    folder.mkdir()
    for p in alone.folder.glob("weights-*"):
        (folder / p.name).write_bytes(p.read_bytes())
    two = run_experiment(with_overrides(BASE, processes=2), tmp_path, QUIET)
    assert two.fresh and "training" not in two.info
    sets = sorted(p.name for p in (alone.folder / "samples").iterdir())
    assert len(sets) == 2 and sets == sorted(p.name for p in (folder / "samples").iterdir())
    for name in sets:
        (a, ya), (b, yb) = (read_samples(f / "samples" / name) for f in (alone.folder, folder))
        assert a.shape == (80, 1, 8, 8) and torch.equal(a, b) and torch.equal(ya, yb)
    key = ["eval_id", "step", "metric"]
    a, b = (r.measurements().sort_values(key).reset_index(drop=True) for r in (alone, two))
    assert a[key].equals(b[key]) and np.allclose(a.value.dropna(), b.value.dropna(), rtol=1e-6), (
        "an image was counted twice or left out"
    )


def test_resumed_with_another_number(alone, tmp_path):
    class Stop(Exception):
        pass

    def stop_after_a_checkpoint(line):
        for _ in range(600):
            if (tmp_path / alone.run_id / "checkpoint.pt").exists():
                raise Stop
            time.sleep(0.05)

    exp = with_overrides(BASE, checkpoint_seconds=0.0, processes=2)
    with pytest.raises(Stop):
        run_experiment(exp, tmp_path, stop_after_a_checkpoint)
    assert not (tmp_path / alone.run_id / "weights-0000020.safetensors").exists()
    assert (tmp_path / alone.run_id / "checkpoint.pt").exists()
    lines = []
    one = run_experiment(with_overrides(exp, processes=1), tmp_path, lines.append)
    assert any(l.startswith("resumed at step") for l in lines)
    assert (read_log(one.folder).loss - read_log(alone.folder).loss).abs().max() < 1e-5
    wa, wb = weights(alone), weights(one)
    assert max((wa[k] - wb[k]).abs().max() for k in wa) < 1e-4


def test_a_failure_is_told(tmp_path):
    bad = with_overrides(BASE, processes=2, lr=1e30, warmup_steps=0, lr_schedule="constant")
    with pytest.raises(
        ProcessesFailed, match="2 processes: TrainingFailed: loss .* learning rate 1e\\+30"
    ):
        run_experiment(bad, tmp_path, QUIET)
    info = json.loads(next(tmp_path.glob("*/run.json")).read_text())
    assert info["status"] == "failed" and "learning rate" in info["error"]


def test_processes_that_do_not_fit(monkeypatch, tmp_path):
    with pytest.raises(ParameterError, match="must divide the batch"):
        with_overrides(BASE, processes=3)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ParameterError, match="this is one of 4"):
        run_experiment(with_overrides(BASE, processes=2), tmp_path, QUIET)
