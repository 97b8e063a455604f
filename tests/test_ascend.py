"Our reading of IU-ViT and ASCEND: routing, equality with U-ViT to the bit, every switch at work."

import itertools

import pytest
import torch

from uvit_repro.ascend import (
    ASCEND,
    SWITCHES,
    IUViT,
    NormedAttention,
    skip_routes,
    split_arms,
    split_of,
    switch_arms,
)
from uvit_repro.config import ParameterError, experiment
from uvit_repro.runs.counting import meta_model, params_of
from uvit_repro.train import build_model
from uvit_repro.uvit import UViT, init_weights

SMALL = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 3,
    "embed_dim": 16,
    "depth": 13,
    "num_heads": 2,
}
ROUTES = {
    "9:3": (8, 5, 0),
    "8:4": (7, 5, 3, 0),
    "6:6": (5, 4, 3, 2, 1, 0),
    "4:8": (3, 3, 2, 2, 1, 1, 0, 0),
    "3:9": (2, 2, 2, 1, 1, 1, 0, 0, 0),
}
ON = {"mlp_time_embed": True, "qk_norm": True, "skip": "concat", "conv": "after", "adaln": True}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moved(net, by=0.1):
    "The network with its weights moved a little, so that zeros do not hide anything."
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn_like(p))
    return net


def inputs(n=2):
    return torch.randn(n, 3, 8, 8), torch.tensor([4.0, 500.0])[:n]


@pytest.mark.parametrize("split", ROUTES)
def test_the_network_reads_the_routes_as_listed(split):
    encoder, decoder = map(int, split.split(":"))
    assert skip_routes(encoder, decoder) == ROUTES[split]
    net, stored, read = ASCEND(**SMALL, split=split).eval(), [], []
    for b in net.in_blocks:
        b.register_forward_hook(lambda m, args, out: stored.append(out))
    for b in net.out_blocks:
        b.register_forward_pre_hook(lambda m, args: read.append(args[1]))
    with torch.inference_mode():
        net(*inputs(1))
    found = [next(k for k, out in enumerate(stored) if out is skip) for skip in read]
    assert tuple(found) == ROUTES[split] and len(stored) == encoder


def test_routes_are_spread_and_keep_the_outermost_pair():
    for encoder, decoder in itertools.product(range(1, 11), repeat=2):
        for skips in (0, *range(1, decoder + 1)):
            routes = skip_routes(encoder, decoder, skips)
            reads = [r for r in routes if r is not None]
            assert len(routes) == decoder and len(reads) == (skips or decoder)
            assert routes[-1] == 0 and reads == sorted(reads, reverse=True)
            if len(reads) > 1:
                assert reads[0] == encoder - 1
            if len(reads) <= encoder:
                assert len(set(reads)) == len(reads)


CASES = [
    {},
    {"skip": "add"},
    {"skip": "add_scaled", "conv": "before"},
    {"mlp_time_embed": True, "qkv_bias": True, "pos_embed": "sincos2d"},
    {"use_checkpoint": True},
    {"num_classes": 4},
    {"clip_dim": 5, "num_clip_token": 7},
]


@pytest.mark.parametrize("kw", CASES)
@pytest.mark.parametrize("kind", [ASCEND, IUViT])
def test_equal_sides_are_uvit_to_the_bit(kind, kw):
    variant = {"skip": "concat", "conv": "after", **kw}
    like = moved(UViT(**SMALL, **variant)).train()
    net = kind(**SMALL, **variant, split="6:6").train()
    net.load_state_dict(like.state_dict())
    cond = {"y": torch.tensor([0, 3])} if "num_classes" in kw else {}
    if "clip_dim" in kw:
        cond = {"context": torch.randn(2, 7, 5)}
    x, t = inputs()
    outs = net(x, t, **cond), like(x, t, **cond)
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    pairs = zip(net.named_parameters(), like.named_parameters(), strict=True)
    assert all(n == m and torch.equal(p.grad, q.grad) for (n, p), (m, q) in pairs)


