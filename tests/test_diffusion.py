"Processes, learned variances and losses against closed forms and diffusers."

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from uvit_repro.config import DiffusionConfig, ParameterError
from uvit_repro.diffusion import (
    Diffusion,
    binned_nll,
    kl_gaussians,
    make_process,
    mix_variance,
    posterior,
    variance_loss,
)


def gen():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "name,schedule,start,end",
    [("linear", "linear", 1e-4, 0.02), ("sd", "scaled_linear", 0.00085, 0.012)],
)
def test_betas_equal_diffusers(name, schedule, start, end):
    from diffusers import DDPMScheduler

    p = make_process(DiffusionConfig(process=name))
    ref = DDPMScheduler(1000, beta_start=start, beta_end=end, beta_schedule=schedule)
    times, log_alphas = p.tables("cpu")
    assert torch.allclose(p.alpha(times) ** 2, ref.alphas_cumprod.double(), atol=1e-6)
    _, _, small, large = posterior(log_alphas)
    assert torch.allclose(large.exp(), p.betas, atol=1e-12)
    theirs = torch.stack([ref._get_variance(i) for i in range(1, 1000)]).double()
    assert torch.allclose(small[1:].exp(), theirs, atol=1e-6) and small[0] == small[1]


@pytest.mark.parametrize("name,first", [("linear", 0), ("sd", 1)])
def test_the_networks_time_is_a_whole_number(name, first):
    p = make_process(DiffusionConfig(process=name))
    n = p.c_noise(p.sample_t((torch.arange(1000) + 0.5) / 1000)).float()
    assert torch.equal(n, torch.arange(first, first + 1000).float())


@pytest.mark.parametrize("name", ["vp", "sd", "linear", "cosine", "edm"])
def test_from_log_snr_back_to_time(name):
    p = make_process(DiffusionConfig(process=name, prediction="edm" if name == "edm" else "noise"))
    t = torch.linspace(max(p.t_min, 0.02), p.t_max * 0.98, 31, dtype=torch.float64)
    assert torch.allclose(p.t_of_half_log_snr(p.half_log_snr(t)), t, rtol=1e-7)


@pytest.mark.parametrize("pick", [[0, 1, 2], [0, 499, 999], list(range(0, 1000, 7))])
def test_posterior_is_bayes_rule(pick):
    la = make_process(DiffusionConfig(process="linear")).tables("cpu")[1][torch.tensor(pick)]
    c0, cx, small, large = posterior(la)
    for i in range(1, len(pick)):
        a, s2 = la.exp(), -torch.expm1(2 * la)
        r = a[i] / a[i - 1]
        b = 1 - r**2
        precision = r**2 / b + 1 / s2[i - 1]
        got, want = (
            (c0[i], cx[i], small[i].exp(), large[i].exp()),
            (a[i - 1] / s2[i - 1] / precision, r / b / precision, 1 / precision, b),
        )
        assert all(abs(g - w) < 1e-10 for g, w in zip(got, want, strict=False))


def test_gaussian_kl_and_bins():
    mq, lq, mp, lp = torch.randn(4, 99, generator=gen()).double()
    assert torch.allclose(
        kl_gaussians(mq, lq, mp, lp),
        kl_divergence(Normal(mq, (lq / 2).exp()), Normal(mp, (lp / 2).exp())),
    )
    grid = torch.arange(256).double() / 127.5 - 1
    for m, log_var in ((0.0, -2.0), (-1.3, -8.0), (0.99, -6.0)):
        assert (
            abs(
                (-binned_nll(grid, torch.tensor(m), torch.tensor(log_var).double())).exp().sum() - 1
            )
            < 1e-6
        )


@pytest.mark.parametrize("process", ["linear", "sd"])
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_hybrid_loss(process, prediction):
    d = Diffusion(DiffusionConfig(process=process, prediction=prediction, variance="learned"))
    plain = Diffusion(DiffusionConfig(process=process, prediction=prediction))
    x0, eps, out = (
        torch.randn(5, 2, 4, 4, generator=gen()),
        torch.randn(5, 2, 4, 4, generator=gen()),
        torch.randn(5, 4, 4, 4, generator=gen()).requires_grad_(),
    )
    t = torch.tensor([1, 2, 300, 900, 1000]).double() / 1000
    total, simple = (f.loss(lambda *a: out, x0, t, eps) for f in (d, plain))
    more = variance_loss(d, out, x0, d.q_sample(x0, t, eps), t)
    assert (
        torch.allclose(total, simple + more)
        and (more > 0).all()
        and torch.equal(simple, d.error(lambda *a: out, x0, t, eps))
    )
    ga, gb = (torch.autograd.grad(v.sum(), out)[0] for v in (total, simple))
    assert (
        torch.allclose(ga[:, :2], gb[:, :2])
        and gb[:, 2:].abs().max() == 0
        and (ga[:, 2:].flatten(1).abs().amax(1) > 0).all()
    )


