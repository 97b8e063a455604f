"No number of the record is lost, every cell of this model has an experiment, a campaign keeps its budget and shares its work, and a changed digit is found."

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from uvit_repro.campaign import plan as P
from uvit_repro.campaign.plan import (
    NOT_RUN,
    Campaign,
    Live,
    attempts,
    cell_experiment,
    cell_experiments,
    claim,
    computed,
    doctor,
    from_command,
    habits,
    held,
    jobs,
    ledger,
    measurement,
    no_experiment,
    note_attempt,
    ours,
    plan,
    plan_json,
    prediction_report,
    probe_throughput,
    state,
    submit,
    verify,
)
from uvit_repro.config import PROTOCOLS, ParameterError, check_experiment
from uvit_repro.paper.registry import KINDS, registry
from uvit_repro.runs.records import load_results, published_root, seal

ROOT = Path(__file__).resolve().parent.parent
CELLS = registry()
PUBLISHED = sorted(p.parent for p in published_root().glob("*/run.json"))
ADOPTED = published_root() / PROTOCOLS["laptop"].run_id  # a published run with a curve
quiet = lambda line: None
RATE = 5e10


# ---- the registry


def test_kinds_are_exhaustive_and_every_cell_has_a_run_or_a_reason(capsys):
    counts = CELLS.kind.value_counts()
    with capsys.disabled():
        print("\n  " + ", ".join(f"{counts[k]} {k}" for k in KINDS), end=" ")
    assert set(CELLS.kind) == set(KINDS) and counts.sum() == len(CELLS)
    for c in CELLS.itertuples():
        for p in PROTOCOLS:
            assert bool(cell_experiments(c, p)) != bool(no_experiment(c, p)), (c.cell, p)


def test_every_reproducible_cell_has_an_experiment_that_holds_together():
    kept = {}
    for c in CELLS[CELLS.kind == "reproducible"].itertuples():
        e = cell_experiment(c, "paper")
        check_experiment(e)
        m = measurement(c, e)
        assert e.protocol == "paper" and m["step"] in {
            *e.evaluation.curve_steps,
            *e.evaluation.loss_steps,
            e.train.n_steps,
        }, c.cell
        assert kept.setdefault(e.run_id, {*e.evaluation.curve_steps, *e.evaluation.loss_steps}) == {
            *e.evaluation.curve_steps,
            *e.evaluation.loss_steps,
        }, c.cell  # whichever runs first keeps what the others need
        if (e.model.model, e.data.dataset) == ("UViT", "cifar10"):
            check_experiment(cell_experiment(c, "gpu"))
        else:
            assert cell_experiment(c, "gpu") is None and "cifar10" in no_experiment(c, "gpu")


def test_variants_get_the_field_that_the_paper_names():
    field = lambda place, row: {
        (e.model.skip, e.model.time, e.model.conv, e.model.patch_embed, e.model.pos_embed)
        for c in CELLS[
            (CELLS.place == place) & (CELLS.row.str.contains(row, regex=False))
        ].itertuples()
        for e in cell_experiments(c, "gpu")
    }
    assert field("Figure 2a", "(5)") == {("none", "token", "after", "linear", "learned")} and field(
        "Figure 2a", "(4)"
    ) == {("linear_add", "token", "after", "linear", "learned")}
    assert field("Figure 2b", "AdaLN") == {
        ("concat", "adaln", "after", "linear", "learned")
    } and field("Figure 2c", "before") == {("concat", "token", "before", "linear", "learned")}
    assert field("Figure 2e", "sinusoidal") == {
        ("concat", "token", "after", "linear", "sincos2d")
    } and field("Figure 7", "addition") == {("add", "token", "after", "linear", "learned")}
    t3 = [
        (measurement(c, e)["nfe"], measurement(c, e)["step"])
        for c in CELLS[
            (CELLS.place == "Table 3") & (CELLS.row == "U-ViT-H/2") & (CELLS.paper == "U-ViT")
        ].itertuples()
        for e in cell_experiments(c, "paper")
    ]
    assert sorted(t3) == sorted((n, s) for n in (4, 5, 10, 15, 20) for s in (200_000, 500_000))


