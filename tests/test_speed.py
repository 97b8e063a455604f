"Faster ways to the same numbers: compiled blocks, CUDA graphs, recomputed activations; and nothing in an update waits for the device."

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from uvit_repro.config import SMOKE, ParameterError, with_overrides
from uvit_repro.data.images import Batches, open_data
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.execution import compile_blocks, set_checkpoint
from uvit_repro.train import Trainer, build_model, golden_training, sample_times_and_noise
from uvit_repro.uvit import UViT

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, TOLERANCE = (
    200,
    1e-3,
)  # relative, on weights and losses: float32 sums in another order, carried through 200 updates


def trained(steps=STEPS, **how):
    "Losses and final weights of the plain loop on real digits, in float32."
    exp, data = open_data(with_overrides(SMOKE, precision="fp32", attention="math"))
    tr, d = (
        Trainer(build_model(exp), Diffusion(exp.diffusion), exp.train, DEVICE, **how),
        Diffusion(exp.diffusion),
    )
    batches = Batches(data, exp.train.batch_size, 0, False, exp.train.p_uncond, 10, DEVICE)
    losses = []
    for s in range(steps):
        x0, y = batches.at(s)
        t, eps = sample_times_and_noise(0, s, x0.shape, d, DEVICE)
        losses.append(tr.update(x0, t, eps, y=y).mean())
    return torch.stack(losses), tr.net.state_dict()


@pytest.fixture(scope="module")
def plain():
    return trained()


def same(a, b):
    losses = ((a[0] - b[0]).abs() / b[0]).max()
    weights = max((a[1][k] - v).norm() / v.norm().clamp_min(1e-3) for k, v in b[1].items())
    assert losses < TOLERANCE and weights < TOLERANCE, (float(losses), float(weights))


def test_200_compiled_steps_end_where_plain_ones_do(plain):
    same(trained(compile=True), plain)


@cuda
def test_200_graphed_steps_end_where_plain_ones_do(plain):
    same(trained(cuda_graph=True), plain)


@cuda
def test_200_graphed_and_compiled_steps_end_where_plain_ones_do(plain):
    same(trained(compile=True, cuda_graph=True), plain)


def test_a_graph_needs_a_gpu():
    if DEVICE.type == "cpu":
        with pytest.raises(ParameterError, match="needs a GPU"):
            trained(1, cuda_graph=True)


def test_the_released_steps_compiled():
    assert max(golden_training("train_discrete_class", DEVICE, compile=True).values()) < 1e-4


def test_equal_blocks_compile_once():
    "Depth 9 takes as many compilations as depth 5: one for blocks without a skip, one for those with."
    from torch._dynamo.utils import counters

    def compilations(depth):
        torch._dynamo.reset()
        counters.clear()
        net = UViT(8, 2, 1, 32, depth, 4, conv="none")
        report = compile_blocks(net)
        net(torch.randn(2, 1, 8, 8), torch.rand(2))
        assert report.graphs == counters["stats"]["unique_graphs"] and not report.error
        return report.graphs

    assert compilations(5) == compilations(9) == 4  # encoder, decoder, both ends
    with pytest.raises(ParameterError, match="compile = 'off'"):
        compile_blocks(torch.nn.Linear(2, 2))


class NoWaiting(TorchDispatchMode):
    "Refuses operations that need a value of a tensor on the CPU."

    WAIT = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default if hasattr(torch.ops.aten, "is_nonzero") else None,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.WAIT, f"{func} would wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("process", ["vp", "sd", "cosine"])
def test_an_update_never_asks_for_a_value(process):
    exp, data = open_data(
        with_overrides(SMOKE, precision="bf16", attention="math", process=process)
    )
    d = Diffusion(exp.diffusion)
    tr, batches = (
        Trainer(build_model(exp), d, exp.train, DEVICE),
        Batches(data, 16, 0, True, 0.1, 10, DEVICE),
    )

    def step(s):
        x0, y = batches.at(s)
        t, eps = sample_times_and_noise(0, s, x0.shape, d, DEVICE)
        return tr.update(x0, t, eps, y=y)

    step(0)
    with pytest.raises(AssertionError, match="would wait"), NoWaiting():
        float(step(1).mean())
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaiting():
            step(2)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_recomputing_costs_what_the_budget_says_and_changes_nothing():
    torch.manual_seed(0)
    m = UViT(32, 2, 4, 64, 5, 4, conv="none").to(DEVICE).train()
    x, t = torch.randn(2, 4, 32, 32, device=DEVICE), torch.rand(2, device=DEVICE) * 999

    def run():
        with FlopCounterMode(display=False) as f:
            g = torch.autograd.grad(m(x, t).square().sum(), list(m.parameters()))
        return f.get_total_flops(), g

    set_checkpoint(m, False)
    base, want = run()
    costs = []
    for keep in (0, 1, 3, 5, 20):
        kept = set_checkpoint(m, True, keep)
        flops, got = run()
        costs.append(flops / base - 1)
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
            for a, b in zip(got, want)
        )
        size = {"skip_linear": 1, "mlp.fc1": 4, "attn.qkv": 3, "attn.proj": 1, "attention": 1}
        assert sum(size[n] for names in kept for n in names) <= keep * 5
    assert costs == sorted(costs, reverse=True) and costs[0] > 0.2 and costs[-1] == 0, costs


def test_the_first_update_comes_soon():
    "From the start of a process to the end of its first update without compilation: the issue allows 5 s on an idle machine; here other tests may run beside it."
    code = (
        "import time; s = time.time()\nfrom uvit_repro.config import LAPTOP, with_overrides\nfrom uvit_repro.data.images import open_data\nfrom uvit_repro.train import train\n"
        "import pathlib, tempfile\nexp, data = open_data(with_overrides(LAPTOP, n_steps=1, attention='math', compile='off', threads=1))\n"
        "train(exp, data, pathlib.Path(tempfile.mkdtemp()), lambda l: None); print(time.time() - s)"
    )
    secs = float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
    )
    assert secs < 20, secs
