"Feature extractors, references, distances, measurements and the held-out loss."

import builtins
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from uvit_repro.config import LAPTOP, DiffusionConfig, ParameterError, key_seed
from uvit_repro.data import features, references
from uvit_repro.data.digits import load_digits
from uvit_repro.data.features import (
    FEATURE_EXTRACTORS,
    CifarResNet,
    FeatureNetwork,
    feature_extractor,
    feature_status,
    feature_weights,
    read_weights,
)
from uvit_repro.data.references import FeatureStatistics, RealImages, read_reference
from uvit_repro.diffusion import Diffusion
from uvit_repro.metrics import (
    frechet,
    heldout_loss,
    inception_scores,
    kid_subsets,
    memorized_share,
    nearest_training,
    patch_seam_energy,
    precision_recall,
)
from uvit_repro.runs.measurement import (
    METRICS,
    PROMPTS,
    MeasureOptions,
    measure_images,
    metric_name,
    recompute,
)

DIGITS = MeasureOptions("digits_cnn", patch_size=2)


def extract(images, name):
    return FeatureNetwork(name).extract(images)


@pytest.fixture(scope="module")
def digits():
    return load_digits(LAPTOP.data)


@pytest.fixture(scope="module")
def judged(digits):
    return {s: extract(getattr(digits, f"{s}_images"), "digits_cnn") for s in ("train", "test")}


def by_name(rows):
    return {r["metric"]: r for r in rows}


def measure(images, labels, data, options=DIGITS, **extra):
    return by_name(measure_images(images, labels, data, options, **extra)[0])


def through_a_file(stats):
    buffer = io.BytesIO()
    np.savez(buffer, **stats)
    buffer.seek(0)
    with np.load(buffer, allow_pickle=False) as z:
        return dict(z)


# ---- feature extractors


def test_import_is_light():
    heavy = ("torch_fidelity", "torchvision", "diffusers", "sklearn", "matplotlib")
    code = f"import sys, uvit_repro.runs.measurement; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_digits_judge_knows_its_digits(digits, judged):
    right = (judged["test"]["logits"].argmax(1) == digits.test_labels).float().mean()
    assert right >= 0.97
    assert torch.linalg.matrix_rank(torch.cov(judged["train"]["features"].double().T)) == 64


