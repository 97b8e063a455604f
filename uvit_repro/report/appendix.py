"""What the appendix lists: published numbers with ours, counts, costs, runs, speed.

All that the report takes from `campaign` is taken here.
"""

from __future__ import annotations

import functools
import re

import pandas as pd

from uvit_repro.campaign.cells import chosen, computed, measured
from uvit_repro.campaign.jobs import jobs
from uvit_repro.campaign.predict import paper_gpu, predict
from uvit_repro.config import CONFIGS, main_metric, with_overrides
from uvit_repro.paper.claims import load_claims, queued_experiments
from uvit_repro.paper.numbers import read_table
from uvit_repro.paper.registry import registry
from uvit_repro.report.evidence import SCALES, Evidence, has_list
from uvit_repro.runs.counting import params_of
from uvit_repro.runs.records import COLUMNS

ARITHMETIC = ("U36", "U37", "D12", "D13")  # claims about counts
SEEN_IN = {  # first word of a row's provenance: where the number was seen
    "seed": "paper",
    "arXiv": "paper",
    "official": "authors' repository",
    "secondary": "a copy by others",
    "computed": "arithmetic",
    "memory": "recalled",
}
SETTLE = (  # what, how `uvit-repro run` calls it, protocol, seeds
    ("Figure 2, shorter schedule", "fig2", "gpu", (0, 1, 2)),
    ("Figure 3, shorter schedule", "fig3", "gpu", (0, 1, 2)),
    ("Figure 2", "fig2", "paper", (0,)),
    ("Figure 3", "fig3", "paper", (0,)),
    ("Table 1", "table1", "paper", (0,)),
    ("Table 4 (MS-COCO)", "table4", "paper", (0,)),
    ("Figure 5 (ImageNet 256)", "fig5", "paper", (0,)),
    ("Appendix E (U-Net)", "appendixe", "paper", (0,)),
)


@functools.cache
def counts() -> dict[str, float]:  # cell -> our count
    "Parameters, operations and sizes, counted from the architectures."
    return {c.cell: computed(c) for c in registry().itertuples() if c.kind == "computed"}


def same_digits(
    printed: str,  # as in the paper
    count: float,  # ours
) -> bool:
    "Whether a count rounds to the printed number."
    digits = len(printed.partition(".")[2])
    return f"{count:.{digits}f}" == printed


def paper_numbers(ev: Evidence) -> pd.DataFrame:
    "Every number of the papers with ours: run at protocol paper, counted, or as configured."
    rows = [row for r in ev.at("paper") for row in r.measurements]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.astype({"seed": int, "step": int, "value": float})
    out = []
    for c in registry().itertuples():
        ours, runs = "", ()
        if c.kind == "computed":
            ours = f"{counts()[c.cell]:,.10g}"
        elif c.kind == "setting" and c.base:
            ours = str(chosen(c))
        elif len(table) and c.kind in ("reproducible", "statement"):
            found = measured(c, table)
            ours = ", ".join(f"{hit['value']:.4g}" for hit in found)
            runs = tuple(hit["run_id"] for hit in found)
        row = {"paper": c.paper, "place": c.place, "row": f"{c.dataset} {c.row}".strip()}
        row |= {"quantity": c.column, "condition": c.condition, "printed": c.value, "ours": ours}
        row |= {"runs": runs, "kind": c.kind, "seen in": SEEN_IN[re.match(r"\w+", c.provenance)[0]]}
        row |= {"confidence": c.confidence, "why": c.reason, "cell": c.cell}
        out.append(row | {"published": c.counts})
    return pd.DataFrame(out)


def count_summary(numbers: pd.DataFrame) -> tuple[int, int, pd.DataFrame]:
    "How many counts equal the printed number, how many there are, and those that do not."
    counted = numbers[(numbers.kind == "computed") & numbers.published]
    same = [same_digits(c.printed, counts()[c.cell]) for c in counted.itertuples()]
    return sum(same), len(same), counted[[not s for s in same]]


def time_parameters(way: str) -> float:  # in units of width^2 and block
    "Parameters that a way of feeding time adds to DiffiT."
    sizes = {"model": "DiffiT-latent", "embed_dim": 1152, "depth": 28, "conv": "after"}
    base = with_overrides(CONFIGS["ImageNet 256x256 U-ViT-L/2"], p_uncond=0.1, **sizes)
    with_way, without = (with_overrides(base, options=f"time={w}") for w in (way, "none"))
    return (params_of(with_way) - params_of(without)) / base.model.depth / base.model.embed_dim**2


