"""Other processes: several that work on one run, started with torchrun, and their output."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from uvit_repro.config import Experiment, ParameterError
from uvit_repro.runs.devices import pick_device

PROGRESS = ("step ", "sampled ", "resumed ", "read ", "encoded ", "another process ")
FAILED = "failed: "  # begins the line in which `python -m uvit_repro.runs` says why it ended


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
