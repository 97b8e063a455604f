"""The registry: every number of the record is a cell, with its experiment or the reason why not."""

import difflib
import functools
import json
import re

import pandas as pd

from uvit_repro.config import ParameterError, digest
from uvit_repro.paper.numbers import all_numbers, read_table

KINDS = {  # kind: what it means
    "reproducible": "measured on a training run: has an experiment",
    "statement": "a finding in words; where it is about this model, with the runs that bear on it",
    "computed": "counted from an architecture, no training",
    "setting": "a choice that was made; ours is in the configuration",
    "time": "seconds, hours or devices on the paper's machines",
    "memory": "bytes on the paper's machines",
    "quoted": "another method's number, or this model's as measured by others",
    "part": "of a pretrained component: an autoencoder or a text encoder",
    "other model": "another network's number without an experiment here; the reason is given",
}
KEY = ["paper", "place", "dataset", "row", "column", "condition"]
NAMES = {"source": "place", "method": "row", "metric": "column", "reading_error": "error"}
COLUMNS = [*KEY, "value", "number", "error", "provenance", "confidence"]
UNCOUNTED = r"External|README|Code$|log file|paper listing|.*\((exact|cost)\)"  # not in the papers


def slug(text: str) -> str:
    "`Figure 2a` becomes `fig2a`, `Table 2 (exact)` `table2-exact`, `Appendix H-I` `appendix-h-i`."
    text = re.sub(r"\bfigure (?=\d)", "fig", text.lower())
    text = re.sub(r"\b(table|section) (?=\d)", r"\1", text)
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


def place_slug(paper: str, place: str) -> str:
    "`table1` for Table 1 of U-ViT, `diffit-table1` for that of DiffiT."
    return slug(place) if paper == "U-ViT" else f"{slug(paper)}-{slug(place)}"


def cell_id(*key: str) -> str:
    "A readable name of a row of the record, made unique by a hash of its key (see `KEY`)."
    paper, place, _, row, column, condition = key
    steps = re.findall(r"(\d+K) iterations", condition)[:1]
    words = [slug(row)[:32].strip("-"), *map(str.lower, steps), slug(column)]
    return "-".join([place_slug(paper, place), *words, digest(list(key), 5)])


def matrix_entries() -> pd.DataFrame:
    "The entries of the three matrices of Figure 7, as rows of the record."
    table = read_table("uvit_fig7_cka.csv")
    column = "cka_" + table.block_i + "_" + table.block_j
    table = table.assign(paper="U-ViT", place="Figure 7", dataset="CIFAR10", column=column)
    table = table.assign(condition="entry of the matrix", value=table.cka, error=0.02)
    return table.assign(number=table.cka.astype(float)).rename(columns={"setting": "row"})


def is_published(cells: pd.DataFrame) -> pd.Series:
    """Whether a cell is a number that its paper printed as its own result or setting.

    Not counted: words; quotations of other methods; what is not in the paper (READMEs, released
    configurations, logs, what others measured) or only recalled; our own arithmetic; repetitions
    in a later table; and of the symmetric matrices of Figure 7 the diagonal, one half, and
    summaries.
    """
    quoted = (cells.kind == "quoted") | (cells.confidence == "low")
    elsewhere = cells.place.str.match(UNCOUNTED) | cells.provenance.str.startswith("computed")
    elsewhere |= cells.condition.str.startswith("value in the official config")
    repeated = cells.duplicated(["paper", "dataset", "row", "column", "number"])
    repeated &= ~cells.place.str.startswith("Figure")
    i, j = (cells.column.str.extract(r"^cka_(\d+)_(\d+)$")[n].astype(float) for n in (0, 1))
    mirrored = (cells.place == "Figure 7") & ~(i < j)
    return cells.number.notna() & ~quoted & ~elsewhere & ~repeated & ~mirrored


@functools.cache
def _cells() -> pd.DataFrame:
    cells = pd.concat([all_numbers().rename(columns=NAMES), matrix_entries()], ignore_index=True)
    cells = cells[COLUMNS]
    cells.insert(0, "cell", [cell_id(*key) for key in cells[KEY].itertuples(index=False)])
    cells = cells.merge(read_table("registry.csv"), on="cell", validate="one_to_one")
    for name in ("step", "num_samples"):
        cells[name] = pd.Series([int(v) if v else None for v in cells[name]], dtype=object)
    cells["fields"] = [tuple(json.loads(v or "[]")) for v in cells["fields"]]
    cells["sampling"] = [json.loads(v or "{}") for v in cells["sampling"]]
    curves = [v if v in ("", "all") else tuple(map(int, v.split())) for v in cells["curve"]]
    cells["curve"] = pd.Series([v or None for v in curves], dtype=object)
    return cells.assign(counts=is_published(cells))


def registry() -> pd.DataFrame:
    """One row per cell.

    What the paper says: cell, paper, place, dataset, row, column, condition, value, number, error
    (of reading), provenance, confidence, counts (`is_published`). What we do about it: kind,
    reason, base (a configuration), fields (one dict of changes per run), measure, step,
    num_samples, sampling (changes), curve (further steps to measure: all, or a tuple).
    """
    return _cells().copy()


def _bare(name: str) -> str:
    return re.sub(r"figure(?=\d)", "fig", re.sub(r"[\s_-]", "", name.lower()))


def select(
    what: str,  # all, fig2, fig2a, table1, appendixe, diffit-table1, ..., or a cell id
) -> pd.DataFrame:  # rows of the registry
    "The cells that a name stands for. Raises `ParameterError` with what is near."
    cells, name = registry(), _bare(what)
    if what == "all":
        return cells
    if (cells.cell == what).any():
        return cells[cells.cell == what]
    places = [_bare(place_slug(*pair)) for pair in zip(cells.paper, cells.place, strict=True)]
    pattern = re.compile(re.escape(name) + r"(?!\d)")
    hits = [bool(pattern.match(place)) for place in places]
    if any(hits) and name not in ("", "fig", "table", "appendix", "section"):
        return cells[hits]
    near = difflib.get_close_matches(name, [*dict.fromkeys(places), *cells.cell], n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ParameterError(
        f"{what!r} is no table, figure or cell: {hint}Known are all, fig2, fig3, fig5, fig7, "
        "table1 ... table7, appendixe, readme, or an id of the registry"
    )
