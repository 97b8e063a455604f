"""Every number of the paper is a cell with an experiment or a reason, what is missing is planned with its cost, run inside a budget, and what is recorded can be recomputed."""

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from uvit_repro.ablations import variants
from uvit_repro.config import (
    CONFIGS,
    DATASET_DEFAULTS,
    DATASETS,
    MODELS,
    PARAMETERS,
    PATHS,
    PROTOCOLS,
    Experiment,
    ParameterError,
    content_name,
    data_root,
    eval_id,
    experiment,
    from_dict,
    main_metric,
    project_root,
    variant_name,
    with_overrides,
)
from uvit_repro.config.durations import format_duration
from uvit_repro.data.features import FEATURE_EXTRACTORS, feature_status
from uvit_repro.data.files import sha256_file, write_atomic, write_json
from uvit_repro.metrics import recompute
from uvit_repro.paper.claims import queued_experiments
from uvit_repro.paper.numbers import as_table5
from uvit_repro.paper.registry import KINDS, registry, select
from uvit_repro.runs.certificate import cached_certificate
from uvit_repro.runs.chapters import run_chapter
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.evaluate import measurements_of, missing_measurements
from uvit_repro.runs.experiment import chapter_parameters, open_experiment, repeat_command
from uvit_repro.runs.processes import default_workers
from uvit_repro.runs.records import SEAL, current_metric_name, load_runs, published_root, runs_root
from uvit_repro.train import Trainer, build_model, lr_at, sample_times_and_noise

CIFAR = "CIFAR10 U-ViT-S/2"


@functools.lru_cache(None)
def configurations() -> dict:
    "The released configurations, and the published runs of the other backbones (chapters 10, 11a, 12), by name."
    from uvit_repro.diffit import RUNS, published_run
    from uvit_repro.genvit import arm
    from uvit_repro.unet import appendix

    diffit = {f"DiffiT {k}": published_run(k) for k in RUNS}
    return {
        **CONFIGS,
        **{f"U-Net, Appendix {k}": e for (k, n), e in appendix().items() if n == "U-Net"},
        **diffit,
        "DiffiT ImageNet 256x256, 30 blocks": with_overrides(
            diffit["DiffiT ImageNet 256x256"], depth=30
        ),
        "GenViT CIFAR10": arm("paper", "own"),
    }


def keep_steps(exp: Experiment) -> tuple:
    "Every 50K iterations, as the released script saves."
    return tuple(range(50_000, exp.train.n_steps, 50_000))


def paper_experiment(
    c,  # a cell
    fields: dict,  # changes in training
    seed: int = 0,
) -> Experiment:  # at protocol paper, measured where the cell is
    "The released configuration with the change and the evaluation of a cell."
    e = with_overrides(configurations()[c.base], seed=seed, **fields)
    keep = keep_steps(e)
    last = c.step is None or c.step == e.train.n_steps
    if last and c.num_samples is None and not c.sampling and c.curve is None:
        return e  # the configuration as it was released
    n = c.num_samples or e.evaluation.num_samples
    curve = keep if c.curve == "all" else tuple(c.curve or ())
    ev = replace(
        e.evaluation,
        num_samples=n,
        curve_steps=curve,
        curve_samples=n,
        curve_sampler="",
        curve_nfe=0,
        loss_steps=tuple(s for s in keep if s not in curve),
    )
    return replace(e, sampling=replace(e.sampling, **c.sampling), evaluation=ev)


def smaller_experiment(c, fields: dict, protocol: str, seed: int = 0) -> Experiment:
    "The protocol with the change of a cell; of Figure 3 the change relative to the adopted sizes, as in chapter 06. Raises `ParameterError` where that is impossible."
    base, big = PROTOCOLS[protocol].model, CONFIGS[CIFAR].model
    fields = {k: v for k, v in fields.items() if k != "n_steps"}
    if "depth" in fields:
        fields["depth"] += base.depth - big.depth
    for k in {"embed_dim", "num_heads"} & set(fields):
        fields[k] = fields[k] * getattr(base, k) // getattr(big, k)
    return with_overrides(PROTOCOLS[protocol], seed=seed, **fields)


def no_experiment(
    c,  # a cell
    protocol: str,
) -> str:  # empty: it has one
    "Why a cell has no experiment at a protocol."
    if protocol not in PROTOCOLS:
        raise ParameterError(f"protocol = {protocol!r}: allowed are {', '.join(PROTOCOLS)}")
    if c.kind not in ("reproducible", "statement"):
        return c.reason or KINDS[c.kind]
    if not c.fields:
        return c.reason
    if protocol == "paper":
        return ""
    base = PROTOCOLS[protocol]
    toy = base.data.dataset != CONFIGS[CIFAR].data.dataset
    if toy and not c.place.startswith(("Figure", "Section")):
        return f"protocol {protocol} trains on {base.data.dataset}: a comparison of variants carries over, a row of a table does not"
    if (
        c.measure.startswith("cka")
        and re.search(r"\d", c.measure)
        and base.model.depth != CONFIGS[CIFAR].model.depth
    ):
        return f"an entry of a matrix of {CONFIGS[CIFAR].model.depth} layers; protocol {protocol} has {base.model.depth}"
    if c.base != CIFAR:
        return f"protocol {protocol} trains on {base.data.dataset} alone; needs protocol paper"
    try:
        [
            _build(
                c.base,
                json.dumps(f),
                c.step,
                c.num_samples,
                json.dumps(c.sampling),
                c.curve,
                protocol,
                0,
            )
            for f in c.fields
        ]
    except ParameterError as e:
        return f"impossible at protocol {protocol}: {e}"
    return ""


@functools.lru_cache(None)
def _build(base, fields, step, num_samples, sampling, curve, protocol, seed):
    c = SimpleNamespace(
        base=base, step=step, num_samples=num_samples, sampling=json.loads(sampling), curve=curve
    )
    return (
        paper_experiment(c, json.loads(fields), seed)
        if protocol == "paper"
        else smaller_experiment(c, json.loads(fields), protocol, seed)
    )


def cell_experiments(c, protocol: str, seed: int = 0) -> list:
    "All runs that a cell is about: one for a number, two or more for a statement; empty where `no_experiment` has a reason. Built once for cells that share them."
    if no_experiment(c, protocol):
        return []
    return [
        _build(
            c.base,
            json.dumps(f),
            c.step,
            c.num_samples,
            json.dumps(c.sampling),
            c.curve,
            protocol,
            seed,
        )
        for f in c.fields
    ]


def cell_experiment(
    c,  # a row of the registry
    protocol: str,  # smoke | laptop | gpu | paper
    seed: int = 0,
):  # Experiment, or None
    "The experiment that reproduces a cell (of a statement the last one), or nothing where there is none."
    es = cell_experiments(c, protocol, seed)
    return es[-1] if es else None


def position(
    c,
    exp: Experiment,  # a cell and its experiment
):  # (training step, images), or None
    "Where in a run a cell is measured. A shorter protocol answers for the same fraction of the run, or not at all."
    n, e = exp.train.n_steps, exp.evaluation
    if exp.protocol == "paper":
        step = c.step or n
        return step, c.num_samples or e.num_samples
    whole = 50_000 if c.place == "Figure 3" else configurations()[c.base].train.n_steps
    step = (c.step or whole) * n / whole
    return (
        (n, e.num_samples)
        if step == n
        else (int(step), e.curve_samples)
        if step in e.curve_steps
        else None
    )


def measurement(
    c,  # a row of the registry
    exp: Experiment,  # one of its experiments
):  # dict run_id, step, num_samples, sampler, nfe, cfg_scale, metric, eval_id; None where this protocol does not measure it
    "How a cell is found in the ledger."
    p = position(c, exp)
    if not p:
        return None
    s, e, last = exp.sampling, exp.evaluation, p[0] == exp.train.n_steps
    at = (
        exp
        if last
        else replace(
            exp, sampling=replace(s, sampler=e.curve_sampler or s.sampler, nfe=e.curve_nfe or s.nfe)
        )
    )
    metric = main_metric(exp) if c.measure == "fid" else c.measure
    return {
        "run_id": exp.run_id,
        "step": p[0],
        "num_samples": p[1],
        "sampler": at.sampling.sampler,
        "nfe": at.sampling.nfe,
        "cfg_scale": at.sampling.cfg_scale,
        "metric": metric,
        "eval_id": "" if metric.startswith("cka") else eval_id(at, *p),
    }


