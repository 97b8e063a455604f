"""A run leaves files that are whole or absent, one writer adds measurements, one reader collects them, and committed evidence is never mistaken for work done here."""

import contextlib
import csv
import json
import os
import platform
import shutil
import subprocess
import warnings
from importlib import metadata
from pathlib import Path

from uvit_repro.config import Experiment, content_name, eval_id, from_dict, project_root
from uvit_repro.data.files import sha256_file, write_atomic


def runs_root(
    out_dir=None,  # a folder given by the user; None: results/runs in the project
) -> Path:  # where this machine's runs are
    "The folder of this machine's runs."
    return Path(out_dir).expanduser().resolve() if out_dir else project_root() / "results" / "runs"


def published_root() -> Path:
    "The folder of committed evidence."
    return project_root() / "results" / "published"


def _git(*args) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(project_root()), *args], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        return next(
            (
                l.split(":", 1)[1].strip()
                for l in open("/proc/cpuinfo")
                if l.startswith("model name")
            ),
            "",
        )
    return platform.processor()


def conditions(
    device="cpu",  # where the run computes
) -> dict:  # plain values, for run.json
    "Code, versions and machine. UVIT_REPRO_COMMIT names the commit where the checkout did not travel."
    import torch

    def version(p):
        try:
            return metadata.version(p)
        except metadata.PackageNotFoundError:
            return None

    commit = _git("rev-parse", "HEAD") or os.environ.get("UVIT_REPRO_COMMIT", "")
    d = {
        "commit": commit,
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", "nbs", "uvit_repro")
        ),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {
            p: version(p)
            for p in (
                "uvit_repro",
                "torch",
                "torchvision",
                "numpy",
                "diffusers",
                "torch-fidelity",
                "accelerate",
                "papermill",
            )
        },
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "cuda": torch.version.cuda,
    }
    if str(device).startswith("cuda"):
        d.update(gpu=torch.cuda.get_device_name(device), gpu_count=torch.cuda.device_count())
    return d


COLUMNS = [
    "run_id",
    "eval_id",
    "chapter",
    "paper_ref",
    "dataset",
    "model",
    "variant",
    "protocol",
    "seed",
    "step",
    "metric",
    "value",
    "num_samples",
    "sampler",
    "nfe",
    "cfg_scale",
    "weights",
    "status",
    "note",
]


# Names of the first edition, as published measurements.csv files have them.
RENAMED_METRICS = {"copies": "nn_close", "border_energy": "patch_seam_energy"}


def current_metric_name(
    name: str,  # as a measurements.csv has it
) -> str:
    "Today's name of a metric: `border_energy_p2` is `patch_seam_energy_p2`."
    for old, new in RENAMED_METRICS.items():
        if name == old or name.startswith(f"{old}_p"):
            return new + name.removeprefix(old)
    return name


def record(
    folder: Path,  # the run's folder
    exp: Experiment,  # as run, with the sampling and evaluation of these measurements
    step: int,  # training step of the weights
    num_samples: int,  # images drawn for this evaluation; 0: none were
    rows: list,  # dicts with metric, value (or None and `why`), num_samples
    chapter="",
    paper_ref="",
    status="ok",  # where they were made and what they stand beside
):
    "Add measurements to the run's ledger: the only writer of measurements.csv."
    import math

    from uvit_repro.config import variant_name

    eid = eval_id(exp, step, num_samples)
    common = dict(
        run_id=exp.run_id,
        eval_id=eid,
        chapter=chapter,
        paper_ref=paper_ref,
        dataset=content_name(exp.data)[0],
        model=exp.model.model,
        variant=variant_name(exp.model),
        protocol=exp.protocol,
        seed=exp.seed,
        step=step,
        weights=exp.sampling.weights,
        **(
            {
                "sampler": exp.sampling.sampler,
                "nfe": exp.sampling.nfe,
                "cfg_scale": exp.sampling.cfg_scale,
            }
            if num_samples
            else {"sampler": "", "nfe": "", "cfg_scale": ""}
        ),
    )
    new = []
    for r in rows:
        ok = r["value"] is not None and math.isfinite(r["value"])
        if not ok and not r.get("why"):
            raise ValueError(
                f"{r['metric']} = {r['value']}: a measurement is a finite number, or None with the reason in `why`"
            )
        new.append(
            dict(
                common,
                metric=r["metric"],
                value=repr(float(r["value"])) if ok else "",
                num_samples=r.get("num_samples") or "",
                status=status if ok else "not run",
                note=r.get("why", ""),
            )
        )
    path, old = folder / "measurements.csv", []
    if path.exists():
        with open(path, newline="") as f:
            old = [r | {"metric": current_metric_name(r["metric"])} for r in csv.DictReader(f)]
    key = lambda r: (r["run_id"], r["eval_id"], r["metric"])
    fresh = {key(r) for r in new}

    def write(p):
        with open(p, "w", newline="") as f:
            w = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            w.writeheader()
            w.writerows([r for r in old if key(r) not in fresh] + new)

    write_atomic(path, write)


