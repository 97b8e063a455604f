"""Every recorded number is computed again, every file compared with its checksum."""

import csv
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from uvit_repro.config import (
    PARAMETERS,
    Experiment,
    ParameterError,
    content_name,
    eval_id,
    from_dict,
    variant_name,
)
from uvit_repro.data.files import printable, sha256_file
from uvit_repro.runs.checkpoints import check_weights
from uvit_repro.runs.evaluate import measurements_of, read_shard
from uvit_repro.runs.experiment import repeat_command
from uvit_repro.runs.measurement import recompute
from uvit_repro.runs.records import (
    LIST,
    SEAL,
    current_metric_name,
    published_root,
    read_list,
    runs_root,
)
from uvit_repro.train import lr_at

LARGEST_STATISTICS = 2**31  # bytes of one file of statistics, unpacked
MOST_LINES = 30  # of what differs
DISTANCES = ("fd_", "fid", "sfid", "kid")  # their last digits depend on the linear algebra


@dataclass(frozen=True)
class Check:
    "One comparison."

    what: str
    where: str  # run and file
    recorded: object
    found: object
    ok: bool

    def __str__(self):
        return printable(f"{self.what} in {self.where}: recorded {self.recorded}, is {self.found}")


def file_sum(path: Path) -> str:
    "The checksum of a file that may be missing."
    return sha256_file(path) if path.is_file() else "missing"


class RunChecks:
    "The checks of one run."

    def __init__(self, folder: Path):
        self.folder, self.checks = folder, []

    def compare(self, what: str, file: str, recorded, found, tolerance: float = 0.0):
        "Add a check; numbers may differ by `tolerance`."
        ok = recorded == found
        if not ok and tolerance and all(isinstance(v, int | float) for v in (recorded, found)):
            ok = abs(recorded - found) <= tolerance
        where = f"{self.folder.name}/{file}"
        self.checks.append(Check(what, where, recorded, found, bool(ok)))

    def attempt(self, file: str, work: Callable, *args):
        "Do some checks; a file that can't be read is one that fails, and its value is None."
        try:
            return work(*args)
        except Exception as error:
            self.compare("file", file, "readable", f"{type(error).__name__}: {str(error)[:300]}")
        return None


def check_seal(run: RunChecks):
    "Compare a run's files with its seal; a file that the seal does not know is one too many."
    lines = (run.folder / SEAL).read_text("utf-8").splitlines()
    sealed = {line[66:]: line[:64] for line in lines}
    for name, checksum in sealed.items():
        run.compare("sha256", name, checksum, file_sum(run.folder / name))
    there = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    for name in sorted(there - set(sealed) - {SEAL, ".lock"}):
        run.compare("file", name, "not in the seal", "there")


def check_record(run: RunChecks, info: dict, exp: Experiment):
    "Compare what run.json says about a run that was trained here with its experiment."
    done = {eval_id(e, step, n) for e, step, n in measurements_of(exp)}
    content = exp.data.data_sha256 or content_name(exp.data)[1]
    names, ours = [d[0] for d in info["deviations"]], [d[1] for d in info["deviations"]]
    values = [getattr(getattr(exp, PARAMETERS[name][0]), name) for name in names]
    for what, recorded, found in (
        ("name of the folder", run.folder.name, exp.run_id),
        ("run_id", info["run_id"], exp.run_id),
        ("command", info["command"], repeat_command(exp)),
        ("images_seen", info["images_seen"], exp.train.n_steps * exp.train.batch_size),
        ("data sha256", info["data"]["sha256"], content),
        ("missing evaluations", [], sorted(done - set(info["evaluations"]))),
        ("deviations", ours, json.loads(json.dumps(values))),
        ("certificate", True, all(r["difference"] < r["tolerance"] for r in info["certificate"])),
    ):
        run.compare(what, "run.json", recorded, found)


def evaluations(run: RunChecks, info: dict, exp: Experiment) -> dict:
    "The evaluations of a record, as (experiment, step, images) by name; names and sums compared."
    found = {}
    for name, entry in info["evaluations"].items():
        at = exp
        if entry["num_samples"]:
            evaluation = replace(exp.evaluation, features=entry["features"])
            at = replace(
                exp, evaluation=evaluation, sampling=replace(exp.sampling, **entry["sampling"])
            )
        found[name] = at, entry["step"], entry["num_samples"]
        run.compare("name of the evaluation", "run.json", name, eval_id(*found[name]))
        file = f"stats/{name}.npz"
        run.compare("sha256", file, entry["stats_sha256"], file_sum(run.folder / file))
    return found


def statistics_values(path: Path) -> dict:
    "Every metric that a file of statistics gives."
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > LARGEST_STATISTICS:
        raise ValueError(f"it unpacks to {size:,} bytes, too many for statistics")
    with np.load(path) as arrays:
        content = dict(arrays)
    if "features" in content:
        return {row["metric"]: row["value"] for row in recompute(content)}
    return {"heldout_loss": float(content["loss"].mean()) if "loss" in content else None}