NOT_RUN, SEEDS = "not run", tuple(range(10)) + (1234,)


def computed(c):
    "A count of a cell, from the architecture alone."
    from uvit_repro.runs.counting import macs_of, params_of

    if c.measure.startswith("genvit_"):
        n = genvit_parameters(c.dataset)
        return n / 1e6 if c.measure.endswith("_M") else n
    e = with_overrides(configurations()[c.base], **{k: v for f in c.fields for k, v in f.items()})
    m = e.model
    tokens = (e.data.img_size // m.patch_size) ** 2 + {
        "none": 1,
        "class": 2,
        "text": 1 + e.data.text_tokens,
    }[m.condition]

    def linear():  # of the tokens, as the record counts DiffiT
        from uvit_repro.diffit import diffit_macs

        parts = diffit_macs(e.data.img_size, m.patch_size, e.data.in_chans, m.embed_dim, m.depth)
        return (
            macs_of(e) - sum(v for k, v in parts.items() if k != "linear layers of tokens")
        ) / 1e9

    return {
        "layers": lambda: m.depth,
        "hidden_size": lambda: m.embed_dim,
        "mlp_size": lambda: round(m.embed_dim * m.mlp_ratio),
        "heads": lambda: m.num_heads,
        "tokens": lambda: tokens,
        "params_exact": lambda: params_of(e),
        "params_M": lambda: params_of(e) / 1e6,
        "gflops": lambda: macs_of(e) / 1e9,
        "gflops_linear": linear,
    }[c.measure]()


@functools.lru_cache(None)
def genvit_parameters(dataset: str) -> int:
    "Trainable numbers of a published GenViT, with its classifier."
    import torch

    from uvit_repro.genvit import IMAGES, PRESETS, GenViT

    name, (side, classes) = {
        "CIFAR100": ("GenViT CIFAR10", (32, 100)),
        "ImageNet 32x32": ("GenViT CIFAR10", (32, 1000)),
    }.get(dataset) or (f"GenViT {dataset}", IMAGES[f"GenViT {dataset}"])
    p = PRESETS[name]
    with torch.device("meta"):
        return sum(
            v.numel()
            for v in GenViT(
                side,
                p["patch_size"],
                3,
                p["embed_dim"],
                p["depth"],
                p["num_heads"],
                p["mlp_ratio"],
                classes,
            ).parameters()
        )


def chosen(c):
    "What our configuration says about a setting of the paper."
    fixed = {"optimizer": "AdamW", "dropout": "0.0"}  # not fields: this package has no other
    return (
        {**as_table5(configurations()[c.base]), **fixed}.get(c.measure, "not a field of ours")
        if c.base
        else c.reason
    )


def ledger(
    results,  # `load_results()`
) -> dict:  # (run_id, metric): its rows, as dicts
    "Measurements that hold, ready to be looked up: for many cells make it once and hand it to `ours`."
    out = {}
    for r in results[results.status == "ok"].to_dict("records") if len(results) else ():
        out.setdefault((r["run_id"], r["metric"]), []).append(r)
    return out


def measured(
    c,
    results,  # a cell, and `load_results()` or `ledger` of it
    protocol: str,
    seeds=SEEDS,  # looked for
) -> list:  # one list of dicts (seed, value, run_id, eval_id, origin, folder) per run of the cell
    "The measurements that belong to a cell."
    book, out = results if isinstance(results, dict) else ledger(results), []
    for k in range(len(cell_experiments(c, protocol))):
        rows = []
        for s in seeds if book else ():
            m = measurement(c, cell_experiments(c, protocol, s)[k])
            if m is None:
                break
            hits = [
                r
                for r in book.get((m["run_id"], m["metric"]), ())
                if (r["eval_id"] == m["eval_id"] if m["eval_id"] else r["step"] == m["step"])
            ]
            rows += [
                dict(
                    seed=s,
                    value=float(r["value"]),
                    **{n: r[n] for n in ("run_id", "eval_id", "origin", "folder")},
                )
                for r in hits[:1]
            ]
        out.append(rows)
    return out


def ours(
    c,
    results=None,  # a row of the registry, and `load_results()` or `ledger` of it; None: counts and settings only
    protocol="paper",
    seeds=SEEDS,
):  # a number, a word, several numbers as text, or "not run"
    "Our value for a cell, in the metric of `measurement` (which is FID over Inception features only); a statement shows the values of its runs in order. For Figure 7 add `uvit_repro.cka.cka_results()` to the results."
    if c.kind == "computed":
        return computed(c)
    if c.kind == "setting":
        return chosen(c)
    if results is None or not (runs := measured(c, results, protocol, seeds)) or not all(runs):
        return NOT_RUN
    text = lambda rows: ", ".join(f"{r['value']:.4g}" for r in rows)
    return (
        runs[0][0]["value"]
        if len(runs) == 1 and len(runs[0]) == 1
        else " -> ".join(map(text, runs))
    )


def machine_key(device, threads: int, precision: str) -> str:
    "What a measured rate depends on."
    from importlib import metadata

    import torch

    from uvit_repro.runs.records import cpu_name

    name = (
        torch.cuda.get_device_name(device)
        if str(device).startswith("cuda")
        else f"{cpu_name()} x{os.cpu_count()}, {threads} threads"
    )
    return (
        f"{name}, torch {metadata.version('torch')}, {precision}"  # the version as run.json has it
    )


def precision_on(precision: str, device) -> str:
    "fp16 needs a GPU; on a CPU its place is taken by bf16."
    return "bf16" if precision == "fp16" and str(device).startswith("cpu") else precision


def timed_updates(
    exp: Experiment,
    device,  # what is trained, where
    seconds: float,  # for how long
) -> float:  # operations per second that real updates achieve
    "Time `Trainer` updates, after three that are not timed."
    import torch

    from uvit_repro.diffusion import Diffusion
    from uvit_repro.runs.counting import macs_of, training_flops
    from uvit_repro.runs.execution import choose_attention, set_attention

    net, diffusion, B = build_model(exp), Diffusion(exp.diffusion), exp.train.batch_size
    set_attention(net, choose_attention(exp, device))
    tr = Trainer(net, diffusion, exp.train, device)
    x = torch.randn(B, exp.data.in_chans, exp.data.img_size, exp.data.img_size, device=device)
    y = (
        {"y": torch.zeros(B, dtype=torch.long, device=device)}
        if exp.model.condition == "class"
        else {}
    )
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def update():
        tr.update(x, *sample_times_and_noise(0, tr.step, x.shape, diffusion, device), **y)

    for _ in range(3):
        update()
    wait()
    start, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - start < seconds:
        update()
        n += 1
        n % 10 or wait()
    wait()
    return training_flops(macs_of(exp)) * B * n / (time.perf_counter() - start)


def busy() -> bool:
    "Whether other work has kept half of the CPU's cores during the last minute."
    try:
        return os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return False


