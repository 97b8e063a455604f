"Figure 2 and the comparison of backbones: which experiments, which records."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from uvit_repro.ablations import against_adopted, collect, plot_figure2, variants
from uvit_repro.comparison import (
    collect_comparison,
    comparison,
    contender_table,
    contenders,
    plot_comparison,
)
from uvit_repro.config import PROTOCOLS, ParameterError, main_metric
from uvit_repro.runs.counting import params_of

LAPTOP = PROTOCOLS["laptop"]


def test_each_variant_changes_the_model_alone():
    found = variants(LAPTOP)
    assert [sum(v.panel == p for v in found) for p in "abcde"] == [7, 4, 3, 2, 3]
    assert len({v.exp.run_id for v in found}) == 15
    assert len({v.exp.run_id for v in found if v.label[1].isdigit()}) == 11
    for v in found:
        assert replace(v.exp, model=replace(LAPTOP.model, **v.changes)) == v.exp
        assert replace(v.exp, model=LAPTOP.model) == LAPTOP
    with pytest.raises(ParameterError, match="a, b, c, d, e"):
        variants(LAPTOP, "f")


def test_variants_are_compared_at_the_same_seed():
    rows = [("adopted", 0, 2.0), ("adopted", 1, 3.0), ("none", 0, 4.0), ("none", 1, 6.0)]
    made = pd.DataFrame([*rows, ("conv", 1, 3.0)], columns=["label", "seed", "value"])
    made = made.assign(panel="a", metric="fd", adopted=made.label == "adopted")
    table = against_adopted(made, "fd").loc["a"]
    assert table.loc["none"].tolist() == pytest.approx([np.log(2), np.log(2)])
    assert np.isnan(table.loc["conv", 0]) and table.loc["conv", 1] == 0


def test_the_published_figure():
    found = collect(variants(LAPTOP), origin="published")
    assert found.variant.nunique() == 15
    assert set(found.step) == {LAPTOP.train.n_steps}
    scales = {"laptop": found, "cpu": collect(variants(PROTOCOLS["cpu"]), origin="published")}
    assert scales["cpu"].seed.min() == 20  # seeds above those of the digits are found as well
    measures = {"laptop": main_metric(LAPTOP), "cpu": "heldout_loss"}
    for panel in "ae":
        fig = plot_figure2(panel, scales, measures)
        assert len(fig.axes) == 3  # no second axis in any panel


def test_contenders_have_the_budget_of_uvit():
    table = contender_table(contenders("laptop"))
    assert table.relative_parameters.between(0.7, 1.4).all()
    assert table.parameters["U-ViT"] == params_of(LAPTOP)
    assert "DiffiT, image form (our reading)" not in contenders("gpu")
    with pytest.raises(ParameterError, match="params"):
        contenders("laptop", "depth")


def test_the_published_comparison():
    found = collect_comparison(contenders("laptop"), "published")
    metric = main_metric(LAPTOP)
    assert found[found.metric == metric].groupby("backbone").seed.nunique().eq(2).all()
    assert found.backbone.nunique() == len(contenders("laptop")) and (found.seconds > 0).all()
    assert len(plot_comparison(found, metric).axes) == 4


@pytest.mark.parametrize("arms", ["time", "conditioning", "splits", "switches"])
def test_other_comparisons_are_different_experiments(arms):
    found = comparison(arms, "gpu" if arms != "time" else "laptop")
    assert len({e.run_id for e in found.values()}) == len(found) > 2


def test_an_unknown_comparison_is_refused():
    with pytest.raises(ParameterError, match="conditioning"):
        comparison("speed", "laptop")
