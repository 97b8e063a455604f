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
    Solver,
    Training,
    TrainingOptions,
    bench_experiment,
)
from uvit_repro.bench.peer import OutputsDiffer, Peer, PeerSampling, PeerTraining, check_outputs
from uvit_repro.bench.results import Record, bench_row, human
from uvit_repro.bench.targets import H2, L2, S2, check_targets
from uvit_repro.config import Experiment, ParameterError
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.execution import choose_attention, wants_compile
from uvit_repro.runs.records import conditions
from uvit_repro.runs.timing import (
    free_memory,
    interleaved,
    matmul_rate,
    memory_bandwidth,
    memory_in_use,
    paired_ratio,
    peak_memory,
    spread,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = {
    "what": ("train", "sample", "checkpointing", "features", "data", "start"),
    "precision": tuple(DTYPES),
    "compile": ("auto", "on", "off"),
    "checkpoint": ("off", "full", "selective"),
}
FEATURES = ("digits_cnn", "resnet20_cifar10")
KEEP = 2.0  # selective checkpointing: budget per block, in (B, L, D) tensors


@dataclass(frozen=True)
class Settings:
    "What a benchmark is asked to do; zero and empty mean: by the device."

    what: tuple = ()  # of CHOICES; empty: train and sample (quick: features and data too)
    models: tuple = (S2,)
    batch: tuple = ()  # of training; empty: 8 on a CPU, 8 and 128 on a GPU
    images: int = 0  # of a set of samples; 0: 8 on a CPU, 500 on a GPU
    nfe: int = 0  # network evaluations per image; 0: 10 on a CPU, 50 on a GPU
    guided: bool = True  # sampling also with guidance, where the model has a null condition
    precision: tuple = ("fp32", "bf16")
    device: str = "auto"
    repeats: int = 10  # timed repetitions; sampling: a third of them, at least 3
    compile: str = "auto"  # auto: as training decides
    checkpoint: str = "off"
    peer: str = ""  # a checkout of the released code
    ablate: bool = False  # turn each optimisation off, one at a time
    targets: bool = False  # run what the targets of this machine need
    quick: bool = False  # a tiny model, seconds
    budget: float = 0.0  # seconds; 0: none


def check_settings(s: Settings, device: torch.device) -> Settings:
    "Fill in what depends on the device. Raises `ParameterError` for impossible settings."
    gpu = device.type == "cuda"
    if s.quick:
        repeats = min(s.repeats, 3)
        s = replace(s, models=("tiny",), batch=(4,), images=4, nfe=3, repeats=repeats)
    if s.targets:
        precision = ("bf16",) if gpu else ("fp32", "bf16")
        s = replace(s, precision=precision, batch=(128,) if gpu else (8,), guided=False)
    s = replace(
        s,
        what=s.what or ("train", "sample", *(("features", "data") if s.quick else ())),
        batch=s.batch or ((8, 128) if gpu else (8,)),
        images=s.images or (500 if gpu else 8),
        nfe=s.nfe or (50 if gpu else 10),
    )
    for name, allowed in CHOICES.items():
        given = getattr(s, name)
        given = (given,) if isinstance(given, str) else given
        if not set(given) <= set(allowed) or not given:
            text = ",".join(given)
            raise ParameterError(f"{name} = {text!r}: allowed are {', '.join(allowed)}")
    for name in ("batch", "images", "nfe", "repeats"):
        given = getattr(s, name)
        if min(given if isinstance(given, tuple) else (given,)) < 1:
            raise ParameterError(f"{name} = {given}: must be at least 1")
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
    what: tuple = ("train",)
    gpu: bool = False  # needs one


CHECKPOINTING = (
    Option("checkpointing, all recomputed", {"checkpoint": True}, {}),
    Option(f"checkpointing, {KEEP:g} widths kept", {"checkpoint": True, "keep": KEEP}, {}),
)
ABLATIONS = (
    Option("bf16", {"precision": "bf16"}, {"precision": "fp32"}, ("train", "sample")),
    Option("fused attention", {"attention": "sdpa"}, {"attention": "math"}, ("train", "sample")),
    Option("compile", {"compile": True}, {"compile": False}, ("train", "sample")),
    Option("fused AdamW", {"fused": True}, {"fused": False}),
    Option("CUDA graph", {"cuda_graph": True}, {"cuda_graph": False}, gpu=True),
    *CHECKPOINTING,
)


@dataclass
class Job:
    "Contestants that are timed in turn."

    label: str
    model: str
    contestants: dict  # name -> Contestant; special names: released, solver, without
    repeats: int


def verdict(ratio) -> str:  # of a Spread: time without something over time with it
    "In words; decided where three quarters of the pairs agree."
    if ratio.low > 1:
        return f"worth {ratio.median:.2f}x"
    return f"costs {1 / ratio.median:.2f}x" if ratio.high < 1 else "within the spread"


def contestant_rows(c: Contestant, name: str, times: dict, memory, rate: float) -> list:
    "Time, images per second, memory, share of the ceiling, ratios to the others."
    t = np.array(times[name])

    def row(metric, value, unit, **more):
        return bench_row(c.columns, metric, value, unit, **more)

    rows = [row("seconds", spread(t), "s")]
    if c.items:
        rows.append(row(f"{c.unit}_per_second", spread(c.items / t), "1/s"))
    if memory:
        rows.append(row("peak_memory", float(memory), "bytes"))
    if c.flops:
        rows.append(row("flops_per_second", spread(c.flops / t), "FLOP/s"))
        rows.append(row("mfu", spread(c.flops / t / rate), "of the matrix rate"))
    if "released" in times and name != "released":
        rows.append(row("speedup", paired_ratio(times["released"], t), "x"))
    if "solver" in times and name != "released":
        rows.append(row("solver_share", spread(100 * np.array(times["solver"]) / t), "%"))
    if "without" in times and name != "without":
        ratio = paired_ratio(times["without"], t)
        rows.append(row("worth", ratio, "x", note=verdict(ratio)))
    return rows


class Bench:
    "One benchmark: its settings, device, peer and record."

    def __init__(self, s: Settings, device: torch.device, record: Record, say=print):
        self.settings, self.device, self.record, self.say = s, device, record, say
        self.start, self.rates, self.checked = time.perf_counter(), {}, set()
        self.peer = None

    def out_of_time(self) -> bool:
        "Whether the budget is spent."
        s = self.settings
        return bool(s.budget) and time.perf_counter() - self.start > s.budget

    def options(self, exp: Experiment, precision: str, **changes) -> TrainingOptions:
        "How ours trains and samples under these settings."
        s, exp = self.settings, replace(exp, train=replace(exp.train, precision=precision))
        options = TrainingOptions(
            precision,
            choose_attention(exp, self.device),
            wants_compile(s.compile, self.device, exp.train.n_steps),
            checkpoint=s.checkpoint != "off",
            keep=KEEP if s.checkpoint == "selective" else 0.0,
        )
        return replace(options, **changes)

    def train_job(self, model: str, batch: int) -> Job:
        "Training updates: ours in each precision, and the released code's."
        exp, s = bench_experiment(model, batch), self.settings
        ours = {p: Training(exp, self.options(exp, p), self.device) for p in s.precision}
        if self.peer:
            ours["released"] = PeerTraining(self.peer, ours[s.precision[0]])
        return Job(f"train {model} batch {batch}", model, ours, s.repeats)

    def sample_job(self, model: str, guided: bool) -> Job:
        "Sets of images: ours in each precision, the solver alone, and the released code's."
        s = self.settings
        exp = bench_experiment(model, s.images)
        how = self.device, s.nfe, guided
        ours = {p: Sampling(exp, self.options(exp, p), *how) for p in s.precision}
        ours["solver"] = Solver(exp, TrainingOptions(), *how)
        if self.peer:
            ours["released"] = PeerSampling(self.peer, ours[s.precision[0]])
        label = f"sample {model} {s.images}x{s.nfe}{' guided' * guided}"
        return Job(label, model, ours, -(-s.repeats // 3))

    def ablation_job(self, what: str, model: str, option: Option) -> Job:
        "The same contestant with and without an option."
        s, contestants = self.settings, {}
        exp = bench_experiment(model, s.batch[-1] if what == "train" else s.images)
        base = self.options(exp, s.precision[-1], checkpoint=False, keep=0.0)
        for name, change in (("with", option.on), ("without", option.off)):
            options = replace(base, **change)
            if what == "train":
                c = Training(exp, options, self.device)
            else:
                c = Sampling(exp, options, self.device, s.nfe)
            c.columns["option"] = option.name if name == "with" else f"{option.name}: without it"
            contestants[name] = c
        label = f"ablate {what} {model} {option.name}"
        return Job(label, model, contestants, s.repeats if what == "train" else -(-s.repeats // 3))

    def ablation_jobs(self, model: str) -> Iterator[Job]:
        "One option at a time."
        s = self.settings
        for option in ABLATIONS if s.ablate else CHECKPOINTING:
            if self.device.type == "cuda" or not option.gpu:
                for what in option.what:
                    yield self.ablation_job(what, model, option)

    def start_job(self, model: str) -> Job:
        "Seconds to the first update of a fresh process."
        s = self.settings
        exp = bench_experiment(model, s.batch[0])
        options = self.options(exp, s.precision[-1])
        choices = {"without compile": replace(options, compile=False)}
        if options.compile:
            choices["compile"] = options
        runs = {n: FreshProcess(model, s.batch[0], o, self.device) for n, o in choices.items()}
        return Job(f"start {model}", model, runs, min(s.repeats, 3))

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

    def jobs(self) -> Iterator[Job]:
        "Everything that is asked for."
        s, gpu = self.settings, self.device.type == "cuda"
        if s.targets:
            yield from self.target_jobs(s.batch[0])
            return
        for model in s.models:
            yield from self.model_jobs(model)
        if "features" in s.what:
            n = 64 if s.quick else 5000 if gpu else 200
            nets = {name: Features(name, n, self.device) for name in FEATURES}
            yield Job("features", "", nets, s.repeats)
        if "data" in s.what:
            yield Job("data", "", {"resident": Feeding(s.batch[-1], self.device)}, s.repeats)

    def target_jobs(self, batch: int) -> Iterator[Job]:
        "What decides this machine's targets, the cheapest questions first."
        yield self.train_job(S2, batch)
        yield self.sample_job(S2, False)
        if self.device.type == "cuda":
            yield self.train_job(L2, batch)
            yield self.train_job(H2, batch)
            yield self.sample_job(H2, False)
            yield from self.ablation_jobs(H2)
        yield self.start_job(S2)

    def measure_ceilings(self) -> None:
        "What this machine can do at all: matrix products and copying."
        quick = {"sizes": (256,), "repeats": 2} if self.settings.quick else {}
        kinds = DTYPES if self.device.type == "cuda" else ("fp32", "bf16")
        self.rates = {p: matmul_rate(self.device, DTYPES[p], **quick) for p in kinds}
        bandwidth = memory_bandwidth(self.device, *((4, 2) if quick else ()))
        columns = {"what": "machine", "model": "-", "impl": "ours"}
        rows = [
            bench_row(columns, "matrix_rate", rate, "FLOP/s", precision=p)
            for p, rate in self.rates.items()
        ]
        rows.append(bench_row(columns, "bandwidth", bandwidth, "bytes/s"))
        self.record.info["ceilings"] = {**self.rates, "bandwidth": bandwidth}
        self.record.put("machine", rows, {})
        rates = ", ".join(f"{r / 1e12:.3g} TFLOP/s {p}" for p, r in self.rates.items())
        self.say(f"matrix products here: {rates}; memory {bandwidth / 1e9:.3g} GB/s")

    def check_equality(self, job: Job) -> None:
        "Compare the outputs with the released code's, once for each model."
        if "released" in job.contestants and job.model not in self.checked:
            exp = job.contestants["released"].exp
            rows = check_outputs(self.peer, exp, self.device)
            for row in rows:
                row["model"] = job.model
            self.record.put(f"outputs {job.model}", rows, {})
            self.checked.add(job.model)

    def prepare(self, contestant: Contestant) -> int | None:  # peak memory in bytes
        "Build and warm up a contestant; its first calls do not count as memory."
        base, peak = memory_in_use(self.device), None
        contestant.prepare()
        for _ in range(contestant.warmup):
            contestant.call()
        if contestant.flops:
            peak = peak_memory(contestant.call, self.device)
        if contestant.report:
            r, note = contestant.report, contestant.columns.get("note", "")
            made = f"{r.graphs} compiled graphs, {r.fallbacks} eager calls {r.error[:100]}".strip()
            contestant.columns["note"] = f"{note}; {made}".removeprefix("; ")
        return None if None in (base, peak) else max(peak - base, 0)

    def run_job(self, job: Job) -> None:
        "Compare, build, warm up and time; the record is written after every repetition."
        self.check_equality(job)
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
                free_memory(self.device)
        fill = 0.05 if job.repeats == self.settings.repeats else 0  # seconds of a repetition
        for times in interleaved(calls, job.repeats, self.device, fill, self.out_of_time):
            rows = [r for r in rows if r["value"] is None]
            for name, c in job.contestants.items():
                if name in calls and name != "solver":
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
            free_memory(self.device)


def row_line(row: dict) -> str:
    "A row for the reader."
    text = " ".join(row.get(n, "") for n in ("impl", "precision", "option", "metric", "note"))
    quartiles = f" [{row['low']:.3g}, {row['high']:.3g}]" if "low" in row else ""
    value = "" if row["value"] is None else human(row["value"], row["unit"])
    return f"  {' '.join(text.split())}: {value}{quartiles}"


def run_bench(
    s: Settings,
    out_dir=None,  # folder of runs; None: results/runs
    command: str = "",  # for the record
    say=print,  # progress
) -> Record:
    "Run a benchmark and record it. Raises `OutputsDiffer` or `ParameterError`."
    device = pick_device(s.device)
    s = check_settings(s, device)
    where = conditions(device)
    machine = where.get("gpu") or f"{where['cpu'] or 'CPU'} x{where['threads']}"
    info = {"command": command, "settings": asdict(s), "conditions": where, "device": device.type}
    peer = Peer(s.peer) if s.peer else None  # before anything is written
    info["peer"] = peer and {"version": peer.version, "attention": peer.attention}
    record = Record(machine, info, out_dir)
    bench = Bench(s, device, record, say)
    bench.peer = peer
    try:
        bench.run()
    except BaseException as e:
        status = "failed" if isinstance(e, Exception) else "interrupted"
        record.write(status=status, error=f"{type(e).__name__}: {e}")
        raise
    left, errors = record.info["left"], record.info["errors"]
    if left:
        say(f"budget of {s.budget:g} s spent; not run: {'; '.join(left)}")
    if s.targets:
        targets = check_targets(record.rows, device.type)
        record.info["targets"] = targets
        say(pd.DataFrame(targets).to_string(index=False))
    record.write(status="stopped" if left or errors else "ok")
    say(f"recorded in {record.folder}")
    return record
