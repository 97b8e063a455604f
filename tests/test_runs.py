"A run is done once, recorded as it happens, and what was damaged is named and made again."

import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from uvit_repro.config import SMOKE, ParameterError, experiment, from_dict, with_overrides
from uvit_repro.data.features import FeatureNetwork
from uvit_repro.data.files import CheckpointError, load_tensors, sha256_file
from uvit_repro.data.images import open_data
from uvit_repro.runs import evaluate
from uvit_repro.runs import experiment as experiment_module
from uvit_repro.runs.certificate import certificate
from uvit_repro.runs.chapters import ChapterFailed, run_chapter
from uvit_repro.runs.checkpoints import save_checkpoint, weights_path
from uvit_repro.runs.devices import DistributedContext, ProcessesFailed
from uvit_repro.runs.evaluate import read_samples
from uvit_repro.runs.experiment import repeat_command, run_experiment
from uvit_repro.runs.records import (
    conditions,
    load_results,
    load_run,
    load_runs,
    publish,
    read_list,
    seal,
)
from uvit_repro.train import Trainer, build_model

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = sorted(p.parent for p in (ROOT / "results" / "published").glob("*/SHA256SUMS"))
BASE = with_overrides(
    SMOKE, precision="fp32", attention="math", log_every=1, threads=1, sample_batch=30
)
RUN = (
    "from uvit_repro.runs import run_experiment\nfrom uvit_repro.config import SMOKE\nimport sys\n"
)


def quiet(line):
    pass


def python(code, *arguments):
    "Start another process."
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run; tests work on copies of it."
    return run_experiment(BASE, tmp_path_factory.mktemp("finished"), quiet)


@pytest.fixture
def copy(finished, tmp_path):
    "The folder of a copy of the finished run, in a folder of runs of its own."
    return Path(shutil.copytree(finished.folder, tmp_path / "runs" / finished.run_id))


def again(folder, exp=BASE, say=quiet):
    "Ask for the run of a folder once more."
    return run_experiment(exp, folder.parent, say)


def edit_info(folder, change):
    "Change run.json."
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    change(info)
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")


def forget(folder, eid):
    "Make an evaluation unmeasured, its samples kept."
    edit_info(folder, lambda info: info["evaluations"].pop(eid))


def flip_a_bit(path, at=0.5):
    "Damage one bit of a file."
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def values(run):
    "Every measurement of a run, in an order of its own."
    table = run.measurements().sort_values(["eval_id", "metric"])
    return table.drop(columns="note").reset_index(drop=True)


# ---------------------------------------------------------------- one run


def test_a_second_call_does_nothing(copy):
    files = [p for p in copy.rglob("*") if p.is_file() and p.name != ".lock"]
    before = {p: p.stat().st_mtime_ns for p in files}
    assert not again(copy).fresh
    assert before == {p: p.stat().st_mtime_ns for p in files}


def test_a_finished_run_in_a_read_only_folder(copy, monkeypatch):
    def refuse(*args):
        raise PermissionError("a read-only folder")

    monkeypatch.setattr(experiment_module, "run_lock", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != copy)
    assert not again(copy).fresh


def test_values_follow_from_their_statistics(finished):
    from uvit_repro.runs.measurement import recompute

    checked = 0
    for eid, rows in finished.measurements().groupby("eval_id"):
        with np.load(finished.folder / "stats" / f"{eid}.npz") as archive:
            stats = dict(archive)
        if "loss" in stats:
            found = {"heldout_loss": stats["loss"].mean()}
        else:
            found = {r["metric"]: r["value"] for r in recompute(stats)}
        for row in rows[rows.status == "ok"].itertuples():
            assert found[row.metric] == pytest.approx(row.value, rel=1e-9, abs=1e-12)
            checked += 1
    assert checked > 10


