"Samplers of uvit_repro.sample against closed forms, diffusers and the authors' own outputs."

import json
import math
import subprocess
import sys
from fractions import Fraction
from importlib.resources import files

import numpy as np
import pytest
import torch

from uvit_repro.config import SAMPLERS, DiffusionConfig, ParameterError, SamplingConfig
from uvit_repro.diffusion import EDM, Betas, Diffusion
from uvit_repro.runs.devices import evaluating
from uvit_repro.sample import (
    Denoiser,
    ancestral,
    ancestral_plan,
    check_sampler,
    diffusers_solver,
    dpm_solver_fast,
    euler_maruyama,
    fast_orders,
    fast_times,
    initial_noise,
    log_snr_times,
    make_denoiser,
    power_cosine,
    sample,
    sample_labels,
    spaced_steps,
    step_noise,
)


def time_of(process, c):
    "The time that belongs to a network's time input."
    if isinstance(process, EDM):
        return (4 * c).exp()
    if isinstance(process, Betas):
        return (c - (process.first - 1)) / process.n
    return c / 999


class ExactMixture(torch.nn.Module):
    "The optimal network for equal Gaussians."

    def __init__(self, diffusion, means, std, classes=None):
        super().__init__()
        self.diffusion, self.means, self.std, self.classes = diffusion, means, std, classes

    def forward(self, x, c_noise, y=None):
        p, means = self.diffusion.process, self.means.double()
        t = time_of(p, c_noise.double())
        skip, out, c_in = (c[:, None] for c in self.diffusion.scalings(t))
        xt, a, s = x.double() / c_in, p.alpha(t)[:, None], p.sigma(t)[:, None]
        v = a**2 * self.std**2 + s**2
        logits = (2 * a * (xt @ means.T) - a**2 * means.square().sum(1)) / (2 * v)
        if y is not None:
            other = (self.classes != y[:, None]) & torch.isin(y, self.classes)[:, None]
            logits = logits.masked_fill(other, -math.inf)
        mean = logits.softmax(1) @ means
        x0 = mean + a * self.std**2 / v * (xt - a * mean)
        return ((x0 - skip * xt) / out).to(x.dtype)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def diffusion(process="vp", prediction="noise"):
    return Diffusion(
        DiffusionConfig(process=process, prediction="edm" if process == "edm" else prediction)
    )


MEANS = torch.stack(
    [
        (torch.arange(6) * math.tau / 6 + 0.2).cos(),
        0.7 * (torch.arange(6) * math.tau / 6 + 0.2).sin(),
    ],
    1,
).double()
CLASSES = torch.arange(6) % 2


def exact(process="vp", prediction="noise", std=0.3):
    d = diffusion(process, prediction)
    return Denoiser(ExactMixture(d, MEANS, std), d)


def golden(name):
    return np.load(files("uvit_repro") / "runs" / "golden" / f"{name}.npz")


def trained(name):
    from uvit_repro.uvit import load_official

    z = golden(name)
    return load_official(
        {k[6:]: torch.tensor(z[k]) for k in z.files if k.startswith("final/")},
        num_heads=json.loads(str(z["config"]))["net"]["num_heads"],
    ).eval()


def relative(ours, theirs):
    return ((ours - torch.tensor(theirs)).abs().max() / np.abs(theirs).max()).item()


def test_released_euler_maruyama():
    g = golden("sample_vpsde")
    den = Denoiser(trained("train_vpsde"), diffusion())
    out = euler_maruyama(
        den,
        torch.tensor(g["x_init"]),
        int(g["euler_maruyama/steps"]),
        lambda i: torch.tensor(g["euler_maruyama/noise"][i]),
    )
    assert relative(out, g["euler_maruyama/output"]) < 1e-4 and den.nfe == int(
        g["euler_maruyama/steps"]
    )


@pytest.mark.parametrize("nfe", [10, 20, 50])
def test_released_dpm_solver_fast(nfe):
    g = golden("sample_vpsde")
    den = Denoiser(trained("train_vpsde"), diffusion())
    assert (
        relative(dpm_solver_fast(den, torch.tensor(g["x_init"]), nfe), g[f"dpm_solver_fast/{nfe}"])
        < 1e-4
        and den.nfe == nfe
    )


