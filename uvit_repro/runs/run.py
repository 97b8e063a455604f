"""One call takes an experiment from images to recorded measurements, does nothing the second time, and never spoils what another process is doing."""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from uvit_repro.config import (
    PARAMETERS,
    PROTOCOLS,
    EvalConfig,
    Experiment,
    ParameterError,
    content_name,
    deviations,
    eval_id,
    experiment,
    from_dict,
    project_root,
    resolve_name,
)
from uvit_repro.config.durations import format_duration
from uvit_repro.data.files import (
    run_lock,
    sha256_file,
    source_sum,
    sweep_unfinished,
    write_atomic,
    write_json,
)
from uvit_repro.data.features import feature_status
from uvit_repro.data.images import Data, image_grid, open_data, save_png, summary, to_uint8
from uvit_repro.diffusion import Diffusion
from uvit_repro.metrics import MeasureOptions, heldout_loss, measure_images, nearest_training
from uvit_repro.runs.devices import DistributedContext, join_processes, pick_device
from uvit_repro.runs.execution import (
    AUTOCAST,
    choose_attention,
    compile_blocks,
    set_attention,
    set_residual,
    wants_compile,
)
from uvit_repro.runs.records import conditions, load_results, record, runs_root
from uvit_repro.sample import (
    batch_bounds,
    check_sampler,
    null_condition,
    sample_batches,
    sample_labels,
)
from uvit_repro.train import golden_file, golden_training, load_weights, train

TOLERANCES = {"forward": 1e-5, "training": 1e-4, "sampling": 1e-4}


def golden_forward(name: str, device="cpu") -> float:
    "Largest difference of one forward pass from the released code's."
    from uvit_repro.uvit import load_official

    d, part = golden_file(name)
    cfg, inp = json.loads(str(d["config"])), part("input")
    model = load_official(part("state"), cfg["num_heads"], cfg.get("num_clip_token")).to(device)
    args = {k: inp[k].to(device) for k in ("y", "context") if k in inp}
    with torch.inference_mode():
        out = model(inp["x"].to(device), inp["timesteps"].to(device), **args)
    return float((out.cpu() - torch.tensor(d["output"])).abs().max())


def golden_sampling(name: str, device="cpu") -> float:
    "Largest difference of sampled images from the released code's, over their largest value."
    from uvit_repro.config import DiffusionConfig
    from uvit_repro.sample import Denoiser, dpm_solver_fast, euler_maruyama
    from uvit_repro.uvit import load_official

    d, _ = golden_file(name)
    guided = "y" in d.files
    w, part = golden_file("train_discrete_class" if guided else "train_vpsde")
    model = load_official(part("final"), json.loads(str(w["config"]))["net"]["num_heads"]).to(
        device
    )
    diffusion, x, worst = (
        Diffusion(DiffusionConfig(process="sd" if guided else "vp")),
        torch.tensor(d["x_init"]).to(device),
        0.0,
    )
    cond = {"y": torch.tensor(d["y"]).to(device)} if guided else {}
    den = lambda: (
        Denoiser(
            model,
            diffusion,
            1 + float(d["released_scale"]),
            null={"y": torch.tensor(int(d["null_class"]))},
        )
        if guided
        else Denoiser(model, diffusion)
    )
    for key in d.files:
        if key.startswith("dpm_solver"):
            got = dpm_solver_fast(den(), x, int(key.split("/")[1]), pp=guided, **cond)
        elif key == "euler_maruyama/output":
            got = euler_maruyama(
                den(),
                x,
                int(d["euler_maruyama/steps"]),
                lambda i: torch.tensor(d["euler_maruyama/noise"][i]).to(device),
            )
        else:
            continue
        worst = max(
            worst, float((got.cpu() - torch.tensor(d[key])).abs().max() / np.abs(d[key]).max())
        )
    return worst


