"""Every speed is a ratio of times that were taken in turn in one process, beside the machine's own ceiling, and the released code is timed only after its outputs were found equal."""

import contextlib
import copy
import csv
import gc
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from uvit_repro.config import (
    CONFIGS,
    DataConfig,
    ExecConfig,
    Experiment,
    ModelConfig,
    ParameterError,
    SamplingConfig,
    TrainConfig,
    key_seed,
    preset,
)
from uvit_repro.data.files import write_atomic, write_json
from uvit_repro.data.folders import load_folder
from uvit_repro.data.images import Batches, Data, save_png
from uvit_repro.diffusion import Diffusion
from uvit_repro.data.features import build_extractor, extract, feature_extractor, feature_status
from uvit_repro.runs.counting import macs_of, training_flops
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.execution import (
    AUTOCAST,
    choose_attention,
    compile_blocks,
    set_attention,
    set_checkpoint,
    wants_compile,
)
from uvit_repro.runs.records import conditions, published_root, runs_root
from uvit_repro.sample import initial_noise, sample
from uvit_repro.scaling import matmul_rate, memory_bandwidth, time_calls
from uvit_repro.train import EMA, Trainer, build_model, sample_times_and_noise


@dataclass(frozen=True)
class Spread:
    "What several measurements of one thing say."

    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    min: float
    max: float
    n: int  # how many

    def __str__(self):
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def spread(
    values,  # numbers, at least one
) -> Spread:
    "Median, quartiles, smallest and largest."
    v = np.asarray(values, dtype=float)
    if not v.size:
        raise ValueError("no measurements: repeats must be at least 1")
    return Spread(
        float(np.median(v)),
        *(float(q) for q in np.quantile(v, (0.25, 0.75))),
        float(v.min()),
        float(v.max()),
        v.size,
    )


def paired_ratio(
    slow,
    fast,  # seconds of two contestants, taken in turn
) -> Spread:  # above 1: the second is faster
    "The spread of the ratios of neighbours."
    return spread(np.asarray(slow) / np.asarray(fast))


def verdict(
    r: Spread,  # time without something over time with it
) -> str:
    "In words; decided where three quarters of the pairs agree."
    return (
        f"worth {r.median:.2f}x"
        if r.low > 1
        else f"costs {1 / r.median:.2f}x"
        if r.high < 1
        else "within the spread"
    )


def seconds_of(fn, calls: int, device: torch.device) -> float:
    "Seconds of some calls in a row: device events on a GPU, else the format_duration."
    return sum(time_calls(fn, device, calls, 0))


def interleaved(
    fns: dict,  # name -> function without arguments
    repeats: int = 10,  # timed repetitions of each
    warmup: int = 3,  # untimed calls of each, before the first repetition of any
    device="cpu",  # where they compute
    min_seconds=0.05,  # a repetition holds as many calls as fill this; 0: one
    timer=seconds_of,  # timer(fn, calls, device) -> seconds
) -> dict:  # name -> seconds per call, one for each repetition
    "Time functions in turn, so that drift of the machine hits all alike."
    if repeats < 1 or warmup < 0:
        raise ParameterError(f"repeats = {repeats}, warmup = {warmup}: at least 1 and 0")
    device, out = torch.device(device), {n: [] for n in fns}
    for _ in range(warmup):
        for f in fns.values():
            f()
    calls = {
        n: min(max(1, math.ceil(min_seconds / max(timer(f, 1, device), 1e-9))), 10_000)
        if min_seconds
        else 1
        for n, f in fns.items()
    }
    for _ in range(repeats):
        for n, f in fns.items():
            out[n].append(timer(f, calls[n], device) / calls[n])
    return out


class Memory:
    "Peak memory of what runs inside: `bytes`, or None where it can't be measured."

    def __init__(self, device):
        self.device, self.bytes = torch.device(device), None

    @staticmethod
    def resident(field: str) -> int:
        "VmRSS or VmHWM of this process, in bytes (Linux)."
        return next(
            int(line.split()[1]) * 1024
            for line in open("/proc/self/status")
            if line.startswith(field)
        )

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.base = torch.cuda.memory_allocated(self.device)
            return self
        self.base = None
        with contextlib.suppress(OSError, StopIteration):
            Path("/proc/self/clear_refs").write_text("5")
            self.base = self.resident("VmRSS")  # 5: forget the high-water mark
        return self

    def __exit__(self, *exc):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.base
        elif self.base is not None:
            self.bytes = max(self.resident("VmHWM") - self.base, 0)
        return False


TINY = Experiment(
    "smoke",
    ModelConfig(embed_dim=32, depth=3, num_heads=2, condition="class"),
    DataConfig(dataset="digits", img_size=8, in_chans=1, num_classes=10, flip=False),
    train=TrainConfig(n_steps=1000, batch_size=4, warmup_steps=100, p_uncond=0.1),
    sampling=SamplingConfig(cfg_scale=1.4),
    execution=ExecConfig(attention="sdpa"),
)


def bench_experiment(
    model: str,  # a name of Table 2 that was released, as in U-ViT-S/2; or tiny
    batch: int = 8,  # images of an update
    precision="fp32",  # fp32 | bf16 | fp16
) -> Experiment:  # `execution.use_checkpoint` says how the released code trains it
    "The experiment whose network and update are timed."
    if model != "tiny":
        preset(model)
    base = (
        TINY
        if model == "tiny"
        else next((c for n, c in CONFIGS.items() if n.endswith(f" {model}")), None)
    )
    if base is None:
        raise ParameterError(
            f"model {model!r} is not among the released ones: {', '.join(dict.fromkeys(n[n.index('U-ViT') :] for n in CONFIGS))}, tiny"
        )
    return replace(
        base,
        seed=0,
        diffusion=replace(base.diffusion, process="vp"),
        sampling=replace(base.sampling, sampler="dpm_solver_fast", decoder=""),
        train=replace(base.train, batch_size=batch, precision=precision),
    )


def bench_inputs(
    exp: Experiment,
    device,
    n: int = None,  # whose shapes; where; how many, None: a batch
) -> tuple:  # x0 in [-1, 1], dict of conditions
    "Random inputs, made once, on the device."
    n, d, g = (
        n or exp.train.batch_size,
        exp.data,
        torch.Generator().manual_seed(key_seed("bench", exp.model.condition)),
    )
    x, cond = torch.rand(n, d.in_chans, d.img_size, d.img_size, generator=g) * 2 - 1, {}
    if exp.model.condition == "class":
        cond["y"] = torch.randint(d.num_classes + (exp.train.p_uncond > 0), (n,), generator=g)
    if exp.model.condition == "text":
        cond["context"] = torch.randn(n, 77, 768, generator=g)
    return x.to(device), {k: v.to(device) for k, v in cond.items()}


_networks = {}


def bench_network(
    exp: Experiment,  # of `bench_experiment`
) -> nn.Module:  # a fresh copy with the initial weights, on the CPU
    "The network of an experiment; drawn once, since a large one takes its time."
    key = (exp.model, exp.data, exp.train.p_uncond > 0)
    if key not in _networks:
        _networks.clear()
        _networks[key] = build_model(
            replace(exp, execution=replace(exp.execution, use_checkpoint=False))
        )
    return copy.deepcopy(_networks[key])


@dataclass(frozen=True)
class How:
    "The switches of a contestant; the precision is the experiment's."

    attention: str = "sdpa"  # sdpa | matrix
    compile: bool = False  # torch.compile of the blocks
    cuda_graph: bool = False  # the training pass replayed
    fused: bool = True  # AdamW in one kernel
    foreach: bool = True  # moving average over all parameters at once
    checkpoint: bool = False  # activations recomputed
    keep: float = 0.0  # of which this much of each block is kept
    data: str = ""  # empty: one batch, on the device; device: batches from images there; pinned, blocking: from the CPU
    doubled: bool = True  # sampling: guidance in one doubled batch
    inference: bool = True  # sampling: inference mode (else only without gradients)


def best(
    exp: Experiment,
    device,  # what, where
    compile="auto",
    cuda_graph=False,
    checkpoint="off",
    keep=0.0,  # as asked for; checkpoint: off | full | selective
) -> How:
    "What training and sampling use by themselves."
    device = torch.device(device)
    return How(
        attention=choose_attention(exp, device),
        compile=wants_compile(compile, device, exp.train.n_steps),
        cuda_graph=cuda_graph,
        checkpoint=checkpoint != "off",
        keep=keep if checkpoint == "selective" else 0.0,
    )


class LoopEMA(EMA):
    "The moving average one parameter after the other, for comparison."

    @torch.no_grad()
    def update(self, step: int):
        r = min(self.rate, (1 + step) / (10 + step)) if self.ramp else self.rate
        for v, p in zip(self.values, self.source):
            v.mul_(r).add_(p, alpha=1 - r)


class TwoCalls(nn.Module):
    "A network that takes a doubled batch in two halves."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, **cond):
        parts = zip(x.chunk(2), t.chunk(2), *(v.chunk(2) for v in cond.values()))
        return torch.cat([self.net(a, b, **dict(zip(cond, c))) for a, b, *c in parts])


class NoInferenceMode(nn.Module):
    "A network that leaves inference mode and only goes without gradients."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, **cond):
        with torch.inference_mode(False), torch.no_grad():
            return self.net(x, t, **cond)


class Nothing(nn.Module):
    "A network that costs nothing: what is left of sampling is the solver."

    def forward(self, x, t, **cond):
        return x


