"""Arrays in shards: written once, resumed after a kill, memory-mapped, checked when read."""

import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from uvit_repro.config import ParameterError, project_root
from uvit_repro.data.fetch import missing
from uvit_repro.data.files import (
    DamagedFile,
    printable,
    read_checked_json,
    run_lock,
    set_aside,
    sha256_file,
    sweep_unfinished,
    write_atomic,
    write_checked_json,
)

VERSION = 3  # of the layout
AGAIN = "Repeat the command that wrote the store: only what is missing is made again"


class StoreError(DamagedFile):
    "A store that can't be used; the message names the file and says what to do."


@dataclass(frozen=True)
class Encoding:
    "How encoded images or texts are stored."

    dtype: str = "float32"  # float32 | float16
    batch: int = 32  # encoded at once: part of what decides the bits
    shard_rows: int = 1024  # in a shard: what a kill can cost
    mirror: bool = True  # encode each image's mirror as well

    def __post_init__(self):
        size, batch = self.shard_rows, self.batch
        if self.dtype not in ("float32", "float16") or not 1 <= batch <= size or size % batch:
            text = f"dtype = {self.dtype!r}, batch = {batch}, shard_rows = {size}"
            raise ParameterError(f"{text}: float32 or float16, and whole batches in a shard")


def _problem(path: Path, known: dict, thorough: bool) -> str:
    "Why a file is not the recorded one; empty when it is. Only a thorough look reads all of it."
    if not path.is_file():
        return "is a folder" if path.is_dir() else "is missing"
    size = path.stat().st_size
    if size != known["bytes"]:
        return f"is damaged ({size:,} bytes instead of {known['bytes']:,})"
    if thorough and sha256_file(path) != known["sha256"]:
        return "is damaged (its checksum differs)"
    return ""


def _read_record(path: Path, say) -> dict | None:
    "The record of a shard or a store, when its files are whole; damaged files are set aside."
    try:
        record = read_checked_json(path)
    except FileNotFoundError:
        return None
    except DamagedFile as e:
        say(f"{e}; renamed to {set_aside(path).name}")
        return None
    problems = {n: _problem(path.parent / n, f, True) for n, f in record["files"].items()}
    for name, problem in problems.items():
        file = path.parent / name
        if problem and file.is_file():
            say(f"{printable(file)} {problem}; renamed to {set_aside(file).name}")
    return None if any(problems.values()) else record


