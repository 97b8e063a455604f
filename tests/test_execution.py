"Attention, compilation and recomputation change how a network computes, never what."

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from uvit_repro.config import SMOKE, ParameterError, with_overrides
from uvit_repro.data.images import Batches, open_data
from uvit_repro.diffusion import Diffusion
from uvit_repro.metrics import heldout_loss
from uvit_repro.runs.execution import (
    attention,
    attention_choice,
    compile_blocks,
    set_attention,
    set_checkpoint,
    set_residual,
)
from uvit_repro.sample import sample
from uvit_repro.train import Trainer, build_model, golden_training, sample_times_and_noise
from uvit_repro.uvit import UViT

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def bf16():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def small(**kwargs):
    return UViT(8, 2, 3, 32, 5, 4, **kwargs)


def inputs():
    return torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0])


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("path", ["math", "flash", "efficient", "cudnn"])
def test_every_path_gives_the_same_attention(path):
    q, k, v = torch.randn(3, 2, 4, 9, 8, device=DEVICE).bfloat16()
    torch.testing.assert_close(attention(q, k, v, path), attention(q, k, v), atol=2e-2, rtol=2e-2)


def test_the_choice_of_a_path_is_recorded(tmp_path):
    named = with_overrides(SMOKE, attention="math")
    assert attention_choice(named, CPU) == {"path": "math"}
    timed = with_overrides(SMOKE, attention="auto")
    choice = attention_choice(timed, CPU, tmp_path / "a.json")
    assert choice["seconds"][choice["path"]] == min(choice["seconds"].values())
    assert attention_choice(timed, CPU, tmp_path / "a.json") == choice  # timed once
    with pytest.raises(ParameterError, match="allowed are sdpa, math"):
        set_attention(small(), "matrix")


def test_a_choice_kept_under_an_older_name_is_timed_again(tmp_path):
    timed, cache = with_overrides(SMOKE, attention="auto"), tmp_path / "a.json"
    attention_choice(timed, CPU, cache)
    (key,) = json.loads(cache.read_text(encoding="utf-8"))
    cache.write_text(json.dumps({key: {"path": "matrix", "seconds": {}}}), encoding="utf-8")
    assert attention_choice(timed, CPU, cache)["path"] in ("sdpa", "math")


# ------------------------------------------------------------------ compilation


def test_a_run_compiles_six_graphs_of_blocks():
    "Encoder and decoder, in training, held-out loss and sampling; each graph is whole."
    exp, data = open_data(
        with_overrides(SMOKE, depth=7, precision="bf16", condition="none", p_uncond=0, cfg_scale=1)
    )
    diffusion, reports = Diffusion(exp.diffusion), []

    def compiled():
        net = build_model(exp)
        net.compiled_methods = ()
        reports.append(compile_blocks(net, backend="eager"))
        return net

    torch._dynamo.reset()
    trainer, x0 = Trainer(compiled(), diffusion, exp.train), torch.randn(16, 1, 8, 8)
    for step in range(2):
        trainer.update(x0, *sample_times_and_noise(0, step, x0.shape, diffusion, "cpu"))
    images, how = data.test_images[:20], {"autocast": torch.bfloat16}
    heldout_loss(compiled().eval(), diffusion, images, None, levels=2, **how)
    sampling = with_overrides(exp, nfe=3, sampler="dpm_solver_fast").sampling
    sample(compiled().eval(), diffusion, sampling, (1, 8, 8), 12, batch=12, **how)
    assert [r.graphs for r in reports] == [2, 2, 2]
    assert not any(r.error for r in reports)


def test_equal_blocks_compile_once():
    def graphs(depth):
        torch._dynamo.reset()
        net = UViT(8, 2, 3, 32, depth, 4)
        report = compile_blocks(net, backend="eager")
        net(*inputs())
        return report.graphs

    assert graphs(5) == graphs(9) == 4  # encoder, decoder, and both ends


