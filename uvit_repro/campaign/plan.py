"""What there is of each run, what is missing, what that will cost here, and how to start it."""

import contextlib
import importlib
import math
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout

from uvit_repro.campaign.jobs import Job, jobs
from uvit_repro.campaign.predict import LARGE, Machine, paper_gpu, predict, read_json, this_machine
from uvit_repro.config import DATASETS, MODELS, PATHS, Experiment, data_root, default_protocol
from uvit_repro.config.durations import format_duration
from uvit_repro.runs.evaluate import missing_measurements
from uvit_repro.runs.experiment import repeat_command
from uvit_repro.runs.records import published_root, runs_root

EMBEDDED = {  # data sets that need no file
    "digits": "inside scikit-learn",
    "digits_latents": "made from scikit-learn's digits",
    "shapes": "drawn by the package",
}
OPEN = ("missing", "published", "stopped", "failed", "running")  # states with work left here


def data_status(
    name: str,  # a key of DATASETS
    root: str = "",  # folder of the data sets; empty: as configured
) -> tuple[bool, str, str]:  # whether found, where or why not, how to get it
    "Is a data set here? Nothing is opened."
    if name in EMBEDDED:
        return True, EMBEDDED[name], ""
    module, folder = importlib.import_module(DATASETS[name].partition(":")[0]), data_root(root)
    try:
        return True, str(getattr(module, f"find_{name}")(folder)), ""
    except FileNotFoundError as error:
        first, _, rest = str(error).partition("\n")
        return False, f"not under {folder}", rest.strip() or first


def obstacle(exp: Experiment) -> str:
    "What keeps an experiment from running here and now; empty: nothing."
    kind = exp.data.dataset.partition(":")[0]
    if exp.model.model not in MODELS:
        return f"no backbone {exp.model.model!r} in this version"
    found, detail = True, ""
    if kind not in PATHS:
        found, detail, _ = data_status(kind, exp.execution.data_root)
    return "" if found else f"{kind}: {detail}; uvit-repro doctor says how to get it"


def held(path: Path) -> bool:
    "Whether some process holds a lock file."
    with contextlib.suppress(OSError):  # a folder that can only be read
        if path.exists():
            try:
                FileLock(path).acquire(timeout=0).lock.release()
            except Timeout:
                return True
    return False


def progress(folder: Path, exp: Experiment) -> float:
    "The share of the training that a run need not do again, from 0 to 1."
    n_steps = exp.train.n_steps
    if (folder / f"weights-{n_steps:07d}.safetensors").exists():
        return 1.0
    if any(folder.glob("checkpoint*.pt")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            last = (folder / "log.csv").read_text("utf-8").splitlines()[-1]
            return min(1.0, int(last.split(",")[0]) / n_steps)
    return 0.0


def is_whole(exp: Experiment, folder: Path) -> bool:
    "Whether a folder holds the finished run with all its measurements."
    info = read_json(folder / "run.json")
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        return info.get("status") == "ok" and not missing_measurements(exp, folder, info)
    return False


def state(
    exp: Experiment,
    out_dir=None,  # folder of runs
) -> tuple[str, str]:  # done, running, blocked, failed, stopped, published, missing; and why
    "What there is of an experiment. Nothing is changed."
    folder = runs_root(out_dir) / exp.run_id
    if is_whole(exp, folder):
        return "done", ""
    if held(folder / ".lock"):
        return "running", "another process works on it"
    if why := obstacle(exp):
        return "blocked", why
    info, share = read_json(folder / "run.json"), progress(folder, exp)
    if info.get("status") == "failed":
        return "failed", str(info.get("error"))[:200]
    if share:
        return "stopped", f"{share:.0%} of the training is there"
    published = is_whole(exp, published_root() / exp.run_id)
    return ("published", "committed evidence; not run here") if published else ("missing", "")


def plan(
    what: str = "all",  # as in `jobs`
    protocol: str = None,  # None: what this machine can do
    seeds=(0,),  # each is a whole set of runs
    machine: Machine = None,  # None: this one
) -> dict:  # plain values: runs, states, seconds, gpu_hours
    "Every run behind some published numbers or claims: its state, its cost, its command."
    protocol, machine = protocol or default_protocol(), machine or this_machine()
    trained, rows = set(), []
    for job in jobs(what, protocol, seeds):
        rows.append(plan_row(job, machine, job.exp.run_id in trained))
        trained.add(job.exp.run_id)  # other evaluations need not train again
    return {
        "what": what,
        "protocol": protocol,
        "workers": machine.workers,
        "seconds": sum(row["seconds"] for row in rows if row["state"] in OPEN),
        "gpu_hours": sum(row["gpu_hours"] for row in rows),
        "states": dict(Counter(row["state"] for row in rows)),
        "runs": rows,
    }


def plan_row(job: Job, machine: Machine, trained: bool) -> dict:
    "A run in a plan."
    exp, (what, why) = job.exp, state(job.exp, machine.out_dir)
    done = 1.0 if trained else progress(runs_root(machine.out_dir) / exp.run_id, exp)
    seconds = hours = 0.0
    if what != "done":
        seconds = machine.expected(exp, done)
        rate = machine.rate(exp) if machine.device.type == "cuda" else paper_gpu()[1]
        hours = predict(exp, rate, done) / 3600
    row = {"run_id": exp.run_id, "state": what, "why": why, "protocol": exp.protocol}
    row |= {"seed": exp.seed, "sampler": f"{exp.sampling.sampler} {exp.sampling.nfe}"}
    row |= {"places": list(job.places), "seconds": seconds, "gpu_hours": hours}
    return row | {"command": repeat_command(exp)}


def plan_lines(
    found: dict,  # of `plan`
) -> list[str]:
    "A plan for a terminal: a line for each run, and the sums."
    runs, lines, large = found["runs"], [], found["protocol"] in LARGE
    width = max((len(row["run_id"]) for row in runs), default=0)
    for row in runs:
        cost = f"{row['gpu_hours']:.3g} GPU-h" if large else format_duration(row["seconds"])
        cost = "" if row["state"] == "done" else cost
        why = f"  ({row['why']})" if row["state"] in ("running", "failed", "stopped") else ""
        text = f"{row['run_id']:{width}s}  {row['state']:9s}  {cost:>11s}  {row['sampler']}"
        lines.append(text + why)
    for why, n in Counter(row["why"] for row in runs if row["state"] == "blocked").items():
        lines.append(f"blocked, {n} of them: {why}")
    states = ", ".join(f"{n} {name}" for name, n in found["states"].items())
    lines.append(f"{len(runs)} runs of protocol {found['protocol']}: {states or 'none'}")
    time = format_duration(math.ceil(found["seconds"] / found["workers"]))
    left = f"left: about {time} here, {found['workers']} at a time"
    if large:
        left = f"left: {found['gpu_hours']:.4g} GPU-hours"
    lines += ["the command of each run: add --json", left]
    return lines
