"""Four processes that want the same folder at once, and disks that are too small."""

import random
import shutil
from collections.abc import Iterator

from reliability.artefacts import Workshop, contents, left_behind
from reliability.children import Harm, finish, in_child, start
from reliability.kills import problem, writers


def race_cases(shop: Workshop, count: int, seed: int) -> Iterator[tuple[str, str]]:
    "Yield (case, failure or nothing): four at once do what one would have done."
    for number in range(count):
        writer = writers(shop)[number % 4]
        whole, folder = shop.root / f"race-whole-{writer.name}", shop.root / f"race-{number}"
        if not whole.exists():
            in_child(writer.work, (*writer.arguments, whole), whole)
        folder.mkdir()
        work = [start(writer.work, (*writer.arguments, folder), folder) for _ in range(4)]
        errors = [e.error for e in [finish(*pair) for pair in work] if e.error]
        failure = errors[0][:300] if errors else problem(writer, folder, contents(whole))
        yield f"race {writer.name}", failure
        shutil.rmtree(folder)


def disk_cases(shop: Workshop, count: int, seed: int) -> Iterator[tuple[str, str]]:
    "Yield (case, failure or nothing): no file may grow beyond a limit; then it may."
    rng = random.Random(f"disks {seed}")
    for number in range(count):
        writer = writers(shop)[number % 4]
        whole, folder = shop.root / f"disk-whole-{writer.name}", shop.root / f"disk-{number}"
        if not whole.exists():
            in_child(writer.work, (*writer.arguments, whole), whole)
        largest = max(p.stat().st_size for p in whole.rglob("*") if p.is_file())
        limit = int(rng.uniform(0.01, 0.9) * largest)
        folder.mkdir()
        ending = in_child(writer.work, (*writer.arguments, folder), folder, Harm(0, 0.0, limit))
        failure = ""
        refused = ending.error or str(ending.value or "")  # `collect` returns what it refused
        if not refused:
            failure = "a file beyond the limit was written"
        elif str(folder) not in refused and "carried" not in refused:
            failure = refused[:300]
        elif left_behind(folder):
            failure = f"left behind: {left_behind(folder)[:2]}"
        again = in_child(writer.work, (*writer.arguments, folder), folder)
        failure = failure or again.error[:300] or problem(writer, folder, contents(whole))
        yield f"disk of {limit} bytes, {writer.name}", failure
        shutil.rmtree(folder)
