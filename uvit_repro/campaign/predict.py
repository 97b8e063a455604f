"""What a run will take here: counted operations over a measured rate."""

import contextlib
import functools
import json
import os
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from uvit_repro.config import CONFIGS, PROTOCOLS, Experiment, project_root
from uvit_repro.data.files import write_json
from uvit_repro.diffusion import Diffusion
from uvit_repro.paper.registry import registry
from uvit_repro.runs.counting import macs_of, model_inputs, predict_seconds, training_flops
from uvit_repro.runs.devices import default_workers, pick_device, thread_count
from uvit_repro.runs.execution import attention_choice, set_attention, wants_compile
from uvit_repro.runs.records import cpu_name, package_version
from uvit_repro.runs.timing import time_calls
from uvit_repro.train import Trainer, build_model, sample_times_and_noise

LARGE = ("gpu", "paper")  # protocols whose cost is given in GPU-hours
STARTUP = 10.0  # seconds of a run outside its work


def read_json(path: Path) -> dict:
    "The content of a small file; empty where it is absent, damaged or something else."
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def timed_experiment(exp: Experiment) -> Experiment:
    "The experiment that is timed for another: its protocol's; another backbone is timed itself."
    base = PROTOCOLS[exp.protocol]
    if exp.protocol != "paper" and exp.model.model != base.model.model:
        base = exp
    return replace(base, execution=exp.execution)


def rate_name(exp: Experiment, device: torch.device, threads: int) -> str:
    "What a measured rate depends on: machine, version, mode, protocol, network."
    machine = f"{cpu_name()} x{os.cpu_count()}, {threads} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    compiled = wants_compile(exp.execution.compile, device, exp.train.n_steps)
    mode = f"{exp.train.precision}, {'compiled' if compiled else 'not compiled'}"
    mode = f"torch {package_version('torch')}, {mode}"
    return f"{machine}, {mode}, protocol {exp.protocol}, {exp.model.model}"


def timed_updates(
    exp: Experiment,
    device: torch.device,
    seconds: float,  # at least one update, whatever it takes
) -> float:  # operations per second
    "Time updates of training, compiled where the run will be, after three that are not timed."
    net, diffusion, batch = build_model(exp), Diffusion(exp.diffusion), exp.train.batch_size
    set_attention(net, attention_choice(exp, device)["path"])
    choice = exp.execution.compile
    compiled = wants_compile(choice, device, exp.train.n_steps) and choice
    trainer = Trainer(net, diffusion, exp.train, device, compiled)
    x, _, cond = model_inputs(net, batch, device)
    x.normal_()

    def update():
        t, eps = sample_times_and_noise(0, trainer.step, x.shape, diffusion, device)
        trainer.update(x, t, eps, **cond)

    (once,) = time_calls(update, device, repeats=1, warmup=3)
    times = time_calls(update, device, repeats=max(1, int(seconds / once)), warmup=0)
    return training_flops(macs_of(exp)) * batch / statistics.median(times)


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
    name, keep = rate_name(exp, device, threads), device.type == "cuda" or not busy()
    rate = read_json(cache).get(name)
    if isinstance(rate, float) and rate > 0:
        return rate
    with thread_count(threads):
        rate = timed_updates(exp, device, seconds)
    if keep:  # what a busy CPU gave is used once
        with contextlib.suppress(OSError):  # a folder that can't be written
            write_json(cache, {**read_json(cache), name: rate})
    return rate


@functools.cache
def paper_gpu() -> tuple[str, float]:  # its name, operations per second
    "The rate at which the authors trained H/2 on one A100 (README: batch 128, mixed precision)."
    cells = registry()
    ending = cells.condition.str.endswith("mixed precision + xformers")
    speed = next(cells[(cells.column == "steps_per_second") & ending].itertuples())
    flops = training_flops(macs_of(CONFIGS[speed.base])) * 128 * speed.number
    return "A100, at the rate of the paper's README", flops


def predict(
    exp: Experiment,
    flops_per_second: float,
    done: float = 0.0,  # share of the training that is done
) -> float:  # seconds
    "What an experiment will take: counted operations over a rate."
    parts = predict_seconds(exp, flops_per_second)
    return parts["total"] - done * parts["train"]


@dataclass(frozen=True)
class Machine:
    "Where runs are to be done, and what is known about its speed."

    device: torch.device
    workers: int = 1  # runs at a time
    processes: int = 1  # that train one run together
    out_dir: str = None  # folder of runs; None: results/runs
    rates: dict = field(default_factory=dict, compare=False)  # measured before

    def threads(self, exp: Experiment) -> int:  # 0: not decided here
        "CPU threads of each process of a run: the same however many runs are left."
        if exp.execution.threads or self.device.type == "cuda":
            return exp.execution.threads
        return max(1, (os.cpu_count() or 1) // (self.workers * self.processes))

    def rate(self, exp: Experiment) -> float:
        "Operations per second of a run. Nobody waits for a large protocol on a CPU: an A100's."
        if exp.protocol in LARGE and self.device.type != "cuda":
            return paper_gpu()[1]
        what = timed_experiment(exp), self.device, self.threads(exp)
        if what not in self.rates:
            self.rates[what] = self.processes * measured_rate(*what)
        return self.rates[what]

    def expected(self, exp: Experiment, done: float = 0.0) -> float:
        "Seconds that a run will take from here, with its start."
        return STARTUP + predict(exp, self.rate(exp), done)


def this_machine(
    out_dir=None,  # folder of runs
    workers: int = None,  # runs at a time; None: one per core, at most 8; one on a GPU
    processes: int = 1,  # that train one run together
) -> Machine:
    "The machine that this process runs on."
    workers = workers or max(1, default_workers() // processes)
    return Machine(pick_device("auto"), workers, processes, out_dir)
