"Many runs inside a budget: which, in what order, at what cost, shared, stopped, carried home."

import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from shutil import copytree

import pandas as pd
import pytest
import torch

from uvit_repro.campaign import doctor, plan, predict, run, transfer
from uvit_repro.campaign.cells import chosen, computed, measured
from uvit_repro.campaign.jobs import cell_experiments, jobs, no_experiment
from uvit_repro.campaign.predict import Machine, measured_rate
from uvit_repro.campaign.run import Campaign, acquire_run, run_jobs
from uvit_repro.config import PROTOCOLS, ParameterError, eval_id, experiment
from uvit_repro.paper.claims import queued_experiments
from uvit_repro.paper.registry import registry, select
from uvit_repro.runs.records import published_root, read_list

CPU = torch.device("cpu")
CELLS = registry()
ADOPTED = published_root() / PROTOCOLS["laptop"].run_id  # a published run with a curve


def quiet(line):
    pass


def at(place, row=""):
    "Cells of a place of the paper."
    found = CELLS[(CELLS.place == place) & CELLS.row.str.contains(row, regex=False)]
    return list(found.itertuples())


# ---- which runs


def test_every_cell_has_a_run_or_a_reason():
    for cell in CELLS.itertuples():
        for protocol in ("laptop", "gpu", "paper"):
            runs, reason = cell_experiments(cell, protocol), no_experiment(cell, protocol)
            assert bool(runs) != bool(reason), (cell.cell, protocol)


def test_every_reproducible_cell_is_measured_at_the_paper_s_scale():
    kept = {}
    for cell in CELLS[CELLS.kind == "reproducible"].itertuples():
        exp = cell_experiments(cell, "paper")[-1]
        e = exp.evaluation
        steps = {*e.curve_steps, *e.loss_steps, exp.train.n_steps}
        assert cell.step in (None, *steps), cell.cell
        assert kept.setdefault(exp.run_id, steps) == steps, "whichever runs first keeps the rest"


def test_variants_get_the_field_that_the_paper_names():
    for place, row, field, value in (
        ("Figure 2a", "(5)", "skip", "none"),
        ("Figure 2a", "(4)", "skip", "linear_add"),
        ("Figure 2b", "AdaLN", "time", "adaln"),
        ("Figure 2c", "before", "conv", "before"),
        ("Figure 2e", "sinusoidal", "pos_embed", "sincos2d"),
        ("Figure 7", "addition", "skip", "add"),
    ):
        for cell in at(place, row):
            assert getattr(cell_experiments(cell, "gpu")[0].model, field) == value


def test_figure_2_is_whole_and_in_the_order_of_a_short_budget():
    found = [job.exp.model for job in jobs("fig2", "gpu")]
    assert len(found) == len(set(found)) == 15
    assert [m.skip for m in found[:2]] == ["concat", "none"] and found[2].time == "adaln"
    assert len(jobs("fig2d", "gpu")) == 2 and len(jobs("fig2", "gpu", (0, 1))) == 30
    only = select("fig2a").cell.iloc[0]
    assert len(jobs(only, "gpu")) == 1


def test_lists_of_claims_and_several_names():
    assert [job.exp for job in jobs("claims", "cpu")] == queued_experiments("cpu")
    both = [job.exp for job in jobs("fig2d,fig2a,fig2d", "gpu")]
    assert both[:2] == [job.exp for job in jobs("fig2d", "gpu")] and len(both) == len(set(both))
    assert jobs("table6", "paper") == []
    for what, protocol in (("fig2", "huge"), ("fig99", "gpu"), ("claims", "paper")):
        with pytest.raises(ParameterError):
            jobs(what, protocol)


# ---- our value beside the paper's


def test_counts_agree_with_every_printed_digit():
    slack = {("Table 7", "gflops"): 0.5, ("README model table", "params_M"): 0.1}
    for cell in CELLS[CELLS.kind == "computed"].itertuples():
        digits = len(cell.value.partition(".")[2])
        allowed = (0.5 + slack.get((cell.place, cell.column), 0.0)) * 10**-digits
        assert abs(computed(cell) - float(cell.value)) <= allowed, cell.cell


def test_settings_differ_only_where_the_paper_disagrees_with_its_code():
    differ = set()
    for cell in CELLS[(CELLS.kind == "setting") & (CELLS.base != "")].itertuples():
        ours = chosen(cell)
        if str(ours) != cell.value and ours != cell.number:
            differ.add((cell.place, cell.column, cell.value))
    assert differ == {("Section 5.1", "weight_decay", "0.3"), ("Table 5", "p_uncond", "0.1")}


