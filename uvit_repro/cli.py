"""Everything that a person runs from a shell is one command with subcommands; each prints what it did, can print JSON instead, and says by its exit code how it ended."""

import argparse
import json
import os
import shlex
import sys
from collections import namedtuple

from uvit_repro.config import ParameterError
from uvit_repro.config.durations import parse_duration

Command = namedtuple("Command", "help options run examples")
COMMANDS = {}  # name -> Command


class Failed(Exception):
    "A check failed: exit code 1 and this line."


class Parser(argparse.ArgumentParser):
    "A parser whose complaint is one line."

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    "The parser of all subcommands."
    parser = Parser(
        prog="uvit-repro",
        description="Tables and figures of U-ViT as runs: commands.",
        allow_abbrev=False,
    )
    sub = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, c in COMMANDS.items():
        p = sub.add_parser(
            name,
            help=c.help,
            description=c.help,
            epilog="examples:\n" + "\n".join(f"  {e}" for e in c.examples),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object on standard output; progress goes to standard error",
        )
        c.options(p)
    return parser


def numbers(text: str) -> tuple:
    "Whole numbers from `8,128`."
    try:
        return tuple(int(v) for v in text.split(",") if v.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, as in 8,128") from None


def words(text: str) -> tuple:
    "Words from `train,sample`."
    return tuple(v.strip() for v in text.split(",") if v.strip())


def duration(text: str) -> float:
    "Seconds from `540`, `90s`, `9m` or `1h`."
    try:
        return parse_duration(text)
    except ParameterError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def bench_options(p: argparse.ArgumentParser):
    "Options of `bench`."
    p.add_argument(
        "--what",
        type=words,
        default=(),
        help="any of train,sample,features,data,checkpointing,start (default: train,sample)",
    )
    p.add_argument(
        "--models",
        type=words,
        default=("U-ViT-S/2",),
        help="comma separated names of released models (default: U-ViT-S/2)",
    )
    p.add_argument(
        "--batch",
        type=numbers,
        default=(),
        help="batch sizes of training (default: 8 on a CPU, 8,128 on a GPU)",
    )
    p.add_argument(
        "--images",
        type=int,
        default=0,
        help="images of a set of samples (default: 8 on a CPU, 500 on a GPU)",
    )
    p.add_argument(
        "--nfe",
        type=int,
        default=0,
        help="network evaluations per image (default: 10 on a CPU, 50 on a GPU)",
    )
    p.add_argument(
        "--precision",
        type=words,
        default=("fp32", "bf16"),
        help="of ours: any of fp32,bf16,fp16 (default: fp32,bf16)",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument(
        "--repeats",
        type=int,
        default=10,
        help="timed repetitions of each contestant (sampling: a third of them)",
    )
    p.add_argument(
        "--compile",
        default="auto",
        help="torch.compile of the blocks: auto (as training decides), on, off",
    )
    p.add_argument(
        "--peer",
        default="",
        metavar="DIR",
        help="a checkout of the released U-ViT to time beside ours; outputs are compared first",
    )
    p.add_argument(
        "--ablate", action="store_true", help="turn each optimisation off, one at a time"
    )
    p.add_argument(
        "--targets",
        action="store_true",
        help="run what the targets of this machine need, and print target, measured, met",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, seconds: to see that it works; its numbers mean nothing",
    )
    p.add_argument(
        "--budget",
        type=duration,
        default=0.0,
        help="stop cleanly after this time (540, 9m); what was left is named",
    )
    p.add_argument(
        "--out", default=None, metavar="DIR", help="folder of runs (default: results/runs)"
    )
    p.add_argument("--publish", action="store_true", help="copy the record to results/published")


def run_bench_command(
    args: argparse.Namespace,  # of the parser
    argv: list,  # as typed, for the record
    say=print,  # progress
) -> dict:  # printed with --json
    "Run `bench`."
    from dataclasses import fields

    from uvit_repro.bench.peer import OutputsDiffer
    from uvit_repro.bench.results import publish_bench
    from uvit_repro.bench.run import Settings, run_bench

    s = Settings(
        **{f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    )
    try:
        rec = run_bench(s, args.out, shlex.join(["uvit-repro", *argv]), say)
    except OutputsDiffer as e:
        raise Failed(str(e)) from None
    if args.publish:
        say(f"published as {publish_bench(rec.folder)}")
    if rec.info["errors"]:
        raise Failed(f"failed: {', '.join(rec.info['errors'])}; the rest is recorded")
    return dict(rec.info, folder=str(rec.folder), rows=rec.rows)


COMMANDS["bench"] = Command(
    "Time training, sampling, feature extraction and data; beside the released code where a checkout of it is given.",
    bench_options,
    run_bench_command,
    (
        "uvit-repro bench --quick                                     # seconds, to see that it works",
        "uvit-repro bench --peer ~/U-ViT                              # S/2, training and sampling, ratios to the released code",
        "uvit-repro bench --ablate                                    # what each optimisation is worth",
        "uvit-repro bench --targets --peer ~/U-ViT --budget 9m        # every target that this machine can decide",
        'uvit-repro bench --models "U-ViT-L/2,U-ViT-H/2" --batch 128 --precision bf16',
        "uvit-repro bench --what features,data,start --json",
    ),
)


def plan_options(p: argparse.ArgumentParser):
    "Options of `plan`; `run` has them too."
    p.add_argument(
        "what",
        nargs="?",
        default="all",
        help="all, claims (the fixed list of a protocol), fig2, fig3, table1, ..., appendixe, or the id of a cell (default: all)",
    )
    p.add_argument(
        "--protocol",
        default=None,
        help="smoke, laptop, cpu, gpu or paper (default: what this machine can do)",
    )
    p.add_argument(
        "--seeds", type=numbers, default=(0,), help="each is a whole set of runs (default: 0)"
    )
    p.add_argument(
        "--out-dir", default=None, metavar="DIR", help="folder of runs (default: results/runs)"
    )


def run_plan_command(args, argv: list, say=print) -> dict:
    "Run `plan`."
    from uvit_repro.campaign.plan import plan, plan_json

    return plan_json(plan(args.what, args.protocol, args.seeds, out_dir=args.out_dir, say=say))


def run_options(p: argparse.ArgumentParser):
    "Options of `run`."
    plan_options(p)
    p.add_argument(
        "--budget",
        type=duration,
        default=None,
        help="stop cleanly inside this time (25m); a run starts only when it is expected to fit",
    )
    p.add_argument(
        "--executor",
        default="local",
        help="local; slurm: one job for each run, through submitit; submitit-local: the same on this machine",
    )
    p.add_argument(
        "--workers",
        type=int,
        default=None,
        help="runs at a time (default: one per core, at most 8; one on a GPU)",
    )
    p.add_argument(
        "--processes",
        type=int,
        default=1,
        help="processes that train and sample one run together, one per GPU (default: 1)",
    )
    p.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option for submitit, as in --slurm slurm_partition=gpu",
    )


def run_run_command(args, argv: list, say=print) -> dict:
    "Run `run`."
    from uvit_repro.campaign.plan import run

    if bad := [o for o in args.slurm if "=" not in o]:
        raise ParameterError(f"--slurm {bad[0]}: expected NAME=VALUE, as in slurm_partition=gpu")
    out = run(
        args.what,
        args.protocol,
        args.budget,
        args.seeds,
        args.out_dir,
        executor=args.executor,
        workers=args.workers,
        processes=args.processes,
        say=say,
        live=not args.json,
        **dict(o.split("=", 1) for o in args.slurm),
    )
    if out["failed"]:
        raise Failed(f"{len(out['failed'])} failed: {', '.join(out['failed'])}")
    if out.get("interrupted"):
        raise KeyboardInterrupt
    return out


def report_options(p: argparse.ArgumentParser):
    "Options of `report`."
    p.add_argument("--only", metavar="PART", help="one part: fig2, fig3, fig7, claims, cost")


def run_report_command(args, argv: list, say=print) -> dict:
    "Run `report`."
    from uvit_repro.report.pages import write_report

    page = write_report(say, only=args.only)
    say(f"done: {page}")
    return {"page": str(page)}


def verify_options(p: argparse.ArgumentParser):
    "Options of `verify`."
    p.add_argument(
        "--origin",
        default="published",
        help="published: the committed evidence; runs: this machine's (default: published)",
    )
    p.add_argument("--out-dir", default=None, metavar="DIR", help="folder of runs, instead")


def run_verify_command(args, argv: list, say=print) -> dict:
    "Run `verify`."
    from uvit_repro.campaign.plan import verify

    rows = verify(args.origin, args.out_dir, say)
    bad = [r for r in rows if not r["ok"]]
    if bad:
        raise Failed(
            f"{len(bad)} of {len(rows)} checks differ; the first: {bad[0]['what']} in {bad[0]['where']}"
        )
    return {"checks": len(rows), "differ": 0}


def doctor_options(p: argparse.ArgumentParser):
    "Options of `doctor`."
    p.add_argument(
        "--no-self-test", action="store_true", help="leave out the ten seconds of computing"
    )


def run_doctor_command(args, argv: list, say=print) -> dict:
    "Run `doctor`."
    from uvit_repro.campaign.plan import doctor

    rows = doctor(say, not args.no_self_test)
    bad = [r for r in rows if r["state"] == "problem"]
    if bad:
        raise Failed(f"{len(bad)} problems: {', '.join(r['what'] for r in bad)}")
    return {"findings": rows}


COMMANDS.update(
    plan=Command(
        "Every run behind a table or figure: what there is of it, what it will cost, how to start it.",
        plan_options,
        run_plan_command,
        (
            "uvit-repro plan fig2 --protocol laptop",
            "uvit-repro plan all --protocol paper --json        # for scripts and other schedulers",
        ),
    ),
    run=Command(
        "Do what a plan has left, inside a budget; start it again to go on, start two to share the work.",
        run_options,
        run_run_command,
        (
            "uvit-repro run fig2 --protocol laptop --budget 5m",
            "uvit-repro run fig2 --protocol gpu --seeds 0,1,2 --executor slurm --slurm slurm_partition=gpu",
        ),
    ),
    report=Command(
        "Write results/report.html from the records; nothing is trained.",
        report_options,
        run_report_command,
        ("uvit-repro report", "uvit-repro report --only fig2"),
    ),
    verify=Command(
        "Recompute every recorded number from the statistics that were kept with it.",
        verify_options,
        run_verify_command,
        ("uvit-repro verify", "uvit-repro verify --origin runs"),
    ),
    doctor=Command(
        "What this machine has, what it lacks, and the command that fetches it.",
        doctor_options,
        run_doctor_command,
        ("uvit-repro doctor",),
    ),
)


def main(
    argv: list = None,  # arguments; None: of the process
) -> int:  # exit code
    "The console script."
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(argv)
    to_stderr = lambda line="", **_: print(line, file=sys.stderr, flush=True)
    say = to_stderr if args.json else lambda line="", **_: print(line, flush=True)
    complain = lambda text: print(
        f"uvit-repro {args.command}: " + " ".join(str(text).split()), file=sys.stderr, flush=True
    )
    try:
        out = COMMANDS[args.command].run(args, argv, say)
        if args.json:
            json.dump(out, sys.stdout, indent=1, default=str)
            print()
        return 0
    except Failed as e:
        complain(e)
        return 1
    except (ParameterError, FileNotFoundError, NotADirectoryError, PermissionError) as e:
        complain(e)
        return 2
    except KeyboardInterrupt:
        complain("interrupted; what was finished is recorded")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__" and "get_ipython" not in globals():
    sys.exit(main())
