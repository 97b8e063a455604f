"""Chapters through papermill, as a person calls it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from uvit_repro.config import PARAMETERS, ParameterError
from uvit_repro.runs.chapters import run_chapter

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "nbs" / "05_ablations.ipynb"


def parameters_source(chapter: Path) -> str:
    "The cell tagged parameters, or an empty text."
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return "".join("".join(c["source"]) for c in tagged)


def execute(folder: Path, *args: str) -> subprocess.CompletedProcess:
    "Plain papermill on chapter 05, called from another folder."
    command = [sys.executable, "-m", "papermill", str(CHAPTER), "out.ipynb", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=env)


def test_chapter_05_lists_at_most_twenty_settings_that_exist():
    names = list(papermill.inspect_notebook(str(CHAPTER)))
    assert "patch_size" in names and len(names) <= 20
    assert set(names) <= {*PARAMETERS, "protocol", "seed", "out_dir"}


@pytest.mark.parametrize("chapter", sorted(CHAPTER.parent.glob("*.ipynb")), ids=lambda p: p.stem)
def test_papermill_reads_every_parameter(chapter):
    "A comment that papermill cannot parse would hide its parameter from `run_chapter`."
    source = parameters_source(chapter)
    if source:
        names = [node.target.id for node in ast.parse(source).body]
        assert list(papermill.inspect_notebook(str(chapter))) == names


@pytest.mark.parametrize(
    "given, message",
    (
        (("patch_sze", "2"), "did you mean patch_size"),
        (("patch_size", "3"), "1, 2, 4, 8"),
        (("skip", "cat"), "concat"),
    ),
)
def test_wrong_parameter_given_to_plain_papermill(tmp_path, given, message):
    out = execute(tmp_path, "-p", "protocol", "smoke", "-p", *given)
    last = out.stderr.strip().splitlines()[-1]
    assert out.returncode == 1 and "ParameterError" in last and message in last


def test_plain_papermill_from_elsewhere(tmp_path):
    runs = tmp_path / "runs"
    given = ("-p", "protocol", "smoke", "-p", "patch_size", "2", "-p", "mlp_ratio", "2.0")
    out = execute(tmp_path, *given, "-p", "out_dir", str(runs))
    assert out.returncode == 0, out.stderr[-2000:]
    (run,) = (p for p in runs.iterdir() if (p / "run.json").exists())
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "ok" and record["experiment"]["model"]["mlp_ratio"] == 2.0


def test_run_chapter_compares_names_before_it_starts(tmp_path):
    with pytest.raises(ParameterError, match="patch_size"):
        run_chapter(CHAPTER, tmp_path / "no.ipynb", patch_sze=2)
    assert not (tmp_path / "no.ipynb").exists()
