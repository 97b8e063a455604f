"CKA against direct computation and known cases; unbiased; kept beside the run."

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from uvit_repro.cka import (
    MATCHED,
    SETTINGS,
    StreamingCKA,
    block_outputs,
    cka_matrix,
    gram,
    hsic_unbiased,
    level_losses,
    loss_differences,
    minibatches,
    parse_levels,
    recorded,
    run_cka,
    settings_of,
    summary,
    token_kinds,
)
from uvit_repro.config import LAPTOP, SMOKE, ParameterError
from uvit_repro.data.digits import load_digits
from uvit_repro.diffusion import Diffusion
from uvit_repro.paper.numbers import figure7
from uvit_repro.runs.evaluate import heldout_inputs
from uvit_repro.runs.experiment import run_experiment
from uvit_repro.runs.records import kept_similarities, publish, read_similarity
from uvit_repro.train import build_model
from uvit_repro.uvit import UViT


def gen(s=0):
    return torch.Generator().manual_seed(s)


def rnd(*shape, s=0):
    return torch.randn(*shape, generator=gen(s), dtype=torch.float64)


def quadruples(x, y):
    "HSIC without bias by its definition, an average over all quadruples of distinct samples."
    K, L = (v.flatten(1).double() @ v.flatten(1).double().T for v in (x, y))
    i, j, q, r = torch.tensor(list(itertools.permutations(range(len(x)), 4))).T
    return float((K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])).mean())


def direct(layers):
    h = np.array([[quadruples(a, b) for b in layers] for a in layers])
    d = np.sqrt(np.diag(h))
    return h / np.outer(d, d)


@pytest.mark.parametrize("n", [4, 5, 9])
def test_one_minibatch_equals_the_definition(n):
    layers = [rnd(n, 6, s=1), rnd(n, 2, 5, s=2) + 3, rnd(n, 1, s=3)]
    layers.append(layers[0][:, :2] + 0.5 * layers[1][:, 0, :2])
    one = StreamingCKA().update([x.float() for x in layers])
    want = direct([x.float() for x in layers])
    ok = ~np.isnan(want)
    assert np.allclose(one.matrix()[ok], want[ok], atol=1e-8) and ok.sum() >= 4
    assert np.allclose(
        one.hsic()[0, 1], quadruples(layers[0].float(), layers[1].float()), rtol=1e-6
    )


def test_streaming_is_the_mean_over_minibatches():
    x, y = rnd(60, 7, s=1), rnd(60, 4, s=2)
    s = StreamingCKA()
    parts = torch.arange(60).split(12)
    for p in parts:
        s.update([x[p], y[p]])

    def mean(a, b):
        return np.mean([float(hsic_unbiased(gram(a[p]), gram(b[p]))) for p in parts])

    assert (
        s.matrix()[0, 1] == pytest.approx(mean(x, y) / np.sqrt(mean(x, x) * mean(y, y)), rel=1e-12)
        and s.samples == 60
    )
    uneven = StreamingCKA().update([x[:40], y[:40]]).update([x[40:], y[40:]])
    assert uneven.hsic()[0, 1] == pytest.approx(
        (
            40 * float(hsic_unbiased(gram(x[:40]), gram(y[:40])))
            + 20 * float(hsic_unbiased(gram(x[40:]), gram(y[40:])))
        )
        / 60,
        rel=1e-12,
    )


def test_known_cases():
    x, z = rnd(50, 9, s=1), rnd(50, 30, s=2)
    Q = torch.linalg.qr(rnd(9, 9, s=3))[0]
    stretch = torch.diag(torch.arange(1.0, 10).double())
    m = StreamingCKA().update([x, x, x @ Q, 1e-3 * (x @ Q) - 8, x @ stretch**2, z]).matrix()
    assert np.allclose(m[:4, :4], 1, atol=1e-9)
    assert m[0, 4] < 0.9, "a map that is neither a rotation nor a scaling is seen"
    assert abs(m[0, 5]) < 0.15 and np.allclose(m, m.T) and np.allclose(np.diag(m), 1)
    p = torch.randperm(50, generator=gen(4))
    same = StreamingCKA().update([v[p] for v in (x, x @ stretch, z)]).matrix()
    assert np.allclose(same, StreamingCKA().update([x, x @ stretch, z]).matrix(), atol=1e-12)
    assert not np.allclose(
        StreamingCKA().update([x[p], x @ stretch]).matrix()[0, 1], same[0, 1], atol=0.1
    ), "permuting one side alone is not the same"


def test_layers_that_do_not_vary_have_no_similarity():
    m = StreamingCKA().update([rnd(10, 3), torch.full((10, 5), 0.1), torch.zeros(10, 2)]).matrix()
    assert m[0, 0] == pytest.approx(1) and np.isnan(m[1:]).all()
    assert not np.isfinite(
        StreamingCKA().update([rnd(10, 3), torch.full((10, 2), float("nan"))]).hsic()
    ).all(), "features that are not finite are not hidden"


