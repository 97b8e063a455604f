"""A claim is supported only by runs that started after its test was written, with enough seeds, an interval that excludes the claim's margin after Holm's correction, and loss and distance of one sign; all else is called by its own name."""

import functools
import json
import math
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from uvit_repro.config import (
    CONFIGS,
    PROTOCOLS,
    ParameterError,
    eval_id,
    experiment,
    main_metric,
    with_overrides,
)
from uvit_repro.paper.claims import load_claims
from uvit_repro.paper.numbers import figure2, published, table2
from uvit_repro.runs.counting import macs_of, params_of
from uvit_repro.runs.experiment import repeat_command
from uvit_repro.runs.records import load_results


def all_records(
    origin="all",  # runs | published | all
    out_dir=None,  # another folder of runs
):  # DataFrame, one row per measurement
    "Everything that verdicts are made from: the ledger, and what chapter 09 reads off the matrices of Figure 7."
    import pandas as pd

    from uvit_repro.cka import cka_results

    frames = [load_results(origin, out_dir), cka_results(origin, out_dir)]
    return pd.concat(
        [f for f in frames if len(f)] or frames[:1], ignore_index=True
    ).drop_duplicates(["run_id", "eval_id", "metric"])


TESTED = (
    "paired_difference",
    "best_of",
    "order",
    "no_gain",
    "threshold_speed",
    "level",
)  # kinds that are judged from measurements.csv
KINDS = TESTED + ("count", "benchmark", "checkpoint", "later", "not_testable")


@functools.lru_cache(None)
def tests_file() -> dict:
    "The file of tests as it is. Cached: do not change it in place."
    return json.loads(
        (resources.files("uvit_repro") / "paper" / "tables" / "claims_tests.json").read_text(
            encoding="utf-8"
        )
    )


def load_tests(
    claim: str = None,  # U01 ... G03; None: all
):  # dict, or list of dicts in the order of the claims; defaults filled in
    "What decides each claim, fixed before any run that it judges. Raises `ParameterError` for an unknown claim."
    d = tests_file()
    rows = [{**d["defaults"], **r} for r in d["claims"]]
    if claim is None:
        return rows
    known = {r["id"]: r for r in rows}
    if claim not in known:
        raise ParameterError(f"claim = {claim!r}: known are {', '.join(known)}")
    return known[claim]


def fixed_at(
    test: dict = None,  # of `load_tests`
) -> str:
    "When the tests were fixed, UTC; what ran earlier was seen."
    return (test or {}).get("fixed", tests_file()["fixed"])


def pooled_sd(
    logs,  # logarithms of a measure, (..., arms, seeds); NaN where there is no run. Leading dimensions are repetitions
):  # (standard deviation of a difference at one seed, (...); degrees of freedom)
    "Residual of arm + seed over all arms with two or more seeds, times the square root of 2 (design: statistics)."
    x = np.asarray(logs, float)
    ok = ~np.isnan(x).any(axis=tuple(range(x.ndim - 2)))
    while True:
        keep = ok & (ok.sum(1, keepdims=True) > 1)
        keep &= keep.sum(0, keepdims=True) > 1
        if (keep == ok).all():
            break
        ok = keep
    a, s = np.nonzero(ok)
    X = np.concatenate([np.eye(x.shape[-2])[a], np.eye(x.shape[-1])[s]], 1)
    df = len(a) - (np.linalg.matrix_rank(X) if len(a) else 0)
    if df < 1:
        return np.full(x.shape[:-2], np.nan)[()], 0
    left = x[..., a, s] @ (np.eye(len(a)) - X @ np.linalg.pinv(X))
    return np.sqrt(2 * (left**2).sum(-1) / df), int(df)


def contrast(
    logs,  # (..., arms, seeds)
    weights,  # one per arm, summing to 0; (-1, 1) is the second over the first
):  # (..., n): its value at each seed that has all arms with a weight
    "A comparison at the same seed."
    x, w = np.asarray(logs, float), np.asarray(weights, float)
    use = w != 0
    x = x[..., use, :]
    seeds = ~np.isnan(x).any(axis=tuple(range(x.ndim - 1)))
    return np.einsum("a,...an->...n", w[use], x[..., seeds])


def t_cdf(t, df):
    "Student's distribution function."
    from scipy.special import stdtr

    return stdtr(df, t)


def paired_interval(
    d,  # differences at the same seed, (..., n)
    sd=None,
    df=None,  # pooled; None: their own, with n - 1
    level=0.95,
):  # (effect, low, high)
    "Mean difference with its t-interval; no interval without degrees of freedom."
    from scipy.special import stdtrit

    d = np.asarray(d, float)
    n, effect = d.shape[-1], d.mean(-1)
    if sd is None:
        sd, df = (d.std(-1, ddof=1) if n > 1 else np.nan), n - 1
    half = stdtrit(df, 0.5 + level / 2) * sd / math.sqrt(n) if df >= 1 else np.nan
    return effect, effect - half, effect + half


def p_two_sided(effect, se, df, margin=0.0):
    "Probability, were the margin the truth, of an effect at least as far from it."
    return (
        2 * t_cdf(-np.abs(np.asarray(effect) - margin) / se, df)
        if df >= 1
        else np.full(np.shape(effect), np.nan)[()]
    )


def holm(
    p,  # p-values of one family, (..., m); NaN counts as 1
):  # adjusted, same shape
    "Holm's step-down correction."
    p = np.nan_to_num(np.asarray(p, float), nan=1.0)
    m, order = p.shape[-1], np.argsort(p, -1)
    steps = np.maximum.accumulate(np.take_along_axis(p, order, -1) * (m - np.arange(m)), -1)
    out = np.empty_like(p)
    np.put_along_axis(out, order, np.minimum(steps, 1), -1)
    return out


def equivalence(
    effect,
    se,
    df,  # estimate, its standard error, degrees of freedom
    margin,  # fixed, positive
):  # p of the larger of the two one-sided tests; small: the effect lies within the margin
    "Two one-sided tests against a fixed margin."
    return (
        t_cdf((np.abs(effect) - margin) / se, df)
        if df >= 1
        else np.full(np.shape(effect), np.nan)[()]
    )


