"""Benchmarks: times in turn, records that survive, a made-up checkout of the released code."""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from uvit_repro import train
from uvit_repro.bench import gpu_session
from uvit_repro.bench.contestants import (
    Contestant,
    Features,
    FreshProcess,
    Training,
    TrainingOptions,
    bench_experiment,
    bench_network,
)
from uvit_repro.bench.peer import OutputsDiffer, Peer, PeerTraining, check_outputs
from uvit_repro.bench.results import (
    BENCH_COLUMNS,
    Record,
    bench_row,
    load_bench,
    newest,
    publish_bench,
    speed_table,
)
from uvit_repro.bench.run import Bench, Job, Settings, check_settings, run_bench, verdict
from uvit_repro.bench.targets import TARGETS, check_targets
from uvit_repro.config import ParameterError
from uvit_repro.runs.execution import compile_blocks
from uvit_repro.runs.timing import interleaved, paired_ratio, peak_memory, spread

CPU = torch.device("cpu")
QUICK = Settings(quick=True, device="cpu", repeats=2, what=("train",), precision=("fp32",))

CHECKOUT = {  # the released layout and interfaces, made of our own parts
    "libs/__init__.py": "",
    "libs/uvit.py": """
from uvit_repro.uvit import UViT as Ours
ATTENTION_MODE = "made up"
OFFSET = 0.0
print("printed on import")

class UViT(Ours):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads,
                 mlp_ratio=4., qkv_bias=False, mlp_time_embed=False, num_classes=-1,
                 use_checkpoint=False, conv=True):
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth + 1, num_heads, mlp_ratio,
            qkv_bias, mlp_time_embed, num_classes if num_classes > 0 else None,
            use_checkpoint=use_checkpoint, conv="after" if conv else "none")

    def forward(self, x, timesteps, y=None):
        return super().forward(x, timesteps, y) + OFFSET
""",
    "sde.py": """
import torch
from absl import logging

class VPSDE: pass

class ScoreModel:
    def __init__(self, nnet, pred, sde):
        self.nnet = nnet
        print("printed when made")
        logging.debug("made")

    def noise_pred(self, xt, t, **kw): return self.nnet(xt, t * 999, **kw)

def LSimple(model, x0, pred="noise_pred", **kw):
    from uvit_repro.config import DiffusionConfig
    from uvit_repro.diffusion import Diffusion
    t, eps = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)
    xt = Diffusion(DiffusionConfig()).q_sample(x0, t, eps)
    return (model.noise_pred(xt, t, **kw) - eps).square().flatten(1).mean(1)
""",
    "utils.py": """
import torch

def get_optimizer(params, name, **kw): return torch.optim.AdamW(params, **kw)

def get_lr_scheduler(optimizer, name, warmup_steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(s / warmup_steps, 1))

def ema(dest, src, rate):
    for a, b in zip(dest.parameters(), src.parameters()):
        a.data.mul_(rate).add_((1 - rate) * b.data)
""",
    "dpm_solver_pytorch.py": """
import types, torch
from uvit_repro.config import DiffusionConfig
from uvit_repro.diffusion import Diffusion
from uvit_repro.sample import Denoiser, dpm_solver_fast

class NoiseScheduleVP:
    def __init__(self, schedule): assert schedule == "linear"

def model_wrapper(model, noise_schedule, time_input_type, model_kwargs):
    return lambda x, t, **kw: model(x, t / 999, **model_kwargs)

class DPM_Solver:
    def __init__(self, model_fn, noise_schedule): self.fn = model_fn

    def sample(self, x, steps, eps, adaptive_step_size, fast_version):
        assert eps == 1e-4 and fast_version and not adaptive_step_size
        net = torch.nn.Module()
        net.forward = self.fn
        with torch.no_grad():
            return dpm_solver_fast(Denoiser(net, Diffusion(DiffusionConfig())), x, steps)
""",
}


def silent(line):
    "A listener that says nothing."


@pytest.fixture
def checkout(tmp_path):
    for name, text in CHECKOUT.items():
        path = tmp_path / "peer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "peer"


class Sleeper(Contestant):
    "A contestant that costs nothing, or fails."

    def __init__(self, error=None):
        self.error, self.calls = error, 0
        self.columns = {"what": "train", "precision": "fp32", "impl": "ours"}

    def call(self):
        self.calls += 1
        if self.error:
            raise self.error


def made_up_bench(tmp_path, **settings) -> Bench:
    "A benchmark without ceilings."
    s = check_settings(replace(QUICK, **settings), CPU)
    record = Record({"machine": "Box (9)", "device": "cpu"}, tmp_path)
    return Bench(s, CPU, record, say=silent)


