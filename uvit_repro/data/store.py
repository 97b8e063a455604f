"""Arrays in shards: encoded once, resumed after a kill, memory-mapped, checked when read."""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from uvit_repro.config import ParameterError, digest
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

FORMAT, VERSION = "uvit_repro store", 2
AGAIN = "Repeat the command that encoded the store: only what is missing is made again"


class StoreError(DamagedFile):
    "A store that can't be used; the message names the file and says what to do."


class Progress:
    "Says how far a long task is, at most every 15 seconds."

    def __init__(self, total: int, what: str, say):
        self.total, self.what, self.say, self.done = total, what, say, 0
        self.start = self.last = time.monotonic()

    def __call__(self, n: int):
        "Another n are done."
        self.done += n
        now = time.monotonic()
        if now - self.last < 15 or self.done >= self.total:
            return
        self.last, rate = now, self.done / (now - self.start)
        left = (self.total - self.done) / rate / 60
        self.say(f"{self.done:,} of {self.total:,} {self.what}, {left:.0f} minutes left")


def _save(path: Path, array: np.ndarray) -> dict:
    "Write an array; what identifies its file."
    write_atomic(path, lambda p: np.save(p, array))
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


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


def _usable(path: Path, files: dict, say) -> bool:
    "Whether files are as recorded. Damaged ones are renamed, so that they are made again."
    good = True
    for name, known in files.items():
        problem = _problem(path / name, known, thorough=True)
        if problem:
            good = False
            if (path / name).is_file():
                say(f"{printable(path / name)} {problem}; renamed to {set_aside(path / name).name}")
    return good


def _read_record(path: Path, say) -> dict | None:
    "A shard's or a store's record, when it and the files that it names are whole."
    try:
        record = read_checked_json(path)
    except FileNotFoundError:
        return None
    except DamagedFile as e:
        say(f"{e}; renamed to {set_aside(path).name}")
        return None
    own = record.get(
        "own", record.get("files", {})
    )  # the index lists the files of all shards as well
    return record if _usable(path.parent, own, say) else None


def _begin(path: Path, job: dict, say):
    "Note what is encoded here. Raises `ParameterError` when it is something else."
    begun = (path / "job.json").exists()
    old = _read_record(path / "job.json", say)
    if old is None:
        shards = [_read_record(p, say) for p in sorted(path.glob("shard-*.json"))]
        ours = [r["job"] == digest(job) for r in shards if r]
        there = [p.name for p in path.iterdir() if p.name != ".lock" and ".damaged-" not in p.name]
        if not all(ours) or (there and not ours and not begun):
            shown = printable(", ".join(sorted(there)[:3]))
            text = f"{printable(path)} is not empty ({shown}) and no store of this"
            raise ParameterError(f"{text}: give another folder")
        write_checked_json(path / "job.json", job)
    elif old != job:
        differ = [k for k in job if old.get(k) != job[k]]
        text = "; ".join(f"{k} = {old.get(k)!r} there, {job[k]!r} here" for k in differ)
        text = f"{printable(path)} holds something else ({text[:200]})"
        raise ParameterError(f"{text}: give another folder, or remove this one")


def write_store(
    path,  # the store's folder
    job: dict,  # everything that decides its bytes, with kind, count and shard_rows
    encode,  # function of (first, end, progress): arrays by name, and a record for each shard
    finish,  # function of all records: arrays by name, and fields of the index
    say=print,  # progress and damage
):
    "Encode what a store lacks. The same call resumes, repairs, or finds that all is done."
    path, size, batch = Path(path), job["shard_rows"], job["batch"]
    if job["dtype"] not in ("float32", "float16") or batch < 1 or size < batch or size % batch:
        text = f"dtype = {job['dtype']!r}, batch = {batch}, shard_rows = {size}"
        raise ParameterError(f"{text}: float32 or float16, and whole batches in a shard")
    spans = [(a, min(a + size, job["count"])) for a in range(0, job["count"], size)]
    with run_lock(path, say):
        sweep_unfinished(path)
        _begin(path, job, say)
        notes = [path / f"shard-{k:05d}.json" for k in range(len(spans))]
        records = [_read_record(note, say) for note in notes]
        todo = [k for k, record in enumerate(records) if record is None]
        progress = Progress(sum(b - a for a, b in (spans[k] for k in todo)), "encoded", say)
        for k in todo:
            arrays, record = encode(*spans[k], progress)
            files = {
                f"{n}-{k:05d}.npy": _save(path / f"{n}-{k:05d}.npy", arrays[n]) for n in arrays
            }
            rows = len(next(iter(arrays.values())))
            records[k] = {**record, "rows": rows, "files": files, "job": digest(job)}
            write_checked_json(notes[k], records[k])
        if not todo and _read_record(path / "index.json", say):
            return
        arrays, index = finish(records)
        own = {f"{n}.npy": _save(path / f"{n}.npy", a) for n, a in arrays.items()}
        files = {n: f for r in records for n, f in r["files"].items()} | own
        rows = [r["rows"] for r in records]
        known = {"format": FORMAT, "version": VERSION, "kind": job["kind"], "rows": rows}
        write_checked_json(path / "index.json", {**index, **known, "own": own, "files": files})


