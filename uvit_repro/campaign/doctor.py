"""What this machine has, what it lacks, and the command that fetches it."""

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement

from uvit_repro.campaign.plan import data_status
from uvit_repro.config import DATASET_DEFAULTS, PATHS, project_root
from uvit_repro.data.features import FEATURE_EXTRACTORS, feature_status
from uvit_repro.data.files import write_atomic
from uvit_repro.runs.certificate import cached_certificate
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.records import runs_root

OPTIONAL = {"submitit": "submits runs to a cluster", "jupyterlab": "opens the chapters"}
DISK_NEEDED = 5.0  # GiB


@dataclass(frozen=True)
class Finding:
    "One thing that was looked for."

    what: str
    state: str  # ok | missing (closes a protocol) | problem (closes the package)
    detail: str
    cure: str = ""  # what to do when it is not ok

    def __str__(self):
        cure = self.cure.splitlines() if self.state != "ok" else []
        head = f"{self.state:8s} {self.what}: {self.detail}"
        return "\n".join([head, *(f"           {line.strip()}" for line in cure)])


def check_packages() -> list[Finding]:
    "Versions of what the package needs, against what it asks for."
    found = [Finding("python", "ok", platform.python_version())]
    try:
        needed = [Requirement(line) for line in metadata.requires("uvit_repro") or []]
    except metadata.PackageNotFoundError:
        cure = "pip install -e . in the project's folder"
        return [*found, Finding("uvit_repro", "problem", "not installed", cure)]
    for need in (need for need in needed if not need.marker):  # extras have one
        try:
            version = metadata.version(need.name)
            fits = need.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, fits = "not installed", False
        state = "ok" if fits else "problem"
        found.append(Finding(need.name, state, version, f"pip install '{need}'"))
    for name, purpose in OPTIONAL.items():
        state = "ok" if importlib.util.find_spec(name) else "missing"
        found.append(Finding(name, state, f"optional: {purpose}", f"pip install {name}"))
    return found


def check_devices() -> list[Finding]:
    "GPUs, cores and threads."
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        gpus.append(f"{torch.cuda.get_device_name(i)} ({memory:.0f} GiB)")
    gpu = Finding("GPU", "ok", ", ".join(gpus))
    if not gpus:
        cure = "run where a CUDA device is, or use --protocol laptop"
        gpu = Finding("GPU", "missing", "none; protocols gpu and paper need one", cure)
    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch"
    return [gpu, Finding("CPU", "ok", cpu)]


def check_data() -> list[Finding]:
    "Data sets and feature networks."
    found = []
    for name in (name for name in DATASET_DEFAULTS if name not in PATHS):
        there, detail, cure = data_status(name)
        found.append(Finding(f"data {name}", "ok" if there else "missing", detail, cure))
    for name in FEATURE_EXTRACTORS:
        there, message = feature_status(name)
        first, _, cure = message.partition(": ")[2].partition("\n")
        state = "problem" if "sha256" in first else "missing"
        found.append(Finding(f"features {name}", "ok" if there else state, first, cure))
    return found


def check_folders(out_dir=None) -> list[Finding]:
    "Chapters, write access and disk space."
    books, root = sorted((project_root() / "nbs").glob("[0-9]*.ipynb")), runs_root(out_dir)
    cure = "run inside a checkout, or set UVIT_REPRO_ROOT to it"
    detail = f"{len(books)} under {project_root() / 'nbs'}"
    chapters = Finding("chapters", "ok" if books else "problem", detail, cure)
    access = Finding("write access", "ok", str(root))
    try:
        write_atomic(root / f".doctor-{os.getpid()}", lambda p: p.write_bytes(b"")).unlink()
    except OSError as error:
        cure = "choose another folder with --out-dir, or change its rights"
        access = Finding("write access", "problem", f"{root}: {error}", cure)
    folder = next(p for p in (root, *root.parents) if p.is_dir())
    free = shutil.disk_usage(folder).free / 2**30
    state, cure = "ok" if free > DISK_NEEDED else "problem", "a run of U-ViT-S/2 keeps about 2 GiB"
    return [chapters, access, Finding("disk", state, f"{free:.1f} GiB free at {folder}", cure)]


def check_certificate() -> Finding:
    "Outputs, training steps and samples beside the released code's."
    try:
        rows = cached_certificate(pick_device("auto"))
    except Exception as error:
        return Finding("self-test", "problem", f"{type(error).__name__}: {error}", "reinstall")
    bad = ", ".join(row["file"] for row in rows if not row["ok"])
    if bad:
        cure = "report it with the output of this command"
        return Finding("self-test", "problem", f"differs from the released code in {bad}", cure)
    return Finding("self-test", "ok", f"equal to the released code in {len(rows)} checks")


def doctor(
    say=None,  # told each finding
    self_test: bool = True,  # with the equivalence certificate: seconds where it is not known
    out_dir=None,  # folder of runs
) -> list[Finding]:
    "Look for what the package needs. Missing data are no problem: they close a protocol only."
    found = [*check_packages(), *check_devices(), *check_data(), *check_folders(out_dir)]
    found += [check_certificate()] if self_test else []
    states = [finding.state for finding in found]
    for finding in found if say else ():
        say(str(finding))
    if say:
        say(f"{states.count('problem')} problems, {states.count('missing')} missing")
    return found