@pytest.mark.parametrize("kwargs", [{}, {"use_checkpoint": True, "activation_budget": 3.0}])
def test_compiled_and_recomputed_gradients_are_the_same(kwargs):
    torch.manual_seed(0)
    net, (x, t) = small(**kwargs).train(), inputs()
    want = torch.autograd.grad(net(x, t).square().sum(), list(net.parameters()))
    torch._dynamo.reset()
    report = compile_blocks(net, backend="aot_eager")
    got = torch.autograd.grad(net(x, t).square().sum(), list(net.parameters()))
    assert report.graphs >= 4 and not report.error
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_failed_compilation_is_reported_and_nothing_else_changes():
    def broken(graph, example_inputs):
        raise RuntimeError("no compiler here")

    net, (x, t) = small().eval(), inputs()
    want = net(x, t)
    report = compile_blocks(net, strict=False, backend=broken)
    assert torch.equal(net(x, t), want)
    assert "no compiler here" in report.error and report.fallbacks > 0
    compile_blocks(net, backend=broken)
    with pytest.raises(Exception, match="no compiler here"):
        net(x, t)
    assert not torch._dynamo.config.suppress_errors
    with pytest.raises(ParameterError, match="compile = 'off'"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_the_released_updates_compiled():
    assert max(golden_training("train_discrete_class", DEVICE, compile=True).values()) < 1e-4


# ------------------------------------------------------------------ precision of the residual


def test_the_decoder_has_one_type_under_autocast():
    "Rounding before the decoder gives the same bits as rounding in its first layer."
    net, (x, t), types = small().eval(), inputs(), []
    first = net.out_blocks[0]
    for block in net.out_blocks:
        block.register_forward_pre_hook(lambda m, args: types.append(args[0].dtype))
    with bf16(), torch.no_grad():
        rounded = net(x, t)
        stored = first.forward
        first.forward = lambda x, *rest: stored(exact[0], *rest)
        exact = []
        hook = net.mid_block.register_forward_hook(lambda m, args, out: exact.append(out))
        assert torch.equal(net(x, t), rounded)
        hook.remove()
    assert exact[0].dtype == torch.float32
    assert set(types) == {torch.bfloat16}


def test_a_bfloat16_residual_only_acts_under_autocast():
    net, (x, t) = small().eval(), inputs()
    with torch.no_grad():
        want = net(x, t)
        set_residual(net, "bfloat16")
        assert torch.equal(net(x, t), want)
        with bf16():
            assert net.embed(x, t)[0].dtype == torch.bfloat16
            assert (net(x, t) - want).norm() < 0.05 * want.norm()
    with pytest.raises(ParameterError, match="no such option"):
        set_residual(torch.nn.Linear(2, 2), "bfloat16")


# ------------------------------------------------------------------ recomputed activations


def test_attention_is_kept_before_other_activations_of_its_size():
    "H/2 at 257 tokens: a fused kernel is slow for its operations, so its output is worth more."
    with torch.device("meta"):
        net = UViT(32, 2, 4, 1152, 29, 16, num_classes=1001, conv="none")
    kept = set_checkpoint(net, True, 1.5)
    assert all("attention" in names for names in kept)
    assert "skip_linear" in kept[-1] and "mlp.fc1" not in kept[-1]


def test_recomputing_stays_in_its_budget_and_changes_nothing():
    torch.manual_seed(0)
    net = UViT(32, 2, 4, 64, 5, 4, conv="none").to(DEVICE).train()
    x, t = torch.randn(2, 4, 32, 32, device=DEVICE), torch.rand(2, device=DEVICE) * 999

    def run():
        with FlopCounterMode(display=False) as counter:
            grads = torch.autograd.grad(net(x, t).square().sum(), list(net.parameters()))
        return counter.get_total_flops(), grads

    base, want = run()
    costs = []
    for budget in (0, 1, 3, 5, 20):
        kept = set_checkpoint(net, True, budget)
        flops, got = run()
        costs.append(flops / base - 1)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
        size = {"mlp.fc1": 4, "attn.qkv": 3}
        assert sum(size.get(n, 1) for names in kept for n in names) <= budget * 5
    assert costs == sorted(costs, reverse=True) and costs[0] > 0.2 and costs[-1] == 0, costs


# ------------------------------------------------------------------ nothing waits


class NoWaiting(TorchDispatchMode):
    "Refuses operations that need the value of a tensor on the CPU."

    WAIT = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.WAIT, f"{func} would wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("process", ["vp", "sd", "cosine"])
def test_an_update_never_asks_for_a_value(process):
    exp, data = open_data(
        with_overrides(SMOKE, precision="bf16", attention="math", process=process)
    )
    diffusion = Diffusion(exp.diffusion)
    trainer = Trainer(build_model(exp), diffusion, exp.train, DEVICE)
    batches = Batches(data, 16, 0, True, 0.1, 10, DEVICE)

    def step(s):
        x0, y = batches.at(s)
        return trainer.update(x0, *sample_times_and_noise(0, s, x0.shape, diffusion, DEVICE), y=y)

    step(0)
    with pytest.raises(AssertionError, match="would wait"), NoWaiting():
        float(step(1).mean())
    with NoWaiting():
        step(2)
