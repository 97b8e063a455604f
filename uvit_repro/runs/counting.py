"""Operations and parameters of an experiment, counted without allocating its network."""

import copy
import functools
import hashlib
import inspect
import itertools
import json
from contextlib import suppress
from dataclasses import asdict, replace

import torch
from torch import nn

from uvit_repro.config import MODELS, Experiment, ParameterError, digest, project_root, resolve_name
from uvit_repro.data.files import source_sum, write_json
from uvit_repro.runs.execution import uncompile


def hollow(
    model: nn.Module,  # on any device; may be compiled
    device="meta",  # of the copy; under a `FakeTensorMode` the CPU too is free
) -> nn.Module:  # the same modules with uninitialised tensors
    "A copy of a network without its values; the weights are not copied on the way."
    model = getattr(model, "_orig_mod", model)

    def empty(t):
        new = torch.empty(t.shape, dtype=t.dtype, device=device)
        return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new

    empties = {id(t): empty(t) for t in itertools.chain(model.parameters(), model.buffers())}
    return uncompile(copy.deepcopy(model, empties))


def model_inputs(
    model: nn.Module,  # has img_size and in_chans, and num_classes or clip_dim and num_clip_token where it is conditional
    batch: int = 1,  # images
    device="meta",  # of the inputs
    **cond,  # y or context, when they are not to be made here; None: leave it out
) -> tuple:  # (x, t, dict of conditions)
    "Inputs of the right shapes for a backbone that is called as model(x, t, y=, context=)."
    x, t = (
        torch.zeros(batch, model.in_chans, model.img_size, model.img_size, device=device),
        torch.zeros(batch, device=device),
    )
    if "y" not in cond and getattr(model, "num_classes", None):
        cond["y"] = torch.zeros(batch, dtype=torch.long, device=device)
    if "context" not in cond and getattr(model, "clip_dim", None):
        cond["context"] = torch.zeros(batch, model.num_clip_token, model.clip_dim, device=device)
    return x, t, {k: v.to(device) for k, v in cond.items() if v is not None}


def flop_counter():
    "A `FlopCounterMode` that knows fused attention on a CPU in every version of torch: two products forward; in the backward pass five, one of which repeats the scores."
    from torch.utils.flop_counter import FlopCounterMode

    ops = torch.ops.aten

    def forward(q, k, v, *a, **kw):
        return 4 * torch.Size(q).numel() * k[-2]

    def backward(g, q, k, v, *a, **kw):
        return 10 * torch.Size(q).numel() * k[-2]

    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops._scaled_dot_product_flash_attention_for_cpu: forward,
            ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def count_macs(
    model: nn.Module,  # any backbone called as model(x, t, y=, context=); it is not changed
    batch: int = 1,  # images in the counted pass
    **cond,  # y or context of `batch` images, when zeros of the model's own shapes will not do
) -> int:  # multiply-accumulates of one forward pass, per image
    "Count the multiply-accumulates of matrix products, convolutions and attention (either path) on a copy without values."
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        like = {k: v if v is None else torch.empty(v.shape, dtype=v.dtype) for k, v in cond.items()}
        net = hollow(model, "cpu").eval()
        x, t, cond = model_inputs(net, batch, "cpu", **like)
        with flop_counter() as counter:
            net(x, t, **cond)
    return counter.get_total_flops() // (2 * batch)


def training_flops(
    macs: int,  # of one forward pass
    recomputed: float = 0.0,  # share of the forward pass that gradient checkpointing does again; 1: all of it
) -> float:  # floating-point operations of one image in training
    "Two per multiply-accumulate in the forward pass, four in the backward pass (each product has two gradients), two for what is recomputed."
    return (6 + 2 * recomputed) * macs


def meta_model(
    exp: Experiment,  # any; the number of classes must be known
) -> nn.Module:  # its network, on the meta device, in training mode
    "An experiment's network without its values, with its gradient checkpointing."
    build, ex = resolve_name(MODELS, exp.model.model), exp.execution
    extra = {
        k: getattr(ex, k)
        for k in ("use_checkpoint", "activation_budget")
        if k in inspect.signature(build).parameters
    }
    with torch.device("meta"):
        return build(exp.model, exp.data, exp.train.p_uncond, **extra).train()


@functools.lru_cache(None)
def _kept_counts() -> tuple:
    "The file of counts that this code and this torch have made, and what it holds."
    path = (
        project_root()
        / "results"
        / "cache"
        / f"counts-{hashlib.sha256(f'{source_sum()} {torch.__version__}'.encode()).hexdigest()[:12]}.json"
    )
    try:
        return path, json.loads(path.read_text())
    except (OSError, ValueError):
        return path, {}


@functools.lru_cache(None)
def _counts(model, data, p_uncond) -> tuple:
    "Parameters and multiply-accumulates: counted once, then read."
    path, known = _kept_counts()
    key = digest(
        [
            asdict(model),
            asdict(replace(data, data_sha256="", dataset="digits")),
            p_uncond,
        ],
        16,
    )
    if key not in known:
        net = meta_model(
            replace(
                Experiment(),
                model=model,
                data=data,
                train=replace(Experiment().train, p_uncond=p_uncond),
            )
        )
        known[key] = (
            sum(p.numel() for p in net.parameters() if p.requires_grad),
            count_macs(net),
        )
        with suppress(OSError):
            write_json(path, known)
    return tuple(known[key])


def macs_of(exp: Experiment) -> int:
    "Multiply-accumulates of one forward pass of an experiment's network, per image; counted once."
    return _counts(exp.model, exp.data, exp.train.p_uncond)[1]


def params_of(exp: Experiment) -> int:
    "Trainable numbers of an experiment's network."
    return _counts(exp.model, exp.data, exp.train.p_uncond)[0]


def evaluations(
    exp: Experiment,  # any
) -> list:  # (what, forward passes of one image)
    "Every forward pass that an experiment makes outside training."
    e, s = exp.evaluation, exp.sampling
    passes = 2 if s.cfg_scale != 1 else 1
    losses = len({*e.loss_steps, *e.curve_steps, exp.train.n_steps})
    return [
        (
            "curve samples",
            len(e.curve_steps) * e.curve_samples * (e.curve_nfe or s.nfe) * passes,
        ),
        ("final samples", e.num_samples * s.nfe * passes),
        ("held-out loss", losses * e.loss_images * e.loss_levels),
    ]


def experiment_flops(exp: Experiment) -> dict:
    "Floating-point operations of an experiment: train, sample (curve and final), loss."
    macs, passes = macs_of(exp), dict(evaluations(exp))
    return {
        "train": exp.train.n_steps * exp.train.batch_size * training_flops(macs),
        "sample": 2 * macs * (passes["curve samples"] + passes["final samples"]),
        "loss": 2 * macs * passes["held-out loss"],
    }


def predict_seconds(
    exp: Experiment,  # any
    flops_per_second: float,  # what one device reaches in training, in the model's own operations
    sampling: float = None,  # what it reaches in sampling; None: the same
) -> dict:  # seconds: train, sample, loss, total
    "How long an experiment takes on one device."
    if not flops_per_second > 0 or not (sampling is None or sampling > 0):
        raise ParameterError(
            f"flops_per_second = {flops_per_second}, sampling = {sampling}: both must be above 0"
        )
    f = experiment_flops(exp)
    secs = {
        "train": f["train"] / flops_per_second,
        "sample": f["sample"] / (sampling or flops_per_second),
        "loss": f["loss"] / (sampling or flops_per_second),
    }
    return dict(secs, total=sum(secs.values()))
