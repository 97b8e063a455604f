"CKA against direct computation and known cases; unbiased; kept beside the run."

import itertools
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from uvit_repro.cka import (
    MATCHED,
    SETTINGS,
    StreamingCKA,
    block_outputs,
    cka_matrix,
    cka_measures,
    cka_results,
    find_cka,
    gram,
    heldout,
    hsic_unbiased,
    level_losses,
    load_cka,
    loss_differences,
    matrix_of,
    minibatches,
    parse_levels,
    recorded,
    run_cka,
    settings_of,
    summary,
    token_kinds,
    with_kept,
)
from uvit_repro.config import LAPTOP, SMOKE, ParameterError
from uvit_repro.data.digits import load_digits
from uvit_repro.diffusion import Diffusion
from uvit_repro.paper.numbers import figure7
from uvit_repro.runs.experiment import is_done, run_experiment
from uvit_repro.runs.records import publish
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

    assert s.matrix()[0, 1] == pytest.approx(
        mean(x, y) / np.sqrt(mean(x, x) * mean(y, y)), rel=1e-12
    ) and (s.samples, s.batches) == (60, 5)
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
    with pytest.raises(ParameterError, match="at least 4"):
        StreamingCKA().update([rnd(3, 2)])
    with pytest.raises(ValueError, match="every layer must see the same"):
        StreamingCKA().update([rnd(5, 2), rnd(6, 2)])
    with pytest.raises(ValueError, match="1 layers: 2 were given before"):
        StreamingCKA().update([rnd(5, 2), rnd(5, 2)]).update([rnd(5, 2)])
    with pytest.raises(ValueError, match="call update first"):
        StreamingCKA().matrix()
    for n, b in ((4, 4), (5, 4), (9, 4), (11, 5), (297, 100), (300, 100)):
        sizes = [len(p) for p in torch.arange(n).tensor_split(minibatches(n, b))]
        assert (
            sum(sizes) == n
            and min(sizes) >= 4
            and max(sizes) - min(sizes) <= 1
            and (max(sizes) <= b or min(sizes) < 8)
        )
    with pytest.raises(ParameterError, match="neither a log-SNR nor the word training"):
        parse_levels("low")
    for n, b in ((3, 100), (100, 3)):
        with pytest.raises(ParameterError, match="at least 4"):
            minibatches(n, b)


def test_state_is_of_fixed_size_and_keeps_no_features():
    s, refs = StreamingCKA(), []
    for i in range(30):
        f = [rnd(16, 8, s=i), rnd(16, 3, s=i + 99), rnd(16, 2, s=i + 999)]
        refs += [weakref.ref(v) for v in f]
        s.update(f)
        del f
        assert (
            s.sums.shape == (3, 3)
            and set(vars(s)) == {"sums", "samples", "batches"}
            and isinstance(s.samples, int)
            and isinstance(s.batches, int)
        )
    assert not any(r() is not None for r in refs)


class Peak(TorchDispatchMode):
    "The most bytes of tensors made inside that were alive at once."

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def free(self, n):
        self.now -= n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                n = t.numel() * t.element_size()
                self.now += n
                self.most = max(self.most, self.now)
                weakref.finalize(t, self.free, n)
        return out


def smoke_inputs(n, s=0):
    return torch.randint(0, 256, (n, 1, 8, 8), generator=gen(s), dtype=torch.uint8), torch.arange(
        n
    ) % 10


