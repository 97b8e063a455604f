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
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from uvit_repro import config
from uvit_repro.config import Experiment, from_dict, project_root
from uvit_repro.data import files
from uvit_repro.data.files import UNFINISHED, set_aside, sha256_file, write_atomic

COLUMNS = [
    *("run_id", "eval_id", "chapter", "paper_ref", "dataset", "model", "variant", "protocol"),
    *("seed", "step", "metric", "value", "num_samples", "sampler", "nfe", "cfg_scale"),
    *("weights", "status", "note"),
]
PACKAGES = "uvit_repro torch torchvision numpy diffusers torch-fidelity accelerate papermill"
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
        "versions": {p: package_version(p) for p in PACKAGES.split()},
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


def read_rows(
    path: Path,  # a measurements.csv
    repair: bool = False,  # set a damaged file aside: its rows are measured again
) -> list[dict]:
    "The rows of a table; none where there is no file, or a damaged one."
    if not path.exists():
        return []
    with contextlib.suppress(UnicodeDecodeError, csv.Error):
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        if all(set(r) == set(COLUMNS) and None not in r.values() for r in rows):
            return [{**r, "metric": current_metric_name(r["metric"])} for r in rows]
    if repair:
        warnings.warn(f"{path} is damaged; set aside as {set_aside(path).name}", stacklevel=2)
    return []


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
        "eval_id": config.eval_id(exp, step, num_samples),
        "dataset": config.content_name(exp.data)[0],
        "model": exp.model.model,
        "variant": config.variant_name(exp.model),
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
    about = {"chapter": chapter, "paper_ref": paper_ref}
    common = {**identifying_columns(exp, step, num_samples), **about}
    new = [measurement_row(common, r) for r in rows]
    fresh = {(r["eval_id"], r["metric"]) for r in new}
    path = folder / "measurements.csv"
    old = [r for r in read_rows(path, repair=True) if (r["eval_id"], r["metric"]) not in fresh]

    table = pd.DataFrame(old + new, columns=COLUMNS)
    write_atomic(path, lambda p: table.to_csv(p, index=False, lineterminator="\n"))


def each_record(
    origin: str,  # runs | published | all
    out_dir,  # another folder of runs
    name: str,  # of the file
    read,  # function of its path
):  # yields origin, folder, what was read
    "A file of every run; one damaged or foreign record is named and never stops a reader."
    known = {"runs": runs_root(out_dir), "published": published_root()}
    if origin not in (*known, "all"):
        raise ValueError(f"origin = {origin!r}: allowed are runs, published, all")
    for place in known if origin == "all" else (origin,):
        for path in sorted(known[place].glob(f"*/{name}")):
            try:
                found = read(path)
            except Exception as e:
                why = str(e).partition("\n")[0][:200]
                warnings.warn(f"{path} is left out: {type(e).__name__}: {why}", stacklevel=3)
            else:
                yield place, path.parent, found


def read_table(
    path: Path,  # a measurements.csv
) -> pd.DataFrame:  # COLUMNS, one row per measurement
    "The measurements of a run, with today's names. Raises an exception for a damaged file."
    text = dict.fromkeys(("note", "eval_id", "paper_ref", "chapter"), str)
    table = pd.read_csv(path, dtype=text)[COLUMNS]
    table = table.astype({"value": float, "step": int, "seed": int})
    return table.assign(metric=table.metric.map(current_metric_name))


def load_results(
    origin: str = "all",  # runs | published | all
    out_dir=None,  # another folder of runs
) -> pd.DataFrame:  # one row per measurement, with `origin` and `folder`
    "Every recorded measurement: the only reader. This machine's rows come before published ones."
    found = each_record(origin, out_dir, "measurements.csv", read_table)
    tables = [table.assign(origin=name, folder=str(folder)) for name, folder, table in found]
    empty = pd.DataFrame(columns=[*COLUMNS, "origin", "folder"])
    return pd.concat(tables, ignore_index=True) if tables else empty


def load_run(
    folder: Path,  # a run's folder
) -> dict:  # run.json, with `experiment` as an Experiment and `folder`
    "What ran, under which conditions, with which outcome."
    info = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
    own = {"status": info["status"], "experiment": from_dict(info["experiment"])}
    return {**info, **own, "folder": Path(folder)}


def load_runs(origin: str = "all", out_dir=None) -> list[dict]:
    "All runs with a readable run.json; one that is in both places is taken from this machine."
    found = {}
    runs = each_record(origin, out_dir, "run.json", lambda path: load_run(path.parent))
    for place, folder, run in runs:
        found.setdefault(folder.name, {**run, "origin": place})
    return list(found.values())


def read_info(folder: Path) -> dict:
    "run.json as it is, or nothing; a damaged one is set aside."
    path = folder / "run.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        info = json.loads(path.read_bytes())
        if isinstance(info, dict):
            return info
    if path.exists():
        set_aside(path)
    return {}


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
    with files.run_lock(root):
        files.sweep_unfinished(root)
        for name in (*EVIDENCE, *statistics):
            if (folder / name).exists() and not Path(name).name.startswith(UNFINISHED):
                write_atomic(dest / name, lambda p, n=name: shutil.copyfile(folder / n, p))
        entries = {**read_list(root), folder.name: sha256_file(seal(dest))}
        text = "".join(f"{entries[name]}  {name}/{SEAL}\n" for name in sorted(entries))
        write_atomic(root / LIST, lambda p: p.write_text(text, "utf-8", newline="\n"))
    return dest


# ---------------------------------------------------------------- similarity of layers


def similarity_path(
    folder: Path,  # of a run
    settings: dict,  # how the matrices are measured
) -> Path:
    "Where the similarity matrices of these settings are kept, beside other statistics."
    return Path(folder) / "stats" / f"cka-{config.digest(settings, 8)}.npz"


def write_similarity(folder: Path, settings: dict, hsic: np.ndarray) -> None:
    "Keep the mean HSIC of all pairs of layers. Raises `ValueError` where it is not finite."
    if not np.isfinite(hsic).all():
        raise ValueError(f"{folder.name}: a block's outputs are not finite")
    text, path = np.array(json.dumps(settings, sort_keys=True)), similarity_path(folder, settings)
    write_atomic(path, lambda p: np.savez_compressed(p, hsic=hsic, settings=text))


def read_similarity(path: Path) -> tuple[dict, np.ndarray]:  # settings, HSIC
    "Read kept matrices. Raises `ValueError` for a damaged file."
    try:
        with np.load(path) as arrays:
            settings, hsic = json.loads(str(arrays["settings"])), arrays["hsic"]
        if path == similarity_path(path.parents[1], settings):
            return settings, hsic
        why = "does not hold what its name says"
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        why = f"can't be read ({type(e).__name__})"
    raise ValueError(f"{path} {why}: remove it and run chapter 09_representations again")


def kept_similarities(folder: Path) -> list[tuple[dict, np.ndarray]]:
    "All kept matrices of a run, here or published."
    return [read_similarity(p) for p in sorted((Path(folder) / "stats").glob("cka-*.npz"))]
