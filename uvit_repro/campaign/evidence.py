"""A queue of runs at protocol `gpu` is predicted, started only as far as a time budget allows, measured while its weights exist, packed after every step into small files, and read back as sealed evidence."""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uvit_repro.campaign.plan import (
    committed,
    held,
    hours,
    machine_key,
    note_attempt,
    obstacle,
    timed_updates,
    verify,
)
from uvit_repro.config import Experiment, ParameterError, experiment, with_overrides
from uvit_repro.config.durations import format_duration
from uvit_repro.data.files import run_lock, write_atomic, write_json
from uvit_repro.runs.certificate import cached_certificate
from uvit_repro.runs.counting import macs_of, params_of, predict_seconds, training_flops
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.evaluate import read_samples, samples_folder
from uvit_repro.runs.experiment import open_experiment, run_experiment
from uvit_repro.runs.records import (
    EVIDENCE,
    conditions,
    load_results,
    load_runs,
    publish,
    published_root,
    runs_root,
)
from uvit_repro.runs.timing import free_memory, matmul_rate


@dataclass(frozen=True)
class Entry:
    "One run of the queue and what is measured on its weights."

    name: str  # of its packed record
    point: int  # of the queue, 1 to 8
    fields: dict  # parameters of a chapter: what differs from the protocol
    seed: int = 0
    extras: tuple = ("look",)  # keys of EXTRAS, measured before the weights are deleted
    later: tuple = ()  # claims that need this run though no test of chapter 98 names it
    repeat: bool = (
        False  # the same run again in another folder: how far are two runs of one seed apart?
    )


def _variants(point: int, names: dict, seed=0, extras=("look",)) -> list:
    return [Entry(f"{n}-s{seed}", point, kw, seed, extras) for n, kw in names.items()]


_skip, _time = {"none": {"skip": "none"}}, {"adaln": {"time": "adaln"}}
_sizes = {
    "patch-8": {"patch_size": 8},
    "patch-4": {"patch_size": 4},
    "width-256": {"embed_dim": 256, "num_heads": 4},
    "depth-9": {"depth": 9},
}
_parts = {
    "conv-none": {"conv": "none"},
    "add": {"skip": "add"},
    "add-linear": {"skip": "add_linear"},
    "sincos2d": {"pos_embed": "sincos2d"},
    "patch-embed-conv": {"patch_embed": "conv"},
}
_large = {
    "linear-add": {"skip": "linear_add"},
    "depth-17": {"depth": 17},
    "width-768": {"embed_dim": 768, "num_heads": 12},
    "patch-1": {"patch_size": 1},
}
_first = ("look", "cka", "fewer", "raw", "solver", "centre")
QUEUE = (
    *_variants(1, {"adopted": {}}, 0, _first),
    *_variants(1, _skip, 0, ("look", "cka", "centre")),
    *_variants(1, {"adopted": {}}, 1, _first[:4]),
    *_variants(1, _skip, 1, ("look", "cka")),
    Entry("adopted-s0-repeat", 1, {}, repeat=True),
    *_variants(2, _time),
    *_variants(2, _time, 1),
    Entry("adaln-zero-s0", 2, {"time": "adaln_zero"}, later=("U06",)),
    *_variants(3, _sizes),
    *[
        replace(e, extras=("look", "cka")) if e.name == "add-s0" else e
        for e in _variants(4, _parts)
    ],
    *_variants(5, _large),
    Entry(
        "class-s0",
        6,
        {"condition": "class", "p_uncond": 0.1, "cfg_scale": 1.4},
        0,
        ("look", "unguided", "guidance", "centre"),
    ),
    *_variants(7, {**_sizes, **_parts, **_large}, 1),
    *_variants(7, {"adopted": {}}, 2, _first[:4]),
    *_variants(7, {**_skip, **_time, **_sizes}, 2),
    Entry("genvit-s0", 8, {"model": "GenViT"}, later=("G01",)),
    Entry("unet-s0", 8, {"model": "ADM"}, later=("U44",)),  # the U-Net that claim U44 names
)

REHEARSED = {
    "condition": "none",
    "p_uncond": 0.0,
    "cfg_scale": 1.0,
    "sampler": "dpm_solver_fast",
    "nfe": 6,
    "clip": False,
    "checkpoint_seconds": 0.5,
}  # what smoke has in common with gpu
TINY = {
    ("depth", 9): 1,
    ("depth", 17): 5,
    ("embed_dim", 256): 16,
    ("num_heads", 4): 1,
    ("embed_dim", 768): 48,
    ("num_heads", 12): 3,
}  # sizes of the queue at smoke: 3 layers of width 32, 2 heads


def entry_experiment(
    entry: Entry,  # of the queue
    protocol="gpu",  # gpu | smoke (the rehearsal)
    n_steps: int = None,  # of training; None: the protocol's
) -> Experiment:
    "The experiment of an entry."
    if protocol not in ("gpu", "smoke"):
        raise ParameterError(
            f"protocol = {protocol!r}: the queue runs at gpu, and is rehearsed at smoke"
        )
    small, kind = protocol == "smoke", entry.fields.get("model", "UViT")
    if kind == "GenViT":
        from uvit_repro.genvit import arm

        e = arm(protocol, "uvit", entry.seed, n_steps)
    elif kind != "UViT":
        from uvit_repro.comparison import short
        from uvit_repro.unet import matched_unets

        base = (
            short("smoke", entry.seed)
            if small
            else experiment(protocol, seed=entry.seed, n_steps=n_steps)
        )
        e = matched_unets(base, models=(kind,))[kind][0]
    else:
        e = experiment(
            protocol,
            seed=entry.seed,
            n_steps=n_steps,
            **(REHEARSED if small else {})
            | {k: TINY.get((k, v), v) if small else v for k, v in entry.fields.items()},
        )
    return (
        with_overrides(e, n_steps=n_steps or e.train.n_steps, **REHEARSED)
        if small and kind != "UViT"
        else e
    )


