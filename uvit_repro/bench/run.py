"""Benchmarks: contestants timed in turn in one process, inside a budget, recorded as they come."""

import gc
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch

from uvit_repro.bench.contestants import (
    S2,
    Contestant,
    Options,
    Sampling,
    Start,
    Training,
    bench_experiment,
)
from uvit_repro.bench.peer import OutputsDiffer, Peer, PeerSampling, PeerTraining, check_outputs
from uvit_repro.bench.results import NUMBERS, TEXTS, bench_row
from uvit_repro.config import ParameterError
from uvit_repro.data.files import write_atomic, write_json
from uvit_repro.runs import timing
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.execution import AUTOCAST
from uvit_repro.runs.records import conditions, runs_root

CHOICES = {"what": ("train", "sample", "checkpointing", "start"), "precision": tuple(AUTOCAST)}
ABLATIONS = {  # name: fields of Options
    "checkpointing, all recomputed": {"checkpoint": True},
    "checkpointing, 2 widths kept": {"checkpoint": True, "budget": 2.0},
    "float32": {"precision": "fp32"},
    "attention as two products": {"attention": "math"},
    "compiled": {"compile": True},
    "not compiled": {"compile": False},
    "bf16 residual": {"residual": "bfloat16"},
}


@dataclass(frozen=True)
class Settings:
    "What a benchmark is asked to do; zero and empty mean: by the device."

    what: tuple = ("train", "sample")  # of CHOICES
    models: tuple = (S2,)
    batch: tuple = ()  # of training; empty: 8 on a CPU, 8 and 128 on a GPU
    images: int = 0  # of a set of samples; 0: 8 on a CPU, 500 on a GPU
    nfe: int = 0  # network evaluations per image; 0: 10 on a CPU, 50 on a GPU
    precision: tuple = ("fp32", "bf16")
    device: str = "auto"
    repeats: int = 10  # timed repetitions; of what takes seconds: a third of them
    peer: str = ""  # a checkout of the released code
    ablate: bool = False  # change one option of training at a time
    quick: bool = False  # a tiny model, seconds
    budget: float = 0.0  # seconds; 0: none


def check_settings(s: Settings, device: torch.device) -> Settings:
    "Fill in what depends on the device. Raises `ParameterError` for impossible settings."
    if s.quick:
        s = replace(s, models=("tiny",), batch=(4,), images=4, nfe=3, repeats=min(s.repeats, 3))
    for name, allowed in CHOICES.items():
        if wrong := set(getattr(s, name)) - set(allowed):
            raise ParameterError(f"{name} = {min(wrong)!r}: allowed are {', '.join(allowed)}")
    for model in s.models:
        bench_experiment(model)
    batch, images, nfe = ((8, 128), 500, 50) if device.type == "cuda" else ((8,), 8, 10)
    return replace(s, batch=s.batch or batch, images=s.images or images, nfe=s.nfe or nfe)