def test_another_evaluation_leaves_the_record_of_the_run(copy, monkeypatch):
    before = load_run(copy)
    picture = (copy / "samples.png").read_bytes()
    other = again(copy, with_overrides(BASE, sampler="ddim", device="cpu", checkpoint_seconds=5.0))
    after = load_run(copy)
    for field in ("experiment", "command", "status", "conditions", "training", "weights_sha256"):
        assert after[field] == before[field]
    assert other.fresh and (copy / "samples.png").read_bytes() == picture
    assert set(other.measurements().sampler.dropna()) == {"dpm_solver_pp_2m", "ddim"}
    new = set(after["evaluations"]) - set(before["evaluations"])
    assert new and all("-p sampler ddim" in after["evaluations"][i]["command"] for i in new)

    def fail(*args):
        raise RuntimeError("no images today")

    monkeypatch.setattr(evaluate, "measure_samples", fail)
    third = with_overrides(BASE, nfe=3)
    with pytest.raises(RuntimeError):
        again(copy, third)
    failed = load_run(copy)
    assert failed["status"] == "ok" and set(failed["evaluations"]) == set(after["evaluations"])
    monkeypatch.undo()
    assert len(again(copy, third).info["evaluations"]) > len(after["evaluations"])


def test_a_kill_before_the_first_measurement_leaves_a_whole_record(tmp_path, finished):
    code = RUN + (
        "import os\nfrom uvit_repro.runs import experiment as e\n"
        "from uvit_repro.config import with_overrides\n"
        "e.evaluate.measure = lambda *a: os._exit(9)\n"
        "exp = with_overrides(SMOKE, precision='fp32', attention='math', log_every=1, threads=1)\n"
        "run_experiment(exp, sys.argv[1])"
    )
    assert python(code, tmp_path).wait(timeout=120) == 9
    folder = tmp_path / finished.run_id
    training = json.loads((folder / "run.json").read_text(encoding="utf-8"))["training"]
    assert training["steps"] == 20 and weights_path(folder, 20).exists()
    run = again(folder)
    assert run.info["status"] == "ok" and run.info["training"] == training
    assert run.info["wall_seconds"] >= training["seconds"]
    assert set(run.info["weights_sha256"]) == set(finished.info["weights_sha256"])
    assert values(run).equals(values(finished))


@pytest.mark.parametrize("lost", ["entry", "rows", "statistics"])
def test_what_is_missing_anywhere_is_measured_again(copy, finished, lost):
    eid = list(finished.info["evaluations"])[-1]
    if lost == "entry":
        forget(copy, eid)
    elif lost == "rows":
        table = copy / "measurements.csv"
        lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if eid not in line]
        table.write_text("".join(kept), encoding="utf-8")
    else:
        (copy / "stats" / f"{eid}.npz").unlink()
    run = again(copy)
    assert run.fresh and eid in run.info["evaluations"] and values(run).equals(values(finished))


def test_measured_again_when_the_feature_network_arrives(tmp_path, monkeypatch):
    from uvit_repro.data.features import FeatureNetwork

    exp = with_overrides(SMOKE, curve_steps=())

    def gone(*args, **options):
        raise FileNotFoundError("weights not found; fetch them with: curl X")

    with monkeypatch.context() as c:
        c.setattr(FeatureNetwork, "extract", gone)
        c.setattr(evaluate, "feature_status", lambda name: (False, "curl X"))
        rows = run_experiment(exp, tmp_path, quiet).measurements().set_index("metric")
        assert rows.status["fd_digits_cnn_test"] == "not run"
        assert "curl X" in rows.note["fd_digits_cnn_test"] and rows.status["nn_ratio"] == "ok"
        assert not run_experiment(exp, tmp_path, quiet).fresh
    rows = run_experiment(exp, tmp_path, quiet).measurements().set_index("metric")
    assert rows.status["fd_digits_cnn_test"] == "ok"


def test_two_processes_share_one_run(tmp_path):
    code = RUN + "print('fresh', run_experiment(SMOKE, sys.argv[1]).fresh)"
    outputs = [p.communicate(timeout=240)[0] for p in [python(code, tmp_path) for _ in range(2)]]
    assert sorted(o.splitlines()[-1] for o in outputs) == ["fresh False", "fresh True"]
    (run,) = tmp_path.iterdir()
    assert load_run(run)["status"] == "ok"


def test_smoke_runs_leave_nothing_behind():
    code = RUN + "print(run_experiment(SMOKE, say=lambda line: None).folder)"
    process = python(code)
    folder = Path(process.communicate(timeout=120)[0].splitlines()[-1])
    assert process.returncode == 0 and folder.name.startswith("digits-")
    assert not folder.parent.exists()


def test_threads_are_restored_after_an_exception(tmp_path, monkeypatch):
    def fail(exp):
        assert torch.get_num_threads() == 2
        raise RuntimeError

    monkeypatch.setattr(experiment_module, "open_data", fail)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        run_experiment(with_overrides(SMOKE, threads=2), tmp_path, quiet)
    assert torch.get_num_threads() == before


