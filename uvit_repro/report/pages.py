"""Every number that the papers print has a cell of its own, ours stands beside it in another with a link to the run that made it, and what was not run says so with the command that would run it."""

import argparse
import base64
import functools
import hashlib
import html
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uvit_repro.ablations import figure2_cells
from uvit_repro.campaign.plan import (
    cell_experiments,
    chosen,
    computed,
    hours,
    jobs,
    ledger,
    measured,
    paper_gpu,
    run_sweep,
)
from uvit_repro.config import (
    PROTOCOLS,
    ParameterError,
    experiment,
    main_metric,
    project_root,
    variant_name,
)
from uvit_repro.config.durations import format_duration
from uvit_repro.data.files import write_atomic
from uvit_repro.paper.claims import load_claims
from uvit_repro.paper.numbers import figure2, figure7, read_table
from uvit_repro.paper.registry import KINDS, PARTS, registry, slug
from uvit_repro.report.verdicts import (
    NOT_RUN as NEEDS,
)
from uvit_repro.report.verdicts import (
    VERDICTS,
    all_records,
    all_verdicts,
    effects,
    load_tests,
    plot_forest,
)
from uvit_repro.runs.chapters import cell_seconds, execute, run_chapter
from uvit_repro.runs.counting import experiment_flops
from uvit_repro.runs.experiment import is_done, repeat_command, run_folder
from uvit_repro.runs.processes import default_workers
from uvit_repro.runs.records import load_runs, publish, published_root

ORDER = ("paper", "gpu", "laptop")  # protocols whose numbers are shown, the paper's own first


@dataclass
class Evidence:
    "The records that a report is made from."

    runs: list  # of `load_runs`, finished, without smoke
    results: object  # DataFrame of `all_records`, of these runs
    page: Path  # folder of the page, from which links lead to the records
    origin: str = "all"  # runs | published | all
    out_dir: str = None  # folder of runs, as given

    @functools.cached_property
    def folders(self) -> dict:
        return {r["folder"].name: r["folder"] for r in self.runs}

    @functools.cached_property
    def protocols(self) -> tuple:
        return tuple(p for p in ORDER if any(r["experiment"].protocol == p for r in self.runs))

    def link(self, run_id: str) -> str:
        "Where the record of a run lies, seen from the page."
        return Path(os.path.relpath(Path(self.folders[run_id]) / "run.json", self.page)).as_posix()


def evidence(
    origin="all",  # runs | published | all
    out_dir=None,  # folder of runs; None: results/runs
    page=None,  # folder of the page; None: results
) -> Evidence:
    "Collect the records."
    runs = [
        r
        for r in load_runs(origin, out_dir)
        if r["status"] == "ok" and r["experiment"].protocol != "smoke"
    ]
    results = all_records(origin, out_dir)
    results = results[results.run_id.isin([r["folder"].name for r in runs])]
    return Evidence(
        runs, results, Path(page or project_root() / "results").resolve(), origin, out_dir
    )


def cell(v) -> str:
    "One value of a table: short numbers, text as it is, a dash for nothing."
    if v is None or (isinstance(v, float) and math.isnan(v)):
        return "&ndash;"
    if isinstance(v, (bool, np.bool_)):
        return "yes" if v else "no"
    if isinstance(v, (float, np.floating)):
        return f"{v:.4g}" if 1e-3 <= abs(v) < 1e6 or v == 0 else f"{v:.1e}"
    if isinstance(v, (int, np.integer)):
        return f"{v:,}"
    return html.escape(str(v)) if not str(v).startswith("<") else str(v)


def box(head: str, rows: list, kind="") -> str:
    "A table in a box of its own, in which it scrolls."
    name = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{name}><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def table_html(df, kind="") -> str:
    "A frame as a table; text that starts with `<` is taken for HTML."
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in df.columns)
    return box(
        f"<tr>{head}</tr>",
        [
            "<tr>" + "".join(f"<td>{cell(v)}</td>" for v in r) + "</tr>"
            for r in df.itertuples(index=False)
        ],
        kind,
    )


def fold(summary: str, body: str, is_open=False) -> str:
    "A part that opens on a click."
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"


def beside(target: Path, *names: str) -> str:
    "Links to files that lie beside the page."
    return (
        '<p class="files">'
        + " &middot; ".join(f'<a href="{Path(target).name}/{n}">{n}</a>' for n in names)
        + "</p>"
    )


def keep_figure(
    fig,  # matplotlib
    target: Path,  # folder
    name: str,  # of the files
    data=None,  # DataFrame: what was drawn
    dpi=100,
) -> tuple:  # (PNG as bytes, links)
    "Keep a figure as PNG and SVG with its data as CSV."
    buf, kept = io.BytesIO(), [f"{name}.png", f"{name}.svg"]
    if engine := fig.get_layout_engine():
        engine.execute(fig)
        fig.set_layout_engine("none")
    size = fig.get_tightbbox().padded(0.1)  # laid out and measured once for both
    fig.savefig(buf, format="png", dpi=dpi, bbox_inches=size)
    (target / f"{name}.png").write_bytes(buf.getvalue())
    fig.savefig(target / f"{name}.svg", bbox_inches=size)
    if data is not None:
        data.to_csv(target / f"{name}.csv", index=False)
        kept = [f"{name}.csv", *kept]
    import matplotlib.pyplot as plt

    plt.close(fig)
    return buf.getvalue(), beside(target, *kept)


def machine(run: dict) -> str:
    "What computed a run, in words."
    c = run.get("conditions", {})
    return f"{c.get('gpu') or c.get('cpu') or 'unknown'} ({c.get('cores', '?')} cores), torch {c.get('versions', {}).get('torch', '?')}"


def certificate_frame(
    runs: list,  # of `load_runs`
    here=None,  # `certificate()` of this machine; None: records alone
):  # DataFrame; empty where nothing is known
    "One row per check, one column of differences per machine."
    import pandas as pd

    known, rows = {}, here
    for r in runs:
        if r.get("certificate") and (here is None or r.get("origin") == "published"):
            known.setdefault(machine(r), r["certificate"])
    rows = here or next(iter(known.values()), [])
    if not rows:
        return pd.DataFrame(columns=["what", "file", "tolerance", "equal"])
    df = pd.DataFrame(rows)[["what", "file", "tolerance"]]
    columns = {
        **({"this machine": here} if here else {}),
        **{n: c for n, c in known.items() if [x["file"] for x in c] == list(df.file)},
    }
    for n, c in columns.items():
        df[n] = [x["difference"] for x in c]
    df["equal"] = [
        "yes" if all(v < t for v in vs) else "NO"
        for t, vs in zip(df.tolerance, df[list(columns)].itertuples(index=False))
    ]
    return df


MEASURED = ("reproducible", "statement")  # kinds that a run fills
OURS = MEASURED + (
    "computed",
    "setting",
    "other model",
    "time",
    "memory",
)  # kinds beside which something of ours can stand


def fill(
    cells,  # of `registry`
    ev: Evidence,
) -> dict:  # {cell: {protocol: per run of the cell a list of dicts seed, value, run_id}}
    "Every recorded measurement in its cell."
    book, out = ledger(ev.results), {}
    seeds = {
        p: tuple(sorted({r["experiment"].seed for r in ev.runs if r["experiment"].protocol == p}))
        for p in ev.protocols
    }
    for c in cells[cells.kind.isin(MEASURED)].itertuples():
        for p in ev.protocols:
            runs = [
                [h for h in g if h["run_id"] in ev.folders] for g in measured(c, book, p, seeds[p])
            ]
            if runs and all(runs):
                out.setdefault(c.cell, {})[p] = runs
    return out


def counted(c) -> str:
    "What we count, or have chosen, for a cell that needs no run; empty where there is nothing of the kind."
    if c.kind == "computed":
        v = computed(c)
        return f"{v:,}" if isinstance(v, int) else f"{v:.4g}"
    if c.kind == "setting" and c.base:
        return str(chosen(c))
    return ""


def cost_model(
    runs: list,  # of `load_runs`
) -> tuple:  # (function Experiment -> seconds, {protocol: words about its rate})
    "What an experiment will take, from what recorded ones took."
    name, known = paper_gpu()
    rates, words = (
        {"paper": known, "gpu": known, "laptop": math.nan},
        {"paper": name, "gpu": name, "laptop": "no rate is recorded"},
    )
    for p in ORDER:
        mine = [
            r
            for r in runs
            if (r["experiment"].protocol, r["experiment"].model.model, r["experiment"].data.dataset)
            == (p, "UViT", PROTOCOLS[p].data.dataset)
            and r.get("training", {}).get("seconds")
        ]
        if not mine:
            continue
        each = [experiment_flops(r["experiment"])["train"] / r["training"]["seconds"] for r in mine]
        rates[p], words[p] = (
            float(np.median(each)),
            f"{machine(mine[0])}, at the rate of {len(mine)} recorded runs",
        )
    return lambda e: sum(experiment_flops(e).values()) / rates[e.protocol], words