def no_gain_test(
    logs,  # (..., arms, seeds), lower is better
    gain,
    step,  # pairs of arms (from, to): the step that gained, the step in question; they may share an arm
    sd,
    df,  # of a paired difference, pooled
) -> dict:  # gain, before (means over seeds), n, p (equivalent to nothing), p_gain (more than half of the gain before), nearest (distance to the nearer bound, in sd)
    "Whether a step gains nothing, within half of what the step before gained; the uncertainty of that half is part of the test."
    before, this = np.zeros((2, np.shape(logs)[-2]))
    for w, (a, b) in ((before, gain), (this, step)):
        w[a] += 1
        w[b] -= 1
    used = (before != 0) | (this != 0)
    x = np.asarray(logs, float)[..., used, :]
    x = x[..., ~np.isnan(x).any(axis=tuple(range(x.ndim - 1)))]
    n = x.shape[-1]
    mean = lambda w: (
        np.einsum("a,...an->...", w[used], x) / n if n else np.full(x.shape[:-2], np.nan)[()]
    )
    res = {
        "gain": mean(this),
        "before": mean(before),
        "n": n,
        "p": np.nan,
        "p_gain": np.nan,
        "nearest": np.nan,
    }
    if df < 1 or n < 2:
        return res
    sizes = [
        mean(w) / (sd * math.sqrt((w**2).sum() / 2))
        for w in (this - before / 2, -this - before / 2)
    ]
    return dict(
        res,
        p=np.maximum(*(t_cdf(v * math.sqrt(n), df) for v in sizes)),
        p_gain=t_cdf(-sizes[0] * math.sqrt(n), df),
        nearest=np.maximum(*sizes),
    )


def power(
    effect,
    sd,  # distance from the margin, standard deviation of a paired difference
    n,  # pairs of runs
    df=None,  # of the pooled standard deviation; None: n - 1
    alpha=0.05,  # two-sided
) -> float:  # probability of an interval that excludes the margin
    "Power of the paired t-test."
    from scipy.special import nctdtr, stdtrit

    df = n - 1 if df is None else df
    shift, t = abs(effect) / sd * math.sqrt(n), stdtrit(df, 1 - alpha / 2)
    res = 1 - nctdtr(df, shift, t) + nctdtr(df, shift, -t)
    if math.isnan(res):
        res = 0.5 * math.erfc(
            (t - shift) / math.sqrt(2)
        )  # beyond the routine's range: both ends are normal
    return float(res)


def seeds_needed(
    effect,
    sd,  # as in `power`
    alpha=0.05,  # two-sided; over the number of questions of the figure
    target=0.8,  # wanted power
    variants=1,  # that are run with as many seeds and share the standard deviation
    most=200,  # no more are considered
):  # pairs of runs, at least 2; None: more than `most`
    "The least number of seeds that decides an effect of this size, at this spread."
    if not (math.isfinite(effect) and math.isfinite(sd) and sd > 0 and effect):
        return None
    if power(effect, sd, most, variants * (most - 1), alpha) < target:
        return None
    return next(
        n for n in range(2, most + 1) if power(effect, sd, n, variants * (n - 1), alpha) >= target
    )


def planned_evaluations(
    exp,  # Experiment
    step: int,  # of its training
) -> set:  # ids of the held-out loss and of the samples
    "The evaluations that a run of this experiment makes at a step."
    e, s, last = exp.evaluation, exp.sampling, step == exp.train.n_steps
    shown = (
        exp
        if last
        else replace(
            exp, sampling=replace(s, sampler=e.curve_sampler or s.sampler, nfe=e.curve_nfe or s.nfe)
        )
    )
    return {eval_id(exp, step, 0), eval_id(shown, step, e.num_samples if last else e.curve_samples)}


def run_started(folder: str) -> str:
    "When a run started, from its run.json; empty when nobody knows, which counts as before."
    try:
        return json.loads((Path(folder) / "run.json").read_text()).get("started") or ""
    except (OSError, ValueError):
        return ""


class Ledger:
    "Measurements by run, measure, step and evaluation, with the time at which each run started."

    def __init__(
        self, results
    ):  # rows of `load_results`; `started` is a column, or is in run.json of `folder`
        self.rows, self.started = {}, {}
        self.seeds = sorted({int(s) for s in results.seed}) if len(results) else []
        for r in results.drop_duplicates(["run_id", "eval_id", "metric"]).itertuples():
            self.rows.setdefault((r.run_id, r.metric), {}).setdefault(int(r.step), {})[
                r.eval_id
            ] = r
            if r.run_id not in self.started:
                self.started[r.run_id] = (
                    str(r.started)
                    if hasattr(r, "started")
                    else run_started(getattr(r, "folder", ""))
                )

    def log(self, exp, metric: str, step: int) -> tuple:
        "(logarithm or NaN, why a measurement is of no use)."
        rows = self.rows.get((exp.run_id, metric), {}).get(step, {})
        ids = planned_evaluations(exp, step)
        hits = [r for i, r in rows.items() if i in ids or metric in tests_file()["other_metrics"]]
        if not hits:
            return math.nan, ""
        if len(hits) > 1:
            return math.nan, f"{metric} was measured in {len(hits)} ways: keep one"
        if hits[0].status != "ok":
            return math.nan, f"{metric} refused: {hits[0].note}"
        return (
            (math.log(hits[0].value), "")
            if hits[0].value > 0
            else (math.nan, f"{metric} = {hits[0].value:g} has no logarithm")
        )

    def curve(self, exp, metric: str, upto: int) -> list:
        "(step, logarithm) of a run up to a step."
        return [
            (s, v)
            for s in sorted(self.rows.get((exp.run_id, metric), {}))
            if s <= upto and not math.isnan(v := self.log(exp, metric, s)[0])
        ]


@functools.lru_cache(8192)
def _arm(protocol: str, text: str, n_steps, seed: int):
    e = experiment(
        protocol,
        seed=seed,
        **{**json.loads(text), **({} if n_steps is None else {"n_steps": n_steps})},
    )
    return e, e.run_id