class Training:
    "One training step of ours per call."

    def __init__(self, exp: Experiment, device, how: How):
        self.exp, self.device, self.diffusion = exp, torch.device(device), Diffusion(exp.diffusion)
        net = bench_network(exp)
        set_attention(net, how.attention)
        set_checkpoint(net, how.checkpoint, how.keep)
        self.x0, self.cond = bench_inputs(exp, self.device)
        self.tr = Trainer(
            net,
            self.diffusion,
            exp.train,
            self.device,
            compile=how.compile,
            cuda_graph=how.cuda_graph,
        )
        if not how.fused:  # as torch chooses by itself
            for g in getattr(self.tr.optimizer, "optimizer", self.tr.optimizer).param_groups:
                g.update(fused=None, foreach=None)
        if not how.foreach:
            self.tr.emas = {n: LoopEMA(net, e.rate, e.ramp) for n, e in self.tr.emas.items()}
        self.batches = self.feed(how.data) if how.data else None

    def feed(self, kind: str):
        "Batches of 10,000 random images that lie on the device, or come from the CPU."
        exp, d, g = self.exp, self.exp.data, torch.Generator().manual_seed(0)
        u8 = torch.randint(
            256, (10_000, d.in_chans, d.img_size, d.img_size), generator=g, dtype=torch.uint8
        )
        y = torch.randint(max(d.num_classes, 1), (10_000,), generator=g)
        data = Data("random", u8, y, u8[:1], y[:1], d.num_classes, [], "")
        b = Batches(
            data,
            exp.train.batch_size,
            0,
            True,
            exp.train.p_uncond,
            d.num_classes,
            self.device if kind == "device" else "cpu",
        )
        put = {
            "device": lambda v: v,
            "pinned": lambda v: v.pin_memory().to(self.device, non_blocking=True),
            "blocking": lambda v: v.to(self.device),
        }[kind]
        return lambda step: tuple(put(v) for v in b.at(step))

    def __call__(self):
        x0, cond, tr = self.x0, self.cond, self.tr
        if self.batches:
            x0, y = self.batches(tr.step)
            cond = dict(cond, **({"y": y} if "y" in cond else {}))
        t, eps = sample_times_and_noise(
            self.exp.seed, tr.step, x0.shape, self.diffusion, self.device
        )
        self.loss = tr.update(x0, t, eps, **cond).mean()


class Sampling:
    "One set of images of ours per call."

    def __init__(
        self,
        exp: Experiment,
        device,
        how: How,
        n: int,
        nfe: int,
        guided=False,
        batch=500,
        net: nn.Module = None,
    ):
        self.exp, self.device, self.n, self.batch, self.diffusion = (
            exp,
            torch.device(device),
            n,
            batch,
            Diffusion(exp.diffusion),
        )
        self.sampling = replace(
            exp.sampling, nfe=nfe, cfg_scale=exp.sampling.cfg_scale if guided else 1.0
        )
        self.autocast = AUTOCAST[exp.train.precision]
        if net is None:
            net = bench_network(exp).to(self.device).eval()
            set_attention(net, how.attention)
            if how.compile:
                compile_blocks(net)
        self.net = net if how.doubled else TwoCalls(net)
        if not how.inference:
            self.net = NoInferenceMode(self.net)
        context = bench_inputs(exp, "cpu", n)[1].get("context")
        self.cond = {
            "context": context,
            "null_context": None if context is None else torch.zeros(77, 768),
        }

    def __call__(self):
        d, K = (
            self.exp.data,
            self.exp.data.num_classes if self.exp.model.condition == "class" else 0,
        )
        self.images, _ = sample(
            self.net,
            self.diffusion,
            self.sampling,
            (d.in_chans, d.img_size, d.img_size),
            self.n,
            num_classes=K,
            device=self.device,
            batch=self.batch,
            autocast=self.autocast,
            **self.cond,
        )


RELEASED = ("libs/uvit.py", "sde.py", "utils.py", "dpm_solver_pytorch.py")


@contextlib.contextmanager
def imports_from(
    folder: Path,
    names: tuple,  # where, which modules
):  # yields name -> module
    "Modules of a folder; `sys.path` and `sys.modules` are as before when the block is left, and no compiled files are written."
    path, before, flag = list(sys.path), dict(sys.modules), sys.dont_write_bytecode
    ours = lambda k: k.partition(".")[0] in {n.partition(".")[0] for n in names}
    for k in filter(ours, list(sys.modules)):
        del sys.modules[k]
    stand_in = importlib.util.find_spec("absl") is None and "absl" not in sys.modules
    try:
        if stand_in:
            sys.modules["absl"], sys.modules["absl.logging"] = types.ModuleType("absl"), logging
            sys.modules["absl"].logging = logging
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        importlib.invalidate_caches()
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield {n: importlib.import_module(n) for n in names}
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = flag
        sys.path_importer_cache.pop(str(folder), None)
        for k in filter(ours, list(sys.modules)):
            del sys.modules[k]
        if stand_in:
            sys.modules.pop("absl", None)
            sys.modules.pop("absl.logging", None)
        sys.modules.update({k: m for k, m in before.items() if ours(k)})


def peer_version(folder: Path) -> str:
    "The commit of a checkout, else the sha256 of its libs/uvit.py."
    git = lambda *a: subprocess.run(["git", "-C", str(folder), *a], capture_output=True, text=True)
    with contextlib.suppress(OSError):
        top = git("rev-parse", "--show-toplevel")
        if top.returncode == 0 and Path(top.stdout.strip()).resolve() == Path(folder).resolve():
            return "commit " + git("rev-parse", "HEAD").stdout.strip()
    return (
        "sha256 of libs/uvit.py "
        + hashlib.sha256((Path(folder) / "libs" / "uvit.py").read_bytes()).hexdigest()
    )


class OutputsDiffer(RuntimeError):
    "The released code and ours do not compute the same; nothing was timed."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


class Peer:
    "The released code in a folder: a context that gives its modules, its network with our weights, and its guidance."

    def __init__(self, folder):
        self.folder = Path(folder).expanduser().resolve()
        missing = [f for f in RELEASED if not (self.folder / f).is_file()]
        if missing:
            raise ParameterError(
                f"peer = {str(folder)!r} is not a checkout of the released U-ViT: {', '.join(missing)} not found there. "
                "Fetch one with: git clone https://github.com/baofff/U-ViT"
            )
        self.version, self.checked = peer_version(self.folder), set()

    def __enter__(self):
        names = [f.removesuffix(".py").replace("/", ".") for f in RELEASED] + (
            ["libs.uvit_t2i"] if (self.folder / "libs/uvit_t2i.py").is_file() else []
        )
        try:
            with imports_from(self.folder, tuple(names)) as self.modules:
                pass
        except ImportError as e:
            raise ParameterError(
                f"peer = {str(self.folder)!r} can't be imported: {e}. Install what it needs, or check that the checkout is whole"
            ) from None
        self.uvit, self.sde, self.utils, self.solver = (self.modules[n] for n in names[:4])
        self.attention = getattr(self.uvit, "ATTENTION_MODE", "unknown")
        return self

    def __exit__(self, *exc):
        del self.modules, self.uvit, self.sde, self.utils, self.solver
        return False

    def network(self, exp: Experiment, checkpoint=False) -> nn.Module:
        "Their network of the same sizes, filled with our initial weights."
        m, d = exp.model, exp.data
        if (m.skip, m.time, m.patch_embed, m.pos_embed) != (
            "concat",
            "token",
            "linear",
            "learned",
        ) or m.conv == "before":
            raise ParameterError("the released code has the adopted variant only")
        sizes = {
            "img_size": d.img_size,
            "patch_size": m.patch_size,
            "in_chans": d.in_chans,
            "embed_dim": m.embed_dim,
            "depth": m.depth - 1,
            "num_heads": m.num_heads,
            "mlp_ratio": m.mlp_ratio,
            "qkv_bias": m.qkv_bias,
            "mlp_time_embed": m.mlp_time_embed,
            "use_checkpoint": checkpoint,
            "conv": m.conv == "after",
        }
        if m.condition == "text":
            build = lambda: self.modules["libs.uvit_t2i"].UViT(
                **sizes, clip_dim=768, num_clip_token=77
            )
        else:
            build = lambda: self.uvit.UViT(
                **sizes,
                num_classes=d.num_classes + (exp.train.p_uncond > 0)
                if m.condition == "class"
                else -1,
            )
        with torch.device("meta"):
            net = build()  # a large network is drawn for minutes, only to be overwritten
        net = build() if any(True for _ in net.buffers()) else net.to_empty(device="cpu")
        net.load_state_dict(bench_network(exp).state_dict(), strict=True)
        return net

    def score(self, net):
        "Their wrapper of a network: noise prediction on the continuous process."
        with contextlib.redirect_stdout(io.StringIO()):
            return self.sde.ScoreModel(net, pred="noise_pred", sde=self.sde.VPSDE())


def peer_accelerator(
    precision: str,
    device: torch.device,  # fp32 | fp16
):
    "`accelerate` as `accelerate launch --mixed_precision` sets it up, with nothing of ours."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision), cpu=device.type == "cpu"
    )


