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
    Options,
    Start,
    Training,
    bench_experiment,
    initial_network,
)
from uvit_repro.bench.peer import OutputsDiffer, Peer, PeerTraining, check_outputs
from uvit_repro.bench.results import load_bench, newest, publish_bench, speed_table
from uvit_repro.bench.run import Bench, Settings, run_bench
from uvit_repro.config import ParameterError
from uvit_repro.runs.execution import compile_blocks
from uvit_repro.runs.timing import interleaved, paired_ratio

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

    def sample(self, x, steps, eps):
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
    "A checkout; its modules are forgotten afterwards."
    before = set(sys.modules)
    for name, text in CHECKOUT.items():
        path = tmp_path / "peer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    yield tmp_path / "peer"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("libs", "sde", "utils", "dpm_solver_pytorch"):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project, so that only this test's benchmarks are found."
    monkeypatch.setenv("UVIT_REPRO_ROOT", str(tmp_path))
    return tmp_path


class Sleeper(Contestant):
    "A contestant that costs nothing, or fails."

    def __init__(self, name, error=None):
        self.model, self.error, self.calls = name, error, 0
        self.columns = {"what": "train", "model": name, "batch": 4, "option": "", "impl": "ours"}
        self.columns.update(precision="fp32", note="")

    def call(self):
        self.calls += 1
        if self.error:
            raise self.error


def made_up_bench(monkeypatch, *sleepers, **settings) -> Bench:
    "A benchmark of sleepers, without ceilings."
    bench = Bench(replace(QUICK, **settings), say=silent)
    monkeypatch.setattr(bench, "measure_ceilings", lambda: None)
    monkeypatch.setattr(bench, "wanted", lambda: [{"fp32": sleeper} for sleeper in sleepers])
    return bench


def test_contestants_take_turns():
    seen = []
    calls = {n: (lambda n=n: seen.append(n)) for n in "abc"}
    *_, times = interleaved(calls, repeats=3, min_seconds=0)
    assert "".join(seen) == "abc" * 3
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_do_not_see_drift():
    drift = np.geomspace(1, 10, 21)  # ten times slower at the end
    ratio = paired_ratio(3 * drift, drift)
    assert (ratio.median, ratio.low, ratio.high, ratio.n) == pytest.approx((3, 3, 3, 21))


def test_a_budget_is_kept_inside_a_job(project, monkeypatch):
    "The record holds the repetitions that were finished; later jobs are named as left."
    slow, late = Sleeper("slow"), Sleeper("late")
    slow.slow = True
    bench = made_up_bench(monkeypatch, slow, late, quick=False, repeats=9)
    monkeypatch.setattr(bench, "out_of_time", lambda: slow.calls >= slow.warmup + 2)
    bench.run()
    df = load_bench()
    assert df[df.metric == "seconds"].repeats.tolist() == [2.0]
    assert bench.info["left"] == ["train late 4"] and not late.calls


def test_a_failed_job_does_not_stop_the_others(project, monkeypatch):
    bad, good = Sleeper("bad", torch.OutOfMemoryError("too large")), Sleeper("good")
    bench = made_up_bench(monkeypatch, bad, good)
    bench.run()
    assert bench.info["errors"] == {"train bad 4": "OutOfMemoryError: too large"}
    assert [r["model"] for r in bench.rows if r["metric"] == "seconds"] == ["good"]


def test_a_killed_benchmark_can_be_published(project, monkeypatch):
    "Its record, as the last finished repetition left it."
    sleeper = Sleeper("U-ViT-S/2")
    sleeper.columns["option"] = 'a, "b"'
    bench = made_up_bench(monkeypatch, sleeper)
    bench.run()  # and the process ends here
    publish_bench(bench.folder)
    info = json.loads((bench.folder / "bench.json").read_text(encoding="utf-8"))
    assert (
        info["status"] == "running" and len(info["times"]['train U-ViT-S/2 4 a, "b"']["fp32"]) == 2
    )
    df = load_bench(project / "nowhere")
    assert df.status[0] == "running" and df.option[0] == 'a, "b"' and df.repeats[0] == 2
    bench.write(status="failed", error="it broke")
    with pytest.raises(ValueError, match="not evidence"):
        publish_bench(bench.folder)