def arm_experiment(
    arm: dict,  # what differs from the protocol; `metric` is not part of it
    protocol: str,  # laptop | gpu | paper
    n_steps=None,  # None: the protocol's
    seed=0,  # of the run
):  # Experiment
    "The run that an arm of a test names."
    return _arm(
        protocol,
        json.dumps({k: v for k, v in arm.items() if k != "metric"}, sort_keys=True),
        n_steps,
        seed,
    )[0]


def metric_of(
    name: str,  # in the tests
    exp,  # Experiment
) -> str:  # in measurements.csv
    "A measure of the tests as measurements.csv names it."
    return (
        main_metric(exp)
        if name == "main"
        else f"patch_seam_energy_p{exp.model.patch_size}"
        if name == "patch_seam_energy"
        else name
    )


def arms_of(
    test: dict,  # of `load_tests`
    protocol: str,  # laptop | gpu | paper
) -> list:  # lists of arms, one list per comparison
    "The comparisons of a claim: (better, worse); for no_gain (from, to, from, to); for level one run."
    t = {**test, **test.get(protocol, {})}
    return {
        "paired_difference": lambda: [[t["better"], t["worse"]]],
        "best_of": lambda: [[t["best"], o] for o in t["others"]],
        "order": lambda: [list(p) for p in zip(t["chain"], t["chain"][1:])],
        "no_gain": lambda: [t["gain"] + t["no_gain"]],
        "threshold_speed": lambda: [[t["fast"], t["slow"]]],
        "level": lambda: [[t["arm"]]],
    }[t["kind"]]()


def arm_name(arm: dict) -> str:
    "An arm in words."
    return (
        ", ".join(
            f"{k}={'/'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in arm.items()
        )
        or "adopted"
    )


def comparison_name(
    test: dict,  # of `load_tests`
    arms: list,  # of one comparison
) -> str:  # better against worse
    "A comparison in words."
    n = [arm_name(a) for a in arms]
    if test["kind"] == "no_gain":
        return f"from {n[2]} to {n[3]} (before: {n[0]} to {n[1]})"
    return (
        f"{n[0]} at {test['value']:g}"
        if test["kind"] == "level"
        else (" sooner than " if test["kind"] == "threshold_speed" else " against ").join(n)
    )


def steps_to_reach(
    curve: list,  # (step, logarithm), lower is better
    target: float,  # logarithm
) -> float:  # step, at least the first one measured; NaN: never
    "When a curve first reaches a value, linear between its points."
    for (s0, v0), (s1, v1) in zip([curve[0]] + curve, curve):
        if v1 <= target:
            return float(s1 if s0 == s1 else s0 + (s1 - s0) * (v0 - target) / (v0 - v1))
    return math.nan


def log_speed(
    fast: list,
    slow: list,  # curves, as for `steps_to_reach`
) -> float:  # NaN without curves
    "Logarithm of how many times sooner the fast curve is where the slow one ends; 0 where it never is."
    if len(fast) < 2 or len(slow) < 2:
        return math.nan
    reach = steps_to_reach(fast, slow[-1][1])
    return 0.0 if math.isnan(reach) else math.log(slow[-1][0] / reach)


def gather(
    ledger,  # Ledger
    test: dict,  # of `load_tests`
    protocol: str,  # laptop | gpu | paper
    arms: list,  # of one comparison
    n_steps=None,  # None: the protocol's
) -> dict:  # what is recorded for it, not yet tested
    "One comparison as recorded: logarithms by arm and seed of both measures, and what the runs are."
    at = lambda a, s=0: arm_experiment(a, protocol, n_steps, s)
    e = at(arms[0])
    step = min(test["steps"] or e.train.n_steps, e.train.n_steps)
    speed = test["kind"] == "threshold_speed"
    started = {s: [ledger.started.get(at(a, s).run_id) for a in arms] for s in ledger.seeds}
    seeds = [s for s, w in started.items() if None not in w]

    def logs(names):  # (arms, seeds), and why something is missing
        if speed:
            return np.array(
                [
                    [0.0] * len(seeds),
                    [
                        log_speed(
                            *(
                                ledger.curve(at(a, s), metric_of(m, at(a)), step)
                                for a, m in zip(arms, names)
                            )
                        )
                        for s in seeds
                    ],
                ]
            ), []
        got = [
            [ledger.log(at(a, s), metric_of(m, at(a)), step) for s in seeds]
            for a, m in zip(arms, names)
        ]
        return np.array([[v for v, _ in r] for r in got]).reshape(len(arms), len(seeds)), sorted(
            {w for r in got for _, w in r if w}
        )

    names = [a.get("metric", test["metric"]) for a in arms]
    x, why = logs(names)
    return {
        "claim": test["id"],
        "kind": test["kind"],
        "figure": test["figure"],
        "protocol": protocol,
        "comparison": comparison_name(test, arms),
        "arms": arms,
        "metric": metric_of(names[-1], at(arms[-1])),
        "second": test["second"] and metric_of(test["second"], e),
        "dataset": e.data.dataset,
        "n_steps": e.train.n_steps,
        "step": step,
        "margin": math.log(test["factor"]) if speed else float(test["margin"]),
        "value": test.get("value"),
        "needed": test["seeds"],
        "decides": step >= test["steps"] and e.data.dataset in test["datasets"],
        "seeds": seeds,
        "fresh": [s for s in seeds if all(w >= fixed_at(test) for w in started[s])],
        "old": [
            s for s, w in started.items() if any(x is not None and x < fixed_at(test) for x in w)
        ],
        "logs": x,
        "extra": logs([test["second"]] * len(arms))[0] if test["second"] else None,
        "why": "; ".join(why),
        "keys": [
            (speed, at(a).run_id, *sorted(planned_evaluations(at(a), step)), metric_of(m, at(a)))
            for a, m in zip(arms, names)
        ],
        "run_ids": [at(a, s).run_id for s in seeds for a in arms],
    }


