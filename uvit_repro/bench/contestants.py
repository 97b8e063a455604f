"""The operations that a benchmark times: `prepare()` builds one and `call()` runs it once."""

import copy
import functools
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from uvit_repro.config import (
    CONFIGS,
    PROTOCOLS,
    DiffusionConfig,
    Experiment,
    ParameterError,
    SamplingConfig,
)
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs import execution
from uvit_repro.runs.counting import macs_of, training_flops
from uvit_repro.sample import sample
from uvit_repro.train import Trainer, build_model, sample_times_and_noise

S2, L2, H2 = "U-ViT-S/2", "U-ViT-L/2", "U-ViT-H/2"


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
    train = replace(exp.train, batch_size=batch)
    return replace(exp, seed=0, diffusion=DiffusionConfig(process="vp"), train=train)


@functools.lru_cache(maxsize=1)  # drawing the weights of a large network takes long
def initial_network(model: str) -> nn.Module:
    "A network with its initial weights, on the CPU; copy it before use."
    return build_model(bench_experiment(model))


@dataclass(frozen=True)
class Options:
    "How our contestants train and sample; None: as training chooses on the device."

    precision: str = "fp32"  # fp32 | bf16 | fp16
    attention: str | None = None  # one of ATTENTION_PATHS
    compile: bool | None = None  # torch.compile of the blocks
    residual: str = "float32"  # float32 | bfloat16
    checkpoint: bool = False  # training: activations recomputed
    budget: float = 0.0  # with checkpoint: kept activations per block, in (B, L, D) tensors
    nfe: int = 10  # sampling: network evaluations per image


class Contestant:
    "One thing to be timed, by default one of ours."

    what = ""  # its column in bench.csv
    warmup = 2  # untimed calls
    slow = False  # a call takes seconds: fewer repetitions, one call in each
    flops = 0.0  # floating-point operations of one call; 0: not counted
    compiled: execution.CompileReport | None = None  # what compilation did

    def __init__(self, model: str, batch: int, options: Options, device: torch.device):
        exp = bench_experiment(model, batch)
        exp = replace(exp, train=replace(exp.train, precision=options.precision))
        attention = options.attention or execution.attention_choice(exp, device)["path"]
        compiled = options.compile
        if compiled is None:
            compiled = execution.wants_compile("auto", device, exp.train.n_steps)
        self.options = replace(options, attention=attention, compile=compiled)
        self.model, self.batch, self.exp, self.device = model, batch, exp, device
        self.shape = (exp.data.in_chans, exp.data.img_size, exp.data.img_size)
        self.columns = {"what": self.what, "model": model, "batch": batch, "impl": "ours"}
        self.columns.update(precision=options.precision, attention=attention)
        self.columns.update(compile="on" if compiled else "off", option="", note="")

    def prepare(self) -> None:
        "Build the operation that is timed."

    def call(self) -> None:
        "Do it once."
        raise NotImplementedError

    def inputs(self) -> tuple:  # images (B, C, H, W), dict of conditions
        "A batch of random images and, for a class-conditional model, labels."
        x = torch.randn(self.batch, *self.shape, generator=torch.Generator().manual_seed(0))
        y = torch.arange(self.batch, device=self.device) % max(self.exp.data.num_classes, 1)
        return x.to(self.device), {"y": y} if self.exp.model.condition == "class" else {}

    def network(self) -> nn.Module:
        "A fresh network with its initial weights, on the CPU."
        net = copy.deepcopy(initial_network(self.model))
        execution.set_attention(net, self.options.attention)
        execution.set_residual(net, self.options.residual)
        return net


class Training(Contestant):
    "One training update per call."

    what = "train"

    def __init__(self, *args):
        super().__init__(*args)
        self.flops = training_flops(macs_of(self.exp)) * self.batch

    def prepare(self) -> None:
        options, net, diffusion = self.options, self.network(), Diffusion(self.exp.diffusion)
        execution.set_checkpoint(net, options.checkpoint, options.budget)
        compiled = options.compile and "auto"
        self.trainer = Trainer(net, diffusion, self.exp.train, self.device, compile=compiled)
        self.compiled, self.data = self.trainer.compiled, self.inputs()

    def call(self) -> None:
        (x0, cond), trainer = self.data, self.trainer
        t, eps = sample_times_and_noise(0, trainer.step, x0.shape, trainer.diffusion, self.device)
        self.loss = trainer.update(x0, t, eps, **cond).mean()


class Sampling(Contestant):
    "One set of images per call, without guidance."

    what, warmup, slow = "sample", 1, True

    def __init__(self, *args):
        super().__init__(*args)
        self.flops = 2 * macs_of(self.exp) * self.batch * self.options.nfe
        self.columns["note"] = f"{self.batch} images, {self.options.nfe} evaluations"

    def prepare(self) -> None:
        self.net = self.network().to(self.device).eval()
        if self.options.compile:
            self.compiled = execution.compile_blocks(self.net, strict=False)

    def call(self) -> None:
        exp = self.exp
        self.images, _ = sample(
            self.net,
            Diffusion(exp.diffusion),
            SamplingConfig(sampler="dpm_solver_fast", nfe=self.options.nfe),
            self.shape,
            self.batch,
            num_classes=exp.data.num_classes if exp.model.condition == "class" else 0,
            device=self.device,
            autocast=execution.AUTOCAST[self.options.precision],
        )


FIRST_UPDATE = """
import os
from torch import device
from uvit_repro.bench.contestants import Options, Training
contestant = Training({!r}, {!r}, {!r}, {!r})
contestant.prepare()
contestant.call()
contestant.loss.item()  # waits for the device
os._exit(0)  # clearing up is not part of the start
"""


class Start(Contestant):
    "From the start of a process to the end of its first update; compiled code is cached."

    what, warmup, slow = "start", 1, True

    def call(self) -> None:
        code = FIRST_UPDATE.format(self.model, self.batch, self.options, self.device)
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
