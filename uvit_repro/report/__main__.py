"""`make report`: train what is missing of Figure 2 inside a budget, then write the report."""

import argparse
import os
import sys
import time

from uvit_repro.campaign.jobs import jobs
from uvit_repro.campaign.run import run
from uvit_repro.config import PROTOCOLS, ParameterError, coerce, default_protocol
from uvit_repro.config.durations import format_duration, parse_duration
from uvit_repro.report.chapters import execute_chapters
from uvit_repro.report.evidence import read_evidence
from uvit_repro.report.pages import write_published, write_report
from uvit_repro.runs.records import publish

KERNEL_SECONDS = 10  # the start of a run's process, which its record does not count


def options() -> argparse.ArgumentParser:
    "The options, for `make`."
    parser = argparse.ArgumentParser(prog="python -m uvit_repro.report", description=__doc__)
    parser.add_argument(
        "--protocol", choices=tuple(PROTOCOLS), help="default: as the machine allows"
    )
    parser.add_argument(
        "--budget", default="11m", help="training time of all calls together, or none"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated; each is a whole figure")
    parser.add_argument("--publish", action="store_true", help="copy the runs to results/published")
    parser.add_argument("--chapters", action="store_true", help="execute all chapters instead")
    return parser


def seconds_left(budget: str, found: list) -> float | None:
    "What is left of a budget after earlier calls; None: no limit."
    if budget == "none":
        return None
    workers = min(os.cpu_count() or 1, 8)
    spent = sum(r.info.get("wall_seconds", 0) + KERNEL_SECONDS for r in found) / workers
    return max(0.0, parse_duration(budget) - spent)


def main(argv: list[str] | None = None) -> int:  # exit code
    "Train inside the budget, publish if asked, write the report."
    args = options().parse_args(argv)
    start = time.perf_counter()

    def say(line: str = "", **_):
        print(f"[{format_duration(time.perf_counter() - start):>6}] {line}", flush=True)

    if args.chapters:
        execute_chapters(say)
        return 0
    protocol = args.protocol or default_protocol()
    failed = []
    try:
        seeds = coerce("seeds", args.seeds, tuple[int, ...])
        wanted = {job.exp.run_id for job in jobs("fig2", protocol, seeds)}
        here = read_evidence("runs").records
        found = [here[run_id] for run_id in sorted(wanted & set(here))]
        budget = seconds_left(args.budget, found)
        say(f"Figure 2 at protocol {protocol}: {len(found)} of {len(wanted)} runs are here")
        if budget != 0 and len(found) < len(wanted):
            failed = run("fig2", protocol, seeds, budget=budget, say=say)["failed"]
    except (ParameterError, FileNotFoundError) as error:
        say(f"stopped: {error}")
        return 2
    if args.publish:
        here = read_evidence("runs").records
        done = [publish(here[run_id].folder) for run_id in sorted(wanted & set(here))]
        say(f"{len(done)} runs copied to results/published")
        write_published(say)
    say(f"done: {write_report(say)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