def test_the_bound_vanishes_at_the_truth_and_is_steps_over_1000():
    d = Diffusion(DiffusionConfig(process="linear", variance="learned"))
    x0, eps = (
        torch.rand(4, 1, 3, 3, generator=gen()).double(),
        torch.randn(4, 1, 3, 3, generator=gen()).double(),
    )
    t = torch.tensor([2, 40, 500, 1000]).double() / 1000
    xt = d.q_sample(x0, t, eps)
    assert (
        variance_loss(d, torch.cat([eps, -torch.ones_like(eps)], 1), x0, xt, t).abs().max() < 1e-5
    )  # v = -1 is the posterior's own variance
    up = variance_loss(d, torch.cat([eps, torch.ones_like(eps)], 1), x0, xt, t)
    _, _, small, large = (v[[1, 39, 499, 999]] for v in posterior(d.process.tables("cpu")[1]))
    assert torch.allclose(
        up.double(), 0.5 * (large - small - 1 + (small - large).exp()) / math.log(2), atol=1e-5
    )
    assert torch.allclose(mix_variance(torch.zeros(4), small, large), (small + large) / 2)


def test_losses_and_channels():
    d, l1 = Diffusion(DiffusionConfig()), Diffusion(DiffusionConfig(loss="l1"))
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=gen())
    t = torch.tensor([0.1, 0.5, 0.9])

    def far(*a):
        return eps - 3.0

    assert (
        torch.allclose(d.loss(far, x0, t, eps), torch.full((3,), 9.0))
        and torch.allclose(l1.loss(far, x0, t, eps), torch.full((3,), 3.0))
        and torch.allclose(l1.error(far, x0, t, eps), torch.full((3,), 9.0))
    )
    assert torch.equal(
        d.loss(lambda *a: torch.cat([far(), 7 * eps], 1), x0, t, eps), d.loss(far, x0, t, eps)
    )
    with pytest.raises(ParameterError, match="network with 6 output channels"):
        Diffusion(DiffusionConfig(process="sd", variance="learned")).loss(far, x0, t, eps)
    for name in ("vp", "cosine"):
        with pytest.raises(ParameterError, match="process = 'linear' or 'sd'"):
            Diffusion(DiffusionConfig(process=name, variance="learned"))


@pytest.mark.parametrize("name", ["vp", "sd", "linear", "cosine"])
def test_the_stochastic_equation_has_these_moments(name):
    "dx = f x dt + g dw: (log alpha)' = f and (sigma^2)' = 2 f sigma^2 + g^2."
    p = make_process(DiffusionConfig(process=name))
    t, h = torch.linspace(0.02, 0.97 * p.t_max, 31, dtype=torch.float64), 1e-6
    if name in ("sd", "linear"):
        t = (t * 1000).floor().add(0.5) / 1000  # inside a piece, where the slope exists
    slope = (p.log_alpha(t + h) - p.log_alpha(t - h)) / (2 * h)
    growth = (p.sigma(t + h) ** 2 - p.sigma(t - h) ** 2) / (2 * h)
    assert torch.allclose(slope, p.f(t), atol=1e-5)
    assert torch.allclose(growth, 2 * p.f(t) * p.sigma(t) ** 2 + p.g2(t), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("process", ["vp", "sd", "linear", "cosine", "edm"])
def test_a_perfect_network_gives_back_the_image(process):
    x0, eps = torch.randn(2, 6, 3, 4, 4, generator=gen()).double()
    for prediction in ("edm",) if process == "edm" else ("noise", "x0", "v"):
        d = Diffusion(DiffusionConfig(process=process, prediction=prediction))
        t = d.process.sample_t(torch.rand(6, generator=gen())).double().clamp(0.05, 0.95)
        xt, target = d.q_sample(x0, t, eps), d.target(x0, t, eps)
        skip, out, _ = (c.view(-1, 1, 1, 1) for c in d.scalings(t))
        assert torch.allclose(target, (x0 - skip * xt) / out, atol=1e-8)
        assert torch.allclose(d.to_x0(target, xt, t), x0, atol=1e-8)
        loss = d.loss(lambda *a, F=target: F + 2, x0, t, eps)
        assert torch.allclose(loss, torch.full((6,), 4.0, dtype=loss.dtype), atol=1e-5)
