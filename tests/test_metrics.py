"Feature networks, distances, the report of a set of images, the held-out loss."
import hashlib, io, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
import numpy as np, pytest, torch
from torch import nn
from uvit_repro import metrics as M
from uvit_repro.config import LAPTOP, DiffusionConfig, ParameterError, key_seed
from uvit_repro.data import load_digits
from uvit_repro.diffusion import Diffusion


@pytest.fixture(scope="module")
def digits(): return load_digits(LAPTOP.data)

@pytest.fixture(scope="module")
def feats(digits): return {s: M.extract(getattr(digits, f"{s}_images"), "digits_cnn") for s in ("train", "test")}

def by_name(rows): return {r["metric"]: r for r in rows}


def test_import_is_light():
    code = "import sys, uvit_repro.metrics; print([m for m in ('torch_fidelity', 'torchvision', 'diffusers', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

def test_digits_judge(digits, feats):
    assert M.feature_weights("digits_cnn").stat().st_size < 200_000
    assert feats["test"]["features"].shape == (297, 64) and feats["test"]["logits"].shape == (297, 10) and feats["test"]["features"].dtype == torch.float32
    assert (feats["test"]["logits"].argmax(1) == digits.test_labels).float().mean() >= 0.97
    assert torch.linalg.matrix_rank(torch.cov(feats["train"]["features"].double().T)) == 64
    threads = torch.get_num_threads(); few = (digits.train_images[::10], digits.train_labels[::10])
    a, b = M.train_digits_cnn(*few, epochs=1), M.train_digits_cnn(*few, epochs=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values())) and torch.get_num_threads() == threads

def test_missing_and_wrong_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path)); monkeypatch.setenv("UVIT_DATA", str(tmp_path/"data")); monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path/"hub"))
    for name in ("inception", "resnet20_cifar10", "resnet56_cifar10"):
        net = M.network(name)
        assert M.feature_weights(name) is None and not M.feature_status(name)[0]
        with pytest.raises(FileNotFoundError, match="curl -L") as e: M.extract(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), name)
        assert net.url in str(e.value) and str(tmp_path/net.file) in str(e.value)
        (tmp_path/net.file).write_bytes(b"truncated")
        with pytest.raises(ValueError, match=net.sha256): M.extract(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), name)
        assert "expected" in M.feature_status(name)[1]
        (tmp_path/net.file).unlink()
    folder = tmp_path/"data"/"weights"; folder.mkdir(parents=True); (folder/M.network("resnet20_cifar10").file).write_bytes(b"x")
    assert M.feature_weights("resnet20_cifar10").parent == folder
    (tmp_path/"hub"/"checkpoints").mkdir(parents=True); (tmp_path/"hub"/"checkpoints"/M.network("inception").file).write_bytes(b"x")
    assert M.feature_weights("inception").parent == tmp_path/"hub"/"checkpoints"

def test_resnet_file_in_the_public_format(tmp_path, monkeypatch):
    torch.manual_seed(0); net = M.CifarResNet(3).eval(); f = tmp_path/M.network("resnet20_cifar10").file
    torch.save(dict(state_dict={f"module.{k}": v for k, v in net.state_dict().items()}, best_prec1=0.0), f)
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(M.NETWORKS, "resnet20_cifar10", replace(M.network("resnet20_cifar10"), sha256=hashlib.sha256(f.read_bytes()).hexdigest()))
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8); out = M.extract(x, "resnet20_cifar10", batch=2)
    with torch.no_grad(): want = net(x)
    assert torch.allclose(out["features"], want[0], atol=1e-5) and torch.allclose(out["logits"], want[1], atol=1e-4)
    grey = x[:, :1]; assert torch.equal(M.extract(grey, "resnet20_cifar10")["features"], M.extract(grey.repeat(1, 3, 1, 1), "resnet20_cifar10")["features"])
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"pwned"),)
    torch.save(dict(state_dict=Bomb()), f)
    monkeypatch.setitem(M.NETWORKS, "resnet20_cifar10", replace(M.network("resnet20_cifar10"), sha256=hashlib.sha256(f.read_bytes()).hexdigest()))
    with pytest.raises(Exception): M.load_weights("resnet20_cifar10")
    assert not (tmp_path/"pwned").exists()

