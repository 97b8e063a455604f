"Feature networks, distances, the report of a set of images, the held-out loss."

import hashlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from uvit_repro import metrics as M
from uvit_repro.config import LAPTOP, DiffusionConfig, ParameterError, key_seed
from uvit_repro.data.images import load_digits
from uvit_repro.diffusion import Diffusion


@pytest.fixture(scope="module")
def digits():
    return load_digits(LAPTOP.data)


@pytest.fixture(scope="module")
def feats(digits):
    return {s: M.extract(getattr(digits, f"{s}_images"), "digits_cnn") for s in ("train", "test")}


def by_name(rows):
    return {r["metric"]: r for r in rows}


def test_import_is_light():
    code = "import sys, uvit_repro.metrics; print([m for m in ('torch_fidelity', 'torchvision', 'diffusers', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_digits_judge(digits, feats):
    assert M.feature_weights("digits_cnn").stat().st_size < 200_000
    assert (
        feats["test"]["features"].shape == (297, 64)
        and feats["test"]["logits"].shape == (297, 10)
        and feats["test"]["features"].dtype == torch.float32
    )
    assert (feats["test"]["logits"].argmax(1) == digits.test_labels).float().mean() >= 0.97
    assert torch.linalg.matrix_rank(torch.cov(feats["train"]["features"].double().T)) == 64
    threads = torch.get_num_threads()
    few = (digits.train_images[::10], digits.train_labels[::10])
    a, b = M.train_digits_cnn(*few, epochs=1), M.train_digits_cnn(*few, epochs=1)
    assert (
        all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
        and torch.get_num_threads() == threads
    )


def test_missing_and_wrong_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("UVIT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name in ("inception", "resnet20_cifar10", "resnet56_cifar10"):
        net = M.network(name)
        assert M.feature_weights(name) is None and not M.feature_status(name)[0]
        with pytest.raises(FileNotFoundError, match="curl -L") as e:
            M.extract(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), name)
        assert net.url in str(e.value) and str(tmp_path / net.file) in str(e.value)
        (tmp_path / net.file).write_bytes(b"truncated")
        with pytest.raises(ValueError, match=net.sha256):
            M.extract(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), name)
        assert "expected" in M.feature_status(name)[1]
        (tmp_path / net.file).unlink()
    folder = tmp_path / "data" / "weights"
    folder.mkdir(parents=True)
    (folder / M.network("resnet20_cifar10").file).write_bytes(b"x")
    assert M.feature_weights("resnet20_cifar10").parent == folder
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / M.network("inception").file).write_bytes(b"x")
    assert M.feature_weights("inception").parent == tmp_path / "hub" / "checkpoints"


def test_resnet_file_in_the_public_format(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = M.CifarResNet(3).eval()
    f = tmp_path / M.network("resnet20_cifar10").file
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "best_prec1": 0.0},
        f,
    )
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(
        M.NETWORKS,
        "resnet20_cifar10",
        replace(M.network("resnet20_cifar10"), sha256=hashlib.sha256(f.read_bytes()).hexdigest()),
    )
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    out = M.extract(x, "resnet20_cifar10", batch=2)
    with torch.no_grad():
        want = net(x)
    assert torch.allclose(out["features"], want[0], atol=1e-5) and torch.allclose(
        out["logits"], want[1], atol=1e-4
    )
    grey = x[:, :1]
    assert torch.equal(
        M.extract(grey, "resnet20_cifar10")["features"],
        M.extract(grey.repeat(1, 3, 1, 1), "resnet20_cifar10")["features"],
    )

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"state_dict": Bomb()}, f)
    monkeypatch.setitem(
        M.NETWORKS,
        "resnet20_cifar10",
        replace(M.network("resnet20_cifar10"), sha256=hashlib.sha256(f.read_bytes()).hexdigest()),
    )
    with pytest.raises(Exception):
        M.load_weights("resnet20_cifar10")
    assert not (tmp_path / "pwned").exists()