def test_a_measurement_at_the_paper_s_scale_stands_in_its_cell_and_nowhere_else():
    cell = next(c for c in at("Figure 2a", "(5)") if c.step == 300_000)
    exp = cell_experiments(cell, "paper", seed=7)[0]
    name = eval_id(exp, 300_000, 10_000)
    row = {"seed": 7, "run_id": exp.run_id, "metric": "fid", "step": 300_000, "eval_id": name}
    results = pd.DataFrame([{**row, "value": 21.5}, {**row, "value": 3.0, "eval_id": "other"}])
    assert [found["value"] for found in measured(cell, results)] == [21.5]
    others = [c for c in CELLS[CELLS.kind == "reproducible"].itertuples() if c.cell != cell.cell]
    assert not any(measured(c, results) for c in others if c.place.startswith("Figure 2"))


# ---- what it costs


@pytest.fixture
def known_rate(monkeypatch):
    "A machine whose speed needs no measuring."
    monkeypatch.setattr(Machine, "rate", lambda self, exp: 5e10)


def test_a_rate_is_measured_once_and_kept_unless_the_machine_was_busy(tmp_path, monkeypatch):
    exp, cache, calls = PROTOCOLS["smoke"], tmp_path / "t.json", []
    monkeypatch.setattr(predict, "timed_updates", lambda *a: calls.append(1) or float(len(calls)))
    monkeypatch.setattr(predict, "busy", lambda: True)
    assert measured_rate(exp, CPU, 1, cache=cache) == 1 and not cache.exists()
    monkeypatch.setattr(predict, "busy", lambda: False)
    assert measured_rate(exp, CPU, 1, cache=cache) == 2
    assert measured_rate(exp, CPU, 1, cache=cache) == 2 and len(calls) == 2
    assert measured_rate(exp, CPU, 2, cache=cache) == 3, "other threads, another rate"


@pytest.mark.parametrize("damage", ["{", "[]", "\xff", '{"NAME": "fast"}', '{"NAME": -1.0}'])
def test_a_damaged_cache_of_rates_is_made_again(tmp_path, monkeypatch, damage):
    exp, cache = PROTOCOLS["smoke"], tmp_path / "t.json"
    monkeypatch.setattr(predict, "timed_updates", lambda *a: 5.0)
    monkeypatch.setattr(predict, "busy", lambda: False)
    cache.write_text(damage.replace("NAME", predict.rate_name(exp, CPU, 1)), "latin-1")
    assert measured_rate(exp, CPU, 1, cache=cache) == 5.0
    assert 5.0 in json.loads(cache.read_text("utf-8")).values()


def test_updates_are_timed_compiled_where_the_run_will_be(monkeypatch):
    given = []

    class Seen(predict.Trainer):
        def __init__(self, net, diffusion, cfg, device, compiled):
            given.append(compiled)
            super().__init__(net, diffusion, cfg, device)

    exp = PROTOCOLS["smoke"]
    monkeypatch.setattr(predict, "Trainer", Seen)
    assert predict.timed_updates(exp, CPU, 0.0) > 0
    name = predict.rate_name(exp, CPU, 1)
    monkeypatch.setattr(predict, "wants_compile", lambda *a: True)
    predict.timed_updates(exp, CPU, 0.0)
    assert given == [False, "auto"]
    assert "not compiled" in name and "not compiled" not in predict.rate_name(exp, CPU, 1)


def test_another_backbone_is_timed_itself():
    unet = experiment("cpu", model="ADM", embed_dim=32)
    assert predict.timed_experiment(unet).model == unet.model
    narrow = experiment("cpu", embed_dim=64, num_heads=2)
    assert predict.timed_experiment(narrow).model == PROTOCOLS["cpu"].model


def test_an_expectation_is_operations_over_the_rate_with_the_start(known_rate):
    exp = PROTOCOLS["laptop"]
    plain = predict.predict(exp, 5e10)
    assert Machine(CPU).expected(exp) == pytest.approx(predict.STARTUP + plain)
    assert 0 < predict.predict(exp, 5e10, done=1.0) < plain == 2 * predict.predict(exp, 1e11)


# ---- what there is