def test_missing_and_wrong_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("UVIT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for name in ("inception", "resnet20_cifar10"):
        spec = feature_extractor(name)
        assert feature_weights(name) is None and not feature_status(name)[0]
        with pytest.raises(FileNotFoundError, match="curl -L") as e:
            extract(images, name)
        assert spec.url in str(e.value) and str(tmp_path / spec.file) in str(e.value)
        (tmp_path / spec.file).write_bytes(b"truncated")
        with pytest.raises(ValueError, match=spec.sha256):
            extract(images, name)
        (tmp_path / spec.file).unlink()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    found = tmp_path / "hub" / "checkpoints" / feature_extractor("inception").file
    found.write_bytes(b"x")
    assert feature_weights("inception") == found


def install(monkeypatch, folder, name, content):
    "Write a weights file and accept its checksum."
    path = folder / feature_extractor(name).file
    torch.save(content, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("UVIT_WEIGHTS", str(folder))
    monkeypatch.setitem(FEATURE_EXTRACTORS, name, replace(feature_extractor(name), sha256=sha256))
    return path


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_resnet_without_torch_fidelity(tmp_path, monkeypatch):
    "The public file format, distances included, with torch-fidelity not installed."
    net = CifarResNet(3).eval()
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    install(monkeypatch, tmp_path, "resnet20_cifar10", {"state_dict": state, "best_prec1": 0.0})
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch_fidelity"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    x = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8)
    out = extract(x, "resnet20_cifar10")
    with torch.no_grad():
        want = net(x)
    assert torch.allclose(out["features"], want[0], atol=1e-5)
    assert torch.allclose(out["logits"], want[1], atol=1e-4)
    grey, rgb = x[:4, :1], x[:4, :1].repeat(1, 3, 1, 1)
    a, b = (extract(v, "resnet20_cifar10")["features"] for v in (grey, rgb))
    assert torch.equal(a, b)
    parts = [out["features"], out["features"].flip(0)]
    assert frechet(*map(FeatureStatistics.of, parts)) < 1e-6
    assert np.isfinite(kid_subsets(*parts)).all() and precision_recall(*parts)[0, 0] == 80


def test_weights_are_never_unpickled(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path, "resnet20_cifar10", {"state_dict": Bomb(tmp_path / "pwned")})
    with pytest.raises(Exception, match="weights_only|Weights only"):
        read_weights("resnet20_cifar10")
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def random_inception(tmp_path, monkeypatch):
    "torch-fidelity's own network with random weights, whose file is accepted as Inception's."
    import torch_fidelity.feature_extractor_inceptionv3 as module

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    with monkeypatch.context() as m:
        m.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        net = Random("inception-v3-compat", ["2048", "logits_unbiased"])
    g = torch.Generator().manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            scale = (2 / part.weight[0].numel()) ** 0.5
            part.weight.data.normal_(0, scale, generator=g)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=g)
    return net, install(monkeypatch, tmp_path, "inception", net.state_dict())


def test_inception_loads_the_bytes_that_were_checked(random_inception, monkeypatch):
    "The file is swapped for a hostile one right after its checksum was compared."
    net, path = random_inception
    checked = features._checked_weights

    def check_then_swap(name):
        blob = checked(name)
        torch.save(Bomb(path.parent / "pwned"), path)
        return blob

    monkeypatch.setattr(features, "_checked_weights", check_then_swap)
    built = features.build_extractor("inception")
    assert not (path.parent / "pwned").exists()
    assert torch.equal(built.net.fc.weight, net.fc.weight)


def test_spatial_features_come_from_the_same_pass(random_inception, digits):
    net, _ = random_inception
    seen = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, a, out: seen.append(out))
    x = digits.test_images[:2]
    pooled, logits = net(x.expand(-1, 3, -1, -1).contiguous())
    rows_columns_channels = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, 2023)
    out = extract(x, "inception")
    want = {"features": pooled, "logits": logits, "spatial": rows_columns_channels}
    for kind, v in want.items():
        assert torch.allclose(out[kind], v, atol=1e-4 * v.std().item())


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
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "none", "no weights and no features"),
    ],
)
def test_bad_images(images, name, says):
    with pytest.raises(ParameterError, match=says):
        extract(images, name)


def test_features_do_not_depend_on_tf32(digits, monkeypatch):
    "The network runs in full float32, and the process's own setting comes back."
    seen = []

    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(settings())
            return (x.flatten(1).float(),)

    monkeypatch.setattr(features, "build_extractor", lambda name: Spy())
    before = settings()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        extract(digits.test_images[:3], "digits_cnn")
        assert settings() == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert seen == [(False, False)]


# ---- distances


def distance_by_scipy(a, b):
    (m, c), (n, d) = ((v.double().mean(0).numpy(), np.cov(v.double().numpy().T)) for v in (a, b))
    return ((m - n) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)


def test_frechet_closed_form_and_refusal():
    rng = np.random.default_rng(0)
    m, s = rng.normal(size=(2, 12)), rng.uniform(0.2, 2, (2, 12))
    q = np.linalg.qr(rng.normal(size=(12, 12)))[0]  # one rotation for both
    a, b = (FeatureStatistics(99, q @ m[i], q @ np.diag(s[i] ** 2) @ q.T) for i in (0, 1))
    assert frechet(a, b) == pytest.approx(((m[0] - m[1]) ** 2 + (s[0] - s[1]) ** 2).sum(), rel=1e-9)
    with pytest.raises(ValueError, match="at least 13"):
        FeatureStatistics.of(torch.randn(12, 12))
    with pytest.raises(ValueError, match="at least 13"):
        frechet(a, FeatureStatistics(12, b.mean, b.cov))


