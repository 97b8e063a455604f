"""The first 25 minutes on one GPU: steps with budgets, recorded one by one; rerun to resume."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from uvit_repro.bench.contestants import Training, TrainingOptions, bench_experiment
from uvit_repro.bench.peer import Peer, PeerTraining
from uvit_repro.bench.run import Settings, run_bench
from uvit_repro.bench.targets import H2, L2, S2
from uvit_repro.config import experiment, project_root
from uvit_repro.data.files import write_json
from uvit_repro.runs.certificate import certificate, golden_forward
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.experiment import run_experiment

COMMAND = (sys.executable, "-m", "uvit_repro.bench.gpu_session")


def certify(args: argparse.Namespace) -> dict:
    "Outputs, updates and samples beside the released code's, and the tests that need a GPU."
    import pytest

    device = pick_device(args.device)
    rows = golden_forward("uvit_unconditional") if args.rehearse else certificate(device)
    tests = sorted((project_root() / "tests").glob("test_*.py"))
    files = [str(p) for p in tests if "mark.gpu" in p.read_text(encoding="utf-8")]
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *files]) if files else "no tests"
    return {"certificate": rows, "exit code of the GPU tests": code}


def benchmark(args: argparse.Namespace, **settings) -> dict:
    "A benchmark in bf16 beside the released code; its record lies in a folder of its own."
    sizes = {"quick": True, "repeats": 1} if args.rehearse else {"batch": (128,), "repeats": 6}
    settings.update(sizes, device=args.device, peer=args.peer, budget=0.85 * args.budget)
    record = run_bench(Settings(precision=("bf16",), guided=False, **settings), args.out)
    return {"folder": record.folder.name, "errors": record.info["errors"], "rows": record.rows}


def attention_kernels(contestant) -> list:
    "Names of the operations and kernels of attention in one call, the slowest first."
    contestant.prepare()
    contestant.call()
    with torch.profiler.profile() as profile:
        contestant.call()
        contestant.loss.item()  # waits for the device
    found = [e for e in profile.key_averages() if re.search("attention|flash|fmha|sdpa", e.key)]
    found.sort(key=lambda e: -(e.self_device_time_total or e.self_cpu_time_total))
    return [e.key for e in found[:8]]


def compare_s2(args: argparse.Namespace) -> dict:
    "S/2 beside the released code, and the attention kernels of both."
    result = benchmark(args, models=(S2,), what=("train", "sample"))
    exp = bench_experiment(*(("tiny", 4) if args.rehearse else (S2, 128)))
    ours = Training(exp, TrainingOptions(precision="bf16"), pick_device(args.device))
    result["attention kernels of ours"] = attention_kernels(ours)
    if args.peer:
        theirs = PeerTraining(Peer(args.peer), ours)
        result["attention kernels of the released code"] = attention_kernels(theirs)
    return result


def first_updates(args: argparse.Namespace) -> dict:
    "The first 2,500 updates of protocol gpu, adopted and without skips, with samples to look at."
    protocol, short = "gpu", {"n_steps": 2500, "keep_checkpoint": True}
    if args.rehearse:
        protocol, short = "smoke", {}
    found = {}
    for skip in ("concat", "none"):
        exp = experiment(protocol, seed=10, skip=skip, device=args.device, **short)
        run = run_experiment(exp, args.out)
        shutil.copy(run.folder / "samples.png", args.out / f"samples-skip-{skip}.png")
        found[run.exp.run_id] = run.info.get("training")
    return found


@dataclass(frozen=True)
class Step:
    "One part of the session."

    name: str
    work: Callable  # (arguments) -> findings
    minutes: float  # predicted on one H200
    limit: float  # minutes after which it is stopped


STEPS = (
    Step("certify", certify, 3, 4),
    Step("compare_s2", compare_s2, 3.5, 5),
    Step("train_large", partial(benchmark, models=(L2, H2), what=("train",)), 5, 6.5),
    Step("sample_h2", partial(benchmark, models=(H2,), what=("sample", "checkpointing")), 6, 7.5),
    Step("first_updates", first_updates, 7, 10),
)


def run_step(step: Step, args: argparse.Namespace, seconds: float) -> dict:  # of session.json
    "Run a step in a process of its own, which may crash or be stopped alone."
    begin, result = time.perf_counter(), args.out / f"{step.name}.json"
    command = [*COMMAND, "--step", step.name, "--out", str(args.out), "--peer", args.peer]
    command += ["--budget", str(seconds), *(["--rehearse"] if args.rehearse else [])]
    with open(result.with_suffix(".log"), "a", encoding="utf-8") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=seconds).returncode
            status = "ok" if code == 0 else f"failed with exit code {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
    found = json.loads(result.read_text(encoding="utf-8")) if status == "ok" else None
    return {"status": status, "seconds": time.perf_counter() - begin, "found": found}


def run_session(args: argparse.Namespace) -> dict:  # name of a step -> what became of it
    "Every step that is not done yet, inside the session's budget."
    path, begin = args.out / "session.json", time.perf_counter()
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for step in STEPS:
        left = args.budget - (time.perf_counter() - begin)
        if done.get(step.name, {}).get("status") == "ok":
            continue
        print(f"{step.name}: {step.minutes:g} min predicted, {left / 60:.1f} min left", flush=True)
        done[step.name] = {"status": "not run: too little time was left"}
        if args.rehearse or left > 30 * step.minutes:  # half of what is predicted
            done[step.name] = run_step(step, args, min(60 * step.limit, left))
        write_json(path, done)
        print(f"  {done[step.name]['status']}", flush=True)
    return done


def main(argv: list = None) -> int:
    "Run the session, or one step of it."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/runs/gpu-session"))
    parser.add_argument("--peer", default="", help="a checkout of the released U-ViT")
    parser.add_argument("--budget", type=float, default=1500, help="seconds (default: 1500)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--detach", action="store_true", help="run in the background")
    parser.add_argument("--step", choices=[s.name for s in STEPS], help="only this one")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.device = "cpu" if args.rehearse else "auto"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        work = {s.name: s.work for s in STEPS}[args.step]
        write_json(args.out / f"{args.step}.json", work(args))
        return 0
    if args.detach:
        again = [*COMMAND, *(a for a in argv if a != "--detach")]
        with open(args.out / "session.log", "a", encoding="utf-8") as log:
            subprocess.Popen(again, stdout=log, stderr=log, start_new_session=True)
        print(f"started: see session.log and session.json in {args.out}")
        return 0
    return int(any(step["status"] != "ok" for step in run_session(args).values()))


if __name__ == "__main__":
    sys.exit(main())
