import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from uvit_repro import latents
from uvit_repro.config import CONFIGS, DataConfig, ParameterError, experiment
from uvit_repro.data.images import Data, draw_latents, hold_out, load_digits, open_data
from uvit_repro.latents import (
    Autoencoder,
    DataSource,
    FolderSource,
    Inputs,
    LatentDecoder,
    Store,
    StoreError,
    digits_autoencoder,
    encode_images,
    enlarge,
    file_problem,
    find_autoencoder,
    from_store,
    halve,
    load_autoencoder,
    load_imagenet256,
    merge_statistics,
    npy_header,
    shard_statistics,
    verify_store,
    weights_sum,
)

quiet = lambda *a, **k: None
SMALL = {"batch": 10, "shard_rows": 50}


def digits(n=140, held=20):
    d = load_digits(DataConfig(dataset="digits", img_size=8, in_chans=1))
    return Data(
        "digits",
        d.train_images[:n],
        d.train_labels[:n],
        d.train_images[n : n + held],
        d.train_labels[n : n + held],
        10,
        d.class_names,
        "1" * 64,
    )


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def ae():
    torch.set_num_threads(1)
    return digits_autoencoder()


@pytest.fixture()
def store(tmp_path, ae):
    return encode_images(
        DataSource(digits(), enlarge), ae, tmp_path / "s", pixels=True, say=quiet, **SMALL
    )