def test_contestants_take_turns():
    seen = []
    calls = {n: (lambda n=n: seen.append(n)) for n in "abc"}
    *_, times = interleaved(calls, repeats=3, min_seconds=0)
    assert "".join(seen) == "abc" * 3
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_timer_stops_between_repetitions():
    seen = []
    rounds = interleaved({"a": lambda: seen.append(1)}, 10, "cpu", 0, lambda: len(seen) >= 4)
    assert len(list(rounds)) == len(seen) == 4


def test_ratios_do_not_see_drift():
    drift = np.geomspace(1, 10, 21)  # ten times slower at the end
    ratio = paired_ratio(3 * drift, drift)
    assert (ratio.median, ratio.low, ratio.high, ratio.n) == pytest.approx((3, 3, 3, 21))
    assert verdict(ratio) == "worth 3.00x"
    assert verdict(paired_ratio([1] * 4, [2, 2, 2, 4])) == "costs 2.00x"
    assert verdict(spread([0.9, 1.0, 1.1, 1.2])) == "within the spread"


def test_an_earlier_peak_is_forgotten():
    size = 200 * 2**20
    first = peak_memory(lambda: torch.ones(size, dtype=torch.uint8))
    if first is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert peak_memory(lambda: None) < first - size // 2


def test_a_budget_is_kept_inside_a_job(tmp_path, monkeypatch):
    "The record holds the repetitions that were finished; later jobs are named as left."
    bench = made_up_bench(tmp_path, repeats=3)
    late, slow = Sleeper(), Sleeper()
    monkeypatch.setattr(bench, "out_of_time", lambda: slow.calls >= slow.warmup + 2)
    jobs = [Job("slow", "tiny", {"fp32": slow}, 2), Job("late", "tiny", {"fp32": late}, 2)]
    monkeypatch.setattr(bench, "jobs", lambda: jobs)
    bench.run()
    df = load_bench("runs", tmp_path)
    assert df[df.metric == "seconds"].repeats.tolist() == [2.0]
    assert bench.record.info["left"] == ["late"] and not late.calls


def test_a_failed_job_does_not_stop_the_others(tmp_path, monkeypatch):
    bench = made_up_bench(tmp_path)
    bad = Job("bad", "tiny", {"fp32": Sleeper(ZeroDivisionError("no"))}, 1)
    big = Job("big", "tiny", {"fp32": Sleeper(torch.OutOfMemoryError("no"))}, 1)
    good = Job("good", "tiny", {"fp32": Sleeper()}, 1)
    monkeypatch.setattr(bench, "jobs", lambda: [bad, big, good])
    bench.run()
    assert bench.record.info["errors"] == {"bad": "ZeroDivisionError: no"}
    rows = [r for r in bench.record.rows if r["metric"] == "seconds"]
    assert [r["value"] is None for r in rows] == [True, False]
    assert rows[0]["note"] == "not run: out of memory on cpu"


def test_a_killed_benchmark_can_be_published(tmp_path, monkeypatch):
    "Its record, as the last finished repetition left it."
    monkeypatch.setenv("UVIT_REPRO_ROOT", str(tmp_path))
    record = Record({"machine": "Box (9)", "device": "cpu"})
    columns = {"what": "train", "model": "U-ViT-S/2", "option": 'a, "b"', "impl": "ours"}
    record.put("job", [bench_row(columns, "seconds", spread([0.1, 0.3]), "s")], {"x": [0.1, 0.3]})
    info = json.loads((record.folder / "bench.json").read_text(encoding="utf-8"))
    assert info["status"] == "running" and info["times"] == {"job x": [0.1, 0.3]}
    publish_bench(record.folder)
    df = load_bench("published")
    assert df.status[0] == "stopped" and df.option[0] == 'a, "b"' and df["max"][0] == 0.3
    record.write(status="failed")
    with pytest.raises(ValueError, match="not evidence"):
        publish_bench(record.folder)


def test_an_interruption_is_recorded(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "sample_job", stop)
    with pytest.raises(KeyboardInterrupt):
        run_bench(replace(QUICK, what=("train", "sample")), tmp_path, say=silent)
    df = load_bench("runs", tmp_path)
    assert set(df.status) == {"interrupted"} and {"machine", "train"} == set(df.what)


