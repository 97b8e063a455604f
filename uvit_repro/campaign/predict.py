"""What a run will take here: counted operations over a measured rate, corrected by earlier runs."""

import contextlib
import functools
import json
import os
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from uvit_repro.config import CONFIGS, PROTOCOLS, Experiment, project_root
from uvit_repro.data.files import write_json
from uvit_repro.diffusion import Diffusion
from uvit_repro.paper.registry import registry
from uvit_repro.runs.counting import macs_of, model_inputs, predict_seconds, training_flops
from uvit_repro.runs.devices import pick_device, thread_count
from uvit_repro.runs.execution import attention_choice, set_attention, wants_compile
from uvit_repro.runs.processes import default_workers
from uvit_repro.runs.records import conditions, runs_root
from uvit_repro.train import Trainer, build_model, sample_times_and_noise

LARGE = ("gpu", "paper")  # protocols whose cost is told in GPU-hours


def read_json(path: Path, default):
    "The content of a small file, or the default where it is absent or damaged."
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return default


def timed_experiment(exp: Experiment) -> Experiment:
    "The experiment that is timed for another: its protocol's; another backbone is timed itself."
    base = PROTOCOLS[exp.protocol]
    if exp.protocol != "paper" and exp.model.model != base.model.model:
        base = exp
    return replace(base, execution=exp.execution)


def rate_name(exp: Experiment, device: torch.device, threads: int) -> str:
    "What a measured rate depends on: machine, version, mode, protocol, network."
    here = conditions(device)
    machine = here.get("gpu") or f"{here['cpu']} x{here['cores']}, {threads} threads"
    compiled = wants_compile(exp.execution.compile, device, exp.train.n_steps)
    mode = f"{exp.train.precision}, {'compiled' if compiled else 'not compiled'}"
    version = here["versions"]["torch"]
    return f"{machine}, torch {version}, {mode}, protocol {exp.protocol}, {exp.model.model}"


def timed_updates(
    exp: Experiment,
    device: torch.device,
    seconds: float,  # at least one update, whatever it takes
) -> float:  # operations per second
    "Time updates of training, compiled where the run will be, after three that are not timed."
    net, diffusion = build_model(exp), Diffusion(exp.diffusion)
    set_attention(net, attention_choice(exp, device)["path"])
    execution, batch = exp.execution, exp.train.batch_size
    compiled = wants_compile(execution.compile, device, exp.train.n_steps) and execution.compile
    trainer = Trainer(net, diffusion, exp.train, device, compiled)
    x, _, cond = model_inputs(net, batch, device)
    x.normal_()
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    start, updates = 0.0, -3
    while updates < 1 or time.perf_counter() - start < seconds:
        if updates == 0 or updates % 10 == 9:
            wait()
        if updates == 0:
            start = time.perf_counter()
        t, eps = sample_times_and_noise(0, trainer.step, x.shape, diffusion, device)
        trainer.update(x, t, eps, **cond)
        updates += 1
    wait()
    flops = training_flops(macs_of(exp)) * batch * updates
    return flops / (time.perf_counter() - start)


def busy() -> bool:
    "Whether other work has kept half of the CPU's cores during the last minute."
    with contextlib.suppress(AttributeError, OSError):
        return os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    return False


def measured_rate(
    exp: Experiment,  # as `timed_experiment` gives it
    device: torch.device,
    threads: int,  # of the CPU
    seconds: float = 10.0,  # to be spent on measuring
    cache: Path = None,  # None: results/cache/throughput.json
) -> float:  # operations per second
    "The rate at which this machine trains a network: measured once, then read."
    cache = cache or project_root() / "results" / "cache" / "throughput.json"
    name = rate_name(exp, device, threads)
    known = read_json(cache, {})
    if name in known:
        return known[name]
    keep = device.type == "cuda" or not busy()
    with thread_count(threads):
        rate = max(timed_updates(exp, device, seconds / 3) for _ in range(3))
    if keep:  # what a busy CPU gave is used once
        with contextlib.suppress(OSError):  # a folder that can't be written
            write_json(cache, {**read_json(cache, {}), name: rate})
    return rate


@functools.cache
def paper_gpu() -> tuple[str, float]:  # its name, operations per second
    "The rate at which the authors trained H/2 on one A100 (README: batch 128, mixed precision)."
    ending, cells = "mixed precision + xformers", registry()
    speeds = cells[(cells.column == "steps_per_second") & cells.condition.str.endswith(ending)]
    speed = next(speeds.itertuples())
    flops = training_flops(macs_of(CONFIGS[speed.base])) * 128 * speed.number
    return "A100, at the rate of the paper's README", flops


