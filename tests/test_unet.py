"U-Nets: built as printed, wired as the authors' code is, counted twice, started right, matched to a budget, trained by the same code."

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uvit_repro.config import SMOKE, ParameterError, experiment, with_overrides
from uvit_repro.diffusion import Diffusion
from uvit_repro.uvit import timestep_embedding
from uvit_repro.paper.numbers import published
from uvit_repro.runs.counting import count_macs, meta_model, model_inputs
from uvit_repro.train import Trainer, build_model, empty_model
from uvit_repro.unet import (
    PRESETS,
    ADMUNet,
    LatentUNet,
    Match,
    appendix,
    auto_groups,
    auto_head,
    check_unet,
    draw_blocks,
    draw_unet,
    fitting_levels,
    match_experiment,
    match_width,
    matched_unets,
    measure_of,
    plot_parts,
    unet_counts,
    unet_parts,
)
from uvit_repro.uvit import count_parameters


def on_meta(make, **kw):
    with torch.device("meta"):
        return make(**kw)


def waken(net, std=0.2, seed=0):
    "Nothing is zero, so that every branch shows."
    gen = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=std, generator=gen)
    return net


def small(kind, **kw):
    return kind(
        **{
            **{
                "img_size": 8,
                "in_chans": 2,
                "channels": 16,
                "mult": (1, 2),
                "res_blocks": 1,
                "attention": (2,),
            },
            **kw,
        }
    )


# ---------------------------------------------------------------- the printed numbers
def test_printed_counts():
    b, e = on_meta(LatentUNet), on_meta(ADMUNet)
    assert count_parameters(b) == 52_968_964 and unet_counts(b.sizes) == (52_968_964, 8_409_849_856)
    assert count_parameters(e) == 645_941_124 and unet_counts(e.sizes) == (
        645_941_124,
        135_365_672_960,
    )
    assert (
        e.macs() == 135_365_672_960
    )  # that the closed form counts what runs is tested on small networks below, and in the chapter on these
    assert round(645.941124) == published(
        "Appendix E", "ImageNet 256x256", "U-Net (ADM code)", "params_M"
    ) and round(52.968964) == published(
        "Appendix B", "MS-COCO 256x256", "U-Net baseline", "params_M"
    )
    assert round(135.36567296) == published(
        "Appendix E", "ImageNet 256x256", "U-Net (ADM code)", "gflops"
    )


def test_printed_structure():
    b, e = on_meta(LatentUNet).net, on_meta(ADMUNet).net
    assert [x.resnets[-1].out_channels for x in b.down_blocks] == [128, 256, 256, 256] and [
        len(getattr(x, "attentions", [])) for x in b.down_blocks
    ] == [0, 2, 2, 0]
    assert [len(getattr(x, "attentions", [])) for x in b.up_blocks] == [
        0,
        3,
        3,
        0,
    ] and b.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.in_features == 768
    assert [x.resnets[-1].out_channels for x in e.down_blocks] == [640, 640, 1280] and [
        len(getattr(x, "attentions", [])) for x in e.down_blocks
    ] == [0, 3, 3]
    assert all(d.downsamplers[0].down for d in e.down_blocks[:2]) and all(
        u.upsamplers[0].up for u in e.up_blocks[:2]
    )
    assert (
        e.mid_block.attentions[0].heads == 20
        and e.mid_block.attentions[0].group_norm.num_groups == 32
        and e.down_blocks[1].attentions[0].heads == 10
    )
    assert (e.time_embedding.linear_1.in_features, e.time_embedding.linear_1.out_features) == (
        320,
        1280,
    ) and e.class_embedding.num_embeddings == 1001


rng = random.Random(3)


def some():
    kind, levels, C = rng.choice([LatentUNet, ADMUNet]), rng.randint(1, 3), 4 * rng.randint(1, 5)
    kw = {
        "img_size": 2 ** rng.randint(levels, 4),
        "in_chans": rng.randint(1, 4),
        "channels": C,
        "mult": tuple(rng.choice([1, 2, 3]) for _ in range(levels)),
        "res_blocks": rng.randint(1, 2),
        "attention": tuple(2**i for i in range(levels) if rng.random() < 0.5),
        "out_chans": rng.randint(1, 5),
    }
    if kind is ADMUNet:
        return kind, dict(
            kw,
            num_classes=rng.choice([None, 5]),
            scale_shift=rng.random() < 0.5,
            resblock_updown=rng.random() < 0.5,
        )
    return kind, dict(
        kw,
        num_heads=rng.choice([1, 2, 4]),
        **rng.choice(
            [
                {"clip_dim": None},
                {"clip_dim": 7, "num_clip_token": 5},
                {"clip_dim": None, "num_classes": 3},
            ]
        ),
    )


