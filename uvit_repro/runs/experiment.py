"""One experiment, from images to recorded measurements: prepare, train, evaluate, finish."""

import atexit
import contextlib
import os
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from uvit_repro import config
from uvit_repro.config import Experiment, ParameterError
from uvit_repro.data import files
from uvit_repro.data.features import check_images
from uvit_repro.data.files import run_lock, write_json
from uvit_repro.data.images import Data, open_data
from uvit_repro.data.references import read_reference
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs import evaluate, records
from uvit_repro.runs.certificate import cached_certificate
from uvit_repro.runs.checkpoints import check_weights, weights_path, weights_sums
from uvit_repro.runs.counting import least_memory
from uvit_repro.runs.devices import check_memory, join_processes, run_together, thread_count
from uvit_repro.runs.evaluate import RunContext, measurements_of
from uvit_repro.runs.training import current_path, train
from uvit_repro.sample import check_sampler


@dataclass
class Run:
    "A finished run: its folder, its experiment as run, its record."

    folder: Path
    exp: Experiment
    info: dict
    fresh: bool  # whether this call did any work

    @property
    def run_id(self) -> str:
        "Its name."
        return self.folder.name

    def measurements(self) -> pd.DataFrame:
        "Its measurements."
        return records.read_table(self.folder / "measurements.csv")

    def log(self) -> pd.DataFrame:
        "Its loss while training: step, loss, lr, seconds."
        return pd.read_csv(self.folder / "log.csv")

    def first(self) -> dict:
        "Arrays of first.npz: images, labels, nearest training images."
        with np.load(self.folder / "first.npz") as arrays:
            return dict(arrays)


# ---------------------------------------------------------------- before a run


def with_reference(exp: Experiment) -> Experiment:
    "The experiment with the checksum of its reference statistics, a part of what it measures."
    path, want = exp.execution.reference, exp.evaluation.reference_sha256
    if not path:
        return exp
    found = read_reference(path, exp.evaluation.features).sha256
    if want not in ("", found):
        raise ValueError(
            f"reference = {path!r}: its checksum is {found[:16]}..., the experiment was made "
            f"with {want[:16]}..."
        )
    return replace(exp, evaluation=replace(exp.evaluation, reference_sha256=found))


def check_request(exp: Experiment, data: Data) -> None:
    "Refuse, before training, what can't be measured. Raises `ParameterError`."
    for m in measurements_of(exp):
        if m.step > exp.train.n_steps:
            text = f"curve_steps or loss_steps name step {m.step}"
            raise ParameterError(f"{text}: they must be at most n_steps = {exp.train.n_steps}")
        sampling = m.exp.sampling
        check_sampler(sampling.sampler, sampling.nfe, Diffusion(exp.diffusion).process)
    if exp.evaluation.features != "none" and not data.decode:
        side, channels = exp.data.img_size, exp.data.in_chans
        image = torch.zeros(1, channels, side, side, dtype=torch.uint8)
        check_images(image, exp.evaluation.features)


