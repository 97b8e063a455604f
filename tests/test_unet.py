"The U-Nets: printed counts, wiring of the authors' code, initial weights, options, budgets."

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uvit_repro.comparison import match_experiment, measure_of, unet_fields
from uvit_repro.config import SMOKE, ParameterError, experiment, with_overrides
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.counting import count_macs, meta_model, model_inputs, params_of
from uvit_repro.train import Trainer, build_model
from uvit_repro.unet import (
    ADMUNet,
    LatentUNet,
    appendix,
    auto_groups,
    fitting_levels,
)
from uvit_repro.uvit import count_parameters, timestep_embedding


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_meta(kind, **kw):
    with torch.device("meta"):
        return kind(**kw)


def shaken(net, std=0.2):
    "The network with every parameter random, so that every branch shows."
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net


def small(kind, **kw):
    sizes = {"img_size": 8, "in_chans": 2, "channels": 16, "mult": (1, 2)}
    return kind(**{**sizes, "res_blocks": 1, "attention": (2,), **kw})


# ---------------------------------------------------------------- printed numbers


def test_printed_counts():
    latent, adm = on_meta(LatentUNet), on_meta(ADMUNet)
    assert (count_parameters(latent), count_macs(latent)) == (52_968_964, 8_409_849_856)
    assert (count_parameters(adm), count_macs(adm)) == (645_941_124, 135_365_672_960)


def test_printed_structure_of_appendix_b():
    net = on_meta(LatentUNet).net
    assert [b.resnets[-1].out_channels for b in net.down_blocks] == [128, 256, 256, 256]
    assert [len(getattr(b, "attentions", [])) for b in net.down_blocks] == [0, 2, 2, 0]
    assert [len(getattr(b, "attentions", [])) for b in net.up_blocks] == [0, 3, 3, 0]
    block = net.down_blocks[1].attentions[0].transformer_blocks[0]
    assert block.attn2.to_k.in_features == 768 and block.attn1.heads == 8


def test_printed_structure_of_appendix_e():
    net = on_meta(ADMUNet).net
    assert [b.resnets[-1].out_channels for b in net.down_blocks] == [640, 640, 1280]
    assert [len(getattr(b, "attentions", [])) for b in net.down_blocks] == [0, 3, 3]
    assert all(b.downsamplers[0].down for b in net.down_blocks[:2])
    middle = net.mid_block.attentions[0]
    assert middle.heads == 20 and middle.group_norm.num_groups == 32
    time = net.time_embedding.linear_1
    assert (time.in_features, time.out_features) == (320, 1280)
    assert net.class_embedding.num_embeddings == 1001


# ---------------------------------------------------------------- wiring


def norm(m, x):
    return F.group_norm(x, m.num_groups, m.weight, m.bias, m.eps)


def residual(b, x, emb, scale_shift, resize=lambda v: v):
    h = b.conv1(resize(F.silu(norm(b.norm1, x))))
    e = b.time_emb_proj(F.silu(emb))[..., None, None]
    if scale_shift:
        scale, shift = e.chunk(2, 1)
        h = norm(b.norm2, h) * (1 + scale) + shift
    else:
        h = norm(b.norm2, h + e)
    x = resize(x)
    return (x if b.conv_shortcut is None else b.conv_shortcut(x)) + b.conv2(F.silu(h))


