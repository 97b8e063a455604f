"""Read the records and work out what they say about the paper's claims."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from uvit_repro.config import (
    PROTOCOLS,
    Experiment,
    ModelConfig,
    ParameterError,
    eval_id,
    experiment,
    from_dict,
    main_metric,
)
from uvit_repro.paper.claims import arm_experiment, fixed_list
from uvit_repro.report.statistics import Claim, Comparison, Effect, Verdict, judge
from uvit_repro.runs.records import current_metric_name, published_root, runs_root

SCALES = {  # protocol: what its numbers are about; in the order of the report
    "cpu": "CIFAR-10, small model, CPU",
    "gpu": "CIFAR-10, S/2, one GPU",
    "paper": "the paper's settings",
    "laptop": "digits, 8x8 pixels",
}
ARMS = {"none": "no long skip", "add": "plain sum", "adaln": "AdaLN"}  # where the name is short


@dataclass(frozen=True)
class Record:
    "One finished run as it was recorded."

    folder: Path
    origin: str  # this machine | published
    info: dict  # run.json
    experiment: Experiment
    measurements: tuple[dict, ...]  # rows of measurements.csv that hold a number
    machine: str  # that computed the run

    @property
    def run_id(self) -> str:
        "Name of the run and of its folder."
        return self.folder.name

    @property
    def label(self) -> str:
        "What distinguishes the model from the adopted one of its protocol; empty for that one."
        return variant_label(self.experiment.model, PROTOCOLS[self.experiment.protocol].model)

    def value(
        self,
        metric: str,  # as in measurements.csv
        step: int | None = None,  # of training; None: the last
    ) -> float:  # NaN without a measurement
        "The value of the evaluation that the run's own experiment names."
        e = self.experiment
        step = e.train.n_steps if step is None else step
        wanted = eval_id(e, step, 0 if metric == "heldout_loss" else e.evaluation.num_samples)
        rows = [r for r in self.measurements if (r["metric"], r["eval_id"]) == (metric, wanted)]
        return next((r["value"] for r in rows if r["step"] == step), np.nan)

    @property
    def loss_steps(self) -> list[int]:
        "The steps at which the held-out loss was measured."
        return sorted({r["step"] for r in self.measurements if r["metric"] == "heldout_loss"})

    def loss_by_level(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        "Log-SNR and held-out loss of each noise level; `ValueError` if they contradict the value."
        path = self.folder / "stats" / f"{eval_id(self.experiment, step, 0)}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            log_snr, loss = 2 * arrays["lam"], arrays["loss"]
        if not np.isclose(loss.mean(), self.value("heldout_loss", step), rtol=1e-9):
            raise ValueError(f"{path.name}: the recorded loss at step {step} is not its mean")
        return log_snr, loss

    def training_log(self) -> pd.DataFrame:
        "The training loss, columns step and loss; empty without a log."
        path, columns = self.folder / "log.csv", ["step", "loss"]
        return pd.read_csv(path)[columns] if path.is_file() else pd.DataFrame(columns=columns)


def read_record(folder: Path, origin: str) -> Record | None:  # None: unfinished, or of smoke
    "Read one run; an exception says why it can't be used."
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if info["status"] != "ok" or info["experiment"]["protocol"] == "smoke":
        return None
    e = from_dict(info["experiment"])
    if not folder.name == info["run_id"] == e.run_id:
        raise ValueError(f"the folder holds another run: {e.run_id}")
    if e.protocol not in SCALES:
        raise ValueError(f"protocol = {e.protocol!r}: allowed are {', '.join(SCALES)}")
    text = (folder / "measurements.csv").read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["status"] == "ok"]
    for row in rows:
        row |= {"step": int(row["step"]), "value": float(row["value"])}
        if row["run_id"] != e.run_id or not np.isfinite(row["value"]):
            raise ValueError("measurements.csv holds another run or a value that is no number")
        row["metric"] = current_metric_name(row["metric"])
    if len({(row["metric"], row["eval_id"]) for row in rows}) < len(rows):
        raise ValueError("measurements.csv holds a measurement twice")
    for check in info.get("certificate") or ():
        check |= {name: float(check[name]) for name in ("difference", "tolerance")}
    info["wall_seconds"] = float(info.get("wall_seconds", "nan"))
    made = info.get("conditions", {})
    machine = made.get("gpu") or made.get("cpu") or "unknown machine"
    machine = f"{machine}, torch {made.get('versions', {}).get('torch', '?')}"
    record = Record(folder, origin, info, e, tuple(rows), machine)
    record.training_log().astype(float)  # can it be read?
    return record


@dataclass(frozen=True)
class Evidence:
    "The records that a report is made from."

    records: dict[str, Record]  # by run id
    refused: tuple[tuple[str, str], ...]  # (folder, why) of damaged and foreign records

    @property
    def protocols(self) -> list[str]:
        "The protocols that have records, in the order of the report."
        have = {r.experiment.protocol for r in self.records.values()}
        return [p for p in SCALES if p in have]

    def at(self, protocol: str) -> list[Record]:
        "The records of one protocol."
        return [r for r in self.records.values() if r.experiment.protocol == protocol]

    @cached_property
    def differences(self) -> pd.DataFrame:
        "The log ratio of each run to the adopted model with the same data, training and seed."
        rows = []
        for r in self.records.values():
            e = r.experiment
            try:
                adopted = self.records.get(replace(e, model=PROTOCOLS[e.protocol].model).run_id)
            except ParameterError:  # these data do not fit the adopted model
                continue
            for measure in ("heldout_loss", main_metric(e)) if adopted and r.label else ():
                value, reference = r.value(measure), adopted.value(measure)
                if value > 0 and reference > 0:
                    row = {"protocol": e.protocol, "variant": r.label, "steps": e.train.n_steps}
                    row |= {"seed": e.seed, "measure": measure, "run_id": r.run_id}
                    difference = np.log(value / reference)
                    rows.append(row | {"difference": difference, "adopted_id": adopted.run_id})
        columns = ["protocol", "variant", "steps", "seed", "measure", "difference", "run_id"]
        return pd.DataFrame(rows, columns=[*columns, "adopted_id"])


def read_evidence(
    origin: str = "all",  # runs | published | all
    out_dir=None,  # folder of this machine's runs; None: results/runs
) -> Evidence:
    "Read every record once; a run that is in both places is taken from this machine."
    roots = {"runs": runs_root(out_dir), "published": published_root()}
    records, refused = {}, []
    for name, root in roots.items():
        paths = sorted(root.glob("*/run.json")) if origin in (name, "all") else []
        for folder in (path.parent for path in paths):
            try:
                record = read_record(folder, "this machine" if name == "runs" else name)
            except Exception as error:  # a damaged record is named and does not stop the report
                refused.append((folder.name, f"{type(error).__name__}: {error}"[:300]))
                continue
            if record:
                records.setdefault(folder.name, record)
    return Evidence(records, tuple(refused))


# ---- The fixed list ----


def has_list(protocol: str) -> bool:
    "Whether claims of this protocol were fixed before their runs."
    try:
        return bool(fixed_list(protocol))
    except ParameterError:
        return False


def pairs_of(claim: dict) -> list[tuple[str, str]]:
    "The pairs (better, worse) of a claim of the fixed list."
    if claim["kind"] == "best_of":
        return [(claim["best"], other) for other in claim["others"]]
    if claim["kind"] == "no_gain":
        return [(claim["from"], claim["to"])]
    return [(claim["better"], claim["worse"])]


def listed_claims(protocol: str) -> list[Claim]:
    "The fixed list as claims of `statistics`."
    entry, out, figures = fixed_list(protocol), [], {}
    seeds = {arm: entry["seeds"].get(arm, entry["seeds"]["default"]) for arm in entry["arms"]}
    named = tuple(sorted({seed for those in seeds.values() for seed in those}))
    for claim in entry["claims"]:
        arms = [arm for pair in pairs_of(claim) for arm in pair]
        figures.setdefault(claim["figure"], {}).update(dict.fromkeys(arms))
    for claim in entry["claims"]:
        comparisons = []
        for better, worse in pairs_of(claim):
            common = tuple(seed for seed in seeds[better] if seed in seeds[worse])
            comparisons.append(Comparison(better, worse, claim.get("margin", 0.0), common))
            if "equal_time" in claim:
                steps = tuple(claim["equal_time"].items())
                comparisons.append(replace(comparisons[-1], steps=steps))
        figure = tuple(figures[claim["figure"]])
        out.append(Claim(claim["id"], protocol, figure, tuple(comparisons), named, entry["step"]))
    return out


def arm_values(ev: Evidence, protocol: str) -> pd.DataFrame:
    """The held-out loss of every arm of the fixed list at every seed and measured step.

    Columns arm, seed, step, value and one per band of noise; `.attrs["problems"]` names the
    records whose statistics contradict their value.
    """
    entry, measure = fixed_list(protocol), fixed_list(protocol)["measure"]
    seeds = sorted({r.experiment.seed for r in ev.at(protocol)})
    bands = {f"log-SNR {low:g} to {high:g}": (low, high) for low, high in entry["log_snr_bands"]}
    rows, problems = [], []
    for arm, seed in ((arm, seed) for arm in entry["arms"] for seed in seeds):
        record = ev.records.get(arm_experiment(protocol, arm, seed).run_id)
        for step in record.loss_steps if record else ():
            try:
                log_snr, loss = record.loss_by_level(step)
            except (OSError, ValueError, KeyError) as error:
                problems.append((record.run_id, f"left out: {error}"[:300]))
                continue
            row = {"arm": arm, "seed": seed, "step": step, "value": record.value(measure, step)}
            for name, (low, high) in bands.items():
                row[name] = loss[(low <= log_snr) & (log_snr < high)].mean()
            rows.append(row)
    frame = pd.DataFrame(rows, columns=["arm", "seed", "step", "value", *bands])
    frame.attrs["problems"] = problems
    return frame


def band_differences(
    effect: Effect, values: pd.DataFrame, step: int
) -> dict[str, dict[int, float]]:
    "The same comparison in each band of noise: band -> seed -> log(worse / better)."
    c, steps = effect.comparison, dict(effect.comparison.steps)
    worse, better = (
        values[(values.arm == arm) & (values.step == steps.get(arm, step))].set_index("seed")
        for arm in (c.worse, c.better)
    )
    bands = [name for name in values if name.startswith("log-SNR")]
    found = np.log(worse[bands] / better[bands]).reindex(list(effect.differences)).dropna()
    return found.to_dict()


def judged(ev: Evidence, protocol: str) -> tuple[list[Verdict], pd.DataFrame]:
    "The verdicts on the fixed list and the measurements behind them."
    values = arm_values(ev, protocol)
    return judge(listed_claims(protocol), values), values


def in_words(arm: str) -> str:
    "An arm of the fixed list as a reader calls it."
    return ARMS.get(arm, arm)


def comparison_name(effect: Effect) -> str:
    "A comparison in a few words."
    c = effect.comparison
    time = ", equal time" if c.steps else ""
    return f"{in_words(c.worse)} against {in_words(c.better)}{time}"


def effect_rows(verdicts: list[Verdict], values: pd.DataFrame) -> pd.DataFrame:
    "Every seed of every comparison that has results, with its interval and its bands."
    rows = []
    for v, e in ((verdict, effect) for verdict in verdicts for effect in verdict.effects):
        bands = band_differences(e, values, fixed_list(v.protocol)["step"])
        row = {"claim": v.id, "word": v.word, "comparison": comparison_name(e)}
        row |= {name: getattr(e, name) for name in ("effect", "low", "high", "df", "sd")}
        row |= {"threshold": e.comparison.threshold, "p": v.p, "p_holm": v.p_holm}
        for seed, difference in e.differences.items():
            by_band = {name: found.get(seed) for name, found in bands.items()}
            rows.append(row | {"seed": seed, "difference": difference} | by_band)
    return pd.DataFrame(rows)


# ---- What was seen outside the fixed list ----


def variant_label(model: ModelConfig, base: ModelConfig) -> str:
    "What distinguishes a model from the adopted one of its protocol."
    if model.model != base.model:
        return model.model
    names = [f.name for f in fields(model) if f.name != "num_heads"]
    changed = {k: getattr(model, k) for k in names if getattr(model, k) != getattr(base, k)}
    texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in changed.items()}
    return ", ".join(f"{k}={v}" for k, v in texts.items())


def transferred(arm: str, protocol: str) -> str:  # as `variant_label`
    "An arm of protocol cpu at another: as many layers more or fewer, other sizes in proportion."
    here, there = PROTOCOLS["cpu"].model, PROTOCOLS[protocol].model
    change = {k: v for k, v in fixed_list("cpu")["arms"][arm].items() if k != "loss_steps"}
    if "model" in change:
        return change["model"]
    if "depth" in change:
        change["depth"] += there.depth - here.depth
    for k in {"embed_dim", "num_heads", "patch_size"} & set(change):
        change[k] = max(1, change[k] * getattr(there, k) // getattr(here, k))
    return variant_label(experiment(protocol, **change).model, there)


def seen(ev: Evidence, claim: dict, protocol: str) -> pd.DataFrame:
    "A claim's comparisons in runs that no list named, worse over better: described, never judged."
    d = ev.differences[ev.differences.protocol == protocol]
    keys = ["measure", "steps", "seed"]
    out = []
    for better, worse in pairs_of(claim):
        found = d[d.variant == transferred(worse, protocol)]
        found = found[[*keys, "difference", "run_id"]]
        if label := transferred(better, protocol):
            other = d[d.variant == label][[*keys, "difference"]]
            found = found.merge(other, on=keys, suffixes=("", "_better"))
            found["difference"] -= found.pop("difference_better")
        pair = f"{in_words(worse)} against {in_words(better)}"
        out.append(found.assign(worse=worse, better=better, pair=pair))
    frame = pd.concat(out, ignore_index=True)
    return frame[frame.steps == frame.steps.max()]