def test_figures_2_and_3_are_the_runs_of_their_chapters():
    from uvit_repro.ablations import figure2_cells
    from uvit_repro.config import experiment
    from uvit_repro.scaling import figure3_cells

    for p in ("paper", "gpu", "laptop"):
        assert {
            e.run_id
            for c in CELLS[CELLS.place == "Figure 3"].itertuples()
            for e in cell_experiments(c, p)
        } == {experiment(**c).run_id for c in figure3_cells(p)}
        assert [j.exp.run_id for j in jobs("fig2", p)][:11] == [
            experiment(**c).run_id for c in figure2_cells(p)
        ][:11] and {j.exp.run_id for j in jobs("fig2", p)} == {
            experiment(**c).run_id for c in figure2_cells(p)
        }


def test_counts_agree_with_every_printed_digit():
    for c in CELLS[CELLS.kind == "computed"].itertuples():
        digits = len(c.value.partition(".")[2])
        slack = {("Table 7", "gflops"): 0.5, ("README model table", "params_M"): 0.1}.get(
            (c.place, c.column), 0.0
        )  # Table 7 prints 77 for 76.5 and 133.3 for 133.2; GenViT's README 11 for 11.57
        assert abs(computed(c) - float(c.value)) <= 0.5 * 10**-digits + slack * 10**-digits, (
            c.cell,
            computed(c),
            c.value,
        )


def test_settings_differ_only_where_the_paper_disagrees_with_its_code():
    differ = set()
    for c in CELLS[(CELLS.kind == "setting") & (CELLS.base != "")].itertuples():
        v = ours(c)
        if not (
            str(v) == c.value
            or (isinstance(v, (int, float)) and pd.notna(c.number) and float(v) == c.number)
        ):
            differ.add((c.place, c.column, c.value))
    assert differ == {("Section 5.1", "weight_decay", "0.3"), ("Table 5", "p_uncond", "0.1")}


def test_published_runs_stand_in_their_cells_and_nowhere_else():
    df = load_results("published")
    at = CELLS[
        (CELLS.place == "Figure 2a")
        & CELLS.row.str.contains("(5)", regex=False)
        & CELLS.condition.str.contains("500K")
    ]
    (c,) = at.itertuples()
    e = [cell_experiment(c, "laptop", s) for s in range(3)]
    want = [
        df[
            (df.run_id == x.run_id) & (df.step == 4000) & (df.metric == "fd_digits_cnn_test")
        ].value.iloc[0]
        for x in e
    ]
    assert (
        ours(c, df, "laptop") == ", ".join(f"{v:.4g}" for v in want)
        and ours(c, df, "laptop", seeds=(1,)) == want[1]
    )
    assert ours(c, df, "gpu") == NOT_RUN and ours(c, df) == NOT_RUN and ours(c) == NOT_RUN
    df = ledger(df)
    filled = [
        c.place
        for c in CELLS[CELLS.kind == "reproducible"].itertuples()
        if ours(c, df, "laptop") != NOT_RUN
    ]
    assert filled and all(p.startswith(("Figure 2", "Figure 3")) for p in filled)


def test_the_names_of_figure_7_are_those_of_chapter_09():
    from uvit_repro.cka import cka_measures

    names = set(CELLS[CELLS.place == "Figure 7"].measure) - {"cka_min"}
    assert names <= set(cka_measures(torch.eye(13).numpy()))
    c = next(CELLS[(CELLS.place == "Figure 7") & (CELLS.measure == "cka_0_1")].itertuples())
    assert cell_experiment(c, "gpu") and "13 layers" in no_experiment(c, "laptop")
    e = cell_experiment(c, "gpu")
    row = {
        "run_id": e.run_id,
        "metric": "cka_0_1",
        "value": 0.5,
        "status": "ok",
        "step": 10_000,
        "eval_id": "cka-x",
        "origin": "runs",
        "folder": "",
    }
    assert (
        ours(c, pd.DataFrame([row]), "gpu") == 0.5
        and ours(c, pd.DataFrame([dict(row, step=5000)]), "gpu") == NOT_RUN
    )


# ---- the plan