@pytest.mark.parametrize("nfe", [10, 20, 50])
def test_released_dpm_solver_pp_fast_guided(nfe):
    g = golden("sample_discrete_guided")
    den = Denoiser(
        trained("train_discrete_class"),
        diffusion("sd"),
        cfg_scale=1.4,
        null={"y": torch.tensor(10)},
    )
    out = dpm_solver_fast(den, torch.tensor(g["x_init"]), nfe, pp=True, y=torch.tensor(g["y"]))
    assert float(g["released_scale"]) == pytest.approx(0.4) and int(g["null_class"]) == 10
    assert relative(out, g[f"dpm_solver_pp_fast/{nfe}"]) < 1e-4 and den.nfe == nfe


@pytest.mark.parametrize(
    "process,pp,spacing,t_end",
    [("vp", False, "logsnr", 1e-4), ("sd", True, "time", 1e-3), ("cosine", True, "logsnr", 1e-3)],
)
@pytest.mark.parametrize("nfe", [1, 2, 3, 10, 50, 51])
@pytest.mark.filterwarnings("ignore")
def test_fast_equals_diffusers(process, pp, spacing, t_end, nfe):
    from diffusers import DPMSolverSinglestepScheduler

    den, x = exact(process), initial_noise(0, 0, 20, (2,)).double()
    p = den.diffusion.process
    t = fast_times(p, nfe, spacing, t_end)
    ref = x
    s = DPMSolverSinglestepScheduler(
        solver_order=3,
        algorithm_type="dpmsolver++" if pp else "dpmsolver",
        prediction_type="sample" if pp else "epsilon",
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    s.set_timesteps(nfe)
    s.sigmas, s.timesteps = p.sigma(t) / p.alpha(t), t[:-1]
    s.set_begin_index(0)
    stages = [(k, j) for k in fast_orders(nfe) for j in range(1, k + 1)]
    s.order_list = [j for _, j in stages]
    for i, stage in enumerate(stages):
        s.register_to_config(solver_type="heun" if stage == (3, 2) else "midpoint")
        ref = s.step(den.predict(ref, t[i].item())[0 if pp else 1], t[i], ref).prev_sample
    ours = dpm_solver_fast(den, x, nfe, pp, spacing, t_end)
    assert (ours - ref).abs().max() < 1e-10 * ref.abs().max()


def test_orders_of_convergence():
    den, x, ns = exact(), initial_noise(4, 0, 100, (2,)).double(), np.array([24, 36, 48, 72, 96])
    fine = dpm_solver_fast(den, x, 1000)
    clean = den.predict(fine, 1e-4)[0]

    def slope(f):
        return -np.polyfit(
            np.log(ns), np.log([f(int(n)).square().mean().sqrt().item() for n in ns]), 1
        )[0]

    assert 0.85 < slope(lambda n: diffusers_solver(den, x, n, "ddim") - clean) < 1.15
    assert 1.8 < slope(lambda n: diffusers_solver(den, x, n, "dpm_solver_pp_2m") - clean) < 2.3
    assert 1.8 < slope(lambda n: diffusers_solver(den, x, n + 1, "heun") - clean) < 2.3
    assert 2.7 < slope(lambda n: dpm_solver_fast(den, x, n) - fine) < 3.8
    assert (
        2.2
        < slope(lambda n: dpm_solver_fast(den, x, n, pp=True, spacing="logsnr", t_end=1e-4) - fine)
        < 3.2
    )


@pytest.mark.parametrize("process", ["vp", "sd", "cosine", "edm"])
def test_ddim_is_its_formula(process):
    den = exact(process)
    p = den.diffusion.process
    x = ref = initial_noise(2, 0, 30, (2,)).double() * (80 if process == "edm" else 1)
    t = log_snr_times(p, 12)
    for i in range(11):
        x0, eps, _ = den.predict(ref, t[i].item())
        ref = x0 if i == 10 else p.alpha(t[i + 1]) * x0 + p.sigma(t[i + 1]) * eps
    assert torch.allclose(diffusers_solver(den, x, 11, "ddim"), ref, atol=1e-4)


def test_edm_heun_recovers_the_mixture():
    d = diffusion("edm")
    net = ExactMixture(d, MEANS, 0.15)
    x, _ = sample(net, d, SamplingConfig(sampler="heun", nfe=59), (2,), 3000)
    cov = 0.15**2 * torch.eye(2) + MEANS.T.float() @ MEANS.float() / 6
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=4 * math.sqrt(cov.max() / 3000) + 0.01)
    assert torch.allclose(x.T.cov(), cov, atol=4 * cov.max().item() * math.sqrt(2 / 3000) + 0.01)