def certificate(
    device="cpu",  # where to compute
) -> list:  # rows: what, file, difference, tolerance, ok
    "Outputs, 20 training steps and samples beside the released code's, in float32."
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        rows = [
            ("forward", n, golden_forward(n, device))
            for n in ("uvit_unconditional", "uvit_class_conditional", "uvit_text")
        ]
        rows += [
            ("training", n, max(golden_training(n, torch.device(device)).values()))
            for n in ("train_vpsde", "train_discrete_class")
        ]
        rows += [
            ("sampling", n, golden_sampling(n, device))
            for n in ("sample_vpsde", "sample_discrete_guided")
        ]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    return [
        {
            "what": w,
            "file": n,
            "difference": d,
            "tolerance": TOLERANCES[w],
            "ok": bool(d < TOLERANCES[w]),
        }
        for w, n, d in rows
    ]


def cached_certificate(device="cpu") -> list:
    "The certificate of this code on this machine: computed once, then read."
    name = (
        torch.cuda.get_device_name(device)
        if str(device).startswith("cuda")
        else f"cpu-{os.cpu_count()}"
    )
    path = (
        project_root()
        / "results"
        / "cache"
        / f"certificate-{hashlib.sha256(f'{name} {torch.__version__} {source_sum()}'.encode()).hexdigest()[:12]}.json"
    )
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    rows = certificate(device)
    with contextlib.suppress(OSError):
        write_json(path, rows)
    return rows


PROGRESS = (
    "step ",
    "sampled ",
    "resumed ",
    "read ",
    "encoded ",
    "another process ",
)  # lines that are passed on from another process


def evaluated_network(
    net,
    exp: Experiment,
    device,  # a network with its weights, its experiment, where it is to run
) -> tuple:  # (network, diffusion)
    "A network made ready to be evaluated: on its device, with the faster attention, compiled where that pays."
    set_attention(net.to(device), choose_attention(exp, device))
    set_residual(net, exp.execution.residual)
    if wants_compile(exp.execution.compile, device, exp.train.n_steps):
        compile_blocks(net, strict=exp.execution.compile != "auto")
    return net, Diffusion(exp.diffusion)


def _network(exp: Experiment, folder: Path, step: int, device):
    return evaluated_network(load_weights(exp, folder, step), exp, device)


def sample_conditions(
    exp: Experiment,
    data: Data,
    n: int,
    device,  # run, its data, how many images, where the network is
) -> (
    tuple
):  # conditions of all images, those without condition (None without guidance), labels or None
    "What images 0 .. n - 1 are asked to be: classes in turn or by frequency, or the evaluation prompts in their order (Appendix A)."
    s, C, labels, cond = exp.sampling, exp.data.num_classes, None, {}
    if exp.model.condition == "class":
        labels = sample_labels(
            s.sample_seed,
            0,
            n,
            C,
            data.train_labels.bincount(minlength=C) if s.labels == "frequency" else None,
        )
        cond = {"y": labels}
    if exp.model.condition == "text":
        cond = {"context": data.texts.prompts(n)}
    return (
        cond,
        null_condition(
            s.cfg_scale, cond, C, data.texts.null if "context" in cond else None, device
        ),
        labels,
    )


IN_MEMORY = 2**31  # bytes of samples; more are mapped from a file


def room(
    shape,
    folder: Path,  # of uint8 images; where a file would lie
) -> torch.Tensor:  # not filled
    "Room for images: memory, or a file that disappears with the tensor (50,000 images of 512 x 512 are 39 GB)."
    if math.prod(shape) <= IN_MEMORY:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        return torch.from_file(f.name, shared=True, size=math.prod(shape), dtype=torch.uint8).view(
            shape
        )


def read_samples(
    where: Path,  # folder of shards
    most: int = None,  # only the first ones; None: all
) -> tuple:  # uint8 (n, C, H, W), labels (n,) or None
    "The samples of a measurement. Raises `FileNotFoundError` when they are not all there."
    if not (where / "whole.json").exists():
        raise FileNotFoundError(
            f"{where}: the samples are not complete ({len(list(where.glob('[0-9]*.npy')))} shards); the command that draws them goes on where it stopped"
        )
    said = json.loads((where / "whole.json").read_text())
    n = min(most or said["shape"][0], said["shape"][0])
    out = room((n, *said["shape"][1:]), where)
    for a, b in batch_bounds(n, said["batch"]):
        out[a:b] = torch.from_numpy(np.load(where / f"{a:07d}.npy")[: b - a])
    return out, torch.tensor(said["labels"][:n]) if said["labels"] is not None else None


