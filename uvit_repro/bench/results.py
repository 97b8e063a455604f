"""The record of a benchmark: written as it comes, read by the report."""

import json
import re
import shutil
import time
import warnings
from pathlib import Path

import pandas as pd

from uvit_repro.data.files import write_atomic, write_json
from uvit_repro.runs.records import published_root, runs_root
from uvit_repro.runs.timing import Spread

BENCH_COLUMNS = ["what", "model", "img_size", "in_chans", "batch", "precision", "attention"]
BENCH_COLUMNS += ["compile", "impl", "option", "metric", "value", "unit", "low", "high"]
BENCH_COLUMNS += ["min", "max", "repeats", "note"]
NUMBERS = ("img_size", "in_chans", "batch", "value", "low", "high", "min", "max", "repeats")
SPEED_COLUMNS = {  # metric: column of `speed_table`
    "seconds": "time",
    "images_per_second": "images per second",
    "mfu": "share of matrix rate",
    "peak_memory": "memory",
    "speedup": "over released code",
}


def bench_row(
    columns: dict,  # that name what was measured
    metric: str,
    value,  # a number, a Spread, or None with the reason in the column `note`
    unit: str,
    **more,  # further columns
) -> dict:  # one line of bench.csv
    "One measurement."
    row = {**columns, "metric": metric, "unit": unit, "value": value, **more}
    if isinstance(value, Spread):
        row.update(value=value.median, low=value.low, high=value.high)
        row.update(min=value.min, max=value.max, repeats=value.n)
    if row["value"] is None and not row.get("note"):
        raise ValueError(f"{metric}: a measurement without a value needs a note that says why")
    if extra := set(row) - set(BENCH_COLUMNS):
        raise ValueError(f"bench.csv has no column {', '.join(sorted(extra))}")
    return row


class Record:
    "The folder of one benchmark: complete on disk up to the last finished repetition."

    def __init__(
        self,
        info: dict,  # for bench.json; `machine` names the folder
        out_dir=None,  # folder of runs
    ):
        name = re.sub("[^a-z0-9]+", "-", info["machine"].lower()).strip("-")
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.folder = runs_root(out_dir) / f"bench-{name}-{stamp}"
        self.folder.mkdir(parents=True)
        self.jobs, self.start = {}, time.perf_counter()
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.info = {**info, "status": "running", "started": started, "error": None}
        self.info.update(times={}, left=[], errors={})
        self.write()

    @property
    def rows(self) -> list:
        return [row for rows in self.jobs.values() for row in rows]

    def put(self, job: str, rows: list, times: dict) -> None:
        "Write a job's rows, in place of those that it had."
        self.jobs[job] = rows
        self.info["times"].update({f"{job} {name}": list(v) for name, v in times.items()})
        self.write()

    def write(self, **info) -> None:
        "Write the record, with more about the run."
        self.info.update(info, seconds=time.perf_counter() - self.start)

        table = pd.DataFrame(self.rows, columns=BENCH_COLUMNS, dtype=object)
        write_atomic(self.folder / "bench.csv", lambda path: table.to_csv(path, index=False))
        write_json(self.folder / "bench.json", self.info)


def read_bench(folder: Path):  # DataFrame
    "One recorded benchmark. Older records called the attention path `math` `matrix`."
    info = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    texts = {name: str for name in BENCH_COLUMNS if name not in NUMBERS}
    df = pd.read_csv(folder / "bench.csv", dtype=texts).fillna(dict.fromkeys(texts, ""))
    about = {k: info.get(k, "") for k in ("machine", "device", "started", "status")}
    return df.assign(attention=df.attention.replace("matrix", "math"), folder=str(folder), **about)