def test_no_bias():
    "Independent features: zero on average over repeats, and Gaussians their covariance."
    K, L = zip(
        *((gram(rnd(8, 20, s=2 * i)), gram(rnd(8, 20, s=2 * i + 1))) for i in range(600)),
        strict=False,
    )
    values = np.array([float(hsic_unbiased(k, m)) for k, m in zip(K, L, strict=False)])
    plain = np.array([float((k * m).sum()) / 49 for k, m in zip(K, L, strict=False)])

    def error(v):
        return v.std() / len(v) ** 0.5

    assert abs(values.mean()) < 4 * error(values) and plain.mean() > 20 * error(plain)
    A = rnd(5, 5, s=9)
    cov = float((A.T @ A).square().sum())
    own = np.array([float(hsic_unbiased(g := gram(rnd(6, 5, s=i) @ A), g)) for i in range(2000)])
    assert abs(own.mean() - cov) < 4 * error(own) and error(own) < 0.1 * cov


def test_refusals():
    with pytest.raises(ParameterError, match="needs 4"):
        StreamingCKA().update([rnd(3, 2)])
    for n, b in ((4, 4), (5, 4), (9, 4), (11, 5), (297, 100), (300, 100)):
        sizes = [len(p) for p in torch.arange(n).tensor_split(minibatches(n, b))]
        assert sum(sizes) == n and min(sizes) >= 4 and max(sizes) - min(sizes) <= 1
        assert max(sizes) <= b or min(sizes) < 8
    assert parse_levels("-6, 0,training") == (-6.0, 0.0, None)
    with pytest.raises(ParameterError, match="perhaps the word training"):
        parse_levels("low")
    for n, b in ((3, 100), (100, 3)):
        with pytest.raises(ParameterError, match="at least 4"):
            minibatches(n, b)


def smoke_inputs(n, s=0):
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=gen(s), dtype=torch.uint8)
    return images, torch.arange(n) % 10


class Other(nn.Module):
    "A network of another make: blocks on maps, outputs in tuples, no tokens."

    class B(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.c(x), "more"

    def __init__(self, fail=False):
        super().__init__()
        self.in_blocks, self.mid_block, self.out_blocks, self.fail = (
            nn.ModuleList([self.B(), self.B()]),
            self.B(),
            nn.ModuleList([self.B(), self.B()]),
            fail,
        )

    def forward(self, x, t):
        for b in [*self.in_blocks, self.mid_block, *self.out_blocks]:
            x = b(x)[0]
        if self.fail:
            raise RuntimeError("in the middle")
        return x


def test_hooks_on_any_network_and_nothing_is_left_behind():
    net, x = Other(), torch.randn(6, 1, 8, 8)
    outs = block_outputs(net, x, torch.zeros(6))
    want = x
    for o, b in zip(outs, [*net.in_blocks, net.mid_block, *net.out_blocks], strict=False):
        want = b(want)[0]
        assert torch.allclose(o, want)
    process = Diffusion(replace(SMOKE.diffusion, process="vp"))
    r = cka_matrix(net, process, *smoke_inputs(8)[:1], levels=(0.0,))
    assert r.hsic.shape == (1, 1, 5, 5) and r.settings["tokens"] == ["all"]
    bad = Other(fail=True).train()
    with pytest.raises(RuntimeError, match="in the middle"):
        block_outputs(bad, x, torch.zeros(6))
    assert bad.training and not any(m._forward_hooks for n in (net, bad) for m in n.modules())
    with pytest.raises(ParameterError, match="Linear has no mid_block"):
        block_outputs(nn.Linear(2, 2), x, None)


def test_token_kinds():
    tiny = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 8,
        "depth": 3,
        "num_heads": 2,
    }
    s = slice
    assert token_kinds(UViT(**tiny)) == {"all": s(None), "patches": s(1, None), "time": s(0, 1)}
    assert token_kinds(UViT(**tiny, num_classes=3)) == {
        "all": s(None),
        "patches": s(2, None),
        "time": s(1, 2),
        "condition": s(0, 1),
    }
    assert token_kinds(UViT(**tiny, num_classes=3, time="adaln")) == {
        "all": s(None),
        "patches": s(1, None),
        "condition": s(0, 1),
    }
    assert token_kinds(UViT(**tiny, clip_dim=4, num_clip_token=6)) == {
        "all": s(None),
        "patches": s(7, None),
        "time": s(0, 1),
        "condition": s(1, 7),
    }