def test_built_by_an_experiment_they_start_as_uvit():
    fields = [{}, {"model": "ASCEND", "options": "split=3:3"}, {"model": "IU-ViT"}]
    uvit, *others = (build_model(experiment("laptop", seed=3, **f)) for f in fields)
    for net in others:
        pairs = zip(uvit.parameters(), net.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("name", ON)
def test_each_switch_changes_the_output(name):
    off = init_weights(IUViT(**SMALL), 0)
    on = moved(init_weights(IUViT(**SMALL, **{name: ON[name]}), 0))
    on.load_state_dict(off.state_dict(), strict=False)  # what both have is the same
    x, t = inputs()
    assert (on(x, t) - off(x, t)).abs().max() > 1e-3


@pytest.mark.parametrize("conv", ["none", "after", "before"])
@pytest.mark.parametrize("start", ["default", "identity"])
def test_zero_out_starts_at_zero(conv, start):
    net = init_weights(IUViT(**SMALL, conv=conv, zero_out=True), 0, conv_init=start)
    assert not net(*inputs()).any()


def test_a_scaled_branch_is_a_scaled_half_of_the_merging_layer():
    scaled, like = (IUViT(**SMALL, skip="concat", skip_scale=on) for on in (True, False))
    moved(scaled)
    like.load_state_dict(scaled.state_dict())
    x, t = inputs()
    assert (scaled(x, t) - like(x, t)).abs().max() > 1e-3
    with torch.no_grad():
        for b in like.out_blocks:
            b.skip_linear.weight[:, 16:] *= 0.5**0.5
    assert torch.allclose(scaled(x, t), like(x, t), atol=1e-4)


def test_normed_attention_does_not_see_the_scale_of_queries_and_keys():
    attn, x = NormedAttention(12, 3), torch.randn(2, 5, 12)
    attn.q_norm.eps = attn.k_norm.eps = 1e-12
    before = attn(x)
    with torch.no_grad():
        attn.qkv.weight[:24] *= 7
    assert torch.allclose(attn(x), before, atol=1e-5)
    attn.path = "math"
    assert torch.allclose(attn(x), before, atol=1e-5)


ALL = {**ON, "zero_out": True, "skip_scale": True}


@pytest.mark.parametrize(
    "kind, kw",
    [
        (IUViT, {}),
        (IUViT, ALL),
        (ASCEND, {"split": "9:3"}),
        (ASCEND, {"split": "3:9", "skips": 2, "adaln": True, "skip_scale": True}),
    ],
)
def test_gradient_reaches_every_parameter(kind, kw):
    net = moved(init_weights(kind(**SMALL, **kw), 0))
    net(*inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_arms():
    splits = split_arms("gpu")
    assert list(splits) == list(ROUTES)
    assert params_of(splits["6:6"]) == 44_255_328
    assert params_of(splits["3:9"]) - params_of(splits["9:3"]) == 6 * (2 * 512**2 + 512)
    assert set(switch_arms("gpu")) == set(SWITCHES)
    assert meta_model(experiment("gpu", model="ASCEND")).routes == ROUTES["9:3"]
    assert ASCEND(**{**SMALL, "depth": 8}, split="5:2").routes == (4, 0)  # depth may be even


@pytest.mark.parametrize(
    "split, depth, why",
    [
        ("9:4", 13, "the sum 12"),
        ("9:3:1", 13, "as in 9:3"),
        ("a:b", 13, "as in 9:3"),
        ("12:0", 13, "above 0"),
        ("", 2, "above 0"),
    ],
)
def test_impossible_splits_are_refused(split, depth, why):
    with pytest.raises(ParameterError, match=why):
        split_of(split, depth)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"model": "ASCEND", "options": "split=9:3"}, "the sum 6"),
        ({"model": "ASCEND", "options": "skips=9"}, "blocks of the decoder"),
        ({"model": "IU-ViT", "options": "split=3:3"}, "qk_norm"),
        ({"model": "IU-ViT", "time": "adaln"}, "no such choice"),
        ({"model": "IU-ViT", "skip": "none", "options": "skip_scale=true"}, "skip_scale"),
    ],
)
def test_impossible_choices_are_refused(fields, why):
    with pytest.raises(ParameterError, match=why):
        meta_model(experiment("laptop", **fields))
