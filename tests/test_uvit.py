"U-ViT: its parts against independent code, the released outputs, every variant, clear errors."

import itertools
import json
import math
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from uvit_repro.config import CONFIGS, ModelConfig, ParameterError
from uvit_repro.data.files import CheckpointError
from uvit_repro.runs.execution import set_attention
from uvit_repro.train import golden_file
from uvit_repro.uvit import (
    CHOICES,
    AdaLN,
    Attention,
    PatchEmbed,
    UViT,
    count_parameters,
    from_config,
    init_weights,
    load_official,
    matched_none,
    merge_skip,
    patchify,
    sincos2d,
    timestep_embedding,
    unpatchify,
)

VALUES = {f.name: f.metadata["choices"] for f in fields(ModelConfig) if f.name in CHOICES}
SIZES = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 3,
    "embed_dim": 32,
    "depth": 5,
    "num_heads": 4,
}


def built(config, **fields):
    "The network of a published configuration, without its values."
    with torch.device("meta"):
        return from_config(replace(config.model, **fields), config.data, config.train.p_uncond)


def close(a, b, eps=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=eps)


# ------------------------------------------------------------------ parts


def test_time_is_cosines_then_sines():
    e = timestep_embedding(torch.linspace(0, 999, 200), 64)
    close(e[:, :32] ** 2 + e[:, 32:] ** 2, torch.ones(200, 32), 1e-4)
    assert e[7, 33].item() == pytest.approx(math.sin(999 * 7 / 199 * 10000 ** (-1 / 32)), abs=1e-4)


def test_patches():
    x = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    assert torch.equal(unpatchify(patchify(x, 2), 2, 3), x)
    assert torch.equal(patchify(x, 4)[0, 1, :3], x[0, :, 0, 4])
    for size, kind in itertools.product((1, 2, 3, 4, 6), VALUES["patch_embed"]):
        tokens = PatchEmbed(size, 3, 16, kind)(torch.randn(2, 3, 12, 12))
        assert tokens.shape == (2, (12 // size) ** 2, 16)


def test_the_stack_of_figure_2d_is_one_3x3_convolution_at_patch_2():
    convolutions = [m for m in PatchEmbed(2, 3, 16, "conv").modules() if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0]) for c in convolutions] == [(3, 2), (1, 1)]


def test_the_linear_patch_embedding_of_a_gpu_is_the_convolution():
    class OnGPU(torch.Tensor):
        is_cuda = True

    embed, x = PatchEmbed(4, 3, 16), torch.randn(2, 3, 12, 12)
    close(embed(x.as_subclass(OnGPU)).as_subclass(torch.Tensor), embed(x))


def test_positions():
    p = sincos2d(16, 64)
    assert torch.equal(p[5 * 16 + 9, :32], p[5 * 16, :32])
    assert torch.equal(p[5 * 16 + 9, 32:], p[9, 32:])


def test_attention_equals_pytorch_by_both_paths():
    layer, x = Attention(32, 4, qkv_bias=True), torch.randn(2, 9, 32, requires_grad=True)
    other = nn.MultiheadAttention(32, 4, batch_first=True)
    other.in_proj_weight.data, other.in_proj_bias.data = layer.qkv.weight.data, layer.qkv.bias.data
    other.out_proj = layer.proj
    for path in ("sdpa", "math"):
        set_attention(layer, path)
        close(layer(x), other(x, x, x)[0])
        gradients = [
            torch.autograd.grad(f.square().sum(), x)[0] for f in (layer(x), other(x, x, x)[0])
        ]
        close(*gradients, 1e-4)


@pytest.mark.parametrize(("kind", "scale"), [("adaln", 1), ("adaln_literal", 0), ("adaln_zero", 1)])
def test_adaptive_norms_start_as_their_name_says(kind, scale):
    layer, h, temb = AdaLN(16, kind), torch.randn(3, 5, 16), torch.randn(3, 16)
    nn.init.zeros_(layer.proj.weight)
    nn.init.zeros_(layer.proj.bias)
    layer.init_special()
    out, gate = layer(h, temb)
    close(out, scale * F.layer_norm(h, (16,)))
    if kind == "adaln_zero":
        assert not gate.any()


def test_skips_are_the_formulas_of_figure_2a():
    h, s = torch.randn(2, 2, 5, 8)
    wide, square = nn.Linear(16, 8), nn.Linear(8, 8)
    left, right = wide.weight.split(8, 1)
    close(merge_skip(h, s, "concat", wide), h @ left.T + s @ right.T + wide.bias)
    close(merge_skip(h, s, "add_linear", square), h + square(s))
    close(merge_skip(h, s, "linear_add", square), square(h) + square(s) - square.bias)
    close(merge_skip(h, s, "add_scaled"), (h + s) / math.sqrt(2))
    assert torch.equal(merge_skip(h, s, "add"), h + s)
    assert torch.equal(merge_skip(h, s, "none"), h)


# ------------------------------------------------------------------ initial weights


def test_initial_weights_depend_on_seed_and_name_alone():
    def parts(**more):
        layers = {"a": nn.Linear(64, 64), "e": nn.Embedding(11, 64), "c": nn.Conv2d(3, 3, 3)}
        return nn.ModuleDict({**more, **layers})

    one, two, other = init_weights(parts(), 0), init_weights(parts(), 0), init_weights(parts(), 1)
    wider = init_weights(parts(extra=nn.Linear(9, 9)), 0)
    for name, p in one.named_parameters():
        assert torch.equal(p, two.get_parameter(name))
        assert torch.equal(p, wider.get_parameter(name))
        assert name == "a.bias" or not torch.equal(p, other.get_parameter(name))
    assert one["a"].weight.std().item() == pytest.approx(0.02, abs=1e-3)
    assert one["e"].weight.std().item() == pytest.approx(1.0, abs=0.1)
    assert one["c"].weight.abs().max() <= 27**-0.5


