"What a network costs: counts against closed forms, predictions against what is allocated, and the plan's arithmetic."

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from uvit_repro.config import CONFIGS, PROTOCOLS, ParameterError, experiment
from uvit_repro.runs.counting import (
    count_macs,
    evaluations,
    experiment_flops,
    macs_of,
    meta_model,
    params_of,
    predict_seconds,
    training_flops,
)
from uvit_repro.runs.execution import set_attention
from uvit_repro.scaling import (
    allocated_peak,
    allreduce_bytes,
    constructor,
    cost_table,
    count_training_macs,
    figure3,
    figure3_base,
    figure3_cells,
    forward_loss,
    group_of,
    machines_table,
    macs_formula,
    matmul_rate,
    measured_memory,
    memory_parts,
    model_flop_utilisation,
    paper_hours,
    pass_bytes,
    plan_step,
    predict_cost,
    random_sizes,
    saved_bytes,
    step_profile,
    time_calls,
    training_step,
)
from uvit_repro.uvit import UViT

rng = random.Random(1)
SIZES = [random_sizes(rng) for _ in range(7)]


def on_meta(**kw):
    with torch.device("meta"):
        return UViT(**kw)


@pytest.mark.parametrize(
    "kw", SIZES, ids=[f"{k['skip']}-{k['time']}-{k['conv']}-{k['patch_embed']}" for k in SIZES]
)
def test_count_equals_closed_form(kw):
    net = on_meta(**kw)
    for path, batch in (("sdpa", 1), ("math", 3)):
        set_attention(net, path)
        assert count_macs(net, batch) == macs_formula(**kw)


def test_every_choice():
    base = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 3,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
    }
    for field, values in {
        "skip": ("concat", "add", "add_linear", "linear_add", "none", "add_scaled"),
        "time": ("adaln", "adaln_literal", "adaln_zero"),
        "conv": ("before", "none"),
        "patch_embed": ("conv",),
        "pos_embed": ("sincos2d", "none"),
    }.items():
        for v in values:
            assert count_macs(on_meta(**base, **{field: v})) == macs_formula(
                **base, **{field: v}
            ), (field, v)


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
            return self.fc(x.flatten(1) + (0 if y is None else y[:, None])).view_as(x)

    assert count_macs(Other()) == count_macs(Other(), y=torch.tensor([1])) == 32 * 32


def test_training_counts():
    net = on_meta(img_size=16, patch_size=2, in_chans=3, embed_dim=64, depth=5, num_heads=2)
    set_attention(net, "math")
    macs = count_macs(net)
    assert (
        count_training_macs(net) == pytest.approx(3 * macs, rel=0.01)
        and training_flops(macs) == 6 * macs
        and training_flops(macs, 1.0) == 8 * macs
    )
    again = on_meta(
        img_size=16,
        patch_size=2,
        in_chans=3,
        embed_dim=64,
        depth=5,
        num_heads=2,
        use_checkpoint=True,
    )
    set_attention(again, "math")
    assert 3.5 * macs < count_training_macs(again) < 4 * macs


def test_table2():
    e = CONFIGS["ImageNet 256x256 U-ViT-H/2"]
    assert (
        params_of(e) == 500_832_016
        and round(macs_of(e) / 1e9) == 133
        and macs_formula(**constructor(e)) == macs_of(e)
    )


def test_figure3_cells_are_chapter_parameters():
    for p, n in {"smoke": 7, "gpu": 8}.items():
        cells = figure3_cells(p, seeds=(0, 3))
        assert len(cells) == 2 * n
        assert {experiment(**c).run_id for c in cells} == {
            replace(e, seed=s).run_id for *_, e in figure3(figure3_base(p)) for s in (0, 3)
        }
    assert figure3_base("gpu") == PROTOCOLS["gpu"] and figure3_base("paper").train.n_steps == 50_000
    with pytest.raises(ParameterError, match="depth, width, patch"):
        figure3(PROTOCOLS["gpu"], "colour")


@pytest.mark.parametrize("ck", (False, True))
@pytest.mark.parametrize("attention", ("sdpa", "math"))
def test_predicted_peak_is_the_allocators(ck, attention):
    net = UViT(16, 2, 3, 64, 3, 4, use_checkpoint=ck).train()
    set_attention(net, attention)

    def run():
        forward_loss(net, 4, "cpu", "fp32").backward()
        net.zero_grad(set_to_none=True)

    assert pass_bytes(net, 4, "fp32", attention)["peak"] == pytest.approx(
        allocated_peak(run), rel=0.01
    )


