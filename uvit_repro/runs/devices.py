"""Where a network runs: the device, its precision, and the processes that share one run."""

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from uvit_repro.config import Experiment, ParameterError

PROCESS_TIMEOUT = timedelta(days=2)
PROGRESS = ("step ", "sampled ", "resumed ", "read ", "encoded ", "another process ")
FAILED = "failed: "  # begins the line in which `python -m uvit_repro.runs` says why it ended


def pick_device(
    device: str = "auto",  # auto, cpu, cuda, cuda:1
) -> torch.device:  # an existing one; a GPU always with its number
    "The device to compute on; `cuda` alone is this process's own GPU. Raises `ParameterError`."
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not re.fullmatch("cuda(:[0-9]{1,4})?", device):
        raise ParameterError(f"device = {device!r}: allowed are auto, cpu, cuda, cuda:N")
    index = int(device[5:] or os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise ParameterError(
            f"device = {device!r}: this machine has {count} CUDA devices; try device = 'cpu'"
        )
    return torch.device("cuda", index)


def check_memory(
    needed: int,  # bytes
    device: torch.device,
) -> None:
    "Raise `ParameterError`, before anything is allocated, for more memory than a device has."
    has = float("inf")
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > has:
        raise ParameterError(
            f"training needs at least {needed / 2**30:,.0f} GiB of memory, and {device} has "
            f"{has / 2**30:,.0f}: try a smaller embed_dim, depth or batch_size"
        )


@contextlib.contextmanager
def thread_count(
    n: int,  # CPU threads; 0: PyTorch's default
):
    "Compute with n threads inside the block, and with as many as before after it."
    before = torch.get_num_threads()
    try:
        if n:
            torch.set_num_threads(n)
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def evaluating(model):  # a network, or a function in its place
    "Evaluation mode inside the block, the network's own mode after it."
    was = getattr(model, "training", False)
    try:
        if was:
            model.eval()
        yield
    finally:
        if was:
            model.train()


@contextlib.contextmanager
def tf32_off():
    "Multiply and convolve float32 in full precision on a GPU, where numbers are compared."
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make_accelerator(
    precision: str,  # fp32 | bf16 | fp16
    device: torch.device,  # where to compute
):  # accelerate.Accelerator
    "An `Accelerator` for one run; an earlier one of another precision is forgotten."
    from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    if precision == "fp16" and device.type == "cpu":
        raise ParameterError("precision = 'fp16' needs a GPU; try precision = 'bf16' or 'fp32'")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Each weight is used once a pass: a cache of its casts would only hold memory.
    cast, views = AutocastKwargs(cache_enabled=False), {"gradient_as_bucket_view": True}
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=device.type == "cpu",
        kwargs_handlers=[cast, DistributedDataParallelKwargs(**views)],
    )


@dataclass(frozen=True)
class DistributedContext:
    "The processes of one run, seen from one of them."

    rank: int = 0
    size: int = 1

    @property
    def part(self) -> slice:
        "This process's rows of a batch."
        return slice(self.rank, None, self.size)

    def mean(self, x: Tensor) -> Tensor:
        "The mean over the processes; the device is not waited for."
        if self.size > 1:
            torch.distributed.all_reduce(x)
            x = x / self.size
        return x

    def gather(self, obj) -> list:
        "Every process's object, in the order of the ranks, everywhere."
        everyone = [obj] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(everyone, obj)
        return everyone

    def first(self, work):
        "The result of `work()` on the first process, everywhere; its exception, too."
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as e:
                error = e
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result


ALONE = DistributedContext()  # one process that is all


def join_processes(
    processes: int,  # as the experiment says
    device: torch.device,  # where this process computes
) -> DistributedContext:  # rank and size
    "Join the processes that torchrun started. Raises `ParameterError` unless they are as many."
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size != processes:
        raise ParameterError(
            f"processes = {processes}, but this is one of {size}: start it with torchrun "
            f"--nproc_per_node {processes}, or let run_experiment do it"
        )
    if size == 1:
        return ALONE
    from accelerate import PartialState

    # The first process computes FID or waits for a lock while the others wait in a collective:
    # torch's own limit of ten minutes would end them. torchrun stops all when one has died.
    state = PartialState(cpu=device.type == "cpu", timeout=PROCESS_TIMEOUT)
    return DistributedContext(state.process_index, state.num_processes)


class ProcessesFailed(RuntimeError):
    "Processes that worked together stopped; the message is the first one's own."


def default_workers() -> int:
    "Runs at a time on this machine: one on a GPU, else one per core, at most 8."
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)


def run_together(exp: Experiment, job: Path, say=print) -> None:
    "Do a job, see `uvit_repro.runs.__main__`, with the experiment's number of processes."
    n, threads = exp.execution.processes, exp.execution.threads
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if pick_device(exp.execution.device).type == "cpu":
        env["ACCELERATE_USE_CPU"] = "true"
        threads = threads or max(1, (os.cpu_count() or 1) // n)
    elif n > torch.cuda.device_count():
        raise ParameterError(
            f"processes = {n}: this machine has {torch.cuda.device_count()} GPUs, and each "
            "process needs its own"
        )
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n), "-m", "uvit_repro.runs", str(job)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 1, "env": env}
    text = {"text": True, "encoding": "utf-8", "errors": "replace"}
    process, last = subprocess.Popen(command, **pipes, **text), ""
    try:
        for line in map(str.strip, process.stdout):
            if line.startswith(PROGRESS):
                say(line)
            if line and not last.startswith(FAILED):  # the others fail because the first did
                last = line
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
    if process.returncode:
        raise ProcessesFailed(f"{n} processes: {last.removeprefix(FAILED)}")