def samples_folder(exp: Experiment, folder: Path, step: int, n: int) -> Path:
    "Where n samples of a step lie: by their sampling alone, so that another feature network or reference measures the same images."
    return folder / "samples" / eval_id(replace(exp, evaluation=EvalConfig()), step, n)


def draw_samples(
    exp: Experiment,
    data: Data,
    folder: Path,
    step: int,
    n: int,  # run, its data, its folder, kept step, how many
    say=print,
    team=DistributedContext(),
    network=None,  # progress, the processes that draw, () -> (network, diffusion); None: the run's weights of the step
) -> Path:  # the folder of shards, see `read_samples`
    "Sample n images with the weights of a step; what is there already is not drawn again."
    where, ex = samples_folder(exp, folder, step, n), exp.execution
    plan = where / "batch.json"
    if team.first((where / "whole.json").exists):
        return where
    B = team.first(
        lambda: (
            json.loads(plan.read_text())
            if plan.exists()
            else write_json(plan, ex.sample_batch) and ex.sample_batch
        )
    )  # what was begun in batches of one size goes on in them
    device, start = pick_device(ex.device), time.perf_counter()
    last = start
    (net, diffusion), (cond, null, labels) = (
        network() if network else _network(exp, folder, step, device),
        sample_conditions(exp, data, n, device),
    )
    todo = [
        ab
        for ab in batch_bounds(n, B, (team.rank, team.size))
        if not (where / f"{ab[0]:07d}.npy").exists()
    ]
    batches = sample_batches(
        net,
        diffusion,
        exp.sampling,
        (exp.data.in_chans, exp.data.img_size, exp.data.img_size),
        todo,
        cond,
        null,
        device,
        AUTOCAST[exp.train.precision],
        finish=(lambda z: data.decode(z, exp.sampling.decoder)) if data.decode else to_uint8,
    )
    for k, (a, b, x) in enumerate(batches):
        write_atomic(where / f"{a:07d}.npy", lambda p: np.save(p, x.numpy()))
        if (now := time.perf_counter()) - last > 15:
            last = now
            say(
                f"sampled {b}/{n}, {format_duration((now - start) / (k + 1) * (len(todo) - k - 1))} left"
            )
    team.gather(None)
    if team.rank == 0:
        write_json(
            where / "whole.json",
            {
                "shape": [n, *np.load(where / "0000000.npy", mmap_mode="r").shape[1:]],
                "batch": B,
                "labels": labels if labels is None else labels.tolist(),
            },
        )
    return where


def _has(folder: Path, eid: str) -> bool:
    "Whether a measurement is recorded and its statistics are whole."
    path = folder / "measurements.csv"
    if not path.exists() or not (folder / "stats" / f"{eid}.npz").exists():
        return False
    return any(line.split(",")[1:2] == [eid] for line in path.read_text().splitlines()[1:])


def measure_samples(
    exp: Experiment,
    data: Data,
    folder: Path,
    step: int,
    n: int,
    say=print,
    team=DistributedContext(),
    network=None,
    **where,
) -> dict:
    "Draw n images of a step, all processes together; the first one measures and records. Returns an entry for run.json."
    eid, start = eval_id(exp, step, n), time.perf_counter()
    where_they_are = draw_samples(exp, data, folder, step, n, say, team, network)
    if team.rank:
        return {}
    sampled = time.perf_counter() - start
    net = exp.evaluation.features
    images, labels = read_samples(where_they_are)
    rows, stats = measure_images(
        images,
        labels,
        data,
        MeasureOptions(
            net,
            pick_device(exp.execution.device),
            project_root() / "results" / "cache",
            None if data.decode else exp.model.patch_size,
            exp.data.flip,
            exp.execution.reference or None,
        ),
        extra=data.judge(images) if data.judge else None,
    )
    write_atomic(folder / "stats" / f"{eid}.npz", lambda p: np.savez_compressed(p, **stats))
    record(folder, exp, step, n, rows, **where)
    say(
        f"step {step}: "
        + ", ".join(f"{r['metric']} {r['value']:.4g}" for r in rows if r["value"] is not None)[:300]
    )
    return {
        eid: {
            "step": step,
            "num_samples": n,
            "sampling": asdict(exp.sampling),
            "features": net,
            "features_found": feature_status(net)[0],
            "sampling_seconds": sampled,
            "seconds": time.perf_counter() - start,
            "stats_sha256": sha256_file(folder / "stats" / f"{eid}.npz"),
        }
    }


