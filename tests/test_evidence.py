"The queue for one GPU: predicted, killed and gone on with, packed byte for byte alike, carried home, and refused there when a digit was changed."

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from uvit_repro.campaign import evidence as E
from uvit_repro.campaign.evidence import (
    EXTRAS,
    LIMIT,
    QUEUE,
    Queue,
    bundle,
    choose,
    claims_of,
    collect,
    entry_experiment,
    main,
    pack,
    predict_entry,
    rates_for,
    read_state,
    repetitions,
    sound,
    unpack,
)
from uvit_repro.config import ParameterError, experiment
from uvit_repro.runs.records import load_run

quiet = lambda line: None
ROOT = Path(__file__).resolve().parent.parent


def queue(tmp, only="depth-9-s0", **kw):
    return Queue(choose(only), tmp / "keep", tmp / "runs", "smoke", n_steps=6, say=quiet, **kw)


def test_order_is_the_issue_s():
    first = {p: [e.name for e in QUEUE if e.point == p] for p in range(1, 9)}
    assert first[1][:4] == ["adopted-s0", "none-s0", "adopted-s1", "none-s1"] and first[2] == [
        "adaln-s0",
        "adaln-s1",
        "adaln-zero-s0",
    ]
    assert first[3] == ["patch-8-s0", "patch-4-s0", "width-256-s0", "depth-9-s0"] and first[4] == [
        "conv-none-s0",
        "add-s0",
        "add-linear-s0",
        "sincos2d-s0",
        "patch-embed-conv-s0",
    ]
    assert (
        first[5] == ["linear-add-s0", "depth-17-s0", "width-768-s0", "patch-1-s0"]
        and first[6] == ["class-s0"]
        and first[8] == ["genvit-s0", "unet-s0"]
    )
    assert all(e.seed > 0 for e in QUEUE if e.point == 7) and all(
        "cka" in e.extras for e in QUEUE if e.point == 1 and not e.repeat
    )


def test_runs_are_those_of_the_protocol_and_of_the_tests():
    e = {x.name: entry_experiment(x) for x in QUEUE if x.name != "unet-s0"}
    assert (
        e["adopted-s0"] == experiment("gpu")
        and e["none-s1"] == experiment("gpu", seed=1, skip="none")
        and e["width-768-s0"].model.num_heads == 12
    )
    for n, x in e.items():
        assert (x.protocol, x.train.n_steps, x.train.batch_size, x.evaluation.num_samples) == (
            "gpu",
            10_000,
            128,
            10_000,
        ), n
    bears = claims_of()
    assert (
        bears["patch-1-s0"] == ("U17",)
        and bears["adaln-zero-s0"] == ("U06",)
        and "U35" in bears["class-s0"]
        and not bears["adopted-s0-repeat"]
    )


def test_prediction_learns_from_finished_runs():
    e = QUEUE[0]
    x = entry_experiment(e)
    known = [{"model": "UViT", "train": 1e14, "sample": 5e13, "fixed": 40.0}]
    slow, fast = (predict_entry(e, x, rates_for("UViT", k, 5e13, 90.0)) for k in ([], known))
    assert (
        fast["train"] == pytest.approx(slow["train"] / 2)
        and fast["fixed"] == 40
        and rates_for("ADM", known, 1, 1)["train"] == 5e13
    )


def test_names_are_checked():
    assert [e.name for e in choose("1", "adopted-s0-repeat,2")] == [
        "adopted-s0",
        "none-s0",
        "adopted-s1",
        "none-s1",
    ]
    with pytest.raises(ParameterError, match="no entry of the queue"):
        choose("adoptd-s0")
    with pytest.raises(ParameterError, match="gpu"):
        entry_experiment(QUEUE[0], "paper")


def test_a_failure_is_recorded_and_the_next_entry_runs(tmp_path, monkeypatch, capsys):
    real = E.run_experiment

    def breaks(exp, *a, **kw):
        if exp.model.depth == 1:
            raise RuntimeError("device is gone")
        return real(exp, *a, **kw)

    monkeypatch.setattr(E, "run_experiment", breaks)
    monkeypatch.setitem(EXTRAS, "look", lambda run, z, say: 1 / 0)
    st = queue(tmp_path, "depth-9-s0,patch-4-s0").run()
    by = {r["name"]: r for r in st["entries"]}
    assert (
        by["depth-9-s0"]["state"] == "failed"
        and by["depth-9-s0"]["error"] == "RuntimeError: device is gone"
    )
    assert (
        by["patch-4-s0"]["state"] == "done"
        and by["patch-4-s0"]["extras"]["look"] == "failed: ZeroDivisionError: division by zero"
        and (tmp_path / "keep" / "patch-4-s0.tar").exists()
    )
    monkeypatch.undo()
    st = queue(tmp_path, "depth-9-s0,patch-4-s0", retry=True, clean=True).run()
    assert [r["state"] for r in st["entries"]] == ["done"] * 2 and not list(
        tmp_path.glob("runs/*/weights-*")
    )


