"Run the campaign and print what held."

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a folder

from reliability.artefacts import make_workshop  # noqa: E402
from reliability.crowds import disk_cases, race_cases
from reliability.damage import damage_cases
from reliability.kills import kill_cases
from reliability.misuse import combination_cases, setting_cases

KINDS = {
    "kills": kill_cases,
    "damages": damage_cases,
    "settings": setting_cases,
    "combinations": combination_cases,
    "races": race_cases,
    "disks": disk_cases,
}


def campaign(counts: dict, seed: int, root: Path, say=print) -> list[str]:  # failures
    "Run so many cases of each kind."
    shop, failures = make_workshop(root), []
    for kind, count in counts.items():
        began, bad, tried = time.perf_counter(), [], 0
        for case, failure in KINDS[kind](shop, count, seed) if count else ():
            tried += 1
            if failure:
                bad.append(f"{case}: {failure}")
                say(f"FAILED {bad[-1]}")
        seconds = time.perf_counter() - began
        say(f"{kind}: {tried} cases, {tried - len(bad)} held, {len(bad)} failed, {seconds:.0f} s")
        failures += bad
    return failures


def main() -> int:
    "`python tests/reliability`: 0 when everything held."
    parser = argparse.ArgumentParser(prog="python tests/reliability", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"how many {kind}")
    args = vars(parser.parse_args())
    seed = args.pop("seed")
    with tempfile.TemporaryDirectory(prefix="uvit-reliability-") as folder:
        failures = campaign(args, seed, Path(folder), lambda line: print(line, flush=True))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