class PeerTraining:
    "One training step of the released code per call, under its own launch settings."

    def __init__(self, peer: Peer, exp: Experiment, device):
        device, cfg = torch.device(device), exp.train
        self.peer, self.precision, self.checkpoint, self.rate = (
            peer,
            "fp16" if device.type == "cuda" else "fp32",
            exp.execution.use_checkpoint,
            cfg.ema_rates[0],
        )
        net, average = (peer.network(exp, self.checkpoint).to(device) for _ in range(2))
        optimizer = peer.utils.get_optimizer(
            net.parameters(),
            name="adamw",
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            betas=cfg.betas,
        )
        self.schedule = peer.utils.get_lr_scheduler(
            optimizer, name="customized", warmup_steps=cfg.warmup_steps
        )
        self.acc = peer_accelerator(self.precision, device)
        self.net, self.average, self.optimizer = self.acc.prepare(
            net.train(), average.eval(), optimizer
        )
        self.raw, (self.x0, self.cond), self.model = (
            (net, average),
            bench_inputs(exp, device),
            peer.score(self.net),
        )
        for _ in range(
            20 if self.acc.scaler else 0
        ):  # the loss scale starts too high and the first steps are skipped: not what is timed
            self()
            if not self.acc.optimizer_step_was_skipped:
                break

    def __call__(self):
        self.optimizer.zero_grad()
        loss = self.peer.sde.LSimple(self.model, self.x0, pred="noise_pred", **self.cond)
        self.loss = loss.detach().mean()
        self.acc.backward(loss.mean())
        self.optimizer.step()
        self.schedule.step()
        self.peer.utils.ema(self.raw[1], self.raw[0], self.rate)


class PeerSampling:
    "One set of images of the released code per call: DPM-Solver, fast version, as its `eval.py` runs it."

    def __init__(
        self,
        peer: Peer,
        exp: Experiment,
        device,
        n: int,
        nfe: int,
        guided=False,
        batch=500,
        precision=None,
    ):
        device = torch.device(device)
        self.peer, self.nfe, self.batch, self.precision, self.device = (
            peer,
            nfe,
            batch,
            precision or ("fp16" if device.type == "cuda" else "fp32"),
            device,
        )
        net = (
            peer_accelerator(self.precision, device)
            .prepare(peer.network(exp, exp.execution.use_checkpoint).to(device))
            .eval()
        )
        C, K, s, d = exp.model.condition, exp.data.num_classes, exp.sampling.cfg_scale - 1, exp.data

        def with_guidance(x, t, **cond):  # their scale s is w - 1; two calls, as released
            null = (
                {"y": torch.full_like(cond["y"], K)}
                if C == "class"
                else {"context": torch.zeros_like(cond["context"])}
            )
            out = net(x, t, **cond)
            return out + s * (out - net(x, t, **null))

        self.model = peer.score(with_guidance if guided else net)
        self.x = initial_noise(
            exp.sampling.sample_seed, 0, n, (d.in_chans, d.img_size, d.img_size), device
        )
        self.cond = (
            {"y": (torch.arange(n) % K).to(device)}
            if C == "class"
            else bench_inputs(exp, device, n)[1]
        )

    def __call__(self):
        schedule, out = self.peer.solver.NoiseScheduleVP(schedule="linear"), []
        for i in range(0, len(self.x), self.batch):
            cond = {k: v[i : i + self.batch] for k, v in self.cond.items()}
            fn = self.peer.solver.model_wrapper(
                self.model.noise_pred, schedule, time_input_type="0", model_kwargs=cond
            )
            with contextlib.redirect_stdout(io.StringIO()):
                out.append(
                    self.peer.solver.DPM_Solver(fn, schedule)
                    .sample(
                        self.x[i : i + self.batch],
                        steps=self.nfe,
                        eps=1e-4,
                        adaptive_step_size=False,
                        fast_version=True,
                    )
                    .float()
                    .cpu()
                )
        self.images = torch.cat(out)


SAME_OUTPUT, SAME_IMAGES = 1e-5, 1e-4


@contextlib.contextmanager
def full_float32():
    "Without TF32 inside."
    was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was


def check_outputs(
    peer: Peer,
    exp: Experiment,
    device,  # whose code; the experiment; where
    n=2,
    nfe=6,  # images and evaluations of the short solve (groups of third, second and first order)
) -> dict:  # largest difference of outputs; of images, over their largest value
    "Same weights, same inputs, float32: raise `OutputsDiffer` where the two codes do not compute the same."
    exp = replace(exp, train=replace(exp.train, precision="fp32", batch_size=n))
    x, cond = bench_inputs(exp, device)
    with full_float32():
        ours, theirs = (net.to(device).eval() for net in (bench_network(exp), peer.network(exp)))
        t = torch.linspace(1, 999, n, device=device)
        with torch.inference_mode():
            diff = float((ours(x, t, **cond) - theirs(x, t, **cond)).abs().max())
        if not diff < SAME_OUTPUT:
            raise OutputsDiffer(
                f"the outputs differ by {diff:.2g} in float32 with the same weights and inputs (allowed: {SAME_OUTPUT:g}); nothing was timed against {peer.folder}"
            )
        a, b = (
            Sampling(exp, device, How(), n, nfe),
            PeerSampling(peer, exp, device, n, nfe, precision="fp32"),
        )
        a()
        b()
        images = float((a.images - b.images).abs().max() / b.images.abs().max())
    if not images < SAME_IMAGES:
        raise OutputsDiffer(
            f"the images differ by {images:.2g} of their largest value after {nfe} evaluations in float32 (allowed: {SAME_IMAGES:g}); "
            f"nothing was timed against {peer.folder}"
        )
    return {"output": diff, "images": images}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def ceilings(
    device,
    precisions,
    quick=False,  # where; which types; small and rough
) -> dict:  # floating-point operations per second by precision, bytes per second
    "What this machine can do at all, measured now."
    more = {"sizes": (256,), "repeats": 2} if quick else {}
    return dict(
        {p: float(matmul_rate(device, DTYPES[p], **more)) for p in precisions},
        bandwidth=memory_bandwidth(device, *((4, 2) if quick else ())),
    )