def claims_frame(
    verdicts: list,  # of `all_verdicts`
):  # DataFrame, plain values, one row per claim and protocol
    "The verdicts with the claims' own words, as data."
    import pandas as pd

    words, rows = load_claims().set_index("id"), []
    for v in verdicts:
        w, p = words.loc[v.claim], v.plan
        decided = v.verdict in ("supported", "contradicted")
        rows.append(
            {
                "id": v.claim,
                "paper": w.paper,
                "claim": w.claim,
                "source": w.source,
                "papers_numbers": w.paper_numbers,
                "protocol": v.protocol,
                "verdict": v.verdict,
                "label": v.label,
                "exploratory": v.exploratory,
                "effect": v.effect,
                "low": v.low,
                "high": v.high,
                "margin": v.margin,
                "degrees_of_freedom": v.df,
                "seeds": v.seeds,
                "reason": v.reason,
                "runs": " ".join(v.run_ids),
                "needs": "" if decided or p else need(v.claim),
                "decide_seeds": p.seeds if p else None,
                "decide_steps": p.steps if p else None,
                "decide_protocol": p.protocol if p else "",
                "decide_runs": p.runs if p else None,
                "decide_hours": p.hours if p else None,
                "basis": p.basis if p else "",
                "command": p.command if p else "",
            }
        )
    return pd.DataFrame(rows)


def need(claim: str) -> str:
    "What a claim without a test waits for."
    t = load_tests(claim)
    return NEEDS[t["kind"]].format(t.get("needs", "")) if t["kind"] in NEEDS else ""


def duration(h) -> str:
    "Hours for people."
    return "cost not known" if h is None or math.isnan(h) else "about " + hours(3600 * h)


def run_links(ids, ev: Evidence) -> str:
    "Links to the records of several runs, folded where there are many."
    links = [f'<a href="{ev.link(i)}">{i}</a>' for i in ids]
    return (
        ""
        if not links
        else links[0]
        if len(links) == 1
        else fold(f"{len(links)} runs", "<br>".join(links))
    )


def effect_text(r) -> str:
    "A claim's effect with its interval."
    if math.isnan(r.effect):
        return ""
    return (
        f"{r.effect:+.3g}"
        + ("" if math.isnan(r.low) else f" [{r.low:.3g}, {r.high:.3g}], {r.degrees_of_freedom} df")
        + f", {r.seeds} seed{'s' if r.seeds != 1 else ''}"
    )


def decide_text(r) -> str:
    "What would decide a claim, in one line."
    if not r.command:
        return r.needs
    seeds = (
        "more than 200 seeds"
        if r.decide_seeds is None or math.isnan(r.decide_seeds)
        else f"{r.decide_seeds:.0f} seeds"
    )
    return f"{seeds} x {r.decide_steps:,.0f} steps, {r.decide_runs:.0f} runs of protocol {r.decide_protocol}, {duration(r.decide_hours)}"


def claims_html(frame, ev: Evidence) -> str:
    "The table of all claims: one row per claim and protocol."
    rows, seen = [], set()
    for r in frame.itertuples():
        mark = f' id="claim-{r.id}"' if r.id not in seen else ""
        seen.add(r.id)
        kind = r.verdict.replace(" ", "-")
        said = f'<span class="badge {kind}">{r.verdict}</span>' + (
            ' <span class="badge exploratory">exploratory</span>' if r.exploratory else ""
        )
        plan = (
            html.escape(decide_text(r))
            if not r.command
            else fold(
                html.escape(decide_text(r)),
                f"<p>{html.escape(r.basis)}.</p><pre>{html.escape(r.command)}</pre>",
            )
        )
        said += "<br>" + "<br>".join(
            f"<small>{w}</small>"
            for w in (r.protocol and f"protocol {r.protocol}", effect_text(r))
            if w
        )
        rows.append(
            f'<tr{mark}><td>{r.id}</td><td class="text">{html.escape(r.claim)}<br><small>{html.escape(f"{r.paper}, {r.source}")}{html.escape("; " + r.papers_numbers) if r.papers_numbers else ""}</small></td>'
            f'<td>{said}</td><td class="text"><small>{html.escape(r.reason)}</small></td><td>{run_links(r.runs.split(), ev)}</td><td class="text">{plan}</td></tr>'
        )
    head = "".join(
        f"<th>{h}</th>"
        for h in ("", "claim", "verdict, effect (log)", "reason", "runs", "what would decide it")
    )
    return box(f"<tr>{head}</tr>", rows, "tall")


def summary_frame(cells, filled: dict):
    "Cells by kind: how many, how many have something of ours, under which protocol."
    import pandas as pd

    rows = []
    for k, words in KINDS.items():
        mine = cells[cells.kind == k]
        have = {p: sum(p in filled.get(i, {}) for i in mine.cell) for p in ORDER}
        free = (
            sum(bool(counted(c)) for c in mine.itertuples()) if k in ("computed", "setting") else 0
        )
        rows.append(
            dict(
                kind=k,
                meaning=words,
                cells=len(mine),
                counted_or_set=free,
                **{f"run at {p}": n for p, n in have.items()},
                not_run=len(mine) - free - sum(i in filled for i in mine.cell)
                if k in OURS
                else None,
            )
        )
    return pd.DataFrame(rows)


def summary_lines(ev: Evidence, kinds, claims) -> list:
    "What was reproduced, under which protocol, on which machine, and what was not; one sentence each."
    n = lambda k, c: int(kinds.loc[kinds.kind == k, c].sum())
    lines, r = [], kinds.set_index("kind")
    lines.append(
        f"The record holds {int(kinds.cells.sum()):,} numbers. {n('computed', 'cells')} of them are counted from an architecture, {n('setting', 'cells')} are settings, of which {n('setting', 'counted_or_set')} stand in our configurations; "
        f"{n('reproducible', 'cells')} need training runs, {n('statement', 'cells')} are findings in words. The other {int(r.drop(['computed', 'setting', 'reproducible', 'statement']).cells.sum())} belong to other methods and models, to parts that are taken, and to the paper's machines."
    )
    for p in ORDER:
        mine = [x for x in ev.runs if x["experiment"].protocol == p]
        have = n("reproducible", f"run at {p}") + n("statement", f"run at {p}")
        if not mine:
            lines.append(
                f"Protocol {p}: not run. The command is: uvit-repro run all --protocol {p}"
            )
            continue
        seeds, variants = (
            sorted({x["experiment"].seed for x in mine}),
            {variant_name(x["experiment"].model) for x in mine},
        )
        where, here = (
            ", ".join(dict.fromkeys(machine(x) for x in mine)),
            sum(x["origin"] == "runs" for x in mine),
        )
        made = " and ".join(
            f"{k} {w}"
            for k, w in ((here, "made here"), (len(mine) - here, "published by another session"))
            if k
        )
        lines.append(
            f"Protocol {p}: {len(mine)} runs ({made}), {len(variants)} variants, seeds {', '.join(map(str, seeds))}, on {where}. They stand in {have} cells of the paper"
            + (
                ""
                if p == "paper"
                else f", as numbers of protocol {p}, which are not comparable with the paper's"
            )
            + "."
        )
    for p, g in claims.groupby("protocol", sort=False):
        said = g.verdict.value_counts()
        parts = [f"{said[v]} {v}" for v in VERDICTS if v in said]
        lines.append(
            (f"Claims at protocol {p}: " if p else "Claims that no run of ours decides: ")
            + ", ".join(parts)
            + (
                f"; {int(g.exploratory.sum())} exploratory, from runs that were seen before the tests were fixed"
                if g.exploratory.any()
                else ""
            )
            + "."
        )
    return lines


SEEN = {
    "seed": ("t", "the paper's text"),
    "arXiv": ("t", "the paper's text"),
    "official": ("o", "the authors' repository"),
    "secondary": ("s", "a copy or a quotation by others"),
    "computed": ("c", "arithmetic on the published layers"),
    "memory": ("m", "recalled, not found again"),
}


def seen_in(
    provenance: str,  # of a row of the record
) -> str:  # a letter
    "Where a number was seen, as a letter."
    return SEEN[re.match(r"\w+", provenance)[0]][0]


def legend() -> str:
    "What the marks of the tables mean."
    words = dict(SEEN.values())
    letters = ", ".join(f'<span class="v p-{k}">{w}</span>' for k, w in words.items())
    return (
        f'<p class="legend">Seen in: {letters}. Confidence: <span class="v">high</span>, <span class="v medium">medium</span>, <span class="v low">low</span> (kept so that it is recognised, no target). '
        '<span class="v quoted">Another method\'s number, quoted by the paper</span>. Hold the pointer on a number for its condition and source; the CSV files have both in columns.</p>'
    )


