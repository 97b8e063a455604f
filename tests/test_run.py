"A run is done once; a sweep keeps its budget; two at once do not spoil each other; identities of committed runs hold."

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from uvit_repro.config import SMOKE, ParameterError, experiment, from_dict, with_overrides
from uvit_repro.data.files import CheckpointError
from uvit_repro.runs.records import load_results, load_run
from uvit_repro.runs.run import (
    ChapterFailed,
    certificate,
    golden_forward,
    golden_sampling,
    is_done,
    run_chapter,
    run_experiment,
    run_sweep,
)

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = sorted(p.parent for p in (ROOT / "results" / "published").glob("*/run.json"))
quiet = lambda s: None


def test_certificate_holds_and_can_fail(monkeypatch):
    assert all(r["ok"] for r in certificate()) and len(certificate()) == 7
    import uvit_repro.diffusion as d

    monkeypatch.setattr(
        d.VP, "c_noise", lambda self, t: 1000 * t
    )  # the other convention: close, and wrong
    assert not all(r["ok"] for r in certificate())


def test_second_call_does_nothing_and_another_sampler_does_not_train(tmp_path):
    first = run_experiment(SMOKE, tmp_path, quiet)
    files = {
        p: p.stat().st_mtime_ns
        for p in first.folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }
    assert first.fresh and not run_experiment(SMOKE, tmp_path, quiet).fresh
    assert files == {
        p: p.stat().st_mtime_ns
        for p in first.folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }
    other = run_experiment(with_overrides(SMOKE, sampler="ddim", device="cpu"), tmp_path, quiet)
    assert (
        other.run_id == first.run_id
        and other.fresh
        and other.info["weights_sha256"] == first.info["weights_sha256"]
    )
    df = load_results("runs", tmp_path)
    assert set(df.sampler.dropna()) == {"dpm_solver_pp_2m", "ddim"} and df.run_id.nunique() == 1
    assert not df.duplicated(["run_id", "eval_id", "metric"]).any()


def test_values_are_recomputed_from_their_statistics(tmp_path):
    from uvit_repro.metrics import recompute

    run = run_experiment(SMOKE, tmp_path, quiet)
    df = run.measurements()
    checked = 0
    for eid, g in df.groupby("eval_id"):
        with np.load(run.folder / "stats" / f"{eid}.npz") as d:
            stats = dict(d)
        if "loss" in stats:
            values = {"heldout_loss": stats["loss"].mean()}
        else:
            values = {r["metric"]: r["value"] for r in recompute(stats)}
        for r in g[g.status == "ok"].itertuples():
            assert values[r.metric] == pytest.approx(r.value, rel=1e-9, abs=1e-12)
            checked += 1
    assert checked > 10


def test_two_processes_share_one_run(tmp_path):
    code = "import sys, torch; torch.set_num_threads(1); from uvit_repro.config import SMOKE; from uvit_repro.runs.run import run_experiment; print('fresh', run_experiment(SMOKE, sys.argv[1]).fresh)"
    ps = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outs = [p.communicate(timeout=180)[0] for p in ps]
    assert [p.returncode for p in ps] == [0, 0]
    assert sorted(o.splitlines()[-1] for o in outs) == ["fresh False", "fresh True"]
    (run,) = tmp_path.iterdir()
    assert load_run(run)["status"] == "ok" and is_done(SMOKE, tmp_path)


def test_missing_data_set_names_the_command(tmp_path):
    exp = with_overrides(
        SMOKE,
        dataset="cifar10",
        data_root=str(tmp_path),
        img_size=32,
        in_chans=3,
        holdout=0,
        features="resnet20_cifar10",
    )
    with pytest.raises(FileNotFoundError, match="download=True"):
        run_experiment(exp, tmp_path / "runs", quiet)
    assert not (tmp_path / "runs").exists()


def bad_checkpoint(kind, folder):
    "A checkpoint that can't be used, as a killed machine, another experiment or an attacker leaves it."
    from uvit_repro.diffusion import Diffusion
    from uvit_repro.train import Trainer, build_model, save_checkpoint

    exp = with_overrides(SMOKE, embed_dim=16) if kind == "another size" else SMOKE
    folder.mkdir(parents=True)
    if kind == "never loaded":
        torch.save({"net": Attack(folder / "attacked")}, folder / "checkpoint.pt")
        return
    save_checkpoint(
        folder,
        dict(
            Trainer(build_model(exp), Diffusion(exp.diffusion), exp.train).state_dict(),
            run_id=exp.run_id,
            log={},
            attention="math",
        ),
    )
    if kind == "truncated":
        (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:3000])


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["truncated", "another size", "never loaded"])
def test_unusable_checkpoint(tmp_path, kind):
    "One clear message, nothing overwritten, nothing run; the next start trains from the first step."
    folder = tmp_path / SMOKE.run_id
    bad_checkpoint(kind, folder)
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match=kind):
        run_experiment(SMOKE, tmp_path, quiet)
    assert (
        (folder / "checkpoint.pt.damaged-1").read_bytes() == before
        and not (folder / "attacked").exists()
        and not list(folder.glob("weights*"))
    )
    assert load_run(folder)["status"] == "failed" and kind in load_run(folder)["error"]
    assert (
        run_experiment(SMOKE, tmp_path, quiet).info["status"] == "ok"
        and (folder / "checkpoint.pt.damaged-1").read_bytes() == before
    )


