"""Counts against the closed form and the published tables; Figure 3; costs; memory."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from uvit_repro.ablations import collect
from uvit_repro.config import CONFIGS, PROTOCOLS, ParameterError, with_overrides
from uvit_repro.paper.numbers import load_paper
from uvit_repro.runs.counting import (
    count_macs,
    experiment_flops,
    forward_passes,
    macs_of,
    meta_model,
    params_of,
    predict_seconds,
    training_flops,
)
from uvit_repro.runs.evaluate import measurements_of
from uvit_repro.runs.execution import set_attention
from uvit_repro.runs.timing import matmul_rate, time_calls
from uvit_repro.scaling import (
    cost_table,
    figure3,
    figure3_base,
    figure3_costs,
    figure3_paper,
    macs_parts,
    paper_hours,
    plot_figure3,
)
from uvit_repro.uvit import UViT

H2 = CONFIGS["ImageNet 256x256 U-ViT-H/2"]


def on_meta(**kw) -> UViT:
    "A U-ViT without values."
    with torch.device("meta"):
        return UViT(**kw)


def random_experiment(seed: int):
    "A small U-ViT of random sizes and a random variant."
    rng = random.Random(seed)
    base = with_overrides(PROTOCOLS["smoke"], condition="none", p_uncond=0, cfg_scale=1)
    heads, patch = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 6])
    model = replace(
        base.model,
        patch_size=patch,
        embed_dim=4 * heads * rng.randint(1, 5),
        depth=rng.choice([1, 3, 5]),
        num_heads=heads,
        mlp_ratio=rng.choice([2.0, 4.0, 4.43]),
        mlp_time_embed=rng.random() < 0.3,
        skip=rng.choice(["concat", "add", "add_linear", "linear_add", "none", "add_scaled"]),
        time=rng.choice(["token", "adaln", "adaln_literal", "adaln_zero"]),
        conv=rng.choice(["after", "before", "none"]),
        patch_embed=rng.choice(["linear", "conv"]),
        pos_embed=rng.choice(["learned", "sincos2d", "none"]),
        condition=rng.choice(["none", "class", "text"]),
    )
    size = patch * rng.randint(1, 4)
    data = replace(base.data, img_size=size, in_chans=rng.randint(1, 4), text_dim=5, text_tokens=3)
    return replace(base, model=model, data=data)


@pytest.mark.parametrize("seed", range(12))
def test_count_equals_closed_form(seed):
    exp = random_experiment(seed)
    assert sum(macs_parts(exp).values()) == macs_of(exp)


def test_both_attention_paths_count_alike():
    net = on_meta(img_size=8, patch_size=2, in_chans=3, embed_dim=24, depth=3, num_heads=2)
    counts = set()
    for path, batch in (("sdpa", 1), ("math", 3)):
        set_attention(net, path)
        counts.add(count_macs(net, batch))
    assert len(counts) == 1


def test_counts_equal_the_published_tables():
    exact = load_paper("Table 2 (exact)")
    for name, e in CONFIGS.items():
        known = exact[(exact.dataset + " " + exact.method) == name].set_index("metric").number
        assert params_of(e) == known["params_exact"]
        assert macs_of(e) / 1e9 == pytest.approx(known["gflops"], abs=0.0501)
        assert sum(macs_parts(e).values()) == macs_of(e)
    assert params_of(CONFIGS["CIFAR10 U-ViT-S/2"]) == 44_255_328
    assert round(macs_of(H2) / 1e9) == 133  # Table 7


def test_counting_leaves_the_model_alone_and_takes_any_backbone():
    net = UViT(8, 2, 1, 16, 3, 2, num_classes=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    n = count_macs(net)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert count_macs(net, y=torch.tensor([3])) == n

    class Other(nn.Module):
        img_size, in_chans = 4, 2

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x, t, y=None, context=None):
            return self.fc(x.flatten(1)).view_as(x)

    assert count_macs(Other()) == 32 * 32


def test_training_takes_three_passes_and_checkpointing_repeats_one():
    e = PROTOCOLS["laptop"]
    macs = macs_of(e)
    assert count_macs(meta_model(e), training=True) == pytest.approx(3 * macs, rel=0.01)
    assert training_flops(macs) == 6 * macs and training_flops(macs, 1.0) == 8 * macs
    again = replace(e, execution=replace(e.execution, use_checkpoint=True))
    assert 3.5 * macs < count_macs(meta_model(again), training=True) < 4 * macs


def test_counts_do_not_depend_on_the_data_set():
    e = PROTOCOLS["gpu"]
    other = replace(e, data=replace(e.data, dataset="folder:/nowhere", data_sha256="0" * 64))
    assert macs_of(other) == macs_of(e)


def test_networks_of_figure3():
    networks = figure3(figure3_base("paper"))
    assert [(v.panel, v.label) for v in networks] == [
        *[("depth", size) for size in ("9", "13", "17")],
        *[("width", size) for size in ("256", "512", "768")],
        *[("patch", size) for size in "1248"],
    ]
    assert [v.exp.model.num_heads for v in networks if v.panel == "width"] == [4, 8, 12]
    base = networks[1].exp
    assert base.train.n_steps == 50_000 and not networks[1].changes
    assert all(replace(v.exp, model=base.model) == base for v in networks)
    costs = figure3_costs(base).set_index(["panel", "label"])
    for r in load_paper("Figure 3 (cost)").itertuples():
        mine = costs.loc[tuple(r.method.split()[:2])]
        if r.metric == "params_exact":
            assert mine.parameters == r.number
        else:
            assert mine.macs / 1e9 == pytest.approx(r.number, abs=0.0501)


def test_sizes_that_do_not_fit_are_left_out():
    networks = figure3(figure3_base("smoke"))
    assert [v.label for v in networks if v.panel == "depth"] == ["3", "7"]


def test_figure3_shows_the_papers_points_apart_from_ours():
    results = collect(figure3(figure3_base("laptop")), origin="published")
    assert results.run_id.nunique() >= 7
    figure = plot_figure3({"laptop": "fd_digits_cnn_test"})
    assert len(figure.axes) == 6  # no second axis in any panel
    assert set(figure3_paper().label) == {"2", "4", "8", "9", "13", "256", "512"}


def test_the_timer_measures_calls():
    assert len(time_calls(lambda: None, repeats=4)) == 4
    assert matmul_rate("cpu", sizes=(32, 64), repeats=3) > 0


def test_predicted_seconds():
    e, macs = PROTOCOLS["gpu"], macs_of(PROTOCOLS["gpu"])
    s = predict_seconds(e, 1e13)
    assert s["train"] == pytest.approx(10_000 * 128 * 6 * macs / 1e13)
    assert s["sample"] == pytest.approx(15_000 * 50 * 2 * macs / 1e13)
    assert s["loss"] == pytest.approx(4 * 2000 * 20 * 2 * macs / 1e13)
    assert s["total"] == pytest.approx(s["train"] + s["sample"] + s["loss"])
    with pytest.raises(ParameterError, match="above 0"):
        predict_seconds(e, 0)


def passes_of_measurement(exp, n: int) -> int:
    "Forward passes of one measurement of a run: n samples, or (n = 0) a held-out loss."
    if n == 0:
        return exp.evaluation.loss_images * exp.evaluation.loss_levels
    return n * exp.sampling.nfe * (2 if exp.sampling.cfg_scale != 1 else 1)


@pytest.mark.parametrize("exp", [*PROTOCOLS.values(), H2], ids=lambda e: e.protocol)
def test_every_measurement_of_a_run_is_counted(exp):
    passes = sum(passes_of_measurement(e, n) for e, _, n in measurements_of(exp))
    assert sum(forward_passes(exp).values()) == passes


def test_costs_of_the_released_configurations():
    hours = paper_hours().set_index("configuration").loc["ImageNet 256x256 U-ViT-H/2"]
    flops = 6 * macs_of(H2) * 1024 * 500_000
    assert (hours.hours, hours.device_hours) == (208, 8 * 208)
    assert hours.flops_per_device == pytest.approx(flops / (8 * 208 * 3600))
    table = cost_table(5e14).set_index("configuration")
    assert len(table) == len(CONFIGS)
    row = table.loc["ImageNet 256x256 U-ViT-H/2"]
    assert row["hours of training"] == pytest.approx(experiment_flops(H2)["train"] / 5e14 / 3600)
    with pytest.raises(ParameterError, match="above 0"):
        cost_table(0)