def test_equals_torch_fidelity(judged):
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import prc_features_to_metric

    few, held = judged["train"]["features"][::4], judged["test"]["features"]
    a, b = FeatureStatistics.of(few), FeatureStatistics.of(held)
    mu_sigma = ({"mu": s.mean, "sigma": s.cov} for s in (a, b))
    assert frechet(a, b) == fid_statistics_to_metric(*mu_sigma, False)["frechet_inception_distance"]
    rng, ours = np.random.RandomState(2020), kid_subsets(few, held, subsets=1)
    pair = [v[rng.choice(len(v), 297, replace=False)].double().numpy() for v in (few, held)]
    assert ours[0] == pytest.approx(kernel_mmd(*pair), rel=1e-12)
    theirs = prc_features_to_metric(few.double(), held.double(), save_cpu_ram=True, verbose=False)
    counts = precision_recall(few, held)
    ratios = (counts[:, 0] / counts[:, 1]).tolist()
    assert ratios == pytest.approx([theirs["precision"], theirs["recall"]], abs=1e-6)
    logits = judged["test"]["logits"]
    score = isc_features_to_metric(logits)["inception_score_mean"]
    assert inception_scores(logits).mean() == pytest.approx(score, rel=1e-12)


def test_nearest_against_brute_force():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (n, 3, 5, 5), generator=g, dtype=torch.uint8) for n in (11, 6001))
    b[6000] = a[3]
    i, d = nearest_training(a, b, k=2)
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    want = (torch.cdist(a.flatten(1).double(), b.flatten(1).double(), **exact) / 255).topk(
        2, largest=False
    )
    assert torch.allclose(d, want.values) and torch.equal(i, want.indices)
    assert d[3, 0] == 0 and i[3, 0] == 6000
    assert nearest_training(a.flip(-1), b, mirror=True)[1][3, 0] == 0
    with pytest.raises(ValueError, match="1 to 6001"):
        nearest_training(a, b, k=0)


def smooth_images(n, seed):
    "Images of a broad spectrum: a random level, a random slope, a little texture."
    g = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 1, 16)
    level = 128 + 40 * torch.randn(n, 1, 1, 1, generator=g)
    x = level + 30 * torch.randn(n, 1, 1, 1, generator=g) * ramp
    return x.expand(-1, -1, 16, -1), 25 * torch.randn(n, 1, 16, 16, generator=g)


def test_blurred_images_are_not_memorised():
    def uint8(x):
        return x.clamp(0, 255).to(torch.uint8)

    smooth, texture = smooth_images(1000, 0)
    train = uint8(smooth + texture)

    def neighbours(x):
        return nearest_training(x, train, 10)[1][:, [0, 9]].numpy()

    smooth, texture = smooth_images(300, 1)
    held, blurred = neighbours(uint8(smooth + texture)), neighbours(uint8(smooth))
    noise = 4 * torch.randn(100, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    copies = neighbours(uint8(train[:100] + noise))
    limit = np.percentile(held[:, 0], 1)
    assert (blurred[:, 0] <= limit).mean() > 0.9, "the first edition's measure flags them"
    assert memorized_share(blurred, held) < 0.02
    assert memorized_share(held, held) <= 0.01
    assert memorized_share(copies, held) == 1


def test_seams_by_hand():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=g)
    columns, rows = x[..., 1:].double() - x[..., :-1], x[..., 1:, :].double() - x[..., :-1, :]
    across = [columns[..., 7::8].square().mean(), rows[..., 7::8, :].square().mean()]
    assert patch_seam_energy(x, 8)[0] == pytest.approx(np.mean(across) / 255**2, rel=1e-6)
    for size, says in ((1, "no inside"), (32, "no border")):
        with pytest.raises(ValueError, match=says):
            patch_seam_energy(x, size)


# ---- measurements


