"""Which runs stand behind a table, a figure, a published number or a list of claims."""

import functools
import re
from dataclasses import dataclass

from uvit_repro.config import (
    CONFIGS,
    PROTOCOLS,
    Experiment,
    ParameterError,
    variant_name,
    with_overrides,
)
from uvit_repro.diffit import RUNS as DIFFIT_RUNS
from uvit_repro.diffit import published_run
from uvit_repro.genvit import published_run as genvit_run
from uvit_repro.paper.claims import queued_experiments
from uvit_repro.paper.numbers import FIGURE2
from uvit_repro.paper.registry import KINDS, select
from uvit_repro.unet import appendix
from uvit_repro.uvit import matched_none

CIFAR = "CIFAR10 U-ViT-S/2"  # the configuration that the smaller protocols are made from
SAVED_EVERY = 50_000  # iterations between the checkpoints of the released script
PANEL = re.compile(r"Figure 2[a-e]")
# Variants of Figure 2 as a short budget should do them.
ORDER = ("adopted", "skip=none", "time=adaln", "skip=add", "conv=none", "pos_embed=sincos2d")
ORDER += ("skip=linear_add", "skip=add_linear", "patch_embed=conv", "conv=before")


def our_variants(
    base: Experiment,  # a protocol
) -> list:  # (panel, label, fields of the model)
    "Variants that the paper does not have and a comparison needs."
    m = base.model
    wide = {"skip": "none", "mlp_ratio": matched_none(m.embed_dim, m.depth, m.mlp_ratio)}
    return [
        ("a", "No long skip, as many parameters", wide),
        ("a", "(h_m + h_s)/sqrt 2", {"skip": "add_scaled"}),
        ("b", "AdaLN, literal start", {"time": "adaln_literal"}),
        ("b", "AdaLN-Zero", {"time": "adaln_zero"}),
    ]


@functools.cache
def configurations() -> dict[str, Experiment]:
    "The released configurations, and the published runs of the other backbones, by name."
    diffit = {f"DiffiT {name}": published_run(name) for name in DIFFIT_RUNS}
    deeper = with_overrides(diffit["DiffiT ImageNet 256x256"], depth=30)
    unets = {place: exp for (place, network), exp in appendix().items() if network == "U-Net"}
    return {
        **CONFIGS,
        **diffit,
        "DiffiT ImageNet 256x256, 30 blocks": deeper,
        "GenViT CIFAR10": genvit_run(),
        **{f"U-Net, Appendix {place}": exp for place, exp in unets.items()},
    }


def paper_experiment(cell, fields: dict, seed: int) -> Experiment:
    "The released configuration with changed fields and the evaluation of a cell."
    exp = with_overrides(configurations()[cell.base], seed=seed, **fields)
    last = cell.step is None or cell.step == exp.train.n_steps
    if last and cell.num_samples is None and not cell.sampling and cell.curve is None:
        return exp
    saved = tuple(range(SAVED_EVERY, exp.train.n_steps, SAVED_EVERY))
    curve = saved if cell.curve == "all" else tuple(cell.curve or ())
    n = cell.num_samples or exp.evaluation.num_samples
    settings = {"num_samples": n, "curve_steps": curve, "curve_samples": n}
    settings |= {"curve_sampler": "", "curve_nfe": 0, **cell.sampling}
    return with_overrides(exp, loss_steps=tuple(s for s in saved if s not in curve), **settings)


def smaller_experiment(protocol: str, fields: dict, seed: int) -> Experiment:
    "A protocol with changed fields of U-ViT-S/2; sizes (Figure 3) change in proportion."
    base, big = PROTOCOLS[protocol].model, CONFIGS[CIFAR].model
    fields = {name: value for name, value in fields.items() if name != "n_steps"}
    if "depth" in fields:
        fields["depth"] += base.depth - big.depth
    for name in {"embed_dim", "num_heads"} & set(fields):
        fields[name] = fields[name] * getattr(base, name) // getattr(big, name)
    return with_overrides(PROTOCOLS[protocol], seed=seed, **fields)


