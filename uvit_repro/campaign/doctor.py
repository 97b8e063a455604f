"""What this machine has, what it lacks, and the command that fetches it."""

import os
import platform
import shutil
from dataclasses import dataclass

import torch

from uvit_repro.campaign.plan import data_status
from uvit_repro.config import DATASET_DEFAULTS, PATHS, project_root
from uvit_repro.data.features import FEATURE_EXTRACTORS, feature_status
from uvit_repro.data.files import printable, write_atomic
from uvit_repro.runs.certificate import cached_certificate
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.records import runs_root

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
        head = printable(f"{self.state:8s} {self.what}: {self.detail}")
        return "\n".join([head, *(f"           {line.strip()}" for line in cure)])


def finding(what: str, ok, detail: str, cure: str = "", otherwise: str = "problem") -> Finding:
    "A finding that is ok, or otherwise a problem or missing."
    return Finding(what, "ok" if ok else otherwise, detail, cure)


def check_devices() -> list[Finding]:
    "Versions, GPUs, cores and threads."
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    detail = names or "none; protocols gpu and paper need one"
    cure = "without one, use --protocol cpu or laptop"
    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch"
    gpu = finding("GPU", gpus, detail, cure, "missing")
    return [finding("versions", True, versions), gpu, finding("CPU", True, cpu)]


def check_data() -> list[Finding]:
    "Data sets and feature networks."
    names = [name for name in DATASET_DEFAULTS if name not in PATHS]
    found = [finding(f"data {name}", *data_status(name), "missing") for name in names]
    for name in FEATURE_EXTRACTORS:
        there, message = feature_status(name)
        first, _, cure = message.partition(": ")[2].partition("\n")
        state = "problem" if "sha256" in first else "missing"
        found.append(finding(f"features {name}", there, first, cure, state))
    return found


def check_folders(out_dir=None) -> list[Finding]:
    "Chapters, write access and disk space."
    books, root = sorted((project_root() / "nbs").glob("[0-9]*.ipynb")), runs_root(out_dir)
    detail = f"{len(books)} under {project_root() / 'nbs'}"
    cure = "run inside a checkout, or set UVIT_REPRO_ROOT to it"
    found = [finding("chapters", books, detail, cure)]
    problem = ""
    try:
        write_atomic(root / f".doctor-{os.getpid()}", lambda p: p.write_bytes(b"")).unlink()
    except OSError as error:
        problem = f": {error}"
    cure = "choose another folder with --out-dir, or change its rights"
    found.append(finding("write access", not problem, f"{root}{problem}", cure))
    folder = next(p for p in (root, *root.parents) if p.is_dir())
    free = shutil.disk_usage(folder).free / 2**30
    detail, cure = f"{free:.1f} GiB free at {folder}", "a run of U-ViT-S/2 keeps about 2 GiB"
    return [*found, finding("disk", free > DISK_NEEDED, detail, cure)]


def check_certificate() -> Finding:
    "Outputs, training steps and samples beside the released code's."
    try:
        rows = cached_certificate(pick_device("auto"))
    except Exception as error:
        return finding("self-test", False, f"{type(error).__name__}: {error}", "reinstall")
    bad = ", ".join(row["file"] for row in rows if not row["ok"])
    good = f"equal to the released code in {len(rows)} checks"
    detail = f"differs from the released code in {bad}" if bad else good
    return finding("self-test", not bad, detail, "report it with the output of this command")


def doctor(
    say=None,  # called with each finding
    self_test: bool = True,  # with the equivalence certificate: seconds where it is not known
    out_dir=None,  # folder of runs
) -> list[Finding]:
    "Look for what the package needs. Missing data are no problem: they close a protocol only."
    found = [*check_devices(), *check_data(), *check_folders(out_dir)]
    found += [check_certificate()] if self_test else []
    if say:
        states = [one.state for one in found]
        for one in found:
            say(str(one))
        say(f"{states.count('problem')} problems, {states.count('missing')} missing")
    return found
