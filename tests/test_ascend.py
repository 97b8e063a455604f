"Our reading of IU-ViT and ASCEND: routing, equality with U-ViT to the bit, every switch at work, gradients, equal cost."

import itertools

import pytest
import torch
from torch import nn

from uvit_repro.ascend import (
    ASCEND,
    PRESETS,
    SWITCHES,
    IUViT,
    NormedAttention,
    SwitchBlock,
    equal_cost,
    from_config,
    iuvit_from_config,
    skip_routes,
    split_arms,
    split_of,
    splits_of,
    switch_arms,
)
from uvit_repro.config import (
    MODELS,
    PROTOCOLS,
    ModelConfig,
    ParameterError,
    experiment,
    resolve_name,
    with_overrides,
)
from uvit_repro.runs.counting import count_macs, macs_of, meta_model, model_inputs, params_of
from uvit_repro.train import build_model
from uvit_repro.uvit import UViT, count_parameters, init_weights

small = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 3,
    "embed_dim": 16,
    "depth": 13,
    "num_heads": 2,
}
LISTED = {
    "9:3": (8, 5, 0),
    "8:4": (7, 5, 3, 0),
    "6:6": (5, 4, 3, 2, 1, 0),
    "4:8": (3, 3, 2, 2, 1, 1, 0, 0),
    "3:9": (2, 2, 2, 1, 1, 1, 0, 0, 0),
}


def moved(net, by=0.1):
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net


@pytest.mark.parametrize("split", LISTED)
def test_routing_as_listed_by_a_loop_and_in_the_network(split):
    e, d = map(int, split.split(":"))
    want = []
    for j in range(d):
        i, fraction = e - 1, 0  # walk from the deepest stored branch: e/d of a block at every step
        for _ in range(j):
            fraction += e
            while fraction >= d:
                fraction -= d
                i -= 1
        want.append(i)
    want[-1] = 0
    assert skip_routes(e, d) == tuple(want) == LISTED[split]
    net, kept, seen = ASCEND(**small, split=split).eval(), [], []
    for b in net.in_blocks:
        b.register_forward_hook(lambda m, i, o: kept.append(o))
    for b in net.out_blocks:
        b.register_forward_pre_hook(lambda m, i: seen.append(i[1]))
    with torch.inference_mode():
        net(torch.randn(1, 3, 8, 8), torch.ones(1))
    assert tuple(next(k for k, o in enumerate(kept) if o is s) for s in seen) == LISTED[split] and (
        len(kept),
        len(seen),
    ) == (e, d)


def test_routing_has_its_properties_everywhere():
    for e, d in itertools.product(range(1, 15), range(1, 15)):
        for k in (0, *range(1, d + 1)):
            r = skip_routes(e, d, k)
            reads = [i for i in r if i is not None]
            assert (
                len(r) == d
                and len(reads) == (k or d)
                and r[-1] == 0
                and reads == sorted(reads, reverse=True)
                and all(0 <= i < e for i in reads)
            )
            if len(reads) > 1:
                assert reads[0] == e - 1
            if len(reads) <= e:
                assert len(set(reads)) == len(reads)  # nothing read twice where there is enough
    with pytest.raises(ParameterError, match="to 3"):
        skip_routes(9, 3, 4)


CASES = [
    {},
    {"skip": "add"},
    {"skip": "linear_add"},
    {"skip": "add_scaled", "conv": "before"},
    {"mlp_time_embed": True, "qkv_bias": True, "pos_embed": "sincos2d"},
    {"patch_embed": "conv", "conv": "none"},
    {"use_checkpoint": True},
]