def experiments_of(cell, protocol: str, seed: int) -> list[Experiment]:
    "The runs of a cell; raises `ParameterError` for impossible sizes."
    if protocol == "paper":
        return [paper_experiment(cell, fields, seed) for fields in cell.fields]
    return [smaller_experiment(protocol, fields, seed) for fields in cell.fields]


def no_experiment(
    cell,  # a row of the registry
    protocol: str,
) -> str:  # empty: it has one
    "Why a cell has no experiment at a protocol."
    if cell.kind not in ("reproducible", "statement") or not cell.fields:
        return cell.reason or KINDS[cell.kind]
    if protocol == "paper":
        return ""
    base, big = PROTOCOLS[protocol], CONFIGS[CIFAR]
    here = f"protocol {protocol} trains on {base.data.dataset}"
    is_comparison = cell.place.startswith(("Figure", "Section"))
    if base.data.dataset != big.data.dataset and not is_comparison:
        return f"{here}: a comparison of variants carries over, a row of a table does not"
    is_entry = re.fullmatch(r"cka.*\d.*", cell.measure)  # of a matrix of layers
    if cell.base != CIFAR or (is_entry and base.model.depth != big.model.depth):
        return f"{here} alone, with {base.model.depth} layers; needs protocol paper"
    try:
        experiments_of(cell, protocol, 0)
    except ParameterError as error:
        return f"impossible at protocol {protocol}: {error}"
    return ""


def cell_experiments(
    cell,  # a row of the registry
    protocol: str,
    seed: int = 0,
) -> list[Experiment]:  # one for a number, two or more for a statement; empty: `no_experiment`
    "All runs that a published number is about."
    return [] if no_experiment(cell, protocol) else experiments_of(cell, protocol, seed)


@dataclass(frozen=True)
class Job:
    "One run of a campaign."

    exp: Experiment
    places: tuple = ()  # that it serves: Figure 2a, Table 1

    @property
    def name(self) -> str:
        return self.exp.run_id.rpartition("-")[0]


def importance(exp: Experiment) -> int:
    "The place of a variant in a figure that is run in part."
    variant = variant_name(exp.model)
    return ORDER.index(variant) if variant in ORDER else len(ORDER)


def jobs_of_cells(cells, panels: set, protocol: str, seed: int) -> list[Job]:
    "The runs of some cells at one seed; whole panels of Figure 2 with what the paper left out."
    found = {}
    for cell in cells.itertuples():
        for exp in cell_experiments(cell, protocol, seed):
            found.setdefault(exp, {})[cell.place] = True
    first = next((c for c in cells.itertuples() if PANEL.fullmatch(c.place)), None)
    named = [(panel, *v) for panel, (_, variants) in FIGURE2.items() for v in variants]
    for panel, _, fields in (*named, *our_variants(PROTOCOLS[protocol])):
        if panel in panels:
            (exp,) = experiments_of(first._replace(fields=[fields]), protocol, seed)
            found.setdefault(exp, {})
    runs = cells[cells.kind.isin(("reproducible", "statement"))]
    figure = panels and all(PANEL.fullmatch(place) for place in runs.place)
    order = sorted(found, key=importance) if figure else found
    return [Job(exp, tuple(found[exp]) or ("Figure 2, not plotted",)) for exp in order]


def jobs(
    what: str,  # claims, all, a table, a figure, the id of a cell; several joined by commas
    protocol: str,
    seeds=(0,),  # each is a whole set of runs; a list of claims names its own
) -> list[Job]:  # in the order in which a budget should be spent
    "The runs behind some published numbers, or those that a protocol's claims are judged by."
    if protocol not in PROTOCOLS:
        raise ParameterError(f"protocol = {protocol!r}: allowed are {', '.join(PROTOCOLS)}")
    out = {}
    for name in what.split(","):
        if name == "claims":
            found = [Job(exp, ("claims",)) for exp in queued_experiments(protocol)]
        else:
            cells = select(name)
            panels = {p[-1] for p in cells.place if PANEL.fullmatch(p)}
            whole = set() if name in set(cells.cell) else panels
            found = [j for s in seeds for j in jobs_of_cells(cells, whole, protocol, s)]
        for job in found:
            out.setdefault(job.exp, job)
    return list(out.values())