def load_bench(
    origin: str = "all",  # runs | published | all
    out_dir=None,  # another folder of runs
):  # DataFrame: BENCH_COLUMNS and origin, folder, machine, device, started, status
    "Every recorded benchmark; one that was published is read from this machine's runs, if there."
    if origin not in ("runs", "published", "all"):
        raise ValueError(f"origin = {origin!r}: allowed are runs, published, all")
    frames = {}
    for name, root in {"runs": runs_root(out_dir), "published": published_root()}.items():
        for path in sorted(root.glob("bench-*/bench.csv")) if origin in (name, "all") else ():
            folder = path.parent
            if folder.name in frames:
                continue
            try:
                frames[folder.name] = read_bench(folder).assign(origin=name)
            except Exception as e:
                text = f"{folder} can't be read ({type(e).__name__}); it is left out"
                warnings.warn(text, stacklevel=2)
    columns = [*BENCH_COLUMNS, "folder", "machine", "device", "started", "status", "origin"]
    frames = [f for f in frames.values() if len(f)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def newest(
    df,  # of `load_bench`
):  # DataFrame
    "The last measurement of each thing on each machine, without those of the tiny model."
    key = ["machine", "what", "model", "batch", "precision", "impl", "option", "metric"]
    real = df[df.model != "tiny"].sort_values("started")
    return real.drop_duplicates(key, keep="last").reset_index(drop=True)


def publish_bench(
    folder: Path,  # of a benchmark that finished, was stopped, or was killed
) -> Path:  # the committed copy
    "Copy a benchmark's record to results/published. Raises `ValueError` for one that failed."
    folder, target = Path(folder), published_root() / Path(folder).name
    info = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    if info["status"] == "failed":
        raise ValueError(f"{folder.name} failed ({info['error']}): it is not evidence")
    write_atomic(target / "bench.csv", lambda p: shutil.copyfile(folder / "bench.csv", p))
    status = "ok" if info["status"] == "ok" else "stopped"
    write_json(target / "bench.json", {**info, "status": status})
    return target


def human(
    value: float,
    unit: str,  # as in bench.csv
) -> str:
    "A measurement with its unit."
    forms = {
        "s": f"{value:.3g} s",
        "bytes": f"{value / 1e9:.2f} GB",
        "of the matrix rate": f"{100 * value:.0f} %",
        "x": f"{value:.2f}x",
    }
    return forms.get(unit, f"{value:.3g}{' %' * unit.startswith('%')}")


def row_line(row: dict) -> str:
    "A row for the reader."
    text = " ".join(row.get(n, "") for n in ("impl", "precision", "option", "metric", "note"))
    quartiles = f" [{row['low']:.3g}, {row['high']:.3g}]" if "low" in row else ""
    value = "" if row["value"] is None else human(row["value"], row["unit"])
    return f"  {' '.join(text.split())}: {value}{quartiles}"


def speed_table(
    df,  # of `newest`
):  # DataFrame: one row per machine, model, batch, precision
    "Times of ours, ratio to the released code with its quartiles, share of the ceiling, memory."
    ablated = set(df.option[df.metric.isin(["worth", "cost"])])
    ours = df[df.what.isin(["train", "sample"]) & (df.impl == "ours") & df.value.notna()]
    ours = ours[~ours.option.str.removesuffix(": without it").isin(ablated)]
    shown = ours.assign(text=[human(r.value, r.unit) for r in ours.itertuples()])
    spreads = [f" [{r.low:.2f}, {r.high:.2f}]" for r in ours.itertuples()]
    shown["text"] += pd.Series(spreads, ours.index).where(ours.metric == "speedup", "")
    key = ["machine", "what", "model", "option", "batch", "precision"]
    table = shown.pivot_table("text", key, "metric", "first", sort=False)
    table = table.reindex(columns=list(SPEED_COLUMNS)).rename(columns=SPEED_COLUMNS)
    ratio = SPEED_COLUMNS["speedup"]
    table[ratio] = table[ratio].fillna("not run: --peer DIR")
    seconds = shown[shown.metric == "seconds"].set_index(key)
    table["benchmark"] = seconds.folder.map(lambda folder: Path(folder).name)
    table = table.assign(note=seconds.note).fillna("-").reset_index().rename_axis(columns=None)
    return table.astype({"batch": int})