def pool(
    rows: list,  # of `gather`, of one figure, measure and step
    which: str,  # logs | extra
) -> tuple:  # (sd of a paired difference, degrees of freedom)
    "The spread pooled over all arms of one figure; speeds and levels are other quantities and stay out."
    rows = [
        r for r in rows if r["kind"] not in ("threshold_speed", "level") and r[which] is not None
    ]
    place, seeds = {}, sorted({s for r in rows for s in r["seeds"]})
    for r in rows:
        for k, v in zip(r["keys"], r[which]):
            place.setdefault(k, np.full(len(seeds), np.nan))[
                [seeds.index(s) for s in r["seeds"]]
            ] = v
    return pooled_sd(np.stack(list(place.values()))) if place and seeds else (math.nan, 0)


def differences(
    x,  # logarithms, (arms, seeds)
    row: dict,  # of `gather`
):  # (seeds,), NaN where an arm is missing; above the margin: as claimed
    "What a comparison is about, at each seed."
    if row["kind"] == "level":
        return x[0] - math.log(row["value"])
    return x[2] - x[3] + 0 * (x[0] + x[1]) if row["kind"] == "no_gain" else x[1] - x[0]


def judge_row(
    row: dict,  # of `gather`
    first,  # (sd, df) pooled, of the measure
    second,  # and of the second measure
) -> dict:  # the row with effect, interval, p, second effect
    "Test one comparison."
    use = row["fresh"] if len(row["fresh"]) >= row["needed"] else row["seeds"]
    d = differences(row["logs"], row)
    use = [s for s in use if not math.isnan(d[row["seeds"].index(s)])]
    cols = [row["seeds"].index(s) for s in use]
    d, n, (sd, df) = d[cols], len(use), first
    own = float(d.std(ddof=1)) if n > 1 else math.nan
    if row["kind"] in ("threshold_speed", "level"):
        sd, df = own, n - 1
    effect, low, high = (
        paired_interval(d, sd, df)
        if n > 1 and df > 0
        else (d.mean() if n else math.nan, math.nan, math.nan)
    )
    out = dict(
        row,
        seeds=use,
        diffs=[float(v) for v in d],
        n=n,
        effect=float(effect),
        low=float(low),
        high=float(high),
        sd=float(sd),
        own_sd=own,
        df=int(df),
        p=math.nan,
        p_against=math.nan,
        nearest=math.nan,
        second_diffs=[],
        second_effect=math.nan,
        agree=None,
        agree_against=None,
        exploratory=any(s not in row["fresh"] for s in use),
    )
    if row["extra"] is not None and n:
        zero = (
            row["margin"] if row["kind"] == "threshold_speed" else 0.0
        )  # two speeds have one unit, other measures share only the sign
        d2 = differences(row["extra"], row)[cols]
        out["second_diffs"] = [float(v) for v in d2 if not math.isnan(v)]
        if out["second_diffs"]:
            out["second_effect"] = float(np.mean(out["second_diffs"]))
            out["agree"] = out["agree_against"] = bool(
                np.sign(out["second_effect"] - zero) == np.sign(effect - zero)
            )
    if n < 2 or df < 1 or not sd > 0:
        return out
    se = sd / math.sqrt(n)
    if row["kind"] == "no_gain":
        arm = {k: i for i, k in enumerate(dict.fromkeys(row["keys"]))}
        at = [arm[k] for k in row["keys"]]
        pick = [at.index(i) for i in arm.values()]
        test = lambda x, s: no_gain_test(x[pick][:, cols], at[:2], at[2:], *s)
        r = test(row["logs"], first)
        out.update(
            p=float(r["p"]),
            p_against=float(r["p_gain"]),
            margin=float(r["before"]) / 2,
            nearest=float(r["nearest"]),
        )
        r2 = test(row["extra"], second) if row["extra"] is not None else {"n": 0}
        known = r2["n"] > 1
        out.update(
            agree=bool(r2["p"] < 0.05) if known else None,
            agree_against=bool(r2["gain"] > r2["before"] / 2) if known else None,
        )
    elif row["kind"] == "level":
        out.update(
            p=float(equivalence(effect, se, df, row["margin"])),
            p_against=min(1.0, float(2 * t_cdf((row["margin"] - abs(effect)) / se, df))),
        )
    else:
        out["p"] = out["p_against"] = float(p_two_sided(effect, se, df, row["margin"]))
    return out


def settings(
    test: dict,  # of `load_tests`
    protocol: str,  # laptop | gpu | paper
) -> list:  # values for n_steps, the one that decides first; None: the protocol's own
    "Under protocol gpu, runs as long as the record asks for (up to 150,000 steps) come before the short ones."
    n, e = test["steps"], arm_experiment(arms_of(test, protocol)[0][0], protocol)
    return (
        [n]
        if protocol == "gpu"
        and e.train.n_steps < n <= 150_000
        and e.data.dataset in test["datasets"]
        else []
    ) + [None]


def correct(rows: list) -> None:
    "Holm over the questions of one figure that were measured; one question that two claims ask is one question. Adds p_holm, p_against_holm, questions."
    family = {}
    for r in rows:
        if not math.isnan(r["p"]):
            family.setdefault(
                (
                    r["kind"] if r["kind"] in ("no_gain", "level") else r["margin"],
                    r["step"],
                    *r["keys"],
                ),
                [],
            ).append(r)
        r.update(p_holm=math.nan, p_against_holm=math.nan, questions=0)
    for q, p in zip(family.values(), holm([q[0]["p"] for q in family.values()])):
        for r in q:
            r.update(
                p_holm=float(p),
                p_against_holm=float(p)
                if r["p_against"] == r["p"]
                else min(1.0, r["p_against"] * len(family)),
            )
    for r in rows:
        r["questions"] = len(family) + math.isnan(
            r["p"]
        )  # with its own, where that is still to come