def test_report_and_recompute(digits, tmp_path):
    options = replace(DIGITS, cache_dir=tmp_path)
    rows, stats = measure_images(digits.test_images, digits.test_labels, digits, options)
    assert all(np.asarray(v).dtype.kind != "O" for v in stats.values())
    assert recompute(through_a_file(stats)) == rows
    r = by_name(rows)
    distances = {f"{m}_digits_cnn" for m in ("precision", "recall")}
    distances |= {f"{m}_digits_cnn_{o}" for m, o in (("kid", "test"), ("fd", "train"))}
    distances |= {"fd_digits_cnn_test", "fd_digits_cnn_real"}
    near = {"nn_train_median", "nn_heldout_median", "nn_ratio", "nn_close", "memorized"}
    assert set(r) == distances | near | {"class_agreement", "class_entropy", "patch_seam_energy_p2"}
    assert np.log(10) - r["class_entropy"]["value"] < 0.01
    assert r["class_agreement"]["value"] > 0.97 and r["memorized"]["value"] <= 0.01
    assert r["fd_digits_cnn_train"]["num_samples"] == 297
    stats["confusion"] = np.roll(stats["confusion"], 1, axis=1)
    assert by_name(recompute(stats))["class_agreement"]["value"] < 0.05
    assert measure_images(digits.test_images, digits.test_labels, digits, options)[0] == rows


def test_statistics_of_the_first_edition_give_their_numbers(digits):
    "Without the tenth neighbours there is no `memorized`; everything else is recomputed."
    rows, stats = measure_images(digits.test_images, None, digits, DIGITS)
    old = {k: v for k, v in stats.items() if not k.startswith("nn10")}
    assert recompute(old) == [r for r in rows if r["metric"] != "memorized"]


def test_returning_the_training_set_does_not_pass(digits):
    r = measure(digits.train_images, digits.train_labels, digits)
    assert r["nn_ratio"]["value"] == 0 and r["memorized"]["value"] == 1
    assert r["fd_digits_cnn_train"]["value"] < 1e-6
    mirrored = digits.train_images[::3].flip(-1)
    plain, both = (
        measure(mirrored, None, digits, replace(DIGITS, mirror=m)) for m in (False, True)
    )
    assert plain["memorized"]["value"] < 0.1 and both["memorized"]["value"] > 0.99


def test_what_the_data_cannot_support(digits):
    bare = replace(
        digits, test_images=digits.test_images[:0], test_labels=digits.test_labels[:0], sha256="0"
    )
    x, y = digits.test_images, digits.test_labels
    r = measure(x[:64], y[:64], bare, replace(DIGITS, patch_size=8))
    for name, why in (
        ("fd_digits_cnn_train", "at least 65"),
        ("fd_digits_cnn_test", "at least 65"),
        ("kid_digits_cnn_test", "holdout"),
        ("class_agreement", "does not tell apart"),
        ("class_entropy", "does not tell apart"),
        ("patch_seam_energy_p8", "no border"),
        ("nn_ratio", "holdout"),
        ("memorized", "holdout"),
    ):
        assert r[name]["value"] is None and why in r[name]["why"]
    assert r["nn_train_median"]["value"] > 0
    r = measure(x[:3], None, digits)
    assert "at least 4" in r["precision_digits_cnn"]["why"] and "class_agreement" not in r
    with pytest.raises(ParameterError, match="the data's are"):
        measure(torch.zeros(80, 3, 32, 32, dtype=torch.uint8), None, digits)
    with pytest.raises(ParameterError, match="0 .. 9"):
        measure(x, y + 1, digits)
    with pytest.raises(ParameterError, match="expected 297"):
        measure(x, y[:5], digits)


def test_reference_cache(digits, tmp_path, monkeypatch):
    def statistics(data=digits):
        return RealImages(data, FeatureNetwork("digits_cnn"), tmp_path).statistics("test")

    first = statistics().sha256
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(FeatureNetwork, "extract", lambda *a: pytest.fail("not from the file"))
        assert statistics().sha256 == first
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    for damaged in (whole[:100], whole[:-50], b"", flipped):
        path.write_bytes(damaged)
        assert statistics().sha256 == first
    statistics(replace(digits, sha256="1" * 64))
    assert len(list(tmp_path.iterdir())) == 2


def test_streamed_data_and_parts_give_the_same_statistics(digits, monkeypatch):
    class Rows:
        def read(self, index):
            return digits.train_images[index]

    streamed = replace(digits, train_images=None, inputs=Rows())
    real = [RealImages(d, FeatureNetwork("digits_cnn")) for d in (digits, streamed)]
    whole, files = (r.statistics("train") for r in real)
    assert np.allclose(whole.cov, files.cov, atol=1e-6)
    monkeypatch.setattr(references, "PART", 400)
    network = FeatureNetwork("digits_cnn")
    parts = RealImages(digits, network).statistics("train")
    assert parts.n == 1500 and np.allclose(parts.mean, whole.mean, atol=1e-12)
    assert np.allclose(parts.cov, whole.cov, atol=1e-9)


