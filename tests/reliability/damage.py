"""Files that were flipped, cut, emptied, lost or swapped: named, refused or made again."""

import contextlib
import io
import os
import pickle
import random
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reliability.artefacts import (
    Workshop,
    collect_archive,
    complaints,
    contents,
    encode_small,
    left_behind,
    train_small,
)
from reliability.children import Harm, in_child
from uvit_repro.data.latent_sets import LatentStore
from uvit_repro.data.store import StoreError
from uvit_repro.runs.records import load_results, load_runs

REACHED = Path(os.environ.get("TMPDIR", "/tmp")) / "uvit-reliability-executed"


class Hostile:
    "An object whose unpickling leaves a trace."

    def __reduce__(self):
        return os.system, (f"touch {REACHED}",)


def flip(path: Path, rng: random.Random):
    "Flip one bit."
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random):
    "Lose the end."
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def empty(path: Path, rng: random.Random):
    "Lose everything."
    path.write_bytes(b"")


def lose(path: Path, rng: random.Random):
    "Lose the file."
    path.unlink()


def scramble(path: Path, rng: random.Random):
    "Overwrite a stretch with bytes that are no text."
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at : at + 40] = rng.randbytes(40)
    path.write_bytes(content)


def lengthen(path: Path, rng: random.Random):
    "Add bytes at the end."
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 99)))


def infect(path: Path, rng: random.Random):
    "Replace it by a pickle that runs a command."
    path.write_bytes(pickle.dumps(Hostile()))


def lie(path: Path, rng: random.Random):
    "Replace it by an npz archive whose header promises 2**40 values."
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue())


def nest(path: Path, rng: random.Random):
    "Replace it by JSON of 100,000 levels."
    path.write_bytes(b"[" * 100_000)


def swap_for_folder(path: Path, rng: random.Random):
    "Put a folder in its place."
    path.unlink()
    path.mkdir()


DAMAGES = (flip, flip, flip, flip, cut, cut, scramble, scramble, empty, lose, lengthen)
ODD = (infect, lie, nest, swap_for_folder)


def harmed_copy(source: Path, target: Path, rng: random.Random) -> tuple[str, Path]:
    "A copy with one damaged file; what was done, and the file."
    shutil.copytree(source, target)
    files = [p for p in sorted(target.rglob("*")) if p.is_file() and p.name != ".lock"]
    files = [p for p in files if p.stat().st_size]
    path = rng.choice(files)
    damage = rng.choice(ODD if rng.random() < 0.12 else DAMAGES)
    damage(path, rng)
    return f"{damage.__name__} {path.relative_to(target)}", path


def readers(folder: Path):
    "Every reader of records, which must never stop."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_results("runs", folder)
        load_runs("runs", folder)


def published(shop: Workshop, folder: Path, rng) -> tuple[str, str]:
    "A damaged publication: `verify` names it, and readers go on."
    what, path = harmed_copy(shop.published, folder, rng)
    if path.name == "RUNS.sha256" and not path.exists():
        path.touch()  # a folder without a list may be one run; in results/published it may not
    readers(folder)
    found = complaints("published", folder)
    known = any(name in line for line in found for name in (path.name, shop.run.name, "list of"))
    return f"published, {what}", "" if found and known else f"verify says {found[:1]}"


def local(shop: Workshop, folder: Path, rng) -> tuple[str, str]:
    "A damaged local run: found by `verify`, or harmless; the same command mends it or names it."
    what, path = harmed_copy(shop.runs, folder, rng)
    case = f"run, {what}"
    readers(folder)
    complaints("runs", folder)
    ending = in_child(train_small, (folder,), folder)
    if ending.error:
        return case, "" if path.name in ending.error else f"run: {ending.error[:300]}"
    found, whole = contents(folder), contents(shop.runs)
    numbers = [n for n in whole if n.endswith(("measurements.csv", ".safetensors", ".npz"))]
    # A file of a measured step may go; the numbers may not.
    kept = [n for n in numbers if n in found or n.endswith(".csv")]
    wrong = [n for n in kept if found.get(n) != whole[n]]
    wrong = [
        n for n in wrong if not any(Path(n).name in line for line in complaints("runs", folder))
    ]
    return case, f"silently different: {wrong[:3]}" if wrong else ""