def measure_loss(
    exp: Experiment,
    data: Data,
    folder: Path,
    step: int,
    team=DistributedContext(),
    network=None,
    **where,
) -> dict:
    "Record the held-out denoising loss of a step. Returns an entry for run.json."
    eid, start, device = (
        eval_id(exp, step, 0),
        time.perf_counter(),
        pick_device(exp.execution.device),
    )
    held = data.test_images if data.test_inputs is None else data.test_inputs
    n = min(exp.evaluation.loss_images, len(held))
    if n:
        net, diffusion = network() if network else _network(exp, folder, step, device)
        pick = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[
            :n
        ]  # the same images for every run on these data
        cond = {}
        if exp.model.condition == "class":
            cond["y"] = data.test_labels[pick]
        if exp.model.condition == "text":
            cond["context"] = data.texts.test(pick).float()
        r = heldout_loss(
            net,
            diffusion,
            held[pick],
            cond,
            exp.evaluation.loss_levels,
            device=device,
            autocast=AUTOCAST[exp.train.precision],
            part=(team.rank, team.size),
        )
        r["loss"] = sum(team.gather(r["loss"]))
        rows = [{"metric": "heldout_loss", "value": float(r["loss"].mean()), "num_samples": n}]
    else:
        r, rows = (
            {},
            [
                {
                    "metric": "heldout_loss",
                    "value": None,
                    "num_samples": 0,
                    "why": f"{exp.data.dataset} has no held-out images: set holdout",
                }
            ],
        )
    if team.rank:
        return {}
    write_atomic(
        folder / "stats" / f"{eid}.npz", lambda p: np.savez_compressed(p, n=np.int64(n), **r)
    )
    record(folder, exp, step, 0, rows, **where)
    return {
        eid: {
            "step": step,
            "num_samples": 0,
            "seconds": time.perf_counter() - start,
            "stats_sha256": sha256_file(folder / "stats" / f"{eid}.npz"),
        }
    }


