"""The statistics against simulated data of known truth, and the errors of the first edition."""

import gc

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from uvit_repro.report import statistics as st

MARGIN = 0.05
SD = 0.02  # residual standard deviation of one run
N_ARMS = 6
N_SEEDS = 3
REPETITIONS = 40_000
HOLM_REPETITIONS = 4000  # `multipletests` takes one list at a time


def best_of(best, others):
    "Comparisons of one arm with each of the others."
    return tuple(st.Comparison(best, other) for other in others)


def order(chain):
    "Comparisons of each arm of a ranking with the next."
    return tuple(st.Comparison(*pair) for pair in zip(chain[:-1], chain[1:], strict=True))


def three_standard_errors(rate, repetitions=REPETITIONS):
    "Monte Carlo error of a simulated rate."
    return 3 * np.sqrt(rate * (1 - rate) / repetitions)


@pytest.fixture(autouse=True, scope="module")
def cheap_garbage_collection():
    "Hide the imported libraries from the gc.collect() in every call of `multipletests`."
    gc.freeze()
    yield
    gc.unfreeze()


def sample_logs(
    effects,  # mean log value of each arm
    repetitions=REPETITIONS,
    n_seeds=N_SEEDS,
    seed=0,
):  # (repetitions, arms, seeds)
    "Draw log values of the additive model with a large effect of the seed."
    rng = np.random.default_rng(seed)
    arms = np.asarray(effects, float)[:, None]
    seeds = rng.normal(0, 1, (repetitions, 1, n_seeds))
    return arms + seeds + rng.normal(0, SD, (repetitions, len(effects), n_seeds))


def simulated_p(
    logs,  # of `sample_logs`
    comparisons,  # of arms named a0, a1, ...
):  # (p of the claim, whether all effects are on the paper's side), one per repetition
    "Test one claim on every repetition, with the functions that `judge` uses."
    sd, df = st.residual_sd(logs)
    se = sd * np.sqrt(2 / logs.shape[-1])
    favourable = []
    p = []
    for c in comparisons:
        effect = (logs[:, int(c.worse[1:])] - logs[:, int(c.better[1:])]).mean(axis=-1)
        favourable.append(effect > c.threshold)
        p.append(st.p_value(effect, se, df, c.threshold))
    favourable = np.stack(favourable, axis=-1)
    return st.claim_p(favourable, np.stack(p, axis=-1)), favourable.all(axis=-1)


def word_rates(
    logs,  # of `sample_logs`
    comparisons,  # of arms named a0, a1, ...
):  # (rate of agrees, rate of disagrees), before Holm
    "How often a claim receives each word."
    p, favourable = simulated_p(logs, comparisons)
    decided = p < st.LEVEL
    return (decided & favourable).mean(), (decided & ~favourable).mean()


def table(
    values,  # arm -> {seed: value}
    step=3000,  # of training
):
    "Measurements as a DataFrame."
    rows = [
        {"arm": arm, "seed": seed, "step": step, "value": value}
        for arm, by_seed in values.items()
        for seed, value in by_seed.items()
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "step", "value"])


def table_of_logs(
    logs,  # (arms, seeds)
    first_seed=10,
):
    "Measurements of arms a0, a1, ... from their logarithms."
    return table({f"a{i}": dict(enumerate(np.exp(row), first_seed)) for i, row in enumerate(logs)})


def make_claim(comparisons, seeds=(10, 11, 12), **fields):
    "A claim at protocol cpu over arms a0 to a5."
    figure = tuple(f"a{i}" for i in range(N_ARMS))
    defaults = {"id": "U", "protocol": "cpu", "figure": figure, "step": 3000}
    return st.Claim(comparisons=comparisons, seeds=seeds, **{**defaults, **fields})


def judge_one(claim, measurements):
    "Judge a list of one claim."
    [verdict] = st.judge([claim], measurements)
    return verdict


def judge_effects(effects, comparisons, n_seeds=N_SEEDS, seed=0, **fields):
    "Judge one claim on one draw with known effects."
    logs = sample_logs(effects, 1, n_seeds, seed)[0]
    claim = make_claim(comparisons, tuple(range(10, 10 + n_seeds)), **fields)
    return judge_one(claim, table_of_logs(logs))