def test_states_of_a_run(tmp_path, monkeypatch):
    exp = PROTOCOLS["laptop"]
    folder = tmp_path / exp.run_id
    assert plan.state(exp, tmp_path)[0] == "published"  # evidence is not work done here
    monkeypatch.setattr(plan, "published_root", lambda: tmp_path / "none")
    assert plan.state(exp, tmp_path)[0] == "missing"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"x")
    (folder / "log.csv").write_text("step,loss\n50,1\n1000,1\n", "utf-8")
    assert plan.state(exp, tmp_path) == ("stopped", "25% of the training is there")
    (folder / "run.json").write_text('{"status": "failed", "error": "no"}', "utf-8")
    assert plan.state(exp, tmp_path) == ("failed", "no")
    (folder / "run.json").write_bytes(b"\xff[")
    assert plan.state(exp, tmp_path)[0] == "stopped"  # a damaged record stops no reader
    with run.FileLock(folder / ".lock"):
        assert plan.state(exp, tmp_path)[0] == "running"
        assert acquire_run(exp.run_id, tmp_path) is None
    copytree(ADOPTED, tmp_path / "other" / exp.run_id)
    assert plan.state(exp, tmp_path / "other")[0] == "done"
    table = tmp_path / "other" / exp.run_id / "measurements.csv"
    table.write_bytes(b"\xff" + table.read_bytes())
    before = sorted(table.parent.iterdir())
    assert plan.state(exp, tmp_path / "other")[0] != "done"
    assert sorted(table.parent.iterdir()) == before  # a reader sets nothing aside
    monkeypatch.setenv("UVIT_DATA", str(tmp_path))
    assert plan.state(PROTOCOLS["gpu"], tmp_path)[0] == "blocked"


def test_a_plan_lists_runs_reasons_and_sums(tmp_path, known_rate):
    found = plan.plan("all", "paper", machine=Machine(CPU, out_dir=tmp_path))
    assert json.loads(json.dumps(found)) == found
    assert 1000 < found["gpu_hours"] < 50_000
    lines = plan.plan_lines(found)
    assert "GPU-hours" in lines[-1] and len(lines) > len(found["runs"])
    cheap = plan.plan("fig2d", "laptop", machine=Machine(CPU, 2, out_dir=tmp_path))
    assert cheap["seconds"] > 20 and "2 at a time" in plan.plan_lines(cheap)[-1]


# ---- running

FAKE = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path
    job = Path(sys.argv[1])
    folder = Path(json.loads(job.read_text())["out_dir"]) / job.stem
    with open(folder.parent / "starts", "a") as f:
        f.write(f"{job.stem} {os.getppid()}\\n")
    print("step 1", flush=True)
    if "skip-none" in job.stem and os.environ.get("FAKE_FAILS"):
        print("failed: RuntimeError: no such thing")
        sys.exit(1)
    time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
    folder.mkdir(exist_ok=True)
    (folder / "marker").touch()
