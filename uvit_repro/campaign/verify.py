"""Every recorded number is computed again, every file compared with its checksum."""

import csv
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    with_overrides,
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
    identifying_columns,
    published_root,
    read_list,
    runs_root,
)

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
        text = printable(f"{self.what} in {self.where}: recorded {self.recorded}, is {self.found}")
        return text if len(text) < 1000 else f"{text[:1000]}..."


def compare(what: str, where, recorded, found, tolerance: float = 0.0) -> Check:
    "A check; numbers may differ by `tolerance`."
    numbers = tolerance and all(isinstance(v, int | float) for v in (recorded, found))
    ok = abs(recorded - found) <= tolerance if numbers else recorded == found
    return Check(what, str(where), recorded, found, bool(ok))


def attempt(where, work: Callable, *args) -> Iterator[Check]:
    "The checks that `work` yields; a file that can't be read is one that fails."
    try:
        yield from work(*args) or ()
    except Exception as error:
        yield compare("file", where, "readable", f"{type(error).__name__}: {str(error)[:300]}")


def file_sum(path: Path) -> str:
    "The checksum of a file that may be missing."
    try:
        return sha256_file(path) if path.is_file() else "missing"
    except OSError as error:
        return f"not readable: {error}"


def check_seal(folder: Path) -> Iterator[Check]:
    "Compare a run's files with its seal; a file that the seal does not know is one too many."
    name, lines = folder.name, (folder / SEAL).read_text("utf-8").splitlines()
    sealed = {line[66:]: line[:64] for line in lines}
    for file, checksum in sealed.items():
        yield compare("sha256", f"{name}/{file}", checksum, file_sum(folder / file))
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for file in sorted(there - set(sealed) - {SEAL, ".lock"}):
        yield compare("file", f"{name}/{file}", "not in the seal", "there")


def check_record(folder: Path, info: dict, exp: Experiment) -> Iterator[Check]:
    "Compare what run.json says about a run that was trained here with its experiment."
    done = {eval_id(e, step, n) for e, step, n in measurements_of(exp)}
    content = exp.data.data_sha256 or content_name(exp.data)[1]
    names, ours = [d[0] for d in info["deviations"]], [d[1] for d in info["deviations"]]
    values = [getattr(getattr(exp, PARAMETERS[name][0]), name) for name in names]
    for what, recorded, found in (
        ("name of the folder", folder.name, exp.run_id),
        ("run_id", info["run_id"], exp.run_id),
        ("command", info["command"], repeat_command(exp)),
        ("images_seen", info["images_seen"], exp.train.n_steps * exp.train.batch_size),
        ("data sha256", info["data"]["sha256"], content),
        ("missing evaluations", [], sorted(done - set(info["evaluations"]))),
        ("deviations", ours, json.loads(json.dumps(values))),
        ("certificate", True, all(r["difference"] < r["tolerance"] for r in info["certificate"])),
    ):
        yield compare(what, f"{folder.name}/run.json", recorded, found)


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


def check_measurements(folder: Path, info: dict, exp: Experiment) -> Iterator[Check]:
    "Compute measurements.csv again, evaluation by evaluation."
    with open(folder / "measurements.csv", newline="", encoding="utf-8") as lines:
        table = [{**r, "metric": current_metric_name(r["metric"])} for r in csv.DictReader(lines)]
    for row in table:
        if row["eval_id"] not in info["evaluations"]:
            what, where = f"evaluation of {row['metric']}", f"{folder.name}/measurements.csv"
            yield compare(what, where, row["eval_id"], "not in run.json")
    for name, entry in info["evaluations"].items():
        rows = [row for row in table if row["eval_id"] == name]
        where = f"{folder.name}/stats/{name}.npz"
        yield from attempt(where, check_evaluation, folder, exp, name, entry, rows)