def claims_of(
    entries=QUEUE,  # of the queue
) -> dict:  # name -> ids of claims, in the order of the record
    "The claims that each entry bears on."
    from uvit_repro.report.verdicts import TESTED, arm_experiment, arms_of, load_tests

    known = [
        e
        for e in {**{e.name: e for e in QUEUE}, **{e.name: e for e in entries}}.values()
        if e.fields.get("model", "UViT") in ("UViT", "GenViT")
    ]  # a U-Net is matched in size with diffusers, which a bare machine lacks
    ids, out = (
        {e.name: replace(entry_experiment(e), seed=0).run_id for e in known},
        {e.name: list(e.later) for e in entries},
    )  # seeds apart, they are the same arm
    for t in load_tests():
        if t["kind"] not in TESTED or "gpu" not in t["protocols"]:
            continue
        arms = {arm_experiment(a, "gpu").run_id for c in arms_of(t, "gpu") for a in c}
        if len(arms) > 1 and len(arms & set(ids.values())) < 2:
            continue
        for e in entries:
            if ids.get(e.name) in arms and not e.repeat:
                out[e.name].append(t["id"])
    return {n: tuple(sorted(set(c), key=lambda i: ("UDAG".index(i[0]), i))) for n, c in out.items()}


SIZES = {  # of what is measured on the weights
    "gpu": {
        "images": 2000,
        "fewer": 2500,
        "nfe": (5, 10, 20, 50, 100),
        "scales": (1.0, 1.2, 1.4, 1.7, 2.0, 3.0),
        "levels": "-6,-3,0,3,6,training",
        "centre": 16,
        "pairs": 2000,
    },
    "smoke": {
        "images": 70,
        "fewer": 75,
        "nfe": (4, 6),
        "scales": (1.0, 1.5),
        "levels": "0,training",
        "centre": 2,
        "pairs": 60,
    },
}
ASSUMED_MINUTES, FIXED, OTHER = (
    6.0,
    {"gpu": 90.0, "smoke": 3.0},
    0.5,
)  # training of the adopted model; seconds of a run beside its counted work; rate of an unseen backbone over the known


def extra_passes(exp: Experiment, extras: tuple) -> int:
    "Forward passes of one image that the extra measurements make."
    s, z = exp.sampling, SIZES[exp.protocol]
    twice = 2 if s.cfg_scale != 1 else 1
    n = {
        "look": 0,
        "cka": z["images"] * len(z["levels"].split(",")),
        "fewer": z["fewer"] * s.nfe,
        "raw": exp.evaluation.num_samples * s.nfe,
        "solver": z["images"] * sum(z["nfe"]),
        "centre": z["centre"] * s.nfe * twice,
        "unguided": exp.evaluation.num_samples * s.nfe,
        "guidance": z["images"] * s.nfe * sum(1 if w == 1 else 2 for w in z["scales"]),
    }
    return sum(n[x] for x in extras)


def assumed_rate() -> float:
    "Operations per second at which the adopted model trains in the assumed time."
    e = experiment("gpu")
    return (
        e.train.n_steps * e.train.batch_size * training_flops(macs_of(e)) / (60 * ASSUMED_MINUTES)
    )


def rates_for(
    model: str,  # a backbone
    seen: list,  # of `rates_seen`, of finished runs on this machine
    first: float,  # operations per second before any run is finished
    fixed: float,  # seconds beside the counted work, likewise
) -> dict:  # train and sample (operations per second), fixed (seconds), basis
    "The rates that predict the next run."
    mine = [r for r in seen if r["model"] == model]
    use = mine or seen
    mid = lambda k: float(np.median([r[k] for r in use]))
    if not use:
        return {
            "train": first * (1 if model == "UViT" else OTHER),
            "sample": first * (1 if model == "UViT" else OTHER),
            "fixed": fixed,
            "basis": "no finished run yet",
        }
    share = 1 if mine else OTHER
    return {
        "train": mid("train") * share,
        "sample": mid("sample") * share,
        "fixed": mid("fixed"),
        "basis": f"median of {len(use)} runs"
        + ("" if mine else f", times {OTHER:g} for a backbone not seen"),
    }


def predict_entry(entry: Entry, exp: Experiment, rates: dict) -> dict:
    "Seconds of an entry: train, sample (all forward passes beside training), fixed, total."
    p = predict_seconds(exp, rates["train"], rates["sample"])
    sample = (
        p["sample"]
        + p["loss"]
        + 2 * macs_of(exp) * extra_passes(exp, entry.extras) / rates["sample"]
    )
    return {
        "train": p["train"],
        "sample": sample,
        "fixed": rates["fixed"],
        "total": p["train"] + sample + rates["fixed"],
    }


def rates_seen(
    info: dict,  # run.json of a run that was trained in one go
    exp: Experiment,
    seconds: float,  # of the whole entry
) -> dict:  # model, train, sample, fixed; None where the run was resumed
    "What a finished run says about this machine."
    t, ev = (
        info.get("training", {}),
        [v for v in info["evaluations"].values() if v.get("sampling_seconds")],
    )
    if t.get("steps") != exp.train.n_steps or not ev:
        return None
    ops = sum(
        2
        * macs_of(exp)
        * v["num_samples"]
        * v["sampling"]["nfe"]
        * (2 if v["sampling"]["cfg_scale"] != 1 else 1)
        for v in ev
    )
    drawing = sum(v["sampling_seconds"] for v in ev)
    return {
        "model": exp.model.model,
        "train": exp.train.n_steps
        * exp.train.batch_size
        * training_flops(macs_of(exp))
        / t["seconds"],
        "sample": ops / drawing,
        "fixed": max(0.0, seconds - t["seconds"] - drawing),
    }


def plan_table(
    entries=QUEUE,
    protocol="gpu",
    rate: float = None,  # operations per second; None: the assumption
):  # DataFrame: entry, point, claims, parameters, predicted seconds
    "The queue with its claims and its cost."
    import pandas as pd

    bears, rows = claims_of(entries), []
    for e in entries:
        x = entry_experiment(e, protocol)
        p = predict_entry(
            e, x, rates_for(x.model.model, [], rate or assumed_rate(), FIXED[protocol])
        )
        rows.append(
            {
                "entry": e.name,
                "point": e.point,
                "claims": " ".join(bears[e.name]),
                "parameters": params_of(x),
                "extras": " ".join(e.extras),
                "train": p["train"],
                "sample": p["sample"],
                "seconds": p["total"],
            }
        )
    return pd.DataFrame(rows)


def measure_more(run, n: int, variations: list, say, ref: str) -> str:
    "Measure a trained network with other sampling (chapter 07's `remeasure`); in words."
    from uvit_repro.config import main_metric
    from uvit_repro.runs.remeasure import remeasure

    t, m = (
        remeasure(run, n, variations, say, chapter="13c_evidence", paper_ref=ref),
        main_metric(run.exp),
    )
    return "; ".join(
        ", ".join(f"{k}={v}" for k, v in kw.items())
        + f": {m} "
        + (f"{row[m]:.4g}" if m in row and row[m] == row[m] else "not measured")
        for kw, row in zip(variations, t.to_dict("records"))
    )