TITLES = {
    "Table 1": "FID of image generation",
    "Table 2": "the models",
    "Table 2 (exact)": "the models, counted for each data set",
    "Table 3": "FID against sampling steps",
    "Table 4": "text to image on MS-COCO",
    "Table 5": "settings",
    "Table 6": "devices and time of training",
    "Table 7": "ImageNet, all measures",
    "Figure 2a": "the long skip",
    "Figure 2b": "time",
    "Figure 2c": "the extra convolution",
    "Figure 2d": "patch embedding",
    "Figure 2e": "position embedding",
    "Figure 2a (cost)": "parameters without skips",
    "Figure 3": "depth, width, patch size",
    "Figure 3 (cost)": "their parameters and operations",
    "Figure 5": "the long skip on ImageNet",
    "Figure 7": "similarity of representations",
    "Figure 8": "U-ViT against U-Net during training",
    "Appendix A": "time and memory",
    "Appendix B": "the U-Net of the comparison",
    "Appendix E": "U-ViT against U-Net",
    "README": "the authors' repository",
    "External": "measured by others",
    "Section 3.1": "no position embedding",
    "Section 5.1": "data and settings",
}


def places(
    cells,
) -> list:  # (paper, place), tables first, then figures, then the rest, other papers last
    "The tables and figures in the order in which a reader looks for them."
    rank = lambda k: (
        k[0] != "U-ViT",
        k[0],
        not k[1].startswith("Table"),
        not k[1].startswith("Figure"),
        [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", k[1])],
    )
    return sorted(dict.fromkeys(zip(cells.paper, cells.place)), key=rank)


def anchor(paper: str, place: str) -> str:
    "The name of a place in links, in file names and for `uvit-repro run`."
    return slug(("" if paper == "U-ViT" else paper + " ") + place)


def is_entry(c) -> bool:
    "Whether a cell is an entry of a matrix of Figure 7."
    return bool(re.fullmatch(r"cka_\d+_\d+", c.column))


def names_of(
    c, curve: bool, flip: bool
) -> tuple:  # (row, column, whether it must share the row of its condition)
    "The row and the column of a cell."
    what = c.column + (f", {c.condition}" if c.condition in PARTS else "")
    who = f"{c.dataset}, {c.row}" if c.dataset and c.row else c.dataset or c.row
    if curve:
        return f"{c.step // 1000}K iterations", c.row
    return (what, who) if flip else (who, what)


def arrange(
    cells,  # of one place, without the entries of matrices
) -> tuple:  # (columns, [(row, {column: cell})], whether methods are columns)
    "One slot for each cell."
    curve = (
        cells.place.iloc[0] != "Figure 3"
        and cells.step.notna().all()
        and cells.column.nunique() == 1
        and len(cells) > 10
    )
    flip = (
        not curve
        and cells.column.nunique() > 8
        and cells.column.nunique() > len(set(zip(cells.dataset, cells.row)))
    )
    columns, rows = {}, []
    for c in cells.itertuples():
        name, col = names_of(c, curve, flip)
        columns.setdefault(col)
        mine = [r for n, r in rows if n == name and col not in r]
        same = [r for r in mine if c.condition in {x.condition for x in r.values()}]
        often = (
            sum(names_of(x, curve, flip)[:2] == (name, col) for x in cells.itertuples()) > 1
            if mine and not same
            else False
        )
        if same or (mine and not often):
            (same or mine)[0][col] = c
        else:
            rows.append((name, {col: c}))
    if curve:
        rows.sort(key=lambda r: int(r[0].split("K")[0]))
    return list(columns), rows, curve or flip


def ours_html(c, protocol: str, filled: dict, link) -> tuple:  # (text with links, class)
    "Our value for a cell at one protocol."
    runs = filled.get(c.cell, {}).get(protocol)
    if runs:
        return " &rarr; ".join(
            ", ".join(f'<a href="{link(h["run_id"])}">{h["value"]:.4g}</a>' for h in g)
            for g in runs
        ), "o"
    if protocol == "paper" and (v := counted(c)):
        return html.escape(v), "o counted"
    return (
        ("not run", "o none") if c.kind in OURS and c.kind != "setting" else ("&ndash;", "o none")
    )


def paper_html(c) -> str:
    "The paper's value in the cell of its own."
    marks = " ".join(
        [
            "v",
            f"p-{seen_in(c.provenance)}",
            *([c.confidence] if c.confidence != "high" else []),
            *(["quoted"] if c.kind == "quoted" else []),
        ]
    )
    tip = html.escape(
        "; ".join(
            filter(None, [c.condition, f"seen in: {c.provenance}", f"confidence {c.confidence}"])
        )
    )
    return f'<td id="cell-{c.cell}" class="{marks}" title="{tip}">{html.escape(c.value)}</td>'


def how_html(group) -> str:
    "How the cells of a row (or of a column, where methods are columns) are obtained: commands or reasons, each once."
    open_, words = [c for c in group if c.kind in MEASURED and c.fields], []
    for c in group:
        why = (
            c.reason or ("" if c.kind in MEASURED else KINDS[c.kind])
            if c.kind != "computed"
            else ""
        )
        if why and why not in words:
            words.append(why)
    commands = list(
        dict.fromkeys(repeat_command(e) for c in open_ for e in cell_experiments(c, "paper"))
    )
    text = html.escape("; ".join(words))
    return (
        text
        if not commands
        else fold(text or "command", "<pre>" + html.escape("\n".join(commands)) + "</pre>")
    )


def heads(columns: list, rows: list, filled: dict) -> dict:
    "For each column the protocols that have a place in it."
    out = {}
    for col in columns:
        mine = [r[col] for _, r in rows if col in r]
        out[col] = [
            p
            for p in ORDER
            if (p == "paper" and any(c.kind in OURS for c in mine))
            or any(p in filled.get(c.cell, {}) for c in mine)
        ]
    return out


def measure_name(col_cells: list, protocol: str) -> str:
    "What stands in a column of ours: where it is no FID, its own name."
    if protocol == "paper":
        return "ours"
    kinds = {
        main_metric(PROTOCOLS[protocol]) if c.measure == "fid" else c.measure for c in col_cells
    }
    return f"{protocol}: {' '.join(sorted(kinds))}" if len(kinds) == 1 else f"ours, {protocol}"


def place_table(cells, filled: dict, ev: Evidence) -> str:
    "The table of one place."
    columns, rows, flipped = arrange(cells)
    shown = heads(columns, rows, filled)
    of = {col: [r[col] for _, r in rows if col in r] for col in columns}
    top = "".join(
        f'<th colspan="{1 + len(shown[c])}" class="group">{html.escape(c)}</th>' for c in columns
    )
    sub = "".join(
        '<th class="first">paper</th>'
        + "".join(
            f"<th>{html.escape(measure_name([x for x in of[c] if p in filled.get(x.cell, {})], p))}</th>"
            for p in shown[c]
        )
        for c in columns
    )
    names, conditions = (
        [n for n, _ in rows],
        [
            ", ".join(
                dict.fromkeys(
                    c.condition for c in r.values() if c.condition and c.condition not in PARTS
                )
            )
            for _, r in rows
        ],
    )
    told, how, last, out = any(names.count(n) > 1 for n in names), not flipped, None, []
    for (name, r), when in zip(rows, conditions):
        body = "".join(
            (
                paper_html(r[c])
                + "".join(
                    '<td id="ours-{}{}" class="{}">{}</td>'.format(
                        "" if p == "paper" else p + "-",
                        r[c].cell,
                        *ours_html(r[c], p, filled, ev.link)[::-1],
                    )
                    for p in shown[c]
                )
            )
            if c in r
            else f'<td colspan="{1 + len(shown[c])}" class="empty"></td>'
            for c in columns
        )
        why = how_html(list(r.values())) if how else ""
        out.append(
            f"<tr><th>{html.escape(name)}</th>"
            + (
                f'<td class="text"><small>{html.escape(when if names.count(name) > 1 else "")}</small></td>'
                if told
                else ""
            )
            + body
            + (f'<td class="text"><small>{why if why != last else ""}</small></td>' if how else "")
            + "</tr>"
        )
        last = why
    head = (
        '<tr><th rowspan="2"></th>'
        + ('<th rowspan="2">condition</th>' if told else "")
        + top
        + ('<th rowspan="2">how, or why not</th>' if how else "")
        + f"</tr><tr>{sub}</tr>"
    )
    each = {} if how else {c: w for c in columns if (w := how_html(of[c]))}
    lines = (
        list(each.values())[:1]
        if len(each) == len(columns) and len(set(each.values())) == 1
        else [f"<b>{html.escape(c)}</b>: {w}" for c, w in each.items()]
    )
    return box(head, out, "cells") + (
        '<ul class="how">' + "".join(f"<li>{l}</li>" for l in lines) + "</ul>" if lines else ""
    )


def matrix_table(cells, name: str, filled: dict, ev: Evidence, protocol: str = None) -> str:
    "A matrix of Figure 7: the paper's cells, or ours at a protocol."
    at = {tuple(map(int, re.findall(r"\d+", c.column))): c for c in cells.itertuples()}
    n = 1 + max(i for i, _ in at)

    def td(c):
        if protocol is None:
            return f'<td id="cell-{c.cell}" class="{"v" if c.confidence == "high" else f"v {c.confidence}"}">{html.escape(c.value)}</td>'
        return '<td id="ours-{}-{}" class="{}">{}</td>'.format(
            protocol, c.cell, *ours_html(c, protocol, filled, ev.link)[::-1]
        )

    rows = [
        f"<tr><th>{i}</th>" + "".join(td(at[i, j]) for j in range(n)) + "</tr>" for i in range(n)
    ]
    who = (
        "paper, read off the heat map (+-0.02)"
        if protocol is None
        else f"ours, protocol {protocol}"
    )
    return fold(
        f"{html.escape(name)}: {who}",
        box(
            "<tr><th></th>" + "".join(f"<th>{j}</th>" for j in range(n)) + "</tr>",
            rows,
            "cells matrix",
        ),
    )


def place_frame(cells, filled: dict):
    "A place as data: one row per cell, ours apart."
    import pandas as pd

    text = lambda runs: " -> ".join(", ".join(f"{h['value']:.6g}" for h in g) for g in runs)
    rows = []
    for c in cells.itertuples():
        at = filled.get(c.cell, {})
        own = counted(c)
        rows.append(
            dict(
                cell=c.cell,
                dataset=c.dataset,
                row=c.row,
                column=c.column,
                condition=c.condition,
                paper=c.value,
                confidence=c.confidence,
                provenance=c.provenance,
                kind=c.kind,
                ours=text(at["paper"])
                if "paper" in at
                else own or ("not run" if c.kind in OURS and c.kind != "setting" else ""),
                **{f"ours_{p}": text(at[p]) if p in at else "" for p in ORDER[1:]},
                measure=c.measure,
                runs=" ".join(
                    dict.fromkeys(h["run_id"] for g in at.values() for x in g for h in x)
                ),
                reason=c.reason,
            )
        )
    return pd.DataFrame(rows)


@functools.lru_cache(None)
def place_cost(what: str) -> tuple:  # (commands, GPU-hours, name of the GPU)
    "What the runs behind a place would cost at protocol paper."
    name, rate = paper_gpu()
    todo, trained, total = jobs(what, "paper"), set(), 0.0
    for j in todo:
        total += (
            sum(
                n
                for k, n in experiment_flops(j.exp).items()
                if k != "train" or j.exp.run_id not in trained
            )
            / rate
        )
        trained.add(j.exp.run_id)
    return len(todo), total / 3600, name


def place_head(cells, filled: dict) -> str:
    "One sentence about a place: its cells, what there is of ours, the command for all of it and its cost."
    kinds = cells.kind.value_counts()
    what = anchor(cells.paper.iloc[0], cells.place.iloc[0])
    words = [
        f"{len(cells)} number{'s' if len(cells) > 1 else ''}: "
        + ", ".join(f"{kinds[k]} {k}" for k in KINDS if k in kinds)
    ]
    runnable = sum(bool(c.fields) and c.kind in MEASURED for c in cells.itertuples())
    if runnable:
        for p in ORDER:
            if n := sum(p in filled.get(i, {}) for i in cells.cell):
                words.append(f"{n} of {runnable} have runs of protocol {p}")
        n, h, name = place_cost(what)
        words.append(
            f"all of it: <code>uvit-repro run {what} --protocol paper</code>, {n} runs, about {hours(3600 * h)} on one {name.partition(',')[0]}"
        )
    return f"<p>{'; '.join(words)}.</p>"


def place_html(cells, filled: dict, ev: Evidence, target: Path) -> str:
    "The subsection of a table or figure. Its data are kept as CSV."
    paper, place = cells.paper.iloc[0], cells.place.iloc[0]
    name = anchor(paper, place)
    place_frame(cells, filled).to_csv(target / f"{name}.csv", index=False)
    entry = [is_entry(c) for c in cells.itertuples()]
    plain, matrices = cells[[not e for e in entry]], cells[entry]
    title = (f"{paper}, {place}" if paper != "U-ViT" else place) + (
        f": {TITLES[place]}" if paper == "U-ViT" and place in TITLES else ""
    )
    body = place_table(plain, filled, ev)
    for setting, m in matrices.groupby("row", sort=False) if len(matrices) else ():
        body += matrix_table(m, setting, filled, ev) + "".join(
            matrix_table(m, setting, filled, ev, p)
            for p in ev.protocols
            if any(p in filled.get(i, {}) for i in m.cell)
        )
    if paper == "U-ViT" and place.startswith("Figure") and len(plain) > 12:
        body = fold("the numbers", body)
    return (
        f'<h3 id="{name}">{html.escape(title)}</h3>'
        + place_head(cells, filled)
        + body
        + beside(target, f"{name}.csv")
    )


def figure2_points(results, protocol: str):
    "What the five panels of Figure 2 show: the paper's points and ours."
    import pandas as pd

    base = PROTOCOLS[protocol]
    theirs = (
        figure2()[["panel", "variant", "steps", "fid"]]
        .rename(columns={"steps": "step", "fid": "value"})
        .assign(who="paper", measure="FID, 10K samples")
    )
    if not len(results):
        return theirs
    r = results[(results.metric == main_metric(base)) & (results.status == "ok")]
    return pd.concat(
        [
            theirs,
            pd.DataFrame(
                {
                    "panel": r.panel,
                    "variant": r.label,
                    "step": r.step,
                    "value": r.value,
                    "who": f"ours, {protocol}",
                    "measure": r.metric,
                    "seed": r.seed,
                    "run_id": r.run_id,
                }
            ),
        ],
        ignore_index=True,
    )


def plot_cells(cells, filled: dict, ylabel: str):
    "A curve of the record: the paper's points dashed, ours at protocol paper solid where there are any."
    import matplotlib.pyplot as plt
    import seaborn as sns

    fig, ax = plt.subplots(figsize=(7, 3.6))
    run = False
    for (name, g), colour in zip(cells.groupby("row", sort=False), sns.color_palette("colorblind")):
        g = g.sort_values("step")
        ax.plot(
            [int(s) for s in g.step], g.number, "--o", ms=3.5, color=colour, label=f"{name}: paper"
        )
        pts = [
            (int(c.step), h["value"])
            for c in g.itertuples()
            for runs in filled.get(c.cell, {}).get("paper", [])
            for h in runs
        ]
        if pts:
            ax.plot(*zip(*pts), "s", ms=5, color=colour, label=f"{name}: ours")
            run = True
    ax.set(xlabel="iterations", ylabel=ylabel, yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.xaxis.set_major_formatter(lambda v, _: f"{v / 1000:g}K")
    ax.legend(fontsize=9, frameon=False, title="" if run else "ours: not run")
    return fig


def cka_rows(ev: Evidence) -> tuple:  # (rows of (title, matrix), labels)
    "The matrices of Figure 7, and below them ours of each protocol, seed by seed, where chapter 09 recorded them."
    from uvit_repro.cka import SETTINGS, matrix_of, recorded, with_kept

    rows, names = [[(f"{s}: paper", figure7(s).values) for s in SETTINGS]], ["the paper"]
    for p in ev.protocols:
        kept = [
            r
            for r in with_kept(recorded(PROTOCOLS[p], ev.out_dir, ev.origin))
            if r["folder"].name in ev.folders
            and "all" in r["cka"]["tokens"]
            and None in r["cka"]["levels"]
        ]
        for s in sorted({r["seed"] for r in kept}):
            of = {r["setting"]: matrix_of(r["cka"]) for r in kept if r["seed"] == s}
            rows.append([(f"{n}: {p}, seed {s}", of.get(n)) for n in SETTINGS])
            names.append(f"ours, {p}")
    return rows, names


def draw_place(
    place: str,  # of the U-ViT record
    cells,
    filled: dict,
    ev: Evidence,
) -> list:  # (name, figure, data), drawn when asked for
    "The pictures that belong above a place's table."
    import pandas as pd

    from uvit_repro.ablations import collect, plot_figure2
    from uvit_repro.cka import plot_cka
    from uvit_repro.scaling import collect_figure3, figure3_paper, plot_figure3

    def fig2(p):
        r = collect(p, origin=ev.origin, out_dir=ev.out_dir)
        r = r[r.run_id.isin(list(ev.folders))]
        fig = plot_figure2(r, main_metric(PROTOCOLS[p]), PROTOCOLS[p])
        fig.suptitle(f"Figure 2: paper (dashed) and protocol {p} (solid)", y=1.005)
        return f"figure2_{p}", fig, figure2_points(r, p)

    def fig3(p):
        r = collect_figure3(p, origin=ev.origin, out_dir=ev.out_dir)
        r = r[r.run_id.isin(list(ev.folders))]
        return (
            f"figure3_{p}",
            plot_figure3(r, main_metric(PROTOCOLS[p]), p),
            pd.concat(
                [figure3_paper().assign(who="paper"), r.assign(who=f"ours, {p}")], ignore_index=True
            ),
        )

    if place == "Figure 2a":
        return [functools.partial(fig2, p) for p in ev.protocols or ("paper",)]
    if place == "Figure 3":
        return [functools.partial(fig3, p) for p in ev.protocols or ("paper",)]
    if place == "Figure 5":
        return [
            lambda: (
                "figure5",
                plot_cells(cells, filled, "FID, 10K samples, no guidance"),
                place_frame(cells, filled),
            )
        ]
    if place == "Figure 7":
        rows, names = cka_rows(ev)
        long = [
            {"panel": t, "layer": i, "other": j, "cka": m[i, j]}
            for r in rows
            for t, m in r
            if m is not None
            for i in range(len(m))
            for j in range(len(m))
        ]
        return [lambda: ("figure7", plot_cka(rows, labels=names), pd.DataFrame(long))]
    return []


MEASURES = (
    "heldout_loss",
    "class_agreement",
    "class_entropy",
    "nn_train_median",
    "nn_heldout_median",
    "nn_close",
)


def adopted(exp) -> bool:
    "Whether a run is the adopted model of its protocol, whatever its seed."
    return replace(exp, seed=PROTOCOLS[exp.protocol].seed).run_id == PROTOCOLS[exp.protocol].run_id


def headline_frame(results, protocol: str):
    "Measures of the adopted model at its last step, one column per seed."
    import pandas as pd

    base = PROTOCOLS[protocol]
    main = main_metric(base)
    r = (
        results[
            (results.variant == "adopted")
            & (results.step == base.train.n_steps)
            & (results.status == "ok")
        ].drop_duplicates(["run_id", "eval_id", "metric"])
        if len(results)
        else results
    )
    names = {
        main: f"{main}: samples against held-out images",
        main.replace("_test", "_real"): f"{main}: as many training images",
        **{m: m for m in MEASURES},
    }
    rows = (
        [
            dict(
                measure=text,
                samples=int(g.num_samples.max()),
                **{f"seed {s}": float(v) for s, v in zip(g.seed, g.value)},
            )
            for m, text in names.items()
            if len(g := r[r.metric == m])
        ]
        if len(r)
        else []
    )
    return pd.DataFrame(rows)


def plot_pairs(run: dict, k: int = 20):
    "The first samples of a run and their nearest training images, in pairs of rows of ten."
    import matplotlib.pyplot as plt

    from uvit_repro.data.images import image_grid

    with np.load(run["folder"] / "first.npz") as d:
        first = dict(d)
    if "nearest" not in first:
        return None
    k = min(k, len(first["images"]))
    w = min(10, k)
    rows = [
        x[i : i + w] for i in range(0, k - k % w, w) for x in (first["images"], first["nearest"])
    ]
    fig, ax = plt.subplots(figsize=(8, 0.85 * len(rows)))
    ax.imshow(image_grid(np.concatenate(rows), w))
    ax.set(
        xticks=[],
        yticks=[],
        title=f"{run['folder'].name}",
        xlabel=f"median distance to the nearest training image {np.median(first['distance']):.2f}",
    )
    ax.title.set_fontsize(9)
    return fig


def backbones(ev: Evidence, protocol: str):
    "What the recorded contenders of chapter 12b measured."
    from uvit_repro.comparison import collect_comparison, recorded_comparison

    return collect_comparison(recorded_comparison(ev.runs, protocol), ev.origin, ev.out_dir)


def backbones_table(df, metrics: list):
    "One row per backbone: cost, and every seed's measures."
    import pandas as pd

    rows = []
    for n, g in df.groupby("backbone", sort=False):
        row = {
            "backbone": n,
            "parameters": int(g.parameters.iloc[0]),
            "multiply-accumulates": int(g.macs.iloc[0]),
        }
        for m in metrics:
            row[m] = ", ".join(f"{v:.4g}" for v in g[g.metric == m].sort_values("seed").value)
        rows.append({**row, "seeds": g.seed.nunique()})
    return pd.DataFrame(rows)


def backbones_figure(df, protocol: str):
    "Quality against cost."
    from uvit_repro.comparison import plot_comparison

    return plot_comparison(
        df, main_metric(PROTOCOLS[protocol]), f"equal parameters, protocol {protocol}"
    )


TOYS = {
    "digits_latents": "07_imagenet",
    "shapes": "08_mscoco",
}  # data set: the chapter that trains on it


def toy_frame(ev: Evidence, dataset: str):
    "Measures at the end of every run on a data set, one row per run and sampling."
    import pandas as pd

    rows = []
    for r in ev.runs:
        e = r["experiment"]
        if e.data.dataset != dataset:
            continue
        df = ev.results[
            (ev.results.run_id == r["folder"].name)
            & (ev.results.step == e.train.n_steps)
            & (ev.results.status == "ok")
        ]
        for eid, g in df.groupby("eval_id", sort=False):
            at = g.iloc[0]
            known = g.drop_duplicates("metric").set_index("metric").value
            if at.sampler and at.sampler == at.sampler:
                rows.append(
                    dict(
                        seed=e.seed,
                        steps=e.train.n_steps,
                        sampler=f"{at.sampler} {int(at.nfe)}",
                        guidance=at.cfg_scale,
                        samples=int(g.num_samples.max()),
                        **{
                            m: float(v)
                            for m, v in known.items()
                            if not m.startswith(("nn_", "memorized", "patch_seam"))
                        },
                        run=r["folder"].name,
                    )
                )
    return pd.DataFrame(rows)


BENCH = "uvit-repro bench --targets --peer ~/U-ViT"


def ceiling_lines(
    bench,  # of `load_bench`
    ev: Evidence,
) -> list:  # HTML, one line per machine
    "What each machine that was timed can do at all, and where that is recorded."
    lines = []
    for folder, g in bench[bench.what == "machine"].groupby("folder"):
        rate = [
            f"{r.value / 1e12:.3g} TFLOP/s {r.precision}"
            if r.metric == "matrix_rate"
            else f"{r.value / 1e9:.3g} GB/s"
            for r in g.itertuples()
        ]
        where = Path(os.path.relpath(Path(folder) / "bench.json", ev.page)).as_posix()
        lines.append(
            f'{html.escape(g.machine.iloc[0])}: {", ".join(rate)} (<a href="{where}">{Path(folder).name}</a>)'
        )
    return lines


def conditions_frame(runs: list):
    "One row per run: protocol, seed, machine, precision, code, time."
    import pandas as pd

    rows = []
    for r in runs:
        c, e, t = r.get("conditions", {}), r["experiment"], r.get("training", {})
        rows.append(
            {
                "run": r["folder"].name,
                "where": "here" if r["origin"] == "runs" else "published",
                "protocol": e.protocol,
                "variant": variant_name(e.model),
                "seed": e.seed,
                "precision": e.train.precision,
                "steps": e.train.n_steps,
                "machine": machine(r),
                "threads": c.get("threads"),
                "code": (c.get("commit") or "")[:8] + ("+changes" if c.get("dirty") else ""),
                "images_per_s": t.get("images_per_second"),
                "minutes": r.get("wall_seconds", 0) / 60,
            }
        )
    return pd.DataFrame(
        rows,
        columns=[
            "run",
            "where",
            "protocol",
            "variant",
            "seed",
            "precision",
            "steps",
            "machine",
            "threads",
            "code",
            "images_per_s",
            "minutes",
        ],
    )


def disagreements():  # DataFrame: subject, one, other, here, provenance, confidence
    "Where the paper, its code and notes about them disagree."
    return read_table("disagreements.csv")


def provenance_frame(cells):
    "The record by where its numbers were seen and how far to trust them."
    import pandas as pd

    words = dict(SEEN.values())
    d = cells.assign(seen=[words[seen_in(p)] for p in cells.provenance])
    t = pd.crosstab(d.seen, d.confidence).reindex(columns=["high", "medium", "low"], fill_value=0)
    return t.assign(all=t.sum(axis=1)).reset_index().rename_axis(columns=None)


def chapter_list() -> list:  # dicts name, title, line
    "The executed copies of the other chapters that are there, with their titles and first quoted lines."
    out = []
    for p in sorted((published_root() / "chapters").glob("[0-9]*.ipynb")):
        if p.stem.startswith("99"):
            continue
        text = "".join(json.loads(p.read_text())["cells"][0]["source"])
        out.append(
            {
                "name": p.stem,
                "title": re.search(r"^# (.*)", text, re.M)[1],
                "line": (re.search(r"^> (.*)", text, re.M) or ["", ""])[1],
            }
        )
    return out


STYLE = """body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1d232b;margin:0;background:#fff}main{max-width:1080px;padding:1rem 1.2rem 4rem;margin:0 auto;min-width:0}
h1{font-size:1.9rem;margin:.6em 0 .2em}h2{font-size:1.4rem;margin:2.4em 0 .5em;border-bottom:1px solid #d9dee5;padding-bottom:.25em}h3{font-size:1.08rem;margin:2em 0 .3em}a{color:#1b5faa}a.anchor-link{display:none}h2,h3,tr[id],td[id]{scroll-margin-top:.8rem}
blockquote{margin:.5em 0 1em;padding:.1em 1em;border-left:4px solid #1b5faa;color:#414b57}p,li{overflow-wrap:anywhere}
nav{font-size:.87rem;padding:.8rem 1.2rem}nav ul{list-style:none;margin:.2em 0;padding:0}nav ul ul{padding-left:.9em;font-size:.95em}nav a{text-decoration:none;display:block;padding:.1em 0}nav a:hover{text-decoration:underline}nav summary{font-weight:600}
@media(min-width:1100px){body{display:grid;grid-template-columns:250px minmax(0,1fr)}nav{position:sticky;top:0;height:100vh;overflow-y:auto;box-sizing:border-box;background:#f7f9fb;border-right:1px solid #e6e9ee}main{margin:0 auto;width:100%;box-sizing:border-box}}
.scroll{overflow:auto;max-height:34rem;margin:.7em 0;border:1px solid #e6e9ee;border-radius:4px}table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums;width:max-content;min-width:100%}th,td{padding:.3em .7em;text-align:left;border-bottom:1px solid #edf0f3;vertical-align:top;white-space:nowrap}
thead th{background:#f4f6f8;font-weight:600;position:sticky;top:0;z-index:1}.cells thead tr+tr th{top:1.95em}tbody th{font-weight:400;text-align:left}tbody tr:hover{background:#f8fafc}tr:target,td:target{background:#fff4c9}:not(.scroll)>table{width:auto;min-width:0;max-width:100%;display:block;overflow-x:auto}.scroll:has(>.tall){max-height:48rem}
.cells th.group{border-left:2px solid #d9dee5}.cells .first,.cells td.v{border-left:2px solid #e6e9ee}.cells .empty{background:#fafbfc;border-left:2px solid #e6e9ee}.o{background:#f2f8f2}.o.none{background:none;color:#8a94a0}.o.counted{background:#f3f6fb}.matrix td,.matrix th{padding:.15em .4em}
.v.medium{color:#6b5a1e}.v.low{color:#a33;text-decoration:line-through dotted}.v.quoted{font-style:italic;color:#5b6672}.v::after{font-size:.68em;vertical-align:super;color:#97a1ad;margin-left:.25em;font-style:normal;display:inline-block;text-decoration:none}.p-t::after{content:"t"}.p-o::after{content:"o"}.p-s::after{content:"s"}.p-c::after{content:"c"}.p-m::after{content:"m"}
.text{white-space:normal;min-width:14rem;max-width:30rem}.words td{white-space:normal;min-width:9rem;max-width:20rem}.files,.legend{font-size:.83rem;color:#5b6672;margin:.2em 0 1em}.how{font-size:.84rem;color:#414b57}
.badge{display:inline-block;padding:.05em .55em;border-radius:1em;font-size:.8rem;background:#e9edf1;color:#333}.supported{background:#d5efd9;color:#14532d}.contradicted{background:#f8d7d7;color:#7f1d1d}.same-direction{background:#e4f3e6;color:#14532d}.opposite-direction{background:#fbe8e0;color:#7c2d12}.undecided{background:#fdf3d1;color:#6b4d00}.not-run{background:#eef0f3;color:#6b7480}.exploratory{border:1px dashed #97a1ad;background:none;color:#5b6672}
summary{cursor:pointer;color:#414b57}details>summary{margin:.15em 0}code{font:.84em ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}pre{white-space:pre-wrap;overflow-wrap:anywhere;font:.8rem/1.45 ui-monospace,Menlo,Consolas,monospace;margin:.5em 0;color:#414b57}
img{max-width:100%;height:auto}.jp-OutputPrompt,.jp-InputPrompt,.prompt{display:none}.highlight{background:#f7f9fb;border:1px solid #e6e9ee;border-radius:4px;padding:.1em .8em;margin:.6em 0;overflow-x:auto}.highlight pre{color:#1d232b}
.tall{width:100%}.tall .text{min-width:10rem}
@media(max-width:600px){main{padding:.4rem .7rem 3rem}body{font-size:15px}h1{font-size:1.5rem}.text{min-width:11rem}.scroll{max-height:28rem}}"""


def contents(body: str, back="") -> str:
    "The table of contents of a page, from its headings with a name."
    out, under = [], False
    for level, name, text in re.findall(
        r'<h([23]) id="([^"]+)"[^>]*>(.*?)<(?:/h|a class="anchor)', body, re.S
    ):
        link = f'<li><a href="#{name}">{re.sub("<[^>]+>", "", text).strip()}</a>'
        if level == "3" and not under:
            out.append("<ul>")
        if level == "2" and under:
            out.append("</ul>")
        under = level == "3"
        out.append(link)
    return f'<nav>{back}<details open><summary>Contents</summary><ul>{"".join(out)}{"</ul>" if under else ""}</ul></details></nav><script>if(innerWidth<1100)document.querySelector("nav details").open=false</script>'


def to_html(
    notebook: Path,  # an executed chapter
    out: Path,  # the page
    code=False,  # show the code cells too
    back="",  # HTML above the table of contents
    note="",  # kept in the page, not shown
) -> Path:  # the page
    "Render an executed notebook as one self-contained page; links between chapters point to pages."
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.filters import Highlight2HTML

    nb = nbformat.read(notebook, 4)
    if not code:
        nb.cells = [
            c
            for c in nb.cells
            if "library" not in c.metadata.get("tags", [])
            and (c.cell_type == "markdown" or c.outputs)
        ]
    for c in nb.cells:
        c.source = "\n".join(l for l in c.source.splitlines() if not l.startswith("#|"))
        if c.cell_type == "code":
            c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
    nb.cells = [c for c in nb.cells if c.source.strip() or c.get("outputs")]
    parts, highlight = [], Highlight2HTML(pygments_lexer="python")

    def part(text):
        parts.append("".join(text))
        return f"<i>part {len(parts) - 1}</i>"  # tables and code as they are: parsing them takes longer than making them

    for o in (
        o for c in nb.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})
    ):
        o.data["text/html"] = part(o.data["text/html"])
    body, _ = HTMLExporter(
        template_name="basic",
        exclude_input=not code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"highlight_code": lambda source, **kw: part(highlight(source))},
    ).from_notebook_node(nb)
    body = re.sub(r"<i>part (\d+)</i>", lambda m: parts[int(m[1])], body)
    body = re.sub(r'(href="[^":]+)\.ipynb', r"\1.html", body)
    title = html.escape(
        re.sub(
            r"^#\s*",
            "",
            next(
                (c.source.splitlines()[0] for c in nb.cells if c.cell_type == "markdown"), "Report"
            ),
        )
    )
    style = STYLE + (highlight_style() if code else "")
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>uvit_repro: {title}</title><style>{style}</style></head><body>{contents(body, back)}<main>{body}</main></body></html>{note}'
    return write_atomic(out, lambda p: p.write_text(page))