# Claims whose truth lies exactly at a threshold: name -> (effects of the arms, comparisons).
AT_THRESHOLD = {
    "direction": ([0, 0, 0.1, 0.2, 0, 0], best_of("a0", ["a1"])),
    "no_gain": ([0, -MARGIN, 0, 0, 0, 0], [st.Comparison("a0", "a1", MARGIN)]),
    "at_least": ([MARGIN, 0, 0, 0, 0, 0], [st.Comparison("a0", "a1", MARGIN)]),
    "best_of": ([0, 0, 1, 1, 1, 1], best_of("a0", ["a1", "a2", "a3", "a4", "a5"])),
    "best_of, all equal": ([0] * 6, best_of("a0", ["a1", "a2", "a3", "a4", "a5"])),
    "order": ([0, 1, 1, 2, 3, 4], order(["a0", "a1", "a2", "a3", "a4", "a5"])),
    "order, all equal": ([0] * 6, order(["a0", "a1", "a2", "a3", "a4", "a5"])),
}


@pytest.mark.parametrize("name", AT_THRESHOLD)
def test_false_positives_at_the_threshold(name):
    effects, comparisons = AT_THRESHOLD[name]
    logs = sample_logs(effects, seed=10 + list(AT_THRESHOLD).index(name))
    agrees, disagrees = word_rates(logs, comparisons)
    print(f"{name}: agrees {agrees:.4f}, disagrees {disagrees:.4f}")
    assert agrees < 0.025 + three_standard_errors(0.025)
    assert disagrees < 0.025 + three_standard_errors(0.025)
    if len(comparisons) == 1:
        assert agrees + disagrees == pytest.approx(0.05, abs=three_standard_errors(0.05))


def test_best_of_and_order_do_agree_when_true():
    logs = sample_logs(np.arange(6) * 0.1)
    names = [f"a{i}" for i in range(6)]
    for comparisons in (best_of(names[0], names[1:]), order(names)):
        agrees, disagrees = word_rates(logs, comparisons)
        assert agrees > 0.95
        assert disagrees == 0


# Claims of one figure, all at their thresholds when a0 = a1 = a2 = a5.
FAMILY_EFFECTS = [0, 0, 0, -MARGIN, MARGIN, 0]
FAMILY = [
    make_claim(best_of("a0", ["a1"]), id="direction"),
    make_claim(best_of("a0", ["a1", "a2"]), id="best of"),
    make_claim(order(["a2", "a1", "a0"]), id="order"),
    make_claim([st.Comparison("a0", "a3", MARGIN)], id="no gain"),
    make_claim([st.Comparison("a4", "a0", MARGIN)], id="at least"),
    make_claim(best_of("a5", ["a0"]), id="another direction"),
]


def test_judge_equals_the_simulated_tests():
    logs = sample_logs(FAMILY_EFFECTS, repetitions=8, seed=1)
    simulated = [simulated_p(logs, claim.comparisons) for claim in FAMILY]
    for i, draw in enumerate(logs):
        verdicts = st.judge(FAMILY, table_of_logs(draw))
        expected = [p[i] for p, _ in simulated]
        assert [v.p for v in verdicts] == pytest.approx(expected)
        assert [v.p_holm for v in verdicts] == pytest.approx(st.holm(expected))
        for verdict, (_, favourable) in zip(verdicts, simulated, strict=True):
            decided = st.AGREES if favourable[i] else st.DISAGREES
            assert verdict.word == (decided if verdict.p_holm < st.LEVEL else st.OPEN)


@pytest.mark.parametrize("n_true", [0, 3])
def test_family_wise_error_within_a_figure(n_true):
    logs = sample_logs(FAMILY_EFFECTS, HOLM_REPETITIONS, seed=2)
    null = np.stack([simulated_p(logs, claim.comparisons)[0] for claim in FAMILY], axis=-1)
    p = np.hstack([null, np.full((len(logs), n_true), 1e-6)])  # true claims are found at once
    family_error = np.mean([(st.holm(row)[:6] < st.LEVEL).any() for row in p])
    print(f"family-wise error, one figure, {n_true} true claims: {family_error:.4f}")
    assert family_error < 0.05 + three_standard_errors(0.05, HOLM_REPETITIONS)


def test_family_wise_error_of_independent_claims():
    p = np.random.default_rng(2).uniform(size=(HOLM_REPETITIONS, 12))
    p[:, 10:] = np.nan  # two claims were not run
    family_error = np.mean([(st.holm(row) < st.LEVEL).any() for row in p])
    print(f"family-wise error, independent claims: {family_error:.4f}")
    assert family_error < 0.05 + three_standard_errors(0.05, HOLM_REPETITIONS)


