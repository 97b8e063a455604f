"GenViT: released outputs, published counts, stochastic depth as a function of the input, its arms."

import json
import math

import pytest
import torch

from uvit_repro.config import ParameterError, experiment
from uvit_repro.data.files import CheckpointError
from uvit_repro.genvit import (
    IMAGES,
    PRESETS,
    Block,
    GenViT,
    TimeEmbedding,
    drop_masks,
    load_genvit,
    published_run,
    scale_shift,
)
from uvit_repro.runs.counting import meta_model
from uvit_repro.runs.execution import set_attention
from uvit_repro.train import build_model, golden_file
from uvit_repro.uvit import count_parameters, init_weights

SMALL = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "classifier": 0,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(*args, **kwargs):
    with torch.device("meta"):
        return GenViT(*args, **kwargs)


def closed_form(side, patch, D, classes, depth=9):
    "Parameters of GenViT from the authors' table alone."
    L, pixels = (side // patch) ** 2 + 1, patch * patch * 3
    time = (D + 1) * 4 * L + (4 * L + 1) * 4 * L
    attention, mlp = 3 * D * D + (D + 1) * D, (D + 1) * 2 * D + (2 * D + 1) * D
    blocks = depth * (4 * D + attention + mlp + (4 * L + 1) * 2 * L)
    ends = (pixels + 1) * D + (D + 1) * pixels
    return L * D + D + time + blocks + ends + 2 * D + (D + 1) * classes


def test_published_counts():
    assert count_parameters(on_meta()) == 11_185_068
    assert count_parameters(on_meta(128, 8)) == 17_109_948
    for name, (side, classes) in IMAGES.items():
        sizes = {k: v for k, v in PRESETS[name].items() if k != "model"}
        net = on_meta(side, classifier=classes, **sizes)
        want = closed_form(side, sizes["patch_size"], sizes["embed_dim"], classes)
        assert count_parameters(net) == want


@pytest.mark.parametrize("path", ["sdpa", "math"])
def test_released_outputs(path):
    golden, part = golden_file("genvit")
    heads = json.loads(str(golden["config"]))["heads"]
    released, inputs = torch.tensor(golden["output"]), part("input")
    net = load_genvit(part("state"), heads, time_twice=False)
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in part("state").items()
    }
    set_attention(net, path)
    with torch.inference_mode():
        assert (net(inputs["x"], inputs["t"]) - released).abs().max() < 1e-5
        twice = load_genvit(part("state"), heads)
        assert (twice(inputs["x"], inputs["t"]) - released).abs().max() > 1


def test_a_training_file_of_the_authors_loads(tmp_path):
    part = golden_file("genvit")[1]
    inner = {f"denoise_fn.{k}": v for k, v in part("state").items()}
    path = tmp_path / "ema_checkpoint.pth"
    torch.save({"model_state_dict": {"betas": torch.zeros(1000), **inner}}, path)
    net, again = load_genvit(part("state"), 6), load_genvit(path, 6)
    x, t = torch.randn(1, 3, 16, 16), torch.ones(1)
    assert torch.equal(net(x, t), again(x, t))


def test_other_files_are_refused():
    state = dict(golden_file("genvit")[1]("state"))
    with pytest.raises(CheckpointError, match="not a GenViT checkpoint"):
        load_genvit({"model_state_dict": {"a": torch.zeros(1)}})
    with pytest.raises(ParameterError, match="in_chans = 1"):
        load_genvit(state, 6, in_chans=1)
    state["recon_head.0.weight"] = state["recon_head.0.weight"][:, :3]
    with pytest.raises(CheckpointError, match="width 48 with 3 layers"):
        load_genvit(state, 6)


def test_time_embedding_by_its_formula():
    want = [f(41.5 * 10000 ** (-k / 3)) for f in (math.sin, math.cos) for k in range(4)]
    assert torch.allclose(TimeEmbedding(8)(torch.tensor([41.5]))[0], torch.tensor(want), atol=1e-5)


