"""Recorded benchmarks: their rows, and the table that the report shows."""

import json
import shutil
import warnings
from pathlib import Path

import pandas as pd

from uvit_repro.runs.records import published_root, runs_root
from uvit_repro.runs.timing import Spread

TEXTS = ["what", "model", "precision", "attention", "compile", "impl", "option", "note"]
TEXTS += ["metric", "unit"]
NUMBERS = ["batch", "value", "low", "high", "min", "max", "repeats"]
SPEED_COLUMNS = {  # metric: column of `speed_table`, factor, format
    "seconds": ("time", 1, "{:.3g} s"),
    "images_per_second": ("images per second", 1, "{:.3g}"),
    "mfu": ("share of matrix rate", 100, "{:.0f} %"),
    "peak_memory": ("memory", 1e-9, "{:.2f} GB"),
    "speedup": ("over released code", 1, "{:.2f}x [{:.2f}, {:.2f}]"),
}


def bench_row(
    columns: dict,  # that name what was measured
    metric: str,
    value,  # a number or a Spread
    unit: str,
) -> dict:  # one line of bench.csv
    "One measurement."
    row = {**columns, "metric": metric, "unit": unit, "value": value}
    if isinstance(value, Spread):
        row.update(value=value.median, low=value.low, high=value.high)
        row.update(min=value.min, max=value.max, repeats=value.n)
    return row


def read_bench(folder: Path) -> pd.DataFrame:
    "One recorded benchmark. Older records called the attention path `math` `matrix`."
    info = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    df = pd.read_csv(folder / "bench.csv", dtype=dict.fromkeys(TEXTS, str))
    df = df.fillna(dict.fromkeys(TEXTS, "")).replace({"attention": {"matrix": "math"}})
    about = {name: info.get(name, "") for name in ("machine", "device", "started", "status")}
    return df.assign(folder=str(folder), **about)


def load_bench(
    out_dir=None,  # another folder of runs
) -> pd.DataFrame:  # TEXTS, NUMBERS and folder, machine, device, started, status
    "Every recorded benchmark, published or from this machine's runs."
    frames = [pd.DataFrame(columns=[*TEXTS, *NUMBERS, "folder", "machine", "started"])]
    found = [*published_root().glob("bench-*"), *runs_root(out_dir).glob("bench-*")]
    for folder in {path.name: path for path in found}.values():
        try:
            frames.append(read_bench(folder))
        except Exception as e:
            text = f"{folder} can't be read ({type(e).__name__}); it is left out"
            warnings.warn(text, stacklevel=2)
    return pd.concat(frames[1:] or frames, ignore_index=True)


def newest(
    df: pd.DataFrame,  # of `load_bench`
) -> pd.DataFrame:
    "The last measurement of each thing on each machine, without those of the tiny model."
    key = ["machine", "what", "model", "batch", "precision", "impl", "option", "metric"]
    real = df[df.model != "tiny"].sort_values("started")
    return real.drop_duplicates(key, keep="last").reset_index(drop=True)


def publish_bench(
    folder: Path,  # of a benchmark that finished, was stopped, or was killed
) -> Path:  # the committed copy
    "Copy a benchmark's record to results/published. Raises `ValueError` for one that failed."
    info = json.loads((Path(folder) / "bench.json").read_text(encoding="utf-8"))
    if info["status"] == "failed":
        raise ValueError(f"{folder} failed ({info['error']}): it is not evidence")
    target = published_root() / Path(folder).name
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def speed_table(
    df: pd.DataFrame,  # of `newest`
) -> pd.DataFrame:  # one row per machine, model, batch, precision
    "Times of ours, ratio to the released code with its quartiles, share of the ceiling, memory."
    ablated = set(df.option[df.metric.isin(["worth", "cost"])])
    shown = df[df.what.isin(["train", "sample"]) & (df.impl == "ours") & df.value.notna()]
    shown = shown[~shown.option.str.removesuffix(": without it").isin(ablated)]
    key, rows = ["machine", "what", "model", "option", "batch", "precision"], []
    for values, group in shown.groupby(key, sort=False):
        row = dict(zip(key, values, strict=True))
        found = {r.metric: (r.value, r.low, r.high) for r in group.itertuples()}
        for metric, (column, factor, form) in SPEED_COLUMNS.items():
            numbers = [factor * v for v in found.get(metric, ())]
            row[column] = form.format(*numbers) if numbers else "-"
        timed = group[group.metric == "seconds"].iloc[0]
        rows.append({**row, "benchmark": Path(timed.folder).name, "note": timed.note})
    return pd.DataFrame(rows)