def test_past_the_budget_a_run_stops_and_goes_on(tmp_path, monkeypatch):
    q = queue(tmp_path, budget=1e6)
    watched = q.watch

    def late(line):
        q.budget = 1e-9
        q.start -= 100
        watched(line)

    monkeypatch.setattr(q, "watch", late)
    st = q.run()
    assert (
        st["entries"][0]["state"] == "stopped"
        and load_run(next((tmp_path / "runs").iterdir()))["status"] == "stopped"
    )
    st = queue(tmp_path).run()
    assert st["entries"][0]["state"] == "done" and st["entries"][0]["tries"] == 2


def test_one_process_at_a_time(tmp_path):
    from filelock import FileLock

    (tmp_path / "keep").mkdir()
    lock = FileLock(tmp_path / "keep" / ".queue.lock")
    with lock, pytest.raises(ParameterError, match="another process"):
        queue(tmp_path).run()


ABSENT = [
    "nbdev",
    "papermill",
    "nbconvert",
    "nbclient",
    "IPython",
    "jupyter_client",
    "fastcore",
    "execnb",
    "diffusers",
    "open_clip",
    "seaborn",
]  # not on a bare GPU machine


def started(keep, *more):
    code = f"import sys\nfor n in {ABSENT}: sys.modules[n] = None\nfrom uvit_repro.campaign.evidence import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "run",
            "--rehearse",
            "--only",
            "none-s0",
            "--steps",
            "300",
            "--keep",
            str(keep),
            *more,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_killed_in_training_and_gone_on_with_without_notebook_tools(tmp_path):
    keep = tmp_path / "keep"
    p = started(keep)
    end = time.time() + 60
    while not list(keep.glob("runs/*/checkpoint.pt")) and p.poll() is None and time.time() < end:
        time.sleep(0.02)
    assert p.poll() is None, p.communicate()[0]
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert (
        p.returncode == -signal.SIGKILL
        and read_state(keep)["entries"][0]["state"] == "running"
        and list(keep.glob("runs/*/checkpoint.pt"))
    )
    assert main(["status", "--keep", str(keep)]) == 1
    q = started(keep, "--clean")
    said = q.communicate(timeout=120)[0]
    assert q.returncode == 0, said
    row = read_state(keep)["entries"][0]
    assert row["record"]["bytes"] < LIMIT and not [
        v for v in row["extras"].values() if v.startswith(("failed", "left"))
    ], row
    assert row["state"] == "done" and row["tries"] == 2 and "seen" not in row, (
        "a resumed run says nothing about rates"
    )
    (folder,) = unpack(keep / "none-s0.tar", tmp_path / "home")
    assert not sound(folder)
    info = load_run(folder)
    assert 0 < info["training"]["steps"] < 300 and info["utilisation"]["busy_percent"] >= 0
    assert collect([keep / "none-s0.tar"], tmp_path / "published", say=quiet)["refused"] == []
    assert main(["status", "--keep", str(keep)]) == 0


def test_bundles_stay_small_and_come_back(tmp_path):
    keep = tmp_path / "keep"
    keep.mkdir()
    for i in range(5):
        f = tmp_path / "runs" / f"run-{i}"
        (f / "stats").mkdir(parents=True)
        (f / "run.json").write_text("{}")
        (f / "stats" / "a.npz").write_bytes(bytes([i]) * 40_000)
        pack(f, keep / f"e{i}.tar")
    files = bundle(keep, tmp_path / "out", most=130_000)
    assert [f.name for f in files] == ["records-0.tar", "records-1.tar", "records-2.tar"] and all(
        f.stat().st_size <= 130_000 for f in files
    )
    names = [m for f in files for m in tarfile.open(f).getnames()]
    assert names == [f"e{i}.tar" for i in range(5)]
    with pytest.raises(ValueError, match="a.npz"):
        pack(tmp_path / "runs" / "run-1", keep / "x.tar", limit=30_000)
    with pytest.raises(FileNotFoundError, match="--keep"):
        collect([tmp_path / "runs"])


def test_copies_are_seen():
    g = torch.Generator().manual_seed(1)
    real = torch.randint(0, 256, (300, 3, 8, 8), generator=g, dtype=torch.uint8)
    made = torch.randint(0, 256, (300, 3, 8, 8), generator=g, dtype=torch.uint8)
    made[150:] = made[:150]
    r = repetitions(made, real)
    assert r["share"] == 1.0 and r["identical"] == 150
    near = made.clone()
    near[150:, 0, 0, 0] ^= 1
    r = repetitions(near, real)
    assert r["share"] == 1.0 and r["identical"] == 0
    fair = torch.randint(0, 256, (300, 3, 8, 8), generator=g, dtype=torch.uint8)
    assert repetitions(fair, real)["share"] <= 0.02