def kill_and_resume(kills: int, folder) -> dict:
    "Encode once in one go, once in processes killed at random moments; whether the bytes are the same."
    torch.set_num_threads(1)
    ae, source, rng = (
        digits_autoencoder(),
        DataSource(digits(350, 50), enlarge),
        random.Random(os.getpid()),
    )
    encode = lambda path: encode_images(source, ae, path, pixels=True, say=quiet, **SMALL)
    start = time.perf_counter()
    encode(folder / "whole")
    T = time.perf_counter() - start
    killed = left = 0
    for _ in range(kills):
        pid = os.fork()
        if not pid:
            try:
                encode(folder / "killed")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 4 * T / max(kills, 8)))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        left += bool(list((folder / "killed").glob(".unfinished-*")))
    there = len(list((folder / "killed").glob("shard-*.json")))
    whole = (folder / "killed" / "index.json").exists()
    encode(folder / "killed")
    verify_store(folder / "killed")
    return {
        "killed": killed,
        "unfinished_files": left,
        "shards_before_last": there,
        "complete_before_last": whole,
        "same": contents(folder / "whole") == contents(folder / "killed"),
        "shards": len(list((folder / "whole").glob("shard-*.json"))),
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    out = subprocess.run(
        [sys.executable, __file__, "3", str(tmp_path)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
    )
    assert out.returncode == 0, out.stderr
    got = json.loads(out.stdout)
    assert got["same"] and got["killed"] >= 1 and got["shards"] == 8, got


def test_every_damage_is_named_and_mended(store, ae):
    before = contents(store.path)
    for f in list(sorted(store.path.glob("*.npy"))):
        raw = f.read_bytes()
        at = len(raw) - 7
        f.write_bytes(raw[:at] + bytes([raw[at] ^ 64]) + raw[at + 1 :])
        with pytest.raises(StoreError, match=f"{f.name} is altered"):
            verify_store(store.path)
        f.write_bytes(raw[:at])
        with pytest.raises(StoreError, match=f"{f.name} has"):
            Store(store.path)
        f.unlink()
        with pytest.raises(StoreError, match=f"{f.name} is missing"):
            Store(store.path)
        if f.name.startswith(("moments", "pixels")):
            encode_images(
                DataSource(digits(), enlarge), ae, store.path, pixels=True, say=quiet, **SMALL
            )
        else:
            f.write_bytes(raw)
        assert contents(store.path) == before, f.name
    (store.path / "index.json").unlink()
    encode_images(DataSource(digits(), enlarge), ae, store.path, pixels=True, say=quiet, **SMALL)
    assert contents(store.path) == before


def test_labels_file_lost_is_made_again(store, ae):
    before = contents(store.path)
    (store.path / "labels.npy").unlink()
    encode_images(DataSource(digits(), enlarge), ae, store.path, pixels=True, say=quiet, **SMALL)
    assert contents(store.path) == before


def test_several_bad_files_are_all_named(store):
    for k in (0, 2):
        f = store.path / f"moments-0000{k}.npy"
        raw = bytearray(f.read_bytes())
        raw[-1] ^= 1
        f.write_bytes(raw)
    with pytest.raises(StoreError) as e:
        verify_store(store.path)
    assert (
        "moments-00000.npy" in str(e.value)
        and "moments-00002.npy" in str(e.value)
        and "moments-00001.npy" not in str(e.value)
    )


def test_reading(store, ae):
    x = enlarge(torch.cat([digits().train_images, digits().test_images]))
    i = torch.tensor([159, 0, 77, 77, 50, 49])
    m = torch.tensor([0, 1, 0, 1, 1, 0]).bool()
    want = ae.encode(torch.where(m[:, None, None, None], x[i].flip(-1), x[i]))
    assert torch.allclose(store.read(i, m), want, atol=1e-4) and torch.equal(
        store.read(i), store.read(i, torch.zeros(6))
    )
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read(i, m), store.read(i, m))
    part = Inputs(store, torch.tensor([5, 77]))
    assert len(part) == 2 and torch.equal(
        part.read(torch.tensor([1, 0])), store.read(torch.tensor([77, 5]))
    )
    with pytest.raises(IndexError):
        store.read(torch.tensor([160]))
    assert store.read(torch.tensor([], dtype=torch.long)).shape == (0, 8, 8, 8)


def test_a_fork_reads_the_same(store):
    want = store.read(torch.arange(160))
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(w, b"y" if torch.equal(store.read(torch.arange(160)), want) else b"n")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(r, 1) == b"y"


def test_statistics(store):
    m = torch.cat(
        [store.read(torch.arange(160)), store.read(torch.arange(160), torch.ones(160).bool())]
    ).double()
    mean, lv = m.chunk(2, 1)
    s = store.index["statistics"]
    assert np.allclose(s["mean"], mean.mean((0, 2, 3)), atol=1e-6) and np.allclose(
        s["std"], mean.std((0, 2, 3), unbiased=False), atol=1e-6
    )
    assert s["drawn_std"] == pytest.approx(
        float((mean.var(unbiased=False) + lv.exp().mean()).sqrt()), rel=1e-6
    ) and s["scale"] == pytest.approx(1 / s["drawn_std"])
    a, b = (
        shard_statistics(x)
        for x in np.split(np.random.default_rng(0).normal(size=(6, 2, 4, 3, 3)), [2])
    )
    assert merge_statistics([a, b])["drawn_std"] == pytest.approx(
        merge_statistics([b, a])["drawn_std"]
    )


def test_other_settings_are_refused(store, ae):
    for kw, word in (
        ({"batch": 25}, "batch"),
        ({"dtype": "float16"}, "dtype"),
        ({"pixels": False}, "pixels"),
    ):
        with pytest.raises(ParameterError, match=word):
            encode_images(
                DataSource(digits(), enlarge),
                ae,
                store.path,
                say=quiet,
                **{**SMALL, "pixels": True, **kw},
            )
    other = Autoencoder(latents.train_digits_autoencoder(digits().train_images, steps=1)[0])
    with pytest.raises(ParameterError, match="sha256"):
        encode_images(
            DataSource(digits(), enlarge), other, store.path, pixels=True, say=quiet, **SMALL
        )


@pytest.mark.parametrize("kw", [{"dtype": "int8"}, {"batch": 0}, {"batch": 7, "shard_rows": 20}])
def test_impossible_settings(tmp_path, ae, kw):
    with pytest.raises(ParameterError):
        encode_images(DataSource(digits(), enlarge), ae, tmp_path / "s", **kw)
    with pytest.raises(ParameterError, match="squares of 1"):
        encode_images(
            DataSource(
                Data(
                    "x",
                    torch.zeros(3, 3, 16, 16).byte(),
                    torch.zeros(3).long(),
                    torch.zeros(0, 3, 16, 16).byte(),
                    torch.zeros(0).long(),
                    0,
                    [],
                    "0",
                )
            ),
            ae,
            tmp_path / "t",
        )


def test_moments_out_of_range_are_refused(tmp_path, ae):
    class Huge:
        image_chans, factor, latent_chans, device, name, sha256, encoder_sha256 = (
            1,
            2,
            4,
            torch.device("cpu"),
            "huge",
            "0",
            "0",
        )
        shape = ae.shape

        def encode(self, x):
            return torch.full((len(x), 8, 8, 8), 1e5)

    with pytest.raises(FloatingPointError, match="float16"):
        encode_images(
            DataSource(digits(), enlarge), Huge(), tmp_path / "s", dtype="float16", say=quiet
        )


def test_npy_header_is_numpys(tmp_path):
    x = np.zeros((3, 2, 5), np.float16)
    np.save(tmp_path / "x.npy", x)
    assert (tmp_path / "x.npy").read_bytes().startswith(
        npy_header(x.shape, x.dtype)
    ) and not file_problem(tmp_path / "x.npy", x.shape, x.dtype)
    assert "bytes instead" in file_problem(
        tmp_path / "x.npy", (3, 2, 6), x.dtype
    ) and "does not begin" in file_problem(tmp_path / "x.npy", (2, 3, 5), x.dtype)


def test_a_folder_without_classes_or_images(tmp_path, ae):
    from PIL import Image

    with pytest.raises(FileNotFoundError, match="no image"):
        FolderSource(tmp_path, 16, 1)
    for i in range(5):
        Image.fromarray(np.full((20, 30), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    s = encode_images(
        FolderSource(tmp_path, 16, 1),
        ae,
        tmp_path.parent / f"{tmp_path.name}-store",
        batch=2,
        shard_rows=2,
        say=quiet,
    )
    assert (
        len(s) == 5
        and s.index["class_names"] == []
        and from_store(
            s, DataConfig(dataset="latents:x", img_size=8, in_chans=4), "latents", root=tmp_path
        ).num_classes
        == 0
    )


def test_all_unreadable(tmp_path, ae):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"x")
    with pytest.raises(StoreError, match="none of its 1 images"):
        encode_images(FolderSource(tmp_path, 16, 1), ae, tmp_path / "s", say=quiet)


def test_identity_is_of_content_not_of_bits_or_paths(tmp_path, ae):
    a = encode_images(DataSource(digits(), enlarge), ae, tmp_path / "a", say=quiet, **SMALL)
    b = encode_images(
        DataSource(digits(), enlarge), ae, tmp_path / "b", batch=20, shard_rows=100, say=quiet
    )
    assert a.sha256 == b.sha256 and torch.allclose(
        a.read(torch.arange(160)), b.read(torch.arange(160)), atol=1e-4
    )
    other = digits()
    other.sha256 = "2" * 64
    assert (
        encode_images(DataSource(other, enlarge), ae, tmp_path / "c", say=quiet, **SMALL).sha256
        != a.sha256
    )


def test_digits_latents_hold_out_what_digits_hold_out():
    e, data = open_data(experiment("smoke", dataset="digits_latents"))
    _, pixels = open_data(experiment("smoke", dataset="digits"))
    assert (
        torch.equal(data.test_images, pixels.test_images)
        and torch.equal(data.train_images, pixels.train_images)
        and len(data.inputs) == 1500
        and data.stream is None
    )
    assert e.data.data_sha256 in ("", data.sha256) and data.sha256 != pixels.sha256
    assert (
        halve(data.decode.large(data.test_inputs)).int() - data.decode(data.test_inputs).int()
    ).abs().max() == 0 and data.decode.using("")(data.test_inputs[:3]).shape == (3, 1, 8, 8)


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, ae):
    monkeypatch.setenv("UVIT_REPRO_ROOT", str(tmp_path))
    d = digits()
    a = latents.digits_store(d, ae)
    good = contents(a.path)
    (a.path / "index.json").write_text("{}")
    (a.path / "job.json").write_text("{}")
    assert contents(latents.digits_store(d, ae).path) == good and a.path.is_relative_to(tmp_path)


def test_decoder_of_another_autoencoder(store, tmp_path, ae):
    data = from_store(
        store,
        DataConfig(dataset="latents:x", img_size=8, in_chans=4, latent_scale=0.5),
        "latents",
        root=tmp_path,
    )
    assert torch.equal(data.test_inputs, 0.5 * store.read(torch.arange(140, 160)).chunk(2, 1)[0])
    assert torch.equal(data.decode(data.test_inputs), ae.decode(2 * data.test_inputs))
    with pytest.raises(FileNotFoundError, match="sd-vae-ft-ema"):
        data.decode(data.test_inputs, "ema")
    index = json.loads((store.path / "index.json").read_text())
    index["autoencoder"]["sha256"] = "0" * 64
    (store.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="name the right one"):
        from_store(
            Store(store.path),
            DataConfig(dataset="latents:x", img_size=8, in_chans=4),
            "latents",
            root=tmp_path,
        ).decode(data.test_inputs)


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "damaged"),
        ('{"format": "other"}', "format 'other'"),
        ('{"format": "uvit_repro latents", "version": 9}', "version 9"),
    ],
)
def test_foreign_index(store, text, word):
    (store.path / "index.json").write_text(text)
    with pytest.raises(StoreError, match=word):
        Store(store.path)