def test_inception_from_a_path(tmp_path, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as m
    with patch.object(m, "load_state_dict_from_url", lambda *a, **k: {}), patch.object(m.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None):
        net = m.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    f = tmp_path/M.network("inception").file; torch.save(net.state_dict(), f)
    monkeypatch.setenv("UVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(M.NETWORKS, "inception", replace(M.network("inception"), sha256=hashlib.sha256(f.read_bytes()).hexdigest()))
    seen, load = [], torch.load
    with patch.object(torch, "load", lambda *a, **k: (seen.append(k.get("weights_only")), load(*a, **k))[1]): out = M.make_extractor("inception")
    assert seen[0] is True and len(seen) == 2 and out.features_list == ["2048", "logits_unbiased"]     # checked before torch-fidelity reads it

@pytest.mark.parametrize("images, name, says", [
    (torch.zeros(2, 1, 8, 8), "digits_cnn", "uint8"), (np.zeros((2, 1, 8, 8), np.uint8), "digits_cnn", "uint8 tensor"), (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "digits_cnn", "N > 0"),
    (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "digits_cnn", "takes 1x8x8"), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "digits_cnn", "inception"),
    (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "resnet56_cifar10", "takes 3x32x32"), (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "vgg16", "known networks are")])
def test_bad_images(images, name, says):
    with pytest.raises(ParameterError, match=says): M.extract(images, name)

def test_frechet_closed_form_and_refusal():
    rng = np.random.default_rng(0); m, s = rng.normal(size=(2, 12)), rng.uniform(0.2, 2, (2, 12))
    q = np.linalg.qr(rng.normal(size=(12, 12)))[0]                                            # one rotation for both: the closed form stays
    a, b = (M.Stats(99, q @ m[i], q @ np.diag(s[i]**2) @ q.T) for i in (0, 1))
    assert M.frechet(a, b) == pytest.approx(((m[0]-m[1])**2 + (s[0]-s[1])**2).sum(), rel=1e-9)
    with pytest.raises(ValueError, match="at least 13"): M.Stats.of(torch.randn(12, 12))
    with pytest.raises(ValueError, match="at least 13"): M.frechet(a, M.Stats(12, b.mean, b.cov))
    x = torch.randn(40, 12); st = M.Stats.of(x); assert st.mean.dtype == st.cov.dtype == np.float64 and np.allclose(st.cov, np.cov(x.double().numpy().T))

def test_equals_torch_fidelity(digits, feats):
    from torch_fidelity import calculate_metrics
    class Images(torch.utils.data.Dataset):
        def __init__(self, x): self.x = x
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return self.x[i]
    few, held = feats["train"]["features"][::4], feats["test"]["features"]
    theirs = calculate_metrics(input1=Images(digits.train_images[::4]), input2=Images(digits.test_images), feature_extractor=M.register_network("digits_cnn"), cuda=False, fid=True, kid=True,
                               prc=True, kid_subset_size=297, cache=False, verbose=False, save_cpu_ram=True)
    assert M.frechet(M.Stats.of(few), M.Stats.of(held)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert M.kid_subsets(few, held).mean() == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    pr = M.precision_recall(few, held); assert (pr[:, 0]/pr[:, 1]).tolist() == pytest.approx([theirs["precision"], theirs["recall"]], abs=1e-6)

def test_report_and_recompute(digits, tmp_path):
    rows, stats = M.measure_images(digits.test_images, digits.test_labels, digits, "digits_cnn", cache_dir=tmp_path, patch_size=2)
    assert all(isinstance(v, (np.ndarray, np.generic)) and v.dtype.kind != "O" for v in stats.values())
    buf = io.BytesIO(); np.savez(buf, **stats); buf.seek(0)
    with np.load(buf, allow_pickle=False) as z: again = M.recompute(dict(z))
    assert again == rows and all(r["value"] is not None for r in rows)
    r = by_name(rows); names = {f"{a}_digits_cnn{b}" for a, b in (("fd", "_train"), ("fd", "_test"), ("fd", "_real"), ("kid", "_test"), ("precision", ""), ("recall", ""))}
    assert set(r) == names | {"class_agreement", "class_entropy", "border_energy_p2", "nn_train_median", "nn_heldout_median", "nn_ratio", "copies"}
    assert np.log(10) - r["class_entropy"]["value"] < 0.01 and r["class_agreement"]["value"] > 0.97 and r["copies"]["value"] < 0.03 and r["fd_digits_cnn_train"]["num_samples"] == 297
    stats["confusion"] = np.roll(stats["confusion"], 1, axis=1); assert by_name(M.recompute(stats))["class_agreement"]["value"] < 0.05        # values come from the statistics
    warm, _ = M.measure_images(digits.test_images, digits.test_labels, digits, "digits_cnn", cache_dir=tmp_path, patch_size=2)
    assert warm == rows and not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]

def test_returning_the_training_set_does_not_pass(digits):
    r = by_name(M.measure_images(digits.train_images, digits.train_labels, digits, "digits_cnn")[0])
    assert r["nn_ratio"]["value"] == 0 and r["copies"]["value"] == 1 and r["fd_digits_cnn_train"]["value"] < 1e-6
    mirrored = digits.train_images[::3].flip(-1)
    plain, both = (by_name(M.measure_images(mirrored, None, digits, "digits_cnn", mirror=m)[0]) for m in (False, True))
    assert plain["copies"]["value"] < 0.1 and both["copies"]["value"] == 1

def test_what_the_data_cannot_support(digits):
    bare = replace(digits, test_images=digits.test_images[:0], test_labels=digits.test_labels[:0], sha256="0")
    r = by_name(M.measure_images(digits.test_images[:64], digits.test_labels[:64], bare, "digits_cnn", patch_size=8)[0])
    for name, why in (("fd_digits_cnn_train", "at least 65"), ("fd_digits_cnn_test", "at least 65"), ("kid_digits_cnn_test", "holdout"), ("class_agreement", "does not tell apart"), ("class_entropy", "does not tell apart"),
                      ("border_energy_p8", "no border"), ("nn_heldout_median", "holdout"), ("nn_ratio", "holdout"), ("copies", "holdout")):
        assert r[name]["value"] is None and why in r[name]["why"]
    assert r["nn_train_median"]["value"] > 0
    r = by_name(M.measure_images(digits.test_images[:3], None, digits, "digits_cnn")[0])
    assert "at least 4" in r["precision_digits_cnn"]["why"] and "class_agreement" not in r
    with pytest.raises(ParameterError, match="the data's are"): M.measure_images(torch.zeros(80, 3, 32, 32, dtype=torch.uint8), None, digits, "inception")
    with pytest.raises(ParameterError, match="0 .. 9"): M.measure_images(digits.test_images, digits.test_labels + 1, digits, "digits_cnn")
    with pytest.raises(ParameterError, match="expected 297"): M.measure_images(digits.test_images, digits.test_labels[:5], digits, "digits_cnn")

def test_reference_cache(digits, tmp_path):
    s, sha = M.reference_stats(digits, "digits_cnn", "test", tmp_path); (f,) = tmp_path.iterdir(); whole = f.read_bytes()
    with patch.object(M, "extract", side_effect=AssertionError("not from the file")): assert M.reference_stats(digits, "digits_cnn", "test", tmp_path)[1] == sha == s.sha256
    for damaged in (whole[:100], whole[:-50], b"", whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        f.write_bytes(damaged); assert M.reference_stats(digits, "digits_cnn", "test", tmp_path)[1] == sha
    other = replace(digits, sha256="1"*64); M.reference_stats(other, "digits_cnn", "test", tmp_path); assert len(list(tmp_path.iterdir())) == 2
    streamed = replace(digits, train_images=None, stream=[(x, 0) for x in digits.train_images])
    assert M.reference_stats(streamed, "digits_cnn", "train")[0].mean == pytest.approx(M.reference_stats(digits, "digits_cnn", "train")[0].mean)
    r, t = (by_name(M.measure_images(digits.test_images, None, d, "digits_cnn", patch_size=4)[0]) for d in (digits, streamed))
    for k in r: assert r[k]["value"] == pytest.approx(t[k]["value"], rel=1e-6)

def test_nearest_against_brute_force():
    g = torch.Generator().manual_seed(0); a, b = (torch.randint(0, 256, (n, 3, 5, 5), generator=g, dtype=torch.uint8) for n in (11, 6001)); b[6000] = a[3]
    i, d = M.nearest_training(a, b, k=2); full = torch.cdist(a.flatten(1).double(), b.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist")/255
    want = full.topk(2, largest=False); assert torch.allclose(d, want.values) and torch.equal(i, want.indices) and d[3, 0] == 0 and i[3, 0] == 6000

def test_heldout_loss_is_the_hand_loop(digits):
    torch.manual_seed(0); net = nn.Conv2d(1, 1, 3, padding=1); x = digits.test_images[::60]
    diffusion = Diffusion(DiffusionConfig(process="cosine", prediction="v"))
    model = lambda x, t, y=None: net(x) + (0 if y is None else y.view(-1, 1, 1, 1)/10)
    for labels in (None, digits.test_labels[::60]):
        got = M.heldout_loss(model, diffusion, x, labels, levels=4, seed=3, batch=2)
        for l in range(4):
            t = diffusion.process.sample_t(torch.tensor([(l + 0.5)/4], dtype=torch.float64)); eps = torch.randn(tuple(x.shape), generator=torch.Generator().manual_seed(key_seed("heldout", 3, l)))
            cond = lambda j: {} if labels is None else dict(y=labels[j:j+1])
            with torch.no_grad(): hand = [diffusion.loss(model, x[j:j+1].float()/127.5 - 1, t, eps[j:j+1], **cond(j)).item() for j in range(len(x))]
            assert got["loss"][l] == pytest.approx(np.mean(hand), rel=1e-5) and got["t"][l] == t.item() and got["lam"][l] == pytest.approx(diffusion.process.lam(t).item())
    assert not np.allclose(M.heldout_loss(model, diffusion, x, levels=2)["loss"], M.heldout_loss(model, diffusion, x, levels=2, seed=1)["loss"], rtol=1e-6)

def test_damage_and_bootstrap(digits):
    x, y = digits.test_images, digits.test_labels
    gone, left = M.damage(x, y, "class", 1); assert 3 not in left and len(gone) == len(left) == 297 - (y == 3).sum()
    half, left = M.damage(x, y, "class", 0.5); assert abs((left == 3).sum() - (y == 3).sum()/2) <= 1
    grid = M.damage(torch.full((50, 1, 8, 8), 128, dtype=torch.uint8), y[:50], "patches", 20)[0].float(); assert torch.equal(grid[..., ::2, ::2], grid[..., 1::2, 1::2]) and 15 < grid.std() < 25
    lo, hi = M.bootstrap_interval(np.r_[np.zeros(50), np.ones(50)]); assert 0.37 < lo < 0.45 < 0.55 < hi < 0.63 and (lo, hi) == M.bootstrap_interval(np.r_[np.zeros(50), np.ones(50)])