def unfinished(shop: Workshop, folder: Path, rng) -> tuple[str, str]:
    "A damaged checkpoint of an unfinished run: set aside, the run ends as an unbroken one."
    shutil.copytree(shop.root / "unfinished", folder)
    checkpoints = sorted(folder.rglob("*.pt"))
    damage = rng.choice(ODD[:3] if rng.random() < 0.12 else DAMAGES)
    damage(checkpoints[0], rng)
    case = f"checkpoint, {damage.__name__}"
    for _ in range(2):  # the first call may end with the name of the damaged file
        ending = in_child(train_small, (folder,), folder)
        if not ending.error:
            break
        if "Checkpoint" not in ending.error:
            return case, f"run: {ending.error[:300]}"
    if ending.error:
        return case, f"twice: {ending.error[:300]}"
    found, whole = contents(folder), contents(shop.runs)
    wrong = [n for n in whole if n.endswith((".safetensors", ".csv")) and found.get(n) != whole[n]]
    return case, f"different: {wrong[:3]}" if wrong else ""


def read_store(folder: Path) -> str:  # the name of the damaged file, or nothing
    "Read all of a store."
    try:
        store = LatentStore(folder / "store")
        store.verify()
    except (StoreError, OSError) as e:
        return str(e)
    return ""


def store(shop: Workshop, folder: Path, rng) -> tuple[str, str]:
    "A damaged store of latents: named by its reader, repaired by its writer."
    what, path = harmed_copy(shop.store, folder, rng)
    case = f"store, {what}"
    said = read_store(folder)
    if not said or "store" not in said:
        return case, f"read without a word: {said!r}"
    ending = in_child(encode_small, (folder,), folder)
    if ending.error:
        return case, "" if path.name in ending.error else f"encode: {ending.error[:300]}"
    if left_behind(folder) or contents(folder) != contents(shop.store):
        return case, "not repaired"
    return case, ""


def archive(shop: Workshop, folder: Path, rng) -> tuple[str, str]:
    "A damaged archive: refused by name, or as good as the whole one."
    folder.mkdir(parents=True)
    copy = folder / "carried.tar.gz"
    shutil.copyfile(shop.archive, copy)
    damage = rng.choice([d for d in (*DAMAGES, *ODD) if d not in (lose, swap_for_folder)])
    damage(copy, rng)
    case, target = f"archive, {damage.__name__}", folder / "published"
    with contextlib.redirect_stdout(io.StringIO()):
        refused = collect_archive(copy, target)
    if any("carried" in line for line in refused):
        return case, ""
    same = contents(target) == contents(shop.published)
    return case, "" if same else f"accepted, and different; refused {refused}"


def mixture(count: int) -> list:
    "So many cases, mostly those that take milliseconds."
    slow = max(4, count // 8)
    kinds = [local] * (slow // 2) + [store] * (slow // 4) + [unfinished] * (slow // 4)
    return kinds + [archive] * (count // 6) + [published] * (count - len(kinds) - count // 6)


def damage_cases(shop: Workshop, count: int, seed: int) -> Iterator[tuple[str, str]]:
    "Yield (case, failure or nothing) for each damaged file."
    rng, scratch = random.Random(f"damage {seed}"), shop.root / "damage"
    REACHED.unlink(missing_ok=True)
    make_unfinished(shop)
    for number, kind in enumerate(mixture(count)):
        folder = scratch / str(number)
        try:
            case, failure = kind(shop, folder, rng)
        except Exception as e:
            case, failure = f"{kind.__name__} {number}", f"{type(e).__name__}: {str(e)[:300]}"
        if REACHED.exists():
            failure = "a pickle ran a command"
        yield case, failure
        shutil.rmtree(folder, ignore_errors=True)


def make_unfinished(shop: Workshop):
    "A run that was killed between two checkpoints."
    for write in range(12, 200, 4):
        folder = shop.root / "unfinished"
        shutil.rmtree(folder, ignore_errors=True)
        in_child(train_small, (folder,), folder, Harm(at_write=write))
        if list(folder.rglob("*.pt")):
            return
    raise RuntimeError("no checkpoint was ever written")