def repeat_command(exp: Experiment) -> str:
    "The papermill command that repeats an experiment, ready for a shell."
    base, dataset = config.PROTOCOLS[exp.protocol], exp.data.dataset
    given = {"protocol": exp.protocol, "seed": exp.seed}
    if dataset != base.data.dataset:
        base, given["dataset"] = config.experiment(exp.protocol, dataset=dataset), dataset
    usual = base.flat()
    for name, value in exp.flat().items():
        of_machine = config.PARAMETERS[name][0] == "execution"
        derived = name == "dataset" or name.endswith("_sha256")
        if not of_machine and not derived and value != usual[name]:
            given[name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    parameters = (f"-p {name} {shlex.quote(str(value))}" for name, value in given.items())
    return " ".join(["papermill nbs/05_ablations.ipynb out.ipynb", *parameters])


def root_of(exp: Experiment, out_dir=None) -> Path:
    "The folder of runs; smoke runs go to a temporary one that is removed at exit."
    if exp.protocol != "smoke" or out_dir:
        return records.runs_root(out_dir)
    folder = Path(tempfile.mkdtemp(prefix="uvit-smoke-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---------------------------------------------------------------- a run


def run_experiment(
    exp: Experiment,  # what to do
    out_dir=None,  # folder of runs; None: results/runs (smoke: a temporary folder)
    say=print,  # progress lines
    chapter: str = "",  # noted beside each measurement
    paper_ref: str = "",  # likewise
) -> Run:  # finished
    "From an experiment to recorded measurements; completed work is cached, failures are recorded."
    with thread_count(exp.execution.threads):
        exp, data = open_data(exp)
        exp = with_reference(exp)
        check_request(exp, data)
        folder = root_of(exp, out_dir) / exp.run_id
        where = {"chapter": chapter, "paper_ref": paper_ref}
        if exp.execution.processes > 1 and "WORLD_SIZE" not in os.environ:
            return share_run(exp, folder, say, where)
        return perform(RunContext(exp, data, folder, say, where=where))


def share_run(exp: Experiment, folder: Path, say, where: dict) -> Run:
    "Let several processes of this machine carry out an experiment."
    job = {"experiment": exp.to_dict(), "out_dir": str(folder.parent), "where": where}
    path = write_json(folder / f"job-{os.getpid()}.json", job)
    before = records.read_info(folder)
    try:
        run_together(exp, path, say)
    finally:
        path.unlink(missing_ok=True)
    info = records.read_info(folder)
    return Run(folder, exp, info, fresh=info != before)


def perform(ctx: RunContext) -> Run:
    "Train if needed, measure what is missing, record both. A file lock protects the run."
    team = join_processes(ctx.exp.execution.processes, ctx.device)
    lead = team.rank == 0
    ctx = replace(ctx, team=team, say=ctx.say if lead else lambda line: None)
    writable = os.access(ctx.folder, os.W_OK) or not ctx.folder.exists()  # else it is only read
    with run_lock(ctx.folder, ctx.say) if lead and writable else contextlib.nullcontext():
        info, todo = team.first(lambda: prepare(ctx))
        finished = info.get("status") == "ok"
        if finished and not todo:
            return Run(ctx.folder, ctx.exp, info, fresh=False)
        if not finished and ctx.load is None:
            check_memory(least_memory(ctx.exp), ctx.device)
        for note in ctx.data.notes[:10]:
            ctx.say(note)
        if finished:  # another evaluation: what the record says about the run stays as it is
            command = ctx.about.get("command") or repeat_command(ctx.exp)
            about = {"command": command, "conditions": records.conditions(ctx.device)}
            measure_missing(train_weights(ctx, info), info, **about)
        else:
            complete(ctx, info)
        return Run(ctx.folder, ctx.exp, info, fresh=True)


def prepare(ctx: RunContext) -> tuple[dict, list]:
    "The record of a run and what it lacks; unfinished files go, damaged weights are set aside."
    files.sweep_unfinished(ctx.folder)
    info = records.read_info(ctx.folder)
    todo = ctx.missing(info)
    for step in {m.step for m in todo} if ctx.load is None else ():
        path = weights_path(ctx.folder, step)
        try:
            check_weights(path)
        except files.CheckpointError as e:
            ctx.say(f"{e}; set aside as {files.set_aside(path).name}")
    return info, todo


def keep_info(ctx: RunContext, info: dict) -> None:
    "Write run.json."
    if ctx.team.rank == 0:
        write_json(ctx.folder / "run.json", info)


def about_run(ctx: RunContext) -> dict:
    "What a record says about a run before its results."
    exp, data = ctx.exp, ctx.data
    about = {
        "run_id": exp.run_id,
        "experiment": exp.to_dict(),
        "command": repeat_command(exp),
        "deviations": [list(d) for d in config.deviations(exp)],
        "certificate": cached_certificate(ctx.device) if ctx.team.rank == 0 else None,
        "conditions": records.conditions(ctx.device),
        "data": {
            "name": config.content_name(exp.data)[0],
            "sha256": data.sha256,
            "train": len(data),
            "held_out": len(data.test_images),
            "notes": data.notes[:50],
        },
    }
    if ctx.load is None:
        about["images_seen"] = exp.train.n_steps * exp.train.batch_size
    return {**about, **ctx.about}


def complete(ctx: RunContext, info: dict) -> None:
    "Carry out a run; its outcome, time and failure become part of the record, whatever happens."
    info.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    info.setdefault("evaluations", {})
    info.update(status="running", run_id=ctx.exp.run_id, experiment=ctx.exp.to_dict())
    keep_info(ctx, info)
    start = time.perf_counter()
    try:
        info.update(about_run(ctx))
        measure_missing(train_weights(ctx, info), info)
        if ctx.team.rank == 0:
            evaluate.keep_picture(ctx)
        info.update(status="ok", error=None)
    except BaseException as e:
        status = "failed" if isinstance(e, Exception) else "stopped"
        info.update(status=status, error=f"{type(e).__name__}: {e}")
        raise
    finally:
        # What a killed attempt took is known from its parts alone.
        parts = [info.get("training", {}), *info["evaluations"].values()]
        known = sum(part.get("seconds", 0) for part in parts)
        spent = info.get("wall_seconds", 0) + time.perf_counter() - start
        info["wall_seconds"] = max(spent, known)
        keep_info(ctx, info)


def train_weights(ctx: RunContext, info: dict) -> RunContext:  # with the attention path of training
    "Train if the final weights are missing, and record that before anything is measured."
    if ctx.load is not None:
        return ctx

    def keep(training: dict) -> None:
        info["training"] = training
        keep_info(ctx, info)

    trained = train(ctx.exp, ctx.data, ctx.folder, ctx.say, ctx.team, keep)
    if ctx.team.rank == 0:
        known, found = info.get("weights_sha256", {}), weights_sums(ctx.folder)
        if trained and any(known.get(name, sha) != sha for name, sha in found.items()):
            # Trained again to other bits, as on a GPU: what the old weights gave is void.
            info["evaluations"] = {}
            shutil.rmtree(ctx.folder / "samples", ignore_errors=True)
        info["weights_sha256"] = {**known, **found} if trained else {**found, **known}
        keep_info(ctx, info)
    path = ctx.team.first(lambda: info.get("training", {}).get("attention", ""))
    return replace(ctx, attention=current_path(path))


def measure_missing(ctx: RunContext, info: dict, **made) -> None:
    "Measure what is missing; `made` joins each new entry of the record."
    for m in ctx.team.first(lambda: ctx.missing(info)):
        info["evaluations"][m.eval_id] = {**evaluate.measure(ctx, m), **made}
        keep_info(ctx, info)


def remeasure(
    run: Run,  # a finished run, of `run_experiment`
    num_samples: int,  # images of each measurement
    variations: list,  # dicts of fields of SamplingConfig, each one measurement
    say=print,  # progress
    chapter="07_imagenet",  # noted beside the measurements
    paper_ref="",  # noted beside the measurements
) -> pd.DataFrame:  # a row per variation: its fields, folder of samples, eval_id, every metric
    "Measure a network with other sampling. Nothing is trained; what is recorded is not repeated."
    once, rows = {"num_samples": num_samples, "curve_steps": (), "loss_steps": ()}, []
    for fields in variations:
        exp = config.with_overrides(run.exp, **once, **fields)
        again = run_experiment(exp, run.folder.parent, say, chapter, paper_ref)
        m, found = measurements_of(again.exp)[-1], again.measurements()
        own = found[(found.eval_id == m.eval_id) & (found.status == "ok")]
        samples = evaluate.samples_folder(m.exp, run.folder, m.step, num_samples)
        values = own.set_index("metric").value.to_dict()
        rows.append({**fields, "samples": samples, "eval_id": m.eval_id, **values})
    return pd.DataFrame(rows)
