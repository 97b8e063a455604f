"""What a person runs from a shell: subcommands, each of which calls one function of its room."""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, fields

from uvit_repro.bench import gpu_session
from uvit_repro.bench.peer import OutputsDiffer
from uvit_repro.bench.results import publish_bench
from uvit_repro.bench.run import CHOICES, Settings, run_bench
from uvit_repro.campaign.doctor import doctor
from uvit_repro.campaign.jobs import jobs
from uvit_repro.campaign.plan import plan, plan_lines
from uvit_repro.campaign.predict import this_machine
from uvit_repro.campaign.run import detach, run
from uvit_repro.campaign.transfer import collect, publish_runs
from uvit_repro.campaign.verify import verify
from uvit_repro.config import ParameterError, default_protocol
from uvit_repro.config.durations import parse_duration
from uvit_repro.data.encode import add_encode_arguments, run_encode
from uvit_repro.data.files import CheckpointError, printable
from uvit_repro.report.pages import write_report
from uvit_repro.runs.released import add_released_arguments, run_released


class Failed(Exception):
    "A command that ended badly: exit code 1, one line, and what was found."

    def __init__(self, text: str, found: dict = None):
        super().__init__(text)
        self.found = found or {}


class Parser(argparse.ArgumentParser):
    "A parser whose complaints are handled as all others are."

    def error(self, message):
        raise ParameterError(f"{message} (see {self.prog} --help)")


def words(text: str) -> tuple:
    "Words from `train,sample`."
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple:
    "Whole numbers from `0,1,2`."
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, as in 0,1,2")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def count(text: str) -> int:
    "A whole number of at least 1."
    if not re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def duration(text: str) -> float:
    "Seconds from `540`, `90s`, `9m` or `1h`."
    try:
        seconds = parse_duration(text)
    except ParameterError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time above 0")
    return seconds


FLAG = {"action": "store_true"}
DIR = {"metavar": "DIR"}
ARGUMENTS = {  # of all commands
    "--json": {**FLAG, "help": "print one JSON object; progress aside"},
    "what": {"nargs": "?", "default": "all", "help": "all, claims, fig2, ... joined by commas"},
    "sources": {"nargs": "+", "metavar": "DIR|ARCHIVE"},
    "--protocol": {"help": "smoke, laptop, cpu, gpu or paper (default: by the machine)"},
    "--seeds": {"type": numbers, "default": (0,), "help": "each a set of runs (default: 0)"},
    "--out-dir": {**DIR, "help": "folder of runs (default: results/runs)"},
    "--to": {**DIR, "help": "where to (default: results/published)"},
    "--workers": {"type": count, "help": "runs at a time (default: one per core, at most 8)"},
    "--processes": {"type": count, "default": 1, "help": "that train one run together"},
    "--budget": {"type": duration, "help": "time, as 540 or 9m: stop cleanly inside it"},
    "--detach": {**FLAG, "help": "in the background; plan shows what is done"},
    "--only": {"help": "one part: fig2, headline, table1, cost, ..."},
    "--origin": {"default": "published", "help": "published, or runs: this machine's"},
    "--no-self-test": {**FLAG, "help": "leave out ten seconds of computing"},
    "--what": {"type": words, "help": f"any of {','.join(CHOICES['what'])}"},
    "--models": {"type": words, "help": "released models, by name (default: U-ViT-S/2)"},
    "--batch": {"type": numbers, "help": "training (default: 8; on a GPU 8,128)"},
    "--images": {"type": count, "help": "of a set of samples (default: 8; on a GPU 500)"},
    "--nfe": {"type": count, "help": "network evaluations per image (default: 10; GPU 50)"},
    "--precision": {"type": words, "help": "of ours: any of fp32,bf16,fp16"},
    "--device": {"help": "auto, cpu, cuda, cuda:1"},
    "--repeats": {"type": count, "help": "timed repetitions (default: 10)"},
    "--peer": {**DIR, "help": "a checkout of the released U-ViT"},
    "--ablate": {**FLAG, "help": "change each option of training, one at a time"},
    "--quick": {**FLAG, "help": "a tiny model: its numbers mean nothing"},
    "--publish": {**FLAG, "help": "copy the record to results/published"},
    "--gpu-session": {**FLAG, "help": "first: all that one GPU must show; see its --help"},
}


def bench_command(args, say) -> dict:
    "Time training and sampling, beside the released code where a checkout of it is given."
    given = {f.name: getattr(args, f.name, None) for f in fields(Settings)}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    try:
        record = run_bench(settings, args.out_dir, shlex.join(["uvit-repro", *args.argv]), say)
    except OutputsDiffer as error:
        raise Failed(str(error)) from None
    if args.publish:
        say(f"published as {publish_bench(record.folder)}")
    found = {**record.info, "folder": str(record.folder), "rows": record.rows}
    if record.info["errors"]:
        raise Failed(f"failed: {', '.join(record.info['errors'])}; the rest is recorded", found)
    return found


def plan_command(args, say) -> dict:
    "Every run behind a table, a figure or the claims: state, cost, command."
    machine = this_machine(args.out_dir, args.workers, args.processes)
    found = plan(args.what, args.protocol, args.seeds, machine)
    for line in plan_lines(found):
        say(line)
    return found


