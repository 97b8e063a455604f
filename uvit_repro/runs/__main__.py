"""Carry out one experiment: `python -m uvit_repro.runs JOB`; under torchrun, a process's part."""

import json
import sys
import traceback
from pathlib import Path

from uvit_repro.config import from_dict
from uvit_repro.runs.devices import FAILED
from uvit_repro.runs.experiment import run_experiment


def main() -> int:
    "JOB is a file with an `experiment`, as any run.json. Exit code 0: done, 1: failed."
    try:
        (path,) = sys.argv[1:]
        job = json.loads(Path(path).read_text(encoding="utf-8"))
        where = {"out_dir": job.get("out_dir"), **job.get("where", {})}
        run_experiment(from_dict(job["experiment"]), say=lambda s: print(s, flush=True), **where)
    except Exception as e:
        traceback.print_exc()
        print(f"{FAILED}{type(e).__name__}: {e}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
