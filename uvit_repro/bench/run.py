"""Benchmarks: contestants timed in turn in one process, inside a budget, recorded as they come."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch

from uvit_repro.bench.contestants import (
    Contestant,
    Features,
    Feeding,
    FreshProcess,
    Sampling,
    Training,
    TrainingOptions,
    bench_experiment,
)
from uvit_repro.bench.peer import OutputsDiffer, Peer, PeerSampling, PeerTraining, check_outputs
from uvit_repro.bench.results import Record, bench_row, row_line
from uvit_repro.bench.targets import H2, L2, S2, check_targets
from uvit_repro.config import ParameterError
from uvit_repro.runs import timing
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.execution import AUTOCAST, attention_choice, wants_compile
from uvit_repro.runs.records import conditions

CHOICES = {
    "what": ("train", "sample", "features", "data", "checkpointing", "start"),
    "precision": tuple(AUTOCAST),
    "compile": ("auto", "on", "off"),
}


@dataclass(frozen=True)
class Settings:
    "What a benchmark is asked to do; zero and empty mean: by the device."

    what: tuple = ()  # of CHOICES; empty: train and sample (quick: features and data, too)
    models: tuple = (S2,)
    batch: tuple = ()  # of training; empty: 8 on a CPU, 8 and 128 on a GPU
    images: int = 0  # of a set of samples; 0: 8 on a CPU, 500 on a GPU
    nfe: int = 0  # network evaluations per image; 0: 10 on a CPU, 50 on a GPU
    guided: bool = True  # sampling also with guidance, where the model has a null condition
    precision: tuple = ("fp32", "bf16")
    device: str = "auto"
    repeats: int = 10  # timed repetitions; sampling: a third of them
    compile: str = "auto"  # auto: as training decides
    peer: str = ""  # a checkout of the released code
    ablate: bool = False  # turn each optimisation off, one at a time
    targets: bool = False  # run what the targets of this machine need
    quick: bool = False  # a tiny model, seconds
    budget: float = 0.0  # seconds; 0: none


def check_settings(s: Settings, device: torch.device) -> Settings:
    "Fill in what depends on the device. Raises `ParameterError` for impossible settings."
    gpu = device.type == "cuda"
    batch, images, nfe = ((8, 128), 500, 50) if gpu else ((8,), 8, 10)
    if s.quick:
        s = replace(s, models=("tiny",), batch=(4,), images=4, nfe=3, repeats=min(s.repeats, 3))
    if s.targets:
        precision = ("bf16",) if gpu else ("fp32", "bf16")
        s = replace(s, precision=precision, batch=batch[-1:], guided=False)
    s = replace(s, what=s.what or CHOICES["what"][: 4 if s.quick else 2])
    for name, allowed in CHOICES.items():
        given = getattr(s, name)
        given = (given,) if isinstance(given, str) else given
        if not given or not set(given) <= set(allowed):
            text = ",".join(given)
            raise ParameterError(f"{name} = {text!r}: allowed are {', '.join(allowed)}")
    s = replace(s, batch=s.batch or batch, images=s.images or images, nfe=s.nfe or nfe)
    if min(*s.batch, s.images, s.nfe, s.repeats) < 1:
        raise ParameterError("batch, images, nfe and repeats must be at least 1")
    if "fp16" in s.precision and not gpu:
        raise ParameterError("precision = 'fp16' needs a GPU; try fp32,bf16")
    for model in s.models:
        bench_experiment(model)
    return s


@dataclass(frozen=True)
class Option:
    "An optimisation: what is changed, with and without it."

    name: str
    on: dict  # fields of TrainingOptions
    off: dict
    what: tuple = (Training,)


BOTH = (Training, Sampling)
CHECKPOINTING = (
    Option("checkpointing, all recomputed", {"checkpoint": True}, {}),
    Option("checkpointing, 2 widths kept", {"checkpoint": True, "budget": 2.0}, {}),
)
ABLATIONS = (
    Option("bf16", {"precision": "bf16"}, {"precision": "fp32"}, BOTH),
    Option("fused attention", {"attention": "sdpa"}, {"attention": "math"}, BOTH),
    Option("compile", {"compile": True}, {"compile": False}, BOTH),
    Option("fused AdamW", {"fused": True}, {"fused": False}),
    *CHECKPOINTING,
)


@dataclass(frozen=True)
class Job:
    "Contestants that are timed in turn."

    label: str
    model: str
    contestants: dict  # name -> Contestant; special names: released, without
    repeats: int


def verdict(ratio) -> str:  # of a Spread: time without something over time with it
    "In words; decided where three quarters of the pairs agree."
    if ratio.low > 1:
        return f"worth {ratio.median:.2f}x"
    return f"costs {1 / ratio.median:.2f}x" if ratio.high < 1 else "within the spread"


def contestant_rows(c: Contestant, name: str, times: dict, memory, rate: float) -> list:
    "Time, images per second, memory, share of the ceiling, ratios to the others."
    t = np.array(times[name])
    rows = [("seconds", timing.spread(t), "s")]
    if c.items:
        rows.append((f"{c.unit}_per_second", timing.spread(c.items / t), "1/s"))
    if memory:
        rows.append(("peak_memory", float(memory), "bytes"))
    if c.flops:
        rows.append(("flops_per_second", timing.spread(c.flops / t), "FLOP/s"))
        rows.append(("mfu", timing.spread(c.flops / t / rate), "of the matrix rate"))
    if "released" in times and name != "released":
        rows.append(("speedup", timing.paired_ratio(times["released"], t), "x"))
    found = [bench_row(c.columns, *row) for row in rows]
    if "without" in times and name != "without":
        ratio = timing.paired_ratio(times["without"], t)
        found.append(bench_row(c.columns, "worth", ratio, "x", note=verdict(ratio)))
    return found


class Bench:
    "One benchmark: its settings, device, released code and record."

    def __init__(self, s: Settings, device: torch.device, record: Record, peer=None, say=print):
        self.settings, self.device, self.record, self.say = s, device, record, say
        self.peer, self.rates, self.start = peer, {}, time.perf_counter()
        self.third = -(-s.repeats // 3)  # repetitions of what takes long

    def out_of_time(self) -> bool:
        "Whether the budget is spent."
        s = self.settings
        return bool(s.budget) and time.perf_counter() - self.start > s.budget

    def options(self, exp, precision: str) -> TrainingOptions:
        "How ours trains and samples under these settings."
        exp = replace(exp, train=replace(exp.train, precision=precision))
        compiled = wants_compile(self.settings.compile, self.device, exp.train.n_steps)
        path = attention_choice(exp, self.device)["path"]
        return TrainingOptions(precision, path, compiled)

    def train_job(self, model: str, batch: int) -> Job:
        "Training updates: ours in each precision, and the released code's."
        exp, s = bench_experiment(model, batch), self.settings
        ours = {p: Training(exp, self.options(exp, p), self.device) for p in s.precision}
        if self.peer:
            ours["released"] = PeerTraining(self.peer, ours[s.precision[0]])
        return Job(f"train {model} batch {batch}", model, ours, s.repeats)

    def sample_job(self, model: str, guided: bool) -> Job:
        "Sets of images: ours in each precision, and the released code's."
        exp, s = bench_experiment(model, self.settings.images), self.settings
        how = self.device, s.nfe, guided
        ours = {p: Sampling(exp, self.options(exp, p), *how) for p in s.precision}
        if self.peer:
            ours["released"] = PeerSampling(self.peer, ours[s.precision[0]])
        return Job(
            f"sample {model} {s.images}x{s.nfe}{' guided' * guided}", model, ours, self.third
        )

    def ablation_job(self, kind: type, model: str, option: Option) -> Job:
        "The same contestant with and without an option."
        s, contestants = self.settings, {}
        exp = bench_experiment(model, s.batch[-1] if kind is Training else s.images)
        more = () if kind is Training else (s.nfe,)
        for name, change in (("with", option.on), ("without", option.off)):
            options = replace(self.options(exp, s.precision[-1]), **change)
            contestants[name] = kind(exp, options, self.device, *more)
            contestants[name].columns["option"] = option.name
        contestants["without"].columns["option"] += ": without it"
        repeats = s.repeats if kind is Training else self.third
        label = f"ablate {kind.__name__.lower()} {model} {option.name}"
        return Job(label, model, contestants, repeats)

    def ablation_jobs(self, model: str) -> Iterator[Job]:
        "One option at a time."
        for option in ABLATIONS if self.settings.ablate else CHECKPOINTING:
            yield from (self.ablation_job(kind, model, option) for kind in option.what)

    def start_job(self, model: str) -> Job:
        "Seconds to the first update of a fresh process."
        s, exp = self.settings, bench_experiment(model, self.settings.batch[0])
        options = self.options(exp, s.precision[-1])
        choices = {replace(options, compile=False), options}
        runs = {str(o.compile): FreshProcess(model, exp, o, self.device) for o in choices}
        return Job(f"start {model}", model, runs, self.third)

    def model_jobs(self, model: str) -> Iterator[Job]:
        "What the settings ask of one model."
        s = self.settings
        if "train" in s.what:
            yield from (self.train_job(model, batch) for batch in s.batch)
        if "sample" in s.what:
            yield self.sample_job(model, False)
            if s.guided and bench_experiment(model).train.p_uncond:
                yield self.sample_job(model, True)
        if "checkpointing" in s.what or s.ablate:
            yield from self.ablation_jobs(model)
        if "start" in s.what:
            yield self.start_job(model)

    def target_jobs(self, batch: int) -> Iterator[Job]:
        "What decides this machine's targets, the cheapest questions first."
        yield self.train_job(S2, batch)
        yield self.sample_job(S2, False)
        if self.device.type == "cuda":
            yield from (self.train_job(model, batch) for model in (L2, H2))
            yield self.sample_job(H2, False)
            yield from self.ablation_jobs(H2)
        yield self.start_job(S2)

    def jobs(self) -> Iterator[Job]:
        "Everything that is asked for."
        s = self.settings
        if s.targets:
            yield from self.target_jobs(s.batch[0])
            return
        for model in s.models:
            yield from self.model_jobs(model)
        if "features" in s.what:
            n = 5000 if self.device.type == "cuda" else 64
            names = ("digits_cnn", "resnet20_cifar10")
            nets = {name: Features(name, n, self.device) for name in names}
            yield Job("features", "", nets, s.repeats)
        if "data" in s.what:
            yield Job("data", "-", {"resident": Feeding(s.batch[-1], self.device)}, s.repeats)

    def measure_ceilings(self) -> None:
        "What this machine can do at all."
        sizes = (256,) if self.settings.quick else None
        for p in AUTOCAST if self.device.type == "cuda" else ("fp32", "bf16"):
            self.rates[p] = timing.matmul_rate(self.device, AUTOCAST[p] or torch.float32, sizes)
        machine = {"what": "machine", "model": "-", "impl": "ours"}
        rows = [
            bench_row(machine, "matrix_rate", rate, "FLOP/s", precision=p)
            for p, rate in self.rates.items()
        ]
        self.record.put("machine", rows, {})
        rates = ", ".join(f"{r / 1e12:.3g} TFLOP/s {p}" for p, r in self.rates.items())
        self.say(f"matrix products here: {rates}")

    def prepare(self, contestant: Contestant) -> int | None:  # peak memory in bytes
        "Build and warm up a contestant; its first calls do not count as memory."
        base, peak = timing.memory_in_use(self.device), None
        contestant.prepare()
        for _ in range(contestant.warmup):
            contestant.call()
        if contestant.flops:
            peak = timing.peak_memory(contestant.call, self.device)
        contestant.note_compilation()
        return None if None in (base, peak) else max(peak - base, 0)

    def run_job(self, job: Job) -> None:
        "Compare, build, warm up and time; the record is written after every repetition."
        label = f"outputs {job.model}"
        if "released" in job.contestants and label not in self.record.jobs:
            rows = check_outputs(self.peer, job.contestants["released"].exp, self.device)
            self.record.put(label, [{**row, "model": job.model} for row in rows], {})
        torch.compiler.reset()
        calls, memory, rows = {}, {}, []
        for name, c in job.contestants.items():
            c.columns.setdefault("model", job.model)
            try:
                memory[name] = self.prepare(c)
                calls[name] = c.call
            except torch.OutOfMemoryError:
                note = f"not run: out of memory on {self.device}"
                rows.append(bench_row(c.columns, "seconds", None, "s", note=note))
                timing.free_memory(self.device)
        fill = 0 if job.repeats < self.settings.repeats else 0.05  # seconds of a repetition
        for times in timing.interleaved(calls, job.repeats, self.device, fill, self.out_of_time):
            rows = [r for r in rows if r["value"] is None]
            for name in calls:
                c = job.contestants[name]
                rate = self.rates.get(c.columns.get("precision"))
                rows += contestant_rows(c, name, times, memory[name], rate)
            self.record.put(job.label, rows, times)
        for row in rows:
            if row["metric"] in ("seconds", "mfu", "peak_memory", "speedup", "worth"):
                self.say(row_line(row))
        if not rows:
            self.record.info["left"].append(job.label)

    def run(self) -> None:
        "Every job inside the budget; what fails is recorded and the others go on."
        self.measure_ceilings()
        for job in self.jobs():
            if self.out_of_time():
                self.record.info["left"].append(job.label)
                continue
            self.say(f"{job.label}:")
            try:
                self.run_job(job)
            except OutputsDiffer:
                raise
            except Exception as e:
                self.record.info["errors"][job.label] = f"{type(e).__name__}: {e}"
                self.say(f"  failed: {type(e).__name__}: {e}")
            timing.free_memory(self.device)


def run_bench(
    s: Settings,
    out_dir=None,  # folder of runs; None: results/runs
    command: str = "",  # for the record
    say=print,  # progress
) -> Record:
    "Run a benchmark and record it. Raises `OutputsDiffer` or `ParameterError`."
    device = pick_device(s.device)
    s, where = check_settings(s, device), conditions(device)
    peer = Peer(s.peer) if s.peer else None
    info = {"command": command, "settings": asdict(s), "conditions": where, "device": device.type}
    info["peer"] = peer and {"version": peer.version, "attention": peer.attention}
    info["machine"] = where.get("gpu") or f"{where['cpu'] or 'CPU'} x{where['threads']}"
    record = Record(info, out_dir)
    try:
        Bench(s, device, record, peer, say).run()
    except BaseException as e:
        status = "failed" if isinstance(e, Exception) else "interrupted"
        record.write(status=status, error=f"{type(e).__name__}: {e}")
        raise
    left, errors = record.info["left"], record.info["errors"]
    if left:
        say(f"budget of {s.budget:g} s spent; not run: {'; '.join(left)}")
    if s.targets:
        record.info["targets"] = check_targets(record.rows, device.type)
        say(pd.DataFrame(record.info["targets"]).to_string(index=False))
    record.write(status="stopped" if left or errors else "ok")
    say(f"recorded in {record.folder}")
    return record
