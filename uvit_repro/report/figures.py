"""The figures of the report: the paper's panel and ours side by side, one scale per panel."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from uvit_repro.config import PROTOCOLS, experiment, main_metric
from uvit_repro.paper.claims import fixed_list
from uvit_repro.paper.numbers import FIGURE2, figure2, figure7, load_paper
from uvit_repro.report.evidence import (
    SCALES,
    Evidence,
    Record,
    band_differences,
    has_list,
    variant_label,
)
from uvit_repro.report.statistics import Verdict, paired_difference

SETTINGS = {"concatenation": "", "addition": "skip=add", "no long skip": "skip=none"}  # of Figure 7
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
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    return sns.color_palette("colorblind")


def subplots(rows: int, columns: int, size: tuple[float, float], **options):
    "A grid of axes, `size` inches each."
    import matplotlib.pyplot as plt

    palette()
    figsize = (size[0] * columns, size[1] * rows)
    return plt.subplots(
        rows, columns, figsize=figsize, squeeze=False, layout="constrained", **options
    )


def plain(text: str) -> str:
    "Text without mathematics, for labels that come from records."
    return text.replace("$", r"\$")


def measure_of(protocol: str) -> str:
    "What is compared at a protocol: the measure of its fixed list, else its distance."
    return (
        fixed_list(protocol)["measure"] if has_list(protocol) else main_metric(PROTOCOLS[protocol])
    )


def measure_words(metric: str) -> str:
    "A measure as an axis names it."
    known = {"heldout_loss": "held-out loss", "fid": "FID"}
    return known.get(metric, "Fréchet distance" if metric.startswith("fd_") else metric)


def endpoints(ev: Evidence, protocol: str) -> pd.DataFrame:  # variant, seed, value, run_id
    "The last measurement of every run that has the protocol's length and data."
    base = PROTOCOLS[protocol]
    rows = []
    for r in ev.at(protocol):
        e = r.experiment
        if (e.train, e.data.dataset) == (base.train, base.data.dataset):
            label = variant_label(e.model, base.model)
            rows.append((label, e.seed, r.value(measure_of(protocol)), r.run_id))
    frame = pd.DataFrame(rows, columns=["variant", "seed", "value", "run_id"])
    return frame.dropna().sort_values("seed", ignore_index=True)


def draw_endpoints(
    ax,
    points: pd.DataFrame,  # of `endpoints`
    variants: list[tuple[str, str]],  # (label of the axis, variant)
    protocol: str,
):
    "Every seed a dot, in the colour of its variant; a grey line joins the runs of one seed."
    found = points[points.variant.isin([v for _, v in variants])]
    position = {v: i for i, (_, v) in enumerate(variants)}
    for _, group in found.groupby("seed"):
        group = group.assign(x=group.variant.map(position)).sort_values("x")
        ax.plot(group.x, group.value, "-", color=GREY, lw=0.8, zorder=1)
    for i, (_, variant) in enumerate(variants):
        values = found[found.variant == variant].value
        ax.plot([i] * len(values), values, "o", ms=6, color=palette()[i % 10], zorder=2)
        if values.empty:
            ax.text(i, 0.04, "not run", rotation=90, color=GREY, fontsize=8, ha="center",
                    va="bottom", transform=ax.get_xaxis_transform())  # fmt: skip
    ax.set_xticks(range(len(variants)), [label for label, _ in variants], fontsize=8)
    ax.set(xlim=(-0.5, len(variants) - 0.5), ylabel=measure_words(measure_of(protocol)))
    if protocol == "laptop":
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="y", which="minor", labelsize=7)


def draw_figure2(ev: Evidence) -> Figure:
    "Figure 2: the paper's curves, and the ends of our runs at each protocol."
    protocols = ev.protocols or ["cpu"]
    fig, axes = subplots(len(FIGURE2), 1 + len(protocols), (4.2, 2.7))
    points = {p: endpoints(ev, p) for p in protocols}
    data = [figure2().assign(scale="paper").drop(columns="overrides")]
    for row, (panel, (title, variants)) in zip(axes, FIGURE2.items(), strict=True):
        curves = figure2(panel)
        for i, (label, _) in enumerate(variants):
            mine = curves[curves.variant == label].sort_values("steps")
            row[0].plot(mine.steps / 1000, mine.fid, "-", color=palette()[i], label=label)
            row[0].plot(mine.steps.tail(1) / 1000, mine.fid.tail(1), "o", ms=6, color=palette()[i])
        row[0].set(yscale="log", xlabel="thousand iterations", ylabel="FID, 10,000 samples")
        row[0].set_title(f"({panel}) {title}: paper")
        row[0].yaxis.set_major_formatter("{x:g}")
        row[0].yaxis.set_minor_formatter("{x:g}")
        row[0].legend(fontsize=7, frameon=False)
        for ax, protocol in zip(row[1:], protocols, strict=True):
            ours = [
                (
                    label[:3],
                    variant_label(experiment(protocol, **change).model, PROTOCOLS[protocol].model),
                )
                for label, change in variants
            ]
            draw_endpoints(ax, points[protocol], ours, protocol)
            ax.set_title(f"({panel}) ours: {SCALES[protocol]}")
    data += [points[p].assign(scale=p, measure=measure_of(p)) for p in protocols]
    caption = "Figure 2. Left: the paper's curves. Right: the ends of our runs, every seed a dot."
    command = f"uvit-repro run fig2 --protocol {protocols[0]}"
    return Figure("figure2", caption, fig, pd.concat(data, ignore_index=True), command)


def draw_figure3(ev: Evidence) -> Figure:
    "Figure 3: depth, width and patch size."
    protocols = ev.protocols or ["cpu"]
    paper = load_paper("Figure 3", metric="FID")
    paper[["panel", "size"]] = paper.method.str.split(expand=True)
    sizes = {"depth": ("depth", [-4, 0, 4]), "width": ("embed_dim", [0.5, 1, 1.5]),
             "patch": ("patch_size", [0.5, 1, 2])}  # fmt: skip
    fig, axes = subplots(3, 1 + len(protocols), (4.2, 2.7))
    data = [paper[["panel", "size", "number", "confidence"]].assign(scale="paper")]
    for row, (panel, (field, changes)) in zip(axes, sizes.items(), strict=True):
        mine = paper[paper.panel == panel].astype({"size": int}).sort_values("size")
        row[0].plot(mine["size"].astype(str), mine.number, "o", mfc="white", color=GREY)
        row[0].set(xlabel=panel, ylabel="FID at 50K iterations")
        row[0].set_title(f"{panel}: paper, from notes (low confidence)")
        for ax, protocol in zip(row[1:], protocols, strict=True):
            here = getattr(PROTOCOLS[protocol].model, field)
            ours = [int(here + c if field == "depth" else here * c) for c in changes]
            variants = [(str(v), "" if v == here else f"{field}={v}") for v in ours]
            draw_endpoints(ax, endpoints(ev, protocol), variants, protocol)
            ax.set(xlabel=panel)
            ax.set_title(f"{panel}, ours: {SCALES[protocol]}")
    data += [endpoints(ev, p).assign(scale=p, measure=measure_of(p)) for p in protocols]
    caption = "Figure 3. Left: the paper. Right: the ends of our runs, every seed a dot."
    return Figure("figure3", caption, fig, pd.concat(data, ignore_index=True))


def cka_matrix(record: Record) -> np.ndarray | None:
    "The similarity of all tokens over all noise levels that chapter 09 kept; None without one."
    for path in sorted((record.folder / "stats").glob("cka-*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            settings, hsic = json.loads(str(arrays["settings"])), arrays["hsic"]
        if (
            settings["noise_seed"] == 0
            and "all" in settings["tokens"]
            and None in settings["levels"]
        ):
            k = hsic[settings["tokens"].index("all"), settings["levels"].index(None)]
            return k / np.sqrt(np.outer(np.diag(k), np.diag(k)))
    return None


def draw_figure7(ev: Evidence) -> Figure:
    "Figure 7: similarity of representations, a row for the paper and one for each scale and seed."
    rows = {"paper": {name: figure7(name).to_numpy() for name in SETTINGS}}
    for protocol in ev.protocols:
        base = PROTOCOLS[protocol].model
        for r in ev.at(protocol):
            label = variant_label(r.experiment.model, base)
            if r.experiment.train == PROTOCOLS[protocol].train and label in SETTINGS.values():
                matrix = cka_matrix(r)
                name = f"{SCALES[protocol]}, seed {r.experiment.seed}"
                setting = next(k for k, v in SETTINGS.items() if v == label)
                if matrix is not None:
                    rows.setdefault(name, {})[setting] = matrix
    fig, axes = subplots(len(rows), 3, (2.6, 2.5))
    data = []
    for line, (name, matrices) in zip(axes, rows.items(), strict=True):
        for ax, setting in zip(line, SETTINGS, strict=True):
            ax.set_title(f"{setting}\n{name}", fontsize=8)
            ax.grid(False)
            if setting not in matrices:
                ax.text(0.5, 0.5, "not run", ha="center", color=GREY, transform=ax.transAxes)
                continue
            matrix = matrices[setting]
            image = ax.imshow(matrix, vmin=0, vmax=1, origin="lower", cmap="magma")
            i, j = np.indices(matrix.shape).reshape(2, -1)
            frame = {"scale": name, "setting": setting, "layer": i, "other": j}
            data.append(pd.DataFrame(frame | {"cka": matrix.ravel()}))
    fig.colorbar(image, ax=axes, shrink=0.5, label="CKA")
    caption = (
        "Figure 7. Similarity (CKA) of the outputs of all layers; the first row is the paper's."
    )
    return Figure("figure7", caption, fig, pd.concat(data, ignore_index=True))


def draw_samples(ev: Evidence, protocol: str) -> Figure | None:
    "Samples of the same noise, one row per variant, and the nearest training images."
    base = PROTOCOLS[protocol]
    changes = [change for _, variants in FIGURE2.values() for _, change in variants]
    shown = {
        variant_label(experiment(protocol, **c).model, base.model) or "adopted" for c in changes
    }
    rows, runs = {}, []
    for r in sorted(ev.at(protocol), key=lambda r: (r.experiment.seed, r.run_id)):
        label = variant_label(r.experiment.model, base.model) or "adopted"
        path = r.folder / "first.npz"
        alike = (r.experiment.train, r.experiment.data.dataset) == (base.train, base.data.dataset)
        if not alike or label not in shown - set(rows) or not path.is_file():
            continue
        with np.load(path, allow_pickle=False) as arrays:
            rows[label] = arrays["images"][:12]
            if label == "adopted" and "nearest" in arrays:
                rows["nearest training image"] = arrays["nearest"][:12]
        runs.append((label, r.experiment.seed, r.run_id))
    if not rows:
        return None
    first = ["adopted", "nearest training image"]
    names = [n for n in first if n in rows] + sorted(set(rows) - set(first))
    fig, axes = subplots(len(names), 1, (8, 0.72))
    for ax, name in zip(axes.flat, names, strict=True):
        ax.imshow(np.concatenate(rows[name].transpose(0, 2, 3, 1), axis=1).squeeze(), cmap="gray")
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_ylabel(plain(name), rotation=0, ha="right", va="center", fontsize=8)
    steps = f"{base.train.n_steps:,} steps"
    caption = (
        f"Samples after {steps}, {SCALES[protocol]}: the same noise in every row. "
        "The second row shows the training image nearest to each sample of the first."
    )
    data = pd.DataFrame(runs, columns=["variant", "seed", "run_id"])
    return Figure(f"samples_{protocol}", caption, fig, data)


def draw_effects(protocol: str, verdicts: list[Verdict], values: pd.DataFrame) -> Figure | None:
    "The effects of the fixed list with every seed, and the same in three bands of noise."
    shown = [(v, e) for v in verdicts for e in v.effects if e.differences]
    if not shown:
        return None
    fig, axes = subplots(1, 2, (5.2, 1.2 + 0.32 * len(shown)), sharey=True)
    axes = axes[0]
    data = []
    for y, (verdict, e) in enumerate(shown):
        percent = 100 * np.array(list(e.differences.values()))
        axes[0].plot([100 * e.low, 100 * e.high], [y, y], "-", color="black", lw=1.5)
        axes[0].plot(percent, [y] * len(percent), "o", ms=6, color=palette()[0])
        axes[0].plot(
            [100 * e.comparison.threshold] * 2, [y - 0.4, y + 0.4], "-", color=palette()[3]
        )
        bands = band_differences(e, values, fixed_list(protocol)["step"])
        for i, (band, by_seed) in enumerate(bands.items()):
            found = 100 * np.array(list(by_seed.values()))
            axes[1].plot(found, [y + 0.2 * (i - 1)] * len(found), "o", ms=5, color=palette()[i + 1],
                         label=band if y == 0 else None)  # fmt: skip
        for seed, difference in e.differences.items():
            row = {"claim": verdict.id, "better": e.comparison.better, "worse": e.comparison.worse}
            row |= {"seed": seed, "difference": difference, "low": e.low, "high": e.high}
            data.append(row | {band: d.get(seed) for band, d in bands.items()})
    names = [f"{v.id}  {effect_name(e)}" for v, e in shown]
    axes[0].set_yticks(range(len(shown)), names, fontsize=8)
    axes[0].set(xlabel="held-out loss, worse over better, %")
    axes[1].set(xlabel="the same in three bands of noise, %")
    axes[1].legend(fontsize=7, frameon=False)
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    for ax in axes:
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xscale("symlog", linthresh=5)
        ax.xaxis.set_major_formatter("{x:g}")
    caption = f"Effects of the fixed list, {SCALES[protocol]}: dots are seeds, lines 95 % intervals; right of red is the paper's side."
    return Figure(f"effects_{protocol}", caption, fig, pd.DataFrame(data))


def effect_name(effect) -> str:
    "A comparison in a few words."
    c = effect.comparison
    return f"{c.worse} against {c.better}" + (", equal time" if c.steps else "")


def draw_running(ev: Evidence, protocol: str) -> list[Figure]:
    "The running difference of paired training losses, one figure per length of training."
    found = ev.differences[ev.differences.protocol == protocol].drop_duplicates("run_id")
    figures = []
    for steps, group in found.groupby("steps"):
        variants = sorted(group.variant.unique())
        columns = min(4, len(variants))
        fig, axes = subplots(-(-len(variants) // columns), columns, (3.2, 2.4), sharex=True)
        data = []
        for ax, variant in zip(axes.flat, variants, strict=False):
            runs = group[group.variant == variant].sort_values("seed")
            for colour, r in zip(palette(), runs.itertuples(), strict=False):
                logs = (ev.records[i].training_log() for i in (r.run_id, r.adopted_id))
                curve = paired_difference(*logs, window=max(250, steps // 20))
                ax.plot(curve.step, 100 * curve.difference, color=colour, label=f"seed {r.seed}")
                band = [100 * (curve.difference + s * 1.96 * curve.se) for s in (-1, 1)]
                ax.fill_between(curve.step, *band, color=colour, alpha=0.2, lw=0)
                data.append(curve.assign(variant=variant, seed=r.seed))
            ax.axhline(0, color="black", lw=0.8)
            ax.set_title(plain(variant), fontsize=9)
            ax.legend(fontsize=7, frameon=False)
        for ax in axes.flat[len(variants) :]:
            ax.set_visible(False)
        fig.supxlabel("step", fontsize=9)
        fig.supylabel("training loss over adopted, %", fontsize=9)
        caption = (
            f"Training loss against the adopted model on the same data and noise, {steps:,} steps, "
            f"{SCALES[protocol]}; above 0 the adopted model is better."
        )
        figures.append(Figure(f"running_{protocol}_{steps}", caption, fig, pd.concat(data)))
    return figures


def save(
    drawn: Figure,
    target: Path,  # folder
    suffixes=("png", "svg", "csv"),
) -> Path:  # the picture
    "Write a figure and its data."
    import matplotlib.pyplot as plt

    for suffix in suffixes:
        path = target / f"{drawn.name}.{suffix}"
        if suffix == "csv":
            drawn.data.to_csv(path, index=False)
        else:
            drawn.figure.savefig(path, dpi=110, metadata={"Date": None} if suffix == "svg" else {})
    plt.close(drawn.figure)
    return target / f"{drawn.name}.png"