def test_kept_bytes_are_what_autograd_saves():
    net = UViT(8, 2, 3, 32, 3, 2)
    kept, saved = pass_bytes(net, 4, "fp32")["kept"], saved_bytes(net, 4, "fp32")
    assert saved <= kept <= saved + 4 * (4 * 3 * 8 * 8 + 1)  # the prediction and the loss


def test_memory_of_an_update():
    e = PROTOCOLS["smoke"]
    guess, real = memory_parts(e, attention="math"), measured_memory(e)
    assert all(guess[k] == real[k] for k in ("weights", "optimizer", "ema")) and guess[
        "total"
    ] == pytest.approx(real["total"], rel=0.15)
    plain, less = (
        memory_parts(meta_model(x), 128, "bf16")
        for x in (e, replace(e, execution=replace(e.execution, use_checkpoint=True)))
    )
    assert (
        less["kept"] < plain["kept"] / 3
        and less["total"] < plain["total"]
        and plain["optimizer"] == 2 * plain["weights"] == 8 * params_of(e)
    )
    assert all(p.device.type == "meta" for p in meta_model(e).parameters())


def test_rates_and_profile():
    assert (
        len(time_calls(lambda: None, repeats=4)) == 4
        and matmul_rate("cpu", sizes=(32, 64), repeats=3) > 0
    )
    assert model_flop_utilisation(5, 100, 3000) == 1.0
    _, step = training_step(PROTOCOLS["smoke"])
    p = step_profile(lambda: step(4), steps=1)
    assert (
        min(p.values()) >= 0
        and p["matrix products"] > 0
        and p["optimiser"] > 0
        and p["moving average"] > 0
        and p["attention"] > 0
    )
    assert (
        group_of("aten::addmm") == "matrix products"
        and group_of("aten::_softmax") == "attention"
        and group_of("aten::gelu") == "normalisation, activation, pointwise"
    )


def test_cost_model():
    e, m = PROTOCOLS["gpu"], macs_of(PROTOCOLS["gpu"])
    s = predict_seconds(e, 1e13)
    assert (
        s["train"] == pytest.approx(10_000 * 128 * 6 * m / 1e13)
        and s["sample"] == pytest.approx(15_000 * 50 * 2 * m / 1e13)
        and s["loss"] == pytest.approx(4 * 2000 * 20 * 2 * m / 1e13)
    )
    assert s["total"] == pytest.approx(s["train"] + s["sample"] + s["loss"]) and predict_seconds(
        e, 1e13, sampling=2e13
    )["sample"] == pytest.approx(s["sample"] / 2)
    from uvit_repro.runs.evaluate import measurements_of

    for e in (*PROTOCOLS.values(), *CONFIGS.values()):
        passes = sum(
            (
                n * x.sampling.nfe * (2 if x.sampling.cfg_scale != 1 else 1)
                if n
                else x.evaluation.loss_images * x.evaluation.loss_levels
            )
            for x, _, n in measurements_of(e)
        )
        assert sum(n for _, n in evaluations(e)) == passes
    assert predict_cost(e, 1e14, 0.4)["train_hours"] == pytest.approx(
        experiment_flops(e)["train"] / 4e13 / 3600
    )
    for bad in (0, -1.0, 1.2):
        with pytest.raises(ParameterError):
            predict_cost(e, 1e14, bad)
    with pytest.raises(ParameterError):
        predict_seconds(e, 0)


def test_paper_costs():
    h = paper_hours().set_index("configuration")
    r = h.loc["ImageNet 256x256 U-ViT-H/2"]
    assert (
        r.hours == 208
        and r.gpu_hours == 8 * 208
        and r.flops_per_device
        == pytest.approx(6 * 133.19668224e9 * 1024 * 500_000 / (8 * 208 * 3600))
    )
    assert len(cost_table(1e15, 0.5)) == len(CONFIGS) == len(h)


def test_plan():
    assert (
        allreduce_bytes(10, 1) == 0
        and allreduce_bytes(10, 2) == 40
        and allreduce_bytes(10, 4, 2) == 30
    )
    e = CONFIGS["ImageNet 256x256 U-ViT-L/2"]
    one, two = (plan_step(e, n, 4e14, 50e9) for n in (1, 2))
    assert (
        one["communicate"] == 0
        and one["update"] == one["compute"] == pytest.approx(2 * two["compute"])
        and two["communicate"] == pytest.approx(286_763_172 * 4 / 50e9)
    )
    slow = plan_step(e, 512, 4e14, 1e9)
    assert slow["update"] == pytest.approx(slow["compute"] + slow["communicate"] - slow["backward"])
    t = machines_table(1e18)
    assert (t["machines"] == 1).all() and (
        machines_table(1e12)["more than one machine"] == "yes"
    ).any()
    with pytest.raises(ParameterError):
        allreduce_bytes(10, 0)