class StandIn(nn.Module):
    "16 features, 12 logits and 10 spatial features in one pass, in Inception's place."

    built = 0

    def __init__(self):
        super().__init__()
        StandIn.built += 1
        g = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(192, k, generator=g) / 14 for k in (16, 12, 10)]

    def forward(self, x):
        features, logits, spatial = ((x.flatten(1).float() / 64 - 1) @ w for w in self.weights)
        return features, logits, spatial.relu()


@pytest.fixture
def stand_in(monkeypatch):
    spec = replace(feature_extractor("inception"), dim=16, spatial=10, sha256="stand-in")
    monkeypatch.setitem(FEATURE_EXTRACTORS, "inception", spec)
    monkeypatch.setattr(features, "build_extractor", lambda name: StandIn())
    StandIn.built = 0


INCEPTION = MeasureOptions("inception")
TABLE7 = ("fid", "sfid", "inception_score", "precision_inception", "recall_inception")


def rgb(x):
    return x.expand(-1, 3, -1, -1)


def test_table7_from_one_call(digits, stand_in):
    rows, stats = measure_images(digits.test_images, None, digits, INCEPTION)
    r, net = by_name(rows), StandIn()
    made, real = net(rgb(digits.test_images)), net(rgb(digits.train_images))
    assert r["fid"]["value"] == pytest.approx(distance_by_scipy(made[0], real[0]), rel=1e-5)
    assert r["sfid"]["value"] == pytest.approx(distance_by_scipy(made[2], real[2]), rel=1e-5)
    assert all(r[k]["value"] is not None and r[k]["num_samples"] == 297 for k in TABLE7)
    assert str(stats["spatial_layer"]) == "Mixed_6d.branch1x1"
    assert recompute(through_a_file(stats)) == rows
    few = measure(digits.test_images[:9], None, digits, INCEPTION)
    assert "sFID: 9 images for 10 features" in few["sfid"]["why"]
    assert "at least 10" in few["inception_score"]["why"]


def test_the_network_is_built_once_per_measurement(digits, stand_in, monkeypatch):
    "The first edition built Inception again for every chunk of a large set."
    monkeypatch.setattr(references, "PART", 400)
    measure(digits.test_images, None, digits, INCEPTION)
    assert StandIn.built == 1


@pytest.fixture
def latent(digits):
    return replace(digits, train_images=None, test_images=digits.test_images[:0], sha256="1" * 64)


def reference_arrays(digits):
    real = RealImages(digits, FeatureNetwork("inception"))
    pooled, spatial = (real.statistics("train", k) for k in ("features", "spatial"))
    images = digits.train_images.permute(0, 2, 3, 1).numpy()
    moments = {"mu": pooled.mean, "sigma": pooled.cov, "mu_s": spatial.mean, "sigma_s": spatial.cov}
    return moments | {"n": 1500, "arr_0": images}