@functools.lru_cache(None)
def highlight_style() -> str:
    "Colours of code."
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="friendly").get_style_defs(".highlight")


def seconds(
    text: str,  # 90, 90s, 10m, 1h
) -> float:  # seconds
    "A duration. Raises `ParameterError`."
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
    if not m:
        raise ParameterError(f"budget = {text!r}: a number with s, m or h, as in 10m")
    return float(m[1]) * {"s": 1, "m": 60, "h": 3600}.get(m[2], 1)


def spent(
    cells: list,  # chapter parameters
    out_dir=None,  # folder of runs
) -> float:  # seconds
    "What this machine has already spent on these cells, over its cores."
    return sum(cell_seconds(c, out_dir) for c in cells) / default_workers()


LARGE = 12_000  # characters of a table that is left out of an executed copy


def smaller_png(
    png: str,  # base64
) -> str:  # base64, of 128 colours where that is smaller
    "A picture that costs a repository less and looks the same."
    import base64
    import io

    from PIL import Image

    raw, buf = base64.b64decode(png), io.BytesIO()
    Image.open(io.BytesIO(raw)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        buf, "PNG", optimize=True
    )
    return base64.b64encode(min(raw, buf.getvalue(), key=len)).decode()


def publish_copy(
    executed: Path,  # a notebook as papermill left it
    out: Path,  # where the copy for readers goes
) -> Path:  # the copy
    "An executed chapter for readers: pictures and printed text stay, paths of this machine and papermill's records go."
    import nbformat

    nb, root = nbformat.read(executed, 4), str(project_root())
    nb.metadata.pop("papermill", None)
    for c in nb.cells:
        c.metadata = {k: v for k, v in c.metadata.items() if k == "tags"}
        for o in c.get("outputs", []):
            if o.output_type == "stream" and o.name == "stderr":
                o.text = ""
            if "image/png" in o.get("data", {}):
                o.data["image/png"] = smaller_png(o.data["image/png"])
            if len(o.get("data", {}).get("text/html", "")) > LARGE:
                o.data["text/html"] = (
                    "<p>A large table, left out of this copy: see results/published/report.md, or make report.</p>"
                )
    nb.cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    text = (
        nbformat.writes(nb)
        .replace(root, ".")
        .replace(str(Path.home()), "~")
        .replace(tempfile.gettempdir(), "TMP")
    )
    return write_atomic(out, lambda p: p.write_text(text))


