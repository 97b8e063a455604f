"""`make report`: train what is missing of Figure 2 inside a budget, then write the report."""

import argparse
import os
import sys

from uvit_repro.campaign.jobs import jobs
from uvit_repro.campaign.run import run
from uvit_repro.config import PROTOCOLS, ParameterError, coerce, default_protocol
from uvit_repro.config.durations import parse_duration
from uvit_repro.report.chapters import execute_chapters
from uvit_repro.report.evidence import read_evidence
from uvit_repro.report.pages import write_published, write_report
from uvit_repro.runs.records import publish

KERNEL_SECONDS = 10  # the start of a run's process, which its record does not count


def seconds_left(budget: str, found: list) -> float | None:
    "What is left of a budget after earlier calls; None: no limit."
    if budget == "none":
        return None
    workers = min(os.cpu_count() or 1, 8)
    spent = sum(r.info["wall_seconds"] + KERNEL_SECONDS for r in found) / workers
    return max(0.0, parse_duration(budget) - spent)


def train_and_report(protocol: str, seeds: tuple, budget: str, publishing: bool) -> int:
    "Train inside the budget, publish if asked, write the report; 1 if a run failed."
    wanted = {job.exp.run_id for job in jobs("fig2", protocol, seeds)}

    def finished():
        return [r for run_id, r in read_evidence("runs").records.items() if run_id in wanted]

    found, failed = finished(), []
    left = seconds_left(budget, found)
    print(f"Figure 2 at protocol {protocol}: {len(found)} of {len(wanted)} runs are here")
    if left != 0 and len(found) < len(wanted):
        failed = run("fig2", protocol, seeds, budget=left)["failed"]
    if publishing:
        done = [publish(record.folder) for record in finished()]
        print(f"{len(done)} runs copied to results/published")
        write_published()
    print(f"done: {write_report()}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:  # exit code
    "What `make report`, `make publish` and `make chapters` call."
    parser = argparse.ArgumentParser(prog="python -m uvit_repro.report", description=__doc__)
    add = parser.add_argument
    add("--protocol", choices=tuple(PROTOCOLS), help="default: as the machine allows")
    add("--budget", default="11m", help="training time of all calls together, or none")
    add("--seeds", default="0", help="comma-separated; each is a whole figure")
    add("--publish", action="store_true", help="copy the runs to results/published")
    add("--chapters", action="store_true", help="execute all chapters instead")
    args = parser.parse_args(argv)
    if args.chapters:
        execute_chapters()
        return 0
    try:
        seeds = coerce("seeds", args.seeds, tuple[int, ...])
        protocol = args.protocol or default_protocol()
        return train_and_report(protocol, seeds, args.budget, args.publish)
    except (ParameterError, FileNotFoundError) as error:
        print(f"stopped: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
