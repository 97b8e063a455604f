"""Evaluation of a run: samples in checked shards, measurements, held-out loss, a picture."""

import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from uvit_repro.config import EvalConfig, Experiment, eval_id, project_root
from uvit_repro.config.durations import format_duration
from uvit_repro.data import files
from uvit_repro.data.features import FeatureNetwork, feature_status
from uvit_repro.data.images import Data, image_grid, to_uint8
from uvit_repro.diffusion import Diffusion
from uvit_repro.metrics import heldout_loss, nearest_training
from uvit_repro.runs import execution, records
from uvit_repro.runs.checkpoints import load_weights
from uvit_repro.runs.devices import ALONE, DistributedContext, pick_device
from uvit_repro.runs.measurement import MeasureOptions, measure_images
from uvit_repro.sample import batch_bounds, draw_batch, make_denoiser, null_condition, sample_labels

WHOLE = "whole.json"  # in a folder of samples that is complete: shape, batch, labels, attention


class Evaluation(NamedTuple):
    "One evaluation of a run."

    exp: Experiment  # with its sampling and evaluation
    step: int  # training step of the weights
    num_samples: int  # images to draw; 0 for the held-out loss

    @property
    def eval_id(self) -> str:
        "Its name in the record."
        return eval_id(self.exp, self.step, self.num_samples)


def measurements_of(exp: Experiment) -> list[Evaluation]:
    "Everything an experiment measures: losses, the curve, the final samples."
    e, s = exp.evaluation, exp.sampling
    on_curve = replace(s, sampler=e.curve_sampler or s.sampler, nfe=e.curve_nfe or s.nfe)
    curve = replace(exp, sampling=on_curve)
    last = exp.train.n_steps
    loss_steps = sorted({*e.loss_steps, *e.curve_steps, last})
    return [
        *(Evaluation(exp, step, 0) for step in loss_steps),
        *(Evaluation(curve, step, e.curve_samples) for step in sorted(e.curve_steps)),
        Evaluation(exp, last, e.num_samples),
    ]


def missing_measurements(
    exp: Experiment,  # with its data opened
    folder: Path,  # of its run
    info: dict,  # its run.json
    planned: list | None = None,  # Evaluations; None: all of the experiment
) -> list[Evaluation]:
    "Evaluations without statistics, rows or entry, or made before their feature network arrived."
    evaluations = info.get("evaluations", {})
    rows = {r["eval_id"] for r in records.read_rows(folder / "measurements.csv")}

    def missing(m: Evaluation) -> bool:
        entry, eid = evaluations.get(m.eval_id), m.eval_id
        if entry is None or eid not in rows or not (folder / "stats" / f"{eid}.npz").exists():
            return True
        return not entry.get("features_found", True) and feature_status(exp.evaluation.features)[0]

    return [m for m in planned or measurements_of(exp) if missing(m)]


@dataclass(frozen=True)
class RunContext:
    "What the stages of a run share."

    exp: Experiment  # with its data opened
    data: Data
    folder: Path  # of the run
    say: Callable = print  # progress lines
    team: DistributedContext = ALONE  # the processes that work together
    load: Callable | None = None  # gives the network to evaluate; None: the run's own weights
    where: dict = field(default_factory=dict)  # chapter and paper_ref of the measurements
    attention: str = ""  # the path that training took; empty: to be chosen
    about: dict = field(default_factory=dict)  # further fields of the record

    @property
    def device(self) -> torch.device:
        "Where this process computes."
        return pick_device(self.exp.execution.device)

    def missing(self, info: dict) -> list[Evaluation]:
        "What is planned and not yet recorded; given weights have no curve and no held-out loss."
        planned = measurements_of(self.exp)
        return missing_measurements(
            self.exp, self.folder, info, planned[-1:] if self.load else planned
        )

    def attention_path(self) -> str:
        "As asked, as in training, or the faster one: no timing decides it twice."
        if self.exp.execution.attention == "auto" and self.attention:
            return self.attention
        return self.team.first(lambda: execution.attention_choice(self.exp, self.device))["path"]

    def network(self, m: Evaluation, attention: str) -> nn.Module:
        "The network of a measurement on its device, its blocks compiled where that pays."
        net = self.load() if self.load else load_weights(m.exp, self.folder, m.step)
        execution.set_attention(net.to(self.device), attention)
        execution.set_residual(net, m.exp.execution.residual)
        choice = m.exp.execution.compile
        if execution.wants_compile(choice, self.device, m.exp.train.n_steps):
            execution.compile_blocks(net, strict=choice != "auto")
        return net


