"What is installed where: pins, metadata, licence, and the wheel used outside the checkout."

import ast
import configparser
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import uvit_repro

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # Python 3.10: comes with pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = {
    f: [
        line.strip()
        for line in (ROOT / f).read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    for f in ("requirements.txt", "requirements-3.10.txt")
}
ALL_PINS = {
    f: {canonicalize_name(r.name): r for r in map(Requirement, lines)} for f, lines in FILES.items()
}
LINES, PINS = FILES["requirements.txt"], ALL_PINS["requirements.txt"]
NEEDS = [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


def test_environment_and_requirements_are_one_set():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert sorted(pip) == sorted(LINES) and len(set(pip)) == len(pip) == len(PINS)
    assert env["name"] == "uvit_repro" and "pip" in env["dependencies"]
    (python,) = (d for d in env["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert (
        Version(python.partition("=")[2])
        in Requirement(f"python{PROJECT['requires-python']}").specifier
    )


def test_requirements_of_python_310_are_the_same_packages():
    old = ALL_PINS["requirements-3.10.txt"]
    assert set(old) == set(PINS) and len(FILES["requirements-3.10.txt"]) == len(old)
    assert all(old[n] == PINS[n] for n in ("nbdev", "execnb", "fastcore"))
    assert (ROOT / "requirements-3.10.txt").read_text().startswith("# For Python 3.10 only")


@pytest.mark.parametrize("file,line", [(f, line) for f, lines in FILES.items() for line in lines])
def test_every_line_is_a_pin(file, line):
    (spec,) = Requirement(line).specifier
    assert spec.operator == "==", f"{line}: pin an exact version"
    assert spec.version.endswith(".*") == (Requirement(line).name in ("torch", "torchvision")), (
        f"{line}: only torch and torchvision are pinned by minor version"
    )


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_pins_satisfy_pyproject(need, file):
    pins = ALL_PINS[file]
    assert canonicalize_name(need.name) in pins, (
        f"{need.name} of pyproject.toml has no pin in {file}"
    )
    version = next(iter(pins[canonicalize_name(need.name)].specifier)).version
    for v in [version] if not version.endswith(".*") else [version[:-1] + "0", version[:-1] + "99"]:
        assert Version(v) in need.specifier, (
            f"{file} pins {need.name} {version}, pyproject.toml wants {need}"
        )


def test_notebook_stack():
    assert {n: str(PINS[n].specifier) for n in ("nbdev", "torch", "torchvision")} == {
        "nbdev": "==2.4.14",
        "torch": "==2.15.*",
        "torchvision": "==0.29.*",
    }
    assert Version(str(PINS["execnb"].specifier)[2:]) < Version("0.2") and Version(
        str(PINS["fastcore"].specifier)[2:]
    ) < Version("1.13")
    # A set of versions that pip calls sound can fail here.
    code = "import nbdev.export, nbdev.test, nbdev.clean, nbdev.showdoc"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def imports(source):
    "Top-level names that a piece of Python imports, anywhere in it."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_every_import_is_pinned():
    used = {
        n: p.name
        for p in sorted((ROOT / "uvit_repro").rglob("*.py"))
        for n in imports(p.read_text(encoding="utf-8"))
    }
    for p in sorted((ROOT / "nbs").glob("*.ipynb")):
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]:
            if c["cell_type"] == "code":
                source = "\n".join(
                    line
                    for line in "".join(c["source"]).splitlines()
                    if not line.lstrip().startswith(("%", "!"))
                )
                used.update(dict.fromkeys(imports(source), p.name))
    # packages_distributions() of Python 3.10 misses packages without top_level.txt.
    dists = {}
    for d in importlib.metadata.distributions():
        for top in {f.parts[0].removesuffix(".py") for f in d.files or ()}:
            dists.setdefault(top, set()).add(d.metadata["Name"])
    missing = {
        n: where
        for n, where in used.items()
        if n != "uvit_repro"
        and n not in sys.stdlib_module_names
        and not any(canonicalize_name(d) in PINS for d in dists.get(n, [n]))
    }
    assert not missing, f"imported and not in requirements.txt: {missing}"


def test_metadata():
    assert [str(r.specifier) for r in NEEDS if r.name == "torch"] == [">=2.11"] and PROJECT[
        "requires-python"
    ] == ">=3.10"
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert (
        settings["DEFAULT"]["version"] == uvit_repro.__version__
        and settings["DEFAULT"]["lib_name"] == PROJECT["name"] == "uvit_repro"
    )


def test_license_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_bytes()
    assert (
        hashlib.sha256(text).hexdigest()
        == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )  # apache.org/licenses/LICENSE-2.0.txt
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]