def test_memory_does_not_grow_with_the_number_of_samples():
    net, diff, peaks = build_model(SMOKE), Diffusion(SMOKE.diffusion), []
    for n in (32, 320):
        images, labels = smoke_inputs(n)
        with Peak() as p:
            cka_matrix(net, diff, images, {"y": labels}, (0.0, None), batch=16)
        peaks.append(p.most)
    assert peaks[0] > 100_000 and peaks[1] < 1.25 * peaks[0] + 320 * 8 * 4, peaks


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
    r = cka_matrix(
        net, Diffusion(replace(SMOKE.diffusion, process="vp")), *smoke_inputs(8)[:1], levels=(0.0,)
    )
    assert r["cka"].shape == (1, 1, 5, 5) and r["tokens"] == ("all",)
    bad = Other(fail=True).train()
    with pytest.raises(RuntimeError, match="in the middle"):
        block_outputs(bad, x, torch.zeros(6))
    assert bad.training and not any(m._forward_hooks for n in (net, bad) for m in n.modules())
    with pytest.raises(ParameterError, match="Linear has no in_blocks, mid_block, out_blocks"):
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

    def call(**kw):
        return cka_matrix(
            net,
            diff,
            images,
            {"y": kw.pop("labels", labels)},
            **{**{"levels": (3.0, None), "batch": 8}, **kw},
        )

    r = call()
    assert (
        r["tokens"] == ("all", "patches", "time", "condition")
        and r["cka"].shape == (4, 2, 3, 3)
        and (r["samples"], r["batches"]) == (24, 3)
    )
    assert (
        np.array_equal(r["hsic"], call()["hsic"])
        and np.array_equal(r["hsic"][1], call(tokens="patches")["hsic"][0])
        and np.array_equal(r["hsic"][:, :1], call(levels=(3.0,))["hsic"])
    )
    assert (
        not np.allclose(r["cka"], call(seed=1)["cka"], atol=1e-4)
        and not np.allclose(r["cka"][:, 0], call(seed=1)["cka"][:, 0], atol=1e-4)
        and not np.allclose(r["cka"], call(labels=labels.flip(0))["cka"], atol=1e-6)
    )
    assert np.allclose(r["cka"], np.swapaxes(r["cka"], -1, -2)) and net.training
    as_float = cka_matrix(
        net, diff, images.float() / 127.5 - 1, {"y": labels}, (3.0, None), batch=8
    )
    assert np.allclose(as_float["cka"], r["cka"], atol=1e-5)
    with pytest.raises(ParameterError, match="level 20: the process has log-SNR"):
        call(levels=(20.0,))
    with pytest.raises(
        ParameterError, match="tokens = pixels: this network has all, patches, time, condition"
    ):
        call(tokens=("pixels",))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    e = settings_of(SMOKE)
    return root, [
        run_experiment(e[n], root, lambda s: None) for n in ("concatenation", "no long skip")
    ]


def test_kept_beside_the_run(runs, tmp_path):
    root, (run, _) = runs
    args = {"levels": "0,training", "num_images": 16, "batch": 8}
    first, again = run_cka(run.exp, run.folder, **args), run_cka(run.exp, run.folder, **args)
    assert (
        first["fresh"]
        and not again["fresh"]
        and np.array_equal(first["hsic"], again["hsic"])
        and is_done(SMOKE, root)
    )
    (path,) = (run.folder / "stats").glob("cka-*.npz")
    assert [np.array_equal(c["cka"], first["cka"]) for c in find_cka(run.folder)] == [True]
    assert (
        json.loads(str(np.load(path)["settings"]))["images"] == 16
        and first["levels"] == (0.0, None)
        and run_cka(run.exp, run.folder, "0,training", 16, 8, seed=1)["fresh"]
    )
    copy = publish(run.folder, tmp_path)
    assert len(find_cka(copy)) == 2
    assert [
        r["cka"]["settings"]["noise_seed"] for r in with_kept(recorded(SMOKE, root, "runs"))
    ] == [0]
    net_alone = cka_matrix(
        build_model(run.exp),
        Diffusion(run.exp.diffusion),
        smoke_inputs(16)[0],
        {"y": smoke_inputs(16)[1]},
        levels=(0.0,),
        batch=8,
    )
    assert not np.allclose(net_alone["cka"][:, 0], first["cka"][:, 0], atol=1e-3), (
        "trained weights on real images are not initial weights on noise"
    )

    blob = path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ValueError, match="can't be read"):
        load_cka(path)
    mended = run_cka(run.exp, run.folder, **args)
    assert (
        mended["fresh"]
        and np.array_equal(mended["hsic"], first["hsic"])
        and path.with_name(path.name + ".damaged-1").exists()
    )
    s = json.loads(str(np.load(path)["settings"]))
    s["images"] = 32
    with open(path, "wb") as f:
        np.savez(f, hsic=first["hsic"], settings=np.array(json.dumps(s)))
    with pytest.raises(ValueError, match="does not hold what its name says"):
        load_cka(path)
    with pytest.raises(FileNotFoundError, match="run chapter 09"):
        load_cka(path.with_name("cka-none.npz"))
    with pytest.raises(FileNotFoundError, match="no weights of step 3"):
        run_cka(run.exp, run.folder, step=3)


