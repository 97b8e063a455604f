"""Chapters as programs: executed by papermill, parameters checked first."""

import os
from pathlib import Path

from uvit_repro.config import PARAMETERS, ParameterError, project_root
from uvit_repro.config.settings import closest


class ChapterFailed(RuntimeError):
    "A chapter stopped; the message is its own last line, and names the partial copy."


def run_chapter(
    nb,  # path of a chapter
    out=None,  # executed copy; None: in results/chapters
    **params,  # its parameters
) -> Path:  # the executed copy
    "Execute a chapter; a partial copy is kept as NAME.failed.ipynb, and `ChapterFailed` raised."
    import papermill

    nb = Path(nb).resolve()
    known = set(papermill.inspect_notebook(str(nb)))
    if "patch_size" in known:  # its cell lists some settings of an experiment, and takes all
        known |= set(PARAMETERS)
    for name in params:
        if name not in known:
            raise ParameterError(f"{nb.name} has no parameter {name!r}: {closest(name, known)}")
    out = Path(out or project_root() / "results" / "chapters" / nb.name).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.stem}.failed.ipynb")
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in params.items() if v is not None}
    options = {"progress_bar": False, "request_save_on_cell_execute": False}
    try:
        papermill.execute_notebook(nb, partial, given, cwd=project_root(), **options)
    except Exception as e:
        why = f"{getattr(e, 'ename', type(e).__name__)}: {getattr(e, 'evalue', e)}"
        if "DeadKernelError" in why:
            why += ". Lack of memory is the usual reason: try a smaller batch or fewer workers"
        raise ChapterFailed(f"{nb.name} stopped: {why} (partial copy: {partial})") from None
    os.replace(partial, out)
    return out
