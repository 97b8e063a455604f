"""What is timed. Every contestant has `prepare()` to build it and `call()` to do it once."""

import copy
import functools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from uvit_repro.config import (
    CONFIGS,
    PROTOCOLS,
    DataConfig,
    DiffusionConfig,
    Experiment,
    ModelConfig,
    ParameterError,
    SamplingConfig,
    TrainConfig,
)
from uvit_repro.data.features import (
    CifarResNet,
    DigitsCNN,
    extract,
    feature_extractor,
    feature_status,
)
from uvit_repro.data.images import Batches, Data
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.counting import macs_of, training_flops
from uvit_repro.runs.devices import pick_device
from uvit_repro.runs.execution import (
    AUTOCAST,
    CompileReport,
    compile_blocks,
    set_attention,
    set_checkpoint,
)
from uvit_repro.sample import sample
from uvit_repro.train import Trainer, build_model, sample_times_and_noise


def bench_experiment(
    model: str,  # a released model of Table 2, as in U-ViT-S/2; or tiny
    batch: int = 8,  # images of an update
) -> Experiment:
    "The experiment whose network and update are timed. Raises `ParameterError` for other names."
    released = {n: e for n, e in reversed(CONFIGS.items()) if e.model.condition != "text"}
    models = {n[n.index("U-ViT") :]: e for n, e in released.items()}
    models["tiny"] = PROTOCOLS["smoke"]
    if model not in models:
        raise ParameterError(f"model {model!r} was not released: allowed are {', '.join(models)}")
    exp = models[model]
    return replace(
        exp,
        seed=0,
        diffusion=DiffusionConfig(process="vp"),
        sampling=SamplingConfig(sampler="dpm_solver_fast"),
        train=replace(exp.train, batch_size=batch),
    )


def bench_inputs(
    exp: Experiment,
    device,
) -> tuple:  # a batch of images (B, C, H, W), dict of conditions
    "Made-up inputs."
    n, d = exp.train.batch_size, exp.data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d.in_chans, d.img_size, d.img_size, generator=generator)
    y = torch.arange(n, device=device) % max(d.num_classes, 1)
    return x.to(device), {"y": y} if exp.model.condition == "class" else {}


@functools.lru_cache(maxsize=1)  # a large network takes long to draw
def _initial_network(model: ModelConfig, data: DataConfig, p_uncond: float) -> nn.Module:
    "A network with its initial weights; not to be changed."
    return build_model(Experiment(model=model, data=data, train=TrainConfig(p_uncond=p_uncond)))


def bench_network(exp: Experiment) -> nn.Module:
    "A fresh copy of the experiment's network with its initial weights, on the CPU."
    return copy.deepcopy(_initial_network(exp.model, exp.data, exp.train.p_uncond))


@dataclass(frozen=True)
class TrainingOptions:
    "How our contestants train and sample."

    precision: str = "fp32"  # fp32 | bf16 | fp16
    attention: str = "sdpa"  # one of ATTENTION_PATHS
    compile: bool = False  # torch.compile of the blocks
    fused: bool = True  # AdamW in one kernel
    checkpoint: bool = False  # activations recomputed
    budget: float = 0.0  # with checkpoint: kept activations per block, in (B, L, D) tensors


class Contestant:
    "Something to be timed."

    columns: dict  # that name its rows in bench.csv
    items = 0  # images or batches of one call; 0: only its seconds count
    unit = "images"  # of the items
    flops = 0.0  # floating-point operations of one call
    warmup = 2  # untimed calls
    report: CompileReport | None = None  # of its compiled network

    def prepare(self) -> None:
        "Build what is timed."

    def call(self) -> None:
        "Do it once."
        raise NotImplementedError

    def note_compilation(self) -> None:
        "Say in the rows what compilation did."
        if self.report:
            r, note = self.report, self.columns.get("note", "")
            made = f"{r.graphs} compiled graphs, {r.fallbacks} eager calls {r.error[:100]}".strip()
            self.columns["note"] = f"{note}; {made}".removeprefix("; ")


def describe(exp: Experiment, options: TrainingOptions, **more) -> dict:
    "Columns of one of our contestants."
    d, compiled = exp.data, "on" if options.compile else "off"
    sizes = {"img_size": d.img_size, "in_chans": d.in_chans, "batch": exp.train.batch_size}
    how = {"precision": options.precision, "attention": options.attention, "compile": compiled}
    return {**sizes, **how, "impl": "ours", **more}