def test_inception_from_a_path(tmp_path, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as m

    with (
        patch.object(m, "load_state_dict_from_url", lambda *a, **k: {}),
        patch.object(m.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None),
    ):
        net = m.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    f = tmp_path / M.network("inception").file
    torch.save(net.state_dict(), f)
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(
        M.NETWORKS,
        "inception",
        replace(M.network("inception"), sha256=hashlib.sha256(f.read_bytes()).hexdigest()),
    )
    seen, load = [], torch.load
    with patch.object(
        torch, "load", lambda *a, **k: (seen.append(k.get("weights_only")), load(*a, **k))[1]
    ):
        out = M.make_extractor("inception")
    assert (
        seen[0] is True
        and len(seen) == 2
        and out.features_list == ["2048", "logits_unbiased", "spatial"]
    )  # checked before torch-fidelity reads it


@pytest.mark.parametrize(
    "images, name, says",
    [
        (torch.zeros(2, 1, 8, 8), "digits_cnn", "uint8"),
        (np.zeros((2, 1, 8, 8), np.uint8), "digits_cnn", "uint8 tensor"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "digits_cnn", "N > 0"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "digits_cnn", "takes 1x8x8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "digits_cnn", "inception"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "resnet56_cifar10", "takes 3x32x32"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "vgg16", "known networks are"),
    ],
)
def test_bad_images(images, name, says):
    with pytest.raises(ParameterError, match=says):
        M.extract(images, name)


def test_frechet_closed_form_and_refusal():
    rng = np.random.default_rng(0)
    m, s = rng.normal(size=(2, 12)), rng.uniform(0.2, 2, (2, 12))
    q = np.linalg.qr(rng.normal(size=(12, 12)))[0]  # one rotation for both: the closed form stays
    a, b = (M.Stats(99, q @ m[i], q @ np.diag(s[i] ** 2) @ q.T) for i in (0, 1))
    assert M.frechet(a, b) == pytest.approx(
        ((m[0] - m[1]) ** 2 + (s[0] - s[1]) ** 2).sum(), rel=1e-9
    )
    with pytest.raises(ValueError, match="at least 13"):
        M.Stats.of(torch.randn(12, 12))
    with pytest.raises(ValueError, match="at least 13"):
        M.frechet(a, M.Stats(12, b.mean, b.cov))
    x = torch.randn(40, 12)
    st = M.Stats.of(x)
    assert st.mean.dtype == st.cov.dtype == np.float64 and np.allclose(
        st.cov, np.cov(x.double().numpy().T)
    )


def test_equals_torch_fidelity(digits, feats):
    from torch_fidelity import calculate_metrics

    class Images(torch.utils.data.Dataset):
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[i]

    few, held = feats["train"]["features"][::4], feats["test"]["features"]
    theirs = calculate_metrics(
        input1=Images(digits.train_images[::4]),
        input2=Images(digits.test_images),
        feature_extractor=M.register_network("digits_cnn"),
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=297,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    assert M.frechet(M.Stats.of(few), M.Stats.of(held)) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-6
    )
    assert M.kid_subsets(few, held).mean() == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-5
    )
    pr = M.precision_recall(few, held)
    assert (pr[:, 0] / pr[:, 1]).tolist() == pytest.approx(
        [theirs["precision"], theirs["recall"]], abs=1e-6
    )


def test_report_and_recompute(digits, tmp_path):
    rows, stats = M.measure_images(
        digits.test_images,
        digits.test_labels,
        digits,
        "digits_cnn",
        cache_dir=tmp_path,
        patch_size=2,
    )
    assert all(
        isinstance(v, (np.ndarray, np.generic)) and v.dtype.kind != "O" for v in stats.values()
    )
    buf = io.BytesIO()
    np.savez(buf, **stats)
    buf.seek(0)
    with np.load(buf, allow_pickle=False) as z:
        again = M.recompute(dict(z))
    assert again == rows and all(r["value"] is not None for r in rows)
    r = by_name(rows)
    names = {
        f"{a}_digits_cnn{b}"
        for a, b in (
            ("fd", "_train"),
            ("fd", "_test"),
            ("fd", "_real"),
            ("kid", "_test"),
            ("precision", ""),
            ("recall", ""),
        )
    }
    assert set(r) == names | {
        "class_agreement",
        "class_entropy",
        "border_energy_p2",
        "nn_train_median",
        "nn_heldout_median",
        "nn_ratio",
        "copies",
    }
    assert (
        np.log(10) - r["class_entropy"]["value"] < 0.01
        and r["class_agreement"]["value"] > 0.97
        and r["copies"]["value"] < 0.03
        and r["fd_digits_cnn_train"]["num_samples"] == 297
    )
    stats["confusion"] = np.roll(stats["confusion"], 1, axis=1)
    assert (
        by_name(M.recompute(stats))["class_agreement"]["value"] < 0.05
    )  # values come from the statistics
    warm, _ = M.measure_images(
        digits.test_images,
        digits.test_labels,
        digits,
        "digits_cnn",
        cache_dir=tmp_path,
        patch_size=2,
    )
    assert warm == rows and not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_returning_the_training_set_does_not_pass(digits):
    r = by_name(M.measure_images(digits.train_images, digits.train_labels, digits, "digits_cnn")[0])
    assert (
        r["nn_ratio"]["value"] == 0
        and r["copies"]["value"] == 1
        and r["fd_digits_cnn_train"]["value"] < 1e-6
    )
    mirrored = digits.train_images[::3].flip(-1)
    plain, both = (
        by_name(M.measure_images(mirrored, None, digits, "digits_cnn", mirror=m)[0])
        for m in (False, True)
    )
    assert plain["copies"]["value"] < 0.1 and both["copies"]["value"] == 1


def test_what_the_data_cannot_support(digits):
    bare = replace(
        digits, test_images=digits.test_images[:0], test_labels=digits.test_labels[:0], sha256="0"
    )
    r = by_name(
        M.measure_images(
            digits.test_images[:64], digits.test_labels[:64], bare, "digits_cnn", patch_size=8
        )[0]
    )
    for name, why in (
        ("fd_digits_cnn_train", "at least 65"),
        ("fd_digits_cnn_test", "at least 65"),
        ("kid_digits_cnn_test", "holdout"),
        ("class_agreement", "does not tell apart"),
        ("class_entropy", "does not tell apart"),
        ("border_energy_p8", "no border"),
        ("nn_heldout_median", "holdout"),
        ("nn_ratio", "holdout"),
        ("copies", "holdout"),
    ):
        assert r[name]["value"] is None and why in r[name]["why"]
    assert r["nn_train_median"]["value"] > 0
    r = by_name(M.measure_images(digits.test_images[:3], None, digits, "digits_cnn")[0])
    assert "at least 4" in r["precision_digits_cnn"]["why"] and "class_agreement" not in r
    with pytest.raises(ParameterError, match="the data's are"):
        M.measure_images(torch.zeros(80, 3, 32, 32, dtype=torch.uint8), None, digits, "inception")
    with pytest.raises(ParameterError, match="0 .. 9"):
        M.measure_images(digits.test_images, digits.test_labels + 1, digits, "digits_cnn")
    with pytest.raises(ParameterError, match="expected 297"):
        M.measure_images(digits.test_images, digits.test_labels[:5], digits, "digits_cnn")


def test_reference_cache(digits, tmp_path):
    s, sha = M.reference_stats(digits, "digits_cnn", "test", tmp_path)
    (f,) = tmp_path.iterdir()
    whole = f.read_bytes()
    with patch.object(M, "extract", side_effect=AssertionError("not from the file")):
        assert M.reference_stats(digits, "digits_cnn", "test", tmp_path)[1] == sha == s.sha256
    for damaged in (
        whole[:100],
        whole[:-50],
        b"",
        whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
    ):
        f.write_bytes(damaged)
        assert M.reference_stats(digits, "digits_cnn", "test", tmp_path)[1] == sha
    other = replace(digits, sha256="1" * 64)
    M.reference_stats(other, "digits_cnn", "test", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    streamed = replace(digits, train_images=None, stream=[(x, 0) for x in digits.train_images])
    assert M.reference_stats(streamed, "digits_cnn", "train")[0].mean == pytest.approx(
        M.reference_stats(digits, "digits_cnn", "train")[0].mean
    )
    r, t = (
        by_name(M.measure_images(digits.test_images, None, d, "digits_cnn", patch_size=4)[0])
        for d in (digits, streamed)
    )
    for k in r:
        assert r[k]["value"] == pytest.approx(t[k]["value"], rel=1e-6)


def test_nearest_against_brute_force():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (n, 3, 5, 5), generator=g, dtype=torch.uint8) for n in (11, 6001))
    b[6000] = a[3]
    i, d = M.nearest_training(a, b, k=2)
    full = (
        torch.cdist(
            a.flatten(1).double(),
            b.flatten(1).double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        / 255
    )
    want = full.topk(2, largest=False)
    assert (
        torch.allclose(d, want.values)
        and torch.equal(i, want.indices)
        and d[3, 0] == 0
        and i[3, 0] == 6000
    )


def test_heldout_loss_is_the_hand_loop(digits):
    torch.manual_seed(0)
    net = nn.Conv2d(1, 1, 3, padding=1)
    x = digits.test_images[::60]
    diffusion = Diffusion(DiffusionConfig(process="cosine", prediction="v"))
    model = lambda x, t, y=None: net(x) + (0 if y is None else y.view(-1, 1, 1, 1) / 10)
    for labels in (None, digits.test_labels[::60]):
        got = M.heldout_loss(model, diffusion, x, labels, levels=4, seed=3, batch=2)
        for l in range(4):
            t = diffusion.process.sample_t(torch.tensor([(l + 0.5) / 4], dtype=torch.float64))
            eps = torch.randn(
                tuple(x.shape), generator=torch.Generator().manual_seed(key_seed("heldout", 3, l))
            )
            cond = lambda j: {} if labels is None else {"y": labels[j : j + 1]}
            with torch.no_grad():
                hand = [
                    diffusion.loss(
                        model, x[j : j + 1].float() / 127.5 - 1, t, eps[j : j + 1], **cond(j)
                    ).item()
                    for j in range(len(x))
                ]
            assert (
                got["loss"][l] == pytest.approx(np.mean(hand), rel=1e-5)
                and got["t"][l] == t.item()
                and got["lam"][l] == pytest.approx(diffusion.process.lam(t).item())
            )
    assert not np.allclose(
        M.heldout_loss(model, diffusion, x, levels=2)["loss"],
        M.heldout_loss(model, diffusion, x, levels=2, seed=1)["loss"],
        rtol=1e-6,
    )


def test_damage_and_bootstrap(digits):
    x, y = digits.test_images, digits.test_labels
    gone, left = M.damage(x, y, "class", 1)
    assert 3 not in left and len(gone) == len(left) == 297 - (y == 3).sum()
    half, left = M.damage(x, y, "class", 0.5)
    assert abs((left == 3).sum() - (y == 3).sum() / 2) <= 1
    grid = M.damage(torch.full((50, 1, 8, 8), 128, dtype=torch.uint8), y[:50], "patches", 20)[
        0
    ].float()
    assert torch.equal(grid[..., ::2, ::2], grid[..., 1::2, 1::2]) and 15 < grid.std() < 25
    lo, hi = M.bootstrap_interval(np.r_[np.zeros(50), np.ones(50)])
    assert 0.37 < lo < 0.45 < 0.55 < hi < 0.63 and (lo, hi) == M.bootstrap_interval(
        np.r_[np.zeros(50), np.ones(50)]
    )


# ---- sFID, reference files, data without pixels, judges


class StandIn(nn.Module):
    "16 features, 12 logits, 10 spatial features from one pass, as from Inception's extractor."

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = [torch.randn(192, k, generator=g) / 14 for k in (16, 12, 10)]
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return tuple((x.flatten(1).float() / 64 - 1) @ w for w in self.w)


@pytest.fixture
def stand_in(monkeypatch):
    net = StandIn()
    monkeypatch.setattr(M, "make_extractor", lambda name, device="cpu": net)
    monkeypatch.setitem(
        M.NETWORKS,
        "inception",
        replace(M.network("inception"), dim=16, spatial=10, sha256="stand-in"),
    )
    return net


@pytest.fixture
def latent(digits):
    return replace(
        digits, train_images=None, stream=None, test_images=digits.test_images[:0], sha256="1" * 64
    )


TABLE7 = ("fid", "sfid", "inception_score", "precision_inception", "recall_inception")


def rgb(x):
    return x.expand(-1, 3, -1, -1)


def test_spatial_features_in_one_pass(tmp_path, monkeypatch, digits):
    import torch_fidelity.feature_extractor_inceptionv3 as m

    with (
        patch.object(m, "load_state_dict_from_url", lambda *a, **k: {}),
        patch.object(m.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None),
    ):
        net = m.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    g = torch.Generator().manual_seed(0)
    for c in net.modules():
        if isinstance(c, nn.Conv2d):
            c.weight.data.normal_(0, (2 / c.weight[0].numel()) ** 0.5, generator=g)
        if isinstance(c, nn.BatchNorm2d):
            c.running_mean.normal_(0, 0.1, generator=g)
            c.bias.data.normal_(0, 0.1, generator=g)
    f = tmp_path / M.network("inception").file
    torch.save(net.state_dict(), f)
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(
        M.NETWORKS,
        "inception",
        replace(M.network("inception"), sha256=hashlib.sha256(f.read_bytes()).hexdigest()),
    )
    seen = []
    net.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, out: seen.append((args[0], out))
    )
    x = digits.test_images[:2]
    pooled, logits = net(rgb(x).contiguous())
    block_input, after = seen[0]
    conv = torch.nn.functional.conv2d(block_input, net.Mixed_6d.branch1x1.conv.weight)
    for layer, want in (("conv", conv), ("relu", after)):
        monkeypatch.setattr(M, "SPATIAL_LAYER", layer)
        ours = M.make_extractor("inception")
        calls = []
        ours.Conv2d_1a_3x3.register_forward_hook(lambda *a: calls.append(1))
        got = ours(rgb(x).contiguous())
        assert (
            len(calls) == 1
            and ours.features_list == ["2048", "logits_unbiased", "spatial"]
            and [tuple(v.shape) for v in got] == [(2, 2048), (2, 1008), (2, 2023)]
        )
        want = (
            want[:, :7].permute(0, 2, 3, 1).reshape(2, 2023)
        )  # rows, columns, channels: the order of guided-diffusion's files
        for a, b in zip(got, (pooled, logits, want)):
            assert torch.allclose(a, b, atol=1e-4 * b.std().item())
    again = M.extract(x, "inception")["spatial"]
    assert (
        torch.allclose(again, want, atol=1e-4 * want.std().item()) and again.dtype == torch.float32
    )  # of the layer set last
    assert (conv < 0).any() and not torch.allclose(conv, after)
    from torch_fidelity import registry

    name = M.register_network("inception")
    one = registry.FEATURE_EXTRACTORS_REGISTRY[name](name, ["spatial"], str(f))
    assert M.register_network("inception") == name
    assert (
        torch.allclose(one(rgb(x).contiguous())[0], want, atol=1e-4 * want.std().item())
        and one.get_default_feature_layer_for_metric("fid") == "2048"
        and "192" in one.get_provided_features_list()
    )