def _write_record(path: Path, suffix: str, arrays: dict, record: dict) -> dict:
    "Write arrays, then the record that names them, and return the record."
    files = {f"{name}{suffix}.npy": array for name, array in arrays.items()}
    for name, array in files.items():
        file = write_atomic(path.parent / name, lambda p, a=array: np.save(p, a))
        files[name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    record = {**record, "files": files}
    write_checked_json(path, record)
    return record


def _refuse_other(path: Path, job: dict, records: list[dict]) -> None:
    "Raise `ParameterError` when a folder holds another store."
    for old in (record["job"] for record in records):
        if differ := [k for k in job if old.get(k) != job[k]]:
            text = "; ".join(f"{k} = {old.get(k)!r} there, {job[k]!r} here" for k in differ)
            text = f"{printable(path)} holds something else ({text[:200]})"
            raise ParameterError(f"{text}: give another folder, or remove this one")


def write_store(
    path,  # the store's folder
    job: dict,  # everything that decides its content, with kind, count and shard_rows
    make_shard,  # function of (first, end): arrays by name, and a record
    make_index,  # function of all records: arrays by name, and fields of the index
    say=print,  # progress and damage
) -> None:
    "Write what a store lacks. The same call resumes, repairs, or finds that all is done."
    path, size = Path(path), job["shard_rows"]
    spans = [(a, min(a + size, job["count"])) for a in range(0, job["count"], size)]
    with run_lock(path, say):
        sweep_unfinished(path)
        names = [path / f"shard-{k:05d}.json" for k in range(len(spans))]
        records = [_read_record(name, say) for name in names]
        _refuse_other(path, job, [r for r in records if r])
        todo = [k for k, record in enumerate(records) if record is None]
        last = time.monotonic()
        for k in todo:
            if time.monotonic() - last > 15:
                last = time.monotonic()
                say(f"{spans[k][0]:,} of {job['count']:,} written")
            arrays, record = make_shard(*spans[k])
            record = {**record, "rows": len(next(iter(arrays.values()))), "job": job}
            records[k] = _write_record(names[k], f"-{k:05d}", arrays, record)
        if todo or _read_record(path / "index.json", say) is None:
            arrays, index = make_index(records)
            index |= {"version": VERSION, "kind": job["kind"]}
            index["rows"] = [r["rows"] for r in records]
            index["shards"] = {name: f for r in records for name, f in r["files"].items()}
            _write_record(path / "index.json", "", arrays, index)


class Store:
    """A complete store: `len`, `load(name)`, `rows(name, numbers)`. Processes may share one; each
    maps what it reads, and compares its checksum when it does so for the first time."""

    kind = ""

    def __init__(self, path):
        self.path, self._maps = Path(path), {}
        file, shown = self.path / "index.json", printable(path)
        if not file.is_file():
            text = f"{shown} is no store, or not complete (it has no index.json)"
            raise FileNotFoundError(f"{text}. {AGAIN}")
        try:
            self.index = read_checked_json(file)
        except DamagedFile as e:
            raise StoreError(f"{e}. {AGAIN}") from None
        found = self.index.get("kind"), self.index.get("version")
        if found != (self.kind or found[0], VERSION):
            wanted = f"wanted {self.kind or 'a store'} in version {VERSION}"
            raise StoreError(f"{shown} holds {found[0]} in version {found[1]}; {wanted}")
        self.files = {**self.index["shards"], **self.index["files"]}
        self._refuse(self.problems(thorough=False))
        self.ends = np.cumsum(self.index["rows"])

    def __len__(self):
        return int(self.ends[-1])

    def problems(self, thorough: bool) -> list[str]:
        "What is wrong with the files; a thorough look reads all of them."
        looks = ((n, _problem(self.path / n, f, thorough)) for n, f in self.files.items())
        return [f"{name} {problem}" for name, problem in looks if problem]

    def _refuse(self, problems: list[str]):
        "Raise `StoreError` where there is a problem."
        if problems:
            text = f"{len(problems)} problem(s): {'; '.join(problems[:5])}"
            raise StoreError(f"{printable(self.path)}: {text}. {AGAIN}")

    def load(self, name: str) -> np.ndarray:
        "A whole array, memory-mapped, its checksum compared."
        path = self.path / f"{name}.npy"
        problem = _problem(path, self.files[path.name], thorough=True)
        if problem:
            with suppress(OSError):  # where the folder can be written
                problem += f", renamed to {set_aside(path).name}"
            self._refuse([f"{path.name} {problem}"])
        return np.load(path, mmap_mode="r")

    def rows(self, name: str, numbers, views=None) -> np.ndarray:
        "Some rows of an array, as one; with views, the given element of each row."
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            bounds = f"{numbers.min()}..{numbers.max()}"
            raise IndexError(f"rows {bounds} of {printable(self.path)}, which has {len(self)}")
        which = np.searchsorted(self.ends, numbers, side="right")
        inside = numbers - np.concatenate([[0], self.ends])[which]
        shards = self._maps.setdefault(name, {})
        for k in {0, *which.tolist()} - set(shards):
            shards[k] = np.asarray(self.load(f"{name}-{k:05d}"))
        places = inside[:, None] if views is None else np.stack([inside, views], 1)
        out = np.empty((len(numbers), *shards[0].shape[places.shape[1] :]), shards[0].dtype)
        for i, (k, place) in enumerate(zip(which.tolist(), places, strict=True)):
            out[i] = shards[k][tuple(place)]
        return out

    def records(self) -> list[dict]:
        "What was noted about each shard."
        try:
            names = [f"shard-{k:05d}.json" for k in range(len(self.index["rows"]))]
            return [read_checked_json(self.path / n) for n in names]
        except (DamagedFile, FileNotFoundError) as e:
            raise StoreError(f"{e}. {AGAIN}") from None

    def verify(self) -> dict:
        "Read everything and compare checksums. Raises `StoreError` naming what is damaged."
        self._refuse(self.problems(thorough=True))
        self.records()
        size = sum(f["bytes"] for f in self.files.values())
        return {"rows": len(self), "files": len(self.files), "bytes": size}


class Inputs:
    "Some rows of a store, in an order of their own: `len` and `read`, as training wants them."

    def __init__(self, store: Store, index: Tensor):
        self.store, self.index = store, index

    def __len__(self):
        return len(self.index)

    def read(self, index: Tensor, mirror: Tensor = None) -> Tensor:
        "Pixels or moments of some examples."
        return self.store.read(self.index[index], mirror)


def find_store(name: str, folder: str, root) -> Path:
    "A store below the folder of the data sets, or the error with the command that makes it."
    path = Path(root) / folder
    if not (path / "index.json").is_file():
        state = "is not complete" if path.is_dir() else "is not there"
        raise missing(name, root, f"{printable(path)} {state}")
    return path


def in_cache(
    name: str,  # of the store's folder
    make,  # function of that folder: opens the store, written where needed
) -> Store:
    "A store in results/cache, or in a temporary folder where that can't be written."
    user = os.getuid() if hasattr(os, "getuid") else 0
    places = (
        project_root() / "results" / "cache",
        Path(tempfile.gettempdir()) / f"uvit-cache-{user}",
    )
    try:
        return make(places[0] / name)
    except OSError:
        return make(places[1] / name)