def pip(*args):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1"
    }
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, args)], capture_output=True, text=True, env=env
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy, so that no build folder appears in the checkout."
    tmp = tmp_path_factory.mktemp("wheel")
    src = tmp / "src"
    src.mkdir()
    for f in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / f).exists():
            shutil.copy(ROOT / f, src)
    shutil.copytree(
        ROOT / "uvit_repro", src / "uvit_repro", ignore=shutil.ignore_patterns("__pycache__")
    )
    try:
        local = Version(importlib.metadata.version("setuptools")) >= Version("77")
    except importlib.metadata.PackageNotFoundError:
        local = False
    out = pip(
        "wheel", src, "--no-deps", "-w", tmp / "dist", *(["--no-build-isolation"] if local else [])
    )
    if (
        out.returncode
        and not local
        and re.search(
            r"Could not find a version|NewConnectionError|No matching distribution", out.stderr
        )
    ):
        pytest.skip("setuptools>=77 is neither installed nor reachable")
    assert out.returncode == 0, out.stderr[-3000:]
    (path,) = (tmp / "dist").glob("uvit_repro-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    files = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "uvit_repro").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert names == files
    meta = [
        n
        for n in zipfile.ZipFile(wheel).namelist()
        if n.endswith((".dist-info/METADATA", "/LICENSE"))
    ]
    assert len(meta) == 2 and wheel.name.startswith(
        f"uvit_repro-{uvit_repro.__version__}-py3-none-any"
    )


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    assert out.returncode == 0, out.stderr[-3000:]
    code = """
import json
from importlib import resources
import uvit_repro
from uvit_repro import config, paper
package = resources.files("uvit_repro")
data = package/"paper"/"tables"
csv = sorted(p.name for p in data.iterdir() if p.name.endswith(".csv"))
golden = sorted(p.name for p in (package/"runs"/"golden").iterdir() if p.name.endswith(".npz"))
fid = paper.published("Table 1", "ImageNet 256x256", "U-ViT-H/2", "FID")
print(json.dumps(dict(file=uvit_repro.__file__, version=uvit_repro.__version__,
    configs=len(config.CONFIGS), rows=len(paper.load_paper(paper=None)),
    claims=len(paper.load_claims()), fid=fid, cka=paper.figure7("addition").shape,
    csv=csv, golden=golden)))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("UVIT_")} | {
        "PYTHONPATH": str(site)
    }
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-3000:]
    got, data = json.loads(out.stdout), ROOT / "uvit_repro" / "paper" / "tables"
    assert Path(got["file"]).resolve().is_relative_to(site.resolve()), (
        f"the checkout was imported: {got['file']}"
    )
    from uvit_repro import paper

    assert (got["version"], got["configs"], got["rows"], got["claims"]) == (
        uvit_repro.__version__,
        10,
        len(paper.load_paper(paper=None)),
        len(paper.load_claims()),
    )
    assert got["fid"] == 2.29 and got["cka"] == [13, 13]
    assert got["csv"] == sorted(p.name for p in data.glob("*.csv")) and {
        "uvit_tables.csv",
        "claims.csv",
        "other_tables.csv",
        "uvit_fig7_cka.csv",
    } <= set(got["csv"])
    assert (
        got["golden"]
        == sorted(p.name for p in (ROOT / "uvit_repro/runs/golden").glob("*.npz"))
        != []
    )
