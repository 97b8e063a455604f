"""Executed chapters as copies for readers and as pages beside the report."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tempfile
from pathlib import Path

from uvit_repro.config import project_root
from uvit_repro.data.files import write_atomic
from uvit_repro.runs.records import published_root

LARGE = 12_000  # characters of a table that is left out of an executed copy


def chapter_list() -> list[dict]:  # name, title, line
    "The executed chapters with their titles and first quoted lines."
    out = []
    for path in sorted((published_root() / "chapters").glob("[0-9]*.ipynb")):
        text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, line = (re.search(p, text, re.M) for p in (r"^# (.*)", r"^> (.*)"))
        out.append({"name": path.stem, "title": title[1], "line": line[1] if line else ""})
    return out


def to_html(
    notebook: Path,  # an executed chapter
    page: Path,
) -> Path:  # the page
    "Render an executed chapter; links between chapters lead to pages."
    import nbformat
    from nbconvert import HTMLExporter

    nb = nbformat.read(notebook, 4)
    for cell in nb.cells:
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    nb.cells = [cell for cell in nb.cells if cell.source.strip() or cell.get("outputs")]
    nb.metadata["title"] = f"uvit_repro: {notebook.stem}"

    def unchanged(code):  # our own highlighted code; cleaning it takes half of the time
        return code

    exporter = HTMLExporter(template_name="lab", filters={"clean_html": unchanged})
    body, _ = exporter.from_notebook_node(nb)
    body = re.sub(r'(href="[^":]+)\.ipynb', r"\1.html", body)
    return write_atomic(page, lambda path: path.write_text(body, encoding="utf-8"))


def write_pages(
    folder: Path,  # of the pages
) -> list[Path]:  # the pages
    "Render the executed chapters that are newer than their pages."
    pages = []
    for path in sorted((published_root() / "chapters").glob("[0-9]*.ipynb")):
        page = folder / f"{path.stem}.html"
        if not page.is_file() or page.stat().st_mtime < path.stat().st_mtime:
            to_html(path, page)
        pages.append(page)
    return pages


def smaller_png(
    png: str,  # base64
) -> str:  # base64, of 128 colours where that is smaller
    "A picture that looks the same and takes less space in the repository."
    from PIL import Image

    raw, out = base64.b64decode(png), io.BytesIO()
    picture = Image.open(io.BytesIO(raw)).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(min(raw, out.getvalue(), key=len)).decode()


def without_machine(text: str) -> str:
    "Text in which folders of this machine have general names."
    folders = {project_root(): ".", Path.home(): "~", Path(tempfile.gettempdir()): "TMP"}
    for variable in ("UVIT_DATA", "UVIT_WEIGHTS"):
        if os.environ.get(variable):
            folders[Path(os.environ[variable])] = f"${variable}"
    for folder, name in folders.items():
        if folder != Path(folder.anchor):  # a home of / is no name of a machine
            text = re.sub(re.escape(str(folder)) + r"(?![\w-])", name, text)
    return text


def publish_copy(
    executed: Path,  # a notebook as papermill left it
    out: Path,  # the copy for readers
) -> Path:  # the copy
    "Keep pictures and printed text of an executed chapter; leave out what names this machine."
    import nbformat

    nb = nbformat.read(executed, 4)
    nb.metadata.pop("papermill", None)
    nb.cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller_png(data["image/png"])
            if len(data.get("text/html", "")) > LARGE:
                data["text/html"] = "<p>A large table, left out of this copy.</p>"
    text = without_machine(nbformat.writes(nb))
    return write_atomic(out, lambda path: path.write_text(text, encoding="utf-8"))


def execute_chapters(say=print) -> list[Path]:
    "Execute all chapters and keep the copies for readers in results/published/chapters."
    from uvit_repro.runs.chapters import run_chapter

    copies, books = [], sorted((project_root() / "nbs").glob("[0-9]*.ipynb"))
    for i, book in enumerate(books):
        say(f"chapter {book.name}, {i + 1} of {len(books)}")
        with tempfile.TemporaryDirectory() as folder:
            parameters = {"protocol": "laptop"} if book.name.startswith("05") else {}
            executed = run_chapter(book, Path(folder) / book.name, **parameters)
            copies.append(publish_copy(executed, published_root() / "chapters" / book.name))
    return copies