def write_chapters(say=print) -> list:
    "Execute all chapters and write the copies for readers to results/published/chapters. Returns them."
    done, start, books = (
        [],
        time.perf_counter(),
        sorted((project_root() / "nbs").glob("[0-9]*.ipynb")),
    )
    for i, nb in enumerate(books):
        say(
            f"chapter {nb.name}, {i + 1} of {len(books)}"
            + (
                f", about {format_duration((time.perf_counter() - start) / i * (len(books) - i))} left"
                if i
                else ""
            )
        )
        with tempfile.TemporaryDirectory() as d:
            out = execute(
                nb,
                Path(d) / nb.name,
                {"protocol": "laptop"} if nb.name.startswith("05") else {},
                say,
            )
            done.append(
                publish_copy(out, project_root() / "results" / "published" / "chapters" / nb.name)
            )
    say(
        f"{len(done)} chapters, {sum(p.stat().st_size for p in done) / 1e6:.1f} MB: {done[0].parent}"
    )
    return done


def chapter_pages(
    out: Path,  # folder of the pages
    say=lambda s: None,
) -> list:  # the pages
    "Render the executed chapters, with links to each other and to the report."

    names, pages = [c["name"] for c in chapter_list()], []
    ours = hashlib.sha256(
        (Path(sys.modules["uvit_repro"].__file__).parent / "report" / "pages.py").read_bytes()
    )
    for i, n in enumerate(names):
        book, page, key = (
            published_root() / "chapters" / f"{n}.ipynb",
            out / f"{n}.html",
            ours.copy(),
        )
        key.update(book.read_bytes())
        key.update(" ".join(names).encode())
        note = f"<!-- {key.hexdigest()} -->"
        pages.append(page)
        if page.exists() and page.read_text().endswith(note):
            continue
        near = "".join(
            f'<a href="{m}.html">{word} {m.split("_")[0]}</a>'
            for m, word in (
                (names[i - 1] if i else "", "&larr;"),
                (names[i + 1] if i + 1 < len(names) else "", "&rarr;"),
            )
            if m
        )
        to_html(
            book, page, code=True, back=f'<a href="../report.html">The report</a>{near}', note=note
        )
        say(f"page {page.name}")
    return pages


