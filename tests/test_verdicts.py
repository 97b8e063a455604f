"From measurements to verdicts: the file of tests fits the claims, the statistics keep their promises, the rules hold on made-up records."

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from uvit_repro.config import ParameterError
from uvit_repro.data.features import FEATURE_EXTRACTORS
from uvit_repro.metrics import METRICS, metric_name
from uvit_repro.paper.claims import load_claims
from uvit_repro.paper.numbers import published
from uvit_repro.report import verdicts as V
from uvit_repro.runs.records import load_results

TESTED = [t for t in V.load_tests() if t["kind"] in V.TESTED]
FIG2 = [{}] + V.load_tests("U01")["others"]


def made(means, protocol="paper", seeds=range(3), rng=0, losses=None, arms=FIG2, **kw):
    return V.made_up_results(
        [(a, m, l) for a, m, l in zip(arms, means, losses or means)],
        protocol,
        seeds,
        np.random.default_rng(rng),
        **kw,
    )


def test_every_claim_has_one_test_and_the_reverse():
    assert [t["id"] for t in V.load_tests()] == list(load_claims().id) and len(V.load_tests()) == 70
    assert {t["kind"] for t in V.load_tests()} <= set(V.KINDS)
    fields = (
        set(V.tests_file()["fields"])
        | set(V.tests_file()["defaults"])
        | {
            "id",
            "kind",
            "then",
            "needs",
            "value",
            "factor",
            "best",
            "others",
            "better",
            "worse",
            "chain",
            "gain",
            "no_gain",
            "fast",
            "slow",
            "arm",
            "laptop",
            "gpu",
            "paper",
        }
    )
    for t in V.load_tests():
        assert set(t) <= fields, set(t) - fields
        assert t["seeds"] >= 2 and (t["kind"] in V.TESTED or t["kind"] == "count" or t["needs"])
    with pytest.raises(ParameterError, match="U99.*U01"):
        V.load_tests("U99")


@pytest.mark.parametrize("t", TESTED, ids=lambda t: t["id"])
def test_overrides_build_experiments_and_metrics_exist(t):
    known = (
        {metric_name(m.name, n, p) for m in METRICS for n in FEATURE_EXTRACTORS for p in (1, 2, 4, 8)}
        | {"heldout_loss"}
        | set(V.tests_file()["other_metrics"])
    )
    assert t["protocols"] and set(t["protocols"]) <= {"laptop", "gpu", "paper"}
    for p in t["protocols"]:
        for arms in V.arms_of(t, p):
            exps = [V.arm_experiment(a, p) for a in arms]
            assert len(
                {(e.run_id, e.sampling, e.evaluation, a.get("metric")) for e, a in zip(exps, arms)}
            ) == len({str(a) for a in arms}), "two arms are one run"
            for a, e in zip(arms, exps):
                assert V.metric_of(a.get("metric", t["metric"]), e) in known
                assert t["second"] is None or V.metric_of(t["second"], e) in known
        for n_steps in V.settings(t, p):
            assert V.arm_experiment(arms[0], p, n_steps).train.n_steps >= (n_steps or 1)
    protocol, n_steps = V.deciding(t)
    row = V.gather(
        V.Ledger(load_results("published").iloc[:0]),
        t,
        protocol,
        V.arms_of(t, protocol)[0],
        n_steps,
    )
    assert row["decides"], "the plan must lead to runs that can decide"


@pytest.mark.parametrize(
    "claim, arms",
    [
        ("D04", "time"),
        ("D06", "conditioning"),
        ("A02", "splits"),
        ("U44", "backbones"),
        ("U23", None),
    ],
)
def test_what_a_chapter_runs_is_what_the_claim_asks_for(claim, arms):
    from uvit_repro.comparison import comparison
    from uvit_repro.genvit import arm

    ours = {
        e.run_id
        for e in (
            comparison(arms, "gpu").values()
            if arms
            else (arm("gpu", "uvit"), arm("gpu", "matched"))
        )
    }
    assert {
        V.arm_experiment(a, "gpu").run_id for c in V.arms_of(V.load_tests(claim), "gpu") for a in c
    } <= ours