def test_absent_sets_say_how(tmp_path):
    with pytest.raises(FileNotFoundError, match="latents encode --source imagenet --img-size 256"):
        load_imagenet256(CONFIGS["ImageNet 256x256 U-ViT-H/2"].data, tmp_path)
    (tmp_path / "imagenet256_latents").mkdir()
    (tmp_path / "imagenet256_latents" / "job.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is not complete"):
        load_imagenet256(CONFIGS["ImageNet 256x256 U-ViT-H/2"].data, tmp_path)
    with pytest.raises(FileNotFoundError, match="stabilityai/sd-vae-ft-ema"):
        find_autoencoder("ema", tmp_path)


def test_imagenet_layout_through_the_command_line(tmp_path, ae, capsys):
    from PIL import Image

    for c in ("n01440764", "n01443537"):
        for i in range(1):
            f = tmp_path / "imagenet" / "train" / c / f"{c}_{i}.JPEG"
            f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                np.random.default_rng(i).integers(0, 255, (300, 280, 3), dtype=np.uint8)
            ).save(f)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    vae.save_pretrained(tmp_path / "autoencoders" / "sd-v1-vae")
    assert (
        latents.main(
            [
                "encode",
                "--source",
                "imagenet",
                "--img-size",
                "256",
                "--data-root",
                str(tmp_path),
                "--batch",
                "2",
                "--shard-rows",
                "4",
                "--device",
                "cpu",
                "--dtype",
                "float16",
            ]
        )
        == 0
    )
    assert (
        latents.main(["verify", str(tmp_path / "imagenet256_latents")]) == 0
        and "whole: 2 images" in capsys.readouterr().out
    )
    data = load_imagenet256(CONFIGS["ImageNet 256x256 U-ViT-H/2"].data, tmp_path)
    assert (
        len(data),
        data.shape,
        data.num_classes,
        data.class_names[:2],
        data.train_images,
        data.inputs.read(torch.tensor([0])).shape,
    ) == (2, (3, 256, 256), 1000, ["n01440764", "n01443537"], None, (1, 8, 32, 32))
    x = data.decode(
        draw_latents(data.inputs.read(torch.tensor([1])), torch.zeros(1, 4, 32, 32), 0.18215)
    )
    assert x.shape == (1, 3, 256, 256) and x.dtype == torch.uint8