def effects(
    results,  # rows of `load_results`
    protocol: str,  # laptop | gpu | paper
    figure: str = None,  # as in the tests; None: all
):  # DataFrame, one row per comparison of every claim that the protocol bears on
    "Every comparison under one protocol: difference at each seed, interval, p before and after Holm within the figure, second measure."
    import pandas as pd

    figures = list(dict.fromkeys(t["figure"] for t in load_tests() if "figure" in t))
    if protocol not in ("laptop", "gpu", "paper"):
        raise ParameterError(
            f"protocol = {protocol!r}: allowed are laptop, gpu, paper; the numbers of smoke are never reported"
        )
    if figure not in (None, *figures):
        raise ParameterError(f"figure = {figure!r}: known are {', '.join(figures)}")
    ledger, rows = Ledger(results), []
    for t in load_tests():
        if (
            t["kind"] not in TESTED
            or protocol not in t["protocols"]
            or figure not in (None, t["figure"])
        ):
            continue
        for n_steps in settings(t, protocol):
            got = [gather(ledger, t, protocol, a, n_steps) for a in arms_of(t, protocol)]
            if any(g["seeds"] for g in got):
                break
        rows += got
    group = lambda r: tuple(r[k] for k in ("figure", "metric", "second", "n_steps", "step"))
    alike = {g: [r for r in rows if group(r) == g] for g in map(group, rows)}
    pools = {g: (pool(rs, "logs"), pool(rs, "extra")) for g, rs in alike.items()}
    rows = [judge_row(r, *pools[group(r)]) for r in rows]
    for f in dict.fromkeys(r["figure"] for r in rows):
        correct([r for r in rows if r["figure"] == f])
    return pd.DataFrame(rows).drop(columns=["logs", "extra", "keys"], errors="ignore")


VERDICTS = (
    "supported",
    "contradicted",
    "same direction",
    "opposite direction",
    "undecided",
    "not run",
)


def side(
    row: dict,  # of `effects`
) -> tuple:  # (for | against | open | missing, why, in words)
    "What one comparison says."
    name, n = row["comparison"], row["n"]
    if not n:
        return "missing", f"{name}: " + (row["why"] or "not run")
    bounded = row["kind"] in ("no_gain", "level")
    seen = (
        ""
        if bounded
        else ", the direction seen is "
        + (
            "as the paper's"
            if row["effect"] > row["margin"]
            else "opposite to the paper's"
            if row["effect"] < 0
            else "the paper's, less than the margin"
        )
    )
    if n < row["needed"]:
        return "open", f"{name}: {n} of {row['needed']} seeds{seen}"
    if math.isnan(row["p"]):
        return "open", f"{name}: no spread is known"
    clear, above = row["p_holm"] < 0.05, row["effect"] > row["margin"]
    if bounded:
        says = "for" if clear else "against" if row["p_against_holm"] < 0.05 else "open"
    else:
        says = ("for" if above else "against") if clear else "open"
    if says == "against" and 0 < row["effect"] < row["margin"]:
        name += f" (less than the margin of {row['margin']:.3g})"
    size = f"{row['effect']:+.3g} [{row['low']:.3g}, {row['high']:.3g}], {n} seeds, {row['df']} degrees of freedom, p {row['p_holm']:.2g} after Holm"
    if says == "open":
        return says, f"{name}: {size}: " + (
            "not shown to lie within" if bounded else "not shown to differ from"
        ) + f" {row['margin']:.3g}"
    agree = row["agree" if says == "for" else "agree_against"]
    if row["second"] and not agree:
        return "open", f"{name}: {size}, but {row['second']} " + (
            "is missing" if agree is None else f"disagrees ({row['second_effect']:+.3g})"
        )
    return says, f"{name}: {size}"


@dataclass(frozen=True)
class Plan:
    "What would decide a claim."

    seeds: int  # pairs of runs; None: more than can be planned
    steps: int  # of training
    protocol: str  # whose settings
    runs: int  # experiments in all
    hours: float  # predicted machine time; None: no cost model was given
    command: str  # a line for a shell
    basis: str  # where the number of seeds comes from


@dataclass(frozen=True)
class Verdict:
    "What the records say about one claim under one protocol."

    claim: str  # U01 ... G03
    protocol: str  # whose runs; empty: none are needed or possible
    verdict: str  # one of VERDICTS
    reason: str  # in words
    effect: float = (
        math.nan
    )  # of the comparison that says least, in log units; above `margin`: as claimed
    low: float = math.nan  # its 95 % interval
    high: float = math.nan
    margin: float = 0.0
    df: int = 0  # degrees of freedom of the pooled standard deviation
    seeds: int = 0  # pairs, in the comparison that has the fewest
    step: int = 0  # of training
    dataset: str = ""
    run_ids: tuple = ()
    exploratory: bool = False  # rests on runs that started before the test was fixed
    plan: Plan = None  # what would decide it

    @property
    def label(self) -> str:
        "The verdict with its conditions: `same direction at 10K on cifar10, exploratory`."
        at = f"{self.step // 1000}K" if self.step % 1000 == 0 and self.step else str(self.step)
        where = (
            f" at {at} on {self.dataset}"
            if self.verdict in ("same direction", "opposite direction", "undecided")
            else ""
        )
        return self.verdict + where + (", exploratory" if self.exploratory else "")


def conclude(
    rows: list,  # of `effects`, all comparisons of one claim
) -> tuple:  # (verdict, reasons)
    "The rule, from comparisons to a verdict."
    said = [side(r) for r in rows]
    sides, words = [s for s, _ in said], "; ".join(w for _, w in said)
    if set(sides) == {"missing"}:
        return "not run", words
    decides = all(r["decides"] for r in rows) and not any(r["exploratory"] for r in rows if r["n"])
    if "against" in sides:
        opposite = any(
            s == "against" and (r["effect"] < 0 or r["kind"] in ("no_gain", "level"))
            for s, r in zip(sides, rows)
        )
        return (
            "contradicted" if decides else "opposite direction" if opposite else "undecided"
        ), words  # less than the margin is not yet the other direction
    if set(sides) == {"for"}:
        return ("supported" if decides else "same direction"), words
    if "missing" in sides and len(sides) > 1:
        words = f"{sides.count('missing')} of {len(sides)} comparisons are not run; " + words
    return "undecided", words