def load_results(
    origin="all",  # runs | published | all
    out_dir=None,  # another folder of runs
):  # DataFrame, one row per measurement, with `origin` and `folder`
    "Every recorded measurement: the only reader. Where a run is in both places, this machine's rows come first."
    import pandas as pd

    roots = {"runs": runs_root(out_dir), "published": published_root()}
    if origin not in ("runs", "published", "all"):
        raise ValueError(f"origin = {origin!r}: allowed are runs, published, all")
    frames = []
    for name, root in roots.items():
        if origin not in (name, "all"):
            continue
        for p in sorted(root.glob("*/measurements.csv")):
            try:
                frames.append(
                    pd.read_csv(
                        p, dtype={"note": str, "eval_id": str, "paper_ref": str, "chapter": str}
                    ).assign(origin=name, folder=str(p.parent))
                )
            except Exception as e:
                warnings.warn(
                    f"{p} can't be read ({type(e).__name__}); it is left out of the tables"
                )
    if not frames:
        return pd.DataFrame(columns=COLUMNS + ["origin", "folder"])
    table = pd.concat(frames, ignore_index=True)
    return table.assign(metric=table.metric.map(current_metric_name))


def load_run(
    folder: Path,  # a run's folder
) -> dict:  # run.json, with `experiment` as an Experiment and `folder`
    "What ran, under which conditions, with which outcome."
    d = json.loads((Path(folder) / "run.json").read_text())
    return dict(d, experiment=from_dict(d["experiment"]), folder=Path(folder))


def load_runs(origin="all", out_dir=None) -> list[dict]:
    "All runs that have a run.json, this machine's before committed ones; a run found twice is taken from this machine."
    roots = {"runs": runs_root(out_dir), "published": published_root()}
    res = {}
    for name, root in roots.items():
        if origin in (name, "all"):
            for p in sorted(root.glob("*/run.json")):
                res.setdefault(p.parent.name, dict(load_run(p.parent), origin=name))
    return list(res.values())


SEAL = "SHA256SUMS"


def seal(
    folder: Path,  # of a published run
) -> Path:  # the file of sums
    "Write the sums of a run's files, in the form of `sha256sum`."
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (SEAL, ".lock"))
    return write_atomic(
        folder / SEAL,
        lambda p: p.write_text(
            "".join(f"{sha256_file(f)}  {f.relative_to(folder).as_posix()}\n" for f in files)
        ),
    )


EVIDENCE = (
    "run.json",
    "measurements.csv",
    "log.csv",
    "samples.png",
    "first.npz",
    "prediction.json",
    "look.png",
    "centre.png",
)


def publish(
    folder: Path,  # a finished run
    target: Path = None,  # None: results/published
) -> Path:  # the committed folder
    "Copy a finished run's evidence to results/published and seal it. Raises `ValueError` when the run is not finished."
    folder = Path(folder)
    info = load_run(folder)
    if info["status"] != "ok":
        raise ValueError(f"{folder.name} is {info['status']!r}: only finished runs are evidence")
    dest = Path(target or published_root()) / folder.name
    for n in EVIDENCE + tuple(f"stats/{p.name}" for p in sorted((folder / "stats").glob("*.npz"))):
        if (folder / n).exists():
            write_atomic(dest / n, lambda p: shutil.copyfile(folder / n, p))
    seal(dest)
    return dest