def probe_throughput(
    device="auto",
    precision="bf16",
    threads: int = 0,  # of the CPU; 0: as found
    seconds: float = 10.0,
    cache: Path = None,  # None: results/cache/throughput.json
    protocol="laptop",  # whose network is trained on a CPU
) -> float:  # operations per second
    "The rate of this machine, the best of three stretches: measured once for each device, number of threads, precision and version of torch, then read. One process measures at a time; what a busy CPU gave is used, not kept."
    import torch
    from filelock import FileLock

    device, was = pick_device(device), torch.get_num_threads()
    threads, precision = threads or was, precision_on(precision, device)
    cache = cache or project_root() / "results" / "cache" / "throughput.json"
    key = machine_key(device, threads, precision) + (", protocol cpu" if protocol == "cpu" else "")

    def read() -> dict:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(cache.read_text())
        return {}

    if key in (known := read()):
        return known[key]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(
        cache.with_suffix(".lock")
    ):  # two that measure at once would slow each other down
        if key in (known := read()):
            return known[key]
        exp, keep = (
            with_overrides(
                PROTOCOLS[
                    "gpu" if device.type == "cuda" else "cpu" if protocol == "cpu" else "laptop"
                ],
                precision=precision,
            ),
            device.type == "cuda" or not busy(),
        )
        torch.set_num_threads(threads)
        try:
            rate = max(timed_updates(exp, device, seconds / 3) for _ in range(3))
        finally:
            torch.set_num_threads(was)
        if keep:
            write_json(cache, dict(known, **{key: rate}))
    return rate


@functools.lru_cache(None)
def paper_gpu() -> tuple:  # (its name, operations per second)
    "The rate at which the authors trained: README, U-ViT-H/2, batch 128, mixed precision with xformers, one A100."
    from uvit_repro.runs.counting import macs_of, training_flops

    r = next(
        c
        for c in registry().itertuples()
        if c.column == "steps_per_second" and c.condition.endswith("mixed precision + xformers")
    )
    return "A100, at the rate of the paper's README", training_flops(
        macs_of(CONFIGS[r.base])
    ) * 128 * r.number


def predict(
    exp: Experiment,
    flops_per_second: float,
    done: float = 0.0,  # share of the training that is done
) -> dict:  # seconds: train, sample (with the held-out losses), total
    "What an experiment will cost: counted operations over a rate (chapter 06)."
    from uvit_repro.runs.counting import predict_seconds

    d = predict_seconds(exp, flops_per_second)
    train, sample = d["train"] * (1 - done), d["sample"] + d["loss"]
    return {"train": train, "sample": sample, "total": train + sample}


@dataclass(frozen=True)
class Job:
    "One command of a campaign."

    exp: Experiment
    places: tuple  # of the cells: Figure 2a, Table 1
    cells: tuple  # ids of the cells that it fills

    @property
    def name(self) -> str:
        return f"{self.exp.run_id.rpartition('-')[0]}, {self.exp.sampling.sampler} {self.exp.sampling.nfe}"


def from_command(
    text: str,  # a papermill command
) -> Experiment:  # what it would run
    "The experiment behind a command. Raises `ParameterError` for a name that is no parameter."
    words = shlex.split(text)
    given = [words[i + 1 : i + 3] for i, w in enumerate(words) if w == "-p"]

    def typed(name, v):
        kind = (
            int
            if name == "seed"
            else str
            if name in ("protocol", "dataset") or name not in PARAMETERS
            else PARAMETERS[name][1].type
        )
        return v == "True" if kind is bool else kind(v) if kind in (int, float) else v

    return experiment(**{k: typed(k, v) for k, v in given})


def jobs(
    what: str, protocol: str, seeds=(0,)
) -> list:  # of Job, in the order in which a budget should be spent
    "The runs behind some cells. A panel of Figure 2 is whole, as chapter 05 has it (with the variants that the paper does not plot), and comes in its order."
    from uvit_repro.ablations import ORDER

    if what == "claims":
        return [
            Job(e, ("claims",), ()) for e in queued_experiments(protocol)
        ]  # its seeds are named in the list
    cells, out = select(what), []
    panels = [c for c in cells.itertuples() if re.fullmatch(r"Figure 2[a-e]", c.place)]
    whole = panels and what not in set(cells.cell)
    for s in seeds:
        found = {}
        for c in cells.itertuples():
            for e in cell_experiments(c, protocol, s):
                found.setdefault(e, []).append(c)
        for _, _, kw, _ in (
            v
            for v in variants(PROTOCOLS[protocol])
            if whole and v[0] in {c.place[-1] for c in panels}
        ):
            e = (
                paper_experiment(panels[0], kw, s)
                if protocol == "paper"
                else smaller_experiment(panels[0], kw, protocol, s)
            )
            found.setdefault(e, [])
        rank = lambda e: (
            ORDER.index(v)
            if (v := variant_name(e.model).replace("adopted", "")) in ORDER
            else len(ORDER)
        )
        for e in (
            sorted(found, key=rank)
            if len(panels) == len(cells[cells.kind.isin(("reproducible", "statement"))])
            else found
        ):
            filled = tuple(c.cell for c in found[e] if c.kind == "statement" or position(c, e))
            out.append(
                Job(
                    e,
                    tuple(dict.fromkeys(c.place for c in found[e])) or ("Figure 2, not plotted",),
                    filled,
                )
            )
    return out


EMBEDDED = {
    "digits": "inside scikit-learn",
    "digits_latents": "made from scikit-learn's digits",
    "shapes": "drawn by the package",
}


def data_status(
    name: str,  # a key of DATASET_DEFAULTS
    root=None,  # folder of the data sets; None: as configured
) -> tuple:  # (found, where or why not, the command that fetches it)
    "Is a data set here? Nothing is opened."
    root = data_root(str(root) if root else "")
    if name in EMBEDDED:
        return True, EMBEDDED[name], ""
    if name in PATHS:
        return False, f"{name}:PATH, a user's own images", ""
    find = getattr(importlib.import_module(DATASETS[name].partition(":")[0]), f"find_{name}")
    try:
        return True, str(find(root)), ""
    except FileNotFoundError as e:
        first, _, rest = str(e).partition("\n")
        said = rest.strip() or first
        return False, f"not under {root}", said


def obstacle(exp: Experiment) -> str:
    "What keeps an experiment from running here and now; empty: nothing."
    d = exp.data.dataset
    kind = d.partition(":")[0]
    if kind in PATHS:
        return ""
    if exp.model.model not in MODELS:
        return f"no backbone {exp.model.model!r} in this version"
    found, detail, cure = data_status(kind, exp.execution.data_root)
    return (
        ""
        if found
        else f"{kind}: {detail}"
        + ("; uvit-repro doctor says how to get it" if kind in DATASETS else "")
    )


def _info(folder: Path) -> dict:
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def held(path: Path) -> bool:
    "Whether some process holds a lock file."
    from filelock import FileLock, Timeout

    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def progress(folder: Path, exp: Experiment) -> float:
    "The share of the training that a run need not do again, from 0 to 1."
    n = exp.train.n_steps
    if (folder / f"weights-{n:07d}.safetensors").exists():
        return 1.0
    if not any(folder.glob("checkpoint*.pt")):
        return 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        return min(1.0, int((folder / "log.csv").read_text().splitlines()[-1].split(",")[0]) / n)
    return 0.0


def committed(exp: Experiment) -> bool:
    "Whether a run with all its measurements is committed evidence."
    folder = published_root() / exp.run_id
    info = _info(folder)
    return info.get("status") == "ok" and not missing_measurements(exp, folder, info)


def state(
    exp: Experiment, out_dir=None
) -> tuple:  # (done | running | stopped | failed | published | blocked | missing, why)
    "What there is of an experiment. Nothing is opened or written."
    folder = runs_root(out_dir) / exp.run_id
    info = _info(folder)
    if info.get("status") == "ok" and not missing_measurements(exp, folder, info):
        return "done", ""
    if held(folder / ".lock"):
        return "running", "another process works on it"
    if why := obstacle(exp):
        return "blocked", why
    if info.get("status") == "failed":
        return "failed", str(info.get("error"))[:200]
    if share := progress(folder, exp):
        return "stopped", f"{share:.0%} of the training is there"
    if committed(exp):
        return "published", "committed evidence; not run on this machine"
    return "missing", ""


OPEN = (
    "missing",
    "published",
    "stopped",
    "failed",
    "running",
)  # states in which a run is still to be done here