def test_steps_asked_for_agree_with_the_record_of_measurements():
    "A paper protocol measures at the step at which it is judged, and the levels are the paper's."
    for t in TESTED:
        if "paper" in t["protocols"] and t["steps"]:
            e = V.arm_experiment(V.arms_of(t, "paper")[0][0], "paper")
            step = min(t["steps"], e.train.n_steps)
            assert step in (*e.evaluation.curve_steps, e.train.n_steps) or t["id"] == "U16", t["id"]
    assert V.load_tests("U22")["value"] == published("Table 1", "CIFAR10", "U-ViT-S/2", "FID")
    assert V.load_tests("U24")["value"] == published("Table 1", "CelebA 64x64", "U-ViT-S/4", "FID")


def test_pooled_sd_against_least_squares_with_gaps():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4))
    x[1, 2:] = np.nan
    x[4, :3] = np.nan
    x[3, 0] = np.nan
    cells = [
        (a, s) for a in range(4) for s in range(4) if not np.isnan(x[a, s])
    ]  # the last arm has one seed only
    X = np.zeros((len(cells), 8))
    y = np.array([x[c] for c in cells])
    for i, (a, s) in enumerate(cells):
        X[i, a] = X[i, 4 + s] = 1
    _, _, rank, _ = np.linalg.lstsq(X, y, rcond=None)
    fit = X @ np.linalg.lstsq(X, y, rcond=None)[0]
    sd, df = V.pooled_sd(x)
    assert df == len(cells) - rank and math.isclose(sd, math.sqrt(2 * ((y - fit) ** 2).sum() / df))
    batch = np.stack([x, 3 * x + 1])
    assert np.allclose(V.pooled_sd(batch)[0], [sd, 3 * sd])
    assert V.pooled_sd(np.full((3, 4), np.nan))[1] == 0


def test_interval_p_and_holm_against_scipy_and_by_definition():
    rng = np.random.default_rng(1)
    for n in (2, 3, 7):
        d = rng.normal(0.5, 1, n)
        ref = scipy.stats.ttest_1samp(d, 0)
        ci = ref.confidence_interval()
        assert np.allclose(V.paired_interval(d), (d.mean(), ci.low, ci.high)) and math.isclose(
            V.p_two_sided(d.mean(), d.std(ddof=1) / math.sqrt(n), n - 1), ref.pvalue
        )

    def closed(
        p, alpha=0.05
    ):  # Holm as the closure of Bonferroni: rejected when every set that holds it is
        return [
            all(
                min(p[j] for j in s) * len(s) <= alpha
                for r in range(1, len(p) + 1)
                for s in itertools.combinations(range(len(p)), r)
                if i in s
            )
            for i in range(len(p))
        ]

    for p in rng.random((60, 5)) ** 3:
        assert (V.holm(p) <= 0.05).tolist() == closed(p)
    assert np.allclose(V.holm([0.04, np.nan]), [0.08, 1])
    assert math.isnan(V.paired_interval([0.3])[1]) and math.isnan(V.p_two_sided(0.3, 0.1, 0))


def logs_of(reps, effects, seeds, rng, sd=1.0):
    return (
        np.r_[0, effects][:, None]
        + 5 * rng.normal(size=(reps, 1, seeds))
        + sd * rng.normal(size=(reps, len(effects) + 1, seeds))
    )


def p_of(logs):
    sd, df = V.pooled_sd(logs)
    d = logs[:, 1:] - logs[:, :1]
    return V.p_two_sided(d.mean(-1), (sd / math.sqrt(logs.shape[-1]))[:, None], df), df