def ceiling_line(rates: dict) -> str:
    "What the machine's rates allow, in words."
    names, flops = (
        {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
        {p: r for p, r in rates.items() if p != "bandwidth"},
    )
    line = "matrix products here: " + ", ".join(
        f"{r / 1e12:.3g} TFLOP/s {names[p]}" for p, r in flops.items()
    )
    fast = max(flops, key=flops.get)
    if "fp32" in flops and fast != "fp32":
        line += f": no more than {flops[fast] / flops['fp32']:.1f}x can come from the precision"
    return line + f"; memory {rates['bandwidth'] / 1e9:.3g} GB/s"


BENCH_COLUMNS = [
    "what",
    "model",
    "img_size",
    "in_chans",
    "batch",
    "precision",
    "attention",
    "compile",
    "impl",
    "option",
    "metric",
    "value",
    "unit",
    "low",
    "high",
    "min",
    "max",
    "repeats",
    "note",
]


def bench_row(
    what: str,
    exp: Experiment,
    metric: str,
    value,
    unit: str,  # train | sample | ...; the experiment or None; a number, a Spread, or None with a note
    how: How = None,
    impl="ours",
    **more,  # how ours computed; ours | released; batch, option, note, precision ...
) -> dict:  # one line of bench.csv
    "One measurement."
    if value is None and not more.get("note"):
        raise ValueError(
            f"{what} {metric}: a measurement is a number, or None with the reason in `note`"
        )
    row = {"what": what, "metric": metric, "unit": unit, "impl": impl}
    if exp:
        row.update(
            model=more.pop("model", ""),
            img_size=exp.data.img_size,
            in_chans=exp.data.in_chans,
            batch=exp.train.batch_size,
            precision=exp.train.precision,
        )
    if how:
        row.update(attention=how.attention, compile="on" if how.compile else "off")
    if isinstance(value, Spread):
        row.update(
            value=value.median,
            low=value.low,
            high=value.high,
            min=value.min,
            max=value.max,
            repeats=value.n,
        )
    else:
        row["value"] = value
    row.update(more)
    if extra := set(row) - set(BENCH_COLUMNS):
        raise ValueError(f"no such column: {', '.join(sorted(extra))}")
    return row


class Record:
    "The folder of one benchmark: whole on disk after every measurement."

    def __init__(self, machine: str, device: str, info: dict, out_dir=None):
        stem, k = (
            f"bench-{re.sub('[^a-z0-9]+', '-', machine.lower()).strip('-')}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}",
            1,
        )
        while (folder := runs_root(out_dir) / (stem + (f"-{k}" if k > 1 else ""))).exists():
            k += 1
        folder.mkdir(parents=True)
        self.folder, self.rows, self.start = folder, [], time.perf_counter()
        self.info = dict(
            info,
            machine=machine,
            device=device,
            status="running",
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            times={},
            left=[],
            error=None,
        )
        self.add([])

    def add(self, rows: list, times: dict = None, **info):
        "More rows, the single times behind them by name, more about the run."
        self.rows += rows
        self.info["times"].update(times or {})
        self.info.update(info, seconds=time.perf_counter() - self.start)
        show = lambda v: "" if v is None else repr(v) if isinstance(v, float) else v

        def write(p):
            with open(p, "w", newline="") as f:
                w = csv.DictWriter(f, BENCH_COLUMNS, lineterminator="\n")
                w.writeheader()
                w.writerows([{k: show(v) for k, v in r.items()} for r in self.rows])

        write_atomic(self.folder / "bench.csv", write)
        write_json(self.folder / "bench.json", self.info)


def load_bench(
    origin="all",  # runs | published | all
    out_dir=None,  # another folder of runs
):  # DataFrame: the columns of bench.csv and origin, folder, machine, device (cpu | cuda), started, status
    "Every recorded benchmark: the only reader. A folder that is in both places is read from this machine's."
    import pandas as pd

    if origin not in ("runs", "published", "all"):
        raise ValueError(f"origin = {origin!r}: allowed are runs, published, all")
    numeric = ("value", "low", "high", "min", "max", "repeats", "img_size", "in_chans", "batch")
    text, frames = {c: str for c in BENCH_COLUMNS if c not in numeric}, {}
    for name, root in {"runs": runs_root(out_dir), "published": published_root()}.items():
        for p in sorted(root.glob("bench-*/bench.csv")) if origin in (name, "all") else ():
            if p.parent.name in frames:
                continue
            try:
                info = json.loads((p.parent / "bench.json").read_text())
                df = pd.read_csv(
                    p, dtype=text, keep_default_na=False, na_values={c: [""] for c in numeric}
                )
                frames[p.parent.name] = df.assign(
                    origin=name,
                    folder=str(p.parent),
                    **{k: info.get(k, "") for k in ("machine", "device", "started", "status")},
                )
            except Exception as e:
                warnings.warn(
                    f"{p.parent} can't be read ({type(e).__name__}); it is left out of the tables"
                )
    frames = [f for f in frames.values() if len(f)]
    return (
        pd.concat(frames, ignore_index=True)
        if frames
        else pd.DataFrame(
            columns=BENCH_COLUMNS + ["origin", "folder", "machine", "device", "started", "status"]
        )
    )


def newest(
    df,  # of `load_bench`
):  # the last measurement of each thing on each machine
    "One row for each machine and thing measured; rows of the tiny model, which is for tests, are left out."
    key = ["machine", "what", "model", "batch", "precision", "impl", "option", "metric"]
    return (
        df[df.model != "tiny"]
        .sort_values("started")
        .drop_duplicates(key, keep="last")
        .reset_index(drop=True)
    )


def publish_bench(
    folder: Path,  # a finished benchmark
) -> Path:  # the committed copy
    "Copy a benchmark's record to results/published. Raises `ValueError` for one that failed or was interrupted."
    status = json.loads((Path(folder) / "bench.json").read_text())["status"]
    if status not in ("ok", "stopped"):
        raise ValueError(
            f"{Path(folder).name} is {status!r}: only finished benchmarks are evidence"
        )
    for n in ("bench.json", "bench.csv"):
        write_atomic(
            published_root() / Path(folder).name / n, lambda p: shutil.copyfile(Path(folder) / n, p)
        )
    return published_root() / Path(folder).name


def free(device):
    "Give back what finished contestants held."
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def prepare(
    make,
    device,  # builds a contestant; where
    calls=2,  # before timing
) -> tuple:  # (contestant or None, peak bytes or None, reason why there is none)
    "Build a contestant and see what memory it takes."
    try:
        with Memory(device) as m:
            c = make()
            for _ in range(calls):
                c()
        return c, m.bytes, ""
    except torch.OutOfMemoryError:
        why = f"not run: out of memory on {device}"
    free(device)
    return None, None, why


def contest(
    make: dict,
    s,
    device,  # name -> builder; Settings; where
    sampling=False,  # a call holds many evaluations: one is enough to warm up, and a third of the repetitions to tell
) -> tuple:  # (contestants that run, seconds of each, peak bytes of each, reasons of the others)
    "Build, warm up and time contestants in turn."
    torch.compiler.reset()
    free(device)
    ready = {n: prepare(f, device, 1 if sampling else 2) for n, f in make.items()}
    there = {n: c for n, (c, _, _) in ready.items() if c is not None}
    repeats, warmup = (
        (s.repeats if s.quick else max(3, s.repeats // 3), 0)
        if sampling
        else (s.repeats, max(s.warmup - 2, 0))
    )
    secs = (
        interleaved(there, repeats, warmup, device, 0 if s.quick or sampling else 0.05)
        if there
        else {}
    )
    return (
        there,
        secs,
        {n: m for n, (_, m, _) in ready.items()},
        {n: why for n, (_, _, why) in ready.items() if why},
    )


def memory_row(what, exp, bytes_, device, **more) -> dict:
    "Peak memory of a contestant."
    note = (
        "peak of the allocator"
        if torch.device(device).type == "cuda"
        else "growth of the process, approximate"
        if bytes_ is not None
        else "not measured on this system"
    )
    return bench_row(
        what,
        exp,
        "peak_memory",
        None if bytes_ is None else float(bytes_),
        "bytes",
        **{"note": note, **more},
    )


def judge(
    what: str,
    name: str,
    exp: Experiment,
    outcome: tuple,  # train | sample; which contestant; its experiment; of `contest`
    items: int,
    flops: float,
    rate,
    device,  # images of a call, its floating-point operations, ceiling or None, where
    more: dict,
    note="",  # further columns; added to the note of the ratio
) -> list:  # rows
    "What one contestant of a contest shows: time, images per second, memory, share of the ceiling, ratio to the released code."
    there, secs, mem, why = outcome
    row = lambda metric, value, unit, **kw: bench_row(
        what, exp, metric, value, unit, **{**more, **kw}
    )
    if name in why:
        return [row("seconds", None, "s", note=why[name])]
    t = np.array(secs[name])
    rows = [
        row("seconds", spread(t), "s"),
        row("images_per_second", spread(items / t), "1/s"),
        memory_row(what, exp, mem[name], device, **{**more, "note": ""}),
    ]
    if rate:
        rows.append(row("mfu", spread(flops / t / rate), "of the matrix rate"))
    if name != "released" and "released" in secs:
        rows.append(
            row(
                "speedup",
                paired_ratio(secs["released"], t),
                "x",
                note="; ".join(
                    filter(None, (f"over the released code in {there['released'].precision}", note))
                ),
            )
        )
    return rows


def equality_rows(model, peer, exp, device) -> list:
    "Outputs compared before anything of a model is timed, once; raises `OutputsDiffer`."
    if not peer or model in peer.checked:
        return []
    d = check_outputs(peer, exp, device)
    peer.checked.add(model)
    exp = replace(exp, train=replace(exp.train, precision="fp32"))
    row = lambda metric, value, unit, limit: bench_row(
        "outputs",
        exp,
        metric,
        value,
        unit,
        impl="released",
        model=model,
        note=f"same weights and inputs, float32, allowed {limit:g}",
    )
    return [
        row("max_difference_output", d["output"], "absolute", SAME_OUTPUT),
        row("max_difference_images", d["images"], "of the largest value", SAME_IMAGES),
    ]


def released_columns(peer, exp, device, model) -> dict:
    "Columns of the released code's rows; the note says what departs from its own script."
    notes = ["gradient checkpointing, as its configuration has it"] * exp.execution.use_checkpoint
    notes += ["continuous loss in place of its script's discrete one: same network cost"] * (
        exp.data.in_chans == 4
    )
    return {
        "model": model,
        "impl": "released",
        "precision": "fp16" if device.type == "cuda" else "fp32",
        "attention": peer.attention,
        "compile": "off",
        "note": "; ".join(notes),
    }


def measure_train(
    model: str,
    batch: int,
    s,
    device,
    rates: dict,
    peer: Peer = None,  # what, how large, Settings, where, ceilings, the released code
) -> tuple:  # (rows, single times)
    "Training steps: ours in each precision and, in turn with them, the released one."
    exps = {p: bench_experiment(model, batch, p) for p in s.precision}
    hows = {p: s.how(e, device) for p, e in exps.items()}
    exp = next(iter(exps.values()))
    flops = training_flops(macs_of(exp)) * batch
    rows = equality_rows(model, peer, exp, device)
    make = {p: lambda p=p: Training(exps[p], device, hows[p]) for p in exps}
    if peer:
        make["released"] = lambda: PeerTraining(peer, exp, device)
    outcome = contest(make, s, device)
    for p, h in hows.items():
        rows += judge(
            "train",
            p,
            exps[p],
            outcome,
            batch,
            flops,
            rates.get(p),
            device,
            {"model": model, "how": h, "note": "checkpointing" * h.checkpoint},
        )
    if peer:
        theirs = released_columns(peer, exp, device, model)
        rows += judge(
            "train",
            "released",
            exp,
            outcome,
            batch,
            flops,
            rates.get(theirs["precision"]),
            device,
            theirs,
        )
    return rows, {f"train {model} batch {batch} {n}": v for n, v in outcome[1].items()}


def guided_experiment(exp: Experiment) -> Experiment:
    "With guidance of some strength; what it costs does not depend on it."
    return (
        exp
        if exp.sampling.cfg_scale != 1
        else replace(exp, sampling=replace(exp.sampling, cfg_scale=1.4))
    )


def measure_sample(
    model: str,
    s,
    device,
    rates: dict,
    peer: Peer = None,  # what, Settings, where, ceilings, the released code
) -> tuple:  # (rows, single times)
    "Sets of images: ours in each precision, the released code, and the solver alone; with guidance where the model has a null condition."
    n, nfe, times, note = s.images, s.nfe, {}, f"{s.images} images, {s.nfe} evaluations"
    plain = {p: bench_experiment(model, n, p) for p in s.precision}
    hows = {p: replace(s.how(e, device), cuda_graph=False) for p, e in plain.items()}
    first = next(iter(plain.values()))
    macs, rows = macs_of(first), equality_rows(model, peer, first, device)
    for guided in (False, True) if first.train.p_uncond and s.guided else (False,):
        exps = {p: guided_experiment(e) if guided else e for p, e in plain.items()}
        exp = next(iter(exps.values()))
        make = {p: lambda p=p: Sampling(exps[p], device, hows[p], n, nfe, guided) for p in exps}
        make["solver"] = lambda: Sampling(exp, device, How(), n, nfe, guided, net=Nothing())
        if peer:
            make["released"] = lambda: PeerSampling(peer, exp, device, n, nfe, guided)
        outcome = contest(make, s, device, sampling=True)
        secs, flops = outcome[1], 2 * macs * n * nfe * (1 + guided)
        more = {"model": model, "option": "guided" if guided else "", "note": note}
        for p in exps:
            rows += judge(
                "sample",
                p,
                exps[p],
                outcome,
                n,
                flops,
                rates.get(p),
                device,
                dict(more, how=hows[p]),
                note,
            )
            if p not in secs:
                continue
            share = spread(100 * np.array(secs["solver"]) / np.array(secs[p]))
            rows.append(
                bench_row(
                    "sample",
                    exps[p],
                    "solver_share",
                    share,
                    "%",
                    hows[p],
                    **{**more, "note": f"{note}; a network that costs nothing"},
                )
            )
        times.update(
            {
                f"sample {model} {n}x{nfe}{' guided' if guided else ''} {k}": v
                for k, v in secs.items()
            }
        )
        if peer:
            theirs = {**released_columns(peer, exp, device, model), **more}
            rows += judge(
                "sample",
                "released",
                exp,
                outcome,
                n,
                flops,
                rates.get(theirs["precision"]),
                device,
                theirs,
            )
        del outcome
    return rows, times


def random_features(name: str, x, device):
    "Features from the same network with random weights, for where its file is not."
    net = build_extractor(name).to(device).eval()

    @torch.inference_mode()
    def run():
        return [net((b.to(device) / 255).contiguous())[0].float().cpu() for b in x.split(500)]

    return run


def measure_features(s, device) -> tuple:
    "Images per second of the feature networks, through `metrics.extract` where the weights are there."
    rows, fns, g = [], {}, torch.Generator().manual_seed(0)
    for name in ("digits_cnn",) if s.quick else ("digits_cnn", "resnet20_cifar10", "inception"):
        net, (ok, message) = feature_extractor(name), feature_status(name)
        size = net.size or 32
        n = 64 if s.quick else 5000 if device.type == "cuda" else 16 if name == "inception" else 500
        more = {
            "model": name,
            "batch": n,
            "img_size": size,
            "in_chans": net.channels,
            "precision": "fp32",
            "note": "" if ok else "random weights: the file is not here",
        }
        if not ok and name == "inception":
            rows.append(
                bench_row(
                    "features",
                    None,
                    "images_per_second",
                    None,
                    "1/s",
                    **{
                        **more,
                        "note": "not run: its weights are not here; "
                        + message.split("\n")[1].strip(),
                    },
                )
            )
            continue
        x = torch.randint(256, (n, net.channels, size, size), generator=g, dtype=torch.uint8)
        fns[name] = (
            (lambda x=x, name=name: extract(x, name, device))
            if ok
            else random_features(name, x, device),
            more,
        )
    secs = interleaved(
        {k: f for k, (f, _) in fns.items()}, s.repeats, s.warmup, device, 0 if s.quick else 0.05
    )
    rows += [
        bench_row(
            "features",
            None,
            "images_per_second",
            spread(fns[k][1]["batch"] / np.array(t)),
            "1/s",
            **fns[k][1],
        )
        for k, t in secs.items()
    ]
    return rows, {f"features {k}": t for k, t in secs.items()}


def measure_data(s, device) -> tuple:
    "Batches per second of `Batches`: images in memory (on the device), and files read one by one."
    g, batch, n, tmp = (
        torch.Generator().manual_seed(0),
        16 if s.quick else 128,
        2000 if s.quick else 10_000,
        Path(tempfile.mkdtemp(prefix="uvit-bench-")),
    )
    try:
        u8, y, fns = (
            torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8),
            torch.arange(n) % 10,
            {},
        )
        for i in range(batch):
            (tmp / f"{i % 2}").mkdir(exist_ok=True)
            save_png(u8[i].permute(1, 2, 0).numpy(), tmp / f"{i % 2}" / f"{i}.png")
        sets = {
            "resident": Data("random", u8, y, u8[:1], y[:1], 10, [], ""),
            "streamed": load_folder(
                DataConfig(dataset=f"folder:{tmp}", img_size=32, in_chans=3), tmp, 0
            ),
        }
        for k, d in sets.items():
            b, steps = Batches(d, batch, 0, True, 0.1, d.num_classes, device), iter(range(10**9))
            fns[k] = lambda b=b, steps=steps: b.at(next(steps))
        secs = interleaved(fns, s.repeats, s.warmup, device, 0 if s.quick else 0.05)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    note = {
        "resident": "random flips and dropped labels",
        "streamed": "the same from PNG files, read in the calling process",
    }
    rows = [
        bench_row(
            "data",
            None,
            "batches_per_second",
            spread(1 / np.array(t)),
            "1/s",
            option=k,
            note=note[k],
            img_size=32,
            in_chans=3,
            batch=batch,
            model="-",
        )
        for k, t in secs.items()
    ]
    return rows, {f"data {k}": t for k, t in secs.items()}


def first_update(
    model: str, batch: int, precision: str, device: str, attention: str, compile: bool
):
    "What a fresh process does for `measure_start`: build everything, make one update, say so."
    c = Training(
        bench_experiment(model, batch, precision),
        pick_device(device),
        How(attention=attention, compile=compile),
    )
    c()
    print("first update", float(c.loss), flush=True)


def time_start(
    model,
    batch,
    precision,
    device,
    attention,
    compile,  # as for `first_update`
    cache: Path,  # folder of compiled code; None: as found
) -> float:  # seconds from the start of the process to the end of its first update
    "Time a fresh process. Raises `RuntimeError` with its last line where it fails."
    code = f"from uvit_repro.bench.bench import first_update as f; f{(model, batch, precision, str(device), attention, bool(compile))!r}"
    home = str(Path(sys.modules["uvit_repro"].__file__).resolve().parent.parent)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")])),
    }
    if cache:
        env.update(TORCHINDUCTOR_CACHE_DIR=str(cache), TRITON_CACHE_DIR=str(cache / "triton"))
    start, seconds, lines = time.perf_counter(), None, []
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as p:
        for line in p.stdout:
            lines.append(line.strip())
            if line.startswith("first update"):
                seconds = time.perf_counter() - start
    if p.returncode or seconds is None:
        raise RuntimeError(
            f"a fresh process did not reach its first update: {lines[-1] if lines else 'it printed nothing'}"
        )
    return seconds


def measure_start(model: str, batch: int, s, device) -> tuple:
    "Seconds to the first update: without compile, and where compile is used with an empty and a filled cache of compiled code."
    p = s.precision[-1]
    exp = bench_experiment(model, batch, p)
    how = s.how(exp, device)
    rows, times = [], {}
    row = lambda name, value, note, h: bench_row(
        "start", exp, "seconds", value, "s", h, model=model, option=name, note=note
    )
    with tempfile.TemporaryDirectory(prefix="uvit-bench-") as tmp:
        runs = [("without compile", False, min(s.repeats, 3), None)]
        if how.compile:
            runs += [
                ("compile, empty cache", True, 1, Path(tmp)),
                ("compile, filled cache", True, min(s.repeats, 2), Path(tmp)),
            ]
        for name, compile, n, cache in runs:
            times[f"start {model} {name}"] = t = [
                time_start(model, batch, p, device, how.attention, compile, cache) for _ in range(n)
            ]
            rows.append(
                row(
                    name,
                    spread(t),
                    "from the start of the process to the end of its first update",
                    replace(how, compile=compile),
                )
            )
    if not how.compile:
        rows.append(
            row(
                "compile, filled cache",
                None,
                "not run: compile is not used here (on a GPU by itself, else with --compile on)",
                how,
            )
        )
    return rows, times


def train_options(exp: Experiment, how: How, device, keep: float, quick=False) -> list:
    "(name, experiment, how) with one thing changed, or (name, None, reason)."
    other, gpu, keeps = (
        {"sdpa": "math", "math": "sdpa"}[how.attention],
        device.type == "cuda",
        f"checkpointing, {keep:g} widths of each block kept",
    )
    recast = replace(
        exp, train=replace(exp.train, precision="bf16" if exp.train.precision == "fp32" else "fp32")
    )
    why = (
        "takes minutes, --quick leaves it out"
        if quick
        else "no C++ compiler here"
        if not gpu and not shutil.which(os.environ.get("CXX", "g++"))
        else ""
    )
    there = [
        ("bf16 autocast", recast, how),
        (f"{how.attention} attention (against {other})", exp, replace(how, attention=other)),
        ("fused AdamW", exp, replace(how, fused=False)),
        ("for-each moving average", exp, replace(how, foreach=False)),
        ("compile", exp, replace(how, compile=not how.compile)),
        ("CUDA graph", exp, replace(how, cuda_graph=not how.cuda_graph)),
        ("data on the device (against pinned transfers)", exp, replace(how, data="pinned")),
        ("data on the device (against blocking transfers)", exp, replace(how, data="blocking")),
        ("checkpointing, all recomputed", exp, replace(how, checkpoint=True, keep=0.0)),
        (keeps, exp, replace(how, checkpoint=True, keep=keep)),
    ]
    lacking = lambda n: (
        "on a GPU only"
        if not gpu and n.startswith(("CUDA", "data"))
        else why
        if n == "compile" and not how.compile
        else ""
    )
    return [(n, None, f"not run: {lacking(n)}") if lacking(n) else (n, e, h) for n, e, h in there]


def ablation_rows(what, exp, e, base, h, outcome, device, more) -> list:
    "What one pair says: everything on, as `base`, and one thing off, as `h` on `e`."
    _, secs, mem, why = outcome
    row = lambda metric, value, unit, **kw: bench_row(
        what, exp, metric, value, unit, base, **more, **kw
    )
    if why:
        return [row("worth", None, "x", note=next(iter(why.values())))]
    on, off = secs["all on"], secs["off"]
    rows = [row("seconds_on", spread(on), "s"), row("seconds_off", spread(off), "s")]
    if h.checkpoint:
        rows.append(
            row(
                "cost",
                spread(100 * (np.array(off) / np.array(on) - 1)),
                "% more time",
                note=verdict(paired_ratio(on, off)),
            )
        )
        return rows + [
            memory_row(what, exp, mem["off"], device, how=base, **more),
            memory_row(
                what,
                exp,
                mem["all on"],
                device,
                how=base,
                **{**more, "option": f"{more['option']}: without it"},
            ),
        ]
    used = not (
        h.compile > base.compile
        or h.cuda_graph > base.cuda_graph
        or (exp.train.precision, e.train.precision) == ("fp32", "bf16")
    )
    r = paired_ratio(off, on) if used else paired_ratio(on, off)
    return rows + [row("worth", r, "x", note=verdict(r) + ("" if used else "; not used here"))]


def ablate(
    what: str,
    exp: Experiment,
    how: How,
    options: list,
    s,
    device,
    model: str,  # train | sample; all on; of `train_options`; Settings
    make,  # make(experiment, how) builds a contestant
) -> tuple:  # (rows, single times)
    "One thing off at a time, each pair built, timed and freed."
    rows, times = [], {}
    for name, e, h in options:
        more = {"model": model, "option": name}
        if e is None:
            rows.append(bench_row(what, exp, "worth", None, "x", how, **more, note=h))
            continue
        base = replace(how, data="device") if h.data else how
        outcome = contest(
            {"all on": lambda: make(exp, base), "off": lambda: make(e, h)},
            s,
            device,
            what == "sample",
        )
        rows += ablation_rows(what, exp, e, base, h, outcome, device, more)
        times.update(
            {
                f"ablate {what} {model} batch {exp.train.batch_size} {name}: {k}": v
                for k, v in outcome[1].items()
            }
        )
        del outcome
    return rows, times


def ablate_train(model: str, batch: int, s, device, only="") -> tuple:
    "Training with one thing off at a time; `only` options whose name starts so."
    exp = bench_experiment(model, batch, s.precision[-1])
    how = s.how(exp, device, checkpoint="off")
    options = [o for o in train_options(exp, how, device, s.keep, s.quick) if o[0].startswith(only)]
    return ablate("train", exp, how, options, s, device, model, lambda e, h: Training(e, device, h))


def ablate_sample(model: str, s, device) -> tuple:
    "Sampling with one thing off at a time; guided where the model has a null condition."
    exp = bench_experiment(model, s.images, s.precision[-1])
    how = replace(s.how(exp, device, checkpoint="off"), cuda_graph=False)
    guided = exp.train.p_uncond > 0
    exp = guided_experiment(exp) if guided else exp
    options = [
        o
        for o in train_options(exp, how, device, 0.0, s.quick)
        if o[0].startswith(("bf16", how.attention, "compile"))
    ] + [
        (
            "guidance in one doubled batch",
            *(
                (exp, replace(how, doubled=False))
                if guided
                else (None, f"not run: {model} was not released with guidance")
            ),
        ),
        ("inference mode (against no gradients)", exp, replace(how, inference=False)),
    ]
    return ablate(
        "sample",
        exp,
        how,
        options,
        s,
        device,
        model,
        lambda e, h: Sampling(e, device, h, s.images, s.nfe, guided),
    )


S2, L2, H2 = "U-ViT-S/2", "U-ViT-L/2", "U-ViT-H/2"


def make_target(
    text, device, bound, what, model, metric, batch="", precision="bf16", option="", scale=1.0
) -> dict:
    "A bound, `>= 4` or `<= 15`, on a row of the record; a measured value is divided by `scale` first."
    row = dict(
        what=what,
        model=model,
        metric=metric,
        precision=precision,
        option=option,
        impl="ours",
        **({"batch": batch} if batch else {}),
    )
    return {
        "target": text,
        "device": device,
        "wanted": bound,
        "at_least": bound[:2] == ">=",
        "bound": float(bound[2:]),
        "scale": scale,
        "row": row,
    }


TARGETS = [
    make_target(*t)
    for t in (
        (
            "S/2, batch 128, training: over the released code, x",
            "cuda",
            ">= 4",
            "train",
            S2,
            "speedup",
            128,
        ),
        (
            "S/2, batch 128, training: share of the bf16 matrix rate",
            "cuda",
            ">= 0.45",
            "train",
            S2,
            "mfu",
            128,
        ),
        (
            "L/2, batch 128, training: over the released code, x",
            "cuda",
            ">= 2.5",
            "train",
            L2,
            "speedup",
            128,
        ),
        (
            "L/2, batch 128, training: share of the bf16 matrix rate",
            "cuda",
            ">= 0.6",
            "train",
            L2,
            "mfu",
            128,
        ),
        (
            "H/2, batch 128, training: over the released code, x",
            "cuda",
            ">= 2.5",
            "train",
            H2,
            "speedup",
            128,
        ),
        (
            "H/2, batch 128, training: share of the bf16 matrix rate",
            "cuda",
            ">= 0.6",
            "train",
            H2,
            "mfu",
            128,
        ),
        (
            "H/2, batch 128, with checkpointing: GB of memory",
            "cuda",
            "<= 20",
            "train",
            H2,
            "peak_memory",
            128,
            "bf16",
            "checkpointing, *",
            1e9,
        ),
        (
            "H/2, batch 128, that checkpointing: % more time",
            "cuda",
            "<= 15",
            "train",
            H2,
            "cost",
            128,
            "bf16",
            "checkpointing, *",
        ),
        (
            "S/2, 500 images, 50 evaluations: seconds",
            "cuda",
            "<= 1.5",
            "sample",
            S2,
            "seconds",
            500,
        ),
        (
            "S/2, 500 images, 50 evaluations: over the released code, x",
            "cuda",
            ">= 3",
            "sample",
            S2,
            "speedup",
            500,
        ),
        ("H/2, 500 images, 50 evaluations: seconds", "cuda", "<= 13", "sample", H2, "seconds", 500),
        (
            "H/2, 500 images, 50 evaluations: over the released code, x",
            "cuda",
            ">= 3",
            "sample",
            H2,
            "speedup",
            500,
        ),
        (
            "S/2, sampling: the solver's share of a step, %",
            "cuda",
            "<= 5",
            "sample",
            S2,
            "solver_share",
            500,
        ),
        (
            "S/2: seconds to the first update, filled compile cache",
            "cuda",
            "<= 30",
            "start",
            S2,
            "seconds",
            "",
            "bf16",
            "compile, filled cache",
        ),
        (
            "S/2: seconds to the first update, without compile",
            "cuda",
            "<= 5",
            "start",
            S2,
            "seconds",
            "",
            "bf16",
            "without compile",
        ),
        (
            "S/2, batch 8, training: over the released code, x",
            "cpu",
            ">= 3",
            "train",
            S2,
            "speedup",
            8,
        ),
        (
            "S/2, batch 8, training, both float32: over the released code, x",
            "cpu",
            ">= 1",
            "train",
            S2,
            "speedup",
            8,
            "fp32",
        ),
        (
            "S/2, 8 images, sampling: over the released code, x",
            "cpu",
            ">= 3",
            "sample",
            S2,
            "speedup",
            8,
        ),
        (
            "S/2, 8 images, sampling, both float32: over the released code, x",
            "cpu",
            ">= 1",
            "sample",
            S2,
            "speedup",
            8,
            "fp32",
        ),
        (
            "S/2, sampling: the solver's share of a step, %",
            "cpu",
            "<= 5",
            "sample",
            S2,
            "solver_share",
            8,
        ),
        (
            "S/2: seconds to the first update, without compile",
            "cpu",
            "<= 5",
            "start",
            S2,
            "seconds",
            "",
            "bf16",
            "without compile",
        ),
    )
]
GPU_COMMAND = "uvit-repro bench --targets --peer DIR --publish"


def fits_row(r: dict, want: dict) -> bool:
    "Whether a row is the one that a target names; a star at the end stands for anything but the comparison without it."

    def same(k, v):
        got = str(r.get(k, ""))
        return (
            got.startswith(v[:-1]) and not got.endswith("without it")
            if str(v).endswith("*")
            else got == str(v)
        )

    return all(same(k, v) for k, v in want.items())


def check_targets(
    rows: list,  # of a benchmark
    kind: str,  # cpu | cuda: where they were measured
    peer: bool,  # whether the released code was there
    left=(),  # jobs that the budget did not reach
) -> list:  # dicts: target, device, wanted, measured, met (True, False, None), note
    "Each target beside what was measured."
    out = []
    for t in TARGETS:
        found = [r for r in rows if fits_row(r, t["row"])] if t["device"] == kind else []
        ok = [r for r in found if r.get("value") is not None]
        if t["row"]["option"].endswith("*"):
            ok = pick_checkpointing(rows, ok, t)
        if t["device"] != kind:
            why = f"not run: needs a {'GPU' if t['device'] == 'cuda' else 'CPU run'}; there: {GPU_COMMAND}"
        elif found:
            why = found[-1].get("note", "")
        elif t["row"]["metric"] == "speedup" and not peer:
            why = "not run: give --peer DIR"
        else:
            why = (
                f"not run: the budget was spent ({len(left)} left)"
                if left
                else "not run: not among what was measured"
            )
        entry = {
            "target": t["target"],
            "device": t["device"],
            "wanted": t["wanted"],
            "measured": None,
            "met": None,
            "note": why,
        }
        if ok:
            best_ = (max if t["at_least"] else min)(ok, key=lambda r: r["value"])
            v = best_["value"] / t["scale"]
            entry.update(
                measured=v,
                met=bool(v >= t["bound"] if t["at_least"] else v <= t["bound"]),
                note=best_.get("option", ""),
            )
        out.append(entry)
    return out


def pick_checkpointing(rows: list, ok: list, t: dict) -> list:
    "Memory and cost must be met by the same setting: the cheapest that fits, else the smallest."
    mine = [r for r in rows if r.get("model") == t["row"]["model"] and r.get("value") is not None]
    value = lambda metric: {r["option"]: r["value"] for r in mine if r["metric"] == metric}
    memory, cost = value("peak_memory"), value("cost")
    both = [o for o in cost if o in memory]
    fit = [o for o in both if memory[o] <= 20e9]
    chosen = min(fit, key=cost.get) if fit else min(both, key=memory.get, default=None)
    return [r for r in ok if r["option"] == chosen]


WHAT = ("train", "sample", "features", "data", "start")


@dataclass(frozen=True)
class Settings:
    "What `uvit-repro bench` is asked to do; zero and empty mean: by the device."

    what: tuple = ()  # of WHAT; empty: train and sample (quick: all but start)
    models: tuple = (S2,)
    batch: tuple = ()  # of training; empty: 8 on a CPU, 8 and 128 on a GPU
    images: int = 0  # of a set of samples; 0: 8 on a CPU, 500 on a GPU
    nfe: int = 0  # evaluations; 0: 10 on a CPU, 50 on a GPU
    precision: tuple = ("fp32", "bf16")
    device: str = "auto"
    repeats: int = 10
    warmup: int = 3
    compile: str = "auto"  # auto | on | off
    cuda_graph: bool = False
    checkpoint: str = "off"  # off | full | selective
    keep: float = 2.0  # selective: what each block keeps, in tensors of its width
    guided: bool = True  # sampling also with guidance
    peer: str = ""  # a checkout of the released code
    ablate: bool = False
    targets: bool = False
    quick: bool = False  # the tiny model, seconds
    budget: float = 0.0  # seconds; 0: none

    def how(self, exp: Experiment, device, checkpoint=None) -> How:
        "How ours computes under these settings."
        return best(
            exp,
            device,
            self.compile,
            self.cuda_graph and torch.device(device).type == "cuda",
            checkpoint or self.checkpoint,
            self.keep,
        )


def check_settings(
    s: Settings,  # as asked
    device: torch.device,  # found
) -> Settings:  # complete
    "Fill in what depends on the device. Raises `ParameterError` for what can't be."
    if s.quick:
        s = replace(
            s,
            models=("tiny",),
            batch=(4,),
            images=4,
            nfe=3,
            repeats=min(s.repeats, 3),
            warmup=min(s.warmup, 2),
        )
    if s.targets:
        s = replace(
            s,
            precision=("fp32", "bf16") if device.type == "cpu" else ("bf16",),
            batch=(8,) if device.type == "cpu" else (128,),
            guided=False,
        )
    gpu = device.type == "cuda"
    s = replace(
        s,
        what=s.what or (WHAT[:4] if s.quick else WHAT[:2]),
        batch=s.batch or ((8, 128) if gpu else (8,)),
        images=s.images or (500 if gpu else 8),
        nfe=s.nfe or (50 if gpu else 10),
    )
    known = {
        "what": WHAT,
        "precision": tuple(DTYPES),
        "compile": ("auto", "on", "off"),
        "checkpoint": ("off", "full", "selective"),
    }
    for name, known in known.items():
        given = getattr(s, name)
        given = (given,) if isinstance(given, str) else given
        if not given or (bad := [g for g in given if g not in known]):
            raise ParameterError(f"{name} = {','.join(given)!r}: allowed are {', '.join(known)}")
    for name, given in {
        "batch": s.batch,
        "images": (s.images,),
        "nfe": (s.nfe,),
        "repeats": (s.repeats,),
    }.items():
        if not given or min(given) < 1:
            raise ParameterError(f"{name} = {','.join(map(str, given))}: at least 1")
    if s.warmup < 0 or s.keep < 0 or s.budget < 0:
        raise ParameterError(
            f"warmup = {s.warmup}, keep = {s.keep}, budget = {s.budget}: none may be negative"
        )
    if "fp16" in s.precision and not gpu:
        raise ParameterError("precision = 'fp16' needs a GPU; try fp32,bf16")
    if not s.models:
        raise ParameterError("models: give at least one, as in U-ViT-S/2")
    for m in s.models:
        try:
            bench_experiment(m)
        except ValueError as e:
            raise ParameterError(str(e)) from None
    return s


def list_jobs(
    s: Settings,
    device,
    rates: dict,
    peer: Peer = None,  # complete settings, where, ceilings (filled later), the released code
) -> list:  # (label, function that returns rows and times), in order
    "What these settings ask for, cheapest questions first."
    train = lambda m, b: (
        f"train {m} batch {b}",
        lambda: measure_train(m, b, s, device, rates, peer),
    )
    draw = lambda m: (
        f"sample {m}, {s.images} images, {s.nfe} evaluations",
        lambda: measure_sample(m, s, device, rates, peer),
    )
    begin = lambda m, b: (f"start {m} batch {b}", lambda: measure_start(m, b, s, device))
    if s.targets and device.type == "cuda":
        recompute = (
            "checkpointing H/2 batch 128",
            lambda: ablate_train(H2, 128, s, device, "checkpointing"),
        )
        return [
            train(S2, 128),
            draw(S2),
            train(L2, 128),
            train(H2, 128),
            draw(H2),
            recompute,
            begin(S2, 128),
        ]
    if s.targets:
        return [train(S2, 8), draw(S2), begin(S2, 8)]
    jobs = [train(m, b) for m in s.models for b in s.batch if "train" in s.what] + [
        draw(m) for m in s.models if "sample" in s.what
    ]
    jobs += [("features", lambda: measure_features(s, device))] * ("features" in s.what) + [
        ("data", lambda: measure_data(s, device))
    ] * ("data" in s.what)
    jobs += [begin(m, s.batch[0]) for m in s.models if "start" in s.what]
    if s.ablate:
        jobs += [
            (f"ablate train {m} batch {b}", lambda m=m, b=b: ablate_train(m, b, s, device))
            for m in s.models
            for b in s.batch
            if "train" in s.what
        ]
        jobs += [
            (f"ablate sample {m}", lambda m=m: ablate_sample(m, s, device))
            for m in s.models
            if "sample" in s.what
        ]
    return jobs


@contextlib.contextmanager
def many_variants():
    "Room for the compiled code of several contestants; two warnings about the released code (checkpointing, the first steps of its loss scale) are not shown."
    cfg = importlib.import_module("torch._dynamo").config
    name = "recompile_limit" if hasattr(cfg, "recompile_limit") else "cache_size_limit"
    was = getattr(cfg, name)
    setattr(cfg, name, 64)
    try:
        with warnings.catch_warnings():
            for text in (".*use_reentrant.*", ".*lr_scheduler.step.*"):
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        setattr(cfg, name, was)


def machine_rows(rates: dict) -> list:
    "The ceilings as rows."
    row = lambda p, v: bench_row(
        "machine",
        None,
        *(("bandwidth", v, "bytes/s") if p == "bandwidth" else ("matrix_rate", v, "FLOP/s")),
        model="-",
        precision="" if p == "bandwidth" else p,
    )
    return [row(p, v) for p, v in rates.items()]


def raise_ceilings(rates: dict, new: dict):
    "Keep the highest rates seen."
    for k, v in new.items():
        rates[k] = max(v, rates.get(k, 0.0))


def run_bench(
    s: Settings,  # what to do
    out_dir=None,  # folder of runs; None: results/runs
    command="",  # noted in the record
    say=print,  # progress and tables
) -> Record:  # finished, stopped at the budget, or raised
    "Run a benchmark and record it. Raises `OutputsDiffer` where the released code computes something else, `ParameterError` for bad settings."
    start, device = time.perf_counter(), pick_device(s.device)
    s = check_settings(s, device)
    where = conditions(device)
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer(s.peer)) if s.peer else None
        stack.enter_context(many_variants())
        machine = (
            where["gpu"]
            if device.type == "cuda"
            else f"{where['cpu'] or 'CPU'} x{where['threads']}"
        )
        rec = Record(
            machine,
            device.type,
            {
                "command": " ".join(
                    Path(a).name if Path(a).is_absolute() else a for a in command.split()
                ),
                "settings": asdict(s),
                "conditions": where,
                "peer": peer and {"version": peer.version, "attention": peer.attention},
            },
            out_dir,
        )
        kinds = (
            tuple(dict.fromkeys(("fp32", *s.precision))) if device.type == "cpu" else tuple(DTYPES)
        )
        rates = {}
        jobs = list_jobs(s, device, rates, peer)

        def measure_ceilings():
            before = dict(rates)
            raise_ceilings(rates, ceilings(device, kinds, s.quick))
            for r in rec.rows:  # shares that were taken of a lower ceiling
                if r["metric"] == "mfu":
                    r.update(
                        {
                            k: r[k] * before[r["precision"]] / rates[r["precision"]]
                            for k in ("value", "low", "high", "min", "max")
                        }
                    )
            rec.info["ceilings"] = dict(rates)
            rec.rows = machine_rows(rates) + [r for r in rec.rows if r["what"] != "machine"]
            rec.add([])

        try:
            measure_ceilings()
            say(ceiling_line(rates))
            for k, (label, job) in enumerate(jobs):
                if s.budget and time.perf_counter() - start > s.budget:
                    rec.info["left"] = [n for n, _ in jobs[k:]]
                    break
                if k and label.startswith(("train", "sample")):
                    measure_ceilings()  # again: the highest seen is the ceiling, whatever else the machine did meanwhile
                begun = time.perf_counter()
                rows, times = job()
                rec.add(rows, times)
                say(f"{label}: {time.perf_counter() - begun:.1f} s")
                [say(line) for line in job_lines(rows)]
            left = rec.info["left"]
            status = "stopped" if left else "ok"
            if left:
                say(f"budget of {s.budget:g} s spent; not run: {'; '.join(left)}")
            if s.targets:
                rec.info["targets"] = check_targets(rec.rows, device.type, bool(peer), left)
                [say(line) for line in target_lines(rec.info["targets"])]
            rec.add([], status=status)
        except BaseException as e:
            rec.add(
                [],
                status="failed" if isinstance(e, Exception) else "interrupted",
                error=f"{type(e).__name__}: {e}",
            )
            raise
        finally:
            free(device)
            torch.compiler.reset()
    say(f"recorded in {rec.folder}")
    return rec