def keep_picture(exp: Experiment, data: Data, folder: Path, n: int, k: int = 40) -> None:
    "samples.png (a grid, 10 in a row) and first.npz (the first k samples and their nearest training images)."
    images, labels = read_samples(
        draw_samples(exp, data, folder, exp.train.n_steps, n), max(100, k)
    )
    x = images[:k]
    save_png(
        image_grid(images[:100], 10, scale=max(1, 256 // (10 * x.shape[-1]))),
        folder / "samples.png",
    )
    near = {}
    if data.train_images is not None:
        i, d = nearest_training(x, data.train_images, mirror=exp.data.flip)
        near = {"nearest": data.train_images[i[:, 0]].numpy(), "distance": d[:, 0].numpy()}
    write_atomic(
        folder / "first.npz",
        lambda p: np.savez_compressed(
            p,
            images=x.numpy(),
            **near,
            **({} if labels is None else {"labels": labels[:k].numpy()}),
        ),
    )


def with_reference(
    exp: Experiment,  # any
) -> Experiment:  # with the sum of its reference statistics
    "Reference statistics are part of what is measured by their content, never by their path."
    path, want = exp.execution.reference, exp.evaluation.reference_sha256
    if not path:
        return exp
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"reference = {path!r}: no such file. It holds mu and sigma of the features of the reference images; leave it out to use the training images"
        )
    if want not in ("", found := sha256_file(Path(path))):
        raise ValueError(
            f"reference = {path!r}: its sum is {found[:16]}..., the experiment was made with {want[:16]}..."
        )
    return replace(exp, evaluation=replace(exp.evaluation, reference_sha256=found))


def open_experiment(exp: Experiment) -> tuple:
    "The experiment with what only the files know (sums, classes), and its data."
    exp, data = open_data(exp)
    return with_reference(exp), data


@dataclass
class Run:
    "A finished run: its folder, its experiment as run, its record."

    folder: Path
    exp: Experiment
    info: dict
    fresh: bool  # whether this call did any work

    @property
    def run_id(self) -> str:
        return self.folder.name

    def measurements(self):
        "Its rows of the ledger, a DataFrame."
        df = load_results("runs", self.folder.parent)
        return (
            df[df.run_id == self.run_id].drop(columns=["origin", "folder"]).reset_index(drop=True)
        )

    def first(self) -> dict:
        "Arrays of first.npz: images, labels, nearest training images."
        with np.load(self.folder / "first.npz") as d:
            return dict(d)


def measurements_of(exp: Experiment):
    "What is to be measured: (experiment with its sampling, step, number of images; 0 for the held-out loss), in order."
    e, s = exp.evaluation, exp.sampling
    curve = replace(
        exp, sampling=replace(s, sampler=e.curve_sampler or s.sampler, nfe=e.curve_nfe or s.nfe)
    )
    losses = [(exp, step, 0) for step in sorted({*e.loss_steps, *e.curve_steps, exp.train.n_steps})]
    return (
        losses
        + [(curve, step, e.curve_samples) for step in sorted(e.curve_steps)]
        + [(exp, exp.train.n_steps, e.num_samples)]
    )


def missing_measurements(exp: Experiment, folder: Path, info: dict) -> list:
    "The evaluations that are not recorded, or were made without a feature network that is there now."

    def stale(eid):
        return (
            not info.get("evaluations", {}).get(eid, {}).get("features_found", True)
            and feature_status(exp.evaluation.features)[0]
        )

    return [
        (e, s, n)
        for e, s, n in measurements_of(exp)
        if not _has(folder, eid := eval_id(e, s, n)) or stale(eid)
    ]


def chapter_parameters(
    exp: Experiment,  # any
) -> dict:  # parameters of chapter 05: protocol, seed, and what differs from what these two (and the data set) give
    "What to type to get an experiment; numbers of a tuple are joined by commas."
    base, other = PROTOCOLS[exp.protocol], exp.data.dataset != PROTOCOLS[exp.protocol].data.dataset
    if other:
        base = experiment(exp.protocol, dataset=exp.data.dataset)
    text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else v
    diff = {
        n: text(getattr(getattr(exp, s), n))
        for n, (s, _) in PARAMETERS.items()
        if s != "execution"
        and n != "dataset"
        and not n.endswith("_sha256")
        and getattr(getattr(exp, s), n) != getattr(getattr(base, s), n)
    }
    return dict(
        protocol=exp.protocol,
        seed=exp.seed,
        **({"dataset": exp.data.dataset} if other else {}),
        **diff,
    )


def repeat_command(
    exp: Experiment,  # any
) -> str:  # one line, ready for a shell
    "The papermill command that repeats an experiment: its protocol, its seed, and what differs from them."
    return " ".join(
        [
            "papermill nbs/05_ablations.ipynb out.ipynb",
            *(f"-p {k} {shlex.quote(str(v))}" for k, v in chapter_parameters(exp).items()),
        ]
    )


@contextlib.contextmanager
def recorded(
    info: dict,  # of run.json
    keep,  # () -> None: writes it
    planned: list,  # names of the evaluations that belong to this work; others may stand in the record, made later by somebody else
):
    "Work whose outcome, time and failure become part of the record, whatever happens."
    keep()
    start = time.perf_counter()
    try:
        yield
        info.update(status="ok", error=None)
    except BaseException as e:
        info.update(
            status="failed" if isinstance(e, Exception) else "stopped",
            error=f"{type(e).__name__}: {e}",
        )
        raise
    finally:
        known = info.get("training", {}).get("seconds", 0) + sum(
            v["seconds"] for i, v in info["evaluations"].items() if i in planned
        )
        info["wall_seconds"] = max(
            info.get("wall_seconds", 0) + time.perf_counter() - start, known
        )  # what a killed attempt took is known from its parts alone
        keep()


def run_experiment(
    exp: Experiment,  # what to do
    out_dir=None,  # folder of runs; None: results/runs (smoke: a temporary folder)
    say=print,  # progress lines
    chapter="",
    paper_ref="",  # noted beside each measurement
) -> Run:  # finished
    "From an experiment to recorded measurements. What is done is not done again; a failure is recorded and raised."
    if exp.execution.threads:
        torch.set_num_threads(exp.execution.threads)
    exp, data = open_experiment(exp)
    for e, _, _ in measurements_of(exp):
        check_sampler(e.sampling.sampler, e.sampling.nfe, Diffusion(exp.diffusion).process)
    root = (
        Path(tempfile.mkdtemp(prefix="uvit-smoke-"))
        if exp.protocol == "smoke" and not out_dir
        else runs_root(out_dir)
    )
    folder, where = root / exp.run_id, {"chapter": chapter, "paper_ref": paper_ref}
    if exp.execution.processes > 1 and "WORLD_SIZE" not in os.environ:
        return run_together(exp, folder, say, where)
    device = pick_device(exp.execution.device)
    team = join_processes(exp.execution.processes, device)
    lead = team.rank == 0
    with run_lock(folder, say) if lead else contextlib.nullcontext():
        if lead:
            sweep_unfinished(folder)
        info, todo = team.first(
            lambda: (i := _read_info(folder), missing_measurements(exp, folder, i))
        )
        if info.get("status") == "ok" and not todo:
            return Run(folder, exp, info, fresh=False)
        if data.notes and lead:
            summary(data.notes)
        keep = lambda: write_json(folder / "run.json", info) if lead else None
        info.update(
            run_id=exp.run_id,
            status="running",
            experiment=exp.to_dict(),
            command=repeat_command(exp),
            deviations=[list(d) for d in deviations(exp)],
        )
        info.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        info.setdefault("evaluations", {})
        with recorded(info, keep, [eval_id(*m) for m in measurements_of(exp)]):
            if lead:
                info["certificate"] = cached_certificate(device)
            training = train(exp, data, folder, say, team)
            if training["steps"]:
                info["training"] = training
            info.update(
                conditions=conditions(device), images_seen=exp.train.n_steps * exp.train.batch_size
            )
            info["data"] = {
                "name": content_name(exp.data)[0],
                "sha256": data.sha256,
                "train": len(data),
                "held_out": len(data.test_images),
                "notes": data.notes[:50],
            }
            if lead:
                info["weights_sha256"] = {
                    p.stem: sha256_file(p) for p in sorted(folder.glob("weights-*.safetensors"))
                }
            for e, step, n in todo:
                info["evaluations"].update(
                    measure_samples(e, data, folder, step, n, say, team, **where)
                    if n
                    else measure_loss(e, data, folder, step, team, **where)
                )
                keep()
            if lead:
                keep_picture(exp, data, folder, exp.evaluation.num_samples)
        return Run(folder, exp, info, fresh=True)


def _read_info(folder: Path) -> dict:
    "run.json as it is, or nothing; a damaged one is set aside."
    try:
        return json.loads((folder / "run.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        from uvit_repro.data.files import set_aside

        set_aside(folder / "run.json")
        return {}


class ProcessesFailed(RuntimeError):
    "Processes that worked together stopped; the message is the first one's own."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


def together_command(
    exp: Experiment,
    job: Path,  # what to do, and the file that says so
) -> tuple:  # (command line, environment)
    "How N processes are started on this machine: one per GPU, or N on the CPU, which share its cores."
    n, cpu = exp.execution.processes, pick_device(exp.execution.device).type == "cpu"
    if not cpu and n > torch.cuda.device_count():
        raise ParameterError(
            f"processes = {n}: this machine has {torch.cuda.device_count()} GPUs, and each process needs its own"
        )
    threads = exp.execution.threads or (max(1, (os.cpu_count() or 1) // n) if cpu else 0)
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **({"ACCELERATE_USE_CPU": "true"} if cpu else {}),
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
    }
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(n),
        "-m",
        "uvit_repro.runs.run",
        str(job),
    ], env


def run_together(
    exp: Experiment,
    folder: Path,  # with its data opened; its run's folder
    say=print,
    where={},  # progress, chapter and paper_ref
) -> Run:  # finished
    "Run an experiment on N processes of this machine. Raises `ProcessesFailed` with the message of the process that stopped."
    job = write_json(
        folder / "job.json",
        {"experiment": exp.to_dict(), "out_dir": str(folder.parent), "where": where},
    )
    before, last = _read_info(folder), ""
    command, env = together_command(exp, job)
    p = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    try:
        for line in p.stdout:
            line = line.strip()
            if line.startswith(PROGRESS):
                say(line)
            if line.startswith("failed: ") or (line and not last.startswith("failed: ")):
                last = line
    except BaseException:
        p.terminate()
        raise
    finally:
        p.wait()
        job.unlink(missing_ok=True)
    if p.returncode:
        raise ProcessesFailed(
            f"{exp.execution.processes} processes: {last.removeprefix('failed: ')}"
        )
    return Run(folder, exp, info := _read_info(folder), fresh=info != before)


def run_folder(
    exp: Experiment,  # any
    out_dir=None,  # folder of runs; None: results/runs
) -> Path:  # where its run is or will be
    "The folder of an experiment's run; opens its data, whose content is part of the name."
    return runs_root(out_dir) / open_experiment(exp)[0].run_id


class ChapterFailed(RuntimeError):
    "A chapter stopped; the message is its own last line, and says where the partial copy is."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


def check_names(nb: Path, given) -> None:
    "Raise `ParameterError` for a parameter that the notebook does not have, or when it has none."
    import difflib

    import papermill

    known = list(papermill.inspect_notebook(str(nb)))
    if not known:
        raise ParameterError(f"{nb.name} has no cell tagged parameters")
    for k in given:
        if k not in known:
            raise ParameterError(
                f"{nb.name} has no parameter {k!r}. "
                + (
                    f"Did you mean {', '.join(c)}? "
                    if (c := difflib.get_close_matches(k, known))
                    else ""
                )
                + f"Valid: {', '.join(sorted(known))}"
            )


def papermill_command(nb: Path, out: Path, params: dict) -> list:
    "The command line that executes a chapter, as one would type it."
    text = lambda v: ",".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v)
    return [
        sys.executable,
        "-m",
        "papermill",
        str(nb),
        str(out),
        "--log-output",
        "--no-progress-bar",
        "--no-request-save-on-cell-execute",
    ] + [a for k, v in params.items() if v is not None for a in ("-p", k, text(v))]


def execute(
    nb: Path,  # a chapter
    out: Path,  # the executed copy
    params: dict,  # its parameters
    say=print,  # told lines of progress
    label="",  # put before each line
) -> Path:  # the executed copy
    "Execute a notebook with papermill in a process of its own. A failed copy is kept as NAME.failed.ipynb; `ChapterFailed` repeats the chapter's last line."
    nb, out = Path(nb).resolve(), Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.{os.getpid()}-{threading.get_ident()}.ipynb")
    code, last = _papermill(nb, partial, params, say, label)
    if code and _never_started(partial):
        code, last = _papermill(
            nb, partial, params, say, label
        )  # two kernels can draw the same port; the second try draws another
    if code:
        failed = out.with_name(f"{out.stem}.failed.ipynb")
        if partial.exists():
            os.replace(partial, failed)
        raise ChapterFailed(
            f"{nb.name} stopped: {last}" + (f" (partial copy: {failed})" if failed.exists() else "")
        )
    os.replace(partial, out)
    return out


def _never_started(partial: Path) -> bool:
    "Whether no cell of an executed notebook was reached: its kernel did not come up."
    try:
        cells = json.loads(partial.read_text())["cells"]
    except (OSError, ValueError):
        return True
    return not any(c.get("execution_count") for c in cells)


def _papermill(nb: Path, partial: Path, params: dict, say, label: str) -> tuple:
    "Run papermill in a process of its own, passing on lines of progress: (exit code, last line)."
    last = ""
    p = subprocess.Popen(
        papermill_command(nb, partial, params),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        cwd=project_root(),
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            **({"OMP_NUM_THREADS": str(params["threads"])} if params.get("threads") else {}),
        },
    )
    try:
        for line in p.stdout:
            line = re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip()).rpartition("\r")[2]
            if line.strip():
                last = line
            if line.startswith(PROGRESS):
                say(f"{label}{line}")
    except BaseException:
        p.terminate()
        raise
    finally:
        p.wait()
    return p.returncode, last


