"""Judge the paper's claims from measurements at seeds that were named before the runs.

Every comparison asks one question: does the 95 % interval of log(worse / better) lie above its
threshold? The threshold is 0 when the paper claims a direction, and minus the margin when it
claims "no gain" or "at least as good". A claim agrees when all its comparisons do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

AGREES = "agrees"
DISAGREES = "disagrees"
OPEN = "open"
NOT_RUN = "not run"
LEVEL = 0.05  # of each test and, after Holm, of the whole list of claims


@dataclass(frozen=True)
class Comparison:
    "Two arms and the side on which the paper expects their difference."

    better: str  # arm that the paper says is lower or comparable; for no gain: before the change
    worse: str  # the other arm; for no gain: after the change
    margin: float = 0.0  # difference that still counts as none, in log units; 0 for a direction
    seeds: tuple[int, ...] = ()  # at which both arms are compared; empty: those of the claim
    steps: tuple[tuple[str, int], ...] = ()  # (arm, step) where an arm is read at another step

    @property
    def threshold(self) -> float:
        "The value of log(worse / better) above which the comparison agrees with the paper."
        return -self.margin


@dataclass(frozen=True)
class Claim:
    "A claim of the paper with everything that must be fixed before its runs."

    id: str  # U01, ...
    protocol: str  # whose runs count
    figure: tuple[str, ...]  # arms that share the residual standard deviation
    comparisons: tuple[Comparison, ...]  # all must hold
    seeds: tuple[int, ...]  # all must be measured before a comparison is tested
    step: int  # of training

    @property
    def arms(self) -> list[str]:
        "The compared arms and the rest of the figure."
        compared = [arm for c in self.comparisons for arm in (c.better, c.worse)]
        return list(dict.fromkeys([*compared, *self.figure]))


@dataclass(frozen=True)
class Effect:
    "What was measured for one comparison."

    comparison: Comparison
    differences: dict[int, float]  # named seed -> log(worse / better)
    effect: float  # mean difference; above the threshold is the paper's side
    low: float  # 95 % interval, not corrected; NaN without degrees of freedom
    high: float
    sd: float  # residual standard deviation of one run, pooled over the figure
    df: int  # its degrees of freedom
    p: float  # two-sided, of the threshold; 1 while it can't be tested
    missing: dict[str, tuple[int, ...]]  # arm -> named seeds without a measurement

    @property
    def favourable(self) -> bool:
        "Whether the effect is on the paper's side of the threshold."
        return self.effect > self.comparison.threshold


@dataclass(frozen=True)
class Verdict:
    "What the runs of one protocol say about one claim."

    id: str
    protocol: str
    effects: tuple[Effect, ...]  # one per comparison
    p: float  # of the claim
    p_holm: float  # the same after Holm over all claims of the protocol

    @property
    def word(self) -> str:
        "The word that the reader sees: after Holm, with all comparisons."
        if self.p_holm < LEVEL:
            return AGREES if all(effect.favourable for effect in self.effects) else DISAGREES
        return OPEN if any(effect.differences for effect in self.effects) else NOT_RUN

    @property
    def missing(self) -> dict[str, tuple[int, ...]]:
        "The named seeds that each compared arm still lacks."
        missing = {}
        for arm, seeds in (item for e in self.effects for item in e.missing.items()):
            missing[arm] = tuple(sorted({*missing.get(arm, ()), *seeds}))
        return missing

    @property
    def reason(self) -> str:
        "Why a claim is not decided; empty where it is."
        if self.word in (AGREES, DISAGREES):
            return ""
        if self.missing:
            runs = [f"{arm} at seed {', '.join(map(str, s))}" for arm, s in self.missing.items()]
            return f"needs {' and '.join(runs)}"
        if self.p < LEVEL:
            return f"clear alone but not after Holm's correction (p = {self.p_holm:.2g})"
        return "undecided at this precision"


def residual_sd(
    logs: np.ndarray,  # log values, (..., arms, seeds); not finite where there is none
) -> tuple[np.ndarray, int]:  # standard deviation of one run (NaN without df), degrees of freedom
    "Fit log m = arm + seed and return the residual standard deviation."
    logs = np.asarray(logs, float)
    n_arms, n_seeds = logs.shape[-2:]
    present = np.isfinite(logs).reshape(-1, n_arms, n_seeds).all(axis=0)
    arm, seed = np.nonzero(present)
    design = np.hstack([np.eye(n_arms)[arm], np.eye(n_seeds)[seed]])
    to_residuals = np.eye(len(arm)) - design @ np.linalg.pinv(design, rcond=1e-10)
    df = round(np.trace(to_residuals))  # observations minus the rank of the design
    residuals = logs[..., present] @ to_residuals
    if df < 1:
        return np.full(residuals.shape[:-1], np.nan)[()], 0
    return np.sqrt((residuals**2).sum(axis=-1) / df), df


def p_value(effect: float, se: float, df: int, threshold: float = 0.0) -> float:
    "Two-sided t-test: below 0.05 exactly when the 95 % interval excludes the threshold."
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(np.subtract(effect, threshold)) / se
    return np.nan_to_num(2 * stats.t.sf(t, df), nan=1.0)[()]


def claim_p(
    favourable: np.ndarray,  # whether each effect is on the paper's side, (..., comparisons)
    p: np.ndarray,  # of each comparison, (..., comparisons)
) -> np.ndarray:  # (...)
    "The p-value of a claim: all must agree (the largest p), or one disagrees (Bonferroni)."
    p_agree = np.where(favourable, p, 1.0).max(axis=-1)
    p_disagree = np.where(favourable, 1.0, p).min(axis=-1) * np.shape(p)[-1]
    return np.minimum(p_agree, p_disagree).clip(max=1.0)


def holm(
    p: Sequence[float],  # one per claim of the fixed list; NaN: the claim was not run
) -> np.ndarray:
    "Holm's correction, in which claims that were not run count with p = 1."
    return multipletests(np.nan_to_num(np.asarray(p, float), nan=1.0), method="holm")[1]


def log_table(
    claim: Claim,
    measurements: pd.DataFrame,  # columns arm, seed, step, value
    steps: Sequence[tuple[str, int]] = (),  # arms that are read at another step than the claim's
) -> pd.DataFrame:  # arms x named seeds; NaN where nothing usable was measured
    "The logarithm of each measurement; an arm with several values at one seed is a `ValueError`."
    wanted = measurements["arm"].map(dict(steps)).fillna(claim.step)
    values = measurements[measurements["step"] == wanted].pivot(
        index="arm", columns="seed", values="value"
    )
    values = values.reindex(index=claim.arms, columns=list(claim.seeds)).astype(float)
    return np.log(values.where((values > 0) & (values < np.inf)))


def compare(
    comparison: Comparison,
    logs: pd.DataFrame,  # of `log_table`
) -> Effect:
    "Estimate one comparison, and test it once all its named seeds are measured."
    pair = logs.loc[[comparison.better, comparison.worse], list(comparison.seeds or logs)]
    missing = {arm: tuple(row.index[row.isna()]) for arm, row in pair.iterrows()}
    missing = {arm: seeds for arm, seeds in missing.items() if seeds}
    differences = (pair.loc[comparison.worse] - pair.loc[comparison.better]).dropna()
    sd, df = residual_sd(logs.to_numpy())
    effect = differences.mean()
    se = sd * np.sqrt(2 / max(len(differences), 1))
    half_width = stats.t.ppf(1 - LEVEL / 2, df) * se
    # a test before the last named seed would be a second look at the data
    p = 1.0 if missing else p_value(effect, se, df, comparison.threshold)
    numbers = [float(x) for x in (effect, effect - half_width, effect + half_width, sd)]
    return Effect(comparison, differences.to_dict(), *numbers, df, float(p), missing)


def judge(
    claims: Sequence[Claim],  # the whole fixed list, whether or not its runs exist
    measurements: pd.DataFrame,  # as for `log_table`, of one protocol
) -> list[Verdict]:  # in the order of the claims
    "Judge the fixed list of a protocol, with one Holm correction."
    verdicts = []
    for claim in claims:
        effects = tuple(
            compare(comparison, log_table(claim, measurements, comparison.steps))
            for comparison in claim.comparisons
        )
        p = float(claim_p([e.favourable for e in effects], [e.p for e in effects]))
        verdicts.append(Verdict(claim.id, claim.protocol, effects, p, p_holm=p))
    corrected = holm([v.p for v in verdicts])
    return [replace(v, p_holm=float(p)) for v, p in zip(verdicts, corrected, strict=True)]


def power(
    effect: float,  # distance of the true effect from the threshold, log units
    sd: float,  # residual standard deviation of one run
    n_seeds: int,  # pairs of runs
    df: int,  # degrees of freedom of sd
    alpha: float = LEVEL,  # two-sided; divide by the number of claims for the first step of Holm
) -> float:
    "The probability that a comparison agrees (non-central t)."
    noncentrality = effect / (sd * np.sqrt(2 / n_seeds))
    return float(stats.nct.sf(stats.t.ppf(1 - alpha / 2, df), df, noncentrality))


def paired_difference(
    log_a: pd.DataFrame,  # columns step and loss
    log_b: pd.DataFrame,  # the other run, on the same data and noise
    window: int = 250,  # steps that are averaged
) -> pd.DataFrame:  # step (last of its window), difference = log(mean a / mean b), se
    "The running difference of two training losses, with the noise that both share removed."
    pairs = log_a[["step", "loss"]].merge(log_b[["step", "loss"]], on="step", suffixes=("_a", "_b"))
    pairs = pairs.dropna().sort_values("step")
    if len(pairs) < 2:
        raise ValueError("the two logs share fewer than two steps")
    n_rows = max(2, round(window / pairs["step"].diff().median()))
    a = pairs["loss_a"].rolling(n_rows)
    b = pairs["loss_b"].rolling(n_rows)
    # variance of a / mean(a) - b / mean(b) in the window: the delta method for the log ratio
    covariance = a.cov(pairs["loss_b"]) / (a.mean() * b.mean())
    variance = a.var() / a.mean() ** 2 + b.var() / b.mean() ** 2 - 2 * covariance
    se = np.sqrt(variance.clip(lower=0) / n_rows)
    difference = np.log(a.mean() / b.mean())
    return pd.DataFrame({"step": pairs["step"], "difference": difference, "se": se}).dropna()