def check_measurements(run: RunChecks, known: dict):
    "Compute each row of measurements.csv again, and compare its columns with its evaluation."
    values = {}
    for name in known:
        path = run.folder / "stats" / f"{name}.npz"
        values[name] = run.attempt(f"stats/{name}.npz", statistics_values, path) or {}
    with open(run.folder / "measurements.csv", newline="", encoding="utf-8") as lines:
        table = list(csv.DictReader(lines))
    for row in table:
        name, metric = row["eval_id"], current_metric_name(row["metric"])
        file = f"measurements.csv, {name}"
        if name not in known:
            run.compare(f"evaluation of {metric}", file, "in the table", "not in run.json")
            continue
        value, tolerance = values[name].get(metric, "not in the statistics"), 1e-12
        if isinstance(value, float):
            tolerance += (1e-7 if metric.startswith(DISTANCES) else 1e-12) * abs(value)
        given = float(row["value"]) if row["value"] else None
        run.compare(metric, file, given, value, tolerance)
        wanted = expected_columns(*known[name])
        run.compare(f"columns of {metric}", file, {k: row[k] for k in wanted}, wanted)
    rows = {(row["eval_id"], current_metric_name(row["metric"])) for row in table}
    for name, found in values.items():
        missing = [metric for metric in found if (name, metric) not in rows]
        run.compare("metrics without a row", f"measurements.csv, {name}", [], missing)


def expected_columns(exp: Experiment, step: int, num_samples: int) -> dict:
    "What the columns of a measurement say."
    columns = {
        "run_id": exp.run_id,
        "seed": str(exp.seed),
        "step": str(step),
        "protocol": exp.protocol,
        "variant": variant_name(exp.model),
        "model": exp.model.model,
        "dataset": content_name(exp.data)[0],
        "weights": exp.sampling.weights,
    }
    drawn = ("sampler", "nfe", "cfg_scale") if num_samples else ()
    return columns | {name: str(getattr(exp.sampling, name)) for name in drawn}


def check_log(run: RunChecks, exp: Experiment):
    "Compare log.csv with the schedule."
    with open(run.folder / "log.csv", newline="", encoding="utf-8") as lines:
        log = [(int(row["step"]), float(row["lr"])) for row in csv.DictReader(lines)]
    run.compare("last step", "log.csv", log[-1][0], exp.train.n_steps)
    rates = [(step, float(f"{lr_at(exp.train, step - 1):.6g}")) for step, _ in log]
    run.compare("learning rates", "log.csv", log, rates)


def check_local_files(run: RunChecks):
    "Compare this machine's weights, samples and pictures with their checksums."
    for pattern, check in (
        ("weights-*.safetensors", check_weights),
        ("samples/*/[0-9]*.npz", read_shard),
        ("*.png", lambda path: Image.open(path).verify()),
        ("*.npz", lambda path: dict(np.load(path))),
    ):
        for path in sorted(run.folder.glob(pattern)):
            run.attempt(path.relative_to(run.folder).as_posix(), check, path)


def check_run(
    folder: Path,  # of a run
    local: bool = False,  # with weights, samples and pictures; what is not finished is left out
) -> list[Check]:
    "Every check of one run."
    run = RunChecks(folder)
    if (folder / SEAL).exists():
        run.attempt(SEAL, check_seal, run)
    info = run.attempt("run.json", lambda: json.loads((folder / "run.json").read_bytes()))
    exp = run.attempt("run.json", lambda: from_dict(info["experiment"])) if info else None
    if exp is None or (local and info.get("status") != "ok"):
        return run.checks
    if "images_seen" in info:  # trained here; a released network was not
        run.attempt("run.json", check_record, run, info, exp)
        run.attempt("log.csv", check_log, run, exp)
    known = run.attempt("run.json", evaluations, run, info, exp)
    run.attempt("measurements.csv", check_measurements, run, known or {})
    if local:
        check_local_files(run)
    return run.checks


def check_list(root: Path, names: set) -> list[Check]:
    "Compare published runs with the committed list of their seals."
    if not (root / LIST).exists():
        return [Check("list of runs", LIST, "there", "missing", False)]
    listed, checks = read_list(root), []
    for name in sorted(names | set(listed)):
        recorded, found = listed.get(name, "not listed"), file_sum(root / name / SEAL)
        checks.append(Check("seal", f"{name}/{SEAL}", recorded, found, recorded == found))
    return checks


def verify(
    origin: str = "published",  # published | runs
    out_dir=None,  # folder of runs, instead
    say=None,  # told what does not hold, and a summary
) -> list[Check]:
    "Recompute every recorded number of every run, and compare every file that is listed or sealed."
    if origin not in ("published", "runs"):
        raise ParameterError(f"origin = {origin!r}: allowed are published, runs")
    root = published_root() if origin == "published" else runs_root()
    root = Path(out_dir) if out_dir else root
    names = {p.parent.name for file in ("run.json", SEAL) for p in root.glob(f"*/{file}")}
    checks = []
    if root == published_root() or (root / LIST).exists():
        checks += check_list(root, names)
    for name in sorted(names):
        checks += check_run(root / name, origin == "runs")
    if say:
        bad = [check for check in checks if not check.ok]
        for check in bad[:MOST_LINES]:
            say(f"DIFFERS  {check}")
        if len(bad) > MOST_LINES:
            say(f"... and {len(bad) - MOST_LINES} more")
        say(f"{len(names)} runs under {root}: {len(checks)} checks, {len(bad)} differ")
    return checks
