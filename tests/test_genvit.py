"GenViT: the released outputs, the published counts, the time on tokens, stochastic depth as a function of the input, training that resumes."

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from uvit_repro.config import (
    MODELS,
    PROTOCOLS,
    ModelConfig,
    ParameterError,
    experiment,
    resolve_name,
    with_overrides,
)
from uvit_repro.data.files import CheckpointError
from uvit_repro.genvit import (
    ARMS,
    IMAGES,
    PRESETS,
    GenViT,
    TimeEmbedding,
    arm,
    drop_masks,
    from_config,
    load_genvit,
    own_recipe,
    scale_shift,
)
from uvit_repro.uvit import init_weights
from uvit_repro.runs.counting import macs_of, meta_model, model_inputs, params_of
from uvit_repro.runs.execution import set_attention
from uvit_repro.train import build_model, golden_file

small = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "classifier": 0,
}
gen = lambda s=0: torch.Generator().manual_seed(s)


def test_published_counts_exactly():
    with torch.device("meta"):
        nets = GenViT(), GenViT(128, 8)
    assert [sum(p.numel() for p in n.parameters()) for n in nets] == [11_185_068, 17_109_948]


@pytest.mark.parametrize("path", ["sdpa", "math"])
def test_released_outputs(path):
    d, part = golden_file("genvit")
    cfg, inp = json.loads(str(d["config"])), part("input")
    net = GenViT(
        cfg["img_size"],
        cfg["patch_size"],
        3,
        cfg["dim"],
        cfg["depth"],
        cfg["heads"],
        cfg["mlp_dim_ratio"],
        cfg["num_classes"],
    ).eval()
    assert list(part("state")) and set(net.state_dict()) == set(part("state"))
    net.load_state_dict(part("state"))
    set_attention(net, path)
    with torch.inference_mode():
        assert float((net(inp["x"], inp["t"]) - torch.tensor(d["output"])).abs().max()) < 1e-5
    twice = load_genvit(part("state"), cfg["heads"])
    with torch.inference_mode():
        assert float((twice(inp["x"], inp["t"]) - torch.tensor(d["output"])).abs().max()) > 1


def test_a_training_file_of_the_authors_loads_and_others_do_not(tmp_path):
    d, part = golden_file("genvit")
    net = load_genvit(part("state"), 6, time_twice=False)
    torch.save(
        {
            "model_state_dict": {
                "betas": torch.zeros(1000),
                **{f"denoise_fn.{k}": v for k, v in part("state").items()},
            }
        },
        tmp_path / "ema_checkpoint.pth",
    )
    again = load_genvit(tmp_path / "ema_checkpoint.pth", 6, time_twice=False)
    x, t = torch.randn(1, 3, 16, 16), torch.ones(1)
    with torch.inference_mode():
        assert torch.equal(net(x, t), again(x, t)) and torch.equal(
            net.classify(x, t), again.classify(x, t)
        )
    assert not again.training and again.classify(x, t).shape == (1, 10)
    bad = dict(part("state"))
    bad["recon_head.0.weight"] = bad["recon_head.0.weight"][:, :3]
    with pytest.raises(CheckpointError, match="width 48 with 3 layers"):
        load_genvit(bad, 6)
    with pytest.raises(CheckpointError, match="not a GenViT"):
        load_genvit({"model_state_dict": {"a": torch.zeros(1)}})


def test_scale_and_shift_are_per_token_by_a_direct_loop():
    x, time = torch.randn(2, 5, 3, generator=gen()), torch.randn(2, 10, generator=gen(1))
    got = scale_shift(x, time)
    for b in range(2):
        for l in range(5):
            for d in range(3):
                assert abs(got[b, l, d] - (x[b, l, d] * (1 + time[b, l]) + time[b, l + 5])) < 1e-6