def test_table7_from_one_call(digits, stand_in, tmp_path):
    from scipy.linalg import sqrtm

    rows, s = M.measure_images(digits.test_images, None, digits, "inception", cache_dir=tmp_path)
    r = by_name(rows)
    o, t = (
        dict(zip(("features", "logits", "spatial"), StandIn()(rgb(x))))
        for x in (digits.test_images, digits.train_images)
    )

    def distance(a, b):
        (m, c), (n, d) = (
            (v.double().mean(0).numpy(), np.cov(v.double().numpy().T)) for v in (a, b)
        )
        return ((m - n) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)

    assert r["fid"]["value"] == pytest.approx(
        distance(o["features"], t["features"]), rel=1e-5
    ) and r["sfid"]["value"] == pytest.approx(distance(o["spatial"], t["spatial"]), rel=1e-5)
    assert (
        all(r[k]["value"] is not None and r[k]["num_samples"] == 297 for k in TABLE7)
        and str(s["spatial_layer"]) == M.SPATIAL_LAYERS[M.SPATIAL_LAYER]
        and s["spatial_cov"].shape == (10, 10)
    )
    buf = io.BytesIO()
    np.savez(buf, **s)
    buf.seek(0)
    with np.load(buf, allow_pickle=False) as z:
        assert M.recompute(dict(z)) == rows
    before = stand_in.passes
    warm = M.measure_images(digits.test_images, None, digits, "inception", cache_dir=tmp_path)[0]
    assert warm == rows and stand_in.passes - before == -(-297 // 64)
    few = by_name(M.measure_images(digits.test_images[:9], None, digits, "inception")[0])
    assert (
        "sFID: 9 images for 10 features" in few["sfid"]["why"]
        and "at least 10" in few["inception_score"]["why"]
    )


def test_reference_replaces_the_training_images(digits, latent, stand_in, tmp_path):
    full = by_name(M.measure_images(digits.test_images, None, digits, "inception")[0])
    f = M.save_reference(tmp_path / "r.npz", digits, images=1500)
    with np.load(f, allow_pickle=False) as z:
        assert (
            z["mu"].dtype == z["sigma_s"].dtype == np.float64
            and z["n"] == 1500
            and z["arr_0"].shape == (1500, 8, 8, 1)
        )
        parts = dict(z)
    rows, s = M.measure_images(digits.test_images, None, latent, "inception", reference=f)
    r = by_name(rows)
    for k in TABLE7:
        assert r[k]["value"] == pytest.approx(full[k]["value"], rel=1e-5)
    assert (
        str(s["reference_sha256"]) == hashlib.sha256(f.read_bytes()).hexdigest()
        and s["train_n"] == 1500
    )
    np.savez(tmp_path / "theirs.npz", mu=parts["mu"], sigma=parts["sigma"])
    rows, s = M.measure_images(
        digits.test_images, None, latent, "inception", reference=str(tmp_path / "theirs.npz")
    )
    r = by_name(rows)
    assert (
        r["fid"]["value"] == full["fid"]["value"]
        and "no mu_s" in r["sfid"]["why"]
        and "not at hand; reference=PATH" in r["precision_inception"]["why"]
        and M.recompute(s) == rows
        and s["train_n"] == 0
    )
    shifted = dict(parts, mu=parts["mu"] + 1, mu_s=parts["mu_s"] - 2)
    np.savez(tmp_path / "other.npz", **shifted)
    other = by_name(
        M.measure_images(
            digits.test_images, None, digits, "inception", reference=tmp_path / "other.npz"
        )[0]
    )
    o = StandIn()(rgb(digits.test_images))
    gap = lambda v, m: ((v.double().mean(0).numpy() - m) ** 2).sum()
    assert other["fid"]["value"] - full["fid"]["value"] == pytest.approx(
        gap(o[0], parts["mu"] + 1) - gap(o[0], parts["mu"]), rel=1e-4
    )
    assert other["sfid"]["value"] - full["sfid"]["value"] == pytest.approx(
        gap(o[2], parts["mu_s"] - 2) - gap(o[2], parts["mu_s"]), rel=1e-4
    )
    np.savez(tmp_path / "wide.npz", **dict(parts, arr_0=np.zeros((9, 4, 4, 3), np.uint8)))
    assert (
        "arr_0 is uint8 (9, 4, 4, 3)"
        in by_name(
            M.measure_images(
                digits.test_images, None, latent, "inception", reference=tmp_path / "wide.npz"
            )[0]
        )["recall_inception"]["why"]
    )


@pytest.mark.parametrize(
    "mean, stated, layer",
    [
        (1.0, None, "relu"),
        (-1.0, None, "conv"),
        (1.0, "conv", "conv"),
        (-1.0, "relu", "relu"),
        (0.0, None, None),
    ],
)
def test_spatial_statistics_of_another_layer_are_refused(
    stand_in, tmp_path, monkeypatch, mean, stated, layer
):
    np.savez(
        tmp_path / "f.npz",
        mu=np.zeros(16),
        sigma=np.eye(16),
        mu_s=np.full(10, mean),
        sigma_s=np.eye(10),
        **({} if stated is None else {"spatial_layer": np.array(stated)}),
    )
    for ours in M.SPATIAL_LAYERS:
        monkeypatch.setattr(M, "SPATIAL_LAYER", ours)
        r = M.read_reference(tmp_path / "f.npz", "inception")
        assert (r.spatial is not None) == (layer in (None, ours)) and (
            r.spatial is not None or f"of the layer `{layer}`" in r.why
        )


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"mu": np.zeros(64)}, "no sigma"),
        ({"a": np.zeros(3)}, "no mu and no sigma, only a"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, r"\(64,\) and \(64, 64\)"),
        ({"mu": np.zeros((1, 64)), "sigma": np.eye(64)}, "expected floats"),
        ({"mu": np.zeros(64, int), "sigma": np.eye(64)}, "expected floats"),
        ({"mu": np.full(64, np.inf), "sigma": np.eye(64)}, "not finite"),
        ({"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))}, "not symmetric"),
        ({"mu": np.zeros(64), "sigma": -np.eye(64)}, "negative variance"),
        (
            {"mu": np.zeros(64), "sigma": np.eye(64), "network": np.array("inception")},
            "of inception's features",
        ),
        ({"mu": np.array([{}]), "sigma": np.eye(64)}, "can't be read"),
    ],
)
def test_bad_reference(digits, tmp_path, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ParameterError, match=says) as e:
        M.measure_images(
            digits.test_images, None, digits, "digits_cnn", reference=tmp_path / "bad.npz"
        )
    assert "bad.npz" in str(e.value)


