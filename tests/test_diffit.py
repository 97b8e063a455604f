"DiffiT against PyTorch's attention, the released format, the published counts and its options."

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uvit_repro.config import (
    ParameterError,
    experiment,
    with_overrides,
)
from uvit_repro.data.files import CheckpointError
from uvit_repro.diffit import (
    RUNS,
    TIME_IN,
    TMSA,
    DiffiTBlock,
    DiffiTImage,
    LatentDiffiT,
    ResidualCell,
    diffit_positions,
    load_released,
    published_run,
    relative_index,
)
from uvit_repro.runs.counting import count_macs, meta_model
from uvit_repro.runs.execution import set_attention
from uvit_repro.train import build_model
from uvit_repro.uvit import count_parameters


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(net, std=0.3):
    "The network with every parameter random, so that every branch shows."
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net


@pytest.mark.parametrize("w", [1, 2, 5])
def test_relative_index_by_a_double_loop(w):
    index = relative_index(w)
    for a in range(w * w):
        for b in range(w * w):
            down, right = a // w - b // w, a % w - b % w
            assert index[a, b] == (down + w - 1) * (2 * w - 1) + right + w - 1


@pytest.mark.parametrize("path", ["sdpa", "math"])
@pytest.mark.parametrize("time", ["none", "tmsa"])
def test_attention_is_pytorchs_with_a_bias(time, path):
    attn, x, temb = (
        shaken(TMSA(12, 3, 3, time=time), 0.5),
        torch.randn(4, 9, 12),
        torch.randn(4, 12),
    )
    set_attention(attn, path)
    table = attn.relative_position_bias_table[relative_index(3)].permute(2, 0, 1)
    for i, tokens in enumerate(x):
        bias = attn.qkv.bias + (attn.qkv_temb(temb)[i] if time == "tmsa" else 0)
        projections = attn.qkv.weight, bias, None, None, False, 0.0
        last = attn.proj.weight, attn.proj.bias
        z = tokens[:, None]
        want = F.multi_head_attention_forward(
            z, z, z, 12, 3, *projections, *last, need_weights=False, attn_mask=table
        )
        assert torch.allclose(attn(x, temb)[i], want[0][:, 0], atol=1e-5)


def test_a_time_that_only_reaches_the_keys_changes_nothing():
    attn, x, temb = shaken(TMSA(12, 3, 3)), torch.randn(4, 9, 12), torch.randn(4, 12)
    with torch.no_grad():
        attn.qkv_temb.weight[:12] = attn.qkv_temb.weight[24:] = 0
        attn.qkv_temb.bias[:12] = attn.qkv_temb.bias[24:] = 0
    assert torch.allclose(attn(x, temb), attn(x, 7 * temb), atol=1e-5)


def test_time_in_the_bias_by_its_table_and_none_for_tokens_in_front():
    attn, temb = shaken(TMSA(12, 3, 3, time="bias")), torch.randn(4, 12)
    bias = attn.bias_of(torch.randn(4, 11, 12), temb)
    by_row, by_column = attn.bias_temb(temb)[2].view(2, 5, 3)
    offset = relative_index(3)[7, 2]
    want = attn.relative_position_bias_table[offset] + by_row[offset // 5] + by_column[offset % 5]
    assert torch.allclose(bias[2, :, 2 + 7, 2 + 2], want, atol=1e-6)
    assert not bias[:, :, :2].any() and not bias[..., :2].any()


def test_a_residual_cell_puts_its_windows_back():
    "Without attention's and the MLP's last layers a cell adds its convolution, place by place."
    cell, x, temb = shaken(ResidualCell(8, 2, 3)), torch.randn(2, 8, 6, 6), torch.randn(2, 8)
    for last in (cell.block.attn.proj, cell.block.mlp.fc2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    assert torch.equal(cell(x, temb), x + cell.conv(F.silu(cell.norm(x))))


def test_windows_get_the_time_of_their_own_image():
    block, temb, x = (
        shaken(DiffiTBlock(8, 2, 2, time_dim=6)),
        torch.randn(2, 6),
        torch.randn(8, 4, 8),
    )
    halves = [block(x[4 * i : 4 * i + 4], temb[i : i + 1].expand(4, 6)) for i in (0, 1)]
    assert torch.allclose(block(x, temb), torch.cat(halves), atol=1e-6)


def test_positions_by_their_formula():
    row, column = divmod(7, 5)
    freqs = 1 / 10000 ** (torch.arange(6) / 6)
    angles = column * freqs, row * freqs
    want = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)])
    assert torch.allclose(diffit_positions(5, 24)[7], want, atol=1e-6)


def test_published_counts():
    with torch.device("meta"):
        nets = [LatentDiffiT(), LatentDiffiT(depth=30), LatentDiffiT(img_size=64)]
    assert [count_parameters(n) for n in nets] == [561_035_232, 600_906_752, 562_382_816]
    attention = 2 * 28 * 256**2 * 1152
    of_time = 28 * 3 * 1152**2 + 256 * 1152 + 1152**2
    linear = count_macs(nets[0]) - attention - of_time
    assert round(linear / 1e9, 1) == 114.2


