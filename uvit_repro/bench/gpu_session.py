"""The first 25 minutes on one GPU, recorded step by step; rerun to resume."""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path

import torch

from uvit_repro.bench.contestants import H2, L2, S2, Options, Training
from uvit_repro.bench.peer import Peer, PeerTraining
from uvit_repro.bench.run import Settings, run_bench
from uvit_repro.config import experiment, project_root
from uvit_repro.data.files import write_json
from uvit_repro.runs.certificate import certificate, golden_forward
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.experiment import run_experiment


def certify(args: argparse.Namespace, seconds: float) -> dict:
    "Compare outputs, updates and samples with the released code's, then run the GPU tests."
    import pytest

    tests = project_root() / "tests" / "test_speed.py"
    rows = golden_forward("uvit_unconditional") if args.rehearse else certificate(args.device)
    return {"certificate": rows, "exit code of the GPU tests": int(pytest.main([str(tests)]))}


def benchmark(args: argparse.Namespace, seconds: float, **settings) -> dict:
    "Time bf16 training or sampling against the released code; each record has its own folder."
    sizes = {"quick": True, "repeats": 1} if args.rehearse else {"batch": (128,), "repeats": 6}
    settings.update(sizes, device=args.device, peer=args.peer, precision=("bf16",))
    bench = run_bench(Settings(budget=seconds, **settings), args.out)
    return {"folder": bench.folder.name, "errors": bench.info["errors"], "rows": bench.rows}


def attention_kernels(contestant) -> list:
    "Names of the operations and kernels of attention in one call, the slowest first."
    contestant.prepare()
    contestant.call()
    with torch.profiler.profile() as profile:
        contestant.call()
        contestant.loss.item()  # waits for the device
    found = [
        e for e in profile.key_averages() if re.search("attention|flash|fmha|sdpa|softmax", e.key)
    ]
    found.sort(key=lambda e: -(e.self_device_time_total or e.self_cpu_time_total))
    return [e.key for e in found[:8]]


def compare_s2(args: argparse.Namespace, seconds: float) -> dict:
    "Compare S/2 with the released code, including the attention kernels of both."
    result = benchmark(args, seconds - 30, models=(S2,), what=("train", "sample"))
    size = ("tiny", 4) if args.rehearse else (S2, 128)
    ours = Training(*size, Options("bf16"), pick_device(args.device))
    pair = {"ours": ours}
    if args.peer:
        pair["released"] = PeerTraining(Peer(args.peer), ours)
    return {**result, "kernels": {name: attention_kernels(c) for name, c in pair.items()}}


def first_updates(args: argparse.Namespace, seconds: float) -> dict:
    "The first 2,500 updates of protocol gpu, adopted and without skips, with samples to look at."
    protocol, short = "gpu", {"n_steps": 2500, "keep_checkpoint": True}
    if args.rehearse:
        protocol, short = "smoke", {}
    found = {}
    for skip in ("concat", "none"):
        exp = experiment(protocol, seed=10, skip=skip, device=args.device, **short)
        run = run_experiment(exp, args.out)
        found[run.folder.name] = run.info.get("training")
    return found


STEPS = {  # name: work, minutes predicted on one H200
    "certify": (certify, 3),
    "compare_s2": (compare_s2, 4),
    "train_large": (partial(benchmark, models=(L2, H2), what=("train",)), 5),
    "sample_h2": (partial(benchmark, models=(H2,), what=("sample", "checkpointing")), 6),
    "first_updates": (first_updates, 7),
}


def run_session(args: argparse.Namespace) -> dict:  # name of a step -> what became of it
    "Every step that is not done yet, inside the session's budget; one that fails is recorded."
    path, begin = args.out / "session.json", time.perf_counter()
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in [n for n in STEPS if done.get(n, {}).get("status") != "ok"]:
        work, minutes = STEPS[name]
        start = time.perf_counter()
        left = args.budget - (start - begin)
        print(f"{name}: {minutes} min predicted, {left / 60:.1f} min left", flush=True)
        done[name] = {"status": "not run: too little time was left"}
        if left > 30 * minutes:  # half of what is predicted
            try:
                found = work(args, min(60 * minutes, left))
                done[name] = {"status": "ok", "found": found}
            except Exception as e:
                done[name] = {"status": f"{type(e).__name__}: {e}"}
            done[name]["seconds"] = time.perf_counter() - start
        write_json(path, done)
        print(f"  {done[name]['status']}", flush=True)
    return done


def main(argv: list = None) -> int:
    "Run the session."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/runs/gpu-session"))
    parser.add_argument("--peer", default="", help="a checkout of the released U-ViT")
    parser.add_argument("--budget", type=float, default=1500, help="seconds (default: 1500)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args(argv)
    args.device = "cpu" if args.rehearse else "auto"
    args.out.mkdir(parents=True, exist_ok=True)
    return int(any(step["status"] != "ok" for step in run_session(args).values()))