# ------------------------------------------------------------------ released weights


@pytest.mark.parametrize("name", ["uvit_unconditional", "uvit_class_conditional", "uvit_text"])
def test_outputs_of_the_released_code(name):
    arrays, part = golden_file(name)
    config, given = json.loads(str(arrays["config"])), part("input")
    model = load_official(part("state"), config["num_heads"], config.get("num_clip_token"))
    with torch.no_grad():
        out = model(given["x"], given["timesteps"], y=given.get("y"), context=given.get("context"))
    close(out, torch.tensor(arrays["output"]))
    assert model.depth == config["depth"] + 1  # 12 there is 13 here


@pytest.mark.parametrize(
    "kwargs",
    [
        {"qkv_bias": True},
        {"mlp_time_embed": True},
        {"conv": "none"},
        {"skip": "none"},
        {"num_classes": 11},
        {"clip_dim": 24},
        {"mlp_ratio": 2.0},
    ],
)
def test_load_official_reads_the_shape_off_the_weights(kwargs, tmp_path):
    model = UViT(**SIZES, **kwargs).eval()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    again = load_official(tmp_path / "m.pth", num_heads=4)
    args = [torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0])]
    args.append(torch.tensor([1, 2]) if "num_classes" in kwargs else None)
    args.append(torch.randn(2, 77, 24) if "clip_dim" in kwargs else None)
    assert torch.equal(again(*args), model(*args))


def test_load_official_refuses_what_is_not_a_uvit(tmp_path):
    path = tmp_path / "m.pth"
    torch.save(UViT(**SIZES).state_dict(), path)
    with pytest.raises(ParameterError, match="give num_heads"):
        load_official(path)
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(CheckpointError):
        load_official(path)
    with pytest.raises(CheckpointError, match="not a U-ViT"):
        load_official({"a": torch.ones(1)})


# ------------------------------------------------------------------ parameters


def test_parameter_counts():
    exact = {
        "CIFAR10 U-ViT-S/2": 44_255_328,
        "ImageNet 64x64 U-ViT-M/4": 130_940_292,
        "ImageNet 256x256 U-ViT-L/2": 286_763_172,
        "ImageNet 256x256 U-ViT-H/2": 500_832_016,
        "MS-COCO 256x256 U-ViT-S/2": 44_692_644,
        "MS-COCO 256x256 U-ViT-S/2 (Deep)": 58_345_636,
    }
    assert {n: count_parameters(built(CONFIGS[n])) for n in exact} == exact
    base = CONFIGS["CIFAR10 U-ViT-S/2"]
    skips = {"add": 41_106_528, "none": 41_106_528, "linear_add": 42_682_464}
    assert {s: count_parameters(built(base, skip=s)) for s in skips} == skips
    matched = count_parameters(built(base, skip="none", mlp_ratio=matched_none(512, 13)))
    assert matched == pytest.approx(44_255_328, rel=5e-4)


# ------------------------------------------------------------------ the network


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, v) for f, values in VALUES.items() for v in values),
        ("use_checkpoint", True),
        ("mlp_time_embed", True),
    ],
)
def test_every_variant_learns_with_every_parameter(field, value):
    model = UViT(**SIZES, num_classes=11, **{field: value}).train()
    for m in model.modules():
        if isinstance(m, AdaLN):
            nn.init.normal_(m.proj.weight, std=0.1)  # adaln_zero starts with closed gates
    out = model(torch.randn(4, 3, 8, 8), torch.rand(4) * 999, torch.tensor([0, 5, 7, 10]))
    assert out.shape == (4, 3, 8, 8)
    out.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_long_skip_carries_something():
    model, x = UViT(**SIZES).eval(), (torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]))
    before = model(*x)
    model.out_blocks[0].skip_linear.weight.data[:, 32:] = 0
    assert (model(*x) - before).abs().max() > 1e-4


def test_the_head_is_a_linear_layer_on_patches():
    model, tokens = UViT(**SIZES, conv="none"), torch.randn(2, 17, 32)
    want = model.decoder_pred(model.norm(tokens[:, 1:]))
    image = rearrange(want, "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=2, q=2)
    assert torch.equal(model.head(tokens), image)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 3}, "try one of"),
        ({"depth": 4}, "try 3 or 5"),
        ({"num_heads": 5}, "num_heads"),
        ({"skip": "cat"}, "'concat'"),
        ({"time": "film"}, "'token'"),
        ({"pos_embed": "sincos2d", "embed_dim": 30, "num_heads": 2}, "multiple of 4"),
    ],
)
def test_impossible_networks(kwargs, message):
    with pytest.raises(ParameterError, match=message):
        UViT(**{**SIZES, **kwargs})


def test_wrong_inputs():
    model, labels = UViT(**SIZES, num_classes=3), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="built for"):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1), labels)
    with pytest.raises(ValueError, match="needs it"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(ParameterError, match="U-ViT-S/P"):
        UViT.from_preset("U-ViT-Z/2", img_size=32, in_chans=3)


def test_the_import_is_light():
    heavy = "diffusers open_clip torch_fidelity pandas sklearn matplotlib"
    code = f"import sys, uvit_repro.uvit; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