def human(
    value,
    unit: str,  # a number or None; as in bench.csv
) -> str:
    "A measurement with its unit."
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if unit == "s":
        return (
            f"{value:.2f} s"
            if value >= 1
            else f"{value * 1e3:.3g} ms"
            if value >= 1e-3
            else f"{value * 1e6:.3g} us"
        )
    if unit == "bytes":
        return (
            f"{value / 1e9:.2f} GB"
            if value >= 1e9
            else f"{value / 1e6:.0f} MB"
            if value >= 1e6
            else "< 1 MB"
        )
    if unit.startswith("of the matrix"):
        return f"{100 * value:.0f} %"
    if unit.startswith("%"):
        return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %"
    return f"{value:.2f}x" if unit == "x" else f"{value:.3g}"


def aligned(
    rows: list,  # of lists of strings, the first being the head
) -> list:  # lines
    "Columns of equal width."
    width = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) if i < len(width) - 1 else c
            for i, (c, w) in enumerate(zip(r, width))
        ).rstrip()
        for r in rows
    ]


def with_spread(r: dict) -> str:
    "A row's value and its quartiles."
    low, high = r.get("low"), r.get("high")
    return human(r.get("value"), r["unit"]) + (
        "" if low is None or r.get("value") is None else f" [{low:.2f}, {high:.2f}]"
    )