def test_unreadable_reference(digits, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(64), sigma=np.eye(64))
    whole = (tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "b.npy", np.zeros(3))
    for bad in (b"", b"mu", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        (tmp_path / "a.npz").write_bytes(bad)
        with pytest.raises(ParameterError, match="can't be read as npz"):
            M.read_reference(tmp_path / "a.npz", "digits_cnn")
    with pytest.raises(ParameterError, match="can't be read as npz"):
        M.read_reference(tmp_path / "b.npy", "digits_cnn")
    with pytest.raises(FileNotFoundError, match="save_reference"):
        M.measure_images(
            digits.test_images, None, digits, "digits_cnn", reference=tmp_path / "nowhere.npz"
        )
    with pytest.raises(ParameterError, match="features = none"):
        M.measure_images(digits.test_images, None, digits, "none", reference=tmp_path / "a.npz")


def test_no_network(digits, latent):
    assert (
        M.network("none").dim == 0
        and M.feature_status("none")[0]
        and M.metric_name("border_energy_p{p}", "none", 2) == "border_energy_p2"
        and "none" not in M.NETWORKS
        and not M.knows_classes("none", digits)
    )
    with patch.object(M, "extract", side_effect=AssertionError("a network was asked")):
        rows, s = M.measure_images(
            digits.test_images,
            digits.test_labels,
            digits,
            "none",
            patch_size=2,
            reference="",
            extra={"prompt_shape_seen": np.int64([1, 4])},
        )
    r = by_name(rows)
    assert (
        set(r)
        == {
            "border_energy_p2",
            "nn_train_median",
            "nn_heldout_median",
            "nn_ratio",
            "copies",
            "prompt_shape_seen",
        }
        and M.recompute(s) == rows
    )
    full = by_name(
        M.measure_images(digits.test_images, None, digits, "digits_cnn", patch_size=2)[0]
    )
    assert all(r[k] == full[k] for k in set(r) - {"prompt_shape_seen"})
    for f in (
        lambda: M.extract(digits.test_images, "none"),
        lambda: M.load_weights("none"),
        lambda: M.make_extractor("none"),
    ):
        with pytest.raises(ParameterError, match="no weights and no features"):
            f()


def test_data_without_pixels(digits, latent):
    for labels in (latent.test_labels, latent.test_labels[:0]):  # held-out latents, or none
        data = replace(latent, test_labels=labels)
        rows, s = M.measure_images(
            digits.test_images, digits.test_labels, data, "digits_cnn", patch_size=2
        )
        r = by_name(rows)
        assert (
            all(v["value"] is None and v["why"] for v in r.values())
            and len(r) == 13
            and M.recompute(s) == rows
        )
        assert (
            "pixels of the training images" in r["border_energy_p2"]["why"]
            and ("pixels of the held-out" if len(labels) else "holdout")
            in r["kid_digits_cnn_test"]["why"]
        )
        assert (
            by_name(M.measure_images(digits.test_images, None, data, "none", patch_size=2)[0])[
                "copies"
            ]["value"]
            is None
        )
    r = by_name(
        M.measure_images(
            digits.test_images,
            None,
            replace(latent, train_images=digits.train_images),
            "digits_cnn",
            patch_size=2,
        )[0]
    )  # nothing held out
    assert {k for k, v in r.items() if v["value"] is not None} == {
        "fd_digits_cnn_train",
        "precision_digits_cnn",
        "recall_digits_cnn",
        "border_energy_p2",
        "nn_train_median",
    }
    r = by_name(
        M.measure_images(
            digits.test_images, None, replace(latent, test_images=digits.test_images), "digits_cnn"
        )[0]
    )  # nothing but held-out images
    assert {k for k, v in r.items() if v["value"] is not None} == {
        "fd_digits_cnn_test",
        "kid_digits_cnn_test",
    }


def test_classes_are_known_by_their_pixels(digits):
    data = replace(digits, sha256="latents")
    one = lambda: by_name(
        M.measure_images(digits.test_images, digits.test_labels, data, "digits_cnn")[0]
    )["class_agreement"]
    assert one()["value"] is None
    data.pixels_sha256 = digits.sha256
    assert one()["value"] > 0.97


def test_every_formula_is_recomputed():
    g = np.random.default_rng(0)
    cov = lambda: np.cov(g.normal(size=(50, 4)).T)
    s = {"features": "inception", "patch_size": np.int64(2), "n": np.int64(90), "why": "{}"}
    for who in ("sample", "train", "test", "real", "spatial", "spatial_train"):
        s.update({f"{who}_n": np.int64(90), f"{who}_mean": g.normal(size=4), f"{who}_cov": cov()})
    s.update(
        kid=g.normal(size=7),
        scores=g.uniform(1, 9, 10),
        neighbours=np.array([[30, 40], [10, 80]]),
        confusion=g.integers(1, 9, (3, 3)),
        classes=np.array([4, 4, 8]),
        border=np.array([[2.0, 1], [1, 4]]),
        nn_sample=g.uniform(1, 2, 9),
        nn_heldout=g.uniform(1, 2, 8),
        **{k: np.int64([i, 20]) for i, k in enumerate(M.PROMPTS)},
    )
    buf = io.BytesIO()
    np.savez(buf, **s)
    buf.seek(0)
    with np.load(buf, allow_pickle=False) as z:
        rows = M.recompute(dict(z))
    r = by_name(rows)
    assert (
        [x["metric"] for x in rows] == [M.metric_name(f, "inception", 2) for f, *_ in M.FORMULAS]
        and all(x["value"] is not None for x in rows)
        and len(M.PROMPTS) == 10
    )
    from scipy.linalg import sqrtm

    def distance(a, b):
        return ((s[f"{a}_mean"] - s[f"{b}_mean"]) ** 2).sum() + np.trace(
            s[f"{a}_cov"] + s[f"{b}_cov"] - 2 * sqrtm(s[f"{a}_cov"] @ s[f"{b}_cov"]).real
        )

    want = dict(
        fid=distance("sample", "train"),
        fd_inception_test=distance("sample", "test"),
        fd_inception_real=distance("real", "test"),
        sfid=distance("spatial", "spatial_train"),
        kid_inception_test=s["kid"].mean(),
        inception_score=s["scores"].mean(),
        precision_inception=0.75,
        recall_inception=0.125,
        class_agreement=np.diag(s["confusion"]).sum() / s["confusion"].sum(),
        class_entropy=1.5 * np.log(2),
        border_energy_p2=8,
        nn_train_median=np.median(s["nn_sample"]),
        nn_heldout_median=np.median(s["nn_heldout"]),
        nn_ratio=np.median(s["nn_sample"]) / np.median(s["nn_heldout"]),
        copies=(s["nn_sample"] <= np.percentile(s["nn_heldout"], 1)).mean(),
        **{
            f"prompt_{a}_{b}": (2 * i + j) / 20
            for i, a in enumerate(("colour", "shape", "position", "count", "exact"))
            for j, b in enumerate(("seen", "unseen"))
        },
    )
    assert (
        set(want) == set(r)
        and {k: v["value"] for k, v in r.items()} == pytest.approx(want, rel=1e-9)
        and r["prompt_exact_unseen"]["num_samples"] == 20
        and r["sfid"]["num_samples"] == 90
    )


def test_judge(digits):
    rows, s = M.measure_images(
        digits.test_images[:9],
        None,
        digits,
        "none",
        extra={
            "prompt_count_seen": [3, 4],
            "prompt_exact_unseen": np.zeros(2, int),
            "notes": np.arange(3),
        },
    )
    r = by_name(rows)
    assert (
        r["prompt_count_seen"] == {"metric": "prompt_count_seen", "value": 0.75, "num_samples": 4}
        and r["prompt_exact_unseen"]["value"] is None
        and "no such prompt" in r["prompt_exact_unseen"]["why"]
        and s["notes"].tolist() == [0, 1, 2]
    )
    for wrong in (
        {"prompt_count_seen": [5, 4]},
        {"prompt_count_seen": [-1, 4]},
        {"prompt_count_seen": [1, 2, 3]},
        {"prompt_count_seen": 0.5},
        {"n": 1},
        {"why": "x"},
        {"features": "x"},
        {"confusion": np.eye(2)},
        {"nn_heldout": [1.0]},
        {"o": np.array([None])},
    ):
        with pytest.raises(ParameterError, match="extra: "):
            M.measure_images(digits.test_images[:9], None, digits, "none", extra=wrong)


def test_large_sets_stay_where_they_are(tmp_path, latent, monkeypatch):
    "A memory-mapped set of large images: batches are small, the whole is never converted."
    disk = np.memmap(tmp_path / "x.u8", np.uint8, "w+", shape=(700, 3, 64, 64))
    disk[:] = np.random.default_rng(0).integers(0, 256, disk.shape, np.uint8)
    disk.flush()
    x = torch.from_numpy(np.memmap(tmp_path / "x.u8", np.uint8, "c", shape=disk.shape))
    whole, sizes = x.numel(), []
    for name in ("float", "double", "contiguous", "to", "clone"):
        kept = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, kept=kept, **k: (sizes.append(self.numel()), kept(self, *a, **k))[1],
        )
    monkeypatch.setattr(
        M,
        "make_extractor",
        lambda name, device="cpu": (
            lambda b: tuple(b.flatten(1)[:, :k].float() for k in (16, 12, 10))
        ),
    )
    monkeypatch.setitem(
        M.NETWORKS, "inception", replace(M.network("inception"), dim=16, spatial=10)
    )
    np.savez(
        tmp_path / "r.npz", mu=np.zeros(16), sigma=np.eye(16), mu_s=np.zeros(10), sigma_s=np.eye(10)
    )
    data = replace(latent, test_images=torch.zeros(0, 3, 64, 64, dtype=torch.uint8))
    r = by_name(M.measure_images(x, None, data, "inception", reference=tmp_path / "r.npz")[0])
    assert (
        all(r[k]["value"] is not None for k in TABLE7[:3])
        and sizes
        and max(sizes) <= 64 * x[0].numel() < whole / 10
    )