def self_attention(a, x):
    "ADM's attention block, with explicit products."
    n = norm(a.group_norm, x).flatten(2).transpose(1, 2)
    q, k, v = (f(n).unflatten(2, (a.heads, -1)).transpose(1, 2) for f in (a.to_q, a.to_k, a.to_v))
    h = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return x + a.to_out[0](h.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


def half(v):
    return F.avg_pool2d(v, 2)


def double(v):
    return F.interpolate(v, scale_factor=2.0, mode="nearest")


def adm_by_hand(net, x, t, y, scale_shift, updown):
    "guided-diffusion's forward pass: a stack of what came down, popped on the way up."
    u, last = net.net, len(net.net.down_blocks) - 1
    time = u.time_embedding
    emb = time.linear_1(timestep_embedding(t, 16).to(x.dtype))
    emb = time.linear_2(F.silu(emb)) + u.class_embedding(y)

    def level(d, h, j, b):
        h = residual(b, h, emb, scale_shift)
        return self_attention(d.attentions[j], h) if hasattr(d, "attentions") else h

    h = u.conv_in(x)
    stack = [h]
    for i, d in enumerate(u.down_blocks):
        for j, b in enumerate(d.resnets):
            h = level(d, h, j, b)
            stack.append(h)
        if i < last:
            b = d.downsamplers[0]
            h = residual(b, h, emb, scale_shift, half) if updown else b.conv(h)
            stack.append(h)
    first, second = u.mid_block.resnets
    h = self_attention(u.mid_block.attentions[0], residual(first, h, emb, scale_shift))
    h = residual(second, h, emb, scale_shift)
    for i, d in enumerate(u.up_blocks):
        for j, b in enumerate(d.resnets):
            h = level(d, torch.cat([h, stack.pop()], 1), j, b)
        if i < last:
            b = d.upsamplers[0]
            h = residual(b, h, emb, scale_shift, double) if updown else b.conv(double(h))
    return u.conv_out(F.silu(norm(u.conv_norm_out, h)))


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("updown", [True, False])
def test_adm_is_wired_like_guided_diffusion(scale_shift, updown):
    switches = {"scale_shift": scale_shift, "resblock_updown": updown}
    shape = {"mult": (2, 1, 2), "res_blocks": 2, "attention": (1, 4), "num_classes": 4}
    net = shaken(small(ADMUNet, **shape, **switches)).double().eval()
    x, t = torch.randn(3, 2, 8, 8).double(), torch.tensor([1.0, 400.5, 999.0])
    y = torch.tensor([0, 3, 1])
    with torch.no_grad():
        got, want = net(x, t, y), adm_by_hand(net, x, t, y, scale_shift, updown)
    assert (got - want).abs().max() < 1e-5 * got.abs().max()


def test_spatial_transformer_by_hand():
    "Self-attention, then the text, then a gated MLP, each behind a layer norm (LDM)."
    net = shaken(small(LatentUNet, num_heads=2, clip_dim=6, num_clip_token=5), 0.3).double()
    tr = net.net.down_blocks[1].attentions[0]
    b = tr.transformer_blocks[0]

    def attend(a, x, to):
        parts = ((a.to_q, x), (a.to_k, to), (a.to_v, to))
        q, k, v = (f(z).unflatten(2, (2, -1)).transpose(1, 2) for f, z in parts)
        h = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return a.to_out[0](h.transpose(1, 2).flatten(2))

    x, text = torch.randn(2, 32, 4, 4).double(), torch.randn(2, 5, 6).double()
    h = tr.proj_in(norm(tr.norm, x)).flatten(2).transpose(1, 2)
    h = h + attend(b.attn1, b.norm1(h), b.norm1(h))
    h = h + attend(b.attn2, b.norm2(h), text)
    u, gate = b.ff.net[0].proj(b.norm3(h)).chunk(2, -1)
    h = h + b.ff.net[2](u * F.gelu(gate))
    want = x + tr.proj_out(h.transpose(1, 2).reshape_as(x))
    got = tr(x, encoder_hidden_states=text, return_dict=False)[0]
    assert torch.allclose(got, want, atol=1e-9)


NETS = [
    (ADMUNet, {"num_classes": 3}, {"y": torch.tensor([0, 1])}),
    (LatentUNet, {"clip_dim": 6, "num_clip_token": 5}, {"context": torch.randn(2, 5, 6)}),
    (LatentUNet, {"clip_dim": None, "num_classes": 3}, {"y": torch.tensor([0, 1])}),
]


@pytest.mark.parametrize("kind, built, given", NETS)
def test_conditions_reach_the_output_and_gradient_every_parameter(kind, built, given):
    net = shaken(small(kind, **built))
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([5.0, 5.0])
    out = net(x, t, **given)
    flipped = {name: v.flip(0) for name, v in given.items()}
    assert (out - net(x, t, **flipped)).abs().max() > 1e-3
    assert (out - net(x, t + 300, **given)).abs().max() > 1e-3
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="needs it"):
        net(x, t)


def test_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        net = shaken(small(ADMUNet, num_classes=None, use_checkpoint=on)).train()
        net(torch.ones(2, 2, 8, 8), torch.ones(2)).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
        assert net.net.is_gradient_checkpointing == on
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------- from an experiment

SMALL_EXP = {
    "ADM": {"embed_dim": 8, "options": "mult=1-2,res_blocks=1"},
    "UNet-latent": {
        "embed_dim": 8,
        "num_heads": 2,
        "options": "mult=1-2,res_blocks=1",
    },
}


def small_experiment(model, **kw):
    return with_overrides(SMOKE, model=model, **{**SMALL_EXP[model], **kw})


@pytest.mark.parametrize("model", SMALL_EXP)
def test_initial_weights(model):
    exp = small_experiment(model, seed=2)
    net, same, other = build_model(exp), build_model(exp), build_model(replace(exp, seed=3))
    triples = zip(net.named_parameters(), same.parameters(), other.parameters(), strict=True)
    for (name, p), q, r in triples:
        owner = name.rpartition(".")[0]
        assert torch.equal(p, q)
        if owner.endswith(net.zeros):
            assert not p.any()
        elif "norm" not in owner.rpartition(".")[2]:
            assert not torch.equal(p, r)
    conv = net.net.down_blocks[1].resnets[0].conv1.weight
    bound = conv[0].numel() ** -0.5  # PyTorch's own start
    assert 0.95 * bound < conv.abs().max() <= bound
    x, t, cond = model_inputs(net, 2, "cpu")
    assert not net(torch.randn_like(x), t, **cond).any()


