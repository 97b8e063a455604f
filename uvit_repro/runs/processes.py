"""Several processes on this machine that work on one run, started with torchrun."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from uvit_repro.config import Experiment, ParameterError
from uvit_repro.runs.devices import pick_device

PROGRESS = ("step ", "sampled ", "resumed ", "read ", "encoded ", "another process ")


class ProcessesFailed(RuntimeError):
    "Processes that worked together stopped; the message is the first one's own."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


def default_workers() -> int:
    "Runs at a time on this machine: one on a GPU, else one per core, at most 8."
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)


def worker_environment(exp: Experiment) -> dict:
    "The environment of each process: one per GPU, or several that share the cores."
    n, cpu = exp.execution.processes, pick_device(exp.execution.device).type == "cpu"
    if not cpu and n > torch.cuda.device_count():
        raise ParameterError(
            f"processes = {n}: this machine has {torch.cuda.device_count()} GPUs, and each "
            "process needs its own"
        )
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    threads = exp.execution.threads
    if cpu:
        env["ACCELERATE_USE_CPU"] = "true"
        threads = threads or max(1, (os.cpu_count() or 1) // n)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def stream_lines(
    command: list,  # a command line
    receive: Callable,  # called with each line of its output
    **options,  # of subprocess.Popen
) -> int:  # exit code
    "Run a command, pass its output on line by line, and end it when this process is interrupted."
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        bufsize=1,
        **options,
    )
    try:
        for line in process.stdout:
            receive(line)
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
    return process.returncode


def run_together(
    exp: Experiment,  # whose processes to start
    job: Path,  # what they do, for `python -m uvit_repro.runs`
    say=print,  # progress lines
) -> None:
    "Work on a run with N processes. Raises `ProcessesFailed` with the message of one."
    n, last = exp.execution.processes, ""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", str(n), "-m", "uvit_repro.runs", str(job)]

    def receive(line: str) -> None:
        nonlocal last
        line = line.strip()
        if line.startswith(PROGRESS):
            say(line)
        if line.startswith("failed: ") or (line and not last.startswith("failed: ")):
            last = line

    if stream_lines(command, receive, env=worker_environment(exp)):
        raise ProcessesFailed(f"{n} processes: {last.removeprefix('failed: ')}")