def arithmetic(numbers: pd.DataFrame) -> dict[str, str]:  # claim -> status in words
    "The claims about counts, which hold or do not hold without any training."
    at = numbers[numbers.kind == "computed"]
    appendix = at[(at.place == "Appendix E") & (at.quantity == "gflops")]
    cells = {
        "U36": at[(at.place == "Table 2") & (at.quantity == "params_M")],
        "U37": appendix[appendix.row.str.contains("U-ViT-H/2")],
        "D12": at[(at.paper == "DiffiT") & (at.place == "Table 9")],
    }
    found = {}  # claim: whether it holds, and why
    for claim, rows in cells.items():
        same = all(same_digits(c.printed, counts()[c.cell]) for c in rows.itertuples())
        listed = [f"{c.row} {c.ours} (printed {c.printed})" for c in rows.itertuples()]
        found[claim] = same, ", ".join(listed)
    tmsa, adaln = time_parameters("tmsa"), time_parameters("adaln_zero")
    text = f"TMSA adds {tmsa:.3f} d^2 parameters per block (printed 3), "
    found["D13"] = (
        (round(tmsa), round(adaln)) == (3, 6),
        f"{text}adaLN-zero {adaln:.3f} d^2 (printed 6)",
    )
    return {c: f"{'holds' if h else 'does not hold'}: {why}" for c, (h, why) in found.items()}


def certificate(ev: Evidence) -> list[dict]:  # what, file, tolerance, difference, machines, equal
    "Checks against the released code with the largest recorded difference."
    checks = [
        {"machine": r.machine, **check}
        for r in ev.records.values()
        for check in r.info.get("certificate") or ()
    ]
    columns = ["what", "file", "tolerance", "difference", "machine"]
    groups = pd.DataFrame(checks, columns=columns).groupby(columns[:3], sort=False)
    found = groups.agg(difference=("difference", "max"), machines=("machine", "nunique"))
    found = found.reset_index()
    return found.assign(equal=found.difference < found.tolerance).to_dict("records")


def claim_rows(numbers: pd.DataFrame, words: dict[str, str]) -> list[dict]:
    "All claims of the papers: the word where a list judges it, else a plain status."
    known = {name: f"arithmetic: {status}" for name, status in arithmetic(numbers).items()} | words
    rows, needs = [], read_table("claims_status.csv")
    for c in load_claims().merge(needs, on="id", validate="one_to_one").itertuples():
        row = {"id": c.id, "claim": c.claim, "source": f"{c.paper}, {c.source}"}
        row |= {"the paper's numbers": c.paper_numbers}
        row |= {"status": known.get(c.id, f"not run; needs {c.needs}"), "command": c.command}
        rows.append(row)
    return rows


def cost_rows(ev: Evidence) -> list[dict]:  # what, protocol, runs, hours, machine, command
    "What it would cost to settle the rest, from counted operations or from recorded times."
    rows = []
    for protocol in (p for p in SCALES if has_list(p)):
        left = sum(e.run_id not in ev.records for e in queued_experiments(protocol))
        spent = [r.info["wall_seconds"] / 3600 for r in ev.at(protocol)]
        hours = left * pd.Series(spent, dtype=float).median()
        row = {"what": "the rest of the fixed list", "protocol": protocol, "runs": left}
        row |= {"hours": hours, "machine": "one core, as recorded"}
        rows.append(row | {"command": f"uvit-repro run claims --protocol {protocol}"})
    gpu, rate = paper_gpu()
    for what, name, protocol, seeds in SETTLE:
        todo = [job.exp for job in jobs(name, protocol, seeds) if job.exp.run_id not in ev.records]
        hours = sum(predict(e, rate) for e in todo) / 3600
        row = {"what": what, "protocol": protocol, "runs": len(todo), "hours": hours}
        seeds_text = f" --seeds {','.join(map(str, seeds))}" if len(seeds) > 1 else ""
        row |= {"machine": gpu.partition(",")[0]}
        rows.append(row | {"command": f"uvit-repro run {name} --protocol {protocol}{seeds_text}"})
    return rows


def run_rows(ev: Evidence, protocol: str) -> list[dict]:
    "One row per run of a protocol: what it is, what it measured, where it ran."
    rows = []
    for r in ev.at(protocol):
        e, c = r.experiment, r.info.get("conditions", {})
        row = {"run": r.run_id, "data": e.data.dataset, "seed": e.seed, "steps": e.train.n_steps}
        row |= {"held-out loss": r.value("heldout_loss"), main_metric(e): r.value(main_metric(e))}
        row |= {"minutes": r.info["wall_seconds"] / 60, "machine": r.machine}
        row |= {"code": str(c.get("commit") or "")[:8] + ("+changes" if c.get("dirty") else "")}
        rows.append(row | {"origin": r.origin, "command": r.info.get("command", "")})
    return rows
