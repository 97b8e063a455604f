"""A campaign: an ordered list of runs, inside a budget, shared among processes, resumed."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from uvit_repro.campaign.jobs import Job, jobs, no_experiment
from uvit_repro.campaign.plan import OPEN, held, progress, state
from uvit_repro.campaign.predict import Machine, this_machine
from uvit_repro.config import ParameterError, default_protocol
from uvit_repro.config.durations import format_duration
from uvit_repro.data.files import write_json
from uvit_repro.paper.registry import select
from uvit_repro.runs.records import runs_root

GRACE = 10.0  # seconds between asking a run to stop and ending it


def campaign_folder(out_dir=None) -> Path:
    "Where campaigns keep their locks and logs, beside the runs."
    return runs_root(out_dir) / ".campaign"


def acquire_run(
    run_id: str,
    out_dir=None,  # folder of runs
) -> FileLock | None:  # None: somebody else works on the run
    "Claim a run without waiting. The claim of a killed process is gone with it."
    path = campaign_folder(out_dir) / f"{run_id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    if held(runs_root(out_dir) / run_id / ".lock"):  # at work without a claim
        lock.release()
        return None
    return lock


def run_command(job_file: Path) -> list[str]:
    "The process that does one run."
    return [sys.executable, "-m", "uvit_repro.runs", str(job_file)]


def background(command: list[str], out, log, **environment) -> subprocess.Popen:
    "Start a process in a session of its own: an interrupt of this one does not reach it."
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": log}
    return subprocess.Popen(command, **streams, env=environment, start_new_session=True)


def start_process(job: Job, machine: Machine) -> tuple[subprocess.Popen, TextIO]:
    "Start the process of a run; its progress goes to a file that is read here, errors to a log."
    threads = machine.threads(job.exp)
    execution = replace(job.exp.execution, processes=machine.processes, threads=threads)
    path = campaign_folder(machine.out_dir) / f"{job.exp.run_id}.json"
    content = {
        "experiment": replace(job.exp, execution=execution).to_dict(),
        "out_dir": str(runs_root(machine.out_dir)),
        "where": {"chapter": "campaign", "paper_ref": job.places[0] if job.places else ""},
    }
    write_json(path, content)
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    with open(path.with_suffix(".out"), "wb") as out, open(path.with_suffix(".log"), "wb") as log:
        process = background(run_command(path), out, log, PYTHONIOENCODING="utf-8", **environment)
    return process, open(path.with_suffix(".out"), encoding="utf-8", errors="replace")


@dataclass
class Active:
    "A run at work."

    job: Job
    lock: FileLock
    process: subprocess.Popen
    output: TextIO
    begin: float
    line: str = ""  # of its output, perhaps not yet whole
    why: str = ""  # it failed

    def stop(self, at_once: bool):
        "Ask the run and its helpers to stop, or end them."
        with contextlib.suppress(OSError):
            if os.name == "nt":
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL if at_once else signal.SIGINT)

    def read_output(self, say):
        "Pass on what the run has printed; a line that says why it failed is kept."
        *lines, self.line = (self.line + self.output.read()).split("\n")
        for line in filter(None, map(str.strip, lines)):
            if line.startswith("failed: "):
                self.why = line.removeprefix("failed: ")
            else:
                say(f"[{self.job.name}] {line}")


class Campaign:
    "Runs to be done: started while they fit into the budget, watched, stopped in time."

    def __init__(self, todo: list[Job], machine: Machine, budget: float = None, say=print):
        self.todo, self.machine, self.say = list(todo), machine, say
        self.result = {"done": [], "ran": [], "failed": [], "left": []}
        self.active, self.reasons = [], {}
        self.stopped_at, self.interrupted, self.waited = None, False, False
        limit = math.inf if budget is None else budget - min(2 * GRACE, budget / 3)
        self.end = time.monotonic() + limit

    def expected(self, job: Job) -> float:
        "Seconds that a run will take from here."
        done = progress(runs_root(self.machine.out_dir) / job.exp.run_id, job.exp)
        return self.machine.expected(job.exp, done)

    def start_runs(self) -> bool:  # whether others hold runs that fit
        "Start what fits into the time left and nobody has, while there is a free worker."
        others = False
        for job in list(self.todo):
            if len(self.active) == self.machine.workers:
                break
            if self.end < math.inf and self.expected(job) > self.end - time.monotonic():
                continue
            if lock := acquire_run(job.exp.run_id, self.machine.out_dir):
                self.todo.remove(job)
                self.start(job, lock)
            else:
                others = True
        return others

    def start(self, job: Job, lock: FileLock):
        "Start a claimed run, unless somebody else has done it meanwhile."
        try:
            if state(job.exp, self.machine.out_dir)[0] != "done":
                self.say(f"[{job.name}] starts, about {format_duration(self.expected(job))}")
                started = start_process(job, self.machine)
                self.active.append(Active(job, lock, *started, time.monotonic()))
                return
            self.result["done"].append(job)
        except (OSError, RuntimeError, ValueError) as error:  # the others go on
            self.failed(job, f"{type(error).__name__}: {error}")
        lock.release()

    def failed(self, job: Job, why: str):
        "Note why a run failed."
        self.say(f"[{job.name}] failed: {why}")
        self.reasons[job.exp.run_id] = why
        self.result["failed"].append(job)

    def watch(self, run: Active) -> bool:  # whether it has ended
        "Pass on a run's progress; when its process has ended, note what became of it."
        code = run.process.poll()
        run.read_output(self.say)
        if code is None:
            return False
        run.output.close()
        run.lock.release()
        self.active.remove(run)
        if code and self.stopped_at is None:
            log = campaign_folder(self.machine.out_dir) / f"{run.job.exp.run_id}.log"
            why = "killed, as a rule for want of memory: try fewer --workers" if code == -9 else ""
            why = run.why or why or f"exit status {code}; the end of {log} says more"
            self.failed(run.job, why)
        else:
            self.result["left" if code else "ran"].append(run.job)
            took = format_duration(time.monotonic() - run.begin)
            self.say(f"[{run.job.name}] {'stopped' if code else 'done'} in {took}")
        return True

    def stop(self):
        "Ask the runs to stop; a while later end those that do not."
        late = self.stopped_at is not None and time.monotonic() > self.stopped_at + GRACE
        if late or self.stopped_at is None:
            self.stopped_at = self.stopped_at or time.monotonic()
            for run in self.active:
                run.stop(late)

    def step(self) -> bool:  # whether there is more to do
        "Look after every run once."
        ended = [run for run in list(self.active) if self.watch(run)]
        others = False
        if self.interrupted or time.monotonic() > self.end:
            self.stop()
        elif ended or not self.active:
            others = self.start_runs()
        if others and not self.active and not self.waited:
            self.say("the runs that are left are claimed by another process; waiting")
            self.waited = True
        time.sleep(0.05 if self.active else 0.5 * others)
        return bool(self.active or others)

    def run(self) -> dict:  # lists of jobs: done (by others), ran, failed, left
        "Work until nothing fits any more; the budget is looked at all the time, also in silence."
        more = True
        while more:
            try:
                more = self.step()
            except KeyboardInterrupt:
                self.interrupted = True
                self.say("interrupted; stopping the runs")
            except BaseException:  # nobody reads what is said
                self.stop()
                raise
        self.result["left"] += self.todo
        return self.result


def run_jobs(
    todo: list[Job],  # in the order in which a budget should be spent
    machine: Machine = None,  # None: this one
    budget: float = None,  # seconds; None: no limit
    say=print,
) -> dict:  # run ids: done, ran, failed, left, blocked; reasons, seconds, interrupted
    "Do the runs that are not done."
    machine, begin = machine or this_machine(), time.monotonic()
    states = [(job, *state(job.exp, machine.out_dir)) for job in todo]
    for why in dict.fromkeys(why for _, what, why in states if what == "blocked"):
        say(f"blocked: {why}")
    campaign = Campaign([j for j, what, _ in states if what in OPEN], machine, budget, say)
    if campaign.todo:
        say(f"{len(campaign.todo)} runs to do, up to {machine.workers} at a time")
    found = campaign.run()
    for name in ("done", "blocked"):
        found[name] = [j for j, what, _ in states if what == name] + found.get(name, [])
    if found["left"]:
        say("the same command goes on")
    ids = {name: [job.exp.run_id for job in those] for name, those in found.items()}
    say(", ".join(f"{len(names)} {name}" for name, names in ids.items()))
    more = {"reasons": campaign.reasons, "interrupted": campaign.interrupted}
    return {**ids, **more, "seconds": time.monotonic() - begin}


def run(
    what: str,  # as in `jobs`
    protocol: str = None,  # None: what this machine can do
    seeds=(0,),
    machine: Machine = None,  # None: this one
    budget: float = None,  # seconds; None: no limit
    say=print,
) -> dict:  # as of `run_jobs`
    "Do what is missing of a table, a figure or a list of claims."
    protocol, machine = protocol or default_protocol(), machine or this_machine()
    todo = jobs(what, protocol, seeds)
    if not todo:
        why = no_experiment(next(select(what.split(",")[0]).itertuples()), protocol)
        raise ParameterError(f"{what!r} has no run at protocol {protocol}: {why}")
    with contextlib.ExitStack() as stack:
        if protocol == "smoke" and not machine.out_dir:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="uvit-smoke-"))
            machine = replace(machine, out_dir=folder)
        return run_jobs(todo, machine, budget, say)


def detach(
    argv: list[str],  # of `uvit-repro`, without --detach
    out_dir=None,  # folder of runs
) -> dict:  # process, log
    "Start a campaign in a session of its own; its log and `plan` tell what becomes of it."
    log = campaign_folder(out_dir) / "latest.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        process = background([sys.executable, "-m", "uvit_repro.cli", *argv], out, out)
    return {"process": process.pid, "log": str(log)}