def test_sections_and_options():
    assert meta_model(small_experiment("ADM")).num_classes == 11
    no_null = {"p_uncond": 0.0, "cfg_scale": 1.0}
    assert meta_model(small_experiment("ADM", **no_null)).num_classes == 10
    text = {"condition": "text", "text_tokens": 4, "text_dim": 6}
    net = meta_model(small_experiment("UNet-latent", **text))
    assert (net.clip_dim, net.num_clip_token, net.num_classes) == (6, 4, None)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"options": "depth=3"}, "allowed are"),
        ({"options": "mult=a-b"}, "as in 1-2-2"),
        ({"options": "mult=1-2-2-2"}, "8 pixels allow"),
        ({"embed_dim": 17}, "try 18"),
        ({"condition": "text", "p_uncond": 0.0, "cfg_scale": 1.0}, "no cross-attention"),
    ],
)
def test_impossible_choices_are_refused(fields, why):
    with pytest.raises(ParameterError, match=why):
        meta_model(small_experiment("ADM", **fields))


def test_sizes_follow_the_image_and_the_width():
    fits = [fitting_levels(side, (1, 2, 2, 2)) for side in (32, 8, 28, 9, 2)]
    assert fits == [(1, 2, 2, 2), (1, 2, 2), (1, 2, 2), (1,), (1,)]
    assert [auto_groups(w) for w in (128, 40, 12, 3)] == [32, 8, 2, 1]


def test_training_reads_the_class():
    "The clean image is a constant that only the class gives away."
    fields = {"process": "vp", "prediction": "x0", "precision": "fp32", "n_steps": 40}
    schedule = {"warmup_steps": 0, "lr": 3e-3, "lr_schedule": "constant", "device": "cpu"}
    exp = with_overrides(SMOKE, **fields, **schedule)
    net = small(ADMUNet, in_chans=1, num_classes=2)
    trainer, y = Trainer(net, Diffusion(exp.diffusion), exp.train), torch.arange(8) % 2
    x0 = (2.0 * y - 1)[:, None, None, None].expand(8, 1, 8, 8)
    losses = [
        trainer.update(x0, torch.ones(8), torch.randn(8, 1, 8, 8), y=y).mean().item()
        for _ in range(40)
    ]
    assert losses[0] == pytest.approx(1.0, abs=1e-4) and sum(losses[-5:]) / 5 < 0.1


# ---------------------------------------------------------------- budgets and the paper


def test_matched_width_is_the_nearest_by_ratio():
    base, widths = experiment("smoke"), range(8, 97, 8)
    target = 1.3 * params_of(base)
    got = match_experiment(base, "params", widths, target, skip="none")
    sizes = {w: params_of(with_overrides(base, skip="none", embed_dim=w)) for w in widths}
    assert got.model.embed_dim == min(widths, key=lambda w: abs(math.log(sizes[w] / target)))
    for budget in (10, 1e12):
        with pytest.raises(ParameterError, match="outside of widths 8 to 96"):
            match_experiment(base, "params", widths, budget)
    with pytest.raises(ParameterError, match="allowed are params, macs"):
        measure_of("flops")


def test_a_u_net_of_the_size_of_a_u_vit():
    base = experiment("laptop", dataset="digits")
    fields = {"model": "ADM", **unet_fields(8)}
    exp = match_experiment(base, "params", range(2, 513, 2), **fields)
    assert params_of(exp) / params_of(base) == pytest.approx(1, abs=0.05)
    assert (exp.data, exp.train, exp.sampling) == (base.data, base.train, base.sampling)


def test_optimisers_of_the_appendices():
    exps = appendix()
    printed = {"B": (2e-4, (0.9, 0.999), 0.01), "E": (1e-4, (0.9, 0.999), 0.0)}
    for place, want in printed.items():
        train = exps[place, "U-Net"].train
        assert (train.lr, train.betas, train.weight_decay) == want
    counts = [count_parameters(meta_model(exp)) for exp in exps.values()]
    assert counts == [44_692_644, 52_968_964, 500_832_016, 645_941_124]
    unet, uvit = exps["E", "U-Net"], exps["E", "U-ViT-H/2"]
    assert (unet.data, unet.diffusion, unet.sampling) == (uvit.data, uvit.diffusion, uvit.sampling)