def test_holm_counts_claims_that_were_not_run():
    p = [0.01, np.nan, 0.04, np.nan]
    assert st.holm(p) == pytest.approx([0.04, 1, 0.12, 1])
    assert st.holm(p) == pytest.approx(multipletests([0.01, 1, 0.04, 1], method="holm")[1])


def test_interval_covers_the_truth_in_95_percent():
    truth = 0.03
    logs = sample_logs([0, truth, 1, 2, 3, 4])
    logs[:, 2, 1] = np.nan  # unbalanced
    logs[:, 5, :2] = np.nan
    sd, df = st.residual_sd(logs)
    effect = (logs[:, 1] - logs[:, 0]).mean(axis=-1)
    low, high = stats.t.interval(0.95, df, effect, sd * np.sqrt(2 / N_SEEDS))
    coverage = np.mean((low < truth) & (truth < high))
    assert df == 15 - 6 - 2
    assert coverage == pytest.approx(0.95, abs=three_standard_errors(0.05))
    assert np.mean(sd**2) == pytest.approx(SD**2, rel=0.03)


def test_power_agrees_with_simulation():
    for n_seeds, effect in ((2, 0.08), (3, 0.05), (5, 0.03)):
        agrees, _ = word_rates(
            sample_logs([0, effect, 0, 0, 0, 0], n_seeds=n_seeds), best_of("a0", ["a1"])
        )
        expected = st.power(effect, SD, n_seeds, df=(N_ARMS - 1) * (n_seeds - 1))
        print(f"{n_seeds} seeds, effect {effect}: power {expected:.3f}, simulated {agrees:.3f}")
        assert agrees == pytest.approx(expected, abs=three_standard_errors(0.5))


def test_power_of_no_gain_is_that_of_the_distance_from_the_margin():
    comparison = st.Comparison("a0", "a1", MARGIN)
    agrees, _ = word_rates(sample_logs([0] * N_ARMS), [comparison])
    expected = st.power(MARGIN, SD, N_SEEDS, df=(N_ARMS - 1) * (N_SEEDS - 1))
    assert agrees == pytest.approx(expected, abs=three_standard_errors(0.5))


def test_a_small_case_by_hand():
    values = {"a": {10: 2.0, 11: 2.2}, "b": {10: 2.5, 11: 2.6}, "c": {10: 3.0, 11: 3.6}}
    claim = st.Claim("U", "cpu", ("a", "b", "c"), best_of("a", ["b"]), (10, 11), 3000)
    [effect] = judge_one(claim, table(values)).effects

    x = np.log([[2.0, 2.2], [2.5, 2.6], [3.0, 3.6]])
    residual = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()
    sd = np.sqrt((residual**2).sum() / 2)  # (3 - 1) (2 - 1) degrees of freedom
    difference = x[1] - x[0]
    half_width = 4.302652729911275 * sd  # t quantile at 2 df; sqrt(2 / 2 seeds) = 1
    assert effect.df == 2
    assert effect.sd == pytest.approx(sd)
    assert effect.effect == pytest.approx(difference.mean())
    assert effect.low == pytest.approx(difference.mean() - half_width)
    assert effect.high == pytest.approx(difference.mean() + half_width)
    assert effect.differences == pytest.approx(dict(zip((10, 11), difference, strict=True)))
    t = difference.mean() / sd
    assert effect.p == pytest.approx(1 - t / np.sqrt(2 + t**2))  # closed form at 2 df


def test_two_arms_alone_give_the_paired_t_test():
    logs = sample_logs([0, 0.03], repetitions=1, n_seeds=5)[0]
    claim = make_claim(best_of("a0", ["a1"]), tuple(range(10, 15)), figure=())
    [effect] = judge_one(claim, table_of_logs(logs)).effects
    expected = stats.ttest_rel(logs[1], logs[0])
    assert effect.p == pytest.approx(expected.pvalue)
    assert (effect.low, effect.high) == pytest.approx(tuple(expected.confidence_interval()))


# ---- Errors of the first edition ----


def test_no_gain_agrees_when_nothing_is_gained():
    verdict = judge_effects([0, 0], [st.Comparison("a0", "a1", MARGIN)], n_seeds=10)
    assert verdict.word == st.AGREES


def test_no_gain_is_open_without_enough_seeds():
    comparison = st.Comparison("a0", "a1", MARGIN)
    assert judge_effects([0, 0], [comparison], n_seeds=1).word == st.OPEN
    assert judge_effects([0, 0], [comparison], n_seeds=2, seed=4).word == st.OPEN


def test_no_gain_agrees_when_17_layers_are_much_worse():
    verdict = judge_effects([0, 1.0], [st.Comparison("a0", "a1", MARGIN)])
    assert verdict.word == st.AGREES


