"""What the campaign works on: small runs, publications and stores, and how they are compared."""

import hashlib
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uvit_repro.campaign.transfer import collect
from uvit_repro.campaign.verify import verify
from uvit_repro.config import SMOKE, with_overrides
from uvit_repro.data.autoencoder import digits_autoencoder, enlarge
from uvit_repro.data.digits import load_digits
from uvit_repro.data.encode import Encoding, data_source, encode_images
from uvit_repro.data.files import UNFINISHED, load_tensors, sha256_file
from uvit_repro.data.images import Data
from uvit_repro.runs.experiment import run_experiment
from uvit_repro.runs.records import load_results, publish

SMALL = with_overrides(
    SMOKE,
    precision="fp32",
    attention="math",
    threads=1,
    n_steps=12,
    checkpoint_seconds=0.05,
    curve_steps=(6,),
    loss_steps=(4,),
    sample_batch=30,
)
IGNORED = ("run.json", "log.csv", "prediction.json", ".lock")  # they hold times


def quiet(*_):
    "Say nothing."


def train_small(folder: Path):
    "The small run, in its folder of runs."
    return run_experiment(SMALL, folder, quiet).run_id


def encode_small(folder: Path):
    "Latents of 90 digits, in a few shards."
    digits = load_digits(SMALL.data)
    x, y = digits.train_images, digits.train_labels
    few = Data("digits", x[:80], y[:80], x[80:90], y[80:90], 10, digits.class_names, "1" * 64)
    how = Encoding(batch=10, shard_rows=20)
    encode_images(data_source(few, enlarge), digits_autoencoder(), folder / "store", how, quiet)


def publish_run(run: Path, folder: Path):
    "Publish a finished run below a folder."
    publish(run, folder)


def collect_archive(archive: Path, folder: Path):
    "Collect an archive of records; what was refused."
    folder.mkdir(parents=True, exist_ok=True)
    return collect([archive], folder, quiet)["refused"]


def array_sums(path: Path) -> str:
    "The checksum of the arrays of an npz file; its bytes hold the time of writing."
    total = hashlib.sha256()
    with np.load(path) as arrays:
        for name in sorted(arrays.files):
            total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
            total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def summary(path: Path) -> str:
    "What a file holds, whatever else its bytes depend on."
    if path.suffix == ".npz":
        return array_sums(path)
    if path.name == "measurements.csv":
        table = load_results("runs", path.parent.parent).drop(columns=["folder", "note"])
        table = table[table.run_id == path.parent.name].sort_values(["eval_id", "metric"])
        return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
    if path.name.startswith("resume"):
        return str(sorted(load_tensors(path)))
    return sha256_file(path)


def summary_of_any(path: Path) -> str:
    "The summary of a file, or that it can't be read."
    try:
        return summary(path)
    except Exception as e:
        return f"unreadable: {type(e).__name__}"


def contents(folder: Path) -> dict:  # summaries by relative name
    "Everything below a folder that another process would read."
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        passing = path.name in IGNORED or "damaged" in name or "stats_cache" in name
        if path.is_file() and not passing:
            found[name] = summary_of_any(path)
    return found


def left_behind(folder: Path) -> list:
    "Names of half-written files."
    return [p.name for p in folder.rglob(f"{UNFINISHED}*")]


def complaints(origin: str, folder: Path) -> list[str]:
    "What `verify` finds wrong below a folder."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [str(check) for check in verify(origin, folder) if not check.ok]


@dataclass(frozen=True)
class Workshop:
    "One of each artefact, made once and copied for each case."

    root: Path

    @property
    def runs(self) -> Path:
        "A folder with the finished small run."
        return self.root / "runs"

    @property
    def run(self) -> Path:
        "The finished small run."
        return next(self.runs.glob("*/run.json")).parent

    @property
    def published(self) -> Path:
        "A folder with the published small run and its list."
        return self.root / "published"

    @property
    def store(self) -> Path:
        "A folder with the store of latents."
        return self.root / "latents"

    @property
    def archive(self) -> Path:
        "An archive of the published run."
        return self.root / "carried.tar.gz"


def make_workshop(root: Path) -> Workshop:
    "Make every artefact."
    shop = Workshop(root)
    train_small(shop.runs)
    publish_run(shop.run, shop.published)
    encode_small(shop.store)
    with tarfile.open(shop.archive, "w:gz") as tar:
        tar.add(shop.published / shop.run.name, shop.run.name)
    return shop