def contest_table(rows: list) -> list:
    "One line for each contestant."
    head, keys = (
        ["", "time", "images/s", "of ceiling", "memory", "solver", "speed-up", "note"],
        ("seconds", "images_per_second", "mfu", "peak_memory", "solver_share", "speedup"),
    )
    groups = {}
    for r in rows:
        groups.setdefault((r["impl"], r.get("precision", ""), r.get("option", "")), {})[
            r["metric"]
        ] = r
    show = lambda g, m: (
        "-"
        if m not in g
        else with_spread(g[m])
        if m == "speedup"
        else human(g[m].get("value"), g[m]["unit"])
    )
    lines = [
        [" ".join(filter(None, k)), *(show(g, m) for m in keys), g["seconds"].get("note", "")]
        for k, g in groups.items()
    ]
    keep = [i for i in range(len(head)) if i == 0 or any(l[i] not in ("-", "") for l in lines)]
    return aligned([[l[i] for i in keep] for l in [head] + lines]) if lines else []


def ablation_table(rows: list) -> list:
    "One line for each thing that was turned off."
    table = [["one thing off", "all on", "without", "ratio", "verdict"]]
    for n in dict.fromkeys(r["option"] for r in rows if r["metric"] in ("worth", "cost")):
        of = {r["metric"]: r for r in rows if r.get("option") == n}
        w = of.get("worth") or of["cost"]
        time_ = lambda m: human(of[m]["value"], "s") if m in of else "-"
        ratio, note = (
            (with_spread(w), "")
            if "worth" in of
            else (
                f"+{human(w['value'], '%')}",
                f"; {human(of['peak_memory'].get('value'), 'bytes')} of memory",
            )
        )
        table.append(
            [n, time_("seconds_on"), time_("seconds_off"), ratio, w.get("note", "") + note]
        )
    return aligned(table) if len(table) > 1 else []