def plan(
    what="all",  # as in `select`
    protocol: str = None,  # smoke | laptop | gpu | paper; None: what this machine can do
    seeds=(0,),  # each is a whole set of runs
    flops_per_second=None,  # of this machine; None: measured, or read
    out_dir=None,  # folder of runs
    say=None,  # told the table, line by line
):  # DataFrame, one row per command; totals and cells in `.attrs`
    "Every run behind some cells: what there is of it, what it will cost, and how to start it."
    import pandas as pd
    import torch

    from uvit_repro.config import default_protocol

    protocol = protocol or default_protocol()
    todo = jobs(what, protocol, seeds)
    gpu = torch.cuda.is_available()
    threads = max(1, (os.cpu_count() or 1) // default_workers())
    rate = flops_per_second or (
        probe_throughput(
            precision=PROTOCOLS[protocol].train.precision,
            threads=0 if gpu else threads,
            protocol=protocol,
        )
        if todo
        else None
    )
    name, big = (torch.cuda.get_device_name(), rate) if gpu else paper_gpu()
    rows, trained, run_of = [], set(), {}
    for j in todo:
        e, (st, why) = j.exp, state(j.exp, out_dir)
        share = 1.0 if e.run_id in trained else progress(runs_root(out_dir) / e.run_id, e)
        trained.add(e.run_id)
        here, there = (
            (dict.fromkeys(("train", "sample", "total"), 0.0),) * 2
            if st == "done"
            else (predict(e, r, share) for r in (rate, big))
        )
        rows.append(
            {
                "run_id": e.run_id,
                "state": st,
                "why": why,
                "protocol": protocol,
                "seed": e.seed,
                "variant": variant_name(e.model),
                "steps": e.train.n_steps,
                "sampler": f"{e.sampling.sampler} {e.sampling.nfe}",
                "places": ", ".join(j.places),
                "cells": len(j.cells),
                "train_seconds": here["train"],
                "sample_seconds": here["sample"],
                "seconds": here["total"],
                "gpu_hours": there["total"] / 3600,
                "command": repeat_command(e),
            }
        )
        for c in j.cells:
            run_of.setdefault(c, []).append(e.run_id)
    df = pd.DataFrame(
        rows,
        columns=[
            "run_id",
            "state",
            "why",
            "protocol",
            "seed",
            "variant",
            "steps",
            "sampler",
            "places",
            "cells",
            "train_seconds",
            "sample_seconds",
            "seconds",
            "gpu_hours",
            "command",
        ],
    )
    cells = [
        {
            "cell": c.cell,
            "kind": c.kind,
            "runs": run_of.get(c.cell, []),
            "reason": ""
            if c.cell in run_of
            else no_experiment(c, protocol)
            or f"protocol {protocol} has no measurement at this fraction of the run",
        }
        for c in (() if what == "claims" else select(what).itertuples())
    ]
    ready = df[df.state.isin(OPEN)]
    df.attrs = {
        "what": what,
        "protocol": protocol,
        "flops_per_second": rate,
        "gpu": name,
        "gpu_flops_per_second": big,
        "cells": cells,
        "gpu_hours": float(df.gpu_hours.sum()),
        "gpu_hours_ready": float(ready.gpu_hours.sum()),
        "seconds_ready": float(ready.seconds.sum()),
        "states": df.state.value_counts().to_dict(),
    }
    for line in plan_lines(df) if say else ():
        say(line)
    return df


def hours(s: float) -> str:
    "A duration for people: 42s, 3m05s, 1h02m, 12.5 days, 3.1 years."
    return (
        format_duration(s)
        if s < 48 * 3600
        else f"{s / 86400:.3g} days"
        if s < 400 * 86400
        else f"{s / 365.25 / 86400:.3g} years"
    )


def plan_lines(
    df,  # of `plan`
) -> list:  # lines of text
    "A plan as a table for a terminal, and its sums."
    a, w, big = (
        df.attrs,
        max([len(r) for r in df.run_id], default=6),
        df.attrs["protocol"] in ("gpu", "paper"),
    )
    cost = lambda r: "" if r.state == "done" else f"{r.gpu_hours:.3g}" if big else hours(r.seconds)
    lines = (
        [
            f"{'run':{w}s}  {'state':9s}  {'cells':>5s}  {'GPU-hours' if big else 'here':>9s}  measured with"
        ]
        if len(df)
        else []
    )
    lines += [
        f"{r.run_id:{w}s}  {r.state:9s}  {r.cells:5d}  {cost(r):>9s}  {r.sampler}"
        + (f"   ({r.why})" if r.why and r.state not in ("blocked", "published") else "")
        for r in df.itertuples()
    ]
    lines += [
        f"blocked, {n} of them: {why}"
        for why, n in df[df.state == "blocked"].why.value_counts().items()
    ]
    none = {}
    for c in a["cells"]:
        if not c["runs"]:
            none[c["kind"]] = none.get(c["kind"], 0) + 1
    if none:
        lines.append(
            f"cells that no run of protocol {a['protocol']} fills: "
            + ", ".join(f"{n} {k}" for k, n in sorted(none.items(), key=lambda kv: -kv[1]))
            + "; the reason of each is in --json"
        )
    lines.append(
        f"{len(df)} commands of protocol {a['protocol']}: "
        + (", ".join(f"{n} {s}" for s, n in a["states"].items()) or "none")
    )
    here = (
        f"{hours(a['seconds_ready'])} of work for this machine at {a['flops_per_second'] / 1e9:.4g} GFLOP/s a run"
        if len(df)
        else ""
    )
    if len(df):
        lines.append(
            f"sum of what is not done: {a['gpu_hours']:.4g} GPU-hours ({a['gpu']}), {a['gpu_hours_ready']:.4g} of them ready to run here"
            if big
            else f"sum of what is not done: {here}"
        )
    return lines


def plan_json(
    df,  # of `plan`
) -> dict:  # plain values: runs (as in the table), cells (with runs or a reason), totals
    "A plan for scripts and other schedulers."
    return dict(df.attrs, runs=json.loads(df.to_json(orient="records")))


def claim(
    run_id: str, out_dir=None
):  # a held lock to be released in the same thread, or None: somebody else has it
    "Claim a run without waiting. The claim of a killed process is gone with it; a run that works without a claim counts as claimed."
    from filelock import FileLock, Timeout

    path = runs_root(out_dir) / ".claims" / f"{run_id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    if held(runs_root(out_dir) / run_id / ".lock"):
        lock.release()
        return None
    return lock


class Live:
    "Progress of several runs: one rewritten line each on a terminal, plain lines otherwise."

    def __init__(self, say=print, stream=None, table: bool = None):
        self.say, self.stream, self.rows, self.drawn, self.lock = (
            say,
            stream or sys.stdout,
            {},
            0,
            threading.Lock(),
        )
        self.table = (
            say is print if table is None else table
        ) and self.stream.isatty()  # None: when nobody asked for lines of his own

    def __call__(self, name: str, text: str, final: bool = False):
        "What a run is doing now; the final line stays."
        with self.lock:
            if not self.table:
                self.say(f"[{name}] {text}")
                return
            width, out = (
                shutil.get_terminal_size().columns - 1,
                f"\x1b[{self.drawn}F" if self.drawn else "",
            )
            fit = lambda n, t: f"\x1b[2K{f'{n}  {t}'[:width]}\n"
            self.rows.pop(name, None) if final else self.rows.update({name: text})
            out += (
                (fit(name, text) if final else "")
                + "".join(fit(n, t) for n, t in self.rows.items())
                + "\x1b[J"
            )
            self.drawn = len(self.rows)
            self.stream.write(out)
            self.stream.flush()


def attempts(
    out_dir=None,
    machine: str = None,  # folder of runs; of this machine only
) -> list:  # dicts: run_id, machine, rate, predicted, seconds, cell_seconds, outcome
    "What was predicted and what it took, of every attempt that a campaign made."
    out = []
    for p in sorted(runs_root(out_dir).glob("*/prediction.json")):
        with contextlib.suppress(OSError, ValueError):
            out += [dict(a, run_id=p.parent.name) for a in json.loads(p.read_text())]
    return [a for a in out if machine in (None, a["machine"])]


def habits(
    past: list,  # of `attempts`
) -> tuple:  # (seconds until a run computes and after it, true over predicted)
    "How this machine differs from its predictions: medians over finished runs; 10 s and 1 where there are none."
    ok = [a for a in past if a["outcome"] == "ran"]
    slow = [a["seconds"] / a["predicted"]["total"] for a in ok if a["predicted"]["total"] > 10]
    return float(np.median([a["cell_seconds"] - a["seconds"] for a in ok] or [10.0])), float(
        np.median(slow or [1.0])
    )


def note_attempt(folder: Path, **entry):
    "Add an attempt to prediction.json."
    old = []
    with contextlib.suppress(OSError, ValueError):
        old = json.loads((folder / "prediction.json").read_text())
    write_json(
        folder / "prediction.json",
        [*old, dict(entry, when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))],
    )