@pytest.mark.parametrize("variants, seeds", [(1, 3), (4, 2), (4, 3), (10, 3)])
def test_false_positives(variants, seeds):
    reps, rng = 20_000, np.random.default_rng(variants * 10 + seeds)
    p, _ = p_of(logs_of(reps, np.zeros(variants), seeds, rng))
    se = math.sqrt(0.05 * 0.95 / reps)
    assert abs((p[:, 0] < 0.05).mean() - 0.05) < 4.5 * se  # one comparison: exactly the level
    family = (V.holm(p) < 0.05).any(-1).mean()
    assert family < 0.05 + 4 * se
    if variants > 3:
        assert (p < 0.05).any(-1).mean() > 0.08  # what Holm is for


@pytest.mark.parametrize(
    "effect, seeds, questions", [(1.0, 3, 1), (1.0, 6, 1), (2.0, 3, 8), (1.5, 4, 8)]
)
def test_planted_effects_are_found_at_the_stated_rate(effect, seeds, questions):
    reps, rng = 10_000, np.random.default_rng(seeds)
    p, df = p_of(logs_of(reps, [effect * math.sqrt(2), 0, 0], seeds, rng))
    seen, expected = (
        (p[:, 0] < 0.05 / questions).mean(),
        V.power(effect, 1, seeds, df, 0.05 / questions),
    )
    assert abs(seen - expected) < 4.5 * math.sqrt(expected * (1 - expected) / reps)
    ref, t = (
        scipy.stats.nct(df, effect * math.sqrt(seeds)),
        scipy.stats.t.isf(0.025 / questions, df),
    )
    assert math.isclose(expected, ref.sf(t) + ref.cdf(-t), abs_tol=1e-8)


def test_seeds_needed():
    for e in (0.4, 1, 3):
        n = V.seeds_needed(e, 1, 0.01, variants=2)
        assert V.power(e, 1, n, 2 * (n - 1), 0.01) >= 0.8 and (
            n == 2 or V.power(e, 1, n - 1, 2 * (n - 2), 0.01) < 0.8
        )
    assert (
        V.seeds_needed(2, 4) == V.seeds_needed(-0.5, 1)
        and V.seeds_needed(0.01, 1) is None
        and V.seeds_needed(math.nan, 1) is None
    )


def test_no_gain_is_never_a_failed_test():
    rng = np.random.default_rng(3)
    rates = {}
    for name, mu in {
        "nothing": (-1, -1),
        "half": (-1, -1.5),
        "all": (-1, -2),
        "flat": (0, 0),
    }.items():
        for sd in (0.1, 1.0):
            logs = logs_of(8000, mu, 3, rng, sd)
            s, df = V.pooled_sd(logs)
            r = V.no_gain_test(logs, (0, 1), (1, 2), s, df)
            rates[name, sd] = (r["p"] < 0.05).mean()
            if (name, sd) == ("all", 1.0):
                assert (
                    V.p_two_sided(r["gain"], s / math.sqrt(3), df) > 0.05
                ).mean() > 0.6  # insignificant, and still not "no gain"
    bound = 0.05 + 4.5 * math.sqrt(0.05 * 0.95 / 8000)
    assert (
        all(v < bound for (n, _), v in rates.items() if n != "nothing")
        and rates["nothing", 0.1] > 0.9
        and rates["nothing", 1.0] < 0.2
    )
    t1, t2 = (0.1 - 0.3) / 0.2, (0.1 + 0.3) / 0.2
    assert math.isclose(
        V.equivalence(0.1, 0.2, 5, 0.3), max(scipy.stats.t.cdf(t1, 5), scipy.stats.t.sf(t2, 5))
    )