class Store:
    """A complete store: `len`, `load(name)`, `rows(name, numbers)`. Processes may share one; each
    maps what it reads, and compares its checksum when it does so for the first time."""

    kind = ""

    def __init__(self, path):
        self.path, self._maps = Path(path), {}
        file, shown = self.path / "index.json", printable(path)
        if not file.is_file():
            begun = (self.path / "job.json").is_file()
            state = f"is not complete. {AGAIN}" if begun else "is no store (it has no index.json)"
            raise FileNotFoundError(f"{shown} {state}")
        try:
            self.index = read_checked_json(file)
        except DamagedFile as e:
            raise StoreError(f"{e}. {AGAIN}") from None
        found = tuple(self.index.get(k) for k in ("format", "version"))
        if found != (FORMAT, VERSION) or self.kind not in ("", self.index["kind"]):
            text = f"{shown} holds {self.index.get('kind')} in format {found}"
            raise StoreError(f"{text}; wanted {self.kind} in format {(FORMAT, VERSION)}")
        self._refuse(self.problems(thorough=False))
        self.ends = np.cumsum(self.index["rows"])

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):
        return dict(self.__dict__, _maps={})

    def problems(self, thorough: bool, say=None) -> list[str]:
        "What is wrong with the files; a thorough look reads all of them."
        found = []
        for n, (name, known) in enumerate(self.index["files"].items(), 1):
            problem = _problem(self.path / name, known, thorough)
            if problem:
                found.append(f"{name} {problem}")
            if say:
                say(f"{n}/{len(self.index['files'])} {name}: {problem or 'ok'}")
        return found

    def _refuse(self, problems: list[str]):
        "Raise `StoreError` where there is a problem."
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            text = "; ".join(problems[:5])
            raise StoreError(f"{printable(self.path)}: {text}{more}. {AGAIN}")

    def load(self, name: str) -> np.ndarray:
        "A whole array, memory-mapped, its checksum compared."
        path = self.path / f"{name}.npy"
        problem = _problem(path, self.index["files"][path.name], thorough=True)
        if problem:
            with suppress(OSError):  # where the folder can be written
                problem += f", renamed to {set_aside(path).name}"
            self._refuse([f"{path.name} {problem}"])
        return np.load(path, mmap_mode="r")

    def shard(self, name: str, k: int) -> np.ndarray:
        "The rows of one shard."
        if (name, k) not in self._maps:
            self._maps[name, k] = np.asarray(self.load(f"{name}-{k:05d}"))
        return self._maps[name, k]

    def rows(self, name: str, numbers, views=None) -> np.ndarray:
        "Some rows of an array, as one; with views, the given element of each row."
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            bounds = f"{numbers.min()}..{numbers.max()}"
            raise IndexError(f"rows {bounds} of {printable(self.path)}, which has {len(self)}")
        which = np.searchsorted(self.ends, numbers, side="right")
        inside = numbers - np.concatenate([[0], self.ends])[which]
        example = self.shard(name, 0)
        shape = example.shape[1:] if views is None else example.shape[2:]
        out = np.empty((len(numbers), *shape), example.dtype)
        for i, (k, r) in enumerate(zip(which.tolist(), inside.tolist(), strict=True)):
            out[i] = self.shard(name, k)[r if views is None else (r, views[i])]
        return out

    def records(self) -> list[dict]:
        "What was noted about each shard."
        try:
            names = [f"shard-{k:05d}.json" for k in range(len(self.index["rows"]))]
            return [read_checked_json(self.path / n) for n in names]
        except (DamagedFile, FileNotFoundError) as e:
            raise StoreError(f"{e}. {AGAIN}") from None

    def verify(self, say=None) -> dict:
        "Read everything and compare checksums. Raises `StoreError` naming what is damaged."
        self._refuse(self.problems(thorough=True, say=say))
        self.records()
        files = self.index["files"]
        size = sum(f["bytes"] for f in files.values())
        return {"rows": len(self), "files": len(files), "bytes": size}


def cached_array(
    path: Path,  # an .npy file
    key: str,  # what the array is made from
    make,  # function that makes it
) -> np.ndarray:
    "An array from a cache, made where it is absent, damaged or of another key."
    record = path.with_suffix(".json")
    try:
        known = read_checked_json(record)
        if known["key"] == key:
            if not _problem(path, known, thorough=True):
                return np.load(path)
            set_aside(path)
    except (OSError, DamagedFile):
        pass
    array = make()
    with suppress(OSError):  # a cache that can't be written is done without
        write_checked_json(record, {"key": key, **_save(path, array)})
    return array
