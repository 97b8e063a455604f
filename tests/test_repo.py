"The form of the repository: notebooks in git, modules that equal them, nothing that belongs to one machine."

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p.stem for p in (ROOT / "uvit_repro").glob("*.py") if not p.stem.startswith("_"))
HEAVY = [
    "diffusers",
    "torch_fidelity",
    "torchvision",
    "open_clip",
    "sklearn",
    "transformers",
    "papermill",
]


def cells(nb, kind=None):
    for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]:
        if kind in (None, c["cell_type"]):
            yield c, "".join(c["source"])


def directives(source):
    return re.findall(r"^#\s*\|\s*(.+?)\s*$", source, re.M)


@pytest.mark.parametrize("nb", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_is_clean(nb):
    ids = Counter(c["id"] for c, _ in cells(nb))
    assert max(ids.values()) == 1, f"cell ids used twice: {[i for i, n in ids.items() if n > 1]}"
    for c, _ in cells(nb, "code"):
        assert c["outputs"] == [] and c["execution_count"] is None, (
            f"cell {c['id']} has outputs: jupyter nbconvert --clear-output --inplace {nb.name}"
        )
    tagged = [c["id"] for c, _ in cells(nb) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) <= 1, f"several parameters cells: {tagged}"


@pytest.mark.parametrize("nb", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_has_a_title_one_module_and_short_cells(nb):
    first, text = next(cells(nb))
    assert (
        first["cell_type"] == "markdown"
        and re.match(r"# \S", text)
        and re.search(r"^> \S", text, re.M)
    ), "start with `# Title` and a line `> ...`"
    exps = [
        d.split()[1]
        for _, s in cells(nb, "code")
        for d in directives(s)
        if d.startswith("default_exp")
    ]
    assert len(exps) == 1, f"one notebook exports one module, not {exps}"
    for c, s in cells(nb, "code"):
        for d in directives(s):
            assert not re.match(r"exporti?\s+\S", d), (
                f"cell {c['id']} exports to another module: {d}"
            )
            if d.startswith("export"):
                assert len(s.splitlines()) <= 65, f"cell {c['id']} has {len(s.splitlines())} lines"
            if d.startswith("export"):
                assert not re.search(r"^\s*from \S+ import \*", s, re.M), (
                    f"cell {c['id']} exports `import *`"
                )


def test_every_module_has_one_chapter():
    exps = Counter(
        d.split()[1]
        for nb in CHAPTERS
        for _, s in cells(nb, "code")
        for d in directives(s)
        if d.startswith("default_exp")
    )
    assert sorted(exps.elements()) == MODULES


def test_modules_import_quietly(tmp_path):
    "Every module imports alone from the library, prints nothing, touches no GPU, and leaves slow libraries for later."
    code = f"""
import importlib, json, sys, traceback
bad = {{}}
for m in {MODULES!r}:
    try: importlib.import_module("uvit_repro." + m)
    except BaseException: bad[m] = traceback.format_exc(limit=-2)
torch = sys.modules.get("torch")
json.dump(dict(bad=bad, cuda=bool(torch and torch.cuda.is_initialized()), heavy=[h for h in {HEAVY!r} if h in sys.modules]), open(sys.argv[1], "w"))
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    got = json.loads((tmp_path / "r.json").read_text())
    assert got == {"bad": {}, "cuda": False, "heavy": []}, "\n".join(
        [str(got["heavy"]), *got["bad"].values()]
    )
    assert out.stdout == "", f"importing prints: {out.stdout[:500]}"


def test_ruff():
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--select",
            "F821,F811",
            "uvit_repro",
            "tests",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr


def nbdev_copy(tmp_path, *names):
    for n in ("settings.ini", "pyproject.toml", *names):
        if (ROOT / n).is_dir():
            shutil.copytree(
                ROOT / n,
                tmp_path / n,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "data"),
            )
        else:
            shutil.copy(ROOT / n, tmp_path / n)


def nbdev_run(tmp_path, command):
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.argv = [{command!r}]; from nbdev.{'clean' if 'clean' in command else 'doclinks'} import {command} as f; f()",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]


def differing(a, b, pattern):
    files = {p.name for d in (a, b) for p in d.glob(pattern)}
    assert files
    return sorted(
        n
        for n in files
        if not (
            (a / n).is_file() and (b / n).is_file() and (a / n).read_bytes() == (b / n).read_bytes()
        )
    )


def test_nbdev_export_changes_nothing(tmp_path):
    nbdev_copy(tmp_path, "nbs", "uvit_repro")
    for m in MODULES:
        (tmp_path / "uvit_repro" / f"{m}.py").unlink()  # so that a module without a chapter shows
    nbdev_run(tmp_path, "nbdev_export")
    bad = differing(ROOT / "uvit_repro", tmp_path / "uvit_repro", "*.py")
    assert not bad, f"modules and notebooks differ, run nbdev_export: {bad}"


def test_nbdev_clean_changes_nothing(tmp_path):
    nbdev_copy(tmp_path, "nbs")
    nbdev_run(tmp_path, "nbdev_clean")
    bad = differing(ROOT / "nbs", tmp_path / "nbs", "*.ipynb")
    assert not bad, f"run nbdev_clean: {bad}"


def repository_files():
    "Tracked files and those that would be, or every file where there is no git."
    out = (
        subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
        )
        if shutil.which("git") and (ROOT / ".git").exists()
        else None
    )
    if out is not None and out.returncode == 0:
        return [ROOT / n for n in out.stdout.decode().split("\0") if n and (ROOT / n).is_file()]
    skip = {".git", ".venv", "__pycache__", "build", "dist", "runs"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]


def test_no_paths_of_one_machine():
    machine, bad = re.compile(r"(?<![\w.~}])/(?:work|farm|root)/"), []
    assert machine.search("open('/{}/x')".format("work")) and not machine.search(
        "../{0}/x https://example.org/{0}/ ~/{0}/".format("work")
    )
    for p in repository_files():
        raw = p.read_bytes()
        if b"\0" not in raw:
            bad += [
                f"{p.relative_to(ROOT)}:{i}: {l.strip()[:120]}"
                for i, l in enumerate(raw.decode("utf-8", "replace").splitlines(), 1)
                if machine.search(l)
            ]
    assert not bad, "\n".join(bad)


def test_ci_runs_the_same_command_everywhere():
    import yaml

    flow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert set(flow.get("on", flow.get(True))) == {
        "push",
        "pull_request",
    }  # YAML 1.1 reads `on` as true
    (job,) = flow["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest" and [s["run"] for s in job["steps"] if "run" in s] == [
        "make test"
    ]
    script = ROOT / ".ci" / "run"
    assert (
        script.stat().st_mode & 0o111
        and "set -euo pipefail" in script.read_text()
        and script.read_text().rstrip().endswith("make test")
    )
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_modules_have_docstrings():
    "Everything public that a chapter exports says what it is."
    bad = []
    for m in MODULES:
        for n in ast.parse((ROOT / "uvit_repro" / f"{m}.py").read_text(encoding="utf-8")).body:
            if (
                isinstance(n, (ast.FunctionDef, ast.ClassDef))
                and not n.name.startswith("_")
                and not ast.get_docstring(n)
            ):
                bad.append(f"{m}.{n.name}")
    assert not bad, bad
