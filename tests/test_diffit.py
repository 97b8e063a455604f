"uvit_repro.diffit against PyTorch's own attention, direct loops, published counts and the released format."

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uvit_repro.config import (
    MODELS,
    DataConfig,
    ModelConfig,
    ParameterError,
    SamplingConfig,
    experiment,
    resolve_name,
    with_overrides,
)
from uvit_repro.data.files import CheckpointError
from uvit_repro.diffit import (
    PRESETS,
    RUNS,
    TIME_IN,
    TMSA,
    DiffiTBlock,
    DiffiTImage,
    LatentDiffiT,
    centre_attention,
    diffit_macs,
    diffit_positions,
    from_config,
    from_windows,
    image_from_config,
    load_released,
    match_mlp,
    parameters_of,
    published_run,
    relative_index,
    spread,
    time_variants,
    to_windows,
    watch_centre,
)
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.counting import model_inputs
from uvit_repro.runs.execution import set_attention
from uvit_repro.train import build_model
from uvit_repro.uvit import UViT, count_parameters


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(n)


def shake(net, std=0.3):
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net


@pytest.mark.parametrize("w", [1, 2, 5])
def test_relative_index_by_a_double_loop(w):
    want = [
        [(a // w - b // w + w - 1) * (2 * w - 1) + a % w - b % w + w - 1 for b in range(w * w)]
        for a in range(w * w)
    ]
    assert relative_index(w).tolist() == want


@pytest.mark.parametrize("time", ["none", "tmsa"])
def test_attention_is_pytorchs_with_a_bias(time):
    att, x, temb = shake(TMSA(12, 3, 3, time=time), 0.5), torch.randn(4, 9, 12), torch.randn(4, 12)
    want = []
    for i in range(4):
        b = att.qkv.bias + (att.qkv_temb(temb)[i] if time == "tmsa" else 0)
        mask = att.relative_position_bias_table[relative_index(3)].permute(2, 0, 1)
        z = x[i][:, None]
        want.append(
            F.multi_head_attention_forward(
                z,
                z,
                z,
                12,
                3,
                att.qkv.weight,
                b,
                None,
                None,
                False,
                0.0,
                att.proj.weight,
                att.proj.bias,
                need_weights=False,
                attn_mask=mask,
            )[0][:, 0]
        )
    assert torch.allclose(att(x, temb), torch.stack(want), atol=1e-5)
    set_attention(att, "math")
    assert torch.allclose(att(x, temb), torch.stack(want), atol=1e-5)


def test_without_time_terms_the_time_changes_nothing():
    net, x = shake(LatentDiffiT(8, 2, 1, 16, 2, 2, num_classes=None)), torch.randn(2, 1, 8, 8)
    t = torch.tensor([1.0, 900.0])
    assert not torch.allclose(net(x, t), net(x, t.flip(0)), atol=1e-3)
    with torch.no_grad():
        for b in net.blocks:
            b.attn.qkv_temb.weight.zero_()
    assert torch.equal(net(x, t), net(x, t.flip(0)))
    plain = LatentDiffiT(8, 2, 1, 16, 2, 2, num_classes=None, time="none")
    shared = {k: v for k, v in net.state_dict().items() if "temb" not in k}
    with torch.no_grad():
        for b in net.blocks:
            b.attn.qkv_temb.bias.zero_()
    plain.load_state_dict(shared)
    assert torch.allclose(plain(x, t), net(x, t), atol=1e-6)


@pytest.mark.parametrize("w", [1, 2, 3, 6])
def test_windows_and_their_inverse(w):
    x = torch.randn(2, 5, 6, 6)
    z = to_windows(x, w)
    n = 6 // w
    assert torch.equal(from_windows(z, w, 6), x)
    for b, r, c in ((0, 0, 5), (1, 4, 3), (1, 5, 5)):
        assert torch.equal(z[b * n * n + (r // w) * n + c // w, (r % w) * w + c % w], x[b, :, r, c])


def test_windows_get_their_own_images_time():
    blk, temb = shake(DiffiTBlock(8, 2, 2, time_dim=6)), torch.randn(2, 6)
    x = torch.randn(8, 4, 8)
    got = blk(x, temb)
    assert torch.allclose(
        got,
        torch.cat([blk(x[:4], temb[:1].expand(4, 6)), blk(x[4:], temb[1:].expand(4, 6))]),
        atol=1e-6,
    )


def test_published_counts():
    with torch.device("meta"):
        nets = [LatentDiffiT(), LatentDiffiT(depth=30), LatentDiffiT(img_size=64)]
    assert [count_parameters(n) for n in nets] == [561_035_232, 600_906_752, 562_382_816]
    parts = diffit_macs()
    assert round((parts["linear layers of tokens"] + parts["patches in and out"]) / 1e9, 1) == 114.2
    assert round((sum(parts.values()) - parts["linear layers of time"]) / 1e9, 1) == 118.4


@pytest.mark.parametrize(
    "name,side,chans,classes",
    [("DiffiT latent", 64, 4, 1000), ("DiffiT CIFAR10", 32, 3, 0), ("DiffiT FFHQ64", 64, 3, 0)],
)
def test_presets_go_forward_and_backward(name, side, chans, classes):
    m = ModelConfig(**PRESETS[name])
    with torch.device("meta"):
        net = resolve_name(MODELS, m.model)(
            m,
            DataConfig(img_size=side, in_chans=chans, num_classes=classes),
            0.1 if classes else 0.0,
            False,
            0.0,
        ).train()
    x, t, cond = model_inputs(net, 2)
    out = net(x, t, **cond)
    out.sum().backward()
    assert out.shape == (2, chans * (2 if classes else 1), side, side) and all(
        p.grad is not None for p in net.parameters()
    )


def released_format(D=24, L=2, H=3, S=8, rows=6):
    N, sd = S // 2, {}
    shapes = {
        "x_embedder.proj.weight": (D, 4, 2, 2),
        "x_embedder.proj.bias": (D,),
        "y_embedder.embedding_table.weight": (rows, D),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "final_layer.linear.weight": (32, D),
        "final_layer.linear.bias": (32,),
    }
    for i in range(L):
        for n, (o, k) in {"qkv_temb": (3 * D, D), "qkv": (3 * D, D), "proj": (D, D)}.items():
            shapes |= {f"blocks.{i}.attn.{n}.weight": (o, k), f"blocks.{i}.attn.{n}.bias": (o,)}
        shapes |= {
            f"blocks.{i}.attn.relative_position_bias_table": ((2 * N - 1) ** 2, H),
            f"blocks.{i}.mlp.fc1.weight": (4 * D, D),
            f"blocks.{i}.mlp.fc1.bias": (4 * D,),
            f"blocks.{i}.mlp.fc2.weight": (D, 4 * D),
            f"blocks.{i}.mlp.fc2.bias": (D,),
        }
        sd[f"blocks.{i}.attn.relative_position_index"] = relative_index(N)
    return {
        **sd,
        **{k: torch.randn(v) * 0.2 for k, v in shapes.items()},
        "pos_embed": diffit_positions(N, D)[None],
    }


def test_released_format_loads_by_its_names(tmp_path):
    sd = released_format()
    net = load_released(sd)
    back = net.state_dict()
    assert set(back) == set(sd) and all(torch.equal(back[k], sd[k]) for k in sd)
    assert (
        net.img_size,
        net.depth,
        net.embed_dim,
        net.num_classes,
        net.out_chans,
        net.blocks[0].attn.num_heads,
    ) == (8, 2, 24, 6, 8, 3)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 999.0]), torch.tensor([1, 5])
    from safetensors.torch import save_file

    save_file(sd, tmp_path / "w.safetensors")
    torch.save(sd, tmp_path / "w.pt")
    for f in ("w.safetensors", "w.pt"):
        assert torch.equal(load_released(tmp_path / f)(x, t, y), net(x, t, y))
    only = LatentDiffiT(8, 2, 4, 24, 2, 3, num_classes=6)
    only.load_state_dict(dict(net.named_parameters()))
    assert torch.equal(only(x, t, y), net(x, t, y))
    with pytest.raises(RuntimeError, match="Missing key"):
        only.load_state_dict({k: v for k, v in sd.items() if "table" not in k or "0" not in k})
    with pytest.raises(CheckpointError, match="has no x_embedder"):
        load_released({"a": x})


@pytest.mark.parametrize("time", TIME_IN[:-1])
def test_gradient_reaches_every_parameter(time):
    nets = [LatentDiffiT(8, 2, 2, 16, 3, 2, num_classes=3, time=time)] + (
        [DiffiTImage(8, 2, 8, 1, 2, num_classes=3, time=time)]
        if time in ("tmsa", "bias", "mlp")
        else []
    )
    for net in nets:
        out = shake(net)(
            torch.randn(3, 2, 8, 8), torch.tensor([0.5, 300.0, 900.0]), torch.tensor([0, 1, 2])
        )
        (out * torch.randn_like(out)).sum().backward()
        assert not [
            n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0
        ]


def test_recomputed_activations_change_nothing():
    for make in (
        lambda **k: LatentDiffiT(8, 2, 1, 16, 3, 2, num_classes=None, **k),
        lambda **k: DiffiTImage(8, 1, 8, 1, 2, **k),
    ):
        x, t, grads = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), []
        for on in (False, True):
            torch.manual_seed(5)
            net = shake(make(use_checkpoint=on)).train()
            net(x, t).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_initial_weights_are_the_released_distributions_and_keyed():
    e = experiment(
        "smoke", model="DiffiT-latent", embed_dim=64, depth=2, num_heads=4, process="linear"
    )
    a, b = build_model(e), build_model(e)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    w = a.blocks[1].mlp.fc1.weight
    bound = math.sqrt(6 / (64 + 256))
    assert w.abs().max() <= bound and abs(w.std() - bound / 3**0.5) < 0.01 * bound
    p = a.x_embedder.proj.weight
    bound = math.sqrt(6 / (64 + p[0].numel()))
    assert p.abs().max() <= bound and p.abs().max() > 0.9 * bound
    assert a.final_layer.linear.weight.abs().max() == 0 and a.x_embedder.proj.bias.abs().max() == 0
    for p in (
        a.blocks[0].attn.relative_position_bias_table,
        a.y_embedder.embedding_table.weight,
        a.t_embedder.mlp[0].weight,
    ):
        assert abs(p.std() - 0.02) < 0.004
    c = build_model(with_overrides(e, options="time=mlp"))
    assert torch.equal(
        c.blocks[0].attn.qkv.weight, a.blocks[0].attn.qkv.weight
    )  # variants share what they can


def test_options_and_foreign_fields():
    data = DataConfig(img_size=8, in_chans=1, num_classes=10)
    m = lambda **k: ModelConfig(model="DiffiT-latent", embed_dim=16, depth=2, num_heads=2, **k)
    assert (
        from_config(m(options="time=bias,learn_sigma=false"), data).out_chans == 1
        and from_config(m(condition="class"), data, 0.1).num_classes == 11
    )
    net = image_from_config(
        ModelConfig(
            model="DiffiT-image",
            embed_dim=16,
            num_heads=2,
            patch_size=1,
            options="levels=2,window=2,cells=1-2,time_dim=20",
        ),
        data,
    )
    assert (
        [len(l) for l in net.encoder] == [1, 2]
        and net.encoder[0][0].window == 2
        and net.t_embedder.mlp[0].out_features == 20
        and net.encoder[1][0].block.attn.num_heads == 4
    )
    assert (
        len(net.in_blocks) + 1 + len(net.out_blocks) == len(net.cells) == 4
        and net.mid_block is net.cells[2]
    )
    for bad, msg in (
        ({"skip": "none"}, "no such choice"),
        ({"time": "adaln"}, "options='time="),
        ({"condition": "text"}, "class or nothing"),
        ({"options": "time=x"}, "allowed are"),
        ({"patch_size": 3}, "does not divide"),
    ):
        with pytest.raises(ParameterError, match=msg):
            from_config(m(**bad), data)
    with pytest.raises(ParameterError, match="patch_size = 1"):
        image_from_config(ModelConfig(model="DiffiT-image"), data)
    with pytest.raises(ParameterError, match="window = 3"):
        DiffiTImage(32, window=3)


def test_budgets():
    e = experiment("smoke", model="DiffiT-latent", embed_dim=32, depth=3, num_heads=2)
    n = parameters_of(e)
    for label, kw in time_variants(e):
        assert abs(parameters_of(with_overrides(e, **kw)) - n) <= 3 * 65, label
    assert abs(match_mlp(e, n) * 32 - 128) < 1
    assert (
        published_run("ImageNet 256x256").sampling.cfg_schedule == "power_cosine"
        and published_run("CIFAR10", seed=3).seed == 3
        and set(RUNS) == {"ImageNet 256x256", "ImageNet 512x512", "CIFAR10"}
    )


def test_centre_attention_of_any_backbone():
    uv, d, c = (
        shake(UViT(8, 2, 1, 16, 3, 2, num_classes=4)),
        Diffusion(experiment("smoke").diffusion),
        SamplingConfig(sampler="ddim", nfe=3, cfg_scale=1.5, clip=True),
    )
    found = centre_attention(uv, d, c, (1, 8, 8), 5, num_classes=3)
    assert (
        [m.shape for m in found["maps"]] == [(3, 4, 4)] * 3
        and found["entropy"].shape == (3, 3)
        and list(found["t"]) == sorted(found["t"], reverse=True)
        and len(found["images"]) == 5
    )
    grabbed = {}
    hook = uv.in_blocks[0].attn.register_forward_pre_hook(lambda m, a: grabbed.update(x=a[0]))
    uv.eval()
    with watch_centre(uv) as seen:
        uv(torch.randn(2, 1, 8, 8), torch.tensor([5.0, 5.0]), torch.tensor([0, 1]))
    hook.remove()
    q, k, _ = uv.in_blocks[0].attn.qkv(grabbed["x"]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    A = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    assert (
        torch.allclose(seen[0][1][0], A[:, :, 2 + 10, 2:].mean(1).view(2, 4, 4), atol=1e-6)
        and not uv.in_blocks[0].attn._forward_hooks
    )
    assert torch.allclose(torch.stack(spread(torch.full((4, 4), 1 / 16))), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "model": "DiffiT-latent",
            "patch_size": 2,
            "process": "linear",
            "variance": "learned",
            "sampler": "ancestral",
            "nfe": 6,
            "cfg_scale": 1.5,
            "cfg_schedule": "power_cosine",
        },
        {
            "model": "DiffiT-image",
            "patch_size": 1,
            "process": "edm",
            "prediction": "edm",
            "sampler": "heun",
            "nfe": 5,
            "cfg_scale": 1.0,
        },
    ],
)
def test_a_smoke_run_lowers_the_loss_and_samples(fields, tmp_path):
    from uvit_repro.runs.evaluate import read_samples
    from uvit_repro.runs.experiment import run_experiment
    from uvit_repro.runs.training import read_log

    e = experiment(
        "smoke",
        embed_dim=16,
        depth=1,
        num_heads=2,
        lr=2e-3,
        num_samples=80,
        curve_steps=(),
        loss_steps=(),
        log_every=5,
        **fields,
    )
    r = run_experiment(e, tmp_path, say=lambda line: None)
    log = read_log(r.folder)
    assert (
        log.loss.iloc[-1] < log.loss.iloc[0]
        and not run_experiment(e, tmp_path, say=lambda line: None).fresh
    )
    images, labels = read_samples(next((r.folder / "samples").iterdir()))
    assert images.shape == (80, 1, 8, 8) and images.float().std() > 0
    assert json.loads((r.folder / "run.json").read_text())["status"] == "ok"
