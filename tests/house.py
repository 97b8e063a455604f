"""Measure the house: lines, function lengths, parameters, and the shares of each chapter."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "uvit_repro"
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))


@dataclass(frozen=True)
class Function:
    "One function of the library, formatted."

    name: str
    lines: int
    parameters: int


def library_modules() -> list[Path]:
    "Every module of the library but the index that nbdev writes."
    return sorted(p for p in LIBRARY.rglob("*.py") if p.name != "_modidx.py")


def formatted(paths: list[Path]) -> dict[str, str]:
    "Sources as ruff lays them out at 100 columns, by their path in the library."
    with tempfile.TemporaryDirectory() as folder:
        copies = {}
        for path in paths:
            name = path.relative_to(LIBRARY).as_posix()
            copy = Path(folder) / name.replace("/", "__")
            copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
            copies[name] = copy
        command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100"]
        subprocess.run([*command, "--quiet", folder], check=True)
        return {name: copy.read_text(encoding="utf-8") for name, copy in copies.items()}


def count_parameters(node: ast.FunctionDef) -> int:
    "Parameters of a function; `self` and `cls` are not counted."
    args = node.args
    names = [a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs]]
    return len([n for n in names if n not in ("self", "cls")])


def functions(name: str, source: str) -> list[Function]:
    "Every function of a module, methods included."
    return [
        Function(f"{name}:{n.name}", n.end_lineno - n.lineno + 1, count_parameters(n))
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.FunctionDef)
    ]


def code_cells(chapter: Path) -> list[str]:
    "Sources of the code cells of a chapter."
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def shares(chapter: Path) -> dict[str, int]:
    "Characters of prose, demonstration and exported code of a chapter; lines of its longest cell."
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    prose = sum(len("".join(c["source"])) for c in cells if c["cell_type"] == "markdown")
    code = code_cells(chapter)
    exported = [s for s in code if re.match(r"#\|\s*export", s)]
    shown = [s for s in code if s not in exported]
    return {
        "prose": prose,
        "demonstration": sum(map(len, shown)),
        "exported": sum(map(len, exported)),
        "longest cell": max((len(s.splitlines()) for s in code), default=0),
    }


def too_many_parameters(f: Function) -> bool:
    "More than eight; a constructor of a network keeps the released signature."
    return f.parameters > 8 and not f.name.endswith(":__init__")


def main() -> None:
    "Print the measures."
    sources = formatted(library_modules())
    rooms: dict[str, int] = {}
    for name, source in sources.items():
        room = name.split("/")[0]
        rooms[room] = rooms.get(room, 0) + len(source.splitlines())
    for room, lines in sorted(rooms.items(), key=lambda item: -item[1]):
        print(f"{lines:6d}  {room}")
    print(f"{sum(rooms.values()):6d}  in all")
    found = [f for name, source in sources.items() for f in functions(name, source)]
    lengths = sorted(f.lines for f in found)
    ninth = lengths[int(0.9 * len(lengths))]
    median = statistics.median(lengths)
    print(f"{len(found)} functions: median {median}, ninth decile {ninth}, longest {lengths[-1]}")
    for f in sorted(found, key=lambda f: -f.lines)[:10]:
        print(f"{f.lines:6d} lines, {f.parameters} parameters  {f.name}")
    for f in found:
        if too_many_parameters(f):
            print(f"{f.parameters:6d} parameters  {f.name}")
    for chapter in CHAPTERS:
        print(chapter.stem, ", ".join(f"{k} {v}" for k, v in shares(chapter).items()))


if __name__ == "__main__":
    main()
