"The command line: what it prints, what it refuses in one line, and how it ends."

import json
import shlex
from types import SimpleNamespace

import pytest

from uvit_repro import cli
from uvit_repro.campaign.predict import Machine
from uvit_repro.campaign.verify import Check
from uvit_repro.config import PROTOCOLS
from uvit_repro.paper.registry import select
from uvit_repro.report.__main__ import main as make_report


def refused(capsys, *argv):
    "The one line of a request that can't be carried out."
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("run fig2 --processes 0", "at least 1"),
        ("run fig2 --workers -1", "at least 1"),
        ("run fig2 --seeds 1,x", "whole numbers"),
        ("run fig2 --seeds ,", "whole numbers"),
        ("run fig2 --seeds \u0661", "whole numbers"),
        ("run fig2 --budget soon", "duration"),
        ("run fig2 --budget nan", "duration"),
        ("run fig2 --budget 0", "above 0"),
        ("run fig2 --protocol huge", "huge"),
        ("run table6 --protocol laptop", "no run at protocol laptop"),
        ("plan fig99", "did you mean"),
        ("plan claims --protocol paper", "paper"),
        ("verify --origin elsewhere", "published, runs"),
        ("collect absent.tar", "absent.tar"),
        ("publish fig3 --protocol gpu --out-dir nowhere", "no finished run"),
        ("bench --what speed", "speed"),
        ("frob", "frob"),
        ("", "COMMAND"),
        ("run --frob", "--frob"),
        ("released", "path"),
        ("released \x1b[2J", r"no checkpoint at \x1b[2J"),
        ("released x.pth --frob \x1b[2J", r"arguments: --frob \x1b[2J"),
        ("released x.pth --nfe", "--nfe: expected one argument"),
    ],
)
def test_bad_requests_are_refused_in_one_line(capsys, argv, part):
    assert part in refused(capsys, *argv.split())


@pytest.mark.parametrize("words", (["--seeds", "x"], ["--budget", "soon"]))
def test_make_report_refuses_in_one_line(capsys, words):
    assert make_report([*words, "--protocol", "smoke"]) == 2
    assert "stopped: " in capsys.readouterr().out


def test_json_is_printed_on_failure_too(capsys):
    assert cli.main(["run", "fig2", "--processes", "0", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["exit"] == 2 and "--processes" in found["error"]


def test_a_failed_check_is_told_and_listed(capsys, monkeypatch):
    bad = Check("fid", "run/measurements.csv", 1.0, 2.0, False)
    monkeypatch.setattr(cli, "verify", lambda origin, out_dir, say: [bad])
    assert cli.main(["verify", "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["exit"] == 1 and found["differ"][0]["recorded"] == 1.0
    assert err == "uvit-repro: 1 of 1 checks differ\n"


def test_an_unexpected_error_is_one_line_with_the_way_to_more(capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("two\nlines \x1b[31m")

    monkeypatch.setattr(cli, "doctor", broken)
    monkeypatch.delenv("UVIT_TRACEBACK", raising=False)
    assert cli.main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "failed: RuntimeError: two lines" in err and "\x1b" not in err and err.count("\n") == 1
    monkeypatch.setenv("UVIT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        cli.main(["doctor"])


def test_an_interrupt_ends_with_its_own_code(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main(["run", "fig2d", "--protocol", "smoke"]) == 130
    assert "what was finished is recorded" in capsys.readouterr().err


def test_recorded_commands_are_quoted(monkeypatch, capsys):
    seen = []

    def run_bench(settings, out_dir, command, say):
        seen.extend((settings, command))
        return SimpleNamespace(info={"errors": []}, folder="f", rows=[])

    monkeypatch.setattr(cli, "run_bench", run_bench)
    argv = ["bench", "--peer", "a folder/U-ViT", "--batch", "8,128", "--budget", "9m"]
    assert cli.main(argv) == 0
    settings, command = seen
    assert shlex.split(command) == ["uvit-repro", *argv]
    assert (settings.peer, settings.batch, settings.budget) == ("a folder/U-ViT", (8, 128), 540)
    assert settings.models == ("U-ViT-S/2",)


def test_a_command_with_a_parser_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.gpu_session, "main", seen.append)
    cli.main(["bench", "--gpu-session", "--rehearse"])
    assert seen == [["--rehearse"]]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    names = "run plan report verify doctor bench encode released publish collect"
    assert all(name in text for name in names.split())


def test_one_run_from_its_start_to_another_machine(tmp_path, capsys, monkeypatch):
    "A real run at protocol smoke: planned, run, seen, verified, published, carried."
    monkeypatch.setattr(Machine, "rate", lambda self, exp: 5e9)  # not measured
    runs, there = str(tmp_path / "runs"), str(tmp_path / "carried")
    cell = select("fig2a").cell.iloc[0]
    name = [cell, "--protocol", "smoke", "--out-dir", runs]
    assert cli.main(["run", *name, "--workers", "8"]) == 0, capsys.readouterr()
    assert cli.main(["plan", *name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join("{ "))
    assert found["states"] == {"done": 1}
    assert cli.main(["verify", "--origin", "runs", "--out-dir", runs]) == 0
    assert cli.main(["publish", *name, "--to", there]) == 0
    assert cli.main(["collect", there, "--to", str(tmp_path / "home")]) == 0
    assert (tmp_path / "home" / PROTOCOLS["smoke"].run_id / "run.json").exists()