class BudgetSpent(Exception):
    "Raised inside a run's progress when its time is over."


class Campaign:
    "Runs that are to be done, the workers that do them, and what became of each."

    def __init__(
        self,
        todo: list,
        rate: float,
        machine: str,
        budget=None,
        workers=1,
        out_dir=None,
        live=None,
        nb=None,
        threads=0,
        processes=1,
    ):
        (
            self.todo,
            self.rate,
            self.machine,
            self.out_dir,
            self.live,
            self.threads,
            self.processes,
        ) = list(todo), rate, machine, out_dir, live or Live(), threads, processes
        self.nb, self.workers = (
            nb or project_root() / "nbs" / "05_ablations.ipynb",
            max(1, min(workers, len(todo))),
        )
        self.reasons, self.state, self.lock, self.stop, self.waited = (
            {},
            {"done": [], "ran": [], "failed": [], "left": []},
            threading.Lock(),
            threading.Event(),
            False,
        )
        self.margin = (
            0.0 if budget is None else min(20.0, budget / 3)
        )  # progress is heard every 15 s at the latest
        self.end = math.inf if budget is None else time.perf_counter() + budget

    def left(self) -> float:
        return self.end - self.margin - time.perf_counter()

    def expected(self, job: Job) -> float:
        "Seconds that a run will take, as far as this machine's past tells."
        start, ratio = habits(attempts(self.out_dir, self.machine))
        e = job.exp
        return (
            start
            + ratio
            * predict(e, self.rate, progress(runs_root(self.out_dir) / e.run_id, e))["total"]
        )

    def take(self) -> tuple:  # (job, its lock) | (None, whether others hold some)
        "The next run that fits and that nobody has."
        with self.lock:
            busy = False
            for job in list(self.todo):
                if self.expected(job) > self.left():
                    continue
                held_by_us = claim(job.exp.run_id, self.out_dir)
                if held_by_us is None:
                    busy = True
                    continue
                self.todo.remove(job)
                if state(job.exp, self.out_dir)[0] != "done":
                    return job, held_by_us
                held_by_us.release()
                self.state["done"].append(job)  # somebody else has done it meanwhile
            return None, busy

    def work(self):
        while not self.stop.is_set():
            job, lock = self.take()
            if job is None:
                if not lock or self.left() <= 0:
                    return
                if not self.waited:
                    self.waited = True
                    self.live(
                        "campaign", "the runs that are left are claimed by another process; waiting"
                    )
                self.stop.wait(1.0)
                continue
            try:
                outcome = run_one(self, job)
            finally:
                lock.release()
            with self.lock:
                self.state[outcome].append(job)

    def run(self) -> dict:
        "Work until nothing fits any more. An interrupt stops the runs, whose checkpoints stay."
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(self.workers)]
        for t in threads:
            t.start()
        try:
            for t in threads:
                while t.is_alive():
                    t.join(0.2)
        except KeyboardInterrupt:
            self.stop.set()
            self.live("campaign", "interrupted; stopping the runs")
            for t in threads:
                t.join(60)
        self.state["left"] += self.todo
        return self.state


def run_one(c: Campaign, job: Job) -> str:  # ran, failed or left
    "Run one job through papermill, and note what was predicted and what it took."
    e, folder, begin, name = (
        job.exp,
        runs_root(c.out_dir) / job.exp.run_id,
        time.perf_counter(),
        job.exp.run_id.rpartition("-")[0],
    )
    before, predicted = (
        _info(folder).get("wall_seconds", 0),
        predict(e, c.rate, progress(folder, e)),
    )

    def say(line):
        c.live(name, line)
        if c.stop.is_set() or c.left() < 0:
            raise BudgetSpent

    c.live(name, f"starts; predicted {hours(predicted['total'])}")
    extra = dict(
        out_dir=str(c.out_dir) if c.out_dir else None,
        **({"threads": c.threads} if c.threads else {}),
        **({"processes": c.processes} if c.processes > 1 else {}),
    )
    try:
        run_chapter(c.nb, say=say, **chapter_parameters(e), **extra)
        outcome, why = "ran", ""
    except BudgetSpent:
        outcome, why = "left", "stopped before the budget ends; it will go on from its checkpoint"
    except Exception as x:
        outcome, why = "failed", f"{type(x).__name__}: {x}"
        c.reasons[e.run_id] = why
    for p in folder.glob(f".chapter.{os.getpid()}-{threading.get_ident()}.ipynb"):
        p.unlink()  # what a stopped papermill left
    took, info = time.perf_counter() - begin, _info(folder)
    seconds = info.get("wall_seconds", 0) - before
    if folder.exists():
        note_attempt(
            folder,
            machine=c.machine,
            rate=c.rate,
            predicted=predicted,
            seconds=seconds,
            cell_seconds=took,
            outcome=outcome,
        )
    c.live(
        name,
        f"{ {'ran': 'done', 'failed': 'failed', 'left': 'stopped'}[outcome] } in {format_duration(took)}, predicted {hours(predicted['total'])}"
        + (f": {why}" if why else ""),
        final=True,
    )
    return outcome


EXECUTORS = ("local", "slurm", "submitit-local")