def test_euler_maruyama_moments_follow_the_recursion():
    d, n, B, mu, s = diffusion(), 100, 4000, 0.5, 0.3
    p = d.process
    den = Denoiser(ExactMixture(d, torch.full((1, 2), mu), s), d)
    out = euler_maruyama(
        den, initial_noise(0, 0, B, (2,)).double(), n, lambda i: step_noise(0, i, 0, B, (2,))
    )
    t = torch.cat([torch.zeros(1).double(), torch.linspace(1e-3, 1, n, dtype=torch.float64)]).flip(
        0
    )
    m, v = 0.0, 1.0
    for a, b in zip(t, t[1:], strict=False):
        dt, g2, var = b - a, p.g2(a), p.alpha(a) ** 2 * s**2 + p.sigma(a) ** 2
        k = 1 + p.f(a) * dt + g2 * dt / var
        m, v = (
            float(k * m - g2 * dt / var * p.alpha(a) * mu),
            float(k**2 * v - (g2 * dt if b > 0 else 0)),
        )
    assert abs(out.mean() - m) < 4 * math.sqrt(v / out.numel()) and abs(
        out.var() - v
    ) < 4 * v * math.sqrt(2 / out.numel())
    assert abs(m - mu) < 0.01 and abs(v - s**2) < 0.005


def test_guidance():
    d = diffusion()
    net = ExactMixture(d, MEANS, 0.3, CLASSES)
    x, y = initial_noise(0, 0, 20, (2,)).double(), torch.arange(20) % 2

    def at(w, **kw):
        return Denoiser(net, d, w, null={"y": torch.tensor(2)}, **kw).predict(x, 0.3, y=y)[1]

    cond = Denoiser(net, d).predict(x, 0.3, y=y)[1]
    null = Denoiser(net, d).predict(x, 0.3, y=torch.full((20,), 2))[1]
    assert torch.equal(at(1.0), cond) and torch.allclose(at(0.0), null)
    assert not torch.allclose(cond, null, atol=0.1)
    assert torch.allclose(at(1.4), cond + 0.4 * (cond - null))
    assert torch.allclose(at(3.0) - at(1.0), 2 * (at(1.0) - at(0.0)))
    x0, eps, _ = Denoiser(net, d, 1.4, clip=True, null={"y": 2}).predict(x, 0.3, y=y)
    p, t = d.process, torch.tensor(0.3).double()
    assert x0.abs().max() <= 1 and torch.allclose(p.alpha(t) * x0 + p.sigma(t) * eps, x)
    with pytest.raises(ParameterError, match="null condition"):
        Denoiser(net, d, 1.4)


@pytest.mark.parametrize("n", [2, 7, 50, 100, 250, 999, 1000])
def test_spacing_is_the_released_rule(n):
    got = spaced_steps(n)
    exact = [Fraction(999 * i, n - 1) for i in range(n)]  # a tie may fall either way
    assert len(set(got)) == n and (got[0], got[-1]) == (0, 999)
    assert all(abs(g - e) <= Fraction(1, 2) for g, e in zip(got, exact, strict=True))


