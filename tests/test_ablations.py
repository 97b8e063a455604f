"Figure 2 and the comparison of backbones: which experiments, which records."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from uvit_repro.ablations import (
    collect,
    figure2_cells,
    plot_figure2,
    sample_rows,
    standing,
    variants,
)
from uvit_repro.comparison import (
    collect_comparison,
    comparison,
    contender_table,
    contenders,
    plot_comparison,
    recorded_comparison,
)
from uvit_repro.config import PROTOCOLS, ParameterError, experiment, main_metric
from uvit_repro.runs.counting import params_of
from uvit_repro.runs.records import load_runs

LAPTOP = PROTOCOLS["laptop"]


def test_each_variant_changes_the_model_alone():
    found = variants(LAPTOP)
    assert [sum(v[0] == p for v in found) for p in "abcde"] == [7, 4, 3, 2, 3]
    assert len({e.run_id for *_, e in found}) == 15
    assert len({e.run_id for _, label, _, e in found if label[1].isdigit()}) == 11
    for _, _, fields, e in found:
        assert replace(e, model=replace(LAPTOP.model, **fields)) == e
        assert replace(e, model=LAPTOP.model) == LAPTOP
    with pytest.raises(ParameterError, match="a, b, c, d, e"):
        variants(LAPTOP, "f")


def test_the_runs_of_figure_2_begin_with_the_most_telling():
    cells = figure2_cells("laptop", seeds=(0, 1))
    assert len(cells) == 30
    assert cells[0] == {"protocol": "laptop", "seed": 0}
    assert cells[1]["skip"] == "none"
    assert experiment(**cells[0]).run_id == LAPTOP.run_id


def test_standing_pairs_by_seed():
    rows = [("adopted", 0, 2.0), ("adopted", 1, 3.0), ("none", 0, 4.0), ("none", 1, 6.0)]
    rows.append(("conv", 1, 3.0))
    made = pd.DataFrame(rows, columns=["variant", "seed", "value"])
    made = made.assign(metric="fd", step=10, status="ok")
    table = standing(made, "fd", 10)
    assert table.log_ratio["none"] == pytest.approx(np.log(2))
    assert table.log_ratio["conv"] == pytest.approx(0)
    assert table["mean"]["adopted"] == 2.5


def test_the_published_figure():
    found = collect("laptop", origin="published")
    assert found.variant.nunique() == 15
    fig = plot_figure2(found, main_metric(LAPTOP), LAPTOP, "ae")
    assert len(fig.axes) == 4
    assert next(iter(sample_rows(found))) == "adopted"


def test_contenders_have_the_budget_of_uvit():
    table = contender_table(contenders("laptop")).set_index("backbone")
    assert table.relative_parameters.between(0.7, 1.4).all()
    assert table.parameters["U-ViT"] == params_of(LAPTOP)
    assert "DiffiT, image form (our reading)" not in contenders("gpu")
    with pytest.raises(ParameterError, match="params"):
        contenders("laptop", "depth")


def test_recorded_contenders_are_recognised():
    named = contenders("laptop", seed=3)
    other = replace(LAPTOP, model=replace(LAPTOP.model, skip="add"))
    runs = [{"experiment": e, "run_id": e.run_id} for e in [*named.values(), other]]
    assert recorded_comparison(runs, "laptop") == {3: named}


def test_the_published_comparison():
    experiments = recorded_comparison(load_runs("published"), "laptop")
    assert list(experiments) == [0, 1]
    found = collect_comparison(experiments, "published")
    assert (found.seconds > 0).all()
    fig = plot_comparison(found, main_metric(LAPTOP), "laptop", costs=("macs", "seconds"))
    assert len(fig.axes) == 2


@pytest.mark.parametrize("arms", ["time", "conditioning", "splits", "switches"])
def test_other_comparisons_are_different_experiments(arms):
    found = comparison(arms, "gpu" if arms != "time" else "laptop")
    assert len({e.run_id for e in found.values()}) == len(found) > 2


def test_an_unknown_comparison_is_refused():
    with pytest.raises(ParameterError, match="conditioning"):
        comparison("speed", "laptop")