def deciding(test: dict) -> tuple:  # (protocol, n_steps or None)
    "The cheapest setting that can decide a claim."
    if "digits" in test["datasets"] and "laptop" in test["protocols"]:
        return "laptop", None
    short = PROTOCOLS["gpu"].train.n_steps
    if "cifar10" in test["datasets"] and "gpu" in test["protocols"] and test["steps"] <= 150_000:
        return "gpu", test["steps"] if test["steps"] > short else None
    return "paper", None


def seeds_for(
    row: dict,  # of `effects`
    alpha: float,  # for this question
):  # seeds, or None
    "How many seeds decide one comparison at the spread and effect seen."
    if row["kind"] == "no_gain":
        return seeds_needed(
            row["nearest"], 1.0, 2 * alpha
        )  # one-sided, distance in sd of a paired difference
    if row["kind"] == "level":
        return seeds_needed(row["margin"] - abs(row["effect"]), row["sd"], 2 * alpha)
    return seeds_needed(row["effect"] - row["margin"], row["sd"], alpha)


def what_would_decide(
    test: dict,  # of `load_tests`
    rows: list,  # its comparisons, of `effects`, under the protocol that was looked at
    cost=None,  # Experiment -> seconds, or a dict with `total`; None: no hours
) -> Plan:
    "Seeds, steps, hours and the command that would decide a claim."
    protocol, n_steps = deciding(test)
    known = [r for r in rows if r["n"] and not math.isnan(r["sd"])]
    open_rows = [r for r in known if side(r)[0] == "open"] or known
    seeds, basis = test["seeds"], "the least that the test asks for; no spread has been measured"
    if open_rows:
        each = [seeds_for(r, 0.05 / max(1, r["questions"])) for r in open_rows]
        r = open_rows[each.index(None) if None in each else int(np.argmax(each))]
        seeds = None if None in each else max(test["seeds"], *each)
        basis = f"80 % power at the effect ({r['effect']:+.3g}) and spread ({r['sd']:.2g}, {r['df']} degrees of freedom) of protocol {r['protocol']}, {r['questions']} questions"
        basis += "; more than 200 seeds: too small to be decided" if seeds is None else ""
    if (m := rows[0]["metric"] if rows else test["metric"]) in tests_file()["other_metrics"]:
        basis += f"; {m}: {tests_file()['other_metrics'][m]}, measured after the runs"
    arms = {
        arm_name(a): {k: v for k, v in a.items() if k != "metric"}
        for c in arms_of(test, protocol)
        for a in c
    }
    exps = list(
        {
            (e.run_id, e.sampling, e.evaluation.num_samples): e
            for e in (arm_experiment(a, protocol, n_steps) for a in arms.values())
        }.values()
    )
    taken = (
        max((s for r in rows if r["protocol"] == protocol for s in r["old"]), default=-1) + 1
    )  # seeds that nobody has seen
    count = seeds or test["seeds"]
    each_seconds = (
        [c["total"] if isinstance(c, dict) else c for c in map(cost, exps)] if cost else []
    )
    loop = "; ".join(repeat_command(e).replace("-p seed 0", "-p seed $s", 1) for e in exps)
    hours = sum(each_seconds) * count / 3600 if cost and seeds else None
    return Plan(
        seeds,
        exps[0].train.n_steps,
        protocol,
        count * len(exps),
        hours,
        f"for s in {' '.join(str(s) for s in range(taken, taken + count))}; do {loop}; done",
        basis,
    )


@functools.lru_cache(None)
def count_claim(claim: str) -> tuple:
    "(whether it holds, in words), for claims of kind count."
    if claim == "U36":
        where = {
            "U-ViT-Small": "CIFAR10 U-ViT-S/2",
            "U-ViT-Small (Deep)": "MS-COCO 256x256 U-ViT-S/2 (Deep)",
            "U-ViT-Mid": "ImageNet 64x64 U-ViT-M/4",
            "U-ViT-Large": "ImageNet 256x256 U-ViT-L/2",
            "U-ViT-Huge": "ImageNet 256x256 U-ViT-H/2",
        }
        got = {n: (int(p), params_of(CONFIGS[where[n]])) for n, p in table2().params_M.items()}
        return all(round(c / 1e6) == p for p, c in got.values()), ", ".join(
            f"{n}: {c:,} (paper {p}M)" for n, (p, c) in got.items()
        )
    if claim == "U37":
        paper, got = (
            published("Table 7", "ImageNet 256x256", "U-ViT-H/2", "gflops"),
            macs_of(CONFIGS["ImageNet 256x256 U-ViT-H/2"]),
        )
        return round(
            got / 1e9
        ) == paper, f"{got:,} multiply-accumulates of one forward pass (paper {paper:g} GFLOPs)"
    if claim in ("D12", "D13"):
        e = with_overrides(
            CONFIGS["ImageNet 256x256 U-ViT-L/2"],
            model="DiffiT-latent",
            embed_dim=1152,
            depth=28,
            conv="after",
            p_uncond=0.1,
        )
    if claim == "D12":
        from uvit_repro.diffit import diffit_macs

        p, m, less = (
            params_of(e),
            macs_of(e) - diffit_macs()["attention products"],
            100 * (1 - params_of(e) / 1e6 / 675),
        )  # DiT-XL/2 has 675M
        return (
            round(p / 1e6) == 561 and round(m / 1e9) == 114 and abs(less - 16.88) < 0.05,
            f"{p:,} parameters and {m:,} multiply-accumulates in linear layers with 28 blocks ({macs_of(e):,} with the products of attention); {less:.2f} % fewer parameters than DiT-XL/2's 675M",
        )
    if claim == "D13":
        way = lambda t: (
            params_of(with_overrides(e, options=f"time={t}"))
            - params_of(with_overrides(e, options="time=none"))
        )
        d, n = e.model.embed_dim, e.model.depth
        ours, theirs = way("tmsa") / n / d**2, way("adaln_zero") / n / d**2
        return round(ours) == 3 and round(
            theirs
        ) == 6, f"TMSA adds {ours:.3f} d^2 numbers per block, adaLN-zero {theirs:.3f} d^2 (d = {d})"
    raise ParameterError(f"claim = {claim!r}: counted are U36, U37, D12, D13")