def write_report(
    say=print,
    root=None,  # folder of the page; None: results
    out_dir=None,  # folder of this machine's runs; None: results/runs
) -> Path:  # the page
    "Execute this chapter on the records, write report.html, its tables and figures, and the pages of the chapters."
    root = Path(root or project_root() / "results").resolve()
    say("report: collecting records, drawing figures (about 20 s)")
    with ThreadPoolExecutor(1) as pool:  # while the chapter runs in a process of its own
        pages = pool.submit(chapter_pages, root / "chapters")
        nb = run_chapter(
            project_root() / "nbs" / "15_report.ipynb",
            root / "report" / "15_report.ipynb",
            say=say,
            out_dir=str(out_dir) if out_dir else None,
            report_dir=str(root / "report"),
        )
        pages.result()
    return to_html(nb, root / "report.html")


def md_table(head: list, rows: list) -> str:
    "A table in Markdown."
    text = lambda v: str(v).replace("|", "\\|").replace("\n", " ")
    return (
        "\n".join(
            "| " + " | ".join(map(text, r)) + " |" for r in [head, ["---"] * len(head), *rows]
        )
        + "\n"
    )


def md_frame(df) -> str:
    "A frame in Markdown, numbers as on the page."
    return md_table(
        list(df.columns),
        [
            [
                html.unescape(cell(v)).replace("\u2013", "-") if not isinstance(v, str) else v
                for v in r
            ]
            for r in df.itertuples(index=False)
        ],
    )