CASES = [some() for _ in range(4)]


@pytest.mark.parametrize(
    "kind,kw",
    CASES,
    ids=[f"{k.__name__}-{kw['img_size']}-{'.'.join(map(str, kw['mult']))}" for k, kw in CASES],
)
def test_counts_equal_the_closed_form_and_every_parameter_takes_part(kind, kw):
    net = on_meta(kind, **kw)
    assert unet_counts(net.sizes) == (count_parameters(net), count_macs(net))
    assert all(min(v) >= 0 for v in unet_parts(**net.sizes).values())
    x, t, cond = model_inputs(net, 2)
    out = net.train()(x, t, **cond)
    assert out.shape == (2, kw["out_chans"], *x.shape[2:])
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# ---------------------------------------------------------------- wiring
def norm(m, x):
    return F.group_norm(x, m.num_groups, m.weight, m.bias, m.eps)


def residual(b, x, emb, scale_shift, resize=lambda v: v):
    h = b.conv1(resize(F.silu(norm(b.norm1, x))))
    e = b.time_emb_proj(F.silu(emb))[..., None, None]
    if scale_shift:
        s, a = e.chunk(2, 1)
        h = norm(b.norm2, h) * (1 + s) + a
    else:
        h = norm(b.norm2, h + e)
    x = resize(x)
    return (x if b.conv_shortcut is None else b.conv_shortcut(x)) + b.conv2(F.silu(h))