# ---------------------------------------------------------------- samples


def sample_conditions(exp: Experiment, data: Data, n: int, device) -> tuple:
    "What n images should show, what guidance compares it with, and their labels (Appendix A)."
    s, classes, cond, labels, null = exp.sampling, exp.data.num_classes, {}, None, None
    if exp.model.condition == "class":
        counts = data.train_labels.bincount(minlength=classes)
        by_frequency = counts if s.labels == "frequency" else None
        labels = sample_labels(s.sample_seed, 0, n, classes, by_frequency)
        cond = {"y": labels}
    if exp.model.condition == "text":
        cond, null = {"context": data.texts.prompts(n)}, data.texts.null
    return cond, null_condition(s.cfg_scale, cond, classes, null, device), labels


def samples_folder(exp: Experiment, folder: Path, step: int, n: int) -> Path:
    "Where n samples of a step lie: named by sampling alone, so that other measures reuse them."
    return folder / "samples" / eval_id(replace(exp, evaluation=EvalConfig()), step, n)


def shard_path(where: Path, first: int) -> Path:
    "The file of the samples from a first one on."
    return where / f"{first:07d}.npz"


def read_shard(path: Path) -> np.ndarray:
    "The images of a shard; numpy compares them with their checksum. Raises `DamagedFile`."
    try:
        with np.load(path) as archive:
            return archive["images"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise files.DamagedFile(f"{path} is damaged ({type(e).__name__}: {e})") from None


def read_samples(
    where: Path,  # folder of shards
    end: int | None = None,  # only the samples before this one
    first: int = 0,  # and from this one on
) -> tuple:  # uint8 (n, C, H, W), labels (n,) or None
    "The samples of a measurement. Raises `FileNotFoundError` when they are incomplete."
    if not (where / WHOLE).exists():
        found = len(list(where.glob("[0-9]*.npz")))
        raise FileNotFoundError(
            f"{where}: the samples are not complete ({found} shards); rerun the command that "
            "draws them to resume"
        )
    about = files.read_checked_json(where / WHOLE)
    n, *shape = about["shape"]
    end, labels = n if end is None else min(n, end), about["labels"]
    images = torch.empty((end - first, *shape), dtype=torch.uint8)
    for a, b in batch_bounds(end, about["batch"]):
        if b > first:
            own = read_shard(shard_path(where, a))[max(first - a, 0) : b - a]
            images[max(a - first, 0) : b - first] = torch.from_numpy(own)
    return images, None if labels is None else torch.tensor(labels[first:end])


def usable(path: Path, read: Callable, say: Callable):
    "What a file of samples holds; None: there is none, or it was damaged and is set aside."
    try:
        return read(path) if path.exists() else None
    except files.DamagedFile as e:
        say(f"{e}; set aside as {files.set_aside(path).name}, to be drawn again")
    return None


def draw_samples(ctx: RunContext, m: Evaluation) -> Path:  # folder of shards, see `read_samples`
    "Sample the images of a measurement, all processes together; only missing shards are drawn."
    where, exp, n = samples_folder(m.exp, ctx.folder, m.step, m.num_samples), m.exp, m.num_samples
    about = ctx.team.first(lambda: usable(where / WHOLE, files.read_checked_json, ctx.say))
    batch = about["batch"] if about else exp.execution.sample_batch

    def is_drawn(a: int, b: int) -> bool:  # of another length: begun with another sample_batch
        shard = usable(shard_path(where, a), read_shard, ctx.say)
        return shard is not None and len(shard) == b - a

    bounds = batch_bounds(n, batch, (ctx.team.rank, ctx.team.size))
    todo = [(a, b) for a, b in bounds if not is_drawn(a, b)]
    if about and not any(ctx.team.gather(todo)):
        return where
    attention = ctx.attention_path()
    cond, null, labels = sample_conditions(exp, ctx.data, n, ctx.device)
    net, cast = ctx.network(m, attention), execution.AUTOCAST[exp.train.precision]
    denoiser = make_denoiser(net, Diffusion(exp.diffusion), exp.sampling, null, cast)
    shape = (exp.data.in_chans, exp.data.img_size, exp.data.img_size)
    start = last = time.perf_counter()
    for done, (a, b) in enumerate(todo, 1):
        here = {k: v[a:b] for k, v in cond.items()}
        x = draw_batch(denoiser, exp.sampling, shape, (a, b), here, ctx.device)
        x = ctx.data.decode(x, exp.sampling.decoder) if ctx.data.decode else to_uint8(x)
        pixels = x.cpu().numpy()
        files.write_atomic(shard_path(where, a), lambda p, x=pixels: np.savez(p, images=x))
        now = time.perf_counter()
        if now - last > 15:
            last = now
            left = format_duration((now - start) / done * (len(todo) - done))
            ctx.say(f"sampled {b}/{n}, {left} left")
    ctx.team.gather(None)
    if ctx.team.rank == 0:
        about = {"shape": [n, *read_shard(shard_path(where, 0)).shape[1:]], "batch": batch}
        about["labels"] = None if labels is None else labels.tolist()
        files.write_checked_json(where / WHOLE, {**about, "attention": attention})
    return where


# ---------------------------------------------------------------- measurements


def keep_statistics(ctx: RunContext, m: Evaluation, stats: dict, rows: list) -> dict:
    "Write the statistics of a measurement, then its rows; the start of its entry in run.json."
    path = ctx.folder / "stats" / f"{m.eval_id}.npz"
    files.write_atomic(path, lambda p: np.savez_compressed(p, **stats))
    records.record(ctx.folder, m.exp, m.step, m.num_samples, rows, **ctx.where)
    return {"step": m.step, "num_samples": m.num_samples, "stats_sha256": files.sha256_file(path)}


def shared_features(ctx: RunContext, m: Evaluation, where: Path) -> dict | None:
    "Features of samples, each process's share from itself; None when one process does it all."
    name, (rank, size) = m.exp.evaluation.features, (ctx.team.rank, ctx.team.size)
    if size == 1 or name == "none" or not ctx.team.first(lambda: feature_status(name)[0]):
        return None
    first, end = (m.num_samples * r // size for r in (rank, rank + 1))
    network, own = FeatureNetwork(name, ctx.device), read_samples(where, end, first)[0]
    parts = [p for p in ctx.team.gather(network.extract(own) if len(own) else None) if p]
    return {kind: torch.cat([p[kind] for p in parts]) for kind in parts[0]}


def measure_samples(ctx: RunContext, m: Evaluation) -> dict:  # an entry for run.json
    "Draw images and extract features, all processes together; the first one measures and records."
    start, features, data = time.perf_counter(), m.exp.evaluation.features, ctx.data
    where = draw_samples(ctx, m)
    sampled = time.perf_counter() - start
    made = shared_features(ctx, m, where)
    if ctx.team.rank:
        return {}
    images, labels = read_samples(where)
    cache, patch_size = project_root() / "results" / "cache", m.exp.model.patch_size
    how = features, ctx.device, cache, None if data.decode else patch_size, m.exp.data.flip
    options = MeasureOptions(*how, m.exp.execution.reference or None, made)
    extra = data.judge(images) if data.judge else None
    rows, stats = measure_images(images, labels, data, options, extra=extra)
    entry = keep_statistics(ctx, m, stats, rows)
    values = ", ".join(f"{r['metric']} {r['value']:.4g}" for r in rows if r["value"] is not None)
    ctx.say(f"step {m.step}: {values[:300]}")
    return {
        **entry,
        "sampling": asdict(m.exp.sampling),
        "features": features,
        "features_found": feature_status(features)[0],
        "attention": files.read_checked_json(where / WHOLE)["attention"],
        "sampling_seconds": sampled,
        "seconds": time.perf_counter() - start,
    }


def heldout_inputs(
    exp: Experiment,  # whose network will see them
    data: Data,  # its data
    n: int,  # at most this many
) -> tuple[Tensor, dict]:  # pixels or latents (n, C, H, W), conditions by name
    "Held-out images and conditions in a fixed order, the same for every run on these data."
    held, cond = data.test_images if data.test_inputs is None else data.test_inputs, {}
    pick = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:n]
    if exp.model.condition == "class":
        cond["y"] = data.test_labels[pick]
    if exp.model.condition == "text" and len(pick):
        cond["context"] = data.texts.test(pick).float()
    return held[pick], cond


def measure_loss(ctx: RunContext, m: Evaluation) -> dict:  # an entry for run.json
    "Record the held-out denoising loss of a step, on the same images for every run on these data."
    start, attention = time.perf_counter(), ctx.attention_path()
    exp = m.exp
    images, cond = heldout_inputs(exp, ctx.data, exp.evaluation.loss_images)
    n, stats = len(images), {}
    row = {"metric": "heldout_loss", "value": None, "num_samples": n}
    if n:
        how = {"device": ctx.device, "autocast": execution.AUTOCAST[exp.train.precision]}
        net, diffusion = ctx.network(m, attention), Diffusion(exp.diffusion)
        part, levels = (ctx.team.rank, ctx.team.size), exp.evaluation.loss_levels
        stats = heldout_loss(net, diffusion, images, cond, levels, part=part, **how)
        stats["loss"] = sum(ctx.team.gather(stats["loss"]))
        row["value"] = float(stats["loss"].mean())
    else:
        row["why"] = f"{exp.data.dataset} has no held-out images: set holdout"
    if ctx.team.rank:
        return {}
    entry = keep_statistics(ctx, m, {**stats, "n": np.int64(n)}, [row])
    return {**entry, "attention": attention, "seconds": time.perf_counter() - start}


def measure(ctx: RunContext, m: Evaluation) -> dict:  # an entry for run.json
    "Carry out one measurement."
    return measure_samples(ctx, m) if m.num_samples else measure_loss(ctx, m)


def keep_picture(ctx: RunContext, k: int = 40) -> None:
    "samples.png (a grid, 10 in a row) and first.npz (k samples and their nearest training images)."
    from PIL import Image

    m = measurements_of(ctx.exp)[-1]
    where = samples_folder(m.exp, ctx.folder, m.step, m.num_samples)
    images, labels = read_samples(where, max(100, k))
    scale = max(1, 256 // (10 * images.shape[-1]))
    grid = Image.fromarray(image_grid(images[:100], 10, scale=scale))
    grid.save(ctx.folder / "samples.png")
    arrays = {"images": images[:k].numpy()}
    if ctx.data.train_images is not None:
        i, d = nearest_training(images[:k], ctx.data.train_images, mirror=ctx.exp.data.flip)
        arrays["nearest"] = ctx.data.train_images[i[:, 0]].numpy()
        arrays["distance"] = d[:, 0].numpy()
    if labels is not None:
        arrays["labels"] = labels[:k].numpy()
    files.write_atomic(ctx.folder / "first.npz", lambda p: np.savez_compressed(p, **arrays))