def test_the_whole_network_by_hand():
    "Forward pass written out from the notes, one head at a time, with both uses of the time."
    net = init_weights(GenViT(**small, time_twice=True), 0).eval()
    S = {k: v.double() for k, v in net.state_dict().items()}
    x, t = torch.randn(2, 1, 8, 8, generator=gen()), torch.tensor([7.0, 431.0])
    lin = lambda h, n: h @ S[f"{n}.weight"].T + S.get(f"{n}.bias", 0)

    def ln(h, n):
        m = h.mean(-1, keepdim=True)
        return (h - m) / ((h - m).square().mean(-1, keepdim=True) + 1e-5).sqrt() * S[
            f"{n}.weight"
        ] + S[f"{n}.bias"]

    gelu = lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5))
    silu = lambda h: h / (1 + (-h).exp())
    e = torch.tensor(
        [
            [f(ti * 10000 ** (-k / 7)) for f in (math.sin, math.cos) for k in range(8)]
            for ti in t.tolist()
        ],
        dtype=torch.float64,
    )
    temb = lin(gelu(lin(e, "time_mlp.1")), "time_mlp.3")
    patches = torch.stack(
        [
            x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].permute(0, 2, 3, 1).reshape(2, 4)
            for i in range(4)
            for j in range(4)
        ],
        1,
    ).double()
    h = (
        torch.cat([S["cls_token"].expand(2, 1, 16), lin(patches, "to_patch_embedding.1")], 1)
        + S["pos_embedding"]
    )
    for i in range(3):
        time, L = lin(silu(temb), f"transformer.time_layers.{i}.1"), f"transformer.layers.{i}"
        z = lambda h: h * (1 + time[:, :17, None]) + time[:, 17:, None]
        h = z(h)
        qkv, out = lin(ln(h, f"{L}.0.norm"), f"{L}.0.fn.to_qkv"), []
        for k in range(2):
            q, key, v = (qkv[..., j * 16 + 8 * k : j * 16 + 8 * k + 8] for j in range(3))
            a = (q @ key.mT / 8**0.5).exp()
            out.append(a / a.sum(-1, keepdim=True) @ v)
        h = z(h + lin(torch.cat(out, -1), f"{L}.0.fn.to_out.0"))
        h = h + lin(gelu(lin(ln(h, f"{L}.1.norm"), f"{L}.1.fn.net.0")), f"{L}.1.fn.net.3")
    out = lin(h[:, 1:], "recon_head.0").reshape(2, 4, 4, 2, 2)
    want = out.permute(0, 1, 3, 2, 4).reshape(2, 1, 8, 8)
    with torch.inference_mode():
        assert (net(x, t) - want).abs().max() < 2e-4 * want.abs().max()


def test_layernorm_hides_a_token_wise_scale_and_shift():
    x, time, ln = (
        torch.randn(3, 6, 64, generator=gen()),
        torch.randn(3, 12, generator=gen(1)),
        nn.LayerNorm(64, eps=1e-12),
    )
    assert torch.allclose(
        ln(scale_shift(x, time)), ln(x) * (1 + time[:, :6]).sign()[..., None], atol=1e-4
    )


