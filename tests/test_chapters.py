"Chapters through papermill, as a person calls it."

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from uvit_repro.config import ParameterError, parameters_cell
from uvit_repro.runs.chapters import run_chapter

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "nbs" / "05_ablations.ipynb"


def papermill(cwd, *args, nb=CHAPTER):
    return subprocess.run(
        [sys.executable, "-m", "papermill", str(nb), "out.ipynb", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_parameters_cell_has_every_field():
    nb = nbformat.read(CHAPTER, 4)
    (cell,) = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert cell.source == parameters_cell(), (
        "write it anew from uvit_repro.config.parameters_cell()"
    )


def test_papermill_reads_every_parameter_of_every_chapter():
    "A comment that papermill cannot parse would hide its parameter from `run_chapter`."
    import papermill

    for nb in sorted(CHAPTER.parent.glob("*.ipynb")):
        cell = [
            c
            for c in json.loads(nb.read_text())["cells"]
            if "parameters" in c["metadata"].get("tags", [])
        ]
        if cell:
            assert list(papermill.inspect_notebook(str(nb))) == [
                l.split(":")[0] for l in "".join(cell[0]["source"]).splitlines() if l.strip()
            ], nb.name


@pytest.mark.parametrize(
    "given, says",
    [
        (("patch_sze", "2"), "did you mean patch_size"),
        (("patch_size", "3"), "try one of [1, 2, 4, 8]"),
        (("skip", "cat"), "'concat', 'add'"),
        (("lr", "fast"), "expected float"),
    ],
)
def test_wrong_parameter_given_to_plain_papermill(tmp_path, given, says):
    r = papermill(tmp_path, "-p", "protocol", "smoke", "-p", *given)
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode == 1 and says in last and "ParameterError" in last, last


def test_plain_papermill_from_elsewhere(tmp_path):
    r = papermill(
        tmp_path,
        "-p",
        "protocol",
        "smoke",
        "-p",
        "patch_size",
        "2",
        "-p",
        "out_dir",
        str(tmp_path / "runs"),
    )
    assert r.returncode == 0, r.stderr[-2000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "ok"
    text = (tmp_path / "out.ipynb").read_text()
    assert text.count('"image/png"') >= 4 and "not run: papermill" in text


def test_two_chapters_through_run_chapter(tmp_path):
    out = run_chapter(
        CHAPTER, protocol="smoke", patch_size=4, out_dir=str(tmp_path / "runs"), say=lambda s: None
    )
    assert out.name == "chapter.ipynb" and out.parent.parent == tmp_path / "runs"
    page = run_chapter(
        ROOT / "nbs" / "15_report.ipynb",
        tmp_path / "99.ipynb",
        out_dir=str(tmp_path / "runs"),
        report_dir=str(tmp_path / "report"),
        say=lambda s: None,
    )
    assert (
        "Equivalence certificate" in page.read_text()
        and (tmp_path / "report" / "figure2_laptop.csv").exists()
        and (tmp_path / "report" / "certificate.csv").exists()
    )
    with pytest.raises(ParameterError, match="patch_size"):
        run_chapter(CHAPTER, tmp_path / "no.ipynb", patch_sze=2)
    assert not (tmp_path / "no.ipynb").exists()


def test_report_of_nothing_says_not_run(tmp_path):
    "With no records at all the report still builds, full of the paper's values and commands."
    from uvit_repro.report.pages import to_html

    root = tmp_path / "empty"
    (root / "nbs").mkdir(parents=True)
    (root / "results").mkdir()
    (root / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (root / "nbs" / "15_report.ipynb").write_text((ROOT / "nbs" / "15_report.ipynb").read_text())
    env = {**os.environ, "UVIT_REPRO_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(root / "nbs" / "15_report.ipynb"),
            str(root / "out.ipynb"),
        ],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    page = to_html(root / "out.ipynb", root / "report.html").read_text()
    from uvit_repro.paper.registry import registry

    cells = dict(re.findall(r'<td [^>]*id="cell-([^"]+)"[^>]*>([^<]*)</td>', page))
    assert all(html.unescape(cells[c.cell]) == c.value for c in registry().itertuples())
    assert (
        page.count("not run") > 30
        and "8.96" in page
        and "papermill nbs/05_ablations.ipynb out.ipynb -p protocol gpu" in page
        and "44,255,328" in page
    )