def test_no_gain_disagrees_when_the_gain_is_large():
    verdict = judge_effects([0, -0.5], [st.Comparison("a0", "a1", MARGIN)])
    assert verdict.word == st.DISAGREES


def test_a_gain_within_the_margin_never_disagrees():
    verdict = judge_effects([0, -0.02], [st.Comparison("a0", "a1", MARGIN)], n_seeds=40)
    assert verdict.effects[0].high < 0
    assert verdict.word == st.AGREES


@pytest.mark.parametrize(("effect", "word"), [(-1.0, "agrees"), (0.5, "disagrees")])
def test_at_least_agrees_with_a_better_result(effect, word):
    verdict = judge_effects([effect, 0], [st.Comparison("a0", "a1", MARGIN)])
    assert verdict.word == word


def test_runs_at_unnamed_seeds_are_not_counted():
    logs = sample_logs([0, 0.3, 0.3], repetitions=1, n_seeds=6)[0]
    named = table_of_logs(logs[:, 3:], first_seed=10)
    reruns = table_of_logs(logs[:, :3], first_seed=0)
    claim = make_claim(best_of("a0", ["a1", "a2"]))
    both = pd.concat([named, reruns])
    assert judge_one(claim, both) == judge_one(claim, named)
    assert judge_one(claim, reruns).word == st.NOT_RUN


def test_a_conjunction_needs_each_comparison():
    chain = ["a0", "a1", "a2"]
    assert judge_effects([0, 1, 2], order(chain)).word == st.AGREES
    assert judge_effects([0, 1, 1], order(chain), seed=1).word == st.OPEN
    assert judge_effects([0, 2, 1], order(chain)).word == st.DISAGREES


def test_a_disagreement_within_a_claim_is_corrected_for_its_comparisons():
    assert st.claim_p([False, True, True], [0.02, 0.9, 0.001]) == pytest.approx(0.06)
    assert st.claim_p([True, True, True], [0.02, 0.03, 0.001]) == pytest.approx(0.03)
    assert st.claim_p([False, True], [1.0, 0.001]) == 1


def test_no_word_before_the_last_named_seed():
    logs = sample_logs([0, 1.0], repetitions=1, n_seeds=3)[0]
    measurements = table_of_logs(logs)
    measurements = measurements[(measurements.arm == "a0") | (measurements.seed < 12)]
    verdict = judge_one(make_claim(best_of("a0", ["a1"])), measurements)
    assert verdict.word == st.OPEN
    assert verdict.effects[0].low > 0  # the interval is shown all the same
    assert verdict.p == 1
    assert verdict.missing == {"a1": (12,)}
    assert verdict.reason == "needs a1 at seed 12"


# ---- Outcomes without a test ----


def test_without_runs():
    for measurements in (
        table({}),
        table({"a0": {10: 1.0}}),
        table({"a0": {10: 1}, "a1": {11: 1}}),
    ):
        verdict = judge_one(make_claim(best_of("a0", ["a1"])), measurements)
        assert verdict.word == st.NOT_RUN
        assert verdict.p_holm == 1
        assert set(verdict.missing) == {"a0", "a1"}
        assert verdict.effects[0].differences == {}
        assert verdict.reason.startswith("needs")


def test_one_of_two_comparisons_not_run_is_open():
    verdict = judge_one(
        make_claim(best_of("a0", ["a1", "a2"])),
        table_of_logs(sample_logs([0, 1], repetitions=1)[0]),
    )
    assert verdict.effects[1].differences == {}
    assert verdict.word == st.OPEN
    assert verdict.missing == {"a2": (10, 11, 12)}


def test_without_degrees_of_freedom_the_effect_has_no_interval():
    measurements = table({"a0": {10: 1.0}, "a1": {10: 2.0}})
    verdict = judge_one(make_claim(best_of("a0", ["a1"]), seeds=(10,)), measurements)
    [effect] = verdict.effects
    assert verdict.word == st.OPEN
    assert effect.effect == pytest.approx(np.log(2))
    assert effect.df == 0
    assert np.isnan([effect.low, effect.high, effect.sd]).all()


