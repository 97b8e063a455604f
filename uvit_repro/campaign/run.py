"""A campaign: an ordered list of runs, inside a budget, shared among workers, resumed."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from uvit_repro.campaign.jobs import Job, jobs, no_experiment
from uvit_repro.campaign.plan import OPEN, held, progress, run_info, state
from uvit_repro.campaign.predict import (
    LARGE,
    Machine,
    note_attempt,
    paper_gpu,
    predict,
    read_json,
    this_machine,
)
from uvit_repro.config import ParameterError, default_protocol, project_root
from uvit_repro.config.durations import format_duration
from uvit_repro.data.files import write_json
from uvit_repro.paper.registry import select
from uvit_repro.runs.records import runs_root

GRACE = 10.0  # seconds between asking a run to stop and ending it
SLURM = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "slurm_...")


@dataclass(frozen=True)
class Options:
    "How a campaign is to be done."

    budget: float = None  # seconds; None: no limit
    executor: str = "local"  # local | slurm
    slurm: dict = field(default_factory=dict)  # options for submitit

    def __post_init__(self):
        if self.executor not in ("local", "slurm"):
            raise ParameterError(f"executor = {self.executor!r}: allowed are local, slurm")
        if self.executor == "slurm" and self.budget is not None:
            raise ParameterError("--budget goes with --executor local; Slurm has its own limits")
        if self.executor == "local" and self.slurm:
            raise ParameterError("--slurm goes with --executor slurm")
        for name in self.slurm:
            if name not in SLURM and not name.startswith("slurm_"):
                raise ParameterError(f"--slurm {name}: allowed are {', '.join(SLURM)}")


def campaign_folder(out_dir=None) -> Path:
    "Where campaigns keep their locks and logs, beside the runs."
    return runs_root(out_dir) / ".campaign"


def acquire_run(
    run_id: str,
    out_dir=None,  # folder of runs
) -> FileLock | None:  # to be released by the same thread; None: somebody else works on the run
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


def write_job(job: Job, machine: Machine) -> Path:
    "Write what the process of a run is to do."
    threads = machine.threads(job.exp)
    execution = replace(job.exp.execution, processes=machine.processes, threads=threads)
    content = {
        "experiment": replace(job.exp, execution=execution).to_dict(),
        "out_dir": str(runs_root(machine.out_dir)),
        "where": {"chapter": "campaign", "paper_ref": job.places[0] if job.places else ""},
    }
    return write_json(campaign_folder(machine.out_dir) / f"{job.exp.run_id}.json", content)


def start_run(job: Job, machine: Machine) -> subprocess.Popen:
    "Start the process of a run: progress comes through its pipe, complaints go to a log."
    job_file, threads = write_job(job, machine), machine.threads(job.exp)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(job_file.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(
            run_command(job_file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # an interrupt is for the campaign, which passes it on
        )


def stop_run(process: subprocess.Popen, at_once: bool):
    "Ask a run and its helpers to stop, or end them."
    with contextlib.suppress(OSError):
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL if at_once else signal.SIGINT)


class Campaign:
    "Runs to be done, the workers that do them, and what became of each."

    def __init__(self, todo: list[Job], machine: Machine, budget: float = None, say=print):
        self.todo, self.machine, self.say = list(todo), machine, say
        self.result = {"done": [], "ran": [], "failed": [], "left": []}
        self.reasons, self.processes = {}, []
        self.lock, self.stop, self.stopped_at = threading.Lock(), threading.Event(), None
        self.interrupted = self.waited = False
        limit = math.inf if budget is None else budget - min(2 * GRACE, budget / 3)
        self.end = time.monotonic() + limit

    def time_left(self) -> float:
        return self.end - time.monotonic()

    def share(self, job: Job) -> float:
        "The part of a run's training that is there already."
        return progress(runs_root(self.machine.out_dir) / job.exp.run_id, job.exp)

    def fits(self, job: Job) -> bool:
        "Whether a run is expected to end inside the budget."
        if self.end == math.inf:
            return True
        return self.machine.expected(job.exp, self.share(job)) <= self.time_left()

    def take(self) -> tuple:  # (job, its lock), or (None, whether others hold some that fit)
        "The next run that fits into the time left and that nobody has."
        with self.lock:
            others = False
            for job in list(self.todo):
                if not self.fits(job):
                    continue
                lock = acquire_run(job.exp.run_id, self.machine.out_dir)
                if lock is None:
                    others = True
                    continue
                self.todo.remove(job)
                if state(job.exp, self.machine.out_dir)[0] != "done":
                    return job, lock
                lock.release()  # somebody else has done it meanwhile
                self.result["done"].append(job)
            return None, others

    def work(self):
        "What one worker does until nothing fits any more."
        while not self.stop.is_set():
            job, lock = self.take()
            if job is None and not lock:
                return
            if job is None:
                if not self.waited:
                    self.say("the runs that are left are claimed by another process; waiting")
                self.waited = True
                self.stop.wait(1.0)
                continue
            outcome = "failed"
            try:
                outcome = self.run_one(job)
            except Exception as error:  # the campaign goes on
                self.reasons[job.exp.run_id] = f"{type(error).__name__}: {error}"
            lock.release()
            self.result[outcome].append(job)

    def run_one(self, job: Job) -> str:  # ran, failed or left
        "Do one run in a process of its own; note what was predicted and what it took."
        exp, begin, share = job.exp, time.monotonic(), self.share(job)
        folder = runs_root(self.machine.out_dir) / exp.run_id
        before, rate = run_info(folder).get("wall_seconds", 0), self.machine.rate(exp)
        predicted = predict(exp, rate, share)
        self.say(f"[{job.name}] starts, predicted {format_duration(predicted['total'])}")
        outcome, why = self.watch(job)
        took = time.monotonic() - begin
        if folder.exists():
            note_attempt(
                folder,
                machine=self.machine.mode(exp),
                rate=rate,
                predicted=predicted,
                seconds=run_info(folder).get("wall_seconds", 0) - before,
                cell_seconds=took,
                outcome=outcome,
            )
        word = {"ran": "done", "failed": f"failed: {why};", "left": "stopped"}[outcome]
        self.say(f"[{job.name}] {word} in {format_duration(took)}")
        return outcome

    def watch(self, job: Job) -> tuple[str, str]:  # outcome, reason of a failure
        "Pass on a run's progress until its process ends."
        process, why = start_run(job, self.machine), ""
        self.processes.append(process)
        for line in process.stdout:
            if line.startswith("failed: "):
                why = line.removeprefix("failed: ").strip()
            elif line.strip():
                self.say(f"[{job.name}] {line.strip()}")
        code = process.wait()
        self.processes.remove(process)
        if code == 0 or self.stop.is_set():
            return ("left" if code else "ran"), ""
        if code == -9:
            why = why or "killed, as a rule for want of memory: try fewer --workers"
        log = campaign_folder(self.machine.out_dir) / f"{job.exp.run_id}.log"
        self.reasons[job.exp.run_id] = why or f"exit status {code}; the end of {log} says more"
        return "failed", self.reasons[job.exp.run_id]

    def stop_runs(self):
        "Ask the runs to stop; a while later end those that do not."
        late = self.stopped_at is not None and time.monotonic() > self.stopped_at + GRACE
        if late or self.stopped_at is None:
            self.stopped_at = self.stopped_at or time.monotonic()
            for process in list(self.processes):
                stop_run(process, late)

    def run(self) -> dict:  # lists of jobs: done (by others), ran, failed, left
        "Work until nothing fits any more; the budget is looked at all the time, also in silence."
        count = max(1, min(self.machine.workers, len(self.todo)))
        workers = [threading.Thread(target=self.work, daemon=True) for _ in range(count)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            try:
                time.sleep(0.05)
                if self.stop.is_set() or self.time_left() < 0:
                    self.stop.set()
                    self.stop_runs()
            except KeyboardInterrupt:
                self.interrupted = True
                self.stop.set()
                self.say("interrupted; stopping the runs")
        self.result["left"] += self.todo
        return self.result


def run_jobs(
    todo: list[Job],  # in the order in which a budget should be spent
    machine: Machine = None,  # None: this one
    options: Options = None,  # None: no limit, on this machine
    say=print,
) -> dict:  # run ids: done, ran, failed, left, blocked; reasons, seconds, interrupted, jobs
    "Do the runs that are not done."
    machine, options, begin = machine or this_machine(), options or Options(), time.monotonic()
    states = [(job, *state(job.exp, machine.out_dir)) for job in todo]
    ready = [job for job, what, _ in states if what in OPEN]
    result = {name: [] for name in ("done", "ran", "failed", "left", "blocked")}
    for job, what, _ in states:
        if what not in OPEN:
            result[what].append(job)
    for why in dict.fromkeys(why for _, what, why in states if what == "blocked"):
        say(f"blocked: {why}")
    more = {"reasons": {}, "interrupted": False, "jobs": []}
    if options.executor == "slurm":
        more["jobs"] = [h.job_id for h in submit(ready, machine, options.slurm, say)]
    elif ready:
        say(f"{len(ready)} runs to do, {min(machine.workers, len(ready))} at a time")
        campaign = Campaign(ready, machine, options.budget, say)
        for name, found in campaign.run().items():
            result[name] += found
        more.update(reasons=campaign.reasons, interrupted=campaign.interrupted)
        if result["left"]:
            say("the same command goes on")
    ids = {name: [job.exp.run_id for job in found] for name, found in result.items()}
    say(", ".join(f"{len(found)} {name}" for name, found in ids.items()))
    return {**ids, **more, "seconds": time.monotonic() - begin}


def run(
    what: str,  # as in `jobs`
    protocol: str = None,  # None: what this machine can do
    seeds=(0,),
    machine: Machine = None,  # None: this one
    options: Options = None,  # None: no limit, on this machine
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
        folder = campaign_folder(machine.out_dir)
        request = {"what": what, "protocol": protocol, "seeds": list(seeds), "process": os.getpid()}
        write_json(folder / "latest.json", request)
        stack.enter_context(FileLock(folder / f"{os.getpid()}.lock"))
        return run_jobs(todo, machine, options, say)


def detach(
    argv: list[str],  # of `uvit-repro`, without --detach
    out_dir=None,  # folder of runs
) -> dict:  # process, log
    "Start a campaign in a session of its own; `status` tells what becomes of it."
    log = campaign_folder(out_dir) / "latest.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvit_repro.cli", *argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    return {"process": process.pid, "log": str(log)}


def status(out_dir=None) -> dict:  # the request, running, states by run id, the end of the log
    "What became of the latest campaign, read from the states of its runs."
    folder = campaign_folder(out_dir)
    request, log = read_json(folder / "latest.json", {}), folder / "latest.log"
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    if not request:
        raise FileNotFoundError(f"no campaign under {folder.parent}. {text[-300:]}".strip())
    todo = jobs(request["what"], request["protocol"], request["seeds"])
    return {
        **request,
        "running": held(folder / f"{request['process']}.lock"),
        "states": {job.exp.run_id: state(job.exp, out_dir)[0] for job in todo},
        "log": text.splitlines()[-3:],
    }


def submit(todo: list[Job], machine: Machine, slurm: dict, say=print, cluster="slurm") -> list:
    "Submit runs with submitit, one job each; their handles. A run that two work on is done once."
    try:
        import submitit
    except ImportError:
        raise ParameterError("--executor slurm needs submitit: pip install submitit") from None
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise ParameterError(
            "--executor slurm: no sbatch on this machine; use --executor local, "
            "or give plan --json to another scheduler"
        )
    executor = submitit.AutoExecutor(campaign_folder(machine.out_dir) / "submitit", cluster=cluster)
    handles = []
    for job in todo:
        large = job.exp.protocol in LARGE
        usual = predict(job.exp, paper_gpu()[1] if large else 5e9)["total"] / 60  # one slow core
        settings = {
            "name": job.exp.run_id[:60],
            "timeout_min": math.ceil(max(30, 3 * usual)),
            "cpus_per_task": (4 if large else 1) * machine.processes,
            "gpus_per_node": machine.processes if large else 0,
        }
        for name, value in slurm.items():
            settings[name] = int(value) if str(value).isdecimal() else value
        executor.update_parameters(**settings)
        command = run_command(write_job(job, machine))
        handles.append(
            executor.submit(submitit.helpers.CommandFunction(command, cwd=project_root()))
        )
        say(f"submitted {job.exp.run_id} as job {handles[-1].job_id}")
    return handles