def test_help(capsys):
    for args in (["--help"], ["encode", "--help"], ["verify", "--help"]):
        with pytest.raises(SystemExit) as e:
            latents.main(args)
        assert (
            e.value.code == 0 and "python -m uvit_repro.latents verify" in capsys.readouterr().out
        )
    assert latents.main(["verify", "/nowhere"]) == 1 and "no store" in capsys.readouterr().err


def test_remeasuring_trains_nothing(tmp_path):
    from uvit_repro.runs.run import run_experiment

    run = run_experiment(
        experiment("smoke", dataset="digits_latents", curve_steps=()), tmp_path, say=quiet
    )
    weights = {p: p.stat().st_mtime_ns for p in run.folder.glob("weights-*")}
    a = latents.remeasure(run, 70, [{"cfg_scale": 1.0}, {"cfg_scale": 2.0, "nfe": 4}], say=quiet)
    said = []
    b = latents.remeasure(run, 70, [{"cfg_scale": 2.0, "nfe": 4}], say=said.append)
    assert (
        not said
        and b.eval_id[0] == a.eval_id[1]
        and len(set(a.eval_id)) == 2
        and {p: p.stat().st_mtime_ns for p in run.folder.glob("weights-*")} == weights
    )
    assert not run_experiment(run.exp, tmp_path, say=quiet).fresh and set(a.eval_id) <= set(
        json.loads((run.folder / "run.json").read_text())["evaluations"]
    )


if __name__ == "__main__":
    from pathlib import Path

    print(json.dumps(kill_and_resume(int(sys.argv[1]), Path(sys.argv[2]))))