def test_matrices_as_rows_of_the_ledger(runs, monkeypatch):
    import pandas as pd

    import uvit_repro.cka as module
    from uvit_repro.runs.records import COLUMNS, load_results

    root, (_, none) = runs
    run_cka(none.exp, none.folder, "0,training", 16, 8)
    assert len(cka_results("runs", root)) == 0, "smoke is never reported"
    loaded = [
        dict(r, experiment=replace(r["experiment"], protocol="laptop"))
        for r in module.load_runs("runs", root)
    ]
    monkeypatch.setattr(module, "load_runs", lambda *a: loaded)
    df = cka_results("runs", root)
    mine = df[df.run_id == none.run_id]
    path = none.folder / "stats" / f"{mine.eval_id.iloc[0]}.npz"
    m = matrix_of(load_cka(path))
    assert (
        list(df.columns)
        == COLUMNS + ["origin", "folder"]
        == list(pd.concat([load_results("runs", root), df]).columns)
    )
    assert (
        dict(zip(mine.metric, mine.value, strict=False)) == cka_measures(m)
        and mine[mine.metric == "cka_0_2"].value.item() == m[0, 2]
        and set(mine.step) == {SMOKE.train.n_steps}
    )
    assert len(cka_results("runs", root, level=5.0)) == 0


def test_losses_by_level_are_the_recorded_ones(runs):
    root, (concat, none) = runs
    found = recorded(SMOKE, root, "runs")
    assert [(r["setting"], r["seed"]) for r in found] == [("concatenation", 0), ("no long skip", 0)]

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
    runs = [
        {
            "setting": s,
            "seed": 0,
            "cka": {"tokens": ("all",), "levels": (None,), "cka": m[None, None]},
        }
        for s, m in paper.items()
    ]
    assert np.array_equal(matrix_of(runs[0]["cka"]), paper["concatenation"])
    between = [summary(m)["all pairs"] for m in paper.values()]
    assert between == sorted(between), "claim U19: concatenation is the least similar"


def test_a_network_of_latents_or_texts_sees_what_it_was_trained_on():
    "The first edition gave pixels to latent models, and no caption to text models."

    digits = load_digits(LAPTOP.data)
    latents = torch.randn(297, 4, 2, 2)
    data = replace(digits, test_inputs=latents)
    seen, cond = heldout(data, SMOKE, 20)
    pick = torch.randperm(297, generator=gen(0))[:20]
    assert torch.equal(seen, latents[pick]) and torch.equal(cond["y"], digits.test_labels[pick])

    class Texts:
        def test(self, index):
            return torch.full((len(index), 3, 5), 2.0, dtype=torch.float16)

    text = replace(SMOKE, model=replace(SMOKE.model, condition="text"))
    seen, cond = heldout(replace(digits, texts=Texts()), text, 20)
    assert torch.equal(seen, digits.test_images[pick])
    assert set(cond) == {"context"} and cond["context"].dtype == torch.float32
    tiny = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 3}
    net = UViT(**tiny, num_heads=2, clip_dim=5, num_clip_token=3)
    told = cka_matrix(net, Diffusion(SMOKE.diffusion), seen, cond, (0.0,), "patches", batch=10)
    assert told["cka"].shape == (1, 1, 3, 3)