def test_what_cannot_work_stops_before_training(tmp_path):
    with pytest.raises(ParameterError, match="5 and 7"):
        run_experiment(with_overrides(SMOKE, sampler="heun", nfe=6), tmp_path, quiet)
    for late in ({"curve_steps": (21,)}, {"loss_steps": (5, 99)}):
        with pytest.raises(ParameterError, match="at most n_steps = 20"):
            run_experiment(with_overrides(SMOKE, **late), tmp_path, quiet)
    missing = with_overrides(
        SMOKE,
        dataset="cifar10",
        data_root=str(tmp_path),
        img_size=32,
        in_chans=3,
        holdout=0,
        features="resnet20_cifar10",
    )
    with pytest.raises(FileNotFoundError):
        run_experiment(missing, tmp_path / "runs", quiet)
    assert not list(tmp_path.glob("**/weights*")) and not (tmp_path / "runs").exists()


def test_the_record_names_attention_and_tf32(finished):
    info = finished.info
    path = info["training"]["attention"]
    assert all(e["attention"] == path for e in info["evaluations"].values())
    about = conditions()
    assert {"tf32", "tf32_convolutions", "tf32_features"} <= set(about)


def test_a_command_repeats_its_experiment(tmp_path):
    folder = tmp_path / "my images"
    exp = with_overrides(SMOKE, dataset=f"folder:{folder}", curve_steps=(10, 15))
    assert f"'folder:{folder}'" in repeat_command(exp) and "-p curve_steps 10,15" in repeat_command(
        exp
    )


# ---------------------------------------------------------------- damage


def test_a_flipped_bit_in_samples_is_found(copy, finished):
    eid = list(finished.info["evaluations"])[-1]
    forget(copy, eid)
    flip_a_bit(sorted((copy / "samples").glob(f"{eid.rsplit('-', 1)[0]}*/0000030.npz"))[0])
    lines = []
    run = again(copy, say=lines.append)
    assert values(run).equals(values(finished))
    assert any("0000030.npz is damaged" in line and "drawn again" in line for line in lines)


def test_damaged_notes_about_samples_are_found(copy, finished):
    forget(copy, list(finished.info["evaluations"])[-1])
    for path in (copy / "samples").glob("*/whole.json"):
        flip_a_bit(path)
    lines = []
    run = again(copy, say=lines.append)
    assert values(run).equals(values(finished)) and any("whole.json" in line for line in lines)


def test_samples_begun_with_another_batch_are_finished(copy, finished):
    eid = list(finished.info["evaluations"])[-1]
    forget(copy, eid)
    for path in (copy / "samples").glob("*/whole.json"):
        path.unlink()
    run = again(copy, with_overrides(BASE, sample_batch=40))
    table, before = values(run), values(finished)
    assert np.allclose(table.value.fillna(0), before.value.fillna(0), rtol=1e-5)


def test_a_flipped_bit_in_weights_is_found(copy, finished):
    eid = list(finished.info["evaluations"])[-1]
    forget(copy, eid)
    shutil.rmtree(copy / "samples")
    flip_a_bit(weights_path(copy, 20))
    lines = []
    run = again(copy, say=lines.append)
    assert any("weights-0000020" in line and "damaged" in line for line in lines)
    assert values(run).equals(values(finished))
    assert run.info["weights_sha256"] == finished.info["weights_sha256"]


def test_a_damaged_table_is_measured_again(copy, finished):
    flip = (copy / "measurements.csv").read_bytes()[:-40] + b"\xff\xfe"
    (copy / "measurements.csv").write_bytes(flip)
    with pytest.warns(UserWarning, match="damaged"):
        run = again(copy)
    assert values(run).equals(values(finished))


def test_an_unusable_checkpoint_ends_the_run_and_not_the_next(tmp_path):
    "One clear message, nothing overwritten; the next start trains from the first step."
    from uvit_repro.diffusion import Diffusion

    folder = tmp_path / SMOKE.run_id
    trainer = Trainer(build_model(SMOKE), Diffusion(SMOKE.diffusion), SMOKE.train)
    folder.mkdir()
    save_checkpoint(folder, {**trainer.state_dict(), "run_id": SMOKE.run_id, "log": {}})
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:3000])
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match="start the same command again"):
        run_experiment(SMOKE, tmp_path, quiet)
    assert load_run(folder)["status"] == "failed"
    assert run_experiment(SMOKE, tmp_path, quiet).info["status"] == "ok"
    assert (folder / "checkpoint.pt.damaged-1").read_bytes() == before