def test_scale_and_shift_act_on_tokens_before_each_branch():
    block = Block(16, 2, 2.0)
    h, time = torch.randn(2, 5, 16), torch.randn(2, 10)
    scaled = h * (1 + time[:, :5, None]) + time[:, 5:, None]
    assert torch.equal(scale_shift(h, time), scaled)
    attn, mlp = block
    once = scaled + attn(scaled)
    twice = scale_shift(once, time)
    assert torch.allclose(block(h, time), twice + mlp(twice), atol=1e-6)
    block.time_twice = False
    assert torch.allclose(block(h, time), once + mlp(once), atol=1e-6)


CONDITIONS = [
    ({}, {}),
    ({"num_classes": 2}, {"y": torch.tensor([0, 1])}),
    ({"clip_dim": 6, "num_clip_token": 5}, {"context": torch.randn(2, 5, 6)}),
]


@pytest.mark.parametrize("built, given", CONDITIONS, ids=["none", "class", "text"])
def test_gradient_reaches_every_parameter(built, given):
    net = init_weights(GenViT(**SMALL, **built, drop_path=0), 1).train()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    net(x, t, **given).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_stochastic_depth_is_a_function_of_the_input():
    x = torch.randn(4000, 1, 4, 4)
    masks = drop_masks(x, 8, 0.3)
    kept = (masks > 0).double()
    assert torch.equal(masks[:, 7:9], drop_masks(x[7:9], 8, 0.3))
    assert masks.max() == pytest.approx(1 / 0.7)
    assert (kept.mean(1) - 0.7).abs().max() < 4.5 * (0.21 / 4000) ** 0.5
    assert (torch.corrcoef(kept) - torch.eye(8)).abs().max() < 4.5 / 4000**0.5


def test_recomputation_draws_the_same_depth_and_evaluation_none():
    made = [GenViT(**SMALL, drop_path=0.5, use_checkpoint=on) for on in (False, True)]
    plain, recomputed = (init_weights(net, 1).train() for net in made)
    x, t = torch.randn(6, 1, 8, 8), torch.full((6,), 9.0)
    outs = plain(x, t), recomputed(x, t)
    for out in outs:
        out.sum().backward()
    assert torch.equal(*outs) and not torch.equal(plain.eval()(x, t), outs[0])
    pairs = zip(plain.parameters(), recomputed.parameters(), strict=True)
    assert all(torch.allclose(p.grad, q.grad, atol=1e-5) for p, q in pairs)


def test_initial_weights_are_the_released_distributions():
    net = build_model(experiment("smoke", model="GenViT", embed_dim=64, depth=4, num_heads=2))
    w = net.transformer["layers"][1][1].fn.net[0].weight
    assert w.std().item() == pytest.approx((2 / sum(w.shape)) ** 0.5, rel=0.05)
    assert net.pos_embedding.weight.std().item() == pytest.approx(1, abs=0.1)
    assert not net.recon_head[0].bias.any() and net.num_classes == 11


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"skip": "none"}, "no such choice"),
        ({"options": "drop=1"}, "drop_path"),
        ({"options": "drop_path=1.0"}, "at most 0.9"),
        ({"patch_size": 3}, "patch_size = 3"),
    ],
)
def test_impossible_choices_are_refused(fields, why):
    with pytest.raises(ParameterError, match=why):
        meta_model(experiment("smoke", model="GenViT", **fields))


def test_the_published_recipe():
    exp = published_run()
    assert (exp.train.n_steps, exp.train.warmup_steps) == (195_000, 3900)
    assert exp.train.lr * exp.train.lr_final == pytest.approx(1e-6)
    assert exp.train.ema_before and exp.diffusion.loss == "l1"
    assert (exp.sampling.sampler, exp.sampling.nfe) == ("ancestral", 1000)