def test_best_of_needs_all_comparisons():
    full = made([0, 0.3, 0.3, 0.3, 0.3])
    v = V.verdict("U01", full, "paper")
    assert (
        v.verdict == "supported"
        and v.seeds == 3
        and v.df == 8
        and len(v.run_ids) == 15
        and not v.exploratory
        and v.plan is None
        and v.low > 0
    )
    for i in range(1, 5):
        gone = {V.arm_experiment(FIG2[i], "paper", seed=s).run_id for s in range(3)}
        v = V.verdict("U01", full[~full.run_id.isin(gone)], "paper")
        assert v.verdict == "undecided" and "1 of 4 comparisons are not run" in v.reason
    v = V.verdict("U01", made([0, 0.3, 0.3, 0.3, 0]), "paper")
    assert v.verdict == "undecided" and "skip=none" in v.reason
    assert V.verdict("U01", made([0, 0.3, 0.3, 0.3, -0.3]), "paper").verdict == "contradicted"
    assert (
        V.verdict("U03", made([0, 0.5, 0.4, 0.2, 0.6], arms=FIG2), "paper").verdict
        == "contradicted"
    )  # add must be worse than none


def test_claims_about_representations_read_other_evaluations():
    from uvit_repro.cka import cka_measures

    assert set(V.tests_file()["other_metrics"]) <= set(cka_measures(np.eye(13)))
    e = [V.arm_experiment({"skip": "add"}, "gpu", seed=s) for s in range(3)]
    rng = np.random.default_rng(0)
    rows = [
        {
            "run_id": x.run_id,
            "eval_id": "cka-1",
            "metric": m,
            "step": 10_000,
            "seed": x.seed,
            "value": v * math.exp(0.005 * rng.normal()),
            "status": "ok",
            "note": "",
            "protocol": "gpu",
            "started": "2999",
        }
        for x in e
        for m, v in (
            ("cka_within_0_3", 0.97),
            ("cka_within_6_11", 0.9),
            ("cka_between_0_3_and_6_11", 0.6),
        )
    ]
    assert V.verdict("U20", pd.DataFrame(rows), "gpu").label == "same direction at 10K on cifar10"
    twice = pd.DataFrame(rows + [dict(r, eval_id="cka-2") for r in rows])
    v = V.verdict("U20", twice, "gpu")
    assert v.verdict == "not run" and "2 ways" in v.reason


@pytest.mark.parametrize("size", [0.02, 0.3, 3.0])
def test_one_seed_never_supports(size):
    for claim in ("U01", "U02", "U03", "U06", "U07", "U08", "U11"):
        arms = list(
            {str(a): a for c in V.arms_of(V.load_tests(claim), "paper") for a in c}.values()
        )
        t = V.load_tests(claim)
        r = made(
            [size * i for i in range(len(arms))], seeds=[0], arms=arms, step=t["steps"] or None
        )
        v = V.verdict(claim, r, "paper")
        assert (
            v.verdict == "undecided"
            and v.seeds == 1
            and math.isnan(v.low)
            and "1 of 3 seeds" in v.reason
        ), v
    r = made([0, size], "laptop", range(2), arms=[{}, {"pos_embed": "none"}])
    assert V.verdict("U11", r, "laptop").verdict == "undecided"  # two seeds are not three


def test_sign_disagreement_and_missing_measures():
    arms = [{}, {"time": "adaln"}]
    go = lambda means, losses, **kw: V.verdict(
        "U06", made(means, "gpu", arms=arms, losses=losses, n_steps=100_000, **kw), "gpu"
    )
    assert (
        go([0, 0.3], [0, 0.3]).verdict == "supported"
        and go([0, -0.3], [0, -0.3]).verdict == "contradicted"
    )
    for means, losses in (([0, 0.3], [0, -0.3]), ([0, -0.3], [0, 0.3])):
        v = go(means, losses)
        assert v.verdict == "undecided" and "heldout_loss disagrees" in v.reason
    v = go([0, 0.3], [0, None])
    assert v.verdict == "undecided" and "heldout_loss is missing" in v.reason
    r = made([0, 0.3], "gpu", arms=arms, n_steps=100_000)
    main = r.metric == "fd_resnet20_test"
    r.loc[main, "value"] = math.nan
    r.loc[main, "status"] = "not run"
    r.loc[main, "note"] = "needs 65 samples"
    v = V.verdict("U06", r, "gpu")
    assert v.verdict == "not run" and "needs 65 samples" in v.reason
    assert V.verdict("U06", r.iloc[:0], "gpu").verdict == "not run"
    r = made([0, 0.3], "gpu", arms=arms, n_steps=100_000)
    r.loc[r.metric == "fd_resnet20_test", "eval_id"] = "0100000-ddim10-ffffffff"
    assert V.verdict("U06", r, "gpu").verdict == "not run", (
        "another sampler's numbers are not the protocol's"
    )