def released_format(D=24, blocks=2, heads=3, side=4, rows=6) -> dict:
    "Names and shapes as the released constructor has them."
    linear = {
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (32, D),
        "x_embedder.proj": (D, 4, 2, 2),
    }
    state = {"y_embedder.embedding_table.weight": torch.randn(rows, D)}
    for i in range(blocks):
        at = f"blocks.{i}."
        shapes = {"attn.qkv_temb": 3 * D, "attn.qkv": 3 * D, "attn.proj": D, "mlp.fc1": 4 * D}
        linear |= {at + name: (out, D) for name, out in shapes.items()}
        linear[at + "mlp.fc2"] = (D, 4 * D)
        table = torch.randn((2 * side - 1) ** 2, heads)
        state[at + "attn.relative_position_bias_table"] = table
        state[at + "attn.relative_position_index"] = relative_index(side)
    for name, shape in linear.items():
        state[f"{name}.weight"] = torch.randn(shape) * 0.2
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.2
    return {**state, "pos_embed": diffit_positions(side, D)[None]}


def test_the_released_format_loads_by_its_names(tmp_path):
    state = released_format()
    net = load_released(state)
    back = net.state_dict()
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)
    assert (net.img_size, net.depth, net.num_classes, net.out_chans) == (8, 2, 6, 8)
    assert net.blocks[0].attn.num_heads == 3
    torch.save(state, tmp_path / "w.pt")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 999.0]), torch.tensor([1, 5])
    assert torch.equal(load_released(tmp_path / "w.pt")(x, t, y), net(x, t, y))
    run = LatentDiffiT(8, 2, 4, 24, 2, 3, num_classes=6)
    run.load_state_dict(dict(net.named_parameters()))  # weights of a run have no buffers
    assert torch.equal(run(x, t, y), net(x, t, y))


def test_other_files_are_refused():
    with pytest.raises(CheckpointError, match="not a latent DiffiT checkpoint: it has no x_emb"):
        load_released({"a": torch.zeros(1)})
    state = released_format()
    state["blocks.0.attn.qkv.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="width 24 with 2 layers"):
        load_released(state)


@pytest.mark.parametrize("time", TIME_IN[:-1])
def test_gradient_reaches_every_parameter_with_recomputation_too(time):
    makes = [lambda **kw: LatentDiffiT(8, 2, 2, 16, 3, 2, num_classes=3, time=time, **kw)]
    if time in ("tmsa", "bias", "mlp"):
        makes.append(lambda **kw: DiffiTImage(8, 2, 8, 1, 2, num_classes=3, time=time, **kw))
    x, t, y = torch.randn(3, 2, 8, 8), torch.tensor([0.5, 300.0, 900.0]), torch.tensor([0, 1, 2])
    for make in makes:
        grads = []
        for on in (False, True):
            torch.manual_seed(5)
            net = shaken(make(use_checkpoint=on)).train()
            net(x, t, y).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        assert all(g.any() for g in grads[0])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_initial_weights_are_the_released_distributions():
    fields = {"embed_dim": 64, "depth": 2, "num_heads": 4, "process": "linear"}
    exp = experiment("smoke", model="DiffiT-latent", **fields)
    net = build_model(exp)
    w = net.blocks[1].mlp.fc1.weight
    bound = math.sqrt(6 / (64 + 256))
    assert w.abs().max() <= bound and abs(w.std() - bound / 3**0.5) < 0.01 * bound
    assert not net.final_layer.linear.weight.any() and not net.x_embedder.proj.bias.any()
    for p in (net.y_embedder["embedding_table"].weight, net.t_embedder.mlp[0].weight):
        assert abs(p.std() - 0.02) < 0.004
    other = build_model(with_overrides(exp, options="time=mlp"))
    assert torch.equal(other.blocks[0].attn.qkv.weight, net.blocks[0].attn.qkv.weight)


def test_levels_of_the_image_model():
    net = DiffiTImage(8, 1, 16, (1, 2), 2, window=2, levels=2, time_dim=20)
    assert [len(level) for level in net.encoder] == [1, 2] and len(net.in_blocks) == 2
    assert net.encoder[0][0].window == 2 and net.t_embedder.mlp[0].out_features == 20
    assert net.encoder[1][0].block.attn.num_heads == 4


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"skip": "none"}, "no such choice"),
        ({"time": "adaln"}, "options='time="),
        ({"condition": "text", "p_uncond": 0.0, "cfg_scale": 1.0}, "class or nothing"),
        ({"options": "time=x"}, "allowed are"),
        ({"patch_size": 3}, "patch_size = 3"),
        ({"embed_dim": 18}, "embed_dim = 18"),
        ({"model": "DiffiT-image", "patch_size": 2}, "patch_size = 1"),
        ({"model": "DiffiT-image", "patch_size": 1, "options": "window=3"}, "window = 3"),
    ],
)
def test_impossible_choices_are_refused(fields, why):
    exp = experiment("smoke", **{"model": "DiffiT-latent", "num_heads": 2, **fields})
    with pytest.raises(ParameterError, match=why):
        meta_model(exp)


def test_published_runs():
    runs = {name: published_run(name) for name in RUNS}
    latent = runs["ImageNet 256x256"]
    assert latent.sampling.cfg_schedule == "power_cosine" and latent.sampling.cfg_power == 4
    assert latent.diffusion.variance == "learned" and latent.train.lr == 3e-4
    assert runs["ImageNet 512x512"].model.patch_size == 2
    assert runs["CIFAR10"].diffusion.process == "edm"
    with pytest.raises(ParameterError, match="known are"):
        published_run("LSUN")