def md_value(c) -> str:
    "The paper's value: a quoted one in italics, low confidence struck out, medium marked."
    v = f"*{c.value}*" if c.kind == "quoted" else c.value
    return (
        f"~~{v}~~ (low)"
        if c.confidence == "low"
        else f"{v} (medium)"
        if c.confidence == "medium"
        else v
    )


def md_ours(c, protocol: str, filled: dict, ev: Evidence) -> str:
    "Ours, with links to the runs."
    runs = filled.get(c.cell, {}).get(protocol)
    if runs:
        return " -> ".join(
            ", ".join(f"[{h['value']:.4g}]({ev.link(h['run_id'])})" for h in g) for g in runs
        )
    return (counted(c) if protocol == "paper" else "") or (
        "not run" if c.kind in OURS and c.kind != "setting" else "-"
    )


def md_place(cells, filled: dict, ev: Evidence) -> str:
    "A table or figure of the papers."
    paper, place = cells.paper.iloc[0], cells.place.iloc[0]
    plain = cells[[not is_entry(c) for c in cells.itertuples()]]
    columns, rows, _ = arrange(plain)
    shown = heads(columns, rows, filled)
    told = len({n for n, _ in rows}) < len(rows)
    of = {c: [r[c] for _, r in rows if c in r] for c in columns}
    head = [
        "",
        *(["condition"] if told else []),
        *(
            w
            for c in columns
            for w in [
                f"{c}: paper",
                *(
                    f"{c}: {measure_name([x for x in of[c] if p in filled.get(x.cell, {})], p)}"
                    for p in shown[c]
                ),
            ]
        ),
    ]
    body = [
        [
            n,
            *(
                [
                    ", ".join(
                        dict.fromkeys(c.condition for c in r.values() if c.condition not in PARTS)
                    )
                ]
                if told
                else []
            ),
            *(
                w
                for c in columns
                for w in (
                    [md_value(r[c]), *(md_ours(r[c], p, filled, ev) for p in shown[c])]
                    if c in r
                    else [""] * (1 + len(shown[c]))
                )
            ),
        ]
        for n, r in rows
    ]
    title = (f"{paper}, {place}" if paper != "U-ViT" else place) + (
        f": {TITLES[place]}" if paper == "U-ViT" and place in TITLES else ""
    )
    runnable = any(c.fields and c.kind in MEASURED for c in cells.itertuples())
    what = anchor(paper, place)
    lead = (
        "All of it: `uvit-repro run {} --protocol paper`, {} runs, about {} on one {}.".format(
            what, *(lambda n, h, g: (n, hours(3600 * h), g.partition(",")[0]))(*place_cost(what))
        )
        if runnable
        else "No run: " + "; ".join(dict.fromkeys(filter(None, cells.reason))) + "."
        if any(cells.reason)
        else ""
    )
    if len(plain) < len(cells):
        lead += f" The {len(cells) - len(plain)} entries of its matrices are in [the record](../../uvit_repro/data/uvit_fig7_cka.csv)."
    return f"### {title}\n\n{lead}\n\n" + md_table(head, body)


def published_figures(
    ev: Evidence, cells, filled: dict, found, verdicts
) -> dict:  # name: (words, function that draws)
    "The figures of the Markdown report."
    from uvit_repro.ablations import collect, plot_rows, sample_rows
    from uvit_repro.bench.results import load_bench, newest, plot_speedup

    out, at = {}, dict(cells[cells.paper == "U-ViT"].groupby("place"))
    if len(found) and (found.n > 0).any():
        out["forest"] = (
            "Paired effects, every seed a dot, the paper's as a diamond",
            lambda: plot_forest(found, verdicts),
        )
    for p, draw in zip(ev.protocols, draw_place("Figure 2a", at["Figure 2a"], filled, ev)):
        out[f"figure2_{p}"] = (
            f"Figure 2: the paper's curves (dashed) and those of protocol {p} (solid)",
            lambda draw=draw: draw()[1],
        )
    out["figure7"] = (
        "Figure 7: similarity of representations, the paper's and ours where recorded",
        lambda: draw_place("Figure 7", at["Figure 7"], filled, ev)[0]()[1],
    )
    for p in ev.protocols:
        rows = sample_rows(collect(p, origin=ev.origin, out_dir=ev.out_dir))
        if rows:
            out[f"rows_{p}"] = (
                f"Samples of the same noise, one row per variant, protocol {p}",
                lambda rows=rows: plot_rows(rows),
            )
    for p in ev.protocols:
        if len(b := backbones(ev, p)):
            out[f"backbones_{p}"] = (
                f"Quality against cost, every seed a dot, protocol {p}",
                lambda b=b, p=p: backbones_figure(b, p),
            )
    bench = newest(load_bench("published", ev.out_dir))
    if (bench.metric == "speedup").any():
        out["speedup"] = (
            "Speed beside the released code, same run",
            lambda: plot_speedup(bench).figure,
        )
    return out


def md_claims(claims, ev: Evidence) -> str:
    "All claims, and the commands that would decide the open ones."
    links = lambda r: (
        ", ".join(f"[{i + 1}]({ev.link(n)})" for i, n in enumerate(r.runs.split())) or "-"
    )
    rows = [
        [
            r.id,
            r.claim,
            r.protocol,
            f"**{r.verdict}**" + (", exploratory" if r.exploratory else ""),
            effect_text(r),
            r.reason,
            links(r),
            decide_text(r),
        ]
        for r in claims.itertuples()
    ]
    text = md_table(
        [
            "",
            "claim",
            "protocol",
            "verdict",
            "effect (log)",
            "reason",
            "runs",
            "what would decide it",
        ],
        rows,
    )
    return (
        text
        + "\n<details><summary>The commands</summary>\n\n"
        + "".join(
            f"* {r.id}, {r.basis}:\n  `{r.command}`\n" for r in claims.itertuples() if r.command
        )
        + "\n</details>\n"
    )