@pytest.mark.parametrize("kw", CASES)
@pytest.mark.parametrize("cond", ["none", "class", "text"])
def test_six_to_six_is_uvit_to_the_bit(kw, cond):
    more, args = dict(
        none=({}, {}),
        **{"class": ({"num_classes": 4}, {"y": torch.tensor([0, 3])})},
        text=({"clip_dim": 5, "num_clip_token": 7}, {"context": torch.randn(2, 7, 5)}),
    )[cond]
    like, net = (
        moved(UViT(**small, **more, **kw)).train(),
        ASCEND(**small, **more, **kw, split="6:6").train(),
    )
    net.load_state_dict(like.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 999.0])
    a, b = net(x, t, **args), like(x, t, **args)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert [n for n, _ in net.named_parameters()] == [
        n for n, _ in like.named_parameters()
    ] and all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), like.parameters()))
    other = ASCEND(**small, **more, **kw, split="6:6")
    other.routes = other.routes[::-1]
    other.load_state_dict(like.state_dict())
    assert not torch.equal(other(x, t, **args), b)


def test_built_by_an_experiment_six_to_six_starts_as_uvit():
    a, b, c = (
        build_model(experiment("laptop", seed=3, **kw))
        for kw in ({}, {"model": "ASCEND", "options": "split=3:3"}, {"model": "IU-ViT"})
    )
    assert all(
        torch.equal(p, q) and torch.equal(p, r)
        for p, q, r in zip(a.parameters(), b.parameters(), c.parameters())
    )
    plain, like = (
        build_model(experiment("laptop", model="IU-ViT", skip="none", conv="none")),
        build_model(experiment("laptop", skip="none", conv="none")),
    )
    x, t, y = torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.long)
    assert torch.equal(plain(x, t, y=y), like(x, t, y=y))


ON = {"mlp_time_embed": True, "qk_norm": True, "skip": "concat", "conv": "after", "adaln": True}


@pytest.mark.parametrize("name", ON)
def test_each_switch_changes_the_output(name):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 400.0])
    off, on = init_weights(IUViT(**small), 0), init_weights(IUViT(**small, **{name: ON[name]}), 0)
    values = dict(off.named_parameters())
    with torch.no_grad():
        for n, p in on.named_parameters():  # what both have is the same; the rest is moved
            if n in values:
                p.copy_(values[n])
            else:
                p.add_(0.2 * torch.randn_like(p))
        assert (on(x, t) - off(x, t)).abs().max() > 1e-3


def test_zero_out_and_skip_scale():
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 400.0])
    for conv in ("none", "after", "before"):
        for init in ("default", "identity"):
            assert (
                init_weights(IUViT(**small, conv=conv, zero_out=True), 0, conv_init=init)(x, t)
                .abs()
                .max()
                == 0
            )
        assert init_weights(IUViT(**small, conv=conv), 0)(x, t).abs().max() > 0
    scaled, like = (IUViT(**small, skip="concat", skip_scale=s) for s in (True, False))
    moved(scaled)
    like.load_state_dict(scaled.state_dict())
    assert (scaled(x, t) - like(x, t)).abs().max() > 1e-3
    with torch.no_grad():
        for b in like.out_blocks:
            b.skip_linear.weight[:, 16:] *= (
                0.5**0.5
            )  # a scaled branch is a scaled half of the merging layer
    assert torch.allclose(scaled(x, t), like(x, t), atol=1e-4)


def test_normed_attention_does_not_see_the_scale_of_queries():
    a, x = NormedAttention(12, 3), torch.randn(2, 5, 12)
    y = a(x)
    with torch.no_grad():
        a.qkv.weight[:24] *= 50
        a.q_norm.eps = a.k_norm.eps = 1e-12
    b = a(x)
    with torch.no_grad():
        a.qkv.weight[:24] *= 7
    assert torch.allclose(a(x), b, atol=1e-5) and y.shape == x.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a.path = "math"
        assert torch.isfinite(a(x)).all()
        a.path = "sdpa"
        assert torch.isfinite(a(x)).all()