def measure_cka(run, z: dict, say) -> str:
    "Chapter 09's matrices."
    from uvit_repro.cka import run_cka, summary

    c = run_cka(run.exp, run.folder, z["levels"], z["images"], device=run.exp.execution.device)
    return f"{c['samples']} images, {len(c['levels'])} levels, mean over all pairs {float(summary(c['cka'])['all pairs'][0, -1]):.3f}"


def measure_centre(run, z: dict, say) -> str:
    "Attention of the centre token (chapter 12), as stats/centre-STEP.npz and centre.png."
    try:
        from uvit_repro.diffit import centre_attention, plot_centre
    except ImportError:
        return "not run: this version has no centre_attention (chapter 12)"
    from uvit_repro.diffusion import Diffusion
    from uvit_repro.runs.checkpoints import load_weights

    e, step, device = run.exp, run.exp.train.n_steps, pick_device(run.exp.execution.device)
    c = centre_attention(
        load_weights(e, run.folder, step).to(device),
        Diffusion(e.diffusion),
        e.sampling,
        (e.data.in_chans, e.data.img_size, e.data.img_size),
        z["centre"],
        e.data.num_classes if e.model.condition == "class" else 0,
        device=device,
    )
    write_atomic(
        run.folder / "stats" / f"centre-{step:07d}.npz",
        lambda p: np.savez_compressed(
            p,
            t=c["t"],
            entropy=c["entropy"],
            distance=c["distance"],
            maps=np.stack(c["maps"], 1).astype(np.float16),
        ),
    )
    fig = plot_centre(c)
    write_atomic(run.folder / "centre.png", lambda p: fig.savefig(p, dpi=80))
    fig.clf()
    return f"{len(c['t'])} evaluations, {len(c['maps'])} layers, entropy {c['entropy'].mean():.3f} of its largest"


def repetitions(
    images,  # samples, uint8 (N, C, H, W)
    real,  # as many real ones
    device="cpu",  # where distances are computed
) -> dict:  # made, real: distance of each to its nearest other (N,); share of `made` below the 0.001 quantile of `real`; identical: how many have a twin
    "Are samples more alike than real images are?"
    from uvit_repro.metrics import nearest_training

    near = lambda x: nearest_training(x, x, 2, device)[1][:, 1].numpy()
    made, other = near(images), near(real)
    n = len(np.unique(images.flatten(1).numpy(), axis=0))
    return {
        "made": made,
        "real": other,
        "share": float((made < np.quantile(other, 0.001)).mean()),
        "identical": len(images) - n,
    }


def border_ratio(images, real, patch_size: int) -> float:
    "Roughness across patch borders over that inside, of samples over real images. NaN where patches have no border, or no inside."
    from uvit_repro.metrics import patch_seam_energy

    try:
        (a, b), (c, d) = (patch_seam_energy(x, patch_size) for x in (images, real))
    except ValueError:
        return math.nan
    return float(a / b / (c / d))