def md_others(ev: Evidence, picture) -> list:
    "Other backbones, latents and text."
    parts = [
        "## Backbones\n\nOther backbones in U-ViT's experiment, as wide as the same number of parameters allows (chapter 12b): U-ViT's recipe for all, tuned for none of the others. IU-ViT, ASCEND and DiffiT's image form are our reading.\n"
    ]
    for p in ("gpu", "laptop"):
        b = backbones(ev, p)
        table = lambda: md_frame(
            backbones_table(b, [main_metric(PROTOCOLS[p]), "heldout_loss", "class_agreement"])
        )
        parts.append(
            f"### Protocol {p}\n\n"
            + (
                picture(f"backbones_{p}") + table()
                if len(b)
                else f"not run. The command is: `papermill nbs/14_comparison.ipynb out.ipynb -p protocol {p} -p seeds 0,1`\n"
            )
        )
    parts.append(
        "## Latents and text\n\nChapters 07 and 08 at toy scale; these numbers have no counterpart in the paper.\n"
    )
    for name, chapter in TOYS.items():
        t = toy_frame(ev, name)
        parts.append(
            f"### {name}\n\n"
            + (
                md_frame(t.assign(run=[f"[{i[:24]}]({ev.link(i)})" for i in t.run]))
                if len(t)
                else f"not run. The command is: `papermill nbs/{chapter}.ipynb out.ipynb -p protocol laptop`\n"
            )
        )
    return parts


def md_sections(ev: Evidence, cells, filled: dict, claims, figures: dict) -> list:
    "The report, part by part."
    import pandas as pd

    from uvit_repro.bench.results import load_bench, newest, speed_table

    picture = lambda *names: "".join(
        f"![{figures[n][0]}](report/{n}.png)\n\n*{figures[n][0]}*\n\n"
        for n in figures
        if n.startswith(names)
    )
    kinds, speed = (
        summary_frame(cells, filled),
        speed_table(newest(load_bench("published", ev.out_dir))),
    )
    whole, runs = dict(cells.groupby(["paper", "place"])), conditions_frame(ev.runs)
    parts = [
        "# U-ViT, reproduced: the report from published records\n\n> Every number of ours stands in a column of its own and leads to its run; what was not run says so. Made by `make publish` from the folders beside it, and from nothing else.\n",
        "## Equivalence certificate\n\nDifferences to the released code, as the published runs recorded them.\n\n"
        + md_frame(certificate_frame(ev.runs)),
        "## Summary\n\n"
        + "".join(f"* {l}\n" for l in summary_lines(ev, kinds, claims))
        + "\n"
        + md_frame(kinds),
        "## Claims\n\nEffects are differences of the logarithm of a measure at the same seed, worse over better as the paper has it. Exploratory verdicts rest on runs that were seen before the test was fixed; they support nothing. "
        + "Hours are those of "
        + "; ".join(f"{w} ({p})" for p, w in cost_model(ev.runs)[1].items())
        + ".\n\n"
        + picture("forest")
        + md_claims(claims, ev),
        "## Every table and figure\n\n*Italics*: another method's number, quoted by the paper. (medium), ~~struck out~~ (low): how far to trust a copy of the paper's number.\n\n"
        + picture("figure"),
    ]
    parts += [md_place(whole[k], filled, ev) for k in places(cells)]
    head = [
        f"### Protocol {p}\n\n" + md_frame(h)
        for p in ev.protocols
        if len(
            h := headline_frame(
                ev.results[
                    ev.results.run_id.isin(
                        [r["folder"].name for r in ev.runs if adopted(r["experiment"])]
                    )
                ],
                p,
            )
        )
    ]
    parts += [
        "## Samples\n\n" + picture("rows") + "".join(f"{h}\n" for h in head),
        *md_others(ev, picture),
        "## Speed\n\n"
        + (
            picture("speedup") + md_frame(speed)
            if len(speed)
            else f"not run. The command is: `{BENCH}`\n"
        ),
        "## Runs and their conditions\n\n"
        + (
            md_frame(
                runs.drop(columns=["where"]).assign(run=[f"[{i}]({ev.link(i)})" for i in runs.run])
            )
            if len(runs)
            else "not run\n"
        ),
        "## What departs from the paper\n",
    ]
    for p in ev.protocols:
        dev = min(
            (r for r in ev.runs if r["experiment"].protocol == p),
            key=lambda r: not adopted(r["experiment"]),
        )["deviations"]
        parts.append(
            f"### Protocol {p}: every field that differs\n\n"
            + md_frame(pd.DataFrame(dev, columns=["field", "here", "paper"]).map(str))
        )
    return parts + [
        "## Where the sources disagree\n\n" + md_frame(disagreements()),
        "## Where the numbers come from\n\n" + md_frame(provenance_frame(cells)),
    ]


def published_report(out_dir=None) -> tuple:  # (text, figures as of `published_figures`)
    "The report that published records alone give."
    import pandas as pd

    ev, cells = evidence("published", out_dir, published_root()), registry()
    filled, (cost, _) = fill(cells, ev), cost_model(ev.runs)
    found = {p: effects(ev.results, p) for p in ORDER if p in ev.protocols}
    verdicts = all_verdicts(ev.results, list(found) or None, cost, found or None)
    claims = claims_frame(verdicts)
    figures = published_figures(
        ev, cells, filled, pd.concat(found.values()) if found else [], verdicts
    )
    return "\n".join(md_sections(ev, cells, filled, claims, figures)), figures


def write_published(say=print, root=None) -> Path:
    "Write results/published/report.md and its figures, in 128 colours."
    import matplotlib.pyplot as plt

    root = Path(root or published_root())
    text, figures = published_report()
    for name, (_, draw) in figures.items():
        buf = io.BytesIO()
        draw().savefig(buf, format="png", dpi=75, bbox_inches="tight")
        plt.close("all")
        small = base64.b64decode(smaller_png(base64.b64encode(buf.getvalue()).decode()))
        write_atomic(root / "report" / f"{name}.png", lambda p: p.write_bytes(small))
    say(f"{len(text):,} characters, {len(figures)} figures: {root / 'report.md'}")
    return write_atomic(root / "report.md", lambda p: p.write_text(text))


def publish_cells(cells: list) -> int:
    "Copy the evidence of the finished cells to results/published; how many there were."
    return len([publish(run_folder(e)) for e in (experiment(**c) for c in cells) if is_done(e)])


def main(args=None) -> int:
    "`python -m uvit_repro.report.pages`: the cells of Figure 2 inside a budget, then the report."
    ap = argparse.ArgumentParser(
        prog="python -m uvit_repro.report.pages",
        description="Train the headline model and cells of Figure 2, then write results/report.html.",
    )
    ap.add_argument(
        "--protocol",
        default=None,
        choices=tuple(PROTOCOLS),
        help="smoke, laptop, gpu or paper; default: what this machine can do",
    )
    ap.add_argument(
        "--budget",
        default="11m",
        help="time for training, counted over all calls; 0: only the report; none: everything (default 11m)",
    )
    ap.add_argument("--seeds", default="0", help="comma-separated, each a whole figure (default 0)")
    ap.add_argument(
        "--chapters",
        action="store_true",
        help="instead: execute all chapters and keep the copies in results/published/chapters",
    )
    ap.add_argument(
        "--publish",
        action="store_true",
        help="afterwards: copy the evidence of these cells to results/published and write its report.md",
    )
    a = ap.parse_args(args)
    start = time.perf_counter()
    say = lambda line: print(
        f"[{format_duration(time.perf_counter() - start):>6}] {line}", flush=True
    )
    if a.chapters:
        write_chapters(say)
        return 0
    protocol = a.protocol or experiment().protocol
    cells = figure2_cells(protocol, [int(s) for s in a.seeds.split(",")])
    try:
        earlier = spent(cells)
        budget = None if a.budget == "none" else max(0.0, seconds(a.budget) - earlier)
    except (ValueError, FileNotFoundError) as e:
        say(f"stopped: {e}")
        return 2  # data that are not there, a budget that is none
    say(
        f"protocol {protocol}: {len(cells)} cells of Figure 2; "
        + (
            "no limit of time"
            if budget is None
            else f"{format_duration(budget)} of the budget left"
        )
    )
    state = run_sweep(cells, project_root() / "nbs" / "05_ablations.ipynb", budget, say=say)
    say(
        f"{len(state['done'])} were there, {len(state['ran'])} ran, {len(state['failed'])} failed, {len(state['left'])} not started"
    )
    for c in state["failed"]:
        say(
            f"failed: {repeat_command(experiment(**{k: v for k, v in c.items() if k != 'error'}))}: {c['error']}"
        )
    if state["left"]:
        say(f"the rest of Figure 2: make figure2 PROTOCOL={protocol}")
    if a.publish:
        say(f"{publish_cells(cells)} runs copied to results/published")
        write_published(say)
    page = write_report(say)
    say(f"done: {page}")
    return 1 if state["failed"] else 0


if __name__ == "__main__" and "get_ipython" not in globals():
    sys.exit(main())
