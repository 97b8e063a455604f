"""Records: one writer adds measurements, one reader collects them, committed evidence is sealed."""

import contextlib
import csv
import json
import math
import os
import platform
import shutil
import subprocess
import warnings
from importlib import metadata
from pathlib import Path

from uvit_repro.config import (
    Experiment,
    content_name,
    eval_id,
    from_dict,
    project_root,
    variant_name,
)
from uvit_repro.data.files import (
    UNFINISHED,
    run_lock,
    set_aside,
    sha256_file,
    sweep_unfinished,
    write_atomic,
)

COLUMNS = [
    *("run_id", "eval_id", "chapter", "paper_ref", "dataset", "model", "variant", "protocol"),
    *("seed", "step", "metric", "value", "num_samples", "sampler", "nfe", "cfg_scale"),
    *("weights", "status", "note"),
]
PACKAGES = ("uvit_repro", "torch", "torchvision", "numpy", "diffusers", "torch-fidelity")
PACKAGES += ("accelerate", "papermill")
# Names of the first edition, as published measurements.csv files have them.
RENAMED_METRICS = {"copies": "nn_close", "border_energy": "patch_seam_energy"}
SEAL = "SHA256SUMS"  # checksums of a published run's files
LIST = "RUNS.sha256"  # checksums of the seals of all published runs
EVIDENCE = ("run.json", "measurements.csv", "log.csv", "samples.png", "first.npz")


def runs_root(
    out_dir=None,  # a folder given by the user; None: results/runs in the project
) -> Path:
    "The folder of this machine's runs."
    return Path(out_dir).expanduser().resolve() if out_dir else project_root() / "results" / "runs"


def published_root() -> Path:
    "The folder of committed evidence."
    return project_root() / "results" / "published"


def git(*args: str) -> str:
    "The output of a git command in the project; empty where there is no git or no repository."
    command = ["git", "-C", str(project_root()), *args]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return out.stdout.strip()
    return ""


def cpu_name() -> str:
    "The processor's model, or its architecture."
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def package_version(name: str) -> str | None:
    "The installed version of a package."
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def conditions(
    device="cpu",  # where the run computes
) -> dict:  # plain values, for run.json
    "Code, versions and machine; UVIT_REPRO_COMMIT names the commit where there is no git."
    import torch

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "nbs", "uvit_repro")
    about = {
        "commit": git("rev-parse", "HEAD") or os.environ.get("UVIT_REPRO_COMMIT", ""),
        "dirty": bool(changed),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {p: package_version(p) for p in PACKAGES},
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "tf32_convolutions": bool(torch.backends.cudnn.allow_tf32),
        "tf32_features": False,  # feature networks always run in full float32
        "cuda": torch.version.cuda,
    }
    if str(device).startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(device)
        about["gpu_count"] = torch.cuda.device_count()
    return about


def current_metric_name(
    name: str,  # as a measurements.csv has it
) -> str:
    "Today's name of a metric: `border_energy_p2` is `patch_seam_energy_p2`."
    for old, new in RENAMED_METRICS.items():
        if name == old or name.startswith(f"{old}_p"):
            return new + name.removeprefix(old)
    return name


def whole_rows(path: Path) -> list[dict] | None:
    "The rows of a measurements.csv, none where there is no file; None: it is damaged."
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error):
        return None
    if any(set(r) != set(COLUMNS) or None in r.values() for r in rows):
        return None
    return [{**r, "metric": current_metric_name(r["metric"])} for r in rows]


def read_rows(path: Path) -> list[dict]:
    "The rows of a measurements.csv. A damaged file is set aside: its rows are measured again."
    rows = whole_rows(path)
    if rows is None:
        warnings.warn(f"{path} is damaged; set aside as {set_aside(path).name}", stacklevel=2)
    return rows or []


def measured_ids(folder: Path) -> set[str]:
    "The evaluations with rows in a run's measurements.csv; nothing is changed."
    return {r["eval_id"] for r in whole_rows(folder / "measurements.csv") or []}


def measurement_row(common: dict, row: dict) -> dict:
    "One row of the table. Raises `ValueError` for a value that is neither a number nor explained."
    value = row["value"]
    ok = value is not None and math.isfinite(value)
    if not ok and not row.get("why"):
        raise ValueError(
            f"{row['metric']} = {value}: a measurement is a finite number, or None with the "
            "reason in `why`"
        )
    return {
        **common,
        "metric": row["metric"],
        "value": repr(float(value)) if ok else "",
        "num_samples": row.get("num_samples") or "",
        "status": "ok" if ok else "not run",
        "note": row.get("why", ""),
    }


def identifying_columns(
    exp: Experiment,  # as run, with the sampling and evaluation of a measurement
    step: int,  # training step of the weights
    num_samples: int,  # images drawn; 0: none were
) -> dict:
    "The columns of a measurement that follow from its experiment."
    s = exp.sampling
    return {
        "run_id": exp.run_id,
        "eval_id": eval_id(exp, step, num_samples),
        "dataset": content_name(exp.data)[0],
        "model": exp.model.model,
        "variant": variant_name(exp.model),
        "protocol": exp.protocol,
        "seed": exp.seed,
        "step": step,
        "weights": s.weights,
        "sampler": s.sampler if num_samples else "",
        "nfe": s.nfe if num_samples else "",
        "cfg_scale": s.cfg_scale if num_samples else "",
    }