def test_statistics_of_parts(digits):
    whole = M.split_stats(digits, "digits_cnn", "train")["features"]
    parts = M.split_stats(digits, "digits_cnn", "train", part=400)["features"]
    assert (
        parts.n == 1500
        and np.allclose(parts.mean, whole.mean, atol=1e-12)
        and np.allclose(parts.cov, whole.cov, atol=1e-9)
        and M.Stats.merge([whole]) is whole
    )
    big = torch.randint(
        0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    d = (
        big[..., 1:].double() - big[..., :-1].double(),
        big[..., 1:, :].double() - big[..., :-1, :].double(),
    )
    across = [d[0][..., 7::8].square().mean(), d[1][..., 7::8, :].square().mean()]
    assert M.border_energy(big, 8)[0] == pytest.approx(np.mean(across) / 255**2, rel=1e-6)


def test_heldout_loss_with_tokens(digits):
    torch.manual_seed(0)
    net = nn.Conv2d(1, 1, 3, padding=1)
    x = digits.test_images[::60]
    diffusion = Diffusion(DiffusionConfig(process="vp"))
    tokens = torch.randn(len(x), 4, 6).half()

    def model(x, t, y=None, context=None):
        assert context.dtype == torch.float32 and context.shape == (len(x), 4, 6)
        return (
            net(x)
            + context.mean((1, 2)).view(-1, 1, 1, 1)
            + (0 if y is None else y.view(-1, 1, 1, 1) / 10)
        )

    for labels in (None, digits.test_labels[::60]):
        got = M.heldout_loss(model, diffusion, x, labels, 3, seed=3, batch=2, context=tokens)
        for l in range(3):
            t = diffusion.process.sample_t(torch.tensor([(l + 0.5) / 3], dtype=torch.float64))
            eps = torch.randn(
                tuple(x.shape), generator=torch.Generator().manual_seed(key_seed("heldout", 3, l))
            )
            cond = lambda j: (
                {"context": tokens[j : j + 1].float()}
                | ({} if labels is None else {"y": labels[j : j + 1]})
            )
            with torch.no_grad():
                hand = [
                    diffusion.loss(
                        model, x[j : j + 1].float() / 127.5 - 1, t, eps[j : j + 1], **cond(j)
                    ).item()
                    for j in range(len(x))
                ]
            assert got["loss"][l] == pytest.approx(np.mean(hand), rel=1e-5)
    assert M.heldout_loss(
        model, diffusion, x.float() / 127.5 - 1, labels, 3, seed=3, context=tokens
    )["loss"] == pytest.approx(got["loss"], rel=1e-6)  # already on the network's scale
    with pytest.raises(ParameterError, match="context: 2 for 5 images"):
        M.heldout_loss(model, diffusion, x, context=tokens[:2])