def job_lines(
    rows: list,  # of one job
) -> list:  # of text
    "The table of one job."
    out = [
        f"  {r['metric'].replace('_', ' ')} to the released code: {r['value']:.2g} ({r['unit']}; {r['note']})"
        for r in rows
        if r["what"] == "outputs"
    ]
    for r in rows:
        if r["what"] not in ("features", "data", "start"):
            continue
        name = " ".join(
            filter(
                None,
                [r.get("model", "").strip("-"), r.get("option", ""), r["metric"].replace("_", " ")],
            )
        )
        out.append(f"  {name}: {with_spread(r)}" + (f" ({r['note']})" if r.get("note") else ""))
    one_off = {r["option"] for r in rows if r["metric"] in ("worth", "cost")}
    plain = [
        r
        for r in rows
        if r["what"] in ("train", "sample") and r.get("option", "").partition(":")[0] not in one_off
    ]
    return out + contest_table(plain) + ablation_table(rows)


def target_lines(targets: list) -> list:
    "Targets as a table: wanted, measured, met."
    line = lambda t: [
        t["target"],
        t["device"],
        t["wanted"],
        "-" if t["measured"] is None else f"{t['measured']:.3g}",
        {True: "met", False: "MISSED", None: t["note"]}[t["met"]],
    ]
    return ["targets"] + aligned([["", "on", "wanted", "measured", ""], *map(line, targets)])