def check_evaluation(
    folder: Path, exp: Experiment, name: str, entry: dict, rows: list
) -> Iterator[Check]:
    "Compute one evaluation again: its name, the checksum of its statistics, its rows."
    step, images, file = entry["step"], entry["num_samples"], f"stats/{name}.npz"
    if images:
        exp = with_overrides(exp, features=entry["features"], **entry["sampling"])
    yield compare(
        "name of the evaluation", f"{folder.name}/run.json", name, eval_id(exp, step, images)
    )
    yield compare("sha256", f"{folder.name}/{file}", entry["stats_sha256"], file_sum(folder / file))
    where = f"{folder.name}/measurements.csv, {name}"
    wanted = {k: str(v) for k, v in identifying_columns(exp, step, images).items()}
    values = statistics_values(folder / file)
    for row in rows:
        metric = row["metric"]
        value, tolerance = values.get(metric, "not in the statistics"), 1e-12
        if isinstance(value, float):
            tolerance += (1e-7 if metric.startswith(DISTANCES) else 1e-12) * abs(value)
        given = float(row["value"]) if row["value"] else None
        yield compare(metric, where, given, value, tolerance)
        yield compare(f"columns of {metric}", where, {k: row[k] for k in wanted}, wanted)
    names = [row["metric"] for row in rows]
    yield compare("metrics without a row", where, [], sorted(set(values) - set(names)))
    repeated = sorted({metric for metric in names if names.count(metric) > 1})
    yield compare("metrics with several rows", where, [], repeated)


def check_readable(read: Callable, path: Path) -> tuple:
    "No check, or the exception of a file that can't be read."
    read(path)
    return ()


def check_local_files(folder: Path) -> Iterator[Check]:
    "Compare this machine's weights, samples and pictures with their checksums."
    for pattern, read in (
        ("weights-*.safetensors", check_weights),
        ("samples/*/[0-9]*.npz", read_shard),
        ("*.png", lambda path: Image.open(path).verify()),
        ("*.npz", lambda path: dict(np.load(path))),
    ):
        for path in sorted(folder.glob(pattern)):
            where = path.relative_to(folder.parent).as_posix()
            yield from attempt(where, check_readable, read, path)


def check_content(folder: Path, local: bool) -> Iterator[Check]:
    "The checks of a run's record, numbers and, if `local`, other files."
    info = json.loads((folder / "run.json").read_bytes())
    exp = from_dict(info["experiment"])
    if local and info.get("status") != "ok":
        return
    if "images_seen" in info:  # trained here; a released network was not
        yield from attempt(f"{folder.name}/run.json", check_record, folder, info, exp)
    yield from attempt(f"{folder.name}/measurements.csv", check_measurements, folder, info, exp)
    yield from check_local_files(folder) if local else ()


def check_run(
    folder: Path,  # of a run
    local: bool = False,  # with weights, samples and pictures; what is not finished is left out
) -> list[Check]:
    "Every check of one run."
    sealed = (folder / SEAL).exists()
    checks = list(attempt(f"{folder.name}/{SEAL}", check_seal, folder)) if sealed else []
    return [*checks, *attempt(f"{folder.name}/run.json", check_content, folder, local)]


def check_list(root: Path, names: set) -> Iterator[Check]:
    "Compare published runs with the committed list of their seals."
    listed = read_list(root)
    for name in sorted(names | set(listed)):
        recorded = listed.get(name, "not listed")
        yield compare("seal", f"{name}/{SEAL}", recorded, file_sum(root / name / SEAL))


def verify(
    origin: str = "published",  # published | runs
    out_dir=None,  # folder of runs, instead
    say=None,  # called with what does not hold, and a summary
) -> list[Check]:
    "Recompute every recorded number of every run, and compare every file that is listed or sealed."
    known = {"published": published_root(), "runs": runs_root()}
    if origin not in known:
        raise ParameterError(f"origin = {origin!r}: allowed are {', '.join(known)}")
    root = Path(out_dir or known[origin])
    if out_dir and not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    files, checks = ("run.json", "measurements.csv", SEAL), []
    names = {path.parent.name for file in files for path in root.glob(f"*/{file}")}
    if (root / LIST).is_file() and (root / LIST).stat().st_size:
        checks += attempt(LIST, check_list, root, names)
    elif root == known["published"] or (root / LIST).exists():
        checks.append(compare("list of runs", LIST, "there", "missing or empty"))
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
