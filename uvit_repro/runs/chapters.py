"""Chapters as programs: papermill in a process of its own, parameters checked first."""

import difflib
import json
import os
import re
import sys
import threading
from pathlib import Path

from uvit_repro.config import PARAMETERS, ParameterError, experiment, project_root
from uvit_repro.runs.experiment import run_folder
from uvit_repro.runs.processes import PROGRESS, stream_lines


class ChapterFailed(RuntimeError):
    "A chapter stopped; the message is its own last line, and names the partial copy."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


def check_names(nb: Path, given) -> None:
    "Raise `ParameterError` for a parameter that the notebook does not have."
    import papermill

    known = list(papermill.inspect_notebook(str(nb)))
    if not known:
        raise ParameterError(f"{nb.name} has no cell tagged parameters")
    if "patch_size" in known:  # its cell lists some settings of an experiment, and takes all
        known += [name for name in PARAMETERS if name not in known]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f"Did you mean {', '.join(close)}? " if close else ""
            valid = ", ".join(sorted(known))
            raise ParameterError(f"{nb.name} has no parameter {name!r}. {hint}Valid: {valid}")


def papermill_command(nb: Path, out: Path, params: dict) -> list[str]:
    "The command line that executes a chapter, as one would type it."
    options = ["--log-output", "--no-progress-bar", "--no-request-save-on-cell-execute"]
    command = [sys.executable, "-m", "papermill", str(nb), str(out), *options]
    for name, value in params.items():
        if isinstance(value, (tuple, list)):
            value = ",".join(map(str, value))
        if value is not None:
            command += ["-p", name, str(value)]
    return command


def run_papermill(nb: Path, partial: Path, params: dict, say, label: str) -> tuple[int, str]:
    "Execute a notebook in a process of its own: exit code, last line of output."
    last = ""

    def receive(line: str) -> None:
        nonlocal last
        line = re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip()).rpartition("\r")[2]
        if line.strip():
            last = line
        if line.startswith(PROGRESS):
            say(f"{label}{line}")

    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    if params.get("threads"):
        env["OMP_NUM_THREADS"] = str(params["threads"])
    command = papermill_command(nb, partial, params)
    return stream_lines(command, receive, cwd=project_root(), env=env), last


def never_started(partial: Path) -> bool:
    "Whether no cell of an executed notebook was reached: its kernel did not come up."
    try:
        cells = json.loads(partial.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):
        return True
    return not any(c.get("execution_count") for c in cells)


def execute(
    nb: Path,  # a chapter
    out: Path,  # the executed copy
    params: dict,  # its parameters
    say=print,  # told lines of progress
    label: str = "",  # put before each line
) -> Path:  # the executed copy
    "Execute a notebook. A partial copy is kept as NAME.failed.ipynb, and `ChapterFailed` raised."
    nb, out = Path(nb).resolve(), Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.{os.getpid()}-{threading.get_ident()}.ipynb")
    code, last = run_papermill(nb, partial, params, say, label)
    if code and never_started(partial):  # two kernels can draw the same port: try another one
        code, last = run_papermill(nb, partial, params, say, label)
    if not code:
        os.replace(partial, out)
        return out
    message = f"{nb.name} stopped: {last}"
    if "DeadKernelError" in last:
        message += ". Lack of memory is the usual reason: try a smaller batch or fewer workers"
    if partial.exists():
        failed = out.with_name(f"{out.stem}.failed.ipynb")
        os.replace(partial, failed)
        message += f" (partial copy: {failed})"
    raise ChapterFailed(message)


def run_chapter(
    nb,  # path of a chapter with parameters
    out=None,  # executed copy; None: chapter.ipynb in the run's folder, or results/chapters/
    say=print,  # told lines of progress
    label: str = "",  # put before each line
    **params,  # its parameters
) -> Path:  # the executed copy
    "Execute a chapter after checking its parameters."
    nb = Path(nb).resolve()
    check_names(nb, params)
    if out is None and nb.name.startswith("05"):
        fields = {k: v for k, v in params.items() if k in PARAMETERS or k in ("protocol", "seed")}
        out = run_folder(experiment(**fields), params.get("out_dir")) / "chapter.ipynb"
    return execute(nb, out or project_root() / "results" / "chapters" / nb.name, params, say, label)
