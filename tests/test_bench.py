"Benchmarks: times in turn, ratios, records, the released code beside ours (a made-up checkout with its interfaces), commands and exit codes."

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from uvit_repro import bench, cli
from uvit_repro.bench.bench import (
    BENCH_COLUMNS,
    TARGETS,
    How,
    Peer,
    Record,
    Settings,
    Training,
    bench_experiment,
    bench_row,
    check_outputs,
    check_targets,
    interleaved,
    load_bench,
    newest,
    paired_ratio,
    prepare,
    publish_bench,
    run_bench,
    spread,
    verdict,
)
from uvit_repro.config import ParameterError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUICK = Settings(quick=True, device="cpu", repeats=2, warmup=1)

FILES = {  # a checkout with the released layout and interfaces, made of our own parts
    "libs/__init__.py": "",
    "libs/uvit.py": """
from uvit_repro.uvit import UViT as Ours
ATTENTION_MODE = "made up"
print("printed on import")
class UViT(Ours):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio=4., qkv_bias=False, mlp_time_embed=False, num_classes=-1, use_checkpoint=False, conv=True):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth + 1, num_heads, mlp_ratio, qkv_bias, mlp_time_embed, num_classes if num_classes > 0 else None, use_checkpoint=use_checkpoint, conv="after" if conv else "none")
    def forward(self, x, timesteps, y=None): return super().forward(x, timesteps, y) + OFFSET
OFFSET = 0.0
""",
    "sde.py": """
import torch
from absl import logging
class VPSDE: pass
class ScoreModel:
    def __init__(self, nnet, pred, sde): self.nnet = nnet; print("printed when made"); logging.debug("made")
    def noise_pred(self, xt, t, **kw): return self.nnet(xt, t*999, **kw)
def LSimple(model, x0, pred="noise_pred", **kw):
    from uvit_repro.config import DiffusionConfig
    from uvit_repro.diffusion import Diffusion
    t, eps = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)
    return (model.noise_pred(Diffusion(DiffusionConfig()).q_sample(x0, t, eps), t, **kw) - eps).square().flatten(1).mean(1)
""",
    "utils.py": """
import torch
from absl import logging
def get_optimizer(params, name, **kw): return dict(adamw=torch.optim.AdamW)[name](params, **kw)
def get_lr_scheduler(optimizer, name, warmup_steps): return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(s/warmup_steps, 1))
def ema(dest, src, rate):
    for a, b in zip(dest.parameters(), src.parameters()): a.data.mul_(rate).add_((1 - rate)*b.data)
""",
    "dpm_solver_pytorch.py": """
import types, torch
from uvit_repro.config import DiffusionConfig
from uvit_repro.diffusion import Diffusion
from uvit_repro.sample import dpm_solver_fast
class NoiseScheduleVP:
    def __init__(self, schedule): assert schedule == "linear"
def model_wrapper(model, noise_schedule, time_input_type, model_kwargs): return lambda x, t: model(x, t, **model_kwargs)
class DPM_Solver:
    def __init__(self, model_fn, noise_schedule): self.fn = model_fn
    def sample(self, x, steps, eps, adaptive_step_size, fast_version):
        assert eps == 1e-4 and fast_version and not adaptive_step_size
        den = types.SimpleNamespace(diffusion=Diffusion(DiffusionConfig()), both=lambda x, t: (None, self.fn(x, torch.full((len(x),), t))))
        with torch.no_grad(): return dpm_solver_fast(den, x, steps)
""",
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        p = tmp_path / "peer" / name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(text)
    return tmp_path / "peer"


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def test_contestants_take_turns():
    seen = []
    fns = {n: (lambda n=n: seen.append(n)) for n in "abc"}
    out = interleaved(fns, repeats=3, warmup=2, min_seconds=0)
    assert "".join(seen) == "abc" * 5 and {n: len(v) for n, v in out.items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
    }


def test_a_repetition_holds_enough_calls():
    calls, cost = {}, {"a": 0.01, "b": 0.5}

    def timer(fn, n, device):
        calls.setdefault(fn, []).append(n)
        return n * cost[fn]

    out = interleaved({n: n for n in cost}, 2, 0, min_seconds=0.05, timer=timer)
    assert (
        calls == {"a": [1, 5, 5], "b": [1, 1, 1]}
        and np.allclose(out["a"], 0.01)
        and np.allclose(out["b"], 0.5)
    )
    with pytest.raises(ParameterError, match="repeats = 0"):
        interleaved({}, 0)


def test_ratios_of_made_up_times():
    drift = np.geomspace(1, 10, 21)  # ten times slower at the end
    r = paired_ratio(3 * drift, drift)
    assert (r.median, r.low, r.high, r.n) == pytest.approx((3, 3, 3, 21))
    noisy = paired_ratio([1, 2, 3, 4], [1, 1, 1, 1])
    assert (noisy.median, noisy.low, noisy.high, noisy.min, noisy.max) == (2.5, 1.75, 3.25, 1, 4)
    assert (
        verdict(noisy) == "worth 2.50x"
        and verdict(paired_ratio([1] * 4, [2, 2, 2, 4])) == "costs 2.00x"
    )
    assert verdict(spread([0.9, 1.0, 1.1, 1.2])) == "within the spread"


def test_records_survive_a_round_trip_and_an_interruption(tmp_path, monkeypatch):
    e = bench_experiment("tiny")
    rec = Record("Box (9)", "cpu", {"command": "c"}, tmp_path)
    rec.add(
        [
            bench_row(
                "train",
                e,
                "seconds",
                spread([0.1, 0.30000000000000004]),
                "s",
                How(),
                model="tiny",
                option='a, "b"',
            )
        ],
        {"x": [0.1]},
    )
    rec.add([bench_row("train", e, "worth", None, "x", model="tiny", note="not run: no GPU")])
    df = load_bench("runs", tmp_path)
    assert (
        list(df.columns[: len(BENCH_COLUMNS)]) == BENCH_COLUMNS
        and df.value[0] == 0.2
        and df["max"][0] == 0.30000000000000004
        and df.option[0] == 'a, "b"'
        and df.note[1] == "not run: no GPU"
    )
    assert json.loads((rec.folder / "bench.json").read_text())["times"] == {"x": [0.1]} and not len(
        newest(df)
    )
    other = Record("Box (9)", "cpu", {}, tmp_path)
    assert other.folder != rec.folder  # in the same second

    def stop(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_sample", stop)
    with pytest.raises(KeyboardInterrupt):
        run_bench(replace(QUICK, what=("train", "sample")), tmp_path / "b", say=lambda s: None)
    (folder,) = (tmp_path / "b").iterdir()
    df = load_bench("runs", tmp_path / "b")
    assert json.loads((folder / "bench.json").read_text())["status"] == "interrupted" and set(
        df.what
    ) == {"machine", "train"}
    with pytest.raises(ValueError, match="interrupted"):
        publish_bench(folder)
    (folder / "bench.json").write_text("{")
    with pytest.warns(UserWarning, match="left out"):
        assert not len(load_bench("runs", tmp_path / "b"))


def test_publish(tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_REPRO_ROOT", str(tmp_path))
    assert (
        cli.main(
            ["bench", "--quick", "--what", "data", "--device", "cpu", "--repeats", "1", "--publish"]
        )
        == 0
    )
    (run,) = (tmp_path / "results" / "runs").iterdir()
    copy = tmp_path / "results" / "published" / run.name
    assert (copy / "bench.csv").read_bytes() == (run / "bench.csv").read_bytes()
    df = load_bench()
    assert set(df.origin) == {"runs"} and len(load_bench("published")) == len(df) > 2


def test_released_code_beside_ours(checkout, tmp_path, capsys):
    mine = types.ModuleType("utils")
    sys.modules["utils"] = mine
    before, path = dict(sys.modules), list(sys.path)
    try:
        with Peer(checkout) as p:
            assert (
                p.attention == "made up"
                and sys.modules["utils"] is mine
                and "sde" not in sys.modules
                and "libs.uvit" not in sys.modules
            )
            assert set(check_outputs(p, bench_experiment("tiny"), CPU)) == {"output", "images"}
        out = run_bench(
            replace(QUICK, what=("train", "sample"), peer=str(checkout)),
            tmp_path / "runs",
            say=lambda s: None,
        )
        assert sys.modules["utils"] is mine
    finally:
        del sys.modules["utils"]
    new = {k: m for k, m in sys.modules.items() if k not in before}
    assert sys.path == path and not [
        k
        for k, m in new.items()
        if k.partition(".")[0] in ("libs", "sde", "utils", "dpm_solver_pytorch", "absl")
        or str(checkout) in str(getattr(m, "__file__", ""))
    ]
    assert not list(checkout.rglob("__pycache__")) and "printed" not in capsys.readouterr().out
    df = load_bench("runs", tmp_path / "runs")
    got = lambda **k: df[np.logical_and.reduce([df[c] == v for c, v in k.items()])]
    assert (
        len(got(what="train", metric="speedup")) == 2
        and len(got(what="sample", metric="speedup")) == 4
        and (got(what="outputs").value < 1e-4).all()
        and len(got(what="outputs")) == 2
    )
    t = out.info["times"]
    s = got(what="train", metric="speedup", precision="bf16").iloc[0]
    assert s.value == pytest.approx(
        np.median(
            np.array(t["train tiny batch 4 released"]) / np.array(t["train tiny batch 4 bf16"])
        )
    )
    assert (
        out.info["peer"]["version"].startswith("sha256 of libs/uvit.py ")
        and len(got(impl="released", metric="seconds")) == 3
    )


def test_released_step_trains(checkout):
    with Peer(checkout) as p:
        c = bench.PeerTraining(p, bench_experiment("tiny", 16), CPU)
        first = [v.clone() for v in c.raw[0].parameters()]
        ema = [v.clone() for v in c.raw[1].parameters()]
        for _ in range(3):
            c()
    assert (
        np.isfinite(float(c.loss))
        and any(not torch.equal(a, b) for a, b in zip(first, c.raw[0].parameters()))
        and any(not torch.equal(a, b) for a, b in zip(ema, c.raw[1].parameters()))
    )


@pytest.mark.parametrize(
    "file, old, new, says",
    [
        ("libs/uvit.py", "OFFSET = 0.0", "OFFSET = 1e-3", "outputs differ by 0.001"),
        (
            "dpm_solver_pytorch.py",
            "dpm_solver_fast(den, x, steps)",
            "dpm_solver_fast(den, x, steps) + 1",
            "images differ",
        ),
    ],
)
def test_other_outputs_end_without_a_ratio(checkout, tmp_path, capsys, file, old, new, says):
    (checkout / file).write_text(FILES[file].replace(old, new))
    assert (
        cli.main(
            [
                "bench",
                "--quick",
                "--what",
                "train",
                "--device",
                "cpu",
                "--repeats",
                "1",
                "--peer",
                str(checkout),
                "--out",
                str(tmp_path / "runs"),
            ]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert says in err and "nothing was timed" in err and err.count("\n") == 1
    df = load_bench("runs", tmp_path / "runs")
    assert set(df.what) == {"machine"} and set(df.status) == {"failed"}


def test_a_peer_that_can_not_be_imported(checkout, capsys):
    (checkout / "sde.py").write_text("import a_module_that_is_nowhere\n")
    before = set(sys.modules)
    assert cli.main(["bench", "--quick", "--device", "cpu", "--peer", str(checkout)]) == 2
    assert "a_module_that_is_nowhere" in capsys.readouterr().err and not {
        "libs",
        "sde",
        "utils",
        "absl",
    } & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "line, says",
    [
        ("bench --what trian", "allowed are train, sample, features, data, start"),
        ("bench --models U-ViT-S/8", "not among the released ones"),
        ("bench --peer .", "git clone https://github.com/baofff/U-ViT"),
        ("bench --device cuda:99", "device = 'cuda:99'"),
        ("bench --keep -1", "none may be negative"),
        ("bench --images -3", "at least 1"),
        ("bench --compile maybe", "allowed are auto, on, off"),
        ("bench --precision int8", "allowed are fp32, bf16, fp16"),
    ],
)
def test_bad_requests_end_with_one_line(line, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line", ["", "bench --quik", "bench --batch x", "nothing", "bench --budget never"]
)
def test_unreadable_requests(line, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(line.split())
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count("\n") == 1 and "--help" in err


def test_quick_from_a_shell(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "uvit_repro.cli",
            "bench",
            "--quick",
            "--json",
            "--out",
            str(tmp_path),
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    d = json.loads(r.stdout)
    assert (
        d["status"] == "ok"
        and d["command"].startswith("uvit-repro bench --quick")
        and {x["what"] for x in d["rows"]} == {"machine", "train", "sample", "features", "data"}
    )
    assert (
        "matrix products here" in r.stderr
        and (Path(d["folder"]) / "bench.csv").exists()
        and d["conditions"]["threads"] == 1
    )


def test_a_fresh_process_reaches_its_first_update(tmp_path, monkeypatch):
    assert 0.5 < bench.time_start("tiny", 4, "fp32", "cpu", "sdpa", False, None) < 120
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such thing\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match="did not reach its first update: no such thing"):
        bench.time_start("tiny", 4, "fp32", "cpu", "sdpa", False, None)


def test_out_of_memory_is_a_row_not_an_end():
    def make():
        raise torch.OutOfMemoryError("no")

    c, m, why = prepare(make, CPU)
    assert c is None and why == "not run: out of memory on cpu"
    there, secs, _, reasons = bench.contest(
        {"big": make, "small": lambda: lambda: None}, QUICK, CPU
    )
    assert set(there) == set(secs) == {"small"} and list(reasons) == ["big"]


def test_switches_are_really_off():
    c = Training(
        bench_experiment("tiny"),
        CPU,
        How(fused=False, foreach=False, checkpoint=True, keep=1.0, attention="math"),
    )
    c()
    opt = getattr(c.tr.optimizer, "optimizer", c.tr.optimizer)
    assert (
        not opt.param_groups[0]["fused"]
        and type(next(iter(c.tr.emas.values()))).__name__ == "LoopEMA"
        and c.tr.net.mid_block.recompute
        and c.tr.net.mid_block.attn.path == "math"
    )
    on = Training(bench_experiment("tiny"), CPU, How())
    on()
    assert (
        getattr(on.tr.optimizer, "optimizer", on.tr.optimizer).param_groups[0]["fused"]
        and not on.tr.net.mid_block.recompute
    )
    fed = Training(bench_experiment("tiny"), CPU, How(data="device"))
    fed()
    assert torch.isfinite(fed.loss)


def test_every_target_is_answered_by_the_jobs_of_its_machine():
    "The rows that targets read are rows that the listed jobs write: same model, batch, precision."
    for kind in ("cpu", "cuda"):
        s = bench.check_settings(Settings(targets=True), torch.device(kind))
        labels = " | ".join(n for n, _ in bench.list_jobs(s, torch.device(kind), {}))
        for t in (t for t in TARGETS if t["device"] == kind):
            r = t["row"]
            assert r["precision"] in s.precision and r.get("batch", s.batch[0]) in (
                *s.batch,
                s.images,
            ), t["target"]
            assert f"{r['what']} {r['model']}" in labels or (
                r["option"].startswith("checkpointing") and "checkpointing H/2" in labels
            ), t["target"]
    assert all(
        t["met"] is None and t["note"].startswith("not run")
        for t in check_targets([], "cpu", False)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quick_on_a_gpu(tmp_path):
    rec = run_bench(replace(QUICK, device="cuda", ablate=True), tmp_path, say=lambda s: None)
    assert (
        rec.info["status"] == "ok"
        and any(r["metric"] == "peak_memory" and r["value"] > 0 for r in rec.rows)
        and any(r.get("option") == "CUDA graph" and r.get("value") for r in rec.rows)
    )
