"""Our value beside each published number: measured, counted from the architecture, or chosen."""

import functools

import pandas as pd
import torch

from uvit_repro.campaign.jobs import cell_experiments, configurations, measurement
from uvit_repro.config import Experiment, with_overrides
from uvit_repro.genvit import IMAGES, PRESETS, GenViT
from uvit_repro.paper.numbers import as_table5
from uvit_repro.runs.counting import SkipInit, macs_of, params_of

SEEDS = (*range(10), *range(20, 23), 1234)  # looked for
FIXED = {"optimizer": "AdamW", "dropout": "0.0"}  # no fields: this package has no other


def tokens_of(exp: Experiment) -> int:
    "Tokens of one image, with those of time and condition."
    extra = {"none": 1, "class": 2, "text": 1 + exp.data.text_tokens}[exp.model.condition]
    return (exp.data.img_size // exp.model.patch_size) ** 2 + extra


def linear_gflops(exp: Experiment) -> float:
    "Multiply-accumulates of the linear layers in DiffiT's blocks, which the paper counts."
    m, side = exp.model, exp.data.img_size // exp.model.patch_size
    return m.depth * side**2 * (4 + 2 * m.mlp_ratio) * m.embed_dim**2 / 1e9


@functools.cache
def genvit_parameters(dataset: str) -> int:
    "Trainable numbers of a published GenViT, with its classifier."
    classes = {"CIFAR100": 100, "ImageNet 32x32": 1000}.get(dataset)
    name = "GenViT CIFAR10" if classes else f"GenViT {dataset}"
    side, own_classes = IMAGES[name]
    p = PRESETS[name]
    sizes = [p[k] for k in ("embed_dim", "depth", "num_heads", "mlp_ratio")]
    with torch.device("meta"), SkipInit():
        net = GenViT(side, p["patch_size"], 3, *sizes, classes or own_classes)
    return sum(v.numel() for v in net.parameters())


COUNTS = {  # measure: how it is counted
    "layers": lambda exp: exp.model.depth,
    "hidden_size": lambda exp: exp.model.embed_dim,
    "mlp_size": lambda exp: round(exp.model.embed_dim * exp.model.mlp_ratio),
    "heads": lambda exp: exp.model.num_heads,
    "tokens": tokens_of,
    "params_exact": params_of,
    "params_M": lambda exp: params_of(exp) / 1e6,
    "gflops": lambda exp: macs_of(exp) / 1e9,
    "gflops_linear": linear_gflops,
}


def computed(cell) -> float:
    "A count of a cell, from the architecture alone."
    if cell.measure.startswith("genvit_"):
        n = genvit_parameters(cell.dataset)
        return n / 1e6 if cell.measure.endswith("_M") else n
    changes = {name: value for fields in cell.fields for name, value in fields.items()}
    return COUNTS[cell.measure](with_overrides(configurations()[cell.base], **changes))


def chosen(cell):  # a number or words
    "What our configuration says about a setting of the paper."
    if not cell.base:
        return cell.reason
    known = {**as_table5(configurations()[cell.base]), **FIXED}
    return known.get(cell.measure, "not a field of ours")


def ledger(
    results: pd.DataFrame,  # of `load_results`; for Figure 7 with `uvit_repro.cka.cka_results()`
) -> dict:  # rows as dicts, by (run_id, metric)
    "Measurements that hold, ready to be looked up."
    found = {}
    for row in results[results.status == "ok"].to_dict("records"):
        found.setdefault((row["run_id"], row["metric"]), []).append(row)
    return found


def find_row(book: dict, at: dict) -> dict | None:
    "The first row of a measurement; matrices of Figure 7 are found by their step."
    for row in book.get((at["run_id"], at["metric"]), ()):
        if row["eval_id"] == at["eval_id"] or (not at["eval_id"] and row["step"] == at["step"]):
            return row
    return None


def measured(
    cell,  # a row of the registry
    book: dict,  # of `ledger`
    protocol: str,
    seeds=SEEDS,
) -> list[list[dict]]:  # for each run of the cell: seed, value, run_id, eval_id, origin, folder
    "The measurements that belong to a cell."
    runs = [[] for _ in cell_experiments(cell, protocol)]
    for seed in seeds if book else ():
        for values, exp in zip(runs, cell_experiments(cell, protocol, seed), strict=True):
            at = measurement(cell, exp)
            row = find_row(book, at) if at else None
            if row:
                kept = {name: row[name] for name in ("run_id", "eval_id", "origin", "folder")}
                values.append({"seed": seed, "value": float(row["value"]), **kept})
    return runs
