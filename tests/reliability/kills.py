"""Processes killed at their writes, or at any moment, and started again."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reliability.artefacts import (
    Workshop,
    collect_archive,
    complaints,
    contents,
    encode_small,
    left_behind,
    publish_run,
    train_small,
)
from reliability.children import Harm, in_child


@dataclass(frozen=True)
class Writer:
    "Something that writes, and what it leaves when nobody kills it."

    name: str
    work: object
    arguments: tuple  # before the folder
    origin: str = ""  # for `verify`; empty: nothing to verify
    share: int = 1  # of the kills


def writers(shop: Workshop) -> list[Writer]:
    "All that is killed."
    return [
        Writer("run", train_small, (), "runs", 5),
        Writer("encode", encode_small, (), "", 2),
        Writer("publish", publish_run, (shop.run,), "published", 2),
        Writer("collect", collect_archive, (shop.archive,), "published", 1),
    ]


def problem(writer: Writer, folder: Path, whole: dict) -> str:
    "What is wrong with what a killed and restarted writer left."
    if rest := left_behind(folder):
        return f"half-written files stay: {rest[:3]}"
    found = contents(folder)
    different = [n for n in sorted({*found, *whole}) if found.get(n) != whole.get(n)]
    if different:
        return f"different from an unbroken one: {different[:5]}"
    wrong = complaints(writer.origin, folder) if writer.origin else []
    return f"verify: {wrong[0]}" if wrong else ""


def killed_and_restarted(writer: Writer, folder: Path, harms: list[Harm]) -> str:  # empty: it ended
    "Kill a writer some times, then let it finish."
    for harm in [*harms, Harm()]:
        ending = in_child(writer.work, (*writer.arguments, folder), folder, harm)
        if ending.error:
            return f"{harm}: {ending.error[:300]}"
    return ""


def kill_cases(shop: Workshop, count: int, seed: int) -> Iterator[tuple[str, str]]:
    "Yield (case, failure or nothing) for each killed writer."
    rng, scratch = random.Random(f"kills {seed}"), shop.root / "kills"
    unbroken = {}
    for writer in writers(shop):
        folder = scratch / f"whole-{writer.name}"
        ending = in_child(writer.work, (*writer.arguments, folder), folder)
        if ending.error or ending.writes < 3:
            raise RuntimeError(f"{writer.name} fails unharmed: {ending.place or ending}")
        unbroken[writer] = ending.writes, contents(folder)
    weighted = [writer for writer in writers(shop) for _ in range(writer.share)]
    for number in range(count):
        writer = weighted[number % len(weighted)]
        writes, whole = unbroken[writer]
        harms = [Harm(at_write=rng.randint(1, writes)) for _ in range(rng.choice((1, 1, 2)))]
        if writer.name == "run" and rng.random() < 0.3:
            harms = [Harm(after=rng.uniform(0.05, 2.0))]
        folder = scratch / str(number)
        failure = killed_and_restarted(writer, folder, harms) or problem(writer, folder, whole)
        yield f"kill {writer.name} at {harms}", failure
        shutil.rmtree(folder, ignore_errors=True)