def test_a_damaged_record_is_left_out(tmp_path):
    record = Record({"machine": "Box"}, tmp_path)
    (record.folder / "bench.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="left out"):
        assert not len(load_bench("runs", tmp_path))


def test_published_records_load():
    "Those of the first edition, with the columns and values that the report shows."
    df = load_bench("published")
    assert list(df.columns[: len(BENCH_COLUMNS)]) == BENCH_COLUMNS
    assert "matrix" not in set(df.attention) and "math" in set(df.attention)
    table = speed_table(newest(df))
    row = table[(table.what == "train") & (table.precision == "bf16")].iloc[0]
    assert (row["over released code"], row["share of matrix rate"]) == (
        "2.10x [2.00, 2.14]",
        "77 %",
    )


def test_released_code_beside_ours(checkout, tmp_path, capsys):
    mine = types.ModuleType("utils")
    sys.modules["utils"] = mine
    before, path = set(sys.modules), list(sys.path)
    try:
        peer = Peer(checkout)
        assert peer.attention == "made up" and sys.modules["utils"] is mine
        assert not {"sde", "libs.uvit", "absl"} & (set(sys.modules) - before)
        rows = check_outputs(peer, bench_experiment("tiny"), CPU)
        assert [r["metric"] for r in rows] == ["max_difference_output", "max_difference_images"]
        settings = replace(QUICK, what=("train", "sample"), peer=str(checkout))
        record = run_bench(settings, tmp_path / "runs", say=silent)
    finally:
        del sys.modules["utils"]
    assert sys.path == path and not list(checkout.rglob("__pycache__"))
    assert "printed" not in capsys.readouterr().out
    df = load_bench("runs", tmp_path / "runs")
    speedups = df[df.metric == "speedup"]
    assert speedups.what.tolist() == ["train", "sample", "sample"]
    times = record.info["times"]
    ratios = np.array(times["train tiny batch 4 released"]) / times["train tiny batch 4 fp32"]
    assert speedups.value.iloc[0] == pytest.approx(np.median(ratios))
    assert record.info["peer"]["version"].startswith("sha256 of libs/uvit.py ")


def test_released_step_trains(checkout):
    ours = Training(bench_experiment("tiny", 16), TrainingOptions(), CPU)
    theirs = PeerTraining(Peer(checkout), ours)
    theirs.prepare()
    weights, average = ([v.clone() for v in n.parameters()] for n in (theirs.net, theirs.average))
    for _ in range(3):
        theirs.call()
    assert np.isfinite(float(theirs.loss))
    for before, net in ((weights, theirs.net), (average, theirs.average)):
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("libs/uvit.py", "OFFSET = 0.0", "OFFSET = 1e-3", "output differ by 0.001"),
        ("dpm_solver_pytorch.py", "x, steps)\n", "x, steps) + 1\n", "images differ"),
    ],
)
def test_other_outputs_end_without_a_ratio(checkout, tmp_path, file, old, new, message):
    (checkout / file).write_text(CHECKOUT[file].replace(old, new), encoding="utf-8")
    with pytest.raises(OutputsDiffer, match=f"{message}.*nothing was timed"):
        run_bench(replace(QUICK, peer=str(checkout)), tmp_path / "r", say=silent)
    df = load_bench("runs", tmp_path / "r")
    assert set(df.what) == {"machine"} and set(df.status) == {"failed"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"what": ("trian",)}, "allowed are train, sample, features, data, checkpointing, start"),
        ({"models": ("U-ViT-S/8",)}, "not released"),
        ({"peer": "."}, "git clone https://github.com/baofff/U-ViT"),
        ({"device": "cuda:99"}, "device = 'cuda:99'"),
        ({"images": -3}, "at least 1"),
        ({"compile": "maybe"}, "allowed are auto, on, off"),
        ({"precision": ("int8",)}, "allowed are fp32, bf16, fp16"),
    ],
    ids=str,
)
def test_impossible_requests_say_what_is_allowed(given, message, tmp_path):
    with pytest.raises(ParameterError, match=message):
        run_bench(Settings(**{"device": "cpu", **given}), tmp_path, say=silent)
    assert not list(tmp_path.iterdir())


def test_a_peer_that_can_not_be_imported(checkout):
    (checkout / "sde.py").write_text("import a_module_that_is_nowhere\n", encoding="utf-8")
    with pytest.raises(ParameterError, match="a_module_that_is_nowhere"):
        Peer(checkout)