def test_matrix_of_a_network():
    net, diff, (images, labels) = build_model(SMOKE), Diffusion(SMOKE.diffusion), smoke_inputs(24)

    def call(x=images, labels=labels, levels=(3.0, None), seed=0):
        return cka_matrix(net, diff, x, {"y": labels}, levels, batch=8, seed=seed)

    r = call()
    assert r.settings == {
        "tokens": ["all", "patches", "time", "condition"],
        "levels": [3.0, None],
        "images": 24,
        "batches": 3,
    }
    assert r.hsic.shape == (4, 2, 3, 3) and net.training
    assert np.array_equal(r.hsic, call().hsic)
    assert np.array_equal(r.hsic[:, :1], call(levels=(3.0,)).hsic)
    assert not np.allclose(r.hsic, call(seed=1).hsic, rtol=1e-4)
    assert not np.allclose(r.hsic, call(labels=labels.flip(0)).hsic, rtol=1e-6)
    m = r.matrix("patches", 3.0)
    assert np.allclose(m, m.T) and np.allclose(np.diag(m), 1)
    as_float = call(images.float() / 127.5 - 1)
    assert np.allclose(as_float.hsic, r.hsic, rtol=1e-4)
    with pytest.raises(ParameterError, match="level 20: the process has log-SNR"):
        call(levels=(20.0,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    e = settings_of(SMOKE)
    return root, [
        run_experiment(e[n], root, lambda s: None) for n in ("concatenation", "no long skip")
    ]


def test_kept_beside_the_run(runs, tmp_path):
    root, (run, _) = runs
    args = {"levels": (0.0, None), "num_images": 16, "batch": 8}
    first = run_cka(run.exp, run.folder, **args)
    (path,) = (run.folder / "stats").glob("cka-*.npz")
    written = path.stat().st_mtime_ns
    assert np.array_equal(run_cka(run.exp, run.folder, **args).hsic, first.hsic)
    assert path.stat().st_mtime_ns == written, "measured once, then read"
    assert first.settings["images"] == 16 and first.levels == [0.0, None]
    run_cka(run.exp, run.folder, (0.0, None), 16, 8, seed=1)
    assert len(kept_similarities(publish(run.folder, tmp_path))) == 2
    kept = [r.similarity for r in recorded(SMOKE, root, "runs")]
    assert kept[0].settings["noise_seed"] == 0 and kept[1] is None
    blob = path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ValueError, match="can't be read"):
        read_similarity(path)
    other = json.dumps(first.settings | {"images": 32})
    np.savez(path, hsic=first.hsic, settings=np.array(other))
    with pytest.raises(ValueError, match="does not hold what its name says"):
        read_similarity(path)
    path.unlink()


def test_losses_by_level_are_the_recorded_ones(runs):
    root, (concat, none) = runs
    found = recorded(SMOKE, root, "runs")
    assert [(r.setting, r.seed) for r in found] == [("concatenation", 0), ("no long skip", 0)]

    def value(run):
        return (df := run.measurements())[
            (df.metric == "heldout_loss") & (df.step == SMOKE.train.n_steps)
        ].value.item()

    assert level_losses(SMOKE, none.folder).loss.mean() == pytest.approx(value(none), rel=1e-12)
    d = loss_differences(SMOKE, found)
    assert (
        set(d.setting) == {"no long skip"}
        and len(d) == SMOKE.evaluation.loss_levels
        and d.log_snr.is_monotonic_increasing
    )
    assert d.difference.mean() == pytest.approx(
        value(none) - value(concat), rel=1e-9
    ) and np.allclose(d.relative, d.difference / d.loss)
    assert len(loss_differences(SMOKE, found[1:])) == 0


def test_the_papers_matrices():
    paper = {s: figure7(s).values for s in SETTINGS}
    assert all(m.shape == (13, 13) for m in paper.values()) and MATCHED not in paper
    for _s, m in paper.items():
        got = summary(m)
        off = [m[i, j] for i in range(13) for j in range(13) if i != j]
        assert (
            got["all pairs"] == pytest.approx(np.mean(off))
            and got["neighbours"] == pytest.approx(np.mean([m[i, i + 1] for i in range(12)]))
            and got["mirrored"] == pytest.approx(np.mean([m[i, 12 - i] for i in range(6)]))
        )
    between = [summary(m)["all pairs"] for m in paper.values()]
    assert between == sorted(between), "claim U19: concatenation is the least similar"


def test_a_network_of_latents_or_texts_sees_what_it_was_trained_on():
    "The first edition gave pixels to latent models, and no caption to text models."

    digits = load_digits(LAPTOP.data)
    latents = torch.randn(297, 4, 2, 2)
    data = replace(digits, test_inputs=latents)
    seen, cond = heldout_inputs(SMOKE, data, 20)
    pick = torch.randperm(297, generator=gen(0))[:20]
    assert torch.equal(seen, latents[pick]) and torch.equal(cond["y"], digits.test_labels[pick])

    class Texts:
        def test(self, index):
            return torch.full((len(index), 3, 5), 2.0, dtype=torch.float16)

    text = replace(SMOKE, model=replace(SMOKE.model, condition="text"))
    seen, cond = heldout_inputs(text, replace(digits, texts=Texts()), 20)
    assert torch.equal(seen, digits.test_images[pick])
    assert set(cond) == {"context"} and cond["context"].dtype == torch.float32
    tiny = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 3}
    net = UViT(**tiny, num_heads=2, clip_dim=5, num_clip_token=3)
    found = cka_matrix(net, Diffusion(SMOKE.diffusion), seen, cond, (0.0,), batch=10)
    assert found.matrix("patches", 0.0).shape == (3, 3)
