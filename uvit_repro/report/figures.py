"""The figures of the report: the paper's panel and ours side by side, one scale per panel."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from uvit_repro.config import PROTOCOLS, experiment, main_metric
from uvit_repro.paper.numbers import FIGURE2, figure2, figure7, load_paper
from uvit_repro.report.evidence import SCALES, Evidence, Record, has_list, variant_label
from uvit_repro.report.statistics import paired_difference

SETTINGS = {"concatenation": "", "addition": "skip=add", "no long skip": "skip=none"}  # of Figure 7
SIZES = {  # panel of Figure 3: field, and its change at each size
    "depth": ("depth", (-4, 0, 4)),
    "width": ("embed_dim", (0.5, 1, 1.5)),
    "patch": ("patch_size", (0.5, 1, 2)),
}
GREY = "0.55"


@dataclass(frozen=True)
class Figure:
    "A drawn figure with what was drawn."

    name: str  # of its files
    caption: str
    figure: object  # matplotlib
    data: pd.DataFrame
    command: str = ""  # that runs what is missing


@functools.cache
def palette() -> list:
    "Colours that are safe for colour blindness; sets the style of all figures."
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    plt.rcParams["text.parse_math"] = False  # labels come from records
    return sns.color_palette("colorblind")


def subplots(rows: int, columns: int, size: tuple[float, float], left: float = 0.75, **options):
    "A grid of axes, `size` inches each; fixed margins, because measuring every label is slow."
    import matplotlib.pyplot as plt

    palette()
    width, height = size[0] * columns + left - 0.75, size[1] * rows
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    gap, below, above = 0.95, 0.55, 0.4
    fig.subplots_adjust(
        left=left / width,
        right=1 - 0.15 / width,
        bottom=below / height,
        top=1 - above / height,
        wspace=gap / max(size[0] - gap, 0.1),
        hspace=(below + above) / max(size[1] - below - above, 0.1),
    )
    return fig, axes


def save(drawn: Figure, target: Path, suffixes=("png", "svg", "csv")) -> Path:  # the picture
    "Write a figure and its data."
    import matplotlib.pyplot as plt

    for suffix in suffixes:
        path = target / f"{drawn.name}.{suffix}"
        if suffix == "csv":
            drawn.data.to_csv(path, index=False)
        else:
            drawn.figure.savefig(path, dpi=110, metadata={"Date": None} if suffix == "svg" else {})
    plt.close(drawn.figure)
    return target / f"{drawn.name}.{suffixes[0]}"


def plain_log(axis) -> None:
    "Label a logarithmic axis with plain numbers."
    from matplotlib.ticker import LogLocator

    axis.axes.set_yscale("log")
    axis.set_major_formatter("{x:g}")
    low, high = axis.get_view_interval()
    if high > 4 * low:  # labels at every digit would overlap
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter("{x:g}")
    axis.set_tick_params(which="minor", labelsize=7)


# ---- The paper's panel beside ours ----


def variant_at(protocol: str, change: dict) -> str:
    "The label of a change at a protocol."
    return variant_label(experiment(protocol, **change).model, PROTOCOLS[protocol].model)


def trained_alike(ev: Evidence, protocol: str) -> list[Record]:
    "The runs that have the data and the training of a protocol."
    base = PROTOCOLS[protocol]
    found = [(r, r.experiment) for r in ev.at(protocol)]
    alike = (base.train, base.data.dataset)
    return [r for r, e in found if (e.train, e.data.dataset) == alike]


def measure_of(protocol: str) -> str:
    "What is compared at a protocol: the measure of its fixed list, else its distance."
    return "heldout_loss" if has_list(protocol) else main_metric(PROTOCOLS[protocol])


def measure_words(metric: str) -> str:
    "A measure as an axis names it."
    known = {"heldout_loss": "held-out loss", "fid": "FID"}
    return known.get(metric, "Fréchet distance" if metric.startswith("fd_") else metric)


def endpoints(ev: Evidence, protocol: str) -> pd.DataFrame:  # variant, seed, value, run_id
    "The last measurement of every run that has the protocol's length and data."
    rows = [
        (r.label, r.experiment.seed, r.value(measure_of(protocol)), r.run_id)
        for r in trained_alike(ev, protocol)
    ]
    frame = pd.DataFrame(rows, columns=["variant", "seed", "value", "run_id"])
    return frame.dropna().sort_values("seed", ignore_index=True)


def draw_endpoints(ax, points: pd.DataFrame, variants: list[tuple[str, str]], protocol: str):
    "Every seed a dot, in the colour of its variant; a grey line joins the runs of one seed."
    position = {v: i for i, (_, v) in enumerate(variants)}
    found = points.assign(x=points.variant.map(position)).dropna(subset="x").sort_values("x")
    for _, group in found.groupby("seed"):
        ax.plot(group.x, group.value, "-", color=GREY, lw=0.8, zorder=1)
    for i, (_, variant) in enumerate(variants):
        values = found[found.variant == variant].value
        ax.plot([i] * len(values), values, "o", ms=6, color=palette()[i % 10], zorder=2)
        if values.empty:
            ax.text(i, 0.04, "not run", rotation=90, color=GREY, fontsize=8, ha="center",
                    va="bottom", transform=ax.get_xaxis_transform())  # fmt: skip
    ax.set_xticks(range(len(variants)), [label for label, _ in variants], fontsize=8)
    ax.set(xlim=(-0.5, len(variants) - 0.5), ylabel=measure_words(measure_of(protocol)))
    if found.empty:
        ax.set_yticks([])
    elif protocol == "laptop":
        plain_log(ax.yaxis)


def side_by_side(ev: Evidence, name: str, caption: str, panels: list[tuple]) -> Figure:
    "Rows of panels (title, function that draws the paper's, function protocol -> variants)."
    protocols = ev.protocols or ["cpu"]
    fig, axes = subplots(len(panels), 1 + len(protocols), (4.0, 2.6))
    points = {p: endpoints(ev, p) for p in protocols}
    for row, (title, draw_paper, variants) in zip(axes, panels, strict=True):
        draw_paper(row[0])
        row[0].set_title(f"{title}: the paper", fontsize=9)
        for ax, p in zip(row[1:], protocols, strict=True):
            draw_endpoints(ax, points[p], variants(p), p)
            ax.set_title(f"{title}: {SCALES[p]}", fontsize=9)
    frames = [points[p].assign(scale=p, measure=measure_of(p)) for p in protocols]
    command = f"uvit-repro run {name.replace('figure', 'fig')} --protocol {protocols[0]}"
    return Figure(name, caption, fig, pd.concat(frames, ignore_index=True), command)


def draw_curves(ax, panel: str) -> None:
    "The paper's curves of one panel of Figure 2."
    curves = figure2(panel)
    for i, (label, _) in enumerate(FIGURE2[panel][1]):
        mine = curves[curves.variant == label].sort_values("steps")
        ax.plot(mine.steps / 1000, mine.fid, "-", color=palette()[i], label=label)
        ax.plot(mine.steps.tail(1) / 1000, mine.fid.tail(1), "o", ms=6, color=palette()[i])
    ax.set(xlabel="thousand iterations", ylabel="FID, 10,000 samples")
    plain_log(ax.yaxis)
    ax.legend(fontsize=7, frameon=False)


def draw_figure2(ev: Evidence) -> list[Figure]:
    "Figure 2: the paper's curves, and the ends of our runs at each protocol."

    def variants(changes, protocol):
        return [(label[:3], variant_at(protocol, change)) for label, change in changes]

    panels = [
        (f"({p}) {title}", partial(draw_curves, panel=p), partial(variants, changes))
        for p, (title, changes) in FIGURE2.items()
    ]
    caption = (
        "Figure 2. Left: the paper's curves. Right: the ends of our runs, every seed a dot; the "
        "numbers below are those of the paper's legend."
    )
    return [side_by_side(ev, "figure2", caption, panels)]


def draw_notes(ax, panel: str) -> None:
    "What notes on the paper say about one panel of Figure 3."
    paper = load_paper("Figure 3", metric="FID")
    paper[["panel", "size"]] = paper.method.str.split(expand=True)
    mine = paper[paper.panel == panel].astype({"size": int}).sort_values("size")
    ax.plot(mine["size"].astype(str), mine.number, "o", mfc="white", color=GREY)
    ax.set(xlabel=f"{panel}, from notes of low confidence", ylabel="FID at 50K iterations")


def draw_figure3(ev: Evidence) -> list[Figure]:
    "Figure 3: depth, width and patch size."

    def variants(field, changes, protocol):
        here = getattr(PROTOCOLS[protocol].model, field)
        sizes = [int(here + c if field == "depth" else here * c) for c in changes]
        return [(str(v), "" if v == here else f"{field}={v}") for v in sizes]

    panels = [
        (panel, partial(draw_notes, panel=panel), partial(variants, *change))
        for panel, change in SIZES.items()
    ]
    caption = "Figure 3. Left: the paper. Right: the ends of our runs, every seed a dot."
    return [side_by_side(ev, "figure3", caption, panels)]


# ---- Representations and samples ----


def readable(read: Callable, record: Record):
    "What a file of a record holds; None where it is damaged, which `verify` names."
    try:
        return read(record)
    except Exception:
        return None


def cka_matrix(record: Record) -> np.ndarray | None:
    "The similarity of all tokens over all noise levels that chapter 09 kept; None without one."
    for path in sorted((record.folder / "stats").glob("cka-*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            settings, hsic = json.loads(str(arrays["settings"])), arrays["hsic"]
        tokens, levels = settings["tokens"], settings["levels"]
        if settings["noise_seed"] == 0 and "all" in tokens and None in levels:
            k = hsic[tokens.index("all"), levels.index(None)]
            return k / np.sqrt(np.outer(np.diag(k), np.diag(k)))
    return None


def draw_figure7(ev: Evidence) -> list[Figure]:
    "Figure 7: similarity of representations, a row for the paper and one for each scale and seed."
    rows = {"the paper": {name: figure7(name).to_numpy() for name in SETTINGS}}
    names = {variant: name for name, variant in SETTINGS.items()}
    for r in (r for protocol in ev.protocols for r in trained_alike(ev, protocol)):
        if r.label in names and (matrix := readable(cka_matrix, r)) is not None:
            e = r.experiment
            rows.setdefault(f"{SCALES[e.protocol]}, seed {e.seed}", {})[names[r.label]] = matrix
    fig, axes = subplots(len(rows), 3, (2.7, 2.7))
    fig.subplots_adjust(right=0.87, wspace=0.3)
    data = []
    for line, (scale, matrices) in zip(axes, rows.items(), strict=True):
        for ax, setting in zip(line, SETTINGS, strict=True):
            ax.set_title(f"{setting}\n{scale}", fontsize=8)
            ax.grid(False)
            if setting not in matrices:
                ax.set(xticks=[], yticks=[])
                ax.text(0.5, 0.5, "not run", ha="center", color=GREY, transform=ax.transAxes)
                continue
            layers = range(0, len(matrices[setting]), 3)
            ax.set(xticks=layers, yticks=layers)
            image = ax.imshow(matrices[setting], vmin=0, vmax=1, origin="lower", cmap="magma")
            frame = pd.DataFrame(matrices[setting]).stack().rename("cka").reset_index()
            data.append(frame.assign(scale=scale, setting=setting))
    fig.colorbar(image, cax=fig.add_axes((0.9, 0.4, 0.02, 0.2)), label="CKA")
    caption = (
        "Figure 7. Similarity (CKA) of the outputs of all layers, axes are layers; the first row "
        "is the paper's."
    )
    command = "papermill nbs/09_representations.ipynb out.ipynb -p protocol cpu"
    return [Figure("figure7", caption, fig, pd.concat(data, ignore_index=True), command)]


def first_images(record: Record) -> dict[str, np.ndarray]:  # images, and nearest where recorded
    "The first samples of a run."
    with np.load(record.folder / "first.npz", allow_pickle=False) as arrays:
        return {name: arrays[name][:12] for name in ("images", "nearest") if name in arrays}


def draw_samples(ev: Evidence, protocol: str) -> list[Figure]:
    "Samples of the same noise, one row per variant, and the nearest training images."
    shown = {variant_at(protocol, c) for _, variants in FIGURE2.values() for _, c in variants}
    rows, runs = {}, []
    for r in sorted(trained_alike(ev, protocol), key=lambda r: (r.experiment.seed, r.label)):
        name = r.label or "adopted"
        if r.label in shown and name not in rows and (images := readable(first_images, r)):
            rows[name] = images["images"]
            if not r.label and "nearest" in images:
                rows["nearest training image"] = images["nearest"]
            runs.append((name, r.experiment.seed, r.run_id))
    if not rows:
        return []
    fig, axes = subplots(len(rows), 1, (8, 0.8), left=1.9)
    fig.subplots_adjust(bottom=0.02, top=0.98, hspace=0.08)
    for ax, (name, images) in zip(axes.flat, rows.items(), strict=True):
        ax.imshow(np.concatenate(images.transpose(0, 2, 3, 1), axis=1).squeeze(), cmap="gray")
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    caption = (
        f"Samples after {PROTOCOLS[protocol].train.n_steps:,} steps, {SCALES[protocol]}: the same "
        "noise in every row; below the adopted model's, the training image nearest to each."
    )
    data = pd.DataFrame(runs, columns=["variant", "seed", "run_id"])
    return [Figure(f"samples_{protocol}", caption, fig, data)]


# ---- Effects ----


def draw_effects(protocol: str, effects: pd.DataFrame) -> list[Figure]:
    "The effects of the fixed list (`effect_rows`) with every seed, and in three bands of noise."
    if effects.empty:
        return []
    labels = effects.claim + "  " + effects.comparison
    names = list(dict.fromkeys(labels))
    y = labels.map(names.index)
    fig, [axes] = subplots(1, 2, (5.2, 1.2 + 0.32 * len(names)), left=3.1, sharey=True)
    fig.subplots_adjust(wspace=0.08)
    axes[0].hlines(y, 100 * effects.low, 100 * effects.high, color="black", lw=1.5)
    axes[0].plot(100 * effects.difference, y, "o", ms=6, color=palette()[0])
    axes[0].plot(100 * effects.threshold, y, "|", ms=16, mew=1.5, color=palette()[3])
    for i, band in enumerate(c for c in effects if c.startswith("log-SNR")):
        shifted = y + 0.2 * (i - 1)
        axes[1].plot(100 * effects[band], shifted, "o", color=palette()[i + 1], label=band)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set(xlabel="held-out loss, worse over better, log %", ylim=(len(names) - 0.5, -0.5))
    axes[1].set(xlabel="the same in three bands of noise, log %")
    axes[1].legend(fontsize=7, frameon=False)
    for ax in axes:
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xscale("symlog", linthresh=5)
        ax.margins(x=0.08)
        ax.xaxis.set_major_formatter("{x:g}")
    caption = (
        f"Effects of the fixed list, {SCALES[protocol]}: dots are seeds, lines 95 % intervals; "
        "right of the red mark is the paper's side."
    )
    return [Figure(f"effects_{protocol}", caption, fig, effects)]


def draw_running(ev: Evidence, protocol: str) -> list[Figure]:
    "The running difference of paired training losses, one figure per length of training."
    found = ev.differences[ev.differences.protocol == protocol].sort_values(["variant", "seed"])
    figures = []
    for steps, group in found.drop_duplicates("run_id").groupby("steps"):
        curves = []
        for r in group.itertuples():
            logs = (ev.records[run_id].training_log() for run_id in (r.run_id, r.adopted_id))
            curve = paired_difference(*logs, window=max(250, steps // 20))
            curve = curve[curve.step >= steps // 6].assign(variant=r.variant, seed=r.seed)
            curves.append(curve.assign(percent=100 * curve.difference, error=196 * curve.se))
        data = pd.concat(curves, ignore_index=True)
        variants = list(dict.fromkeys(data.variant))
        fig, axes = subplots(-(-len(variants) // 4), min(4, len(variants)), (3.1, 2.4))
        for ax in axes.flat[len(variants) :]:
            ax.remove()
        for ax, variant in zip(axes.flat, variants, strict=False):
            for i, (seed, curve) in enumerate(data[data.variant == variant].groupby("seed")):
                ax.plot(curve.step, curve.percent, color=palette()[i], lw=1.2, label=f"seed {seed}")
                low, high = curve.percent - curve.error, curve.percent + curve.error
                ax.fill_between(curve.step, low, high, color=GREY, alpha=0.2, lw=0)
            ax.axhline(0, color="black", lw=0.8)
            ax.set_title(variant, fontsize=9)
            ax.set(xlabel="step", ylabel="over adopted, log %")
            ax.legend(fontsize=7, frameon=False)
        caption = (
            f"Training loss against the adopted model on the same data and noise, {steps:,} steps, "
            f"{SCALES[protocol]}; above 0 the adopted model is better, grey is the 95 % band. The "
            "first sixth of the steps is left out."
        )
        figures.append(Figure(f"running_{protocol}_{steps}", caption, fig, data))
    return figures