@pytest.mark.parametrize(
    "kw",
    [{k: v} for k, v in {**ON, "zero_out": True}.items()]
    + [dict(ON, zero_out=True, skip_scale=True), {"skip": "concat", "skip_scale": True}],
)
def test_gradient_reaches_every_parameter_of_iuvit(kw):
    net = moved(init_weights(IUViT(**small, **kw), 0))
    net(torch.randn(2, 3, 8, 8), torch.tensor([4.0, 500.0])).square().sum().backward()
    assert [
        n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


@pytest.mark.parametrize("split", LISTED)
def test_gradient_reaches_every_parameter_of_ascend(split):
    for kw in ({}, {"skips": 3}, {"skips": 2, "skip_scale": True, "adaln": True}):
        net = moved(init_weights(ASCEND(**small, split=split, **kw), 0))
        net(torch.randn(2, 3, 8, 8), torch.tensor([4.0, 500.0])).square().sum().backward()
        assert [
            n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
        ] == []
        assert sum(b.skip_linear is not None for b in net.out_blocks) == (
            kw.get("skips") or int(split.split(":")[1])
        )


@pytest.mark.parametrize("name", PRESETS)
def test_forward_and_backward_at_every_preset_on_meta(name):
    from dataclasses import replace

    net = meta_model(replace(PROTOCOLS["gpu"], model=ModelConfig(**PRESETS[name])))
    x, t, _ = model_inputs(net, 2)
    out = net(x, t)
    out.sum().backward()
    assert (
        out.shape == x.shape
        and all(p.grad is not None for p in net.parameters())
        and net.depth == 13
    )


def test_a_merge_is_worth_d_hidden_units():
    base = experiment("gpu", model="ASCEND")
    six, three = (with_overrides(base, options=f"split={s}") for s in ("6:6", "9:3"))
    assert params_of(six) == 44_255_328 and params_of(six) - params_of(three) == 3 * (
        2 * 512**2 + 512
    )
    e = equal_cost(three, 6)
    assert (
        abs(params_of(e) / params_of(six) - 1) < 3e-4
        and abs(macs_of(e) / macs_of(six) - 1) < 3e-4
        and e.model.mlp_ratio > 4
    )
    with pytest.raises(ParameterError, match="concat"):
        equal_cost(with_overrides(three, skip="add"), 6)


def test_arms_and_refusals():
    assert (
        resolve_name(MODELS, "ASCEND") is from_config
        and resolve_name(MODELS, "IU-ViT") is iuvit_from_config
    )
    assert splits_of(13) == list(LISTED) and set(switch_arms("gpu")) == set(SWITCHES)
    arms = split_arms("gpu")
    assert len({e.run_id for e in arms.values()}) == len(arms) == 13
    counts = {params_of(e) for n, e in arms.items() if "3 skips" in n}
    assert counts == {params_of(arms["9:3"])}
    assert (
        split_of("", 13) == (9, 3)
        and meta_model(experiment("gpu", model="ASCEND")).routes == LISTED["9:3"]
    )
    for bad, msg in (
        (("9:4", 13), "try depth = 14"),
        (("9:3:1", 13), "as in 9:3"),
        (("a:b", 13), "as in"),
        (("12:0", 13), "at least 1"),
        (("", 2), "at least 3"),
    ):
        with pytest.raises(ParameterError, match=msg):
            split_of(*bad)
    for kw, msg in (
        ({"model": "ASCEND", "options": "split=9:3"}, "try depth = 13"),
        ({"model": "IU-ViT", "options": "split=3:3"}, "qk_norm"),
        ({"model": "IU-ViT", "time": "adaln"}, "no such choice"),
        ({"model": "IU-ViT", "skip": "none", "options": "skip_scale=true"}, "long skips"),
    ):
        with pytest.raises(ParameterError, match=msg):
            meta_model(experiment("laptop", **kw))
    assert ASCEND(**{**small, "depth": 8}, split="5:2").routes == (4, 0)  # layers need not be odd


def test_trains_and_samples(tmp_path):
    from uvit_repro.runs.experiment import run_experiment
    from uvit_repro.runs.training import read_log

    r = run_experiment(
        experiment(
            "smoke",
            model="ASCEND",
            depth=5,
            options="split=3:1,qk_norm=true,adaln=true",
            n_steps=30,
            log_every=5,
            curve_steps=(),
        ),
        tmp_path,
        say=lambda s: None,
    )
    log = read_log(r.folder)
    assert (
        log.loss.iloc[-1] < log.loss.iloc[0]
        and r.first()["images"].std() > 0
        and "ascend" in r.run_id
    )
