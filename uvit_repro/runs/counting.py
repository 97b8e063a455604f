"""Operations and parameters of an experiment, counted without allocating its network."""

import copy
import functools
import inspect
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from uvit_repro.config import MODELS, Experiment, ParameterError, TrainConfig, resolve_name

SIZES = Path(__file__).parent / "golden" / "sizes.json"  # run id of `bare`: counts


def model_inputs(
    model: nn.Module,  # has img_size, in_chans; num_classes, or clip_dim and num_clip_token
    batch: int = 1,  # images
    device="meta",  # of the inputs
    **cond,  # y or context, when zeros of the model's own shapes will not do; None: leave it out
) -> tuple:  # (x, t, dict of conditions)
    "Inputs of the right shapes for a backbone that is called as model(x, t, y=, context=)."
    x = torch.zeros(batch, model.in_chans, model.img_size, model.img_size, device=device)
    t = torch.zeros(batch, device=device)
    if "y" not in cond and getattr(model, "num_classes", None):
        cond["y"] = torch.zeros(batch, dtype=torch.long, device=device)
    if "context" not in cond and getattr(model, "clip_dim", None):
        cond["context"] = torch.zeros(batch, model.num_clip_token, model.clip_dim, device=device)
    return x, t, {k: v.to(device) for k, v in cond.items() if v is not None}


def count_macs(
    model: nn.Module,  # any backbone called as model(x, t, y=, context=); it is not changed
    batch: int = 1,  # images in the counted pass
    training: bool = False,  # add the backward pass, and what gradient checkpointing repeats
    **cond,  # y or context of `batch` images, when zeros will not do
) -> int:  # multiply-accumulates per image
    "Count the multiply-accumulates of matrix products, convolutions and attention."
    net = copy.deepcopy(model).to("meta").train(training)
    x, t, cond = model_inputs(net, batch, **cond)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        out = net(x, t, **cond)
        if training:
            out.sum().backward()
    return counter.get_total_flops() // (2 * batch)


def training_flops(
    macs: int,  # of one forward pass
    recomputed: float = 0.0,  # share of the forward pass that checkpointing repeats
) -> float:  # floating-point operations of one image in training
    "Two per multiply-accumulate forward, four backward, two for what is recomputed."
    return (6 + 2 * recomputed) * macs


class SkipInit(TorchFunctionMode):
    "Leave out the initialisation of values that nobody reads; on the meta device it is slow."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model(
    exp: Experiment,  # the number of classes must be known
) -> nn.Module:  # its network, on the meta device, in training mode
    "An experiment's network without its values, with its gradient checkpointing."
    build = resolve_name(MODELS, exp.model.model)
    options = {"use_checkpoint", "activation_budget"} & set(inspect.signature(build).parameters)
    given = {name: getattr(exp.execution, name) for name in options}
    with torch.device("meta"), SkipInit():
        return build(exp.model, exp.data, exp.train.p_uncond, **given).train()


def bare(exp: Experiment) -> Experiment:
    "Keep only what shapes the network: the same for every data set of these shapes."
    data = replace(exp.data, data_sha256="", dataset="digits")
    return Experiment(model=exp.model, data=data, train=TrainConfig(p_uncond=exp.train.p_uncond))


@functools.cache
def count_network(exp: Experiment) -> tuple:
    "Trainable parameters and multiply-accumulates of a network, built without its values."
    net = meta_model(exp)
    return sum(p.numel() for p in net.parameters() if p.requires_grad), count_macs(net)


@functools.cache
def recorded_sizes() -> dict:
    "Counts of the published networks, so that a report need not build them; a test counts again."
    return json.loads(SIZES.read_text(encoding="utf-8"))


def _size(exp: Experiment) -> tuple:
    "The counts of an experiment's network."
    exp = bare(exp)
    return tuple(recorded_sizes().get(exp.run_id, ())) or count_network(exp)


def macs_of(exp: Experiment) -> int:
    "Multiply-accumulates of one forward pass of an experiment's network, per image."
    return _size(exp)[1]


def params_of(exp: Experiment) -> int:
    "Trainable parameters of an experiment's network."
    return _size(exp)[0]


def least_memory(exp: Experiment) -> int:  # bytes of each process
    "What training needs at least: weights with gradients, Adam's moments and EMA, and activations."
    m, d, t, e = exp.model, exp.data, exp.train, exp.execution
    weights = sum(p.numel() for p in meta_model(exp).parameters())
    tokens = t.batch_size // e.processes * (d.img_size // m.patch_size) ** 2
    kept = 2 if e.use_checkpoint else 16  # bytes of a token's value in a block: half precision
    return 4 * (4 + len(t.ema_rates)) * weights + kept * tokens * m.embed_dim * m.depth


def forward_passes(exp: Experiment) -> dict:  # of one image, by what they are for
    "Every forward pass that an experiment makes outside training."
    e, s = exp.evaluation, exp.sampling
    passes = 2 if s.cfg_scale != 1 else 1
    losses = len({*e.loss_steps, *e.curve_steps, exp.train.n_steps})
    curve = len(e.curve_steps) * e.curve_samples * (e.curve_nfe or s.nfe)
    samples = curve + e.num_samples * s.nfe
    return {"sample": passes * samples, "loss": losses * e.loss_images * e.loss_levels}


def experiment_flops(exp: Experiment) -> dict:
    "Floating-point operations of an experiment: train, sample (curve and final), loss."
    macs, images = macs_of(exp), exp.train.n_steps * exp.train.batch_size
    others = {name: 2 * macs * n for name, n in forward_passes(exp).items()}
    return {"train": images * training_flops(macs), **others}


def predict_seconds(
    exp: Experiment,
    flops_per_second: float,  # of one device, in the model's own operations
) -> dict:  # seconds: train, sample, loss, total
    "How long an experiment takes on one device."
    if not flops_per_second > 0:
        raise ParameterError(f"flops_per_second = {flops_per_second}: must be above 0")
    seconds = {name: flops / flops_per_second for name, flops in experiment_flops(exp).items()}
    return {**seconds, "total": sum(seconds.values())}