def pixels(a, x):
    "ADM's attention block, with explicit products."
    n = norm(a.group_norm, x).flatten(2).transpose(1, 2)
    q, k, v = (f(n).unflatten(2, (a.heads, -1)).transpose(1, 2) for f in (a.to_q, a.to_k, a.to_v))
    h = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return x + a.to_out[0](h.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


def adm_by_hand(net, x, t, y):
    "guided-diffusion's forward pass: a stack of what came down, popped on the way up."
    s, u = net.sizes, net.net
    L, up = len(s["mult"]), lambda v: F.interpolate(v, scale_factor=2.0, mode="nearest")
    told = u.time_proj(t)
    assert torch.allclose(told, timestep_embedding(t, s["channels"]), atol=2e-4)
    emb = u.time_embedding.linear_2(
        F.silu(u.time_embedding.linear_1(told.to(x.dtype)))
    ) + u.class_embedding(y)
    res = lambda b, h, resize=lambda v: v: residual(b, h, emb, s["scale_shift"], resize)
    h = u.conv_in(x)
    hs = [h]
    for i, d in enumerate(u.down_blocks):
        for j, b in enumerate(d.resnets):
            h = res(b, h)
            if 2**i in s["attention"]:
                h = pixels(d.attentions[j], h)
            hs.append(h)
        if i < L - 1:
            h = (
                res(d.downsamplers[0], h, lambda v: F.avg_pool2d(v, 2))
                if s["resblock_updown"]
                else d.downsamplers[0].conv(h)
            )
            hs.append(h)
    h = res(
        u.mid_block.resnets[1], pixels(u.mid_block.attentions[0], res(u.mid_block.resnets[0], h))
    )
    for i, d in enumerate(u.up_blocks):
        for j, b in enumerate(d.resnets):
            h = res(b, torch.cat([h, hs.pop()], 1))
            if 2 ** (L - 1 - i) in s["attention"]:
                h = pixels(d.attentions[j], h)
        if i < L - 1:
            h = res(d.upsamplers[0], h, up) if s["resblock_updown"] else d.upsamplers[0].conv(up(h))
    assert not hs
    return u.conv_out(F.silu(norm(u.conv_norm_out, h)))


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resblock_updown", [True, False])
def test_adm_is_wired_like_guided_diffusion(scale_shift, resblock_updown):
    net = (
        waken(
            small(
                ADMUNet,
                mult=(2, 1, 2),
                res_blocks=2,
                attention=(1, 4),
                num_classes=4,
                scale_shift=scale_shift,
                resblock_updown=resblock_updown,
            )
        )
        .double()
        .eval()
    )
    x, t, y = (
        torch.randn(3, 2, 8, 8).double(),
        torch.tensor([1.0, 400.5, 999.0]),
        torch.tensor([0, 3, 1]),
    )
    with torch.no_grad():
        a, b = net(x, t, y), adm_by_hand(net, x, t, y)
    assert (a - b).abs().max() < 1e-9 * a.abs().max()


def test_spatial_transformer_by_hand():
    "Self-attention, then the text, then a gated MLP, each behind a layer norm (latent-diffusion)."
    net = waken(small(LatentUNet, num_heads=2, clip_dim=6, num_clip_token=5), 0.3).double()
    tr = net.net.down_blocks[1].attentions[0]
    b = tr.transformer_blocks[0]

    def attend(a, x, to):
        q, k, v = (
            f(z).unflatten(2, (2, -1)).transpose(1, 2)
            for f, z in ((a.to_q, x), (a.to_k, to), (a.to_v, to))
        )
        return a.to_out[0](
            ((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
            .transpose(1, 2)
            .flatten(2)
        )

    x, text = torch.randn(2, 32, 4, 4).double(), torch.randn(2, 5, 6).double()
    h = tr.proj_in(norm(tr.norm, x)).flatten(2).transpose(1, 2)
    n = b.norm1(h)
    h = h + attend(b.attn1, n, n)
    h = h + attend(b.attn2, b.norm2(h), text)
    u, gate = b.ff.net[0].proj(b.norm3(h)).chunk(2, -1)
    h = h + b.ff.net[2](u * F.gelu(gate))
    want = x + tr.proj_out(h.transpose(1, 2).reshape_as(x))
    assert torch.allclose(tr(x, encoder_hidden_states=text, return_dict=False)[0], want, atol=1e-9)


def test_conditions_reach_the_output_and_wrong_ones_are_refused():
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([5.0, 5.0])
    text = waken(small(LatentUNet, clip_dim=6, num_clip_token=5))
    c = torch.randn(2, 5, 6)
    plain, classes = waken(small(LatentUNet, clip_dim=None)), waken(small(ADMUNet, num_classes=3))
    with torch.no_grad():
        assert (text(x, t, context=c) - text(x, t, context=c.flip(0))).abs().max() > 1e-3 and (
            classes(x, t, torch.tensor([0, 1])) - classes(x, t, torch.tensor([2, 1]))
        )[0].abs().max() > 1e-3
        for net, kw in (
            (text, {"context": c}),
            (plain, {}),
            (classes, {"y": torch.tensor([0, 1])}),
        ):
            assert (net(x, t, **kw) - net(x, t + 300, **kw)).abs().max() > 1e-3
        one = classes(x[:1], t[:1], torch.tensor([0]))
        assert torch.allclose(
            classes(x, t, torch.tensor([0, 1]))[:1], one, atol=1e-3 * one.abs().max()
        )
    for net, kw, why in (
        (plain, {"context": c}, "was built without"),
        (text, {}, "needs it"),
        (classes, {}, "needs it"),
        (classes, {"y": torch.tensor([0, 1]), "context": c}, "was built without"),
    ):
        with pytest.raises(ValueError, match=why):
            net(x, t, **kw)
    with pytest.raises(ValueError, match="built for"):
        plain(x[..., :4], t)


@pytest.mark.parametrize(
    "kw,why",
    [
        ({"mult": (1, 2, 2, 2)}, r"try mult = \(1, 2, 2\)"),
        ({"img_size": 7}, r"try mult = \(1,\)"),
        ({"attention": (3,)}, "factors here are 1, 2"),
        ({"channels": 17}, "try 18"),
        ({"channels": -2}, "at least 1"),
        ({"res_blocks": 0}, "res_blocks = 0"),
        ({"mult": ()}, "empty"),
    ],
)
def test_impossible_sizes(kw, why):
    for kind in (LatentUNet, ADMUNet):
        with pytest.raises(ParameterError, match=why):
            small(kind, **kw)


def test_further_impossible_choices():
    for make in (
        lambda: small(LatentUNet, num_heads=3),
        lambda: small(ADMUNet, head_width=5),
        lambda: small(LatentUNet, clip_dim=6, num_classes=3),
    ):
        with pytest.raises(ParameterError):
            make()
    assert (
        auto_groups(640) == 32
        and auto_groups(12) == 2
        and auto_head(640) == 64
        and fitting_levels(12, (1, 1, 1, 1)) == (1, 1, 1)
    )
    check_unet(12, 4, (1, 1, 1), 1, (4,))


# ---------------------------------------------------------------- from an experiment
SMALL_EXP = {
    "ADM": {"model": "ADM", "embed_dim": 8, "options": "mult=1-2,res_blocks=1"},
    "UNet-latent": {
        "model": "UNet-latent",
        "embed_dim": 8,
        "num_heads": 2,
        "options": "mult=1-2,res_blocks=1,attention=2",
    },
}


def test_sections_and_options():
    for name, fields in PRESETS.items():
        assert (
            meta_model(
                experiment(
                    "paper",
                    dataset="mscoco256" if name == "UNet-latent" else "imagenet256",
                    p_uncond=0.1,
                    **fields,
                )
            ).sizes["channels"]
            == fields["embed_dim"]
        )
    e = with_overrides(SMOKE, **SMALL_EXP["ADM"])
    assert (
        meta_model(e).num_classes == 11
        and meta_model(with_overrides(e, p_uncond=0.0, cfg_scale=1.0)).num_classes == 10
        and meta_model(with_overrides(e, p_uncond=0.0, cfg_scale=1.0, condition="none")).num_classes
        is None
    )
    t = meta_model(
        with_overrides(
            SMOKE, condition="text", text_tokens=4, text_dim=6, **SMALL_EXP["UNet-latent"]
        )
    )
    assert (t.clip_dim, t.num_clip_token, t.num_classes) == (6, 4, None)
    assert (
        meta_model(with_overrides(e, options="variance=learned,attention=")).sizes["out_chans"] == 2
        and meta_model(with_overrides(e, options="attention=")).sizes["attention"] == ()
    )
    assert (
        meta_model(
            with_overrides(e, options="scale_shift=false,resblock_updown=false,head_width=4")
        )
        .net.mid_block.attentions[0]
        .heads
        == 8
    )
    for kw in (
        {"options": "depth=3"},
        {"options": "mult=a-b"},
        {"condition": "text"},
        {"use_checkpoint": True, "activation_budget": 1.0},
    ):
        with pytest.raises(ParameterError):
            meta_model(with_overrides(e, **kw))


@pytest.mark.parametrize("name", SMALL_EXP)
def test_start(name):
    e = with_overrides(SMOKE, seed=2, **SMALL_EXP[name])
    assert not any(p.is_meta for p in empty_model(e).parameters())
    net, same, other = build_model(e), build_model(e), build_model(replace(e, seed=3))
    wider = build_model(with_overrides(e, p_uncond=0.0, cfg_scale=1.0))
    own = build_model(e)
    for m in own.modules():
        m.reset_parameters() if hasattr(m, "reset_parameters") else None
    for (n, p), q, r, o in zip(
        net.named_parameters(), same.parameters(), other.parameters(), own.parameters()
    ):
        assert torch.equal(p, q), n
        owner = n.rpartition(".")[0]
        if owner.endswith(net.zeros):
            assert not p.any(), n
        elif "norm" in owner.rpartition(".")[2]:
            assert torch.equal(p, o), n
        else:
            assert not torch.equal(p, r), n
            if p.numel() > 500 and "class" not in n:
                assert (p.std() / o.std()).item() == pytest.approx(1, abs=0.12) and (
                    p.abs().max() / o.abs().max()
                ).item() == pytest.approx(1, abs=0.05), n
    assert torch.equal(net.net.conv_in.weight, wider.net.conv_in.weight)
    direct = small(
        ADMUNet if name == "ADM" else LatentUNet,
        **({"num_classes": None} if name == "ADM" else {"clip_dim": None}),
    )
    assert not direct(torch.randn(2, 2, 8, 8), torch.ones(2)).any()


def test_blocks_compile():
    net = small(ADMUNet, num_classes=None)
    blocks = [m for m in net.modules() if getattr(m, "is_block", False)]
    assert len(blocks) == 5
    waken(net).eval()
    x, t = torch.randn(2, 2, 8, 8), torch.ones(2)
    want = net(x, t)
    for m in blocks[1:3]:
        m.compile(backend="eager", dynamic=False, fullgraph=True)
    assert torch.allclose(net(x, t), want, atol=1e-5)


def test_checkpointing_changes_nothing_but_what_is_kept():
    grads = []
    for on in (False, True):
        net = waken(small(ADMUNet, num_classes=3, use_checkpoint=on)).train()
        net(torch.ones(2, 2, 8, 8), torch.ones(2), torch.tensor([0, 1])).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
        assert net.net.is_gradient_checkpointing == on
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("told", ["y", "context"])
def test_training_lowers_the_loss_and_uses_what_it_is_told(told):
    "The clean image is a constant that only the condition knows: clean-image prediction at pure noise must read it there."
    e = with_overrides(
        SMOKE,
        process="vp",
        prediction="x0",
        precision="fp32",
        n_steps=40,
        warmup_steps=0,
        lr=3e-3,
        lr_schedule="constant",
        device="cpu",
    )
    torch.manual_seed(0)
    net = (
        small(LatentUNet, in_chans=1, clip_dim=6, num_clip_token=3, num_heads=2)
        if told == "context"
        else small(ADMUNet, in_chans=1, num_classes=2)
    )
    tr, losses, table = Trainer(net, Diffusion(e.diffusion), e.train), [], torch.randn(2, 3, 6)
    for s in range(40):
        y = torch.arange(8) % 2
        x0 = (2.0 * y - 1)[:, None, None, None].expand(8, 1, 8, 8)
        losses.append(
            tr.update(
                x0,
                torch.ones(8),
                torch.randn(8, 1, 8, 8),
                **({"y": y} if told == "y" else {"context": table[y]}),
            )
            .mean()
            .item()
        )
    assert losses[0] == pytest.approx(1.0, abs=1e-4) and sum(losses[-5:]) / 5 < 0.1, losses[::10]


# ---------------------------------------------------------------- budgets
def test_match_width():
    square, tried = lambda w: nn.Linear(w, w, bias=False), []
    for target in (1, 2, 3, 90, 640.0, 5e5, 2**20):
        got = match_width(target, square, widths=range(1, 1025))
        best = min(range(1, 1025), key=lambda w: abs(math.log(w * w / target)))
        assert got == Match(best, best**2, best**2 / target)
    odd = lambda w: 50 + 3 * w**3
    for target in (53.0, 80, 1e4, 3e6, 1.1e7):
        assert match_width(target, lambda w: w, odd, range(1, 160, 3)).width == min(
            range(1, 160, 3), key=lambda w: abs(math.log(odd(w) / target))
        )
    match_width(1e8, lambda w: tried.append(w) or w, lambda w: w**2, range(8, 32768, 8))
    assert len(tried) == len(set(tried)) <= 8
    assert (
        match_width(7.0, lambda w: w, lambda w: w, [7]).ratio == 1.0
        and measure_of("macs")(on_meta(ADMUNet)) == 135_365_672_960
    )
    for kw, why in (
        ({"target": 0.5}, "smallest width"),
        ({"target": 1e9}, "largest width"),
        ({"target": 9, "measure": "flops"}, "params, macs"),
    ):
        with pytest.raises(ParameterError, match=why):
            match_width(**{**{"make": square, "widths": range(1, 9)}, **kw})

    def on(w):
        net = nn.Linear(w, w)
        assert net.weight.is_meta
        return net

    match_width(1e4, on)


def test_matched_experiments():
    base = experiment("laptop", dataset="digits")
    n = count_parameters(meta_model(base))
    for name, (e, m) in matched_unets(base).items():
        assert (
            abs(math.log(m.ratio)) < math.log(1.05)
            and count_parameters(meta_model(e)) == m.value == round(m.ratio * n)
            and e.model.embed_dim == m.width
            and (e.data, e.train, e.diffusion, e.sampling)
            == (base.data, base.train, base.diffusion, base.sampling)
        )
    e, m = match_experiment(base, "params", range(16, 257, 16), depth=3, skip="none")
    assert e.model.model == "UViT" and m.width > 64 and abs(math.log(m.ratio)) < math.log(1.4)


def test_appendix_and_pictures():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    A = appendix()
    assert {k: e.model.model for k, e in A.items()} == {
        ("B", "U-ViT-S/2"): "UViT",
        ("B", "U-Net"): "UNet-latent",
        ("E", "U-ViT-H/2"): "UViT",
        ("E", "U-Net"): "ADM",
    } and len({e.run_id for e in A.values()}) == 4
    net = on_meta(LatentUNet)
    text = " ".join(t.get_text() for t in draw_unet(net).texts)
    assert "32x32, 128 channels" in text and "text: into every attention block" in text
    assert len(draw_blocks()) == 4 and [
        sum(p.get_width() for p in ax.patches) for ax in plot_parts({"a": net})
    ] == pytest.approx([100, 100], abs=1)
    plt.close("all")
