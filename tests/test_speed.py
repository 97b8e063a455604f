"""What can only be tested on a GPU: `pytest -m gpu`."""

import pytest
import torch

from uvit_repro.config import SMOKE, with_overrides
from uvit_repro.data.images import Batches, open_data
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.devices import pick_device, tf32_off
from uvit_repro.runs.execution import ATTENTION_PATHS, attention
from uvit_repro.train import Trainer, build_model, golden_training, sample_times_and_noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
TOLERANCE = 1e-3  # relative: float32 sums in another order, carried through 100 updates


def trained(steps: int = 100, **options):
    "Losses and final weights of the plain loop on real digits, in float32."
    device = pick_device("cuda")
    exp, data = open_data(with_overrides(SMOKE, precision="fp32", attention="math"))
    diffusion = Diffusion(exp.diffusion)
    trainer = Trainer(build_model(exp), diffusion, exp.train, device, **options)
    batches = Batches(data, exp.train.batch_size, 0, False, exp.train.p_uncond, 10, device)
    losses = []
    for step in range(steps):
        x0, y = batches.at(step)
        t, eps = sample_times_and_noise(0, step, x0.shape, diffusion, device)
        losses.append(trainer.update(x0, t, eps, y=y).mean())
    return torch.stack(losses), trainer.net.state_dict()


def test_compiled_updates_end_where_plain_ones_do():
    with tf32_off():
        (losses, weights), (expected_losses, expected) = trained(compile=True), trained()
    assert ((losses - expected_losses).abs() / expected_losses).max() < TOLERANCE
    for name, weight in expected.items():
        assert (weights[name] - weight).norm() < TOLERANCE * weight.norm().clamp_min(1e-3), name


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("file", ("train_vpsde", "train_discrete_class"))
def test_updates_are_the_released_ones(file, compiled):
    with tf32_off():
        found = golden_training(file, pick_device("cuda"), compiled)
    assert found["loss"] < 1e-5 and found["final"] < 1e-3


@pytest.mark.parametrize("path", sorted(set(ATTENTION_PATHS) - {"math"}))
@pytest.mark.parametrize("width, heads", ((64, 8), (72, 16)), ids=("S/2", "H/2"))
def test_every_kernel_computes_attention(path, width, heads):
    shape = (2, heads, 257, width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    try:
        found = attention(q, k, v, path)
    except RuntimeError as e:
        pytest.skip(f"{path} refuses this shape: {e}")
    expected = attention(q.float(), k.float(), v.float(), "math")
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