def run_chapter(
    nb,  # path of a chapter with parameters
    out=None,  # path of the executed copy; None: chapter.ipynb in the run's folder, or results/chapters/
    say=print,  # told lines of progress
    label="",  # put before each line
    **params,  # its parameters
) -> Path:  # the executed copy
    "Execute a chapter after comparing names. Raises `ParameterError` for an unknown name, `ChapterFailed` with the chapter's own message."
    nb = Path(nb).resolve()
    check_names(nb, params)
    if out is None and nb.name.startswith("05"):
        fields = {k: v for k, v in params.items() if k in PARAMETERS or k in ("protocol", "seed")}
        out = run_folder(experiment(**fields), params.get("out_dir")) / "chapter.ipynb"
    return execute(nb, out or project_root() / "results" / "chapters" / nb.name, params, say, label)


def is_done(exp: Experiment, out_dir=None) -> bool:
    "Whether this machine has the run, with all its measurements."
    folder = run_folder(exp, out_dir)
    info = _read_info(folder)
    return info.get("status") == "ok" and not missing_measurements(exp, folder, info)


def default_workers() -> int:
    "Cells at a time on this machine: one on a GPU, else one per core, at most 8."
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)


def cell_seconds(
    cell: dict,  # chapter parameters
    out_dir=None,  # folder of runs
) -> float:  # 0 where it has not run
    "What a cell took on this machine, with the start of its kernel."
    t = _read_info(run_folder(experiment(**cell), out_dir)).get("wall_seconds", 0)
    return t + 10 if t else 0.0