def test_damaged_and_foreign_records_are_named_and_left_out(copy):
    root = copy.parent
    damages = {
        "a-bytes": b"\xff\xfe{",
        "b-list": b"[1]",
        "c-foreign": b'{"status": "ok", "experiment": {"model": {"nonsense": 1}}}',
        "d-empty": b"",
    }
    for name, content in damages.items():
        (root / name).mkdir()
        (root / name / "run.json").write_bytes(content)
        (root / name / "measurements.csv").write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [r["folder"].name for r in load_runs("runs", root)] == [copy.name]
        assert set(load_results("runs", root).run_id) == {copy.name}
    for name in damages:
        assert sum(f"{name}{os.sep}" in str(w.message) for w in caught) == 2


# ---------------------------------------------------------------- publishing


def test_publishing_sweeps_seals_and_lists(copy, tmp_path):
    target = tmp_path / "published"
    (target / copy.name).mkdir(parents=True)
    (target / copy.name / ".unfinished-run-x.json").write_text("{", encoding="utf-8")
    (copy / "stats" / ".unfinished-half.npz").write_bytes(b"half")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: publish(copy, target), range(4)))
    assert folders == {target / copy.name}
    assert not list(target.rglob(".unfinished-*"))
    sums = (target / copy.name / "SHA256SUMS").read_text(encoding="utf-8")
    assert "run.json" in sums and "unfinished" not in sums and ".lock" not in sums
    assert read_list(target) == {copy.name: sha256_file(target / copy.name / "SHA256SUMS")}
    (target / copy.name / ".unfinished-later.npz").write_bytes(b"half")
    assert "unfinished" not in seal(target / copy.name).read_text(encoding="utf-8")


def test_only_finished_runs_are_evidence(copy, tmp_path):
    edit_info(copy, lambda info: info.update(status="failed"))
    with pytest.raises(ValueError, match="only finished runs"):
        publish(copy, tmp_path / "published")


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_a_published_run_keeps_its_name_and_its_seal(folder):
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert from_dict(info["experiment"]).run_id == folder.name == info["run_id"]
    assert info["status"] == "ok" and all(c["ok"] for c in info["certificate"])
    assert set(load_run(folder)["evaluations"]) == set(info["evaluations"])
    assert read_list(folder.parent)[folder.name] == sha256_file(folder / "SHA256SUMS")


def test_laptop_digits_are_digits():
    "Seeds of the headline model: close to held-out digits, classified as asked, not copied."
    table = load_results("published")
    ids = [experiment("laptop", seed=s).run_id for s in range(10)]
    table = table[table.run_id.isin(ids) & (table.step == 4000)]
    assert table.seed.nunique() >= 2
    for _, rows in table.groupby("seed"):
        v = rows.set_index("metric").value
        assert v["fd_digits_cnn_test"] < 2 * v["fd_digits_cnn_real"]
        assert v["class_agreement"] > 0.93 and v["nn_train_median"] >= v["nn_heldout_median"]


# ---------------------------------------------------------------- certificate


def test_certificate_holds_and_can_fail(monkeypatch):
    from uvit_repro import diffusion

    assert all(r["ok"] for r in certificate())
    other = lambda self, t: 1000 * t  # noqa: E731  the other convention: close, and wrong
    monkeypatch.setattr(diffusion.VP, "c_noise", other)
    rows = certificate()
    assert {r["what"] for r in rows if not r["ok"]} == {"losses", "training", "sampling"}
    assert torch.backends.cudnn.allow_tf32  # as before


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    two = with_overrides(BASE, processes=2)
    return run_experiment(two, tmp_path_factory.mktemp("two"), quiet)


def largest_difference(a, b):
    "Between the final weights of two runs."
    a, b = (load_tensors(weights_path(r.folder, 20)) for r in (a, b))
    return max((a[k] - b[k]).abs().max() for k in a)


def test_two_processes_train_what_one_trains(finished, together):
    assert together.run_id == finished.run_id and together.info["training"]["processes"] == 2
    difference = finished.log().loss - together.log().loss
    assert len(difference) == 20 and difference.abs().max() < 1e-5
    assert largest_difference(finished, together) < 1e-4