def speed_table(
    df,  # of `newest`
):  # DataFrame: one row per machine, model, batch, precision
    "Times of ours and of the released code, ratio with its spread, share of the ceiling, memory."
    import pandas as pd

    if not len(df):
        return pd.DataFrame()
    d, key = (
        df[df.what.isin(["train", "sample"]) & (df.impl == "ours")],
        ["machine", "what", "model", "option", "batch", "precision"],
    )
    d, rows = (
        d[
            ~d.option.isin(d.option[d.metric.isin(["worth", "cost"])])
            & ~d.option.str.endswith("without it")
        ],
        [],
    )
    for k, g in d.groupby(key, dropna=False, sort=False):
        v = {r.metric: r for r in g.itertuples()}
        if "seconds" not in v:
            continue
        show = lambda m, unit: human(v[m].value, unit) if m in v else "-"
        ratio = (
            f"{v['speedup'].value:.2f}x [{v['speedup'].low:.2f}, {v['speedup'].high:.2f}]"
            if "speedup" in v
            else "not run: --peer DIR"
        )
        rows.append(
            dict(
                zip(key, k),
                time=show("seconds", "s"),
                images_per_second=show("images_per_second", ""),
                of_ceiling=show("mfu", "of the matrix rate"),
                memory=show("peak_memory", "bytes"),
                over_released=ratio,
                when=v["seconds"].started,
                note=v["seconds"].note,
            )
        )
    return pd.DataFrame(rows)


def labels(d, more) -> list:
    "One label for each row: what, model, size, precision, and `more(row)`."
    size = lambda r: f"{'batch' if r.what == 'train' else 'images'} {int(r.batch)}"
    return [
        f"{r.what} {r.model}, {size(r)}, {r.precision} {r.option}".rstrip() + more(r)
        for r in d.itertuples()
    ]


def bars(d, factor, names, ax):
    "Values with their quartiles as horizontal bars, training and sampling in two colours."
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(8, 0.8 + 0.4 * len(d)))[1]
    ax.barh(
        range(len(d)),
        factor * d.value,
        xerr=[factor * (d.value - d.low), factor * (d.high - d.value)],
        color=["C0" if w == "train" else "C1" for w in d.what],
        height=0.6,
        ecolor="0.25",
        capsize=3,
    )
    ax.set_yticks(range(len(d)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return ax


def plot_speedup(df, ax=None):
    "Ratio to the released code with its spread."
    d = df[df.metric == "speedup"].reset_index(drop=True)
    most = max(d.high.max(), 1)
    ax = bars(d, 1, labels(d, lambda r: f"\n{r.machine}"), ax)
    ax.axvline(1, color="0.3", lw=1)
    for i, v in enumerate(d.high):
        ax.text(v + 0.02 * most, i, f"{d.value[i]:.2f}x", va="center", fontsize=9)
    ax.set(xlim=(0, 1.15 * most), xlabel="times as fast as the released code, same run")
    return ax


def plot_ceiling(df, ax=None):
    "Model FLOP utilisation: share of the machine's own matrix rate of the same type."
    d = df[(df.metric == "mfu") & (df.impl == "ours")].reset_index(drop=True)
    ax = bars(d, 100, labels(d, lambda r: f"\n{r.machine}"), ax)
    ax.axvline(100, color="0.3", lw=1)
    ax.set(xlim=(0, 110), xlabel="per cent of the matrix rate measured in the same run")
    return ax


def plot_worth(df, ax=None):
    "What each optimisation is worth: time without it over time with it."
    import matplotlib.pyplot as plt

    d = df[(df.metric == "worth") & df.value.notna()].reset_index(drop=True)
    ax = ax or plt.subplots(figsize=(8, 0.8 + 0.34 * len(d)))[1]
    ax.errorbar(
        d.value,
        range(len(d)),
        xerr=[d.value - d.low, d.high - d.value],
        fmt="none",
        ecolor="0.35",
        capsize=3,
    )
    for what, marker, name in (("train", "o", "training"), ("sample", "s", "sampling")):
        i = d.index[d.what == what]
        ax.plot(d.value[i], i, marker, label=name)
    names = [
        f"{r.option} ({r.model}, {r.what})" + (" *" if "not used" in r.note else "")
        for r in d.itertuples()
    ]
    ax.axvline(1, color="0.3", lw=1)
    ax.set_yticks(range(len(d)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="time without it over time with it   (* not used on this machine)")
    ax.legend(fontsize=8)
    return ax