SWEEP = {
    "jobs": "uvit_repro.campaign.plan:run_jobs",
    "job": "uvit_repro.campaign.plan:Job",
}  # chapter 13a does it: budget, claims, predictions


def run_sweep(
    cells: list,  # dicts of chapter parameters, in order of importance
    nb=None,  # the chapter that runs one cell; None: 05_ablations
    budget: float = None,  # seconds; None: no limit
    workers: int = None,  # cells at a time; None: one per core, at most 8, one on a GPU
    say=print,
    out_dir=None,  # progress, folder of runs
    flops_per_second=None,  # of this machine, for the budget; None: measured, or read
) -> dict:  # lists of cells: done (there before), ran, failed (with `error`), left
    "Run the cells that are missing through papermill, inside a time budget."
    jobs = [resolve_name(SWEEP, "job")(open_experiment(experiment(**c))[0], (), ()) for c in cells]
    got, cell = (
        resolve_name(SWEEP, "jobs")(
            jobs,
            budget,
            workers=workers,
            out_dir=out_dir,
            say=say,
            nb=nb,
            flops_per_second=flops_per_second,
        ),
        {j.exp.run_id: c for j, c in zip(jobs, cells)},
    )
    return {
        k: [
            dict(cell[i], **({"error": got["reasons"][i]} if k == "failed" else {})) for i in got[k]
        ]
        for k in ("done", "ran", "failed", "left")
    }


def main(args=None) -> int:
    "`python -m uvit_repro.runs.run EXPERIMENT.json`: one experiment; under torchrun, this process's part of it."
    import argparse

    ap = argparse.ArgumentParser(
        prog="python -m uvit_repro.runs.run",
        description="Do one experiment; under torchrun, on all of its processes.",
    )
    ap.add_argument("job", help="a file with an `experiment`, as run.json of any run")
    ap.add_argument(
        "--processes", type=int, help="how many processes work together (default: as the file says)"
    )
    ap.add_argument(
        "--out-dir", help="folder of runs (default: as the file says, else results/runs)"
    )
    a = ap.parse_args(args)
    try:
        job = json.loads(Path(a.job).read_text())
        exp = from_dict(job["experiment"])
        if a.processes:
            exp = replace(exp, execution=replace(exp.execution, processes=a.processes))
        run_experiment(
            exp,
            a.out_dir or job.get("out_dir"),
            say=lambda line: print(line, flush=True),
            **job.get("where", {}),
        )
    except Exception as e:
        traceback.print_exc()
        print(f"failed: {type(e).__name__}: {e}", flush=True)
        return 1
    return 0


if __name__ == "__main__" and "get_ipython" not in globals():
    sys.exit(main())