NOT_RUN = {
    "checkpoint": "needs {}; released weights are evaluated in chapter 07",
    "benchmark": "needs {}",
    "later": "needs {}",
    "not_testable": "no test is possible without {}",
}


def judge_claim(
    test: dict,  # of `load_tests`
    protocol: str,  # laptop | gpu | paper
    rows: list,  # dicts of `effects`, the comparisons of this claim
    cost=None,  # as in `what_would_decide`
) -> Verdict:
    "The verdict on one claim from its comparisons."
    if test["kind"] == "count":
        ok, words = count_claim(test["id"])
        return Verdict(test["id"], "", "supported" if ok else "contradicted", f"counted: {words}")
    if test["kind"] not in TESTED:
        return Verdict(test["id"], "", "not run", NOT_RUN[test["kind"]].format(test["needs"]))
    if protocol not in test["protocols"]:
        return Verdict(
            test["id"],
            protocol,
            "not run",
            f"protocol {protocol} does not bear on it; {', '.join(test['protocols'])} would",
            plan=what_would_decide(test, [], cost),
        )
    said, words = conclude(rows)
    least = (
        min(rows, key=lambda r: (r["n"] > 0, r["effect"] - r["margin"] if r["n"] else 0))
        if said != "not run"
        else None
    )
    plan = None if said in ("supported", "contradicted") else what_would_decide(test, rows, cost)
    if not least:
        return Verdict(test["id"], protocol, said, words, plan=plan)
    if not least["n"]:
        least = min((r for r in rows if r["n"]), key=lambda r: r["effect"] - r["margin"])
    return Verdict(
        test["id"],
        protocol,
        said,
        words,
        least["effect"],
        least["low"],
        least["high"],
        least["margin"],
        least["df"] if least["n"] > 1 else 0,
        min(r["n"] for r in rows),
        least["step"],
        least["dataset"],
        tuple(sorted({i for r in rows for i in r["run_ids"]})),
        any(r["exploratory"] for r in rows),
        plan,
    )


def verdict(
    claim: str,  # U01 ... G03
    results,  # rows of `load_results`
    protocol: str,  # laptop | gpu | paper
    cost=None,  # Experiment -> seconds, or a dict with `total`
) -> Verdict:
    "The verdict on one claim under one protocol."
    t = load_tests(claim)
    rows = (
        effects(results, protocol, t["figure"]).to_dict("records")
        if t["kind"] in TESTED and protocol in t["protocols"]
        else []
    )
    return judge_claim(t, protocol, [r for r in rows if r["claim"] == claim], cost)


def all_verdicts(
    results,  # rows of `load_results`
    protocols=None,  # None: those that have results, smoke apart; gpu where there are none
    cost=None,  # as in `verdict`
    found=None,  # {protocol: DataFrame of `effects`}, if they are there already
) -> list:  # one Verdict per claim and protocol that bears on it, in the order of the claims; claims without runs once
    "Every claim, from the records alone."
    have = set(results.protocol) if len(results) else set()
    protocols = list(protocols or [p for p in ("laptop", "gpu", "paper") if p in have] or ["gpu"])
    found = {p: (found[p] if found else effects(results, p)).to_dict("records") for p in protocols}
    res = []
    for t in load_tests():
        use = [p for p in protocols if p in t["protocols"]] if t["kind"] in TESTED else []
        res += [
            judge_claim(t, p, [r for r in found[p] if r["claim"] == t["id"]], cost)
            for p in use or protocols[:1]
        ]
    return res


def verdict_frame(
    verdicts: list,  # of `all_verdicts`
):  # DataFrame, one row each
    "The verdicts as a table, with the claims' own words."
    import pandas as pd

    claims = load_claims().set_index("id").claim
    interval = lambda v: (
        ""
        if math.isnan(v.effect)
        else f"{v.effect:+.3g}" + ("" if math.isnan(v.low) else f" [{v.low:.3g}, {v.high:.3g}]")
    )
    hours = lambda p: "" if p.hours is None else f", {p.hours:.3g} h"
    plan = lambda p: (
        ""
        if p is None
        else f"{p.seeds or 'more than 200'} seeds x {p.steps:,} steps, protocol {p.protocol}{hours(p)}"
    )
    return pd.DataFrame(
        [
            {
                "id": v.claim,
                "claim": claims[v.claim],
                "protocol": v.protocol,
                "verdict": v.label,
                "effect": interval(v),
                "df": v.df or "",
                "seeds": v.seeds or "",
                "reason": v.reason,
                "would_decide": plan(v.plan),
                "basis": v.plan.basis if v.plan else "",
                "command": v.plan.command if v.plan else "",
            }
            for v in verdicts
        ]
    )


def made_up_results(
    arms: list,  # (arm, log distance, log loss): means of the made-up runs; None for a loss that was not measured
    protocol: str,  # laptop | gpu | paper
    seeds,  # of the runs
    rng,  # numpy generator
    sd=0.02,
    seed_sd=0.1,  # noise of a run, and of a seed that all arms share
    n_steps=None,  # None: the protocol's
    step=None,  # None: the last
    started="2999-01-01T00:00:00Z",  # when the runs started
):  # DataFrame as of `load_results`
    "Records of runs that never were, to try the rules on; they are nobody's results."
    import pandas as pd

    shift, rows = {s: seed_sd * rng.normal(size=2) for s in seeds}, []
    for arm, *means in arms:
        for s in seeds:
            e = arm_experiment(arm, protocol, n_steps, s)
            at = step or e.train.n_steps
            ids = sorted(
                planned_evaluations(e, at), key=lambda i: "-loss-" in i
            )  # samples first, then the loss
            for k, (m, mean, i) in enumerate(
                zip((metric_of(arm.get("metric", "main"), e), "heldout_loss"), means, ids)
            ):
                if mean is None:
                    continue
                rows.append(
                    {
                        "run_id": e.run_id,
                        "eval_id": i,
                        "metric": m,
                        "step": at,
                        "seed": s,
                        "value": math.exp(mean + shift[s][k] + sd * rng.normal()),
                        "status": "ok",
                        "note": "",
                        "protocol": protocol,
                        "started": started,
                    }
                )
    return pd.DataFrame(rows)