class Bench:
    "One benchmark and its record, which is complete on disk up to the last repetition."

    def __init__(self, s: Settings, out_dir=None, command: str = "", say=print):
        self.device, self.begin, self.say = pick_device(s.device), time.perf_counter(), say
        self.settings = check_settings(s, self.device)
        self.peer = Peer(s.peer) if s.peer else None
        where, now = conditions(self.device), time.gmtime()
        machine = where.get("gpu") or f"{where['cpu'] or 'CPU'} x{where['threads']}"
        self.info = {"machine": machine, "device": self.device.type, "command": command}
        self.info.update(conditions=where, settings=asdict(self.settings), status="running")
        self.info.update(started=time.strftime("%Y-%m-%dT%H:%M:%SZ", now))
        self.info.update(peer=self.peer and self.peer.version, times={}, left=[], errors={})
        name = re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")
        self.folder = runs_root(out_dir) / f"bench-{name}-{time.strftime('%Y%m%dT%H%M%S', now)}"
        self.folder.mkdir(parents=True)
        self.jobs, self.rates = {}, {}
        self.write()

    @property
    def rows(self) -> list:
        return [row for rows in self.jobs.values() for row in rows]

    def write(self, **info) -> None:
        "Write the record, with more about the run."
        self.info.update(info, seconds=time.perf_counter() - self.begin)
        table = pd.DataFrame(self.rows, columns=TEXTS + NUMBERS, dtype=object)
        write_atomic(self.folder / "bench.csv", lambda path: table.to_csv(path, index=False))
        write_json(self.folder / "bench.json", self.info)

    def out_of_time(self) -> bool:
        "Whether the budget is spent."
        return 0 < self.settings.budget < time.perf_counter() - self.begin

    def ours(self, kind: type, model: str, batch: int, **change) -> Contestant:
        "One of our contestants, with changed options."
        options = Options(self.settings.precision[-1], nfe=self.settings.nfe)
        return kind(model, batch, replace(options, **change), self.device)

    def versus(self, kind: type, released: type, model: str, batch: int) -> dict:
        "A job: ours in each precision, and the released code."
        precisions = self.settings.precision
        job = {p: self.ours(kind, model, batch, precision=p) for p in precisions}
        if self.peer:
            job["released"] = released(self.peer, next(iter(job.values())))
        return job

    def ablation(self, model: str, name: str) -> dict:
        "A job: training with and without an option."
        batch = self.settings.batch[-1]
        job = {"with": self.ours(Training, model, batch, **ABLATIONS[name])}
        job["without"] = self.ours(Training, model, batch)
        job["with"].columns["option"] = name
        job["without"].columns["option"] = f"{name}: without it"
        return job

    def wanted(self) -> Iterator[dict]:  # name -> contestant; timed in turn
        "Everything that is asked for."
        s = self.settings
        for model in s.models:
            for batch in s.batch if "train" in s.what else ():
                yield self.versus(Training, PeerTraining, model, batch)
            if "sample" in s.what:
                yield self.versus(Sampling, PeerSampling, model, s.images)
            for name in ABLATIONS:
                if s.ablate or ("checkpointing" in s.what and "checkpointing" in name):
                    yield self.ablation(model, name)
            if "start" in s.what:
                yield {"start": self.ours(Start, model, s.batch[0])}

    def measure_ceilings(self) -> None:
        "What this machine can do at all."
        rows = []
        for p in AUTOCAST if self.device.type == "cuda" else ("fp32", "bf16"):
            self.rates[p] = timing.matmul_rate(self.device, AUTOCAST[p] or torch.float32)
            columns = {"what": "machine", "model": "-", "impl": "ours", "precision": p}
            rows.append(bench_row(columns, "matrix_rate", self.rates[p], "FLOP/s"))
        self.jobs["machine"] = rows

    def prepare(self, c: Contestant) -> float:  # peak bytes of one call on a GPU; 0: not known
        "Build and warm up a contestant; its first calls do not count as memory."
        gc.collect()
        on_gpu = self.device.type == "cuda"
        base = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        c.prepare()
        for _ in range(c.warmup):
            c.call()
        if c.compiled:
            text = f"{c.compiled.graphs} compiled graphs, {c.compiled.fallbacks} eager calls"
            c.columns["note"] = f"{c.columns['note']} {text} {c.compiled.error[:100]}".strip()
        if not on_gpu or not c.flops:
            return 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        c.call()
        return float(torch.cuda.max_memory_allocated(self.device) - base)

    def measured(
        self, name: str, c: Contestant, times: dict, memory: float
    ) -> list:  # of bench.csv
        "Time, images per second, memory, share of the ceiling, ratios to the others."
        t = np.array(times[name])
        rows = [("seconds", timing.spread(t), "s")]
        if c.flops:
            share = c.flops / t / self.rates[c.columns["precision"]]
            rows.append(("images_per_second", timing.spread(c.batch / t), "1/s"))
            rows.append(("mfu", timing.spread(share), "of the matrix rate"))
            if memory:
                rows.append(("peak_memory", memory, "bytes"))
        for other, metric in (("released", "speedup"), ("without", "worth")):
            if other in times and name != other:
                rows.append((metric, timing.paired_ratio(times[other], t), "x"))
        return [bench_row(c.columns, *row) for row in rows]

    def run_job(self, label: str, job: dict) -> None:
        "Compare, build, warm up and time; the record is written after every repetition."
        first, repeats = next(iter(job.values())), self.settings.repeats
        outputs = f"outputs {first.model}"
        if "released" in job and outputs not in self.jobs:
            self.jobs[outputs] = check_outputs(self.peer, first.model, self.device)
        torch.compiler.reset()
        memory = {name: self.prepare(c) for name, c in job.items()}
        calls = {name: c.call for name, c in job.items()}
        how = (-(-repeats // 3), self.device, 0) if first.slow else (repeats, self.device)
        for times in timing.interleaved(calls, *how, stop=self.out_of_time):
            self.info["times"][label] = times
            found = [self.measured(name, c, times, memory[name]) for name, c in job.items()]
            self.jobs[label] = sum(found, [])
            self.write()
        for row in self.jobs.get(label, ()):
            if row["metric"] in ("seconds", "mfu", "peak_memory", "speedup", "worth"):
                self.say(f"  {row['impl']} {row['precision']} {row['metric']} {row['value']:.4g}")

    def run(self) -> None:
        "Every job inside the budget; what fails is recorded and the others go on."
        self.measure_ceilings()
        for job in self.wanted():
            columns = next(iter(job.values())).columns
            label = " ".join(str(columns[n]) for n in ("what", "model", "batch", "option")).strip()
            self.say(f"{label}:")
            try:
                if not self.out_of_time():
                    self.run_job(label, job)
            except OutputsDiffer:
                raise
            except Exception as e:
                self.info["errors"][label] = f"{type(e).__name__}: {e}"
                self.say(f"  failed: {type(e).__name__}: {e}")
            if label not in self.info["errors"] and label not in self.jobs:
                self.info["left"].append(label)
                self.say("  left out: the budget is spent")


def run_bench(
    s: Settings,
    out_dir=None,  # folder of runs; None: results/runs
    command: str = "",  # for the record
    say=print,  # progress
) -> Bench:
    "Run a benchmark and record it. Raises `OutputsDiffer` or `ParameterError`."
    bench = Bench(s, out_dir, command, say)
    try:
        bench.run()
    except BaseException as e:
        status = "failed" if isinstance(e, Exception) else "interrupted"
        bench.write(status=status, error=f"{type(e).__name__}: {e}")
        raise
    bench.write(status="stopped" if bench.info["left"] or bench.info["errors"] else "ok")
    say(f"recorded in {bench.folder}")
    return bench