def test_short_runs_other_data_and_seen_runs_show_a_direction_only():
    arms = [{}, {"time": "adaln"}]
    for sign, word in ((1, "same direction"), (-1, "opposite direction")):
        assert (
            V.verdict("U06", made([0, 0.3 * sign], "gpu", arms=arms), "gpu").label
            == f"{word} at 10K on cifar10"
        )
        assert (
            V.verdict("U06", made([0, 0.3 * sign], "laptop", arms=arms), "laptop").label
            == f"{word} at 4K on digits"
        )
    lost = [{}, {"pos_embed": "none"}]
    seen = {"started": "2026-11-20T11:00:00Z"}
    assert V.verdict("U11", made([0, 2], "laptop", arms=lost), "laptop").verdict == "supported"
    assert (
        V.verdict("U11", made([0, 0.3], "laptop", arms=lost), "laptop").verdict == "contradicted"
    ), "worse, but not twice as bad"
    old = made([0, 2], "laptop", arms=lost, **seen)
    v = V.verdict("U11", old, "laptop")
    assert v.exploratory and v.label == "same direction at 4K on digits, exploratory"
    assert "for s in 3 4 5;" in v.plan.command and v.plan.protocol == "laptop"
    v = V.verdict("U11", old.drop(columns="started"), "laptop")
    assert v.exploratory, "runs of unknown date were seen"
    new = made([0, 2], "laptop", [3, 4, 5], arms=lost)
    v = V.verdict("U11", pd.concat([old, new]), "laptop")
    assert v.verdict == "supported" and v.seeds == 3
    new = made([0, 2], "laptop", [3, 4], arms=lost)
    v = V.verdict("U11", pd.concat([old, new]), "laptop")
    assert v.exploratory and v.seeds == 5
    short = V.verdict("U11", made([0, 0.3], "laptop", arms=lost, **seen), "laptop")
    assert short.verdict == "undecided" and "less than the margin" in short.reason


def test_no_gain_end_to_end():
    arms = [{"depth": 9}, {}, {"depth": 17}]
    go = lambda *m, **kw: V.verdict("U13", made(m, "gpu", arms=arms, n_steps=50_000, **kw), "gpu")
    assert go(0.4, 0, 0).verdict == "supported" and go(0.4, 0, -0.4).verdict == "contradicted"
    noisy = [go(0.4, 0, 0, sd=0.4, rng=i) for i in range(12)]
    assert all(v.verdict == "undecided" for v in noisy) and all(
        v.plan.seeds is None or v.plan.seeds > 3 for v in noisy
    )
    assert go(0.4, 0, 0.4).verdict == "undecided", "far worse is not equivalent"
    assert go(0.4, 0, 0, losses=[0.4, 0, -0.4]).verdict == "undecided"


def test_speed_and_level():
    e = {
        k: [V.arm_experiment({"skip": k}, "paper", seed=s) for s in range(3)]
        for k in ("concat", "none")
    }
    rng = np.random.default_rng(0)

    def curves(factor, loss_factor):
        rows = []
        for k, exps in e.items():
            for x in exps:
                for step in (50_000, 100_000, 150_000):
                    for i in V.planned_evaluations(x, step):
                        f = (loss_factor if "-loss-" in i else factor) if k == "concat" else 1
                        rows.append(
                            {
                                "run_id": x.run_id,
                                "eval_id": i,
                                "metric": "heldout_loss" if "-loss-" in i else "fid",
                                "step": step,
                                "seed": x.seed,
                                "value": 1e6 / (step * f) * math.exp(0.01 * rng.normal()),
                                "status": "ok",
                                "note": "",
                                "protocol": "paper",
                                "started": "2999",
                            }
                        )
        return pd.DataFrame(rows)

    v = V.verdict("U04", curves(2.5, 2.5), "paper")
    assert v.verdict == "supported" and abs(v.effect - math.log(2.5)) < 0.25 and v.df == 2
    assert (
        V.verdict("U04", curves(1.0, 1.0), "paper").verdict == "contradicted"
        and V.verdict("U04", curves(2.5, 1.0), "paper").verdict == "undecided"
    )
    for value, word in ((3.11, "supported"), (6.0, "contradicted")):
        r = V.made_up_results(
            [({}, math.log(value), 0)],
            "paper",
            range(3),
            np.random.default_rng(0),
            sd=0.01,
            seed_sd=0.005,
        )
        assert V.verdict("U22", r, "paper").verdict == word