@functools.lru_cache(None)
def _curves() -> tuple:
    return tuple(figure2().itertuples())


def paper_effect(
    arms: list,  # of one comparison
    kind: str,  # of its claim
    step: int,  # for which the record asks; 0: the last
) -> float:  # logarithm of the ratio of FIDs, NaN where the paper has none
    "The paper's own effect in Figure 2, at the last step up to `step` that both curves have."
    curve = lambda a: {
        x.steps: x.fid for x in _curves() if x.overrides == a and x.steps <= (step or 500_000)
    }
    if kind == "threshold_speed":
        a, b = ([(s, math.log(v)) for s, v in sorted(curve(x).items())] for x in arms)
        return log_speed(a, b)
    a, b = map(curve, arms[2:4] if kind == "no_gain" else arms if len(arms) == 2 else (None, None))
    both = sorted(set(a) & set(b))
    return (
        math.nan
        if not both
        else math.log(a[both[-1]] / b[both[-1]]) * (1 if kind == "no_gain" else -1)
    )


def plot_forest(
    frame,  # DataFrame of `effects`, of one protocol or several under each other
    verdicts=(),  # of `all_verdicts`, written at the right
    thresh=(
        0.1,
        0.03,
    ),  # log units that are drawn straight, of the two measures; beyond, the axis is logarithmic
):  # matplotlib figure
    "Paired effects: every seed a dot, mean and interval a line, the paper's effect a diamond, the claimed side shaded, one colour per protocol."
    import matplotlib.pyplot as plt
    import seaborn as sns

    d = frame[frame.n > 0]
    keys = list(dict.fromkeys(zip(d.claim, d.comparison)))
    protocols = list(dict.fromkeys(d.protocol))
    colour = dict(zip(("laptop", "gpu", "paper"), sns.color_palette("colorblind")))
    said = {
        (v.claim, v.protocol): v.verdict + (", exploratory" if v.exploratory else "")
        for v in verdicts
    }
    fig, axes = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.42 * len(keys)), sharey=True, gridspec_kw={"wspace": 0.05}
    )
    for r in d.itertuples():
        k = keys.index((r.claim, r.comparison))
        y, c = (
            k + 0.24 * (protocols.index(r.protocol) - (len(protocols) - 1) / 2),
            colour[r.protocol],
        )
        for ax, x, mean in zip(axes, (r.diffs, r.second_diffs), (r.effect, r.second_effect)):
            ax.plot(x, [y] * len(x), "o", ms=5, color=c, alpha=0.55, mew=0)
            if len(x) > 1:
                ax.plot(mean, y, "|", ms=13, mew=2.5, color=c)
        axes[0].plot([r.low, r.high], [y, y], color=c, lw=1.8)
        if r.protocol == d[(d.claim == r.claim) & (d.comparison == r.comparison)].protocol.iloc[0]:
            _shade(axes, r, k)
        if k == keys.index(
            next(q for q in keys if q[0] == r.claim)
        ):  # beside the first comparison of a claim
            axes[1].annotate(
                said.get((r.claim, r.protocol), ""),
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                color=c,
            )
    titles = (
        " and ".join(dict.fromkeys(d.metric)),
        "second measure: " + ", ".join(dict.fromkeys(s for s in d.second if s)),
    )
    for ax, x, t, title in zip(axes, (d.diffs, d.second_diffs), thresh, titles):
        _forest_axis(ax, 1.4 * max([t] + [abs(v) for r in x for v in r]), t, title)
    axes[0].set(yticks=range(len(keys)), ylim=(len(keys) - 0.5, -0.5))
    axes[0].set_yticklabels([f"{c}  {n}" for c, n in keys], fontsize=9)
    marks = [
        plt.Line2D([], [], marker="o", mew=0, color=colour[p], label=f"protocol {p}")
        for p in protocols
    ]
    marks += [
        plt.Line2D([], [], ls="", marker="D", mfc="none", color="black", label="the paper (FID)"),
        plt.Rectangle((0, 0), 1, 1, color="0.5", alpha=0.2, lw=0, label="as claimed"),
    ]
    axes[0].legend(
        handles=marks,
        loc="lower left",
        ncol=5,
        frameon=False,
        fontsize=9,
        bbox_to_anchor=(-0.6, 1 + 0.35 / fig.get_figheight()),
    )
    return fig


def _forest_axis(ax, span: float, thresh: float, title: str):
    "An axis that is straight up to `thresh` and logarithmic beyond, with few ticks."
    ticks = [
        s * v for s in (-1, 1) for v in (0.01, 0.03, 0.1, 0.3, 1, 3) if 0.3 * thresh <= v <= span
    ]
    ax.axvline(0, color="black", lw=1)
    ax.set_xscale("symlog", linthresh=thresh)
    ax.set(xlim=(-span, span), xticks=[0, *ticks])
    ax.set_title(title, fontsize=11)
    ax.set_xticklabels([f"{v:g}" for v in (0, *ticks)], fontsize=9)
    ax.minorticks_off()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("log ratio, worse over better as the paper has it", fontsize=10)


def _shade(axes, r, k: int):
    "Where the claim puts an effect, and the paper's own."
    band = (-abs(r.margin), abs(r.margin)) if r.kind in ("no_gain", "level") else (r.margin, 99)
    if r.kind != "no_gain" or not math.isnan(r.p):
        axes[0].fill_between(band, k - 0.42, k + 0.42, color="0.5", alpha=0.13, lw=0)
    if r.second and r.kind != "no_gain":
        axes[1].fill_between(
            (r.margin if r.kind == "threshold_speed" else 0, 99),
            k - 0.42,
            k + 0.42,
            color="0.5",
            alpha=0.13,
            lw=0,
        )
    axes[0].plot(
        paper_effect(r.arms, r.kind, load_tests(r.claim)["steps"]),
        k,
        "D",
        ms=6,
        mfc="none",
        color="black",
    )