def test_a_reference_file_replaces_the_training_images(digits, latent, stand_in, tmp_path):
    arrays = reference_arrays(digits)

    def judge(**changed):
        np.savez(tmp_path / "r.npz", **(arrays | changed))
        options = replace(INCEPTION, reference=tmp_path / "r.npz")
        rows, stats = measure_images(digits.test_images, None, latent, options)
        assert recompute(stats) == rows
        return by_name(rows), stats

    full = measure(digits.test_images, None, digits, INCEPTION)
    r, stats = judge()
    for k in TABLE7:
        assert r[k]["value"] == pytest.approx(full[k]["value"], rel=1e-5)
    sha256 = hashlib.sha256((tmp_path / "r.npz").read_bytes()).hexdigest()
    assert str(stats["reference_sha256"]) == sha256 and stats["train_n"] == 1500
    made = StandIn()(rgb(digits.test_images))[0].double().mean(0).numpy()
    shifted = judge(mu=arrays["mu"] + 1)[0]["fid"]["value"] - full["fid"]["value"]
    gap = [((made - m) ** 2).sum() for m in (arrays["mu"] + 1, arrays["mu"])]
    assert shifted == pytest.approx(gap[0] - gap[1], rel=1e-4)
    other_layer = judge(mu_s=-arrays["mu_s"] - 99)[0]
    assert "behind its ReLU" in other_layer["sfid"]["why"]
    wrong = judge(arr_0=np.zeros((9, 4, 4, 3), np.uint8))[0]
    assert "arr_0 is uint8 (9, 4, 4, 3)" in wrong["recall_inception"]["why"]
    np.savez(tmp_path / "released.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    options = replace(INCEPTION, reference=tmp_path / "released.npz")
    r = measure(digits.test_images, None, latent, options)
    assert r["fid"]["value"] == full["fid"]["value"] and "mu_s" in r["sfid"]["why"]
    assert "reference=PATH" in r["precision_inception"]["why"]


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"mu": np.zeros(64)}, "mu and sigma are needed"),
        ({"a": np.zeros(3)}, "mu and sigma are needed, it has a"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, r"\(64,\) and \(64, 64\)"),
        ({"mu": np.zeros(64, int), "sigma": np.eye(64)}, "expected floats"),
        ({"mu": np.full(64, np.inf), "sigma": np.eye(64)}, "not finite"),
        ({"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))}, "not symmetric"),
        ({"mu": np.array([{}]), "sigma": np.eye(64)}, "can't be used"),
    ],
)
def test_bad_reference(tmp_path, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ParameterError, match=says) as e:
        read_reference(tmp_path / "bad.npz", "digits_cnn")
    assert "bad.npz" in str(e.value)