def test_plan_of_everything_lists_a_run_or_a_reason_and_the_sum(tmp_path):
    lines = []
    df = plan("all", "paper", flops_per_second=RATE, out_dir=tmp_path, say=lines.append)
    d = json.loads(json.dumps(plan_json(df)))
    assert len(d["cells"]) == len(CELLS) and all(
        bool(c["runs"]) != bool(c["reason"]) for c in d["cells"]
    )
    kinds = {c["cell"]: c for c in d["cells"]}
    for c in CELLS[CELLS.kind == "reproducible"].itertuples():
        assert kinds[c.cell]["runs"], c.cell
    assert (
        d["gpu_hours"] == pytest.approx(sum(r["gpu_hours"] for r in d["runs"]))
        and 1000 < d["gpu_hours"] < 50_000
        and "GPU-hours" in lines[-1]
    )
    for run_id, g in df.groupby("run_id"):
        assert (g.train_seconds > 0).sum() == 1, (
            run_id
        )  # five evaluations of one training pay for it once
    for r in df.itertuples():
        assert from_command(r.command).run_id == r.run_id


def test_states_of_a_run(tmp_path, monkeypatch):
    c = next(CELLS[CELLS.place == "Figure 2a"].itertuples())
    e = cell_experiment(c, "laptop")
    folder = tmp_path / e.run_id
    assert (
        state(e, tmp_path)[0] == "published"
    )  # committed evidence is not mistaken for work done here
    monkeypatch.setattr(P, "published_root", lambda: tmp_path / "none")
    assert state(e, tmp_path)[0] == "missing"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"x")
    (folder / "log.csv").write_text("step,loss,lr,seconds\n50,1,1,1\n1000,1,1,1\n")
    assert state(e, tmp_path) == ("stopped", "25% of the training is there")
    (folder / "run.json").write_text(
        json.dumps({"status": "failed", "error": "TrainingFailed: loss nan"})
    )
    assert state(e, tmp_path)[0] == "failed"
    from filelock import FileLock

    with FileLock(folder / ".lock"):
        assert state(e, tmp_path)[0] == "running" and claim(e.run_id, tmp_path) is None
    assert state(cell_experiment(c, "paper"), tmp_path)[0] == (
        "missing" if P.data_status("cifar10")[0] else "blocked"
    )
    shutil.rmtree(folder)
    shutil.copytree(published_root_real / e.run_id, folder)
    assert state(e, tmp_path)[0] == "done"


published_root_real = published_root()


def test_jobs_of_tables_and_figures():
    assert (
        len(jobs("fig2d", "gpu")) == 2
        and len(jobs("fig2", "gpu", (0, 1))) == 30
        and jobs("table6", "paper") == []
    )


def test_probe_measures_once_and_restores_threads(tmp_path, monkeypatch):
    was, cache = torch.get_num_threads(), tmp_path / "t.json"
    monkeypatch.setattr(P, "busy", lambda: False)
    rate = probe_throughput("cpu", "fp16", 1, 0.2, cache)  # fp16 has no CPU kernel: bf16 stands in
    assert (
        rate > 1e8
        and torch.get_num_threads() == was
        and list(json.loads(cache.read_text())) == [P.machine_key(torch.device("cpu"), 1, "bf16")]
    )
    cache.write_text(json.dumps({P.machine_key(torch.device("cpu"), 1, "bf16"): 7.0}))
    assert probe_throughput("cpu", "bf16", 1, 9.0, cache) == 7.0


def test_probe_of_a_busy_machine_is_used_and_not_kept(tmp_path, monkeypatch):
    cache = tmp_path / "t.json"
    monkeypatch.setattr(P.os, "getloadavg", lambda: (0.6 * os.cpu_count(), 0, 0))
    assert P.busy()
    assert probe_throughput("cpu", "fp32", 1, 0.1, cache) > 1e8 and not cache.exists()
    monkeypatch.setattr(P.os, "getloadavg", lambda: (0.4 * os.cpu_count(), 9, 9))
    assert not P.busy()
    rate = probe_throughput("cpu", "fp32", 1, 0.1, cache)
    assert list(json.loads(cache.read_text()).values()) == [rate]