@pytest.mark.parametrize("name", ("digits_cnn", "resnet20_cifar10"))
def test_features_without_weights_use_random_ones(name, tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_DATA", str(tmp_path))
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    contestant = Features(name, 4, CPU)
    contestant.prepare()
    contestant.call()
    assert contestant.trained == (name == "digits_cnn")
    assert contestant.trained or "random weights" in contestant.columns["note"]


def test_compiled_contestants_report_their_graphs(tmp_path, monkeypatch):
    def compile_eagerly(net, strict):
        return compile_blocks(net, strict, backend="eager")

    monkeypatch.setattr(train, "compile_blocks", compile_eagerly)
    bench = made_up_bench(tmp_path)
    options = TrainingOptions(compile=True)
    contestant = Training(bench_experiment("tiny", 4), options, CPU)
    bench.prepare(contestant)
    assert contestant.report.graphs > 0
    assert f"{contestant.report.graphs} compiled graphs, 0 eager" in contestant.columns["note"]


def test_checkpointing_is_compared(tmp_path):
    record = run_bench(replace(QUICK, what=("checkpointing",), repeats=1), tmp_path, say=silent)
    worth = [r for r in record.rows if r["metric"] == "worth"]
    assert [r["option"] for r in worth] == [
        "checkpointing, all recomputed",
        "checkpointing, 2 widths kept",
    ]


def test_a_fresh_process_reaches_its_first_update(monkeypatch, tmp_path):
    contestant = FreshProcess("tiny", bench_experiment("tiny", 4), TrainingOptions(), CPU)
    contestant.prepare()
    contestant.call()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such thing\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match="did not reach its first update: no such thing"):
        contestant.call()


def test_targets_are_decided_by_their_rows():
    assert len(set(TARGETS)) == len(TARGETS)
    columns = {"what": "train", "model": "U-ViT-S/2", "precision": "bf16", "impl": "ours"}
    columns.update(batch=128, note="fine")
    rows = [
        bench_row(columns, "speedup", 1.75, "x"),
        bench_row(columns, "flops_per_second", 0.4 * 790e12, "FLOP/s"),
    ]
    found = [t for t in check_targets(rows, "cuda") if t["measured"] is not None]
    assert [(t["met"], t["measured"]) for t in found] == [(True, 1.75), (False, pytest.approx(0.4))]
    assert all(
        "needs a CUDA" in t["note"] for t in check_targets([], "cpu") if t["device"] != "cpu"
    )


def session_arguments(tmp_path, **more):
    "Arguments of the GPU session."
    defaults = {"out": tmp_path, "peer": "", "budget": 1500.0, "rehearse": True, "device": "cpu"}
    return types.SimpleNamespace(**{**defaults, **more})


def test_a_killed_session_resumes(tmp_path, monkeypatch, capsys):
    tried = []

    def run_step(step, args, seconds):
        tried.append(step.name)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return {"status": "ok", "seconds": 0.0, "found": {}}

    monkeypatch.setattr(gpu_session, "run_step", run_step)
    with pytest.raises(KeyboardInterrupt):
        gpu_session.run_session(session_arguments(tmp_path))
    assert list(json.loads((tmp_path / "session.json").read_text())) == ["certify"]
    gpu_session.run_session(session_arguments(tmp_path))
    assert tried[1:3] == ["compare_s2", "compare_s2"] and len(tried) == 6


def test_a_session_starts_only_what_can_be_done(tmp_path, capsys):
    done = gpu_session.run_session(session_arguments(tmp_path, rehearse=False, budget=1.0))
    assert {d["status"] for d in done.values()} == {"not run: too little time was left"}


def test_a_step_that_hangs_is_stopped(tmp_path):
    step = gpu_session.STEPS[1]
    assert gpu_session.run_step(step, session_arguments(tmp_path), 0.2)["status"].startswith("stop")


def test_steps_of_a_session(tmp_path, capsys):
    for name in ("compare_s2", "sample_h2"):
        assert gpu_session.main(["--rehearse", "--step", name, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "compare_s2.json").read_text(encoding="utf-8"))
    assert any("attention" in name for name in found["attention kernels of ours"])
    assert not found["errors"] and {"train", "sample"} <= {r["what"] for r in found["rows"]}


def test_quick_measures_a_bit_of_everything(tmp_path):
    record = run_bench(replace(QUICK, what=(), repeats=1), tmp_path, "uvit-repro bench", silent)
    assert record.info["status"] == "ok" and record.info["command"] == "uvit-repro bench"
    assert {"machine", "train", "sample", "features", "data"} == {r["what"] for r in record.rows}


def test_a_network_without_labels_is_built():
    "The smoke protocol drops labels; the network of CIFAR-10 has none to drop."
    exp = bench_experiment("U-ViT-S/2")
    assert exp.model.condition == "none"
    assert sum(p.numel() for p in bench_network(exp).parameters()) == 44_255_328
