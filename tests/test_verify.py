"A changed digit, a changed byte, a missing, added or damaged file of a record is found and named."

import json
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from uvit_repro.campaign.verify import check_seal, verify
from uvit_repro.config import PROTOCOLS, ParameterError
from uvit_repro.data.files import sha256_file, write_json
from uvit_repro.runs.records import LIST, SEAL, load_results, publish, published_root, seal

ADOPTED = published_root() / PROTOCOLS["laptop"].run_id  # a published run with a curve


@pytest.fixture
def record(tmp_path):
    "A copy of a published run without its seal, and without the list that names it."
    folder = tmp_path / ADOPTED.name
    shutil.copytree(ADOPTED, folder)
    (folder / SEAL).unlink()
    return folder


@pytest.fixture
def listed(tmp_path):
    "Two published runs with seals and the list of both."
    for path in (
        ADOPTED,
        next(p for p in published_root().glob("digits-uvit-64x7-2-skip-none-s0*")),
    ):
        publish(path, tmp_path / "published")
    return tmp_path / "published" / ADOPTED.name


def failures(folder, **options):
    return [str(check) for check in verify(out_dir=folder.parent, **options) if not check.ok]


def test_published_runs_verify_to_the_last_number():
    lines = []
    checks = verify(say=lines.append)
    assert checks and all(check.ok for check in checks), lines
    runs = [p.parent for p in published_root().glob("*/run.json")]
    assert lines[-1].startswith(f"{len(runs)} runs")
    table = load_results("published")
    computed = Counter(check.what for check in checks)
    for metric, n in table.metric.value_counts().items():
        assert computed[metric] == n, metric


def change_digit(path, after: bytes):
    raw = path.read_bytes()
    i = raw.index(after) + len(after)
    while not 48 <= raw[i] <= 57:
        i += 1
    digit = raw[i] + 1 if raw[i] < 57 else 48
    path.write_bytes(raw[:i] + bytes([digit]) + raw[i + 1 :])


@pytest.mark.parametrize(
    ("name", "after", "what"),
    [
        ("measurements.csv", b"heldout_loss,0.", "heldout_loss"),
        ("measurements.csv", b"fd_digits_cnn_test,", "fd_digits_cnn_test"),
        ("measurements.csv", b",copies,", "nn_close"),
        ("measurements.csv", b"laptop,", "columns of heldout_loss"),
        ("run.json", b'"n_steps": ', "run_id"),
        ("run.json", b'"stats_sha256": "', "sha256"),
        ("run.json", b'"images_seen": ', "images_seen"),
        ("log.csv", b",0.00", ""),
        ("run.json", b'"nfe": ', "name of the evaluation"),
        ("run.json", b"-p seed ", "command"),
        ("log.csv", b"\n1000,", ""),
        ("run.json", b'"cores": ', ""),
        ("first.npz", b"PK", ""),
    ],
)
def test_one_changed_digit_is_found_and_named(record, name, after, what):
    if not what:  # no number that follows from others: the seal has it
        what = "sha256"
        seal(record)
    assert failures(record) == []
    change_digit(record / name, after)
    bad = failures(record)
    assert any(line.startswith(f"{what} in {record.name}") for line in bad), bad