def test_a_word_that_does_not_survive_holm_is_open_and_says_so():
    measurements = table_of_logs([[0, 0, 0], [0.04, 0.05, 0.07], [1, 1, 1.001]])
    claim = make_claim(best_of("a0", ["a1"]))
    alone = judge_one(claim, measurements)
    assert alone.word == st.AGREES
    idle = [make_claim(best_of("a7", ["a8"]), id=f"idle {i}") for i in range(40)]
    first = st.judge([claim, *idle], measurements)[0]
    assert first.word == st.OPEN
    assert first.p_holm == pytest.approx(41 * alone.p)
    assert first.effects == alone.effects
    assert "Holm" in first.reason


def test_identical_values_are_open():
    measurements = table({"a0": {10: 1.0, 11: 1.0}, "a1": {10: 1.0, 11: 1.0}})
    verdict = judge_one(make_claim(best_of("a0", ["a1"]), seeds=(10, 11)), measurements)
    assert verdict.word == st.OPEN


def test_diverged_and_failed_runs_are_missing():
    measurements = table(
        {"a0": {10: 1.0, 11: 1.1, 12: 1.0}, "a1": {10: np.inf, 11: None, 12: -1.0}}
    )
    verdict = judge_one(make_claim(best_of("a0", ["a1"])), measurements)
    assert verdict.word == st.NOT_RUN
    assert verdict.missing == {"a1": (10, 11, 12)}


def test_conflicting_values_are_refused():
    twice = pd.concat([table({"a0": {10: 1.0}}), table({"a0": {10: 1.2}})])
    with pytest.raises(ValueError, match="duplicate"):
        st.log_table(make_claim(best_of("a0", ["a1"])), twice)


def test_comparisons_may_have_seeds_and_steps_of_their_own():
    late = table({"a0": {10: 1.0, 11: 1.1, 12: 1.2}, "a1": {10: 1.2, 11: 1.4}}, step=3000)
    early = table({"a0": {10: 2.0, 11: 2.1}}, step=1000)
    comparisons = [
        st.Comparison("a0", "a1", seeds=(10, 11)),
        st.Comparison("a0", "a1", seeds=(10, 11), steps=(("a0", 1000),)),
    ]
    claim = make_claim(comparisons, seeds=(10, 11, 12), step=3000)
    same_step, other_step = judge_one(claim, pd.concat([late, early])).effects
    assert same_step.missing == {}
    assert same_step.differences == pytest.approx({10: np.log(1.2), 11: np.log(1.4 / 1.1)})
    lacking = st.judge([claim], pd.concat([late[late.seed < 11], early]))[0]
    assert lacking.missing == {"a0": (11,), "a1": (11,)}
    assert other_step.differences == pytest.approx({10: np.log(0.6), 11: np.log(1.4 / 2.1)})


# ---- Training curves ----


def training_logs(n_steps, gap, spacing=1, seed=0):
    "Two logs that share the noise of their batches, one higher by a factor."
    rng = np.random.default_rng(seed)
    step = np.arange(spacing, n_steps + 1, spacing)
    shared = np.exp(rng.normal(-3, 0.5, len(step)))
    loss_a = shared * np.exp(gap) * (1 + rng.normal(0, 0.02, len(step)))
    loss_b = shared * (1 + rng.normal(0, 0.02, len(step)))
    return pd.DataFrame({"step": step, "loss": loss_a}), pd.DataFrame(
        {"step": step, "loss": loss_b}
    )


def test_paired_difference_finds_a_gap_below_the_noise_of_a_batch():
    log_a, log_b = training_logs(20_000, gap=0.03)
    running = st.paired_difference(log_a, log_b, window=250)
    assert running["step"].iloc[0] == 250
    independent = running.iloc[::250]
    z = (independent["difference"] - 0.03) / independent["se"]
    assert independent["se"].mean() < 0.003
    assert np.mean(np.abs(z) < 1.96) > 0.85
    assert z.std() == pytest.approx(1, abs=0.3)


def test_paired_difference_by_hand():
    log_a, log_b = training_logs(100, gap=0.1, spacing=10)
    [difference, se] = st.paired_difference(log_a, log_b, window=100)[["difference", "se"]].iloc[0]
    a = log_a["loss"].to_numpy()
    b = log_b["loss"].to_numpy()
    paired = a / a.mean() - b / b.mean()
    assert difference == pytest.approx(np.log(a.mean() / b.mean()))
    assert se == pytest.approx(paired.std(ddof=1) / np.sqrt(10))


def test_paired_difference_uses_common_steps_only():
    log_a, log_b = training_logs(1000, gap=0.1, spacing=10)
    assert len(st.paired_difference(log_a, log_b.iloc[40:], window=100)) == 60 - 9
    with pytest.raises(ValueError, match="fewer than two"):
        st.paired_difference(log_a.iloc[:1], log_b)