def test_plans_cost_and_commands():
    arms = [{}, {"time": "adaln"}]
    r = made([0, 0.05], "gpu", arms=arms, sd=0.05, rng=4)
    cost = lambda e: {"train": e.train.n_steps / 10, "sample": 7, "total": e.train.n_steps / 10 + 7}
    v = V.verdict("U06", r, "gpu", cost)
    p = v.plan
    assert v.verdict == "undecided" and p.steps == 100_000 and p.protocol == "gpu"
    n = p.seeds or 3
    assert p.runs == 2 * n and (
        p.hours is None or math.isclose(p.hours, 2 * n * (100_000 / 10 + 7) / 3600)
    )
    assert (
        p.command.startswith("for s in 0 1 2")
        and p.command.count("papermill nbs/05_ablations.ipynb") == 2
        and "-p n_steps 100000" in p.command
        and "-p time adaln" in p.command
    )
    row = V.effects(r, "gpu", "Figure 2").query("claim == 'U06'").iloc[0]
    assert (
        p.seeds == max(3, V.seeds_needed(row.effect, row.sd, 0.05 / row.questions) or 10**9)
        if p.seeds
        else V.seeds_needed(row.effect, row.sd, 0.05 / row.questions) is None
    )
    assert V.verdict("U06", r, "gpu", lambda e: 1.0).plan.hours in (None, 2 * n / 3600)
    for v in V.all_verdicts(r.iloc[:0], ["gpu"]):
        if v.plan:
            assert (
                "  " not in v.plan.command.replace("; ", ";")
                and v.plan.seeds == 3
                and "no spread" in v.plan.basis
            )


def test_all_claims_from_the_published_records():
    r = load_results("published")
    out = V.all_verdicts(r)
    table = V.verdict_frame(out)
    assert list(dict.fromkeys(table.id)) == list(load_claims().id) and {
        v.verdict for v in out
    } <= set(V.VERDICTS)
    assert {v.claim for v in out if v.verdict == "supported" and not v.run_ids} == {
        "U36",
        "U37",
        "D12",
        "D13",
    }
    assert all(v.reason for v in out) and all(v.plan for v in out if v.verdict == "undecided")
    started = r.groupby("run_id").folder.first().map(V.run_started)
    for v in out:
        if v.run_ids and v.verdict in ("supported", "contradicted"):
            assert min(started[i] for i in v.run_ids) >= V.fixed_at()
    assert {v.claim: v.verdict for v in V.all_verdicts(r.sample(frac=1, random_state=0))} == {
        v.claim: v.verdict for v in out
    }, "the order of rows does not matter"


def test_forest_draws_every_comparison():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    r = pd.concat(
        [made([0, 0.3, 0.2, 0.1, 0.4], p, rng=i) for i, p in enumerate(("laptop", "gpu"))]
    )
    f = pd.concat([V.effects(r, p) for p in ("laptop", "gpu")])
    fig = V.plot_forest(f, V.all_verdicts(r, ["laptop", "gpu"]))
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert len(labels) == len(f[f.n > 0].drop_duplicates(["claim", "comparison"])) and any(
        "U03" in l for l in labels
    )
    plt.close(fig)