""")


def fake(patch, out):
    "Let runs only pass time."
    script = Path(out) / "fake.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(FAKE, "utf-8")
    patch.setattr(run, "run_command", lambda job: [sys.executable, str(script), str(job)])
    patch.setattr(Machine, "rate", lambda self, exp: 5e10)

    def state(exp, out_dir=None):
        done = (Path(out) / exp.run_id / "marker").exists()
        return ("done" if done else "missing", "")

    patch.setattr(run, "state", state)


@pytest.fixture
def faked(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path)
    return tmp_path


def starts(folder):
    path = folder / "starts"
    return [line.split() for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def test_what_is_missing_is_done_once(faked):
    said, machine = [], Machine(CPU, 2, out_dir=faked)
    found = run.run("fig2a", "smoke", machine=machine, say=said.append)
    assert len(found["ran"]) == len(starts(faked)) == 7 and not found["failed"]
    assert any("step 1" in line for line in said)
    again = run.run("fig2a", "smoke", machine=machine, say=quiet)
    assert len(again["done"]) == 7 and len(starts(faked)) == 7


def test_a_run_starts_only_when_it_fits(faked, monkeypatch):
    todo, machine = jobs("fig2a", "smoke"), Machine(CPU, out_dir=faked)
    monkeypatch.setattr(Machine, "expected", lambda self, exp, done=0.0: 100.0)
    assert len(run_jobs(todo, machine, 60.0, quiet)["left"]) == 7
    assert starts(faked) == []
    assert len(run_jobs(todo[:2], machine, say=quiet)["ran"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_silent_run_is_ended_inside_the_budget(faked, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")
    monkeypatch.setattr(Machine, "expected", lambda self, exp, done=0.0: 0.1)
    begin = time.monotonic()
    machine = Machine(CPU, 2, out_dir=faked)
    found = run_jobs(jobs("fig2d", "smoke"), machine, 4.0, quiet)
    assert time.monotonic() - begin < 40  # of 60: it was ended
    assert len(found["left"]) == 2 and not found["failed"] and not found["ran"]


def test_a_run_that_does_not_stop_is_ended(faked, monkeypatch):
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(run, "run_command", lambda job: [sys.executable, "-c", stubborn])
    monkeypatch.setattr(run, "GRACE", 0.5)
    monkeypatch.setattr(Machine, "expected", lambda self, exp, done=0.0: 0.1)
    todo = jobs("fig2d", "smoke")[:1]
    found = run_jobs(todo, Machine(CPU, out_dir=faked), 2.0, quiet)
    assert len(found["left"]) == 1 and found["seconds"] < 10


def test_a_failure_is_named_and_the_others_go_on(faked, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "1")
    said = []
    found = run_jobs(jobs("fig2a", "smoke")[:3], Machine(CPU, out_dir=faked), say=said.append)
    assert len(found["ran"]) == 2 and len(found["failed"]) == 1
    assert found["reasons"][found["failed"][0]] == "RuntimeError: no such thing"
    assert any("no such thing" in line for line in said)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_process_is_explained(faked, monkeypatch):
    suicide = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(run, "run_command", lambda job: [sys.executable, "-c", suicide])
    todo = jobs("fig2d", "smoke")[:1]
    found = run_jobs(todo, Machine(CPU, out_dir=faked), say=quiet)
    assert "memory" in found["reasons"][found["failed"][0]]


SHARING = """
import sys, pytest, torch
sys.path.insert(0, {tests!r})
from test_campaign import Machine, fake, run
out = {out!r}
fake(pytest.MonkeyPatch(), out)
machine = Machine(torch.device("cpu"), 2, out_dir=out)
found = run.run("fig2", "smoke", machine=machine, say=lambda line: None)
print(len(found["done"]) + len(found["ran"]), len(found["left"]), len(found["failed"]))
"""


def test_two_campaigns_share_the_work_and_a_killed_one_gives_back_its_claims(faked):
    todo = jobs("fig2", "smoke")
    path = run.campaign_folder(faked) / f"{todo[0].exp.run_id}.lock"
    path.parent.mkdir()
    hold = "import filelock, sys, time\nx = filelock.FileLock(sys.argv[1])\nx.acquire()\n"
    hold += "time.sleep(600)"
    victim = subprocess.Popen([sys.executable, "-c", hold, str(path)])
    code = SHARING.format(tests=str(Path(__file__).parent), out=str(faked))
    env = {**os.environ, "FAKE_SECONDS": "0.2"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(2)
    ]
    end = time.monotonic() + 200
    while len(starts(faked)) < 14 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    assert todo[0].exp.run_id not in {name for name, _ in starts(faked)}
    victim.kill()
    victim.wait()
    assert [p.communicate(timeout=200)[0] for p in both] == ["15 0 0\n"] * 2
    names = [name for name, _ in starts(faked)]
    assert len(names) == len(set(names)) == 15


def test_a_claim_is_exclusive(tmp_path):
    first = acquire_run("r", tmp_path)
    assert acquire_run("r", tmp_path) is None
    acquire_run("s", tmp_path).release()
    first.release()
    acquire_run("r", tmp_path).release()
    assert not plan.held(tmp_path / "absent.lock") and not (tmp_path / "absent.lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_stops_the_runs(faked, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")
    campaign = Campaign(jobs("fig2d", "smoke"), Machine(CPU, out_dir=faked), say=quiet)
    real = time.sleep

    def sleep(seconds):  # the campaign's own loop, once a run is there
        real(seconds)
        if starts(faked) and not campaign.interrupted:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.time, "sleep", sleep)
    found = campaign.run()
    assert campaign.interrupted and len(found["left"]) == 2 and not found["failed"]


def test_a_request_without_runs_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="no run at protocol laptop"):
        run.run("table6", "laptop", machine=Machine(CPU, out_dir=tmp_path))


@pytest.mark.skipif(os.name == "nt", reason="rights")
def test_a_run_that_can_not_be_started_is_one_failure(faked, monkeypatch):
    def full_disk(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run, "write_json", full_disk)
    found = run_jobs(jobs("fig2d", "smoke"), Machine(CPU, out_dir=faked), say=quiet)
    assert len(found["failed"]) == 2
    assert all("No space left" in why for why in found["reasons"].values())


def test_a_detached_command_goes_on_alone_and_writes_a_log(tmp_path):
    found = run.detach(["plan", "nothing", "--protocol", "smoke"], tmp_path)
    _, status = os.waitpid(found["process"], 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert "nothing" in Path(found["log"]).read_text("utf-8")


# ---- carrying records


@pytest.fixture
def carried(tmp_path):
    "A machine's finished run, published into a folder that is carried."
    copytree(ADOPTED, tmp_path / "runs" / ADOPTED.name)
    where = {"out_dir": tmp_path / "runs", "target": tmp_path / "carried", "say": quiet}
    transfer.publish_runs("fig2d", "laptop", **where)
    return tmp_path


def test_records_come_home(carried):
    home = carried / "home"
    found = transfer.collect([carried / "carried"], home, quiet)
    assert found["refused"] == [] and list(read_list(home)) == [ADOPTED.name]
    with tarfile.open(carried / "records.tar.gz", "w:gz") as tar:
        tar.add(carried / "carried", "carried")
    found = transfer.collect([carried / "records.tar.gz"], carried / "second", quiet)
    assert len(found["published"]) == 1
    with pytest.raises(ParameterError, match="no finished run"):
        transfer.publish_runs("fig2a,fig3", "gpu", out_dir=carried / "runs", say=quiet)


def add_member(path, name, size=0, content=b"x", kind=tarfile.REGTYPE):
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        info.size = size or len(content)
        tar.fileobj.write(info.tobuf())
        tar.fileobj.write(content.ljust(512, b"\0"))


def pax_header(size):
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_bad_archives_are_named_and_good_ones_after_them_published(carried):
    box = carried / "box"
    box.mkdir()
    good = box / "z.tar"
    with tarfile.open(good, "w") as tar:
        tar.add(carried / "carried", "carried")
    raw = good.read_bytes()
    (box / "a.tar").write_bytes(b"")
    (box / "b.tar").write_bytes(raw[: len(raw) // 2])
    (box / "c.tar").write_bytes(b"no archive at all" * 100)
    add_member(box / "d.tar", "../../outside", content=b"x" * 10)
    add_member(box / "e.tar", "run/run.json", size=10**12)
    add_member(box / "f.tar", "run/run.json", kind=tarfile.SYMTYPE)
    add_member(box / "g.tar", "run/run.json", content=b'{"status": "ok"}')
    add_member(box / "h\n.tar", "run/other", content=b"x")
    with gzip.open(box / "i.tar.gz", "wb") as bomb:  # a header as large as memory
        bomb.write(pax_header(2**40))
    found = transfer.collect([box], carried / "home", quiet)
    assert len(found["published"]) == 1
    for name in "abcdefgi":
        assert any(f"{name}.tar" in reason or "run of" in reason for reason in found["refused"])
    assert not any("\n" in reason for reason in found["refused"])
    assert not (carried / "outside").exists() and not (carried.parent / "outside").exists()
    with pytest.raises(FileNotFoundError):
        transfer.collect([carried / "absent.tar"])


def test_a_changed_record_is_refused(carried):
    path = carried / "carried" / ADOPTED.name / "measurements.csv"
    path.write_bytes(path.read_bytes().replace(b"0.", b"1.", 1))
    found = transfer.collect([carried / "carried"], carried / "home", quiet)
    assert not found["published"] and "measurements.csv" in found["refused"][0]
    assert not (carried / "home").exists()


# ---- doctor


def test_doctor_names_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("UVIT_WEIGHTS", raising=False)
    (tmp_path / "file").write_text("", "utf-8")
    weights = tmp_path / "data" / "weights"
    weights.mkdir(parents=True)
    (weights / "resnet20-12fca82f.th").write_bytes(b"short")
    lines = []
    rows = doctor.doctor(lines.append, self_test=False, out_dir=tmp_path / "file" / "runs")
    found = {row.what: row for row in rows}
    assert found["data digits"].state == "ok" and found["versions"].state == "ok"
    assert found["data cifar10"].state == "missing"
    assert str(tmp_path / "data") in found["data cifar10"].cure
    assert found["features resnet56_cifar10"].state == "missing"
    assert "curl -L" in found["features resnet56_cifar10"].cure
    assert found["features resnet20_cifar10"].state == "problem"
    assert found["write access"].state == "problem" and "2 problems" in lines[-1]


def test_doctor_self_test_can_fail(monkeypatch):
    rows = [{"file": "uvit_text", "ok": False}, {"file": "other", "ok": True}]
    monkeypatch.setattr(doctor, "cached_certificate", lambda device: rows)
    finding = doctor.check_certificate()
    assert finding.state == "problem" and "uvit_text" in finding.detail