class Training(Contestant):
    "One training update of ours per call."

    def __init__(self, exp: Experiment, options: TrainingOptions, device):
        self.exp = replace(exp, train=replace(exp.train, precision=options.precision))
        self.options, self.device = options, device
        self.items = exp.train.batch_size
        self.flops = training_flops(macs_of(exp)) * self.items
        self.columns = describe(exp, options, what="train")

    def prepare(self) -> None:
        options, net = self.options, bench_network(self.exp)
        set_attention(net, options.attention)
        if options.checkpoint:
            set_checkpoint(net, True, options.budget)
        self.diffusion = Diffusion(self.exp.diffusion)
        self.inputs = bench_inputs(self.exp, self.device)
        self.trainer = Trainer(
            net,
            self.diffusion,
            self.exp.train,
            self.device,
            compile="auto" if options.compile else False,
        )
        self.report = self.trainer.compiled
        if not options.fused:  # as torch chooses by itself
            for group in self.trainer.optimizer.param_groups:
                group.update(fused=None, foreach=None)

    def call(self) -> None:
        x0, cond = self.inputs
        step = self.trainer.step
        t, eps = sample_times_and_noise(0, step, x0.shape, self.diffusion, self.device)
        self.loss = self.trainer.update(x0, t, eps, **cond).mean()


class Sampling(Contestant):
    "One set of images of ours per call."

    warmup = 1

    def __init__(self, exp: Experiment, options: TrainingOptions, device, nfe: int, guided=False):
        scale = 1.4 if guided else 1.0  # its cost does not depend on the strength
        self.sampling = replace(exp.sampling, nfe=nfe, cfg_scale=scale)
        self.exp, self.options, self.device = exp, options, device
        self.items = exp.train.batch_size
        self.flops = 2 * macs_of(exp) * self.items * nfe * (1 + guided)
        self.columns = describe(exp, options, what="sample", option="guided" if guided else "")
        self.columns["note"] = f"{self.items} images, {nfe} evaluations"

    def prepare(self) -> None:
        self.net = bench_network(self.exp).to(self.device).eval()
        set_attention(self.net, self.options.attention)
        if self.options.compile:
            self.report = compile_blocks(self.net, strict=False)

    def call(self) -> None:
        d = self.exp.data
        self.images, _ = sample(
            self.net,
            Diffusion(self.exp.diffusion),
            self.sampling,
            (d.in_chans, d.img_size, d.img_size),
            self.items,
            num_classes=d.num_classes if self.exp.model.condition == "class" else 0,
            device=self.device,
            autocast=AUTOCAST[self.options.precision],
        )


class Features(Contestant):
    "Features of one set of images per call; from random weights where the file is missing."

    def __init__(self, name: str, n: int, device):
        entry = feature_extractor(name)
        self.name, self.items, self.device = name, n, device
        self.images = torch.zeros(n, entry.channels, entry.size, entry.size, dtype=torch.uint8)
        self.trained = feature_status(name)[0]
        self.columns = {"what": "features", "model": name, "batch": n, "impl": "ours"}
        self.columns["note"] = (
            "" if self.trained else "random weights: the trained ones are missing"
        )

    def prepare(self) -> None:
        net = DigitsCNN() if self.name == "digits_cnn" else CifarResNet(3)
        self.net = net.to(self.device).eval()

    @torch.inference_mode()
    def call(self) -> None:
        if self.trained:
            extract(self.images, self.name, self.device)
        else:
            for batch in self.images.split(500):
                self.net(batch.to(self.device) / 255)[0].float().cpu()


class Feeding(Contestant):
    "One training batch per call from images in memory, with random flips and dropped labels."

    unit = "batches"
    items = 1

    def __init__(self, batch: int, device):
        self.batch, self.device, self.step = batch, device, 0
        self.columns = {"what": "data", "option": "resident", "impl": "ours", "batch": batch}

    def prepare(self) -> None:
        images, labels = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), torch.arange(2000) % 10
        data = Data("zeros", images, labels, images[:1], labels[:1], 10, [], "")
        self.batches = Batches(data, self.batch, 0, True, 0.1, 10, self.device)

    def call(self) -> None:
        self.batches.at(self.step)
        self.step += 1


class FreshProcess(Contestant):
    "From the start of a process to the end of its first update."

    def __init__(self, model: str, exp: Experiment, options: TrainingOptions, device):
        self.arguments = (model, exp.train.batch_size, options, str(device))
        self.warmup = int(options.compile)  # it fills the cache
        name = "compile, filled cache" if options.compile else "without compile"
        self.columns = describe(exp, options, what="start", option=name)

    def prepare(self) -> None:
        self.cache = tempfile.TemporaryDirectory(prefix="uvit-bench-")

    def call(self) -> None:
        names = "TrainingOptions, first_update"
        code = f"from uvit_repro.bench.contestants import {names}; first_update{self.arguments!r}"
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        env.update(TORCHINDUCTOR_CACHE_DIR=self.cache.name, TRITON_CACHE_DIR=self.cache.name)
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        if run.returncode:
            last = (run.stderr or run.stdout).strip().rpartition("\n")[2]
            raise RuntimeError(f"a fresh process did not reach its first update: {last}")


def first_update(model: str, batch: int, options: TrainingOptions, device: str) -> None:
    "What a fresh process does: build everything and make one update."
    contestant = Training(bench_experiment(model, batch), options, pick_device(device))
    contestant.prepare()
    contestant.call()
    contestant.loss.item()  # waits for the device
    os._exit(0)  # its clearing up is not part of the start