def test_unusable_checkpoint_ends_the_chapter(tmp_path):
    "Exit code not zero, and the last line of stderr is the reason."
    bad_checkpoint("truncated", tmp_path / SMOKE.run_id)
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "nbs" / "05_ablations.ipynb"),
            "out.ipynb",
            "-p",
            "protocol",
            "smoke",
            "-p",
            "out_dir",
            str(tmp_path),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        r.returncode == 1
        and "CheckpointError" in (last := r.stderr.strip().splitlines()[-1])
        and "truncated" in last
        and "start the same command again" in last
    )


def test_measured_again_when_the_feature_network_arrives(tmp_path, monkeypatch):
    import uvit_repro.runs.run as r

    exp = with_overrides(SMOKE, curve_steps=())

    def gone(*a, **k):
        raise FileNotFoundError("weights not found; fetch them with: curl X")

    from uvit_repro.data.features import FeatureNetwork

    with monkeypatch.context() as c:
        c.setattr(FeatureNetwork, "extract", gone)
        c.setattr(r, "feature_status", lambda n: (False, "curl X"))
        rows = run_experiment(exp, tmp_path, quiet).measurements().set_index("metric")
        assert (
            rows.status["fd_digits_cnn_test"] == "not run"
            and "curl X" in rows.note["fd_digits_cnn_test"]
            and rows.status["nn_ratio"] == "ok"
        )
        assert not run_experiment(exp, tmp_path, quiet).fresh
    assert (
        run_experiment(exp, tmp_path, quiet)
        .measurements()
        .set_index("metric")
        .status["fd_digits_cnn_test"]
        == "ok"
    )


def test_impossible_sampler_stops_before_training(tmp_path):
    with pytest.raises(ParameterError, match="5 and 7"):
        run_experiment(with_overrides(SMOKE, sampler="heun", nfe=6), tmp_path, quiet)
    assert not list(tmp_path.glob("*/weights*"))


def chapter(path, body):
    nb = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
        }
    )
    head = "protocol: str = None  #\nseed: int = 0  #\nout_dir: str = None  #\nskip: str = None  #\nthreads: int = None  #"
    nb.cells = [
        nbformat.v4.new_code_cell(head, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(body),
    ]
    nbformat.write(nb, path)
    return path


def test_sweep_budget_failures_and_continuation(tmp_path):
    nb = chapter(
        tmp_path / "cell.ipynb",
        "import time; time.sleep(4 if skip == 'none' else 0.5)\nif skip == 'add': raise ValueError('no sums today')\nprint('step done')",
    )
    cells = [{"protocol": "smoke", "skip": s} for s in ("none", "add", "linear_add", "add_linear")]
    said = []
    how = {"say": said.append, "out_dir": tmp_path / "runs", "flops_per_second": 1e10}
    state = run_sweep(cells, nb, budget=4, workers=1, **how)
    assert len(state["left"]) == 4 and not state["ran"], (
        "nothing fits: the kernel alone takes ten seconds",
        state,
        said,
    )
    state = run_sweep(cells, nb, workers=2, **how)
    assert (
        state["ran"] == [c for c in state["ran"] if c["skip"] != "add"] and len(state["ran"]) == 3
    ), (state, said)
    assert (
        state["failed"][0]["skip"] == "add"
        and "no sums today" in state["failed"][0]["error"]
        and not state["left"]
    ), (state, said)
    assert any("no sums today" in s for s in said)


@pytest.mark.parametrize("name", ["uvit_unconditional", "uvit_class_conditional", "uvit_text"])
def test_forward_equals_the_released_code(name):
    assert golden_forward(name) < 1e-5


@pytest.mark.parametrize("name", ["sample_vpsde", "sample_discrete_guided"])
def test_samples_equal_the_released_code(name):
    assert golden_sampling(name) < 1e-4


def test_there_is_published_evidence():
    assert len(PUBLISHED) >= 2


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_published_run(folder):
    "Its name is what its experiment is called today; its statistics are those that were recorded; its values follow from them."
    import hashlib

    from uvit_repro.metrics import recompute

    info = json.loads((folder / "run.json").read_text())
    assert (
        from_dict(info["experiment"]).run_id == folder.name == info["run_id"]
        and info["status"] == "ok"
    )
    assert all(c["ok"] for c in info["certificate"])
    df = pd.read_csv(folder / "measurements.csv")
    assert set(df.run_id) == {folder.name}
    for eid, g in df.groupby("eval_id"):
        path = folder / "stats" / f"{eid}.npz"
        assert (
            hashlib.sha256(path.read_bytes()).hexdigest()
            == info["evaluations"][eid]["stats_sha256"]
        )
        with np.load(path) as d:
            stats = dict(d)
        values = (
            {"heldout_loss": stats["loss"].mean()}
            if "loss" in stats
            else {r["metric"]: r["value"] for r in recompute(stats)}
        )
        for r in g[g.status == "ok"].itertuples():
            assert values[r.metric] == pytest.approx(r.value, rel=1e-9, abs=1e-12)


def test_laptop_digits_are_digits():
    "Two seeds of the headline model, from committed evidence: close to held-out digits, classified as asked, not copied."
    df = load_results("published")
    df = df[
        df.run_id.isin([experiment("laptop", seed=s).run_id for s in range(10)]) & (df.step == 4000)
    ]
    assert df.seed.nunique() >= 2
    for seed, g in df.groupby("seed"):
        v = g.set_index("metric").value
        assert v["fd_digits_cnn_test"] < 2 * v["fd_digits_cnn_real"], seed
        assert v["class_agreement"] > 0.93, seed
        assert v["nn_train_median"] >= v["nn_heldout_median"], seed