def test_a_reference_whose_header_lies(tmp_path):
    "An array of a terabyte in a file of a kilobyte is named, not allocated."
    path = tmp_path / "lying.npz"
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
    with zipfile.ZipFile(path, "w") as z, z.open("mu.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, header)
        f.write(bytes(1000))
    with pytest.raises(ParameterError, match=r"lying\.npz can't be used: mu\.npy promises"):
        read_reference(path, "digits_cnn")


def test_unreadable_reference(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    whole = path.read_bytes()
    for bad in (b"", b"mu", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(bad)
        with pytest.raises(ParameterError, match="can't be used"):
            read_reference(path, "digits_cnn")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_reference(tmp_path / "nowhere.npz", "digits_cnn")
    with pytest.raises(ParameterError, match="features = none"):
        read_reference(path, "none")


def test_no_network(digits, monkeypatch):
    monkeypatch.setattr(FeatureNetwork, "extract", lambda *a: pytest.fail("a network was asked"))
    options = MeasureOptions("none", patch_size=2, reference="")
    near = {"nn_train_median", "nn_heldout_median", "nn_ratio", "nn_close", "memorized"}
    judgement = {"prompt_shape_seen": np.int64([1, 4])}
    r = measure(digits.test_images, digits.test_labels, digits, options, extra=judgement)
    assert set(r) == near | {"patch_seam_energy_p2", "prompt_shape_seen"}


def test_data_without_pixels(digits, latent):
    x, y = digits.test_images, digits.test_labels
    for labels in (latent.test_labels, latent.test_labels[:0]):  # held-out latents, or none
        r = measure(x, y, replace(latent, test_labels=labels))
        assert len(r) == 14 and all(v["value"] is None and v["why"] for v in r.values())
        assert "pixels of the training images" in r["patch_seam_energy_p2"]["why"]
    r = measure(x, None, replace(latent, train_images=digits.train_images))
    assert {k for k, v in r.items() if v["value"] is not None} == {
        "fd_digits_cnn_train",
        "precision_digits_cnn",
        "recall_digits_cnn",
        "patch_seam_energy_p2",
        "nn_train_median",
    }


def test_classes_are_known_by_their_pixels(digits):
    data = replace(digits, sha256="latents")
    x, y = digits.test_images, digits.test_labels
    assert measure(x, y, data)["class_agreement"]["value"] is None
    data.pixels_sha256 = digits.sha256
    assert measure(x, y, data)["class_agreement"]["value"] > 0.97


def test_every_metric_is_recomputed():
    g = np.random.default_rng(0)
    s = {"features": "inception", "patch_size": 2, "n": 90, "why": "{}"}
    for who in ("sample", "train", "test", "real", "spatial", "spatial_train"):
        x = g.normal(size=(50, 4))
        s |= {f"{who}_n": 90, f"{who}_mean": g.normal(size=4), f"{who}_cov": np.cov(x.T)}
    s |= {
        "kid": g.normal(size=7),
        "scores": g.uniform(1, 9, 10),
        "neighbours": np.array([[30, 40], [10, 80]]),
        "confusion": g.integers(1, 9, (3, 3)),
        "classes": np.array([4, 4, 8]),
        "border": np.array([[2.0, 1], [1, 4]]),
        "nn_sample": g.uniform(1, 2, 9),
        "nn_heldout": g.uniform(1, 2, 8),
        "nn10_sample": np.array([[0.0, 1], [1.5, 2]]),
        "nn10_heldout": np.array([[1.0, 1], [2, 2]]),
        **{k: np.int64([i, 20]) for i, k in enumerate(PROMPTS)},
    }
    rows = recompute(through_a_file(s))
    r = {row["metric"]: row["value"] for row in rows}
    assert list(r) == [metric_name(m.name, "inception", 2) for m in METRICS]
    near, held = s["nn_sample"], s["nn_heldout"]
    want = {
        "kid_inception_test": s["kid"].mean(),
        "inception_score": s["scores"].mean(),
        "precision_inception": 0.75,
        "recall_inception": 0.125,
        "class_agreement": np.diag(s["confusion"]).sum() / s["confusion"].sum(),
        "class_entropy": 1.5 * np.log(2),
        "patch_seam_energy_p2": 8,
        "nn_train_median": np.median(near),
        "nn_heldout_median": np.median(held),
        "nn_ratio": np.median(near) / np.median(held),
        "nn_close": (near <= np.percentile(held, 1)).mean(),
        "memorized": 0.5,
        **{k: i / 20 for i, k in enumerate(PROMPTS)},
    }
    assert {k: r[k] for k in want} == pytest.approx(want, rel=1e-9)
    assert set(r) - set(want) == {"fid", "sfid", "fd_inception_test", "fd_inception_real"}
    assert by_name(rows)["prompt_exact_unseen"]["num_samples"] == 20


def test_judge(digits):
    options, x = MeasureOptions("none"), digits.test_images[:9]
    extra = {"prompt_count_seen": [3, 4], "prompt_exact_unseen": [0, 0], "notes": np.arange(3)}
    rows, stats = measure_images(x, None, digits, options, extra)
    r = by_name(rows)
    assert r["prompt_count_seen"]["value"] == 0.75 and r["prompt_count_seen"]["num_samples"] == 4
    assert "no such prompt" in r["prompt_exact_unseen"]["why"]
    assert stats["notes"].tolist() == [0, 1, 2]


def test_large_sets_stay_where_they_are(tmp_path, latent, stand_in, monkeypatch):
    "A memory-mapped set of large images is read by batches and never copied as a whole."
    shape = (700, 3, 64, 64)
    disk = np.memmap(tmp_path / "x.u8", np.uint8, "w+", shape=shape)
    disk[:] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    disk.flush()
    x = torch.from_numpy(np.memmap(tmp_path / "x.u8", np.uint8, "c", shape=shape))
    sizes, to = [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda v, *a, **k: (sizes.append(v.numel()), to(v, *a, **k))[1]
    )
    net = lambda name: lambda b: tuple(b.flatten(1)[:, :k].float() for k in (16, 12, 10))  # noqa: E731
    monkeypatch.setattr(FeatureNetwork, "net", property(net))
    FeatureNetwork("inception").extract(x)
    assert max(sizes) <= 64 * x[0].numel() < x.numel() / 10


# ---- held-out loss


class Convolution(nn.Module):
    "A convolution that adds what it is told."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, y=None, context=None):
        if y is not None:
            x = x + y.view(-1, 1, 1, 1) / 10
        if context is not None:
            assert context.shape[1:] == (4, 6)
            x = x + context.mean((1, 2)).view(-1, 1, 1, 1)
        return self.conv(x)


@pytest.mark.parametrize("process, prediction", [("cosine", "v"), ("vp", "noise")])
def test_heldout_loss_is_the_hand_loop(digits, process, prediction):
    net, x = Convolution(), digits.test_images[::60]
    diffusion = Diffusion(DiffusionConfig(process=process, prediction=prediction))
    everything = {"y": digits.test_labels[::60], "context": torch.randn(len(x), 4, 6)}
    for names in ((), ("y",), ("y", "context")):
        cond = {k: everything[k] for k in names}
        got = heldout_loss(net, diffusion, x, cond, levels=3)
        for level in range(3):
            t = diffusion.process.sample_t(torch.tensor([(level + 0.5) / 3], dtype=torch.float64))
            g = torch.Generator().manual_seed(key_seed("heldout", 0, level))
            eps, x0 = torch.randn(tuple(x.shape), generator=g), x.float() / 127.5 - 1
            with torch.no_grad():
                hand = diffusion.loss(net, x0, t.expand(len(x)), eps, **cond).mean().item()
            assert got["loss"][level] == pytest.approx(hand, rel=1e-5)
            assert got["t"][level] == t.item()
            assert got["lam"][level] == pytest.approx(diffusion.process.half_log_snr(t).item())
    floats = heldout_loss(net, diffusion, x.float() / 127.5 - 1, cond, levels=3)
    assert floats["loss"] == pytest.approx(got["loss"], rel=1e-6)
    assert net.training


def test_heldout_loss_of_known_networks_and_of_parts(digits):
    diffusion, x = Diffusion(DiffusionConfig()), digits.test_images
    silent = heldout_loss(lambda x, t: 0 * x, diffusion, x, levels=4)["loss"]
    assert silent == pytest.approx(np.ones(4), abs=0.03)
    net = Convolution()
    parts = [heldout_loss(net, diffusion, x, levels=3, part=(r, 2))["loss"] for r in range(2)]
    assert sum(parts) == pytest.approx(heldout_loss(net, diffusion, x, levels=3)["loss"], rel=1e-6)
    half = heldout_loss(net, diffusion, x, levels=2, autocast=torch.bfloat16)["loss"]
    assert half == pytest.approx(heldout_loss(net, diffusion, x, levels=2)["loss"], abs=0.02)
    with pytest.raises(ParameterError, match="context: 2 for 297 images"):
        heldout_loss(net, diffusion, x, {"context": torch.zeros(2, 4, 6)})
    with pytest.raises(ParameterError, match="levels = 0"):
        heldout_loss(net, diffusion, x, levels=0)


# ---- old names


def test_published_measurements_have_todays_names():
    from uvit_repro.runs.records import current_metric_name, load_results

    assert current_metric_name("border_energy_p4") == "patch_seam_energy_p4"
    assert current_metric_name("copies") == "nn_close"
    assert current_metric_name("fd_resnet20_train") == "fd_resnet20_train"
    names = set(load_results("published").metric)
    assert "nn_close" in names and "patch_seam_energy_p2" in names
    assert not any(n == "copies" or n.startswith("border_energy") for n in names)


def test_published_statistics_give_the_published_numbers():
    "One published run of each kind, value by value."
    from uvit_repro.runs.records import load_results

    table = load_results("published")
    table = table[table.eval_id.str.contains("dpm") & (table.status == "ok")]
    for _, rows in list(table.groupby(["dataset", "run_id"]))[::12]:
        some = rows[rows.eval_id == rows.eval_id.iloc[0]]
        path = f"{some.folder.iloc[0]}/stats/{some.eval_id.iloc[0]}.npz"
        with np.load(path, allow_pickle=False) as z:
            found = {r["metric"]: r["value"] for r in recompute(dict(z))}
            assert json.loads(str(z["why"])) is not None
        given = dict(zip(some.metric, some.value, strict=True))
        refused = set(found) - set(given)  # a seam needs patches of 2 to side / 2 pixels
        assert all(name.startswith("patch_seam_energy") for name in refused)
        assert {name: found[name] for name in given} == pytest.approx(given, rel=1e-9)