def test_an_interruption_is_recorded(project, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run_job", stop)
    with pytest.raises(KeyboardInterrupt):
        run_bench(QUICK, say=silent)
    df = load_bench()
    assert set(df.status) == {"interrupted"} and {"machine"} == set(df.what)


def test_a_damaged_record_is_left_out(project, monkeypatch):
    bench = made_up_bench(monkeypatch)
    (bench.folder / "bench.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="left out"):
        assert not len(load_bench())


def test_published_records_load(tmp_path):
    "Those of the first edition, with the columns and values that the report shows."
    df = load_bench(tmp_path)
    assert "matrix" not in set(df.attention) and "math" in set(df.attention)
    table = speed_table(newest(df))
    row = table[(table.what == "train") & (table.precision == "bf16")].iloc[0]
    assert row["over released code"] == "2.10x [2.00, 2.14]"
    assert row["share of matrix rate"] == "77 %" and row.benchmark.endswith("T140458")


def test_released_code_beside_ours(checkout, project, capsys):
    path = list(sys.path)
    peer = Peer(checkout)
    assert peer.attention == "made up" and sys.path == path
    rows = check_outputs(peer, "tiny", CPU)
    assert [r["metric"] for r in rows] == ["max_difference_output", "max_difference_images"]
    bench = run_bench(replace(QUICK, what=("train", "sample"), peer=str(checkout)), say=silent)
    assert "printed" not in capsys.readouterr().out
    df = load_bench()
    speedups = df[df.metric == "speedup"]
    assert speedups.what.tolist() == ["train", "sample"]
    times = bench.info["times"]["train tiny 4"]
    ratios = np.array(times["released"]) / times["fp32"]
    assert speedups.value.iloc[0] == pytest.approx(np.median(ratios))
    assert bench.info["peer"].startswith("sha256 of libs/uvit.py ")


def test_released_step_trains(checkout):
    theirs = PeerTraining(Peer(checkout), Training("tiny", 16, Options(), CPU))
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
        ("libs/uvit.py", "OFFSET = 0.0", "OFFSET = 1e-3", "output differ"),
        ("dpm_solver_pytorch.py", "x, steps)\n", "x, steps) + 1\n", "images differ"),
    ],
)
def test_other_outputs_end_without_a_ratio(checkout, project, file, old, new, message):
    (checkout / file).write_text(CHECKOUT[file].replace(old, new), encoding="utf-8")
    with pytest.raises(OutputsDiffer, match=f"{message}.*nothing was timed"):
        run_bench(replace(QUICK, peer=str(checkout)), say=silent)
    df = load_bench()
    assert set(df.what) == {"machine"} and set(df.status) == {"failed"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"what": ("features",)}, "allowed are train, sample, checkpointing, start"),
        ({"models": ("U-ViT-S/8",)}, "not released"),
        ({"peer": "."}, "git clone https://github.com/baofff/U-ViT"),
        ({"device": "cuda:99"}, "device = 'cuda:99'"),
        ({"precision": ("int8",)}, "allowed are fp32, bf16, fp16"),
    ],
    ids=str,
)
def test_impossible_requests_say_what_is_allowed(given, message, tmp_path):
    with pytest.raises(ParameterError, match=message):
        run_bench(Settings(**{"device": "cpu", **given}), tmp_path, say=silent)
    assert not list(tmp_path.iterdir())


def test_compiled_contestants_report_their_graphs(project, monkeypatch):
    def compile_eagerly(net, strict):
        return compile_blocks(net, strict, backend="eager")

    monkeypatch.setattr(train, "compile_blocks", compile_eagerly)
    contestant = Training("tiny", 4, Options(compile=True), CPU)
    made_up_bench(monkeypatch).prepare(contestant)
    assert contestant.compiled.graphs > 0
    assert f"{contestant.compiled.graphs} compiled graphs, 0 eager" in contestant.columns["note"]


def test_options_are_ablated_one_at_a_time(project):
    bench = run_bench(replace(QUICK, what=("checkpointing",), repeats=1), "", "a command", silent)
    worth = [r["option"] for r in bench.rows if r["metric"] == "worth"]
    assert worth == ["checkpointing, all recomputed", "checkpointing, 2 widths kept"]
    assert bench.info["status"] == "ok" and bench.info["command"] == "a command"


def test_a_fresh_process_reaches_its_first_update(monkeypatch, tmp_path):
    start = Start("tiny", 4, Options(), CPU)
    start.call()
    with pytest.raises(Exception, match="non-zero exit status"):
        Start("tiny", 4, Options(attention="none such"), CPU).call()


def test_a_network_without_labels_is_built():
    "The smoke protocol drops labels; the network of CIFAR-10 has none to drop."
    assert bench_experiment("U-ViT-S/2").model.condition == "none"
    assert sum(p.numel() for p in initial_network("U-ViT-S/2").parameters()) == 44_255_328


def session_arguments(tmp_path, **more):
    "Arguments of the GPU session."
    defaults = {"out": tmp_path, "peer": "", "budget": 1500.0, "rehearse": True, "device": "cpu"}
    return types.SimpleNamespace(**{**defaults, **more})


def test_a_session_goes_on_after_failures_and_resumes(tmp_path, monkeypatch, capsys):
    tried = []

    def work(name):
        def step(args, seconds):
            tried.append(name)
            if tried == ["a"]:
                raise RuntimeError("no")
            if tried == ["a", "b"]:
                raise KeyboardInterrupt
            return {}

        return step, 1

    monkeypatch.setattr(gpu_session, "STEPS", {name: work(name) for name in "abc"})
    with pytest.raises(KeyboardInterrupt):
        gpu_session.run_session(session_arguments(tmp_path))
    found = json.loads((tmp_path / "session.json").read_text(encoding="utf-8"))
    assert [step["status"] for step in found.values()] == ["RuntimeError: no"]
    done = gpu_session.run_session(session_arguments(tmp_path))
    assert "".join(tried) == "ababc" and {d["status"] for d in done.values()} == {"ok"}


def test_a_session_starts_only_what_can_be_done(tmp_path, capsys):
    done = gpu_session.run_session(session_arguments(tmp_path, budget=1.0))
    assert {d["status"] for d in done.values()} == {"not run: too little time was left"}


def test_a_session_is_rehearsed(tmp_path, checkout, capsys):
    "All five steps at tiny size."
    out = tmp_path / "session"
    assert gpu_session.main(["--rehearse", "--out", str(out), "--peer", str(checkout)]) == 0
    done = json.loads((out / "session.json").read_text(encoding="utf-8"))
    assert set(done) == set(gpu_session.STEPS)
    found = done["compare_s2"]["found"]
    assert all(found["kernels"].values()) and len(found["kernels"]) == 2
    assert {"outputs", "train", "sample"} <= {row["what"] for row in found["rows"]}