def record(
    folder: Path,  # the run's folder
    exp: Experiment,  # as run, with the sampling and evaluation of these measurements
    step: int,  # training step of the weights
    num_samples: int,  # images drawn for this evaluation; 0: none were
    rows: list,  # dicts with metric, value (or None and `why`), num_samples
    chapter: str = "",  # where they were made
    paper_ref: str = "",  # what they are compared with
) -> None:
    "Add measurements to a run: the only writer of measurements.csv."
    common = {
        **identifying_columns(exp, step, num_samples),
        "chapter": chapter,
        "paper_ref": paper_ref,
    }
    new = [measurement_row(common, r) for r in rows]
    fresh = {(r["eval_id"], r["metric"]) for r in new}
    path = folder / "measurements.csv"
    old = [r for r in read_rows(path) if (r["eval_id"], r["metric"]) not in fresh]

    def write(to):
        with open(to, "w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(old + new)

    write_atomic(path, write)


def roots(origin: str, out_dir=None) -> dict[str, Path]:
    "Folders of runs by their origin. Raises `ValueError` for an unknown one."
    known = {"runs": runs_root(out_dir), "published": published_root()}
    if origin not in (*known, "all"):
        raise ValueError(f"origin = {origin!r}: allowed are runs, published, all")
    return {name: root for name, root in known.items() if origin in (name, "all")}


def left_out(path: Path, error: Exception) -> None:
    "Name a record that can't be used; readers go on without it."
    why = str(error).splitlines()[0] if str(error) else ""
    warnings.warn(f"{path} is left out: {type(error).__name__}: {why[:200]}", stacklevel=2)


def load_results(
    origin: str = "all",  # runs | published | all
    out_dir=None,  # another folder of runs
):  # DataFrame, one row per measurement, with `origin` and `folder`
    "Every recorded measurement: the only reader. This machine's rows come before published ones."
    import pandas as pd

    text = dict.fromkeys(("note", "eval_id", "paper_ref", "chapter"), str)
    frames = []
    for name, root in roots(origin, out_dir).items():
        for path in sorted(root.glob("*/measurements.csv")):
            try:
                table = pd.read_csv(path, dtype=text)
                table = table[COLUMNS].astype({"value": float, "step": int, "seed": int})
            except Exception as e:  # one damaged or foreign record never stops a reader
                left_out(path, e)
            else:
                frames.append(table.assign(origin=name, folder=str(path.parent)))
    if not frames:
        return pd.DataFrame(columns=[*COLUMNS, "origin", "folder"])
    table = pd.concat(frames, ignore_index=True)
    return table.assign(metric=table.metric.map(current_metric_name))


def load_run(
    folder: Path,  # a run's folder
) -> dict:  # run.json, with `experiment` as an Experiment and `folder`
    "What ran, under which conditions, with which outcome."
    info = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
    return {**info, "experiment": from_dict(info["experiment"]), "folder": Path(folder)}


def load_runs(origin: str = "all", out_dir=None) -> list[dict]:
    "All runs with a readable run.json; one that is in both places is taken from this machine."
    found = {}
    for name, root in roots(origin, out_dir).items():
        for path in sorted(root.glob("*/run.json")):
            if path.parent.name in found:
                continue
            try:
                run = load_run(path.parent)
                found[path.parent.name] = {**run, "status": run["status"], "origin": name}
            except Exception as e:  # one damaged or foreign record never stops a reader
                left_out(path, e)
    return list(found.values())


def read_info(folder: Path) -> dict:
    "run.json as it is, or nothing; a damaged one is set aside."
    path, info = folder / "run.json", None
    with contextlib.suppress(ValueError):
        info = json.loads(path.read_bytes()) if path.exists() else {}
    if not isinstance(info, dict):
        set_aside(path)
    return info if isinstance(info, dict) else {}


def seal(
    folder: Path,  # of a published run
) -> Path:  # the file of checksums
    "Write the checksums of a run's files, in the form of `sha256sum`."
    folder = Path(folder)
    lines = [
        f"{sha256_file(p)}  {p.relative_to(folder).as_posix()}\n"
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith((SEAL, ".lock", UNFINISHED))
    ]
    return write_atomic(
        folder / SEAL, lambda p: p.write_text("".join(lines), "utf-8", newline="\n")
    )


def read_list(root: Path) -> dict[str, str]:  # checksum of the seal by the run's name
    "The runs that are published under a folder."
    path = root / LIST
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line[66:].removesuffix(f"/{SEAL}"): line[:64] for line in lines}


def publish(
    folder: Path,  # a finished run
    target: Path | None = None,  # None: results/published
) -> Path:  # the committed folder
    "Copy a finished run's evidence to results/published and seal it, or raise `ValueError`."
    folder, root = Path(folder), Path(target or published_root())
    status = load_run(folder)["status"]
    if status != "ok":
        raise ValueError(f"{folder.name} is {status!r}: only finished runs are evidence")
    dest = root / folder.name
    statistics = [f"stats/{p.name}" for p in sorted((folder / "stats").glob("*.npz"))]
    with run_lock(root):
        sweep_unfinished(dest)
        for name in (*EVIDENCE, *statistics):
            if (folder / name).exists() and not Path(name).name.startswith(UNFINISHED):
                write_atomic(dest / name, lambda p, n=name: shutil.copyfile(folder / n, p))
        entries = {**read_list(root), folder.name: sha256_file(seal(dest))}
        text = "".join(f"{entries[name]}  {name}/{SEAL}\n" for name in sorted(entries))
        write_atomic(root / LIST, lambda p: p.write_text(text, "utf-8", newline="\n"))
    return dest
