"""Our value beside each published number: measured, counted from the architecture, or chosen."""

import functools

import pandas as pd
import torch

from uvit_repro.campaign.jobs import cell_experiments, configurations
from uvit_repro.config import Experiment, eval_id, main_metric, with_overrides
from uvit_repro.genvit import IMAGES, PRESETS, GenViT
from uvit_repro.paper.numbers import as_table5
from uvit_repro.runs.counting import SkipInit, macs_of, params_of

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


def measured(
    cell,  # a row of the registry
    results: pd.DataFrame,  # measurements at protocol paper, as of `load_results`
) -> list[dict]:  # rows of the table, for each seed and run that the cell is about
    "The measurements that belong to a cell; those of Figure 7 are found by their step."
    found = []
    for seed in results.seed.unique():
        for exp in cell_experiments(cell, "paper", seed):
            step = cell.step or exp.train.n_steps
            images = cell.num_samples or exp.evaluation.num_samples
            metric = main_metric(exp) if cell.measure == "fid" else cell.measure
            rows = results[(results.run_id == exp.run_id) & (results.metric == metric)]
            if metric.startswith("cka"):
                rows = rows[rows.step == step]
            else:
                rows = rows[rows.eval_id == eval_id(exp, step, images)]
            found += rows.head(1).to_dict("records")
    return found