def test_two_processes_draw_and_measure_what_one_does(copy, finished):
    "The same weights: the same images to the last bit, each counted once."
    shutil.rmtree(copy / "samples")
    edit_info(copy, lambda info: info["evaluations"].clear())
    two = again(copy, with_overrides(BASE, processes=2))
    for where in sorted((finished.folder / "samples").iterdir()):
        (a, ya), (b, yb) = (
            read_samples(f / "samples" / where.name) for f in (finished.folder, copy)
        )
        assert a.shape == (80, 1, 8, 8) and torch.equal(a, b) and torch.equal(ya, yb)
    a, b = values(finished), values(two)
    assert np.allclose(a.value.fillna(0), b.value.fillna(0), rtol=1e-6)


@dataclass(frozen=True)
class Partner(DistributedContext):
    "One of two processes in turn; what they gather is in `parts`."

    parts: list = None

    def gather(self, obj):
        self.parts[self.rank] = obj
        return self.parts

    def first(self, work):
        return work()


def test_processes_share_the_features_of_samples(finished, monkeypatch):
    "Each extracts those of its own slice; together they are those of all samples."
    exp, data = open_data(BASE)
    m = evaluate.measurements_of(exp)[-1]
    where = evaluate.samples_folder(m.exp, finished.folder, m.step, m.num_samples)
    whole, extracted, parts = read_samples(where)[0], [], [None, None]
    extract = FeatureNetwork.extract

    def seen(self, images):
        extracted.append(len(images))
        return extract(self, images)

    monkeypatch.setattr(FeatureNetwork, "extract", seen)
    for rank in (1, 0):
        ctx = evaluate.RunContext(exp, data, finished.folder, team=Partner(rank, 2, parts))
        made = evaluate.shared_features(ctx, m, where)
    assert extracted == [40, 40]
    want = FeatureNetwork("digits_cnn").extract(whole)
    assert all(torch.allclose(made[kind], want[kind], atol=1e-5) for kind in want)


def test_a_failure_of_several_processes_is_told(tmp_path):
    bad = with_overrides(BASE, processes=2, lr=1e8, warmup_steps=0, lr_schedule="constant")
    with pytest.raises(ProcessesFailed, match="2 processes: TrainingFailed: loss .* rate 1e\\+08"):
        run_experiment(bad, tmp_path, quiet)
    (folder,) = tmp_path.iterdir()
    assert load_run(folder)["status"] == "failed" and not list(folder.glob("job*"))


def test_processes_that_do_not_fit(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ParameterError, match="this is one of 4"):
        run_experiment(with_overrides(BASE, processes=2), tmp_path, quiet)


# ---------------------------------------------------------------- chapters, lean machines


def test_a_chapter_that_stops_keeps_its_partial_copy(tmp_path):
    nb = nbformat.v4.new_notebook()
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    parameters = nbformat.v4.new_code_cell("n: int = 1", metadata={"tags": ["parameters"]})
    body = nbformat.v4.new_code_cell("print('step', n)\nassert n < 3, 'too many'")
    nb.cells = [parameters, body]
    nbformat.write(nb, tmp_path / "nb.ipynb")
    with pytest.raises(ParameterError, match="did you mean n"):
        run_chapter(tmp_path / "nb.ipynb", nn=2)
    out = run_chapter(tmp_path / "nb.ipynb", tmp_path / "out.ipynb", n=2)
    assert "step 2" in out.read_text(encoding="utf-8")
    with pytest.raises(ChapterFailed, match="too many.*partial copy: .*out.failed.ipynb"):
        run_chapter(tmp_path / "nb.ipynb", tmp_path / "out.ipynb", n=5)
    assert (tmp_path / "out.failed.ipynb").exists()


def test_a_machine_without_nbdev_and_torch_fidelity():
    "What protocol `gpu` needs imports and measures without them."
    code = """
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nbdev", "fastcore", "execnb", "torch_fidelity"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import uvit_repro
for m in pkgutil.walk_packages(uvit_repro.__path__, "uvit_repro."):
    if not m.name.endswith("__main__"):
        importlib.import_module(m.name)
from uvit_repro.config import SMOKE
from uvit_repro.runs import run_experiment
rows = run_experiment(SMOKE, say=lambda line: None).measurements()
wanted = rows[rows.metric.str.startswith(("fd_", "heldout_loss"))]
assert len(wanted) and (wanted.status == "ok").all(), wanted
"""
    process = python(code)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output[-3000:]