def run_jobs(
    todo: list,  # of Job, in the order in which a budget should be spent
    budget: float = None,  # seconds; None: no limit
    executor="local",  # local | slurm | submitit-local (one machine, by way of submitit)
    workers: int = None,  # runs at a time; None: one per core, at most 8, one on a GPU
    out_dir=None,
    say=print,
    flops_per_second=None,  # of this machine; None: measured, or read
    nb=None,  # the chapter that does one run; None: 05_ablations
    live: bool = None,  # rewrite lines where standard output is a terminal; None: when `say` is print
    processes=1,  # that train one run together
    **slurm,  # partition, time and the like, for submitit
) -> dict:  # lists of run ids: done (there before, or done by others), ran, failed, left, blocked; reasons of failures; seconds; interrupted; jobs where submitit took them
    "Do runs that are not done, inside a budget."
    import torch

    begin = time.perf_counter()
    if executor not in EXECUTORS:
        raise ParameterError(f"executor = {executor!r}: allowed are {', '.join(EXECUTORS)}")
    if executor != "local" and budget is not None:
        raise ParameterError("budget goes with executor = 'local'; a cluster has limits of its own")
    gpu, cores = torch.cuda.is_available(), os.cpu_count() or 1
    states = [state(j.exp, out_dir) for j in todo]
    ready = [j for j, (s, _) in zip(todo, states) if s in OPEN]
    result = {
        "done": [j for j, (s, _) in zip(todo, states) if s == "done"],
        "ran": [],
        "failed": [],
        "left": [],
        "blocked": [j for j, (s, _) in zip(todo, states) if s == "blocked"],
    }
    for why in dict.fromkeys(w for s, w in states if s == "blocked"):
        say(f"blocked: {why}")
    extra = {}
    n = max(1, workers or max(1, default_workers() // processes))
    threads = (
        0 if gpu else max(1, cores // (n * processes))
    )  # the same threads for every run, however many are left: the same bits
    if executor != "local":
        extra = {
            "jobs": submit(
                ready,
                executor,
                out_dir,
                nb,
                say,
                threads=threads if executor == "submitit-local" else 0,
                processes=processes,
                **slurm,
            )
        }
    elif ready:
        precision, device = ready[0].exp.train.precision, pick_device()
        rate = flops_per_second or probe_throughput(
            device, precision, threads, protocol=ready[0].exp.protocol
        )
        say(
            f"{len(ready)} runs to do, {min(n, len(ready))} at a time"
            + (f", {hours(budget)} of time" if budget is not None else "")
        )
        given = None if budget is None else budget - (time.perf_counter() - begin)
        c = Campaign(
            ready,
            rate * processes,
            machine_key(
                device, threads or torch.get_num_threads(), precision_on(precision, device)
            ),
            given,
            n,
            out_dir,
            Live(say, table=live),
            nb,
            threads,
            processes,
        )
        for k, v in c.run().items():
            result[k] += v
        extra = {"interrupted": c.stop.is_set(), "reasons": c.reasons}
        if result["left"] and given is not None:
            say(
                f"{len(result['left'])} runs left; the next one needs about {hours(min(c.expected(j) for j in result['left']))}, the same command goes on"
            )
    say(
        ", ".join(f"{len(v)} {k}" for k, v in result.items() if v or k in ("done", "ran", "left"))
        + (f", {len(extra['jobs'])} submitted" if "jobs" in extra else "")
    )
    return dict(
        {k: [j.exp.run_id for j in v] for k, v in result.items()},
        **{"reasons": {}, **extra},
        seconds=time.perf_counter() - begin,
    )


def run(
    what: str,
    protocol: str = None,  # as for `plan`
    budget: float = None,  # seconds; None: no limit
    seeds=(0,),
    out_dir=None,
    **how,  # executor, workers, say, processes and the rest, as for `run_jobs`
) -> dict:  # as of `run_jobs`
    "Do what a plan has left, inside a budget."
    import tempfile

    from uvit_repro.config import default_protocol

    protocol = protocol or default_protocol()
    if protocol == "smoke" and not out_dir:
        out_dir = tempfile.mkdtemp(prefix="uvit-smoke-")
    todo = jobs(what, protocol, seeds)
    if not todo:
        raise ParameterError(
            f"{what!r} has no run at protocol {protocol}: {no_experiment(next(select(what).itertuples()), protocol)}"
        )
    return run_jobs(todo, budget, out_dir=out_dir, **how)


def submitted_run(
    params: dict, run_id: str, out_dir, nb, root: str
) -> str:  # ran | done | claimed by another
    "What one job of a cluster does: claim, run the chapter, give back."
    os.environ["UVIT_REPRO_ROOT"] = root
    os.chdir(root)
    lock = claim(run_id, out_dir)
    if lock is None:
        return "claimed by another"
    try:
        e = experiment(**params)
        if state(e, out_dir)[0] == "done":
            return "done"
        run_chapter(
            nb or project_root() / "nbs" / "05_ablations.ipynb",
            **params,
            out_dir=str(out_dir) if out_dir else None,
        )
        return "ran"
    finally:
        lock.release()


def submit(
    todo: list,  # of Job
    executor="slurm",  # slurm | submitit-local
    out_dir=None,
    nb=None,
    say=print,
    folder=None,  # of submitit's logs; None: results/cache/submitit
    wait=None,  # for the results; None: on this machine yes, on a cluster no
    threads=0,  # of the CPU for each run; 0: as the job finds them
    processes=1,  # that train one run together, each with a GPU of its own where there are GPUs
    **options,  # for submitit: slurm_partition, slurm_account, mem_gb, ...
) -> list:  # dicts run_id, job, outcome (None: not waited for)
    "Submit runs with submitit, one job each. Raises `ParameterError` where submitit or Slurm is not there."
    if importlib.util.find_spec("submitit") is None:
        raise ParameterError("executor = 'slurm' needs submitit: pip install submitit")
    if executor == "slurm" and not shutil.which("sbatch"):
        raise ParameterError(
            "executor = 'slurm': no sbatch on this machine. Run it where Slurm is, use executor = 'local', or give plan --json to another scheduler"
        )
    import submitit

    ex = submitit.AutoExecutor(
        folder=str(folder or project_root() / "results" / "cache" / "submitit"),
        cluster="slurm" if executor == "slurm" else "local",
    )
    by_hand, handles = (
        {
            k: int(v) if str(v).isdigit() else v
            for k, v in options.items()
            if executor == "slurm" or not k.startswith("slurm_")
        },
        [],
    )
    rate = paper_gpu()[1]
    for j in todo:
        big = j.exp.protocol in ("gpu", "paper")
        minutes = math.ceil(
            max(30, 3 * predict(j.exp, rate if big else 5e9)["total"] / 60)
        )  # three times the A100's time; a small model at 5 GFLOP/s
        ex.update_parameters(
            **{
                **{
                    "name": j.exp.run_id[:60],
                    "timeout_min": minutes,
                    "cpus_per_task": (4 if big else 1) * processes,
                    "gpus_per_node": processes if big else 0,
                },
                **by_hand,
            }
        )
        handles.append(
            ex.submit(
                submitted_run,
                dict(
                    chapter_parameters(j.exp),
                    **({"threads": threads} if threads else {}),
                    **({"processes": processes} if processes > 1 else {}),
                ),
                j.exp.run_id,
                str(out_dir) if out_dir else None,
                str(nb) if nb else None,
                str(project_root()),
            )
        )
        say(f"submitted {j.exp.run_id} as job {handles[-1].job_id}")
    wait = executor != "slurm" if wait is None else wait
    return [
        {"run_id": j.exp.run_id, "job": h.job_id, "outcome": h.result() if wait else None}
        for j, h in zip(todo, handles)
    ]


def prediction_report(
    origin="all",
    out_dir=None,
    cache: Path = None,  # as in `probe_throughput`
):  # DataFrame: run_id, origin, machine, predicted and true seconds (train, sample, total), their ratio, achieved GFLOP/s
    "Predicted against true cost of the recorded runs."
    import pandas as pd

    from uvit_repro.runs.counting import macs_of, training_flops

    cache, known, kept, rows = (
        cache or project_root() / "results" / "cache" / "throughput.json",
        {},
        {a["run_id"]: a for a in attempts(out_dir) if a["outcome"] == "ran"},
        [],
    )
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
    for r in load_runs(origin, out_dir):
        e, c, t = r["experiment"], r.get("conditions", {}), r.get("training", {})
        if r["status"] != "ok" or not t.get("seconds"):
            continue
        name = (
            c["gpu"]
            if c.get("gpu")
            else f"{c.get('cpu')} x{c.get('cores')}, {c.get('threads')} threads"
        )
        key = f"{name}, torch {c.get('versions', {}).get('torch')}, {e.train.precision}"
        a = kept.get(r["folder"].name, {}) if r["origin"] == "runs" else {}
        rate = a.get("rate") or known.get(key)
        p = predict(e, rate) if rate else dict.fromkeys(("train", "sample", "total"), float("nan"))
        sample = sum(v["seconds"] for v in r.get("evaluations", {}).values())
        rows.append(
            {
                "run_id": r["folder"].name,
                "origin": r["origin"],
                "machine": key,
                "predicted_train": p["train"],
                "true_train": t["seconds"],
                "predicted_sample": p["sample"],
                "true_sample": sample,
                "predicted": p["total"],
                "true": r["wall_seconds"],
                "ratio": r["wall_seconds"] / p["total"] if rate else float("nan"),
                "gflops_per_second": training_flops(macs_of(e))
                * e.train.batch_size
                * e.train.n_steps
                / t["seconds"]
                / 1e9,
            }
        )
    return pd.DataFrame(
        rows,
        columns=[
            "run_id",
            "origin",
            "machine",
            "predicted_train",
            "true_train",
            "predicted_sample",
            "true_sample",
            "predicted",
            "true",
            "ratio",
            "gflops_per_second",
        ],
    )


def plot_predictions(
    df,  # of `prediction_report`
):  # matplotlib axes
    "Each run a dot, training and sampling apart; on the line the prediction was right, dotted lines are off by a factor of two."
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for ax, part in zip(axes, ("train", "sample")):
        d = df.dropna(subset=[f"predicted_{part}"])
        x, y = d[f"predicted_{part}"], d[f"true_{part}"]
        ax.scatter(x, y, s=28, alpha=0.8)
        lo, hi = (min(x.min(), y.min()) * 0.8, max(x.max(), y.max()) * 1.25) if len(d) else (1, 10)
        for f, style in ((1, "-"), (2, ":"), (0.5, ":")):
            ax.plot([lo, hi], [f * lo, f * hi], style, color="0.5", lw=1)
        ax.set(
            xscale="log",
            yscale="log",
            xlim=(lo, hi),
            ylim=(lo, hi),
            xlabel="predicted (s)",
            ylabel="true (s)",
            title={"train": "training", "sample": "sampling and measuring"}[part],
        )
        for a in (ax.xaxis, ax.yaxis):
            a.set_major_formatter("{x:g}")
            a.set_minor_formatter("{x:g}")
        ax.tick_params(which="minor", labelsize=8)
    fig.tight_layout()
    return axes


def check(
    rows: list,
    what: str,
    where: str,
    recorded,
    recomputed,
    rel=0.0,
    low=0.0,  # allowed relative and absolute difference of numbers
):
    "Add a row to a list of checks: what, where, recorded, recomputed, ok."
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    ok = (
        abs(recorded - recomputed) <= max(low, rel * abs(recomputed))
        if number(recorded) and number(recomputed)
        else recorded == recomputed
    )
    rows.append(
        {
            "what": what,
            "where": where,
            "recorded": recorded,
            "recomputed": recomputed,
            "ok": bool(ok),
        }
    )


def verify_seal(rows: list, folder: Path) -> bool:
    "Compare a run's files with its seal; whether there is one."
    if not (folder / SEAL).exists():
        return False
    for line in (folder / SEAL).read_text().splitlines():
        want, name = line[:64], line[66:]
        check(
            rows,
            "sha256",
            f"{folder.name}/{name}",
            want,
            sha256_file(folder / name) if (folder / name).is_file() else "missing",
        )
    return True


def verify_run(rows: list, folder: Path) -> dict:
    "Check run.json against itself: names, sums, steps, times. Gives its evaluations as experiments by name."
    at, info = f"{folder.name}/run.json", json.loads((folder / "run.json").read_text())
    e = from_dict(info["experiment"])
    n, B = e.train.n_steps, e.train.batch_size
    check(rows, "run_id of the experiment", at, folder.name, e.run_id)
    check(rows, "run_id", at, info["run_id"], e.run_id)
    check(rows, "images_seen", at, info["images_seen"], n * B)
    check(
        rows,
        "data sha256",
        at,
        info["data"]["sha256"],
        e.data.data_sha256 or content_name(e.data)[1],
    )
    check(rows, "run_id of the command", at, from_command(info["command"]).run_id, e.run_id)
    for name, mine, _ in info["deviations"]:
        check(
            rows,
            f"deviation {name}",
            at,
            mine,
            json.loads(json.dumps(getattr(getattr(e, PARAMETERS[name][0]), name))),
        )
    for c in info["certificate"]:
        check(rows, f"certificate {c['file']}", at, c["ok"], c["difference"] < c["tolerance"])
    t, own = info["training"], {eval_id(x, step, k) for x, step, k in measurements_of(e)}
    parts = sum(
        v["seconds"] for i, v in info["evaluations"].items() if i in own
    )  # later ones are not the run's
    check(
        rows,
        "images_per_second",
        at,
        t["images_per_second"],
        t["steps"] * B / t["seconds"],
        rel=0.02 if t["steps"] == n else math.inf,
    )
    check(
        rows,
        "wall_seconds covers its parts",
        at,
        True,
        -1 <= info["wall_seconds"] - t["seconds"] - parts <= 60 + 0.05 * info["wall_seconds"],
    )
    expected = {}
    for eid, v in info["evaluations"].items():
        x = (
            replace(
                e,
                sampling=replace(e.sampling, **v["sampling"]),
                evaluation=replace(e.evaluation, features=v["features"]),
            )
            if v["num_samples"]
            else e
        )
        expected[eid] = (x, v["step"], v["num_samples"])
        path = folder / "stats" / f"{eid}.npz"
        check(
            rows,
            "name of the evaluation",
            f"{at} evaluations",
            eid,
            eval_id(x, v["step"], v["num_samples"]),
        )
        check(
            rows,
            "sha256 of the statistics",
            f"{folder.name}/stats/{eid}.npz",
            v["stats_sha256"],
            sha256_file(path) if path.is_file() else "missing",
        )
    for x, step, k in measurements_of(e):
        check(rows, "evaluation is there", at, eval_id(x, step, k) in expected, True)
    return expected


def statistics_values(path: Path) -> dict:
    "Every metric that a file of statistics gives."
    with np.load(path) as d:
        s = dict(d)
    if "loss" in s:
        return {"heldout_loss": float(s["loss"].mean())}
    return (
        {r["metric"]: r["value"] for r in recompute(s)}
        if "features" in s
        else {"heldout_loss": None}
    )


def verify_measurements(rows: list, folder: Path, expected: dict):
    "Recompute each row of measurements.csv, and compare its columns with its evaluation."
    import csv

    at, given = f"{folder.name}/measurements.csv", {}
    with open(folder / "measurements.csv", newline="") as f:
        table = list(csv.DictReader(f))
    for eid in expected:
        try:
            given[eid] = statistics_values(folder / "stats" / f"{eid}.npz")
        except Exception as x:
            given[eid] = {}
            check(
                rows,
                f"statistics of {eid}",
                f"{folder.name}/stats",
                f"{type(x).__name__}: {x}",
                "readable",
            )
    seen = set()
    for r in table:
        eid, m = r["eval_id"], r["metric"]
        place = f"{at}, {eid}"
        seen.add((eid, current_metric_name(m)))
        if eid not in expected:
            check(rows, m, place, "in the ledger", "no such evaluation in run.json")
            continue
        x, step, n = expected[eid]
        value = given[eid].get(current_metric_name(m), "not in the statistics")
        check(
            rows,
            m,
            place,
            float(r["value"]) if r["value"] else None,
            value,
            rel=1e-7 if m.startswith(("fd_", "fid", "sfid", "kid")) else 1e-12,
            low=1e-12,
        )
        fixed = {
            "run_id": folder.name,
            "seed": str(x.seed),
            "step": str(step),
            "protocol": x.protocol,
            "variant": variant_name(x.model),
            "model": x.model.model,
            "dataset": content_name(x.data)[0],
            "weights": x.sampling.weights,
        }
        if n:
            fixed.update(
                sampler=x.sampling.sampler,
                nfe=str(x.sampling.nfe),
                cfg_scale=str(x.sampling.cfg_scale),
            )
        check(rows, f"columns of {m}", place, {k: r[k] for k in fixed}, fixed)
    for eid, values in given.items():
        for m in values:
            check(rows, f"{m} is in the ledger", f"{at}, {eid}", (eid, m) in seen, True)


def verify_log(rows: list, folder: Path):
    "Check log.csv against the schedule and the record."
    import csv

    info = json.loads((folder / "run.json").read_text())
    e, at = from_dict(info["experiment"]), f"{folder.name}/log.csv"
    with open(folder / "log.csv", newline="") as f:
        log = [{k: float(v) for k, v in r.items()} for r in csv.DictReader(f)]
    steps, secs = [r["step"] for r in log], [r["seconds"] for r in log]
    check(
        rows,
        "steps rise to the last",
        at,
        steps == sorted(set(steps)) and steps[-1] == e.train.n_steps,
        True,
    )
    check(rows, "seconds rise", at, secs == sorted(secs), True)
    for r in log:
        check(
            rows,
            f"lr at step {r['step']:.0f}",
            at,
            r["lr"],
            float(f"{lr_at(e.train, int(r['step']) - 1):.6g}"),
            rel=1e-9,
        )
    check(
        rows,
        "losses are finite and positive",
        at,
        all(math.isfinite(r["loss"]) and r["loss"] > 0 for r in log),
        True,
    )
    check(rows, "seconds of training", at, secs[-1], info["training"]["seconds"], rel=0.01, low=1.0)


def verify(
    origin="published",  # published | runs
    out_dir=None,  # folder of runs, instead
    say=None,  # told what does not hold, and a summary
    prefix="",  # only runs whose name begins so
) -> list:  # dicts: what, where, recorded, recomputed, ok
    "Recompute every recorded number of every run. A run that can't be read is one failed check, by name."
    if origin not in ("published", "runs"):
        raise ParameterError(f"origin = {origin!r}: allowed are published, runs")
    root = Path(out_dir) if out_dir else published_root() if origin == "published" else runs_root()
    rows, folders, sealed = [], sorted(p.parent for p in root.glob(f"{prefix}*/run.json")), 0
    if not folders and say:
        say(f"no run under {root}")
    for folder in folders:
        sealed += verify_seal(rows, folder)
        if (
            origin == "runs"
            and _info(folder).get("status") != "ok"
            and (folder / "run.json").exists()
        ):
            continue  # what is not finished is not reported
        for part in ("run", "measurements", "log"):
            try:
                if part == "run":
                    expected = {}
                    expected = verify_run(rows, folder)
                elif part == "measurements":
                    verify_measurements(rows, folder, expected)
                else:
                    verify_log(rows, folder)
            except Exception as e:
                check(
                    rows,
                    f"{part} can be read",
                    f"{folder.name}",
                    f"{type(e).__name__}: {e}",
                    "whole",
                )
    bad = [r for r in rows if not r["ok"]]
    for r in bad if say else ():
        say(
            f"DIFFERS  {r['what']} in {r['where']}: recorded {r['recorded']}, recomputed {r['recomputed']}"
        )
    if say:
        say(
            f"{len(folders)} runs, {sealed} sealed; {len(rows)} checks, {len(bad)} differ"
            + (
                f": {', '.join(dict.fromkeys(r['where'].split('/')[0] for r in bad))}"
                if bad
                else ""
            )
        )
    return rows


def doctor_versions() -> list:
    "Versions of what the package needs, against what it asks for."
    from importlib import metadata

    rows = [
        (
            "python",
            sys.version.split()[0],
            sys.version_info >= (3, 10),
            "install Python 3.10 or newer",
        )
    ]
    try:
        asked = metadata.requires("uvit_repro") or []
    except metadata.PackageNotFoundError:
        return rows + [
            ("uvit_repro", "not installed", False, "pip install -e . in the project's folder")
        ]
    for line in asked:
        if ";" in line:
            continue
        name, low = re.match(r"([\w.-]+)", line)[1], re.search(r">=([\d.]+)", line)
        high = re.search(r"<([\d.]+)", line)
        key = lambda v: [int(x) for x in re.findall(r"\d+", v)[:3]]
        try:
            v = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed", False, f"pip install '{line}'"))
            continue
        rows.append(
            (
                name,
                v,
                (not low or key(v) >= key(low[1])) and (not high or key(v) < key(high[1])),
                f"pip install '{line}'",
            )
        )
    return rows


def doctor(
    say=None,  # told each finding
    self_test=True,  # compute the equivalence certificate, ten seconds where it is not known
    out_dir=None,  # folder of runs
) -> list:  # dicts what, state (ok | missing | problem), detail, cure
    "What this machine has, what it lacks, and the command that fetches it. Missing data are no problem: they close a protocol, not the package."
    import torch

    out = []

    def found(what, state, detail, cure=""):
        out.append(
            {
                "what": what,
                "state": state,
                "detail": str(detail),
                "cure": "" if state == "ok" else cure,
            }
        )
        if say:
            say(
                f"{state:8s} {what}: {detail}"
                + (
                    ""
                    if state == "ok" or not cure
                    else "\n" + "\n".join(f"           {l.strip()}" for l in cure.splitlines())
                )
            )

    for name, v, ok, cure in doctor_versions():
        found(name, "ok" if ok else "problem", v, cure)
    for name, why in {
        "submitit": "submits runs to a cluster",
        "jupyterlab": "opens the chapters",
    }.items():
        found(
            name,
            "ok" if importlib.util.find_spec(name) else "missing",
            "found" if importlib.util.find_spec(name) else f"optional: {why}",
            f"pip install {name}",
        )
    gpus = (
        [
            f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
            for i in range(torch.cuda.device_count())
        ]
        if torch.cuda.is_available()
        else []
    )
    found(
        "GPU",
        "ok" if gpus else "missing",
        ", ".join(gpus) or "none; protocols gpu and paper need one",
        "run where a CUDA device is, or use --protocol laptop",
    )
    found("CPU", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    for name in DATASET_DEFAULTS:
        if name in PATHS:
            continue
        there, detail, cure = data_status(name)
        found(f"data {name}", "ok" if there else "missing", detail, cure)
    for name in FEATURE_EXTRACTORS:
        there, message = feature_status(name)
        text = message.partition(": ")[2]
        found(
            f"features {name}",
            "ok" if there else "problem" if "sha256" in text else "missing",
            text.splitlines()[0],
            "\n".join(text.splitlines()[1:]),
        )
    doctor_machine(found, out_dir)
    if self_test:
        try:
            rows = cached_certificate(pick_device())
            bad = [r["file"] for r in rows if not r["ok"]]
            found(
                "self-test",
                "problem" if bad else "ok",
                f"differs from the released code in {', '.join(bad)}"
                if bad
                else f"equal to the released code in {len(rows)} checks",
                "report it with the output of this command",
            )
        except Exception as e:
            found("self-test", "problem", f"{type(e).__name__}: {e}", "reinstall uvit_repro")
    if say:
        say(
            f"{sum(r['state'] == 'problem' for r in out)} problems, {sum(r['state'] == 'missing' for r in out)} missing"
        )
    return out


def doctor_machine(found, out_dir=None):
    "Chapters, write access and disk space."
    books = sorted((project_root() / "nbs").glob("[0-9]*.ipynb"))
    found(
        "chapters",
        "ok" if books else "problem",
        f"{len(books)} under {project_root() / 'nbs'}",
        "run inside a checkout, or set UVIT_REPRO_ROOT to it",
    )
    root = runs_root(out_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        p = write_atomic(root / f".doctor-{os.getpid()}", lambda p: p.write_text("x"))
        p.unlink()
        found("write access", "ok", root)
    except OSError as e:
        found(
            "write access",
            "problem",
            f"{root}: {e}",
            "choose another folder with --out-dir, or change its rights",
        )
    space = root
    while not space.exists():
        space = space.parent
    free = shutil.disk_usage(space).free / 2**30
    found(
        "disk",
        "ok" if free > 5 else "problem",
        f"{free:.1f} GiB free at {space}",
        "free some space: a run of U-ViT-S/2 keeps about 2 GiB",
    )


def run_sweep(
    cells: list,  # dicts of chapter parameters, in order of importance
    nb=None,  # the chapter that runs one cell; None: 05_ablations
    budget: float = None,  # seconds; None: no limit
    workers: int = None,  # cells at a time; None: one per core, at most 8, one on a GPU
    say=print,  # progress lines
    out_dir=None,  # folder of runs
    flops_per_second=None,  # of this machine, for the budget; None: measured, or read
) -> dict:  # lists of cells: done (there before), ran, failed (with `error`), left
    "Run the cells that are missing through papermill, inside a time budget."
    jobs = [Job(open_experiment(experiment(**c))[0], (), ()) for c in cells]
    options = {"say": say, "nb": nb, "flops_per_second": flops_per_second}
    got = run_jobs(jobs, budget, workers=workers, out_dir=out_dir, **options)
    cell = {j.exp.run_id: c for j, c in zip(jobs, cells, strict=True)}
    found = {kind: [cell[i] for i in got[kind]] for kind in ("done", "ran", "left")}
    failed = [{**cell[i], "error": got["reasons"][i]} for i in got["failed"]]
    return {**found, "failed": failed}