def test_gradient_reaches_every_parameter():
    for kw, cond in (
        ({}, {}),
        ({"num_classes": 2}, {"y": torch.tensor([0, 1])}),
        ({"clip_dim": 6, "num_clip_token": 5}, {"context": torch.randn(2, 5, 6)}),
    ):
        net = init_weights(GenViT(**small, **kw, drop_path=0), 1).train()
        net(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), **cond).square().sum().backward()
        assert [
            n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
        ] == []
    net = GenViT(**{**small, "classifier": 3}, drop_path=0)
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    (net(x, t).sum() + net.classify(x, t).square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_stochastic_depth_is_a_function_of_the_input():
    x = torch.randn(4000, 1, 4, 4, generator=gen())
    m = drop_masks(x, 8, 0.3)
    kept = (m > 0).double()
    assert (
        torch.equal(m[:, 7:9], drop_masks(x[7:9], 8, 0.3))
        and (kept.mean(1) - 0.7).abs().max() < 4.5 * (0.21 / 4000) ** 0.5
        and m.max() == pytest.approx(1 / 0.7)
    )
    assert (torch.corrcoef(kept) - torch.eye(8)).abs().max() < 4.5 / 4000**0.5
    nets = [
        init_weights(GenViT(**small, drop_path=0.5, use_checkpoint=c), 1).train()
        for c in (False, True)
    ]
    x, t = torch.randn(6, 1, 8, 8), torch.full((6,), 9.0)
    a, b = (n(x, t) for n in nets)
    a.sum().backward()
    b.sum().backward()
    assert (
        torch.equal(a, b)
        and torch.equal(nets[0](x, t), a)
        and not torch.equal(nets[0].eval()(x, t), a)
    )
    assert all(
        torch.allclose(p.grad, q.grad, atol=1e-5)
        for p, q in zip(nets[0].parameters(), nets[1].parameters())
    )


@pytest.mark.parametrize("name", PRESETS)
def test_forward_and_backward_at_every_preset_on_meta(name):
    exp = replace(
        PROTOCOLS["gpu"],
        model=ModelConfig(**PRESETS[name]),
        data=replace(PROTOCOLS["gpu"].data, img_size=IMAGES[name][0]),
    )
    net = meta_model(exp)
    x, t, _ = model_inputs(net, 2)
    out = net(x, t)
    out.sum().backward()
    assert out.shape == x.shape and all(p.grad is not None for p in net.parameters())


def test_registration_and_refusals():
    assert resolve_name(MODELS, "GenViT") is from_config
    e = experiment("smoke", model="GenViT", depth=4)
    net = build_model(e)
    assert (
        net.depth == 4
        and len(net.in_blocks) + 1 + len(net.out_blocks) == 4
        and net.num_classes == 11
    )
    assert (
        torch.equal(build_model(e).state_dict()["pos_embedding"], net.state_dict()["pos_embedding"])
        and net.pos_embedding.weight.std() > 0.9
    )
    for kw, msg in (
        ({"skip": "none"}, "no such choice"),
        ({"options": "drop=1"}, "drop_path"),
        ({"options": "drop_path=1.0"}, "below 1"),
        ({"patch_size": 3}, "try one of"),
        ({"num_heads": 3}, "num_heads = 3"),
    ):
        with pytest.raises(ParameterError, match=msg):
            meta_model(experiment("smoke", model="GenViT", **kw))
    for kw, msg in (
        ({"depth": 0}, "depth = 0"),
        ({"embed_dim": 2, "num_heads": 1}, "two wavelengths"),
        ({"num_classes": 3, "clip_dim": 4}, "not both"),
    ):
        with pytest.raises(ParameterError, match=msg):
            GenViT(**{**small, **kw})
    with pytest.raises(ValueError, match="built without"):
        GenViT(**small)(torch.zeros(1, 1, 8, 8), torch.zeros(1), y=torch.zeros(1, dtype=torch.long))


def test_arms_differ_in_what_they_say():
    own, uvit, matched, patch = (arm("gpu", a) for a in ARMS)
    assert (
        own.model == uvit.model
        and own.train.ema_before
        and not uvit.train.ema_before
        and (own.diffusion.loss, uvit.diffusion.loss) == ("l1", "mse")
        and own.sampling == uvit.sampling == matched.sampling
    )
    assert (
        uvit.train == matched.train == patch.train
        and patch.model.patch_size == uvit.model.patch_size == 4
        and matched.model.patch_size == 2
        and matched.model.embed_dim == 256
    )
    assert (
        all(abs(params_of(e) / params_of(own) - 1) < 0.01 for e in (matched, patch))
        and len({e.run_id for e in (own, uvit, matched, patch)}) == 4
    )
    paper = arm("paper", "own")
    assert (
        paper.train.n_steps == 195_000
        and paper.train.warmup_steps == 3900
        and paper.train.lr * paper.train.lr_final == pytest.approx(1e-6)
        and paper.sampling.sampler == "ancestral"
        and paper.sampling.nfe == 1000
        and not paper.data.flip
    )
    assert own_recipe(1000, weight=100)["grad_clip"] == pytest.approx(0.01)
    with pytest.raises(ParameterError, match="own, uvit"):
        arm("gpu", "theirs")


def test_trains_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    "Loss falls, and a run that is stopped and started again ends at the same weights, stochastic depth included."
    import uvit_repro.train as T
    from uvit_repro.data.images import open_data

    exp, data = open_data(
        experiment(
            "smoke",
            model="GenViT",
            options="drop_path=0.3",
            n_steps=30,
            log_every=5,
            checkpoint_seconds=0.0,
            attention="math",
            curve_steps=(),
        )
    )
    say = lambda s: None
    T.train(exp, data, tmp_path / "whole", say)
    log = T.read_log(tmp_path / "whole")
    assert log.loss.iloc[-1] < log.loss.iloc[0]

    class Stop(Exception):
        pass

    real, n = T.save_checkpoint, []

    def stop(*a):
        real(*a)
        n.append(1)
        (_ for _ in ()).throw(Stop) if len(n) == 11 else None

    monkeypatch.setattr(T, "save_checkpoint", stop)
    with pytest.raises(Stop):
        T.train(exp, data, tmp_path / "cut", say)
    monkeypatch.setattr(T, "save_checkpoint", real)
    got = T.train(exp, data, tmp_path / "cut", say)
    a, b = (T.load_tensors(tmp_path / f / "weights-0000030.safetensors") for f in ("whole", "cut"))
    assert got["steps"] == 19 and all(torch.equal(a[k], b[k]) for k in a)