@pytest.mark.parametrize("process", ["linear", "sd", "vp", "cosine"])
def test_ancestral_moments_follow_their_recursion(process):
    d, n, B, mu, s = diffusion(process), 40, 4000, 0.5, 0.3
    p, m, v = d.process, 0.0, 1.0
    out = ancestral(
        Denoiser(ExactMixture(d, torch.full((1, 2), mu), s), d),
        initial_noise(0, 0, B, (2,)).double(),
        n,
        lambda i: step_noise(0, i, 0, B, (2,)),
    )
    times = p.t_max * (torch.tensor(spaced_steps(n)).double() + 1) / 1000
    bar = torch.cat([torch.ones(1).double(), p.alpha(times) ** 2])
    for i in range(n, 0, -1):  # from alpha bar alone, as in the papers
        beta = 1 - bar[i] / bar[i - 1]
        tilde = beta * (1 - bar[i - 1]) / (1 - bar[i])
        k = bar[i].sqrt() * s**2 / (bar[i] * s**2 + 1 - bar[i])
        c0, cx = (
            bar[i - 1].sqrt() * beta / (1 - bar[i]),
            (1 - beta).sqrt() * (1 - bar[i - 1]) / (1 - bar[i]),
        )
        m, v = (
            c0 * (mu - k * bar[i].sqrt() * mu) + (c0 * k + cx) * m,
            (c0 * k + cx) ** 2 * v + (tilde if i > 1 else 0),
        )
    assert abs(out.mean() - m) < 4 * math.sqrt(v / out.numel()) and abs(
        out.var() - v
    ) < 4 * v * math.sqrt(2 / out.numel())


def test_ancestral_recovers_the_mixture():
    d = diffusion("linear")
    x, _ = sample(
        ExactMixture(d, MEANS, 0.3), d, SamplingConfig(sampler="ancestral", nfe=250), (2,), 2000
    )
    cov = 0.3**2 * torch.eye(2) + MEANS.T.float() @ MEANS.float() / 6
    assert torch.allclose(
        x.mean(0), torch.zeros(2), atol=4 * math.sqrt(cov.max() / 2000) + 0.01
    ) and torch.allclose(x.T.cov(), cov, atol=4 * cov.max().item() * math.sqrt(2 / 2000) + 0.02)


def test_learned_variance_interpolates():
    d = Diffusion(DiffusionConfig(process="linear", variance="learned"))
    net = ExactMixture(d, MEANS, 0.3)
    x = initial_noise(0, 0, 30, (2,)).double()

    def noise(i):
        return step_noise(0, i, 0, 30, (2,))

    def says(v):
        return Denoiser(lambda x, c: torch.cat([net(x, c), torch.full_like(x, v)], 1), d)

    plain = ancestral(Denoiser(net, diffusion("linear")), x, 20, noise)
    assert torch.allclose(ancestral(says(-1.0), x, 20, noise), plain)
    t, c0, cx, low, high = ancestral_plan(d.process, 2)[0]  # one step by hand, half way between
    x0 = Denoiser(net, d).predict(x, t)[0]
    half = c0 * x0 + cx * x + math.exp((low + high) / 4) * noise(0)
    assert torch.allclose(
        ancestral(says(0.0), x, 2, noise), Denoiser(net, d).predict(half, 1e-3)[0]
    )