def run_command(args, say) -> dict:
    "Do what a plan has left, inside a budget; again to go on, twice to share the work."
    if args.detach:
        jobs(args.what, args.protocol or default_protocol(), args.seeds)  # refuse it here
        found = detach([word for word in args.argv if word != "--detach"], args.out_dir)
        say(f"started as process {found['process']}; its output: {found['log']}")
        return found
    machine = this_machine(args.out_dir, args.workers, args.processes)
    found = run(args.what, args.protocol, args.seeds, machine, args.budget, say)
    if found["interrupted"]:
        raise KeyboardInterrupt
    if names := found["failed"]:
        raise Failed(f"{len(names)} failed: {', '.join(names)}", found)
    return found


def publish_command(args, say) -> dict:
    "Copy the evidence of finished runs to results/published, or to a folder to be carried."
    where = {"out_dir": args.out_dir, "target": args.to, "say": say}
    return {"published": publish_runs(args.what, args.protocol, args.seeds, **where)}


def collect_command(args, say) -> dict:
    "Verify records that were carried here, and publish those that hold."
    found = collect(args.sources, args.to, say)
    if found["refused"]:
        raise Failed(f"{len(found['refused'])} refused", found)
    return found


def verify_command(args, say) -> dict:
    "Recompute every recorded number; compare every file with its checksum."
    checks = verify(args.origin, args.out_dir, say)
    bad = [asdict(check) for check in checks if not check.ok]
    if bad:
        raise Failed(f"{len(bad)} of {len(checks)} checks differ", {"differ": bad})
    return {"checks": len(checks), "differ": []}


def doctor_command(args, say) -> dict:
    "What this machine has, what it lacks, and the command that fetches it."
    findings = doctor(say, not args.no_self_test, args.out_dir)
    found = {"findings": [asdict(f) for f in findings]}
    if bad := [f.what for f in findings if f.state == "problem"]:
        raise Failed(f"{len(bad)} problems: {', '.join(bad)}", found)
    return found


def report_command(args, say) -> dict:
    "Write results/report.html."
    page = write_report(say, only=args.only)
    say(f"done: {page}")
    return {"page": str(page)}


JOBS = "what --protocol --seeds --out-dir"
BENCH = (
    "--what --models --batch --images --nfe --precision --device --repeats --peer "
    "--ablate --quick --budget --out-dir --publish --gpu-session"
)


def make_parser() -> Parser:
    "The parser of all subcommands."
    about = "Tables and figures of U-ViT as runs."
    parser = Parser(prog="uvit-repro", description=about, allow_abbrev=False)
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(run: Callable, arguments: str, *examples: str) -> Parser:
        name, about = examples[0].split()[0], {"help": run.__doc__, "description": run.__doc__}
        about["epilog"] = "\n".join(["examples:", *(f"  uvit-repro {text}" for text in examples)])
        about["formatter_class"] = argparse.RawDescriptionHelpFormatter
        p = sub.add_parser(name, allow_abbrev=False, **about)
        p.set_defaults(run=run)
        for argument in ("--json", *arguments.split()):
            p.add_argument(argument, **ARGUMENTS[argument])
        return p

    budget = f"{JOBS} --workers --processes"
    add(plan_command, budget, "plan claims --protocol cpu", "plan all --protocol paper --json")
    add(run_command, f"{budget} --budget --detach", "run claims --protocol cpu --budget 8h")
    add(publish_command, f"{JOBS} --to", "publish claims --protocol cpu --to carried")
    add(collect_command, "sources --to", "collect carried", "collect carried.tar.gz")
    add(report_command, "--only", "report --only fig2")
    add(verify_command, "--origin --out-dir", "verify --origin runs")
    add(doctor_command, "--no-self-test --out-dir", "doctor --json")
    add(bench_command, BENCH, "bench --quick", "bench --peer ~/U-ViT --budget 9m")
    add_encode_arguments(add(run_encode, "", "encode images --help"))
    add_released_arguments(add(run_released, "", "released imagenet256_uvit_huge.pth"))
    return parser


def perform(argv: list, say: Callable) -> tuple[int, str, dict]:  # exit code, complaint, found
    "Carry out a command line."
    try:
        args = make_parser().parse_args(argv)
        args.argv = argv
        return 0, "", args.run(args, say)
    except Failed as error:
        return 1, str(error), error.found
    except KeyboardInterrupt:
        return 130, "interrupted; what was finished is recorded", {}
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, "", {}
    except (ParameterError, CheckpointError, OSError) as error:
        return 2, str(error), {}
    except Exception as error:
        if "UVIT_TRACEBACK" in os.environ:
            raise
        return 1, f"failed: {type(error).__name__}: {error} (UVIT_TRACEBACK=1 shows where)", {}


def main(
    argv: list = None,  # arguments; None: of the process
) -> int:  # 0 done, 1 failed, 2 a request that can't be carried out
    "The console script."
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:2] == ["bench", "--gpu-session"]:  # a command with a parser of its own
        return gpu_session.main(argv[2:])
    as_json = "--json" in argv

    def say(line=""):
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    code, complaint, found = perform(argv, say)
    if complaint:
        text = printable(" ".join(complaint.split()))
        print(f"uvit-repro: {text}", file=sys.stderr, flush=True)
    if as_json:
        failure = {"exit": code, "error": complaint} if code else {}
        print(json.dumps({**failure, **found}, indent=1, default=str))
    return code


if __name__ == "__main__":
    sys.exit(main())