def test_two_probes_at_once_measure_once(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    calls = []
    monkeypatch.setattr(P, "busy", lambda: False)
    monkeypatch.setattr(
        P, "timed_updates", lambda *a: (calls.append(1), time.sleep(0.1), 5.0 + len(calls))[2]
    )
    with ThreadPoolExecutor(2) as pool:
        rates = list(
            pool.map(
                lambda _: probe_throughput("cpu", "fp32", 1, 3.0, tmp_path / "t.json"), range(2)
            )
        )
    assert rates == [8.0, 8.0] and len(calls) == 3, (
        "the best of three stretches, and the second process reads it"
    )


# ---- running

FAKE = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from uvit_repro.campaign import plan as P
    from uvit_repro.config import experiment, PARAMETERS
    out, nap = Path(sys.argv[1]), float(sys.argv[2])
    real = P.state
    def state(e, out_dir=None): return ("done", "") if (out/e.run_id/"marker").exists() else ("missing", "")
    def fake(nb, say=print, **kw):
        e = experiment(**{k: v for k, v in kw.items() if k in PARAMETERS or k in ("protocol", "seed")})
        with open(out/"starts", "a") as f: f.write(f"{e.run_id} {os.getpid()}\\n")
        time.sleep(nap); (out/e.run_id).mkdir(exist_ok=True); (out/e.run_id/"marker").touch()
    P.state, P.run_chapter = state, fake
    if __name__ == "__main__":
        (out/f"ready-{os.getpid()}").touch()
        while not (out/"go").exists(): time.sleep(0.02)
        print(sorted((k, len(v)) for k, v in P.run("fig2", "smoke", out_dir=out, workers=2, flops_per_second=5e10, say=lambda l: None).items() if isinstance(v, list)))
""")


def start(tmp_path, nap):
    (tmp_path / "fake.py").write_text(FAKE)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "fake.py"), str(tmp_path), str(nap)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for(what, *ps, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        time.sleep(0.05)
        assert time.monotonic() < end and all(p.poll() is None for p in ps), [
            p.communicate() for p in ps if p.poll() is not None
        ]


def test_two_campaigns_share_the_work_and_a_killed_one_gives_back_its_claims(tmp_path):
    path = tmp_path / ".claims" / f"{jobs('fig2', 'smoke')[0].exp.run_id}.lock"
    path.parent.mkdir()
    victim = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import filelock, time; lock = filelock.FileLock({str(path)!r}); lock.acquire(); open({str(tmp_path / 'held')!r}, 'w'); time.sleep(600)",
        ]
    )
    both = [start(tmp_path, 0.3) for _ in range(2)]
    wait_for(
        lambda: len(list(tmp_path.glob("ready-*"))) == 2 and (tmp_path / "held").exists(),
        victim,
        *both,
    )
    (tmp_path / "go").touch()
    wait_for(
        lambda: (
            (tmp_path / "starts").exists()
            and len((tmp_path / "starts").read_text().splitlines()) == 14
        ),
        victim,
        *both,
    )  # all but the claimed one; both wait for it
    assert not [
        l for l in (tmp_path / "starts").read_text().splitlines() if l.startswith(path.stem)
    ]
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    outs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    started = [l.split() for l in (tmp_path / "starts").read_text().splitlines()]
    assert (
        len(started) == len({r for r, _ in started}) == 15 and len({pid for _, pid in started}) == 2
    )  # each once, and both worked
    for out, _ in outs:
        d = dict(eval(out.splitlines()[-1]))
        assert d["done"] + d["ran"] == 15 and d["left"] == d["failed"] == 0


class Fake:
    "Runs that only pass time; the machine's past is none."

    def __init__(self, monkeypatch, out, act):
        self.calls, self.done = [], set()

        def chapter(nb, say=print, **kw):
            self.calls.append(kw)
            act(say, kw)
            self.done.add(kw.get("skip", kw.get("time", "adopted")))

        monkeypatch.setattr(P, "run_chapter", chapter)
        monkeypatch.setattr(P, "state", lambda e, o=None: ("missing", ""))


def campaign(tmp_path, budget, n=3, expected=None):
    c = Campaign(jobs("fig2", "smoke")[:n], RATE, "m", budget, 1, tmp_path, Live(quiet))
    if expected is not None:
        c.expected = lambda job: expected
    return c


def test_a_run_starts_only_when_it_fits(tmp_path, monkeypatch):
    f = Fake(monkeypatch, tmp_path, lambda say, kw: None)
    c = campaign(tmp_path, 1.0, expected=0.5)
    c.left = lambda: 1.0 - 0.3 * len(f.calls)
    s = c.run()  # each run takes 0.3: with 1.0 and 0.7 left half a second fits, with 0.4 no more
    assert (len(s["ran"]), len(s["left"]), len(s["failed"])) == (2, 1, 0) and len(f.calls) == 2
    assert len(campaign(tmp_path, 0.0).run()["left"]) == 3 and len(f.calls) == 2
    assert (
        len(campaign(tmp_path, None, expected=1e9).run()["ran"]) == 3
    )  # no budget: everything fits


def test_a_run_that_takes_longer_is_stopped_inside_the_budget_and_left(tmp_path, monkeypatch):
    def act(say, kw):
        for i in range(200):
            time.sleep(0.05)
            say(f"step {i}")

    Fake(monkeypatch, tmp_path, act)
    c = campaign(tmp_path, 3.0, expected=0.1)
    s = c.run()  # a third of so short a budget is kept back
    assert time.perf_counter() < c.end and len(s["left"]) == 3 and not s["ran"] and not s["failed"]


def test_a_failure_is_kept_and_the_others_go_on(tmp_path, monkeypatch):
    def act(say, kw):
        if kw.get("skip") == "none":
            raise RuntimeError("no such thing")

    Fake(monkeypatch, tmp_path, act)
    lines = []
    c = campaign(tmp_path, None)
    c.live = Live(lines.append)
    s = c.run()
    assert (
        (len(s["ran"]), len(s["failed"]), len(s["left"])) == (2, 1, 0)
        and s["failed"][0].exp.model.skip == "none"
        and any("no such thing" in l for l in lines)
    )


def test_the_past_corrects_the_expectation(tmp_path):
    job = jobs("fig2", "laptop")[0]
    c = Campaign([job], RATE, "m", None, 1, tmp_path, Live(quiet))
    plain = P.predict(job.exp, RATE)["total"]
    assert habits([]) == (10.0, 1.0) and c.expected(job) == pytest.approx(10 + plain)
    for sec in (30.0, 60.0, 60.0):
        note_attempt(
            tmp_path / "some-run",
            machine="m",
            rate=RATE,
            predicted={"total": 20.0},
            seconds=sec,
            cell_seconds=sec + 8,
            outcome="ran",
        )
    note_attempt(
        tmp_path / "some-run",
        machine="other",
        rate=RATE,
        predicted={"total": 20.0},
        seconds=1.0,
        cell_seconds=2.0,
        outcome="ran",
    )
    assert (
        len(attempts(tmp_path)) == 4
        and habits(attempts(tmp_path, "m")) == (8.0, 3.0)
        and c.expected(job) == pytest.approx(8 + 3 * plain)
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "prediction.json").write_text("{")
    assert len(attempts(tmp_path)) == 4


def test_a_claim_is_exclusive_and_leaves_no_lock_behind(tmp_path):
    a = claim("r", tmp_path)
    assert claim("r", tmp_path) is None and claim("s", tmp_path)
    a.release()
    b = claim("r", tmp_path)
    assert b is not None
    b.release()
    assert (
        not held(tmp_path / ".claims" / "r.lock")
        and not held(tmp_path / "absent.lock")
        and not (tmp_path / "absent.lock").exists()
    )


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(ParameterError, match="executor"):
        P.run("fig2d", "smoke", executor="grid", out_dir=tmp_path)
    with pytest.raises(ParameterError, match="budget goes with"):
        P.run("fig2d", "smoke", executor="slurm", budget=5, out_dir=tmp_path)
    with pytest.raises(ParameterError, match="no run at protocol laptop"):
        P.run("table6", "laptop", out_dir=tmp_path)
    with pytest.raises(ParameterError, match="allowed are smoke"):
        P.run("fig2d", "huge", out_dir=tmp_path)
    if not shutil.which("sbatch"):
        with pytest.raises(ParameterError, match="sbatch"):
            P.run("fig2d", "smoke", executor="slurm", out_dir=tmp_path)


def test_submitit_runs_a_cell_on_this_machine(tmp_path):
    pytest.importorskip("submitit")
    job = jobs("fig2d", "smoke")[0]
    nb, out = tmp_path / "05_fast.ipynb", tmp_path / "runs"
    import nbformat

    params = next(
        c
        for c in nbformat.read(ROOT / "nbs" / "05_ablations.ipynb", 4).cells
        if "parameters" in c.metadata.get("tags", [])
    )
    code = nbformat.v4.new_code_cell(
        "open(out_dir + '/ran', 'a').write(f'{protocol} {seed} {threads} ')"
    )
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[params, code],
            metadata={
                "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
            },
        ),
        nb,
    )
    (r,) = submit([job], "submitit-local", out, nb, quiet, tmp_path / "logs", threads=1)
    assert (
        (r["run_id"], r["outcome"]) == (job.exp.run_id, "ran")
        and (out / "ran").read_text() == "smoke 0 1 "
        and (out / job.exp.run_id / "chapter.ipynb").exists()
    )
    lock = claim(job.exp.run_id, out)
    (r,) = submit([job], "submitit-local", out, nb, quiet, tmp_path / "logs")
    lock.release()
    assert r["outcome"] == "claimed by another" and (out / "ran").read_text() == "smoke 0 1 "


def test_live_rewrites_lines_on_a_terminal_only():
    import io

    lines = []
    live = Live(lines.append)
    live("a", "step 1")
    live("a", "done", final=True)
    assert lines == ["[a] step 1", "[a] done"]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert (
        not Live(quiet, Terminal()).table
        and Live(quiet, Terminal(), table=True).table
        and not Live(print, io.StringIO(), table=True).table
    )
    t = Terminal()
    live = Live(print, t)
    live("a", "x" * 500)
    live("b", "step 2")
    live("a", "done", final=True)
    text = t.getvalue()
    assert (
        "\x1b[1F" in text
        and "\x1b[2F" in text
        and live.rows == {"b": "step 2"}
        and max(map(len, text.split("\n"))) < 400
    )


# ---- verify, predictions, doctor


def test_published_runs_verify_in_a_minute():
    start = time.perf_counter()
    lines = []
    rows = verify(say=lines.append)
    assert (
        rows
        and all(r["ok"] for r in rows)
        and time.perf_counter() - start < 60
        and f"{len(PUBLISHED)} runs" in lines[-1]
    )
    csvs = sum(
        len(list(csv.DictReader(open(f / "measurements.csv", newline="")))) for f in PUBLISHED
    )
    metrics = set(load_results("published").metric)
    assert (
        sum(r["what"] in metrics for r in rows) == csvs
    )  # every number of the ledger was computed again


def one_digit(path, after: bytes):
    raw = path.read_bytes()
    i = raw.index(after) + len(after)
    while not 48 <= raw[i] <= 57:
        i += 1
    path.write_bytes(raw[:i] + bytes([raw[i] + 1 if raw[i] < 57 else 48]) + raw[i + 1 :])


@pytest.mark.parametrize(
    "name, after, what, sealed",
    [
        ("measurements.csv", b"heldout_loss,0.", "heldout_loss", False),
        ("measurements.csv", b"fd_digits_cnn_test,", "fd_digits_cnn_test", False),
        ("measurements.csv", b",copies,", "copies", False),
        ("measurements.csv", b"laptop,", "columns of heldout_loss", False),
        ("run.json", b'"n_steps": ', "run_id of the experiment", False),
        ("run.json", b'"stats_sha256": "', "sha256 of the statistics", False),
        ("run.json", b'"images_seen": ', "images_seen", False),
        ("run.json", b'"images_per_second": ', "images_per_second", False),
        ("run.json", b'"wall_seconds": ', "wall_seconds covers its parts", False),
        ("run.json", b'"nfe": ', "name of the evaluation", False),
        ("log.csv", b"\n1000,0.1234567"[:6], "", True),
        ("run.json", b'"cores": ', "sha256", True),
        ("first.npz", b"PK", "sha256", True),
    ],
)
def test_one_changed_digit_is_found_and_named(tmp_path, name, after, what, sealed):
    folder = tmp_path / ADOPTED.name
    shutil.copytree(ADOPTED, folder)
    (folder / P.SEAL).unlink(missing_ok=True)
    if sealed:
        seal(folder)
    assert all(r["ok"] for r in verify(out_dir=tmp_path))
    one_digit(folder / name, after)
    lines = []
    bad = [r for r in verify(out_dir=tmp_path, say=lines.append) if not r["ok"]]
    assert (
        bad
        and all(folder.name in r["where"] for r in bad)
        and (what or "sha256") in [r["what"] for r in bad]
        and lines[0].startswith("DIFFERS")
        and folder.name in lines[-1]
    )


@pytest.mark.parametrize("part", ["byte", "missing", "swapped", "row"])
def test_statistics_and_ledger_are_bound_to_each_other(tmp_path, part):
    folder = tmp_path / ADOPTED.name
    shutil.copytree(ADOPTED, folder)
    (folder / P.SEAL).unlink(missing_ok=True)
    files = sorted((folder / "stats").glob("*.npz"))
    if part == "byte":
        raw = bytearray(files[0].read_bytes())
        raw[len(raw) // 2] ^= 1
        files[0].write_bytes(raw)
    if part == "missing":
        files[0].unlink()
    if part == "swapped":
        shutil.copyfile(files[1], files[3])
    if part == "row":
        text = (folder / "measurements.csv").read_text().splitlines()
        (folder / "measurements.csv").write_text("\n".join(text[:3] + text[4:]) + "\n")
    bad = [r for r in verify(out_dir=tmp_path) if not r["ok"]]
    named = "is in the ledger" if part == "row" else files[3 if part == "swapped" else 0].name
    assert any(named in r["what"] + r["where"] for r in bad)


def test_a_record_that_can_not_be_read_is_named(tmp_path):
    folder = tmp_path / ADOPTED.name
    shutil.copytree(ADOPTED, folder)
    (folder / "run.json").write_text('{"run_id": ')
    bad = [r for r in verify(out_dir=tmp_path) if not r["ok"]]
    assert bad and folder.name in bad[0]["where"]
    assert verify(out_dir=tmp_path / "empty") == []
    with pytest.raises(ParameterError, match="allowed are"):
        verify("elsewhere")


def test_seal_is_in_the_form_of_sha256sum(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a b.txt").write_text("x")
    (folder / "stats").mkdir()
    (folder / "stats" / "s.npz").write_bytes(b"y")
    seal(folder)
    if shutil.which("sha256sum"):
        assert (
            subprocess.run(["sha256sum", "-c", P.SEAL], cwd=folder, capture_output=True).returncode
            == 0
        )
    rows = []
    assert P.verify_seal(rows, folder) and len(rows) == 2 and all(r["ok"] for r in rows)
    (folder / "a b.txt").unlink()
    rows = []
    P.verify_seal(rows, folder)
    assert [r["recomputed"] for r in rows if not r["ok"]] == ["missing"]


def test_predictions_are_compared_with_the_recorded_truth(tmp_path):
    df = prediction_report("published", cache=tmp_path / "none.json")
    assert len(df) == len(PUBLISHED) and df.predicted.isna().all() and (df.true > 0).all()
    (tmp_path / "t.json").write_text(json.dumps({df.machine[0]: df.gflops_per_second[0] * 1e9}))
    df = prediction_report("published", cache=tmp_path / "t.json")
    assert df.predicted_train[0] == pytest.approx(
        df.true_train[0]
    )  # the rate that a run achieved predicts its own training


def test_doctor_names_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("UVIT_WEIGHTS", raising=False)
    (tmp_path / "file").write_text("")
    lines = []
    rows = {
        r["what"]: r
        for r in doctor(lines.append, self_test=False, out_dir=tmp_path / "file" / "runs")
    }
    assert (
        rows["data digits"]["state"] == "ok"
        and rows["data cifar10"]["state"] == "missing"
        and "download=True" in rows["data cifar10"]["cure"]
        and str(tmp_path / "data") in rows["data cifar10"]["cure"]
    )
    assert (
        rows["features resnet20_cifar10"]["state"] == "missing"
        and "curl -L" in rows["features resnet20_cifar10"]["cure"]
    )
    assert (
        rows["write access"]["state"] == "problem"
        and rows["torch"]["state"] == "ok"
        and "1 problems" in lines[-1]
    )
    (tmp_path / "data" / "weights").mkdir(parents=True)
    (tmp_path / "data" / "weights" / "resnet20-12fca82f.th").write_bytes(b"short")
    assert {r["what"]: r for r in doctor(self_test=False, out_dir=tmp_path)}[
        "features resnet20_cifar10"
    ]["state"] == "problem"


def test_doctor_self_test_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(
        P,
        "cached_certificate",
        lambda d: [{"file": "uvit_text", "ok": False}, {"file": "other", "ok": True}],
    )
    r = next(r for r in doctor(out_dir=tmp_path) if r["what"] == "self-test")
    assert r["state"] == "problem" and "uvit_text" in r["detail"]