def flip_byte(record):
    path = next((record / "stats").glob("*loss*.npz"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    return path.name


def remove_statistics(record):
    path = next((record / "stats").glob("*loss*.npz"))
    path.unlink()
    return path.name


def swap_statistics(record):
    first, second = sorted((record / "stats").glob("*loss*.npz"))[:2]
    shutil.copyfile(first, second)
    return second.name


def remove_row(record):
    path = record / "measurements.csv"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(lines[:3] + lines[4:]) + "\n", "utf-8")
    return "metrics without a row"


def write_latin1(record):
    path = record / "measurements.csv"
    path.write_bytes(path.read_bytes().replace(b"laptop", b"l\xe4ptop"))
    return "UnicodeDecodeError"


def plant_bomb(record):
    path = next((record / "stats").glob("*dpm*.npz"))
    np.savez_compressed(path, features=np.zeros(2**21))
    return "too many for statistics"


@pytest.mark.parametrize(
    "damage",
    [flip_byte, remove_statistics, swap_statistics, remove_row, write_latin1, plant_bomb],
    ids=lambda f: f.__name__,
)
def test_damage_is_named(record, damage, monkeypatch):
    monkeypatch.setattr("uvit_repro.campaign.verify.LARGEST_STATISTICS", 2**23)
    named = damage(record)
    bad = failures(record)
    assert any(named in line for line in bad) and all(record.name in line for line in bad), bad


def delete_seal(folder):
    (folder / SEAL).unlink()


def empty_seal(folder):
    (folder / SEAL).write_text("", "utf-8")


def shorten_seal(folder):
    lines = (folder / SEAL).read_text("utf-8").splitlines(keepends=True)
    (folder / SEAL).write_text("".join(lines[1:]), "utf-8")


def spoil_seal(folder):
    (folder / SEAL).write_bytes(b"\xff\xfe" + (folder / SEAL).read_bytes())


def seal_again(folder):
    (folder / "samples.png").write_bytes(b"another picture")
    seal(folder)


def add_file(folder):
    (folder / "stats" / "extra.npz").write_bytes(b"x")


def add_run(folder):
    other = folder.with_name(f"{folder.name}-copy")
    other.mkdir()
    shutil.copyfile(folder / "measurements.csv", other / "measurements.csv")


def remove_record(folder):
    (folder / "run.json").unlink()


def remove_folder(folder):
    shutil.rmtree(folder)


def remove_list(folder):
    (folder.parent / LIST).unlink()


def shorten_list(folder):
    lines = (folder.parent / LIST).read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if folder.name not in line]
    (folder.parent / LIST).write_text("".join(kept), "utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        delete_seal,
        empty_seal,
        shorten_seal,
        spoil_seal,
        seal_again,
        add_file,
        add_run,
        remove_record,
        remove_folder,
        shorten_list,
    ],
    ids=lambda f: f.__name__,
)
def test_nothing_is_lost_or_added_in_silence(listed, damage):
    assert failures(listed) == []
    damage(listed)
    bad = failures(listed)
    assert bad and all(listed.name in line for line in bad), bad  # the other run is as good as ever


def test_a_damaged_list_is_one_failure(listed):
    (listed.parent / LIST).write_bytes(b"\xff" + (listed.parent / LIST).read_bytes())
    (bad,) = failures(listed)
    assert LIST in bad
    (listed.parent / LIST).write_bytes(b"")
    for folder in list(listed.parent.glob("*/")):
        shutil.rmtree(folder)
    (bad,) = failures(listed)
    assert LIST in bad


def test_published_runs_need_their_list(listed, monkeypatch):
    remove_list(listed)
    monkeypatch.setattr("uvit_repro.campaign.verify.published_root", lambda: listed.parent)
    assert [check.what for check in verify() if not check.ok] == ["list of runs"]


def test_a_record_that_can_not_be_read_is_one_failure(record):
    (record / "run.json").write_text('{"run_id": ', "utf-8")
    assert len(failures(record)) == 1
    with pytest.raises(FileNotFoundError, match="empty: no such folder"):
        verify(out_dir=record.parent / "empty")
    with pytest.raises(ParameterError, match="allowed are"):
        verify("elsewhere")


def test_local_weights_samples_and_pictures_are_checked(record, monkeypatch):
    info = json.loads((record / "run.json").read_text("utf-8"))
    weights, shard = record / "weights-0004000.safetensors", record / "samples" / "s"
    save_file({"w": torch.zeros(3)}, weights)
    info["weights_sha256"] = {weights.stem: sha256_file(weights)}
    info["wall_seconds"] += 5000  # a busy machine is no failure
    write_json(record / "run.json", info)
    shard.mkdir(parents=True)
    np.savez(shard / "0000000.npz", images=np.zeros((2, 1, 8, 8), np.uint8))
    assert failures(record, origin="runs") == []
    for path in (weights, shard / "0000000.npz", record / "samples.png", record / "first.npz"):
        raw = path.read_bytes()
        i = len(raw) // 2
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
        (bad,) = failures(record, origin="runs")
        assert path.name in bad
        path.write_bytes(raw)
    info["status"] = "stopped"
    write_json(record / "run.json", info)
    flip_byte(record)
    assert failures(record, origin="runs") == []  # what is not finished is not judged


def test_seal_is_in_the_form_of_sha256sum(tmp_path):
    folder = tmp_path / "run"
    (folder / "stats").mkdir(parents=True)
    (folder / "a b.txt").write_text("x", "utf-8")
    (folder / "stats" / "s.npz").write_bytes(b"y")
    seal(folder)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", SEAL], cwd=folder, capture_output=True, check=True)
    checks = list(check_seal(folder))
    assert len(checks) == 2 and all(check.ok for check in checks)