def test_three_channels_and_power_cosine():
    d, z, y = diffusion("linear"), torch.zeros(5, 4, 2, 2), torch.arange(5)
    s = SamplingConfig(cfg_scale=4.4, cfg_channels=3, cfg_schedule="power_cosine")

    def net(x, c, y):
        channels = (1 + torch.arange(8.0))[:, None, None]
        return torch.cat([x, x], 1) * 0 + channels * (1 + y)[:, None, None, None]

    den = make_denoiser(net, d, s, {"y": torch.tensor(9)})
    for t in (1e-3, 0.3, 0.75, 1.0):
        F, v = den.outputs(z, t, y=y)
        w = 1 + 3.4 * (1 - math.cos(math.pi * (1 - (round(1000 * t) - 1) / 1000) ** 4)) / 2
        cond, null = torch.arange(1.0, 9) * (1 + y)[:, None], torch.arange(1.0, 9) * 10
        assert torch.allclose(F[:, :3, 0, 0], (null + w * (cond - null))[:, :3], atol=1e-4)
        assert torch.equal(F[:, 3, 0, 0], cond[:, 3])
        assert torch.equal(v[:, :, 0, 0], cond[:, 4:])
    assert power_cosine(4.4, 4, 999.0) == pytest.approx(1)
    assert power_cosine(4.4, 4, 0.0) == pytest.approx(4.4)
    with pytest.raises(ParameterError, match="edm uses a logarithm"):
        make_denoiser(net, diffusion("edm"), s, {"y": torch.tensor(9)})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_real_network_does_not_depend_on_batching(sampler):
    net, d = trained("train_discrete_class"), diffusion("sd")
    net.train()
    c = SamplingConfig(sampler=sampler, nfe=7, cfg_scale=1.4, clip=True)
    a, ya = sample(net, d, c, (3, 8, 8), 60, num_classes=10, batch=60)
    b, yb = sample(net, d, c, (3, 8, 8), 20, start=40, num_classes=10, batch=13)
    assert torch.allclose(a[40:], b, atol=1e-5) and torch.equal(ya[40:], yb) and net.training
    assert (
        a.dtype == torch.float32 and not a.is_inference() and len(a.flatten(1).unique(dim=0)) == 60
    )


def test_noise_and_labels_belong_to_the_index():
    assert torch.equal(initial_noise(3, 0, 120, (2, 3))[97:], initial_noise(3, 97, 23, (2, 3)))
    assert not torch.equal(initial_noise(3, 0, 2, (2, 3)), initial_noise(4, 0, 2, (2, 3)))
    whole = step_noise(3, 5, 0, 180, (2, 3))
    assert torch.equal(
        whole[49:151],
        torch.cat([step_noise(3, 5, 49, 1, (2, 3)), step_noise(3, 5, 50, 101, (2, 3))]),
    )
    assert not torch.equal(whole[:50], whole[50:100]) and not torch.equal(
        whole, step_noise(3, 6, 0, 180, (2, 3))
    )
    assert sample_labels(0, 9, 3, 10).tolist() == [9, 0, 1]


def test_mode_is_restored_also_after_an_error():
    net = torch.nn.Sequential(torch.nn.Dropout()).train()
    with pytest.raises(RuntimeError), evaluating(net):
        assert not net.training and not net[0].training
        raise RuntimeError
    assert net.training and net[0].training


def test_errors_say_what_to_do():
    vp, edm = diffusion().process, diffusion("edm").process
    with pytest.raises(ParameterError, match="19 and 21"):
        check_sampler("heun", 20, vp)
    with pytest.raises(ParameterError, match="at least 1"):
        check_sampler("dpm_solver_fast", 0, vp)
    with pytest.raises(ParameterError, match="use heun"):
        check_sampler("euler_maruyama", 100, edm)
    for nfe in (1, 1001):
        with pytest.raises(ParameterError, match="2 to 1000"):
            check_sampler("ancestral", nfe, vp)
    with pytest.raises(ParameterError, match="use heun"):
        check_sampler("ancestral", 100, edm)

    class Nan(torch.nn.Module):
        def forward(self, x, c):
            return x * math.nan

    with pytest.raises(FloatingPointError, match="ddim, nfe = 3.*first is image 5"):
        sample(Nan(), diffusion(), SamplingConfig(sampler="ddim", nfe=3), (1, 2, 2), 4, start=5)


def test_import_is_light():
    heavy = {"diffusers", "torchvision", "sklearn", "matplotlib"}
    code = f"import uvit_repro.sample, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_synchronisation_in_the_loop(sampler):
    from uvit_repro.sample import solve

    net, d = torch.nn.Conv2d(3, 3, 3, padding=1).cuda(), diffusion()
    den = Denoiser(lambda x, c, y: net(x), d, 1.4, null={"y": torch.tensor(10, device="cuda")})
    x, y = (
        initial_noise(0, 0, 4, (3, 8, 8), "cuda"),
        torch.zeros(4, dtype=torch.int64, device="cuda"),
    )

    def run():
        return solve(den, x, sampler, 7, lambda i: step_noise(0, i, 0, 4, (3, 8, 8), "cuda"), y=y)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