def predict(
    exp: Experiment,
    flops_per_second: float,
    done: float = 0.0,  # share of the training that is done
) -> dict:  # seconds: train, sample (with the held-out losses), total
    "What an experiment will take: counted operations over a rate."
    parts = predict_seconds(exp, flops_per_second)
    train, sample = parts["train"] * (1 - done), parts["sample"] + parts["loss"]
    return {"train": train, "sample": sample, "total": train + sample}


@dataclass(frozen=True)
class Attempt:
    "What was predicted of a run that a campaign did, and what it took."

    machine: str  # as `Machine.mode` calls it
    outcome: str  # ran | failed | left
    predicted: float  # seconds of its work
    seconds: float  # of its work
    cell_seconds: float  # with its start


def attempts(out_dir=None) -> list[Attempt]:
    "Every attempt on this machine; what is damaged is left out."
    found = []
    for path in sorted(runs_root(out_dir).glob("*/prediction.json")):
        with contextlib.suppress(TypeError, KeyError, ValueError):
            for entry in read_json(path, []):
                names = entry["machine"], entry["outcome"]
                took = float(entry["seconds"]), float(entry["cell_seconds"])
                found.append(Attempt(*names, float(entry["predicted"]["total"]), *took))
    return found


def note_attempt(
    folder: Path,  # of a run
    **entry,  # machine, rate, predicted, seconds, cell_seconds (with the start), outcome
):
    "Add an attempt to the run's prediction.json."
    path, when = folder / "prediction.json", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(path, [*read_json(path, []), {**entry, "when": when}])


def calibration(
    past: list,  # of `attempts`, in one mode
) -> tuple[float, float]:  # seconds of a run outside its work; true over predicted seconds of it
    "How this machine differs from its predictions: medians over finished runs; 10 s and 1 before."
    ran = [a for a in past if a.outcome == "ran"]
    startup = [a.cell_seconds - a.seconds for a in ran] or [10.0]
    ratio = [a.seconds / a.predicted for a in ran if a.predicted > 10] or [1.0]
    return statistics.median(startup), statistics.median(ratio)


@dataclass(frozen=True)
class Machine:
    "Where runs are to be done, and what is known about its speed."

    device: torch.device
    workers: int = 1  # runs at a time
    processes: int = 1  # that train one run together
    out_dir: str = None  # folder of runs; None: results/runs
    known: dict = field(default_factory=dict, compare=False)  # names and rates asked for before

    def threads(self, exp: Experiment) -> int:  # 0: not decided here
        "CPU threads of each process of a run: the same however many runs are left."
        if exp.execution.threads or self.device.type == "cuda":
            return exp.execution.threads
        return max(1, (os.cpu_count() or 1) // (self.workers * self.processes))

    def mode(self, exp: Experiment) -> str:
        "The name under which rates and attempts of such runs are remembered."
        timed = timed_experiment(exp)
        if timed not in self.known:
            name = rate_name(timed, self.device, self.threads(exp))
            self.known[timed] = f"{name}, {self.processes} processes"
        return self.known[timed]

    def rate(self, exp: Experiment) -> float:
        "Operations per second of a run. Nobody waits for a large protocol on a CPU: an A100's."
        if exp.protocol in LARGE and self.device.type != "cuda":
            return paper_gpu()[1]
        mode = self.mode(exp)
        if mode not in self.known:
            one = measured_rate(timed_experiment(exp), self.device, self.threads(exp))
            self.known[mode] = one * self.processes
        return self.known[mode]

    def expected(self, exp: Experiment, done: float = 0.0) -> float:
        "Seconds that a run will take from here, as far as this machine's past tells."
        mode = self.mode(exp)
        startup, ratio = calibration([a for a in attempts(self.out_dir) if a.machine == mode])
        return startup + ratio * predict(exp, self.rate(exp), done)["total"]


def this_machine(
    out_dir=None,  # folder of runs
    workers: int = None,  # runs at a time; None: one per core, at most 8; one on a GPU
    processes: int = 1,  # that train one run together
) -> Machine:
    "The machine that this process runs on."
    workers = workers or max(1, default_workers() // processes)
    return Machine(pick_device("auto"), workers, processes, out_dir)