def measure_look(run, z: dict, say) -> str:
    "look.png and stats/look-STEP.npz: 16 samples with their nearest training images, repetitions, patch borders."
    import torch

    from uvit_repro.data.images import image_grid, save_png
    from uvit_repro.metrics import nearest_training

    e, data = open_experiment(run.exp)
    step, device = e.train.n_steps, pick_device(e.execution.device)
    x = read_samples(samples_folder(e, run.folder, step, e.evaluation.num_samples))[0]
    n = min(z["pairs"], len(x), len(data.test_images))
    i, d = nearest_training(x[:16], data.train_images, 3, device, e.data.flip)
    real = data.test_images[
        torch.randperm(len(data.test_images), generator=torch.Generator().manual_seed(0))[:n]
    ]
    rows = torch.cat([x[:16, None], data.train_images.cpu()[i]], 1).flatten(
        0, 1
    )  # each sample, then its neighbours; two groups in a row
    write_atomic(
        run.folder / "look.png",
        lambda p: save_png(image_grid(rows, 8, scale=max(1, 96 // x.shape[-1])), p),
    )
    rep, border = repetitions(x[:n], real, device), border_ratio(x[:n], real, e.model.patch_size)
    write_atomic(
        run.folder / "stats" / f"look-{step:07d}.npz",
        lambda p: np.savez_compressed(
            p,
            samples=x[:16].numpy(),
            index=i.numpy(),
            distance=d.numpy(),
            made=rep["made"],
            real=rep["real"],
            share=rep["share"],
            identical=rep["identical"],
            border=border,
        ),
    )
    return f"nearest training image {float(d[:, 0].min()):.3g} away at least, {rep['share']:.2%} repetitions, {rep['identical']} identical of {n}, border {border:.3g}"


EXTRAS = {  # name -> function of (run, sizes, say): in words what was found
    "look": measure_look,
    "cka": measure_cka,
    "centre": measure_centre,
    "fewer": lambda run, z, say: measure_more(run, z["fewer"], [{}], say, "GenViT"),
    "raw": lambda run, z, say: measure_more(
        run, run.exp.evaluation.num_samples, [{"weights": "raw"}], say, "Section 5.1"
    ),
    "solver": lambda run, z, say: measure_more(
        run, z["images"], [{"nfe": n} for n in z["nfe"]], say, "Table 3"
    ),
    "unguided": lambda run, z, say: measure_more(
        run, run.exp.evaluation.num_samples, [{"cfg_scale": 1.0}], say, "guidance"
    ),
    "guidance": lambda run, z, say: measure_more(
        run, z["images"], [{"cfg_scale": w} for w in z["scales"]], say, "guidance"
    ),
}

LIMIT = 8 * 2**20  # bytes of one record


def record_files(
    folder: Path,
) -> tuple:  # (files that are packed, {name: bytes} of what is left out)
    "What of a run's folder is evidence."
    folder = Path(folder)
    keep = [folder / n for n in EVIDENCE if (folder / n).is_file()] + sorted(
        (folder / "stats").glob("*.npz")
    )
    return keep, {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p not in keep and p.name != ".lock"
    }


def write_tar(path: Path, files: dict) -> Path:  # name inside -> file
    "A tar file that depends on nothing but names and content, whole or absent."

    def write(p):
        with tarfile.open(p, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, f in files.items():
                info = tarfile.TarInfo(name)
                info.size = f.stat().st_size
                with open(f, "rb") as content:
                    tar.addfile(info, content)

    return write_atomic(path, write)


def pack(
    folder: Path,  # of a run
    path: Path,  # the tar file
    prefix="",  # put before the run's name inside
    limit=LIMIT,  # bytes
) -> dict:  # bytes, files, left_out (name: bytes, files of one folder added up)
    "Write a run's record as a tar file that depends on nothing but its content. Raises `ValueError` when it is too large."
    keep, rest = record_files(folder)
    size = sum(p.stat().st_size for p in keep)
    if size > limit:
        raise ValueError(
            f"{folder.name}: its record has {size:,} bytes, more than {limit:,}; the largest are "
            + ", ".join(
                f"{p.name} ({p.stat().st_size:,})"
                for p in sorted(keep, key=lambda p: -p.stat().st_size)[:3]
            )
        )
    write_tar(
        path,
        {
            "/".join(filter(None, (prefix, folder.name, f.relative_to(folder).as_posix()))): f
            for f in sorted(keep)
        },
    )
    left = {}
    for n, b in rest.items():
        k = n.rpartition("/")[0] + "/*" if "/" in n else n
        left[k] = left.get(k, 0) + b
    return {"bytes": path.stat().st_size, "files": len(keep), "left_out": left}


def unpack(path: Path, target: Path) -> list:  # folders of runs
    "Write the files of a record below a folder, whatever the names in it say. Raises `ValueError` for a name that leads elsewhere."
    out = []
    with tarfile.open(path) as tar:
        for m in tar.getmembers():
            parts = Path(m.name).parts
            if (
                not m.isfile()
                or m.name.startswith("/")
                or ".." in parts
                or not 2 <= len(parts) <= 4
            ):
                raise ValueError(f"{path}: {m.name!r} is not a file of a record")
            data = tar.extractfile(m).read()
            write_atomic(target / m.name, lambda p: p.write_bytes(data))
            if parts[-1] == "run.json":
                out.append(target / Path(*parts[:-1]))
    return out


def clean(folder: Path) -> int:  # bytes
    "Delete what a packed run no longer needs: weights, checkpoints, samples."
    gone = [
        *folder.glob("weights-*.safetensors"),
        *folder.glob("checkpoint*.pt"),
        *(p for p in (folder / "samples").rglob("*") if p.is_file()),
    ]
    size = sum(p.stat().st_size for p in gone)
    for p in gone:
        p.unlink()
    shutil.rmtree(folder / "samples", ignore_errors=True)
    return size


class Heartbeat(threading.Thread):
    "A line every `every` seconds until it is stopped; keeps readings of how busy the device is."

    def __init__(self, say, device, every=15.0):
        super().__init__(daemon=True)
        self.say, self.device, self.every = say, device, every
        self.entry, self.line, self.readings, self.ended, self.cpu, self.since = (
            "",
            "",
            [],
            threading.Event(),
            (time.perf_counter(), time.process_time()),
            time.perf_counter(),
        )

    def begin(self, entry: str):
        self.entry, self.line, self.readings, self.since, self.cpu = (
            entry,
            "",
            [],
            time.perf_counter(),
            (time.perf_counter(), time.process_time()),
        )

    def note(self, line: str):
        self.line = line

    def busy(self) -> float:
        "Percent since the last reading (CPU), or now (GPU, as the driver says); NaN where nobody knows."
        if self.device.type != "cuda":
            (w, c), self.cpu = self.cpu, (time.perf_counter(), time.process_time())
            return 100 * (self.cpu[1] - c) / max(1e-9, self.cpu[0] - w) / (os.cpu_count() or 1)
        import torch

        with contextlib.suppress(Exception):
            return float(torch.cuda.utilization(self.device))
        with contextlib.suppress(Exception):
            return float(
                subprocess.run(
                    ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"],
                    capture_output=True,
                    text=True,
                    timeout=5,
                ).stdout.split()[self.device.index or 0]
            )
        return math.nan

    def beat(self):
        self.readings.append(b := self.busy())
        self.say(
            f"{time.strftime('%H:%M:%S', time.gmtime())}  {self.entry} +{format_duration(time.perf_counter() - self.since)}  busy {b:.0f} %  {self.line}"
        )

    def run(self):
        while not self.ended.wait(self.every):
            self.beat()

    def stop(self):
        self.ended.set()
        self.join()


def note_machine(folder: Path, exp: Experiment, readings: list, matrix_rate: float):
    "Add to run.json how busy the device was."
    with run_lock(folder, lambda line: None):
        info = json.loads((folder / "run.json").read_text())
        t = info.get("training", {})
        known = [r for r in readings if r == r]
        reached = (
            exp.train.n_steps * exp.train.batch_size * training_flops(macs_of(exp)) / t["seconds"]
            if t.get("seconds")
            else None
        )
        if known or "utilisation" not in info:
            info["utilisation"] = {
                "busy_percent": float(np.median(known)) if known else None,
                "readings": len(known),
                "training_flops_per_second": reached,
                "matrix_flops_per_second": matrix_rate,
                "share": reached and reached / matrix_rate,
            }
        write_json(folder / "run.json", info)


def seeds_wanted(
    entry: Entry,
    rows: list,  # of `verdicts.effects`, as dicts
) -> float:  # further seeds that would decide the nearest open comparison of this variant; infinity: none is open
    "How near a further seed of this variant brings a decision."
    from uvit_repro.report.verdicts import seeds_for, side

    mine = {entry_experiment(replace(entry, seed=s)).run_id for s in range(10)}
    found = [r for r in rows if r["n"] and mine & set(r["run_ids"])]
    wanted = []
    for r in found:
        if side(r)[0] != "open":
            continue
        n = (
            seeds_for(r, 0.05 / max(1, r["questions"])) if r["sd"] == r["sd"] else 4
        )  # no spread is known yet: as if three more were needed
        wanted.append(math.inf if n is None else max(1, n - r["n"]))
    return min(wanted, default=math.inf if found else 3.0)


def in_order(entries: list, out_dir=None) -> list:
    "The queue with the entries of point 7 sorted by `seeds_wanted`, from the records that are there."
    if not any(e.point == 7 for e in entries):
        return list(entries)
    from uvit_repro.report.verdicts import all_records, effects

    rows = effects(all_records("all", out_dir), "gpu").to_dict("records")
    rank = {e.name: (e.seed, seeds_wanted(e, rows)) for e in entries if e.point == 7}
    return [
        *(e for e in entries if e.point < 7),
        *sorted(
            (e for e in entries if e.point == 7), key=lambda e: (rank[e.name][1], rank[e.name][0])
        ),
        *(e for e in entries if e.point > 7),
    ]


def read_state(keep: Path) -> dict:
    "The queue's state; empty where there is none."
    try:
        return json.loads((Path(keep) / "queue.json").read_text())
    except (OSError, ValueError):
        return {}


def free_device(device):
    "Nothing of a run stays behind on the GPU, and compiled code does not pile up over runs."
    free_memory(device)
    if device.type == "cuda":
        import torch

        torch.compiler.reset()


def first_rate(exp: Experiment, device, seconds: float) -> float:
    "Operations per second of some updates, before anything has been run."
    rate = timed_updates(exp, device, seconds)
    free_device(device)
    return rate


class TimeOver(BaseException):
    "Raised inside a run past the budget; as an interruption, it leaves the run `stopped`."


class Queue:
    "Entries, what became of them, and the time that is left."

    def __init__(
        self,
        entries,
        keep,
        out_dir=None,
        protocol="gpu",
        budget=None,
        clean=False,
        retry=False,
        n_steps=None,
        say=print,
        every=15.0,
    ):
        (
            self.entries,
            self.keep,
            self.protocol,
            self.budget,
            self.clean,
            self.retry,
            self.n_steps,
            self.say,
            self.every,
        ) = list(entries), Path(keep), protocol, budget, clean, retry, n_steps, say, every
        self.out_dir, self.start, self.device = (
            runs_root(out_dir),
            time.perf_counter(),
            pick_device(),
        )
        self.exps = {e.name: self.experiment(e) for e in self.entries}
        old = read_state(self.keep)
        rows = {r["name"]: r for r in old.get("entries", [])}
        if old.get("protocol", protocol) != protocol:
            raise ParameterError(
                f"{self.keep} holds a queue of protocol {old['protocol']!r}: give another --keep"
            )
        bears = claims_of(self.entries)
        for e in self.entries:
            r = rows.setdefault(
                e.name,
                {
                    "name": e.name,
                    "state": "queued",
                    "run_id": self.exps[e.name].run_id,
                    "extras": {},
                },
            )
            r.update(point=e.point, claims=bears[e.name])
            if r["state"] == "running" or (r["state"] == "failed" and retry):
                r["state"] = "queued"  # whoever ran it is gone: this process holds the lock
            if (
                r["state"] == "queued"
                and protocol == "gpu"
                and not e.repeat
                and committed(self.exps[e.name])
            ):
                r["state"] = "published"
        self.rows = rows
        self.state = dict(
            old,
            protocol=protocol,
            budget=budget,
            began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            pid=os.getpid(),
            machine=machine_key(self.device, 0, self.exps[self.entries[0].name].train.precision),
        )

    def experiment(self, e: Entry) -> Experiment:
        return open_experiment(entry_experiment(e, self.protocol, self.n_steps))[0]

    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - (time.perf_counter() - self.start)

    def save(self, **more):
        self.state.update(
            more,
            seconds=time.perf_counter() - self.start,
            updated=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        self.state["entries"] = list(self.rows.values())
        write_json(self.keep / "queue.json", self.state)

    def folder(self, e: Entry) -> Path:
        return (self.out_dir / "repeats" if e.repeat else self.out_dir) / self.exps[e.name].run_id

    def predict(self, e: Entry) -> dict:
        x = self.exps[e.name]
        r = rates_for(
            x.model.model,
            [r["seen"] for r in self.rows.values() if r.get("seen")],
            self.state["first_rate"],
            FIXED[self.protocol],
        )
        return dict(predict_entry(e, x, r), rates=r)

    def next(self):
        "The first entry that is to be done and fits; None: there is none."
        todo = [
            e for e in self.entries if self.rows[e.name]["state"] in ("queued", "partly", "stopped")
        ]
        for part in ([e for e in todo if e.point < 7], [e for e in todo if e.point >= 7]):
            for e in in_order(part, self.out_dir):
                p = self.rows[e.name]["predicted"] = self.predict(e)
                if 1.1 * p["total"] <= self.left():
                    return e
        return None

    def watch(self, line):
        "Progress of a run: remembered by the heartbeat; past the budget it ends the run."
        self.heart.note(str(line).strip())
        if self.budget is not None and self.left() < -max(5.0, 0.05 * self.budget):
            raise TimeOver("the time is over")

    def run(self) -> dict:  # the state
        from filelock import FileLock, Timeout

        self.keep.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.keep / ".queue.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ParameterError(
                f"{self.keep}: another process works on this queue (see its queue.json); wait for it, or give another --keep"
            ) from None
        self.heart = Heartbeat(self.say, self.device, self.every)
        self.heart.begin("start")
        self.heart.start()
        try:
            for e in self.entries if self.clean else ():
                self.rows[e.name]["state"] == "done" and clean(self.folder(e))
            e = self.entries[0]
            cached_certificate(self.device)  # its seconds are no run's
            if not self.state.get("first_rate"):
                self.state.update(
                    first_rate=first_rate(
                        self.exps[e.name], self.device, 3.0 if self.protocol == "gpu" else 0.3
                    ),
                    matrix_rate=matmul_rate(
                        self.device, *([_bf16()] if self.protocol == "gpu" else [])
                    ),
                )
            self.save()
            while (e := self.next()) is not None:
                run_entry(self, e)
            self.save(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            self.say(state_lines(self.state)[-1])
        finally:
            self.heart.stop()
            lock.release()
        return self.state


def _bf16():
    import torch

    return torch.bfloat16


def pack_entry(q: Queue, e: Entry):
    "Write an entry's record as it is now."
    folder, row = q.folder(e), q.rows[e.name]
    q.heart.readings or q.heart.readings.append(
        q.heart.busy()
    )  # a run shorter than a heartbeat has one reading
    note_machine(folder, q.exps[e.name], q.heart.readings, q.state["matrix_rate"])
    row["record"] = dict(
        pack(folder, q.keep / f"{e.name}.tar", "repeats" if e.repeat else ""), file=f"{e.name}.tar"
    )
    q.save()


def run_extras(q: Queue, e: Entry, run):
    "Measure what is asked for on the weights; what fails or does not fit is recorded, and stops nothing."
    row = q.rows[e.name]
    for x in e.extras:
        if row["extras"].get(x, "left").partition(":")[0] not in (
            "left",
            "failed" if q.retry else "left",
        ):
            continue
        if q.left() < 0:
            row["extras"][x] = "left: the time was over"
            continue
        q.heart.note(x)
        begin = time.perf_counter()
        try:
            text = EXTRAS[x](run, SIZES[q.protocol], q.watch)
        except TimeOver:
            row["extras"][x] = "left: the time was over"
            continue
        except Exception as err:
            text = f"failed: {type(err).__name__}: {err}"
            traceback.print_exc()
        row["extras"][x] = text
        q.say(f"{e.name}: {x} in {format_duration(time.perf_counter() - begin)}: {text}")
        pack_entry(q, e)


def run_entry(q: Queue, e: Entry):
    "One entry from its start to its record."
    row, exp, folder, begin = q.rows[e.name], q.exps[e.name], q.folder(e), time.perf_counter()
    fresh = not folder.exists()
    row.update(state="running", tries=row.get("tries", 0) + 1, error=None)
    q.save()
    q.heart.begin(e.name)
    q.say(
        f"{e.name} starts: predicted {format_duration(row['predicted']['total'])}, {format_duration(q.left()) if q.budget is not None else 'any time'} left"
    )
    try:
        run = run_experiment(exp, folder.parent, q.watch, chapter="13c_evidence")
        pack_entry(q, e)
        run_extras(q, e, run)
        row["state"] = (
            "partly" if any(v.startswith("left") for v in row["extras"].values()) else "done"
        )
    except TimeOver:
        row["state"] = "stopped"
    except Exception as err:
        row.update(state="failed", error=f"{type(err).__name__}: {err}")
        traceback.print_exc()
    took = time.perf_counter() - begin
    row["seconds"] = row.get("seconds", 0) + took
    if row["state"] == "done":
        info = json.loads((folder / "run.json").read_text())
        if fresh:
            row["seen"] = rates_seen(info, exp, took)
        p = row["predicted"]
        note_attempt(
            folder,
            machine=q.state["machine"],
            rate=p["rates"]["train"],
            predicted={k: p[k] for k in ("train", "sample", "total")},
            seconds=info["wall_seconds"],
            cell_seconds=took,
            outcome="ran",
        )
        pack_entry(q, e)
        if q.clean:
            row["deleted_bytes"] = clean(folder)
    q.save()
    q.say(
        f"{e.name} {row['state']} in {format_duration(took)}, predicted {format_duration(row['predicted']['total'])}"
        + (f": {row['error']}" if row["error"] else "")
    )
    free_device(q.device)


def state_lines(
    state: dict,  # of a queue
) -> list:  # lines of text, the last one a summary
    "A queue's state for a terminal."
    lines, count = [], {}
    for r in state.get("entries", []):
        count[r["state"]] = count.get(r["state"], 0) + 1
        if r["state"] == "queued" and not r.get("predicted"):
            continue
        true, guess = (
            (format_duration(r["seconds"]) if r.get("seconds") else ""),
            format_duration(r["predicted"]["total"]) if r.get("predicted") else "",
        )
        lines.append(
            f"{r['name']:22s} {r['state']:9s} {guess:>7s} {true:>7s}  {r.get('record', {}).get('bytes', 0) / 1e6:6.2f} MB  "
            + (
                r.get("error")
                or "; ".join(
                    f"{k}: {v}"
                    for k, v in r["extras"].items()
                    if v.startswith(("left", "failed", "not run"))
                )
            )
        )
    return lines + [
        ", ".join(f"{n} {s}" for s, n in count.items())
        + f"; {format_duration(state.get('seconds', 0))} of {format_duration(state['budget']) if state.get('budget') else 'any'} time"
    ]


NEEDED = (
    "accelerate",
    "einops",
    "filelock",
    "matplotlib",
    "pandas",
    "PIL",
    "safetensors",
    "scipy",
    "torch_fidelity",
    "torchvision",
)  # that a run at protocol gpu imports sooner or later


def ready(protocol: str, entries: list):
    "Raise `ParameterError` with the cure when a run at protocol gpu could not be evidence here."
    import torch

    if protocol != "gpu":
        return
    if not torch.cuda.is_available():
        raise ParameterError(
            "protocol gpu needs a CUDA device, and this machine has none. The same command with --rehearse runs the whole queue at a tiny size on the CPU"
        )
    if gone := [n for n in NEEDED if importlib.util.find_spec(n) is None]:
        raise ParameterError(
            f"not installed here: {', '.join(gone)}; a run would fail after its training"
        )
    if why := obstacle(entry_experiment(entries[0])):
        raise ParameterError(why)
    if not conditions()["commit"]:
        raise ParameterError(
            "no commit is known here, and a record without one is no evidence: give --commit $(git rev-parse HEAD), taken where the checkout is"
        )
    from uvit_repro.data.features import feature_status

    if not (f := feature_status(entry_experiment(entries[0]).evaluation.features))[0]:
        raise ParameterError(f[1])


def choose(
    only: str = "",  # names or points, separated by commas; empty: all
    skip: str = "",  # likewise
) -> list:  # entries in the order of the queue
    "A part of the queue. Raises `ParameterError` for what is neither a name nor a point."
    words = lambda t: [w.strip() for w in t.split(",") if w.strip()]
    names = {e.name for e in QUEUE} | {str(e.point) for e in QUEUE}
    if bad := [w for w in words(only) + words(skip) if w not in names]:
        raise ParameterError(
            f"{', '.join(bad)}: no entry of the queue; known are the points 1 to 8 and {', '.join(e.name for e in QUEUE)}"
        )
    named = lambda e, t: e.name in words(t) or str(e.point) in words(t)
    return [e for e in QUEUE if (not only or named(e, only)) and not named(e, skip)]


def bundle(
    keep: Path,  # of a queue
    target: Path,  # a folder; made
    most=15 * 2**20,  # bytes of one file
) -> list:  # files
    "The records of a queue in few files: records-N.tar, with queue.json and queue.log beside them."
    keep, target = Path(keep), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    groups = [[]]
    for p in sorted(p for p in keep.glob("*.tar")):
        if (
            sum(x.stat().st_size + 1024 for x in groups[-1]) + p.stat().st_size + 20_480 > most
            and groups[-1]
        ):
            groups.append([])
        groups[-1].append(p)
    out = [
        write_tar(target / f"records-{i}.tar", {f.name: f for f in g})
        for i, g in enumerate(groups)
        if g
    ]
    return out + [
        write_atomic(target / n, lambda p: shutil.copyfile(keep / n, p))
        for n in ("queue.json", "queue.log")
        if (keep / n).exists()
    ]


def _unbundle(path: Path, folder: Path) -> list:
    "Record files: those inside a bundle, or the file itself."
    if not path.name.startswith("records-"):
        return [path]
    out = []
    with tarfile.open(path) as tar:
        for m in tar.getmembers():
            if not m.isfile() or "/" in m.name or not m.name.endswith(".tar"):
                raise ValueError(f"{path}: {m.name!r} is not a record")
            data = tar.extractfile(m).read()
            out.append(write_atomic(folder / m.name, lambda p: p.write_bytes(data)))
    return out


def sound(folder: Path) -> list:  # failed checks
    "Every check of a record that does not hold."
    rows = [r for r in verify(out_dir=folder.parent, prefix=folder.name) if not r["ok"]]
    t = json.loads((folder / "run.json").read_text()).get("training", {})
    return [r for r in rows if not (r["what"] == "images_per_second" and t.get("seconds", 0) < 60)]


def collect(
    sources: list,  # record files, bundles, or folders of them
    target: Path = None,  # None: results/published
    say=print,
) -> dict:  # lists of folders: published; records: refused (with reasons)
    "Unpack records, compute every number again, and publish what holds."
    target = Path(target or published_root())
    out = {"published": [], "refused": []}
    files = [
        f for s in map(Path, sources) for f in (sorted(s.glob("*.tar")) if s.is_dir() else [s])
    ]
    if not files:
        raise FileNotFoundError(
            f"no .tar in {', '.join(map(str, sources))}: give the folder that --keep named, or what `bundle` wrote"
        )
    with tempfile.TemporaryDirectory() as tmp:
        for f in [r for i, f in enumerate(files) for r in _unbundle(f, Path(tmp) / f"bundle-{i}")]:
            for folder in unpack(f, Path(tmp) / "records" / f.stem):
                info = json.loads((folder / "run.json").read_text())
                bad = [
                    f"{r['what']}: {r['recorded']}, recomputed {r['recomputed']}"
                    for r in sound(folder)
                ] or ([] if info["status"] == "ok" else [f"the run is {info['status']!r}"])
                if bad:
                    out["refused"].append(f"{f.name}: {'; '.join(bad[:3])}")
                    say(f"refused {out['refused'][-1]}")
                    continue
                dest = publish(
                    folder, target / "repeats" if folder.parent.name == "repeats" else target
                )
                out["published"].append(dest)
                say(
                    f"published {dest.name}"
                    + (" (repetition)" if dest.parent.name == "repeats" else "")
                )
    return out


def repeat_difference(
    first: Path,
    second: Path,  # folders of two runs of one experiment
):  # DataFrame: metric, step, first, second, log_ratio
    "How far apart two runs of one seed are, measurement by measurement; `pixels` is the mean difference of the first samples in grey levels."
    import pandas as pd

    if (a := Path(first).name) != (b := Path(second).name):
        raise ParameterError(f"{a} and {b} are runs of different experiments")
    read = lambda f: pd.read_csv(Path(f) / "measurements.csv").query("status == 'ok'")
    key = ["eval_id", "metric", "step"]
    d = read(first)[key + ["value"]].merge(
        read(second)[key + ["value"]], on=key, suffixes=("_1", "_2")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        d["log_ratio"] = np.where(
            (d.value_1 > 0) & (d.value_2 > 0), np.log(d.value_2 / d.value_1), np.nan
        )
    x, y = (np.load(Path(f) / "first.npz")["images"].astype(float) for f in (first, second))
    d.loc[len(d)] = ["", "pixels", int(d.step.max()), 0.0, float(np.abs(x - y).mean()), np.nan]
    return d.rename(columns={"value_1": "first", "value_2": "second"})[
        ["metric", "step", "first", "second", "log_ratio"]
    ]


def reading(
    entries=QUEUE,
    origin="all",
    out_dir=None,  # as in `load_results`
):  # DataFrame: entry, claims, ours and the paper's, state
    "Every entry of the queue with what is recorded of it."
    import pandas as pd

    from uvit_repro.config import eval_id, main_metric
    from uvit_repro.paper.numbers import FIGURE2, figure2

    runs, df, bears, rows = (
        {r["folder"].name: r for r in load_runs(origin, out_dir)},
        load_results(origin, out_dir),
        claims_of(entries),
        [],
    )
    curves = {
        tuple(sorted(kw.items())): figure2(p).query("variant == @label").set_index("steps").fid
        for p, (_, vs) in FIGURE2.items()
        for label, kw in vs
    }
    steps = [n for c in curves.values() for n in c.index]
    at = min(
        set(steps), key=lambda n: (-steps.count(n), n)
    )  # where most curves were read, the earliest
    for e in entries:
        if e.repeat:
            continue
        x = entry_experiment(e)
        r, mine = runs.get(x.run_id), df[df.run_id == x.run_id]
        n = x.train.n_steps
        mine = (
            mine[
                mine.eval_id.isin([eval_id(x, n, 0), eval_id(x, n, x.evaluation.num_samples)])
                & (mine.status == "ok")
            ]
            .drop_duplicates("metric")
            .set_index("metric")
            .value
        )
        theirs = curves.get(tuple(sorted(e.fields.items())))
        rows.append(
            {
                "entry": e.name,
                "state": (r["origin"] + ", " + r["status"]) if r else "not run",
                "claims": " ".join(bears[e.name]),
                "metric": main_metric(x),
                "ours": mine.get(main_metric(x)),
                "heldout_loss": mine.get("heldout_loss"),
                "paper_fid": None
                if theirs is None or at not in theirs.index
                else float(theirs[at]),
                "paper_steps": int(at),
                "run_id": x.run_id,
            }
        )
    return pd.DataFrame(rows)


EXAMPLES = """examples:
  python -m uvit_repro.campaign.evidence plan
  python -m uvit_repro.campaign.evidence run --rehearse --keep /tmp/keep
  python -m uvit_repro.campaign.evidence run --budget 25m --keep keep --clean --commit $(git rev-parse HEAD) --detach
  python -m uvit_repro.campaign.evidence run --only 1,patch-8-s0 --skip adopted-s0-repeat --budget 20m --keep keep
  python -m uvit_repro.campaign.evidence status --keep keep --wait 500
  python -m uvit_repro.campaign.evidence bundle keep carried
  python -m uvit_repro.campaign.evidence collect carried
run goes on where it was stopped; one process at a time works on a folder of records."""


def parser() -> argparse.ArgumentParser:
    "The options of `python -m uvit_repro.campaign.evidence`."
    from uvit_repro.cli import duration

    how = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    ap = argparse.ArgumentParser(
        prog="python -m uvit_repro.campaign.evidence",
        description="Runs at protocol gpu under a time budget, packed as small records.",
        **how,
    )
    sub = ap.add_subparsers(dest="command", required=True)
    commands = {
        "plan": "the queue with claims and predicted seconds",
        "run": "work on the queue",
        "status": "what became of it",
        "bundle": "records in few files",
        "collect": "verify records and publish them",
    }
    p = {n: sub.add_parser(n, help=h, description=h, **how) for n, h in commands.items()}
    for n in ("plan", "run"):
        p[n].add_argument(
            "--only", default="", help="names or points of the queue, separated by commas"
        )
        p[n].add_argument("--skip", default="", help="likewise, left out")
        p[n].add_argument(
            "--rehearse", action="store_true", help="at protocol smoke: a tiny size, on the CPU"
        )
    p["plan"].add_argument(
        "--tflops", type=float, help="rate of the machine (default: an assumption, see the chapter)"
    )
    r = p["run"]
    r.add_argument(
        "--budget",
        type=duration,
        help="time, as 25m or 1500s; only what fits is started (default: no limit)",
    )
    r.add_argument(
        "--out-dir", help="folder of runs (default: results/runs; with --rehearse KEEP/runs)"
    )
    r.add_argument(
        "--clean", action="store_true", help="delete weights and samples of a run once it is packed"
    )
    r.add_argument("--commit", help="commit of the code, where there is no checkout")
    r.add_argument(
        "--detach",
        action="store_true",
        help="start in a session of its own and return; output goes to KEEP/queue.log",
    )
    r.add_argument("--retry", action="store_true", help="try again what failed")
    r.add_argument("--steps", type=int, help="training steps, for a rehearsal")
    s = p["status"]
    s.add_argument("--wait", type=float, default=0.0, help="seconds to wait for the end")
    for n in ("run", "status"):
        p[n].add_argument(
            "--keep",
            default="results/keep",
            help="folder of records, state and log (default: results/keep)",
        )
    p["bundle"].add_argument("keep")
    p["bundle"].add_argument("out")
    p["bundle"].add_argument(
        "--megabytes", type=float, default=15, help="of one file (default: 15)"
    )
    p["collect"].add_argument("source", nargs="+", help="folders or .tar files")
    p["collect"].add_argument("--target", help="default: results/published")
    return ap


def run_command(a, argv: list) -> int:
    "`run`: here, or in a session of its own."
    keep = Path(a.keep).resolve()
    protocol = "smoke" if a.rehearse else "gpu"
    keep.mkdir(parents=True, exist_ok=True)
    if a.steps and not a.rehearse:
        raise ParameterError("--steps goes with --rehearse: runs at protocol gpu have 10,000 steps")
    if a.commit:
        os.environ["UVIT_REPRO_COMMIT"] = a.commit
    entries = choose(a.only, a.skip)
    ready(protocol, entries)
    if a.detach:
        with open(keep / "queue.log", "a") as log:
            p = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "uvit_repro.campaign.evidence",
                    *(v for v in argv if v != "--detach"),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        print(f"started as process {p.pid}; its output: {keep / 'queue.log'}")
        return 0
    st = Queue(
        entries,
        keep,
        a.out_dir or (keep / "runs" if a.rehearse else None),
        protocol,
        a.budget,
        a.clean,
        a.retry,
        a.steps,
        say=lambda line: print(line, flush=True),
    ).run()
    print("\n".join(state_lines(st)[:-1]))
    return 1 if any(r["state"] == "failed" for r in st["entries"]) else 0


def status_command(a) -> int:
    "`status`: 0 finished, 1 with failures or dead, 3 still running."
    keep, end = Path(a.keep), time.perf_counter() + a.wait
    while held(keep / ".queue.lock") and time.perf_counter() < end:
        time.sleep(min(2.0, max(0.05, end - time.perf_counter())))
    st, running = read_state(keep), held(keep / ".queue.lock")
    if not st and not running:
        raise FileNotFoundError(
            f"no queue in {keep}: start one with `run --keep {a.keep}`"
            + (
                f"; the end of its log:\n{(keep / 'queue.log').read_text()[-800:]}"
                if (keep / "queue.log").exists()
                else ""
            )
        )
    print("\n".join(state_lines(st)))
    if (keep / "queue.log").exists():
        print("\n".join((keep / "queue.log").read_text().splitlines()[-3:]))
    print("running" if running else "not running")
    return (
        3
        if running
        else 1
        if any(r["state"] in ("failed", "running") for r in st["entries"])
        else 0
    )


def main(args=None) -> int:
    "`python -m uvit_repro.campaign.evidence plan | run | status | bundle | collect`."
    argv = list(sys.argv[1:] if args is None else args)
    a = parser().parse_args(argv)
    try:
        if a.command == "run":
            return run_command(a, argv)
        if a.command == "status":
            return status_command(a)
        if a.command == "bundle":
            print(
                "\n".join(
                    f"{p}  {p.stat().st_size:,} bytes"
                    for p in bundle(a.keep, a.out, int(a.megabytes * 2**20))
                )
            )
            return 0
        if a.command == "collect":
            return 1 if collect(a.source, a.target)["refused"] else 0
        t = plan_table(
            choose(a.only, a.skip), "smoke" if a.rehearse else "gpu", a.tflops and a.tflops * 1e12
        )
        for r in t.itertuples():
            print(
                f"{r.entry:20s} {r.point}  {r.parameters / 1e6:7.2f}M  {format_duration(r.seconds):>7s}  {r.claims}"
            )
        print(
            f"{len(t)} entries, {hours(t.seconds.sum())} in all"
            + (
                ""
                if a.tflops or a.rehearse
                else f" at an assumed {assumed_rate() / 1e12:.0f} TFLOP/s"
            )
        )
        return 0
    except (ValueError, OSError) as e:
        print(f"failed: {e}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__" and "get_ipython" not in globals():
    sys.exit(main())
