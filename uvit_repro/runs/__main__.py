"Carry out one experiment; under torchrun, this process's part of it."

import argparse
import json
import sys
import traceback
from pathlib import Path

from uvit_repro.config import from_dict, with_overrides
from uvit_repro.runs.experiment import run_experiment


def main() -> int:
    "`python -m uvit_repro.runs RUN.json`: 0 done, 1 failed."
    parser = argparse.ArgumentParser(prog="python -m uvit_repro.runs", description=__doc__)
    parser.add_argument("job", type=Path, help="a file with an `experiment`, as any run.json")
    parser.add_argument("--processes", type=int, help="processes that work together")
    parser.add_argument("--out-dir", help="folder of runs (default: results/runs)")
    args = parser.parse_args()
    try:
        job = json.loads(args.job.read_text(encoding="utf-8"))
        exp = with_overrides(from_dict(job["experiment"]), processes=args.processes)
        out_dir, where = args.out_dir or job.get("out_dir"), job.get("where", {})
        run_experiment(exp, out_dir, say=lambda line: print(line, flush=True), **where)
    except Exception as e:
        traceback.print_exc()
        print(f"failed: {type(e).__name__}: {e}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
