"""One experiment is one frozen object: what is trained, on what, how it is sampled and measured, and under which name it is found again."""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

TABLE2 = {
    "U-ViT-S": {"embed_dim": 512, "depth": 13, "num_heads": 8, "conv": "after"},
    "U-ViT-S (Deep)": {"embed_dim": 512, "depth": 17, "num_heads": 8, "conv": "after"},
    "U-ViT-M": {"embed_dim": 768, "depth": 17, "num_heads": 12, "conv": "after"},
    "U-ViT-L": {"embed_dim": 1024, "depth": 21, "num_heads": 16, "conv": "after"},
    "U-ViT-H": {"embed_dim": 1152, "depth": 29, "num_heads": 16, "conv": "none"},
}
HEADS = {
    v["embed_dim"]: v["num_heads"] for v in TABLE2.values()
}  # heads leave no trace in the weights; the width gives them away


def preset(
    name: str,  # a row of Table 2 with a patch size: `U-ViT-S/2`, `U-ViT-S/2 (Deep)`, `U-ViT-H/4`
) -> dict:  # the keyword arguments of `UViT` that the name fixes
    "Resolve a name of the paper to sizes (Table 2). Raises `ValueError` for an unknown name."
    base, slash, rest = name.partition("/")
    patch, _, deep = rest.partition(" ")
    row = f"{base} {deep}" if deep else base
    if row not in TABLE2 or not patch.isdigit() or int(patch) < 1:
        raise ValueError(
            f"unknown preset {name!r}. Known: {', '.join(f'{k}/P' if '(' not in k else k.replace(' (', '/P (') for k in TABLE2)} with P the patch size, as in U-ViT-S/2"
        )
    return dict(patch_size=int(patch), **TABLE2[row])


def F(
    default,  # value when nothing is said; it is left out of the identity of a run
    doc: str,  # meaning and unit
    choices: tuple = None,  # allowed values
    low: float = None,  # smallest allowed value (of each element)
):  # a dataclass field
    "A documented, checked field."
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low})


class ParameterError(ValueError):
    "An impossible or unknown parameter. Shown in a notebook, and by papermill, as one line."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


def coerce(
    name: str,  # the field, for the message
    value,  # what was given, perhaps a string from the command line
    kind,  # int, float, bool, str, or tuple[int, ...] / tuple[float, ...]
):  # the value in the field's type
    "Bring a value to its field's type, or raise `ParameterError` naming both."
    elem = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
    if elem:
        if isinstance(value, str):
            value = [v for v in value.strip("()[] ").split(",") if v.strip()]
        if isinstance(value, (int, float)):
            value = [value]
        try:
            return tuple(coerce(name, elem(v) if isinstance(v, str) else v, elem) for v in value)
        except (TypeError, ValueError):
            raise ParameterError(f"{name} = {value!r}: expected numbers, as in 0.9,0.99") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ParameterError(f"{name} = {value!r} ({type(value).__name__}): expected {kind.__name__}")


class Section:
    "Base of the configuration dataclasses: every field is brought to its type and checked against its bounds."

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            if not f.metadata:
                continue
            v = coerce(f.name, getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, v)
            allowed, low = f.metadata["choices"], f.metadata["low"]
            if allowed and v not in allowed:
                raise ParameterError(
                    f"{f.name} = {v!r}: allowed are {', '.join(map(repr, allowed))}"
                )
            for e in v if isinstance(v, tuple) else (v,):
                if low is not None and not (math.isfinite(e) and e >= low):
                    raise ParameterError(
                        f"{f.name} = {v!r}: must be a finite number of at least {low}"
                    )


SKIPS = ("concat", "add", "add_linear", "linear_add", "none", "add_scaled")
TIMES = ("token", "adaln", "adaln_literal", "adaln_zero")
CONVS = ("after", "before", "none")


@dataclass(frozen=True)
class ModelConfig(Section):
    "The backbone (Section 3, Figure 2). Image size, channels and classes come from the data."

    model: str = F("UViT", "the backbone, a key of MODELS")
    patch_size: int = F(2, "pixels along the side of a patch", low=1)
    embed_dim: int = F(512, "width D of a token", low=1)
    depth: int = F(13, "layers as the paper counts them, odd", low=1)
    num_heads: int = F(8, "attention heads", low=1)
    mlp_ratio: float = F(4.0, "hidden width of the MLP over D", low=0.01)
    qkv_bias: bool = F(False, "bias on the qkv projection")
    mlp_time_embed: bool = F(
        False, "two-layer MLP on the time embedding (off in every released model)"
    )
    condition: str = F("none", "what the model is told", ("none", "class", "text"))
    skip: str = F("concat", "how the long skip is merged (Figure 2a)", SKIPS)
    time: str = F("token", "how the time enters (Figure 2b)", TIMES)
    conv: str = F("after", "3x3 convolution relative to the last linear layer (Figure 2c)", CONVS)
    patch_embed: str = F("linear", "patch embedding (Figure 2d)", ("linear", "conv"))
    pos_embed: str = F("learned", "position embedding (Figure 2e)", ("learned", "sincos2d", "none"))
    pos_std: float = F(0.02, "standard deviation of the initial position embedding", low=0)
    conv_init: str = F("default", "initial final convolution", ("default", "identity"))
    options: str = F(
        "", "what else the backbone offers: names and values, joined by commas (chapters 10 to 12)"
    )


@dataclass(frozen=True)
class DataConfig(Section):
    "The images (Section 5.1)."

    dataset: str = F("cifar10", "a key of DATASETS, folder:PATH or npz:PATH")
    img_size: int = F(32, "side of the network's input, in pixels or latent pixels", low=1)
    in_chans: int = F(3, "channels of the network's input", low=1)
    num_classes: int = F(0, "labels are 0..num_classes-1; 0: found in the data, or none", low=0)
    holdout: int = F(0, "images kept from training, for sets without a test split", low=0)
    flip: bool = F(True, "random horizontal flip")
    latent_scale: float = F(1.0, "factor on autoencoder latents", low=0)
    text_tokens: int = F(77, "tokens of an encoded caption, for condition text", low=1)
    text_dim: int = F(768, "width of each of them", low=1)
    data_sha256: str = F("", "sum of the content; found when the data are opened")


@dataclass(frozen=True)
class DiffusionConfig(Section):
    "The process and what the network predicts (Section 2)."

    process: str = F(
        "vp",
        "vp: continuous VP-SDE; sd: Stable Diffusion's 1000 betas; linear: ADM's 1000 betas; cosine; edm",
        ("vp", "sd", "linear", "cosine", "edm"),
    )
    prediction: str = F(
        "noise", "what the network's output stands for", ("noise", "x0", "v", "edm")
    )
    beta_min: float = F(0.1, "beta(0) of the VP-SDE", low=0)
    beta_max: float = F(20.0, "beta(1) of the VP-SDE", low=0)
    variance: str = F(
        "fixed",
        "learned: the network also predicts the variance of each reverse step (Nichol and Dhariwal 2021; DiffiT)",
        ("fixed", "learned"),
    )
    loss: str = F("mse", "norm of the error; l1: GenViT's", ("mse", "l1"))
    p_mean: float = F(-1.2, "EDM: mean of log sigma in training")
    p_std: float = F(1.2, "EDM: its standard deviation", low=0)
    sigma_data: float = F(0.5, "EDM: standard deviation of the data", low=0)


@dataclass(frozen=True)
class TrainConfig(Section):
    "The optimiser's side (Section 5.1, Appendix A, Table 5)."

    n_steps: int = F(500_000, "optimiser updates", low=1)
    batch_size: int = F(128, "images per update, over all processes", low=1)
    lr: float = F(2e-4, "AdamW learning rate after the warm-up", low=0)
    betas: tuple[float, ...] = F((0.99, 0.999), "AdamW betas", low=0)
    weight_decay: float = F(0.03, "AdamW weight decay, on all parameters", low=0)
    warmup_steps: int = F(2500, "linear warm-up from 0", low=0)
    lr_schedule: str = F("constant", "after the warm-up", ("constant", "cosine"))
    lr_final: float = F(0.0, "cosine: rate at the end over lr", low=0)
    ema_rates: tuple[float, ...] = F(
        (0.9999,), "moving averages of the weights; the first is the one reported", low=0
    )
    ema_ramp: bool = F(False, "rate at step s is at most (1+s)/(10+s)")
    ema_before: bool = F(
        False, "average the weights before the update instead of after it (GenViT)"
    )
    p_uncond: float = F(0.0, "labels replaced by the null class, for guidance", low=0)
    precision: str = F("fp16", "autocast type", ("fp32", "bf16", "fp16"))
    grad_clip: float = F(0.0, "largest gradient norm; 0: no clipping", low=0)


SAMPLERS = (
    "euler_maruyama",
    "dpm_solver_fast",
    "dpm_solver_pp_fast",
    "ddim",
    "dpm_solver_pp_2m",
    "heun",
    "ancestral",
)


@dataclass(frozen=True)
class SamplingConfig(Section):
    "From noise to images (Appendix A)."

    sampler: str = F("dpm_solver_fast", "the solver", SAMPLERS)
    nfe: int = F(50, "network evaluations per image; a guided evaluation counts once", low=1)
    cfg_scale: float = F(
        1.0, "guidance w in uncond + w (cond - uncond); the released configs' s is w - 1", low=0
    )
    cfg_channels: int = F(
        0, "guidance acts on the first channels only (DiffiT: 3); 0: on all", low=0
    )
    cfg_schedule: str = F(
        "constant", "guidance over time; power_cosine: DiffiT's", ("constant", "power_cosine")
    )
    cfg_power: float = F(4.0, "exponent of power_cosine", low=0)
    clip: bool = F(False, "clip the predicted clean image to [-1, 1]")
    weights: str = F("ema", "ema: the first rate; ema_RATE; raw")
    sample_seed: int = F(0, "noise of sample i is a function of (sample_seed, i)", low=0)
    labels: str = F(
        "uniform",
        "class of sample i: i modulo the classes, or drawn as often as in the training images",
        ("uniform", "frequency"),
    )
    decoder: str = F(
        "", "autoencoder weights that turn latents into images", ("", "original", "ema")
    )


@dataclass(frozen=True)
class EvalConfig(Section):
    "What is measured, and when."

    features: str = F(
        "inception",
        "feature network of the distances",
        ("inception", "resnet20_cifar10", "resnet56_cifar10", "digits_cnn", "none"),
    )
    reference_sha256: str = F(
        "",
        "sum of the reference statistics in place of the training images; found when the file is opened",
    )
    num_samples: int = F(50_000, "images sampled at the end of training", low=1)
    curve_steps: tuple[int, ...] = F(
        (), "training steps at which weights are kept and measured", low=1
    )
    curve_samples: int = F(10_000, "images sampled at each of them", low=1)
    curve_sampler: str = F("", "their solver; empty: the same", ("",) + SAMPLERS)
    curve_nfe: int = F(0, "their evaluations; 0: the same", low=0)
    loss_steps: tuple[int, ...] = F(
        (), "further steps at which only the held-out loss is measured", low=1
    )
    loss_images: int = F(2000, "held-out images of the denoising loss", low=1)
    loss_levels: int = F(20, "noise levels of the denoising loss", low=1)


@dataclass(frozen=True)
class ExecConfig(Section):
    "How this machine does it. Nothing here is part of what a run is called."

    device: str = F("auto", "auto, cpu, cuda, cuda:1")
    threads: int = F(0, "CPU threads; 0: as found", low=0)
    workers: int = F(0, "processes that read images of streamed sets", low=0)
    processes: int = F(
        1, "processes that train and sample together, one per GPU, started with torchrun", low=1
    )
    compile: str = F(
        "auto",
        "torch.compile of the blocks; auto: on a GPU, for runs of 1000 steps or more",
        ("auto", "on", "off"),
    )
    cuda_graph: bool = F(False, "replay the training pass as a CUDA graph")
    attention: str = F("auto", "auto: the faster one, measured", ("auto", "sdpa", "math"))
    keep_checkpoint: bool = F(
        False,
        "keep the final state, from which an equal run of more steps at a constant rate continues",
    )
    use_checkpoint: bool = F(False, "recompute activations in the backward pass to save memory")
    activation_budget: float = F(
        0.0,
        "with use_checkpoint: what each block keeps all the same, in tensors of its width; 0: nothing, as released",
        low=0,
    )
    checkpoint_seconds: float = F(60.0, "a killed run loses at most this much", low=0)
    log_every: int = F(50, "steps between reports", low=1)
    sample_batch: int = F(500, "images sampled at once", low=1)
    data_root: str = F("", "folder of the data sets; empty: UVIT_DATA or data/ in the project")
    reference: str = F(
        "",
        "file of reference statistics (mu, sigma) that takes the place of the training images in FID",
    )

    def __post_init__(self):
        if self.attention == "matrix":  # its name in older records
            object.__setattr__(self, "attention", "math")
        if isinstance(self.compile, bool):
            object.__setattr__(
                self, "compile", "on" if self.compile else "off"
            )  # True and False are clear enough, and older records have them
        super().__post_init__()


MODELS = {
    n: f"uvit_repro.{where}"
    for n, where in {
        "UViT": "uvit:from_config",
        "UNet-latent": "unet:latent_from_config",
        "ADM": "unet:adm_from_config",
        "GenViT": "genvit:from_config",
        "IU-ViT": "ascend:iuvit_from_config",
        "ASCEND": "ascend:from_config",
        "DiffiT-latent": "diffit:from_config",
        "DiffiT-image": "diffit:image_from_config",
    }.items()
}  # functions of (model, data, p_uncond, use_checkpoint, activation_budget)
LOADERS = {
    "data.images": "digits cifar10 folder npz",
    "data.imagesets": "celeba64 imagenet64",
    "latents": "imagenet256 imagenet512 latents digits_latents",
    "text": "mscoco256 shapes",
}
DATASETS = {
    n: f"uvit_repro.{module}:load_{n}" for module, names in LOADERS.items() for n in names.split()
}  # functions of (data section, folder of the data sets)


def resolve_name(
    registry: dict,  # MODELS or DATASETS
    key: str,  # one of its keys
):  # the object behind the name
    "Import what a registry names. Raises `ParameterError` with the known keys."
    if key not in registry:
        raise ParameterError(f"unknown {key!r}: known are {', '.join(registry)}")
    module, _, attr = registry[key].partition(":")
    return getattr(importlib.import_module(module), attr)


def read_options(
    text: str,  # NAME=VALUE,NAME=VALUE, or empty
    **known,  # name -> its default; a tuple: the allowed values, the first is the default
) -> dict:  # name -> value, of the type of the default
    "The choices of a backbone. Raises `ParameterError` for an unknown name or value, with what is known."
    out = {k: v[0] if isinstance(v, tuple) else v for k, v in known.items()}
    for part in filter(None, (p.strip() for p in text.split(","))):
        k, eq, v = (x.strip() for x in part.partition("="))
        if not eq or k not in known:
            raise ParameterError(
                f"options = {text!r}: {part!r} is not one of "
                + (
                    ", ".join(
                        f"{n}={' | '.join(map(str, d)) if isinstance(d, tuple) else d}"
                        for n, d in known.items()
                    )
                    or "none"
                )
            )
        kind = type(out[k])
        try:
            v = (
                {"true": True, "false": False, "1": True, "0": False}[v.lower()]
                if kind is bool
                else kind(v)
            )
        except (KeyError, ValueError):
            raise ParameterError(f"options = {text!r}: {k} takes a {kind.__name__}") from None
        if isinstance(known[k], tuple) and v not in known[k]:
            raise ParameterError(
                f"options = {text!r}: {k} is one of {', '.join(map(str, known[k]))}"
            )
        out[k] = v
    return out


def check_geometry(img_size, patch_size, embed_dim, depth, num_heads):
    "Sizes that fit together, or `ParameterError` with what would (before any tensor exists)."
    for n, v in {
        "img_size": img_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }.items():
        if isinstance(v, bool) or not isinstance(v, int) or v < 1:
            raise ParameterError(f"{n} = {v!r}: must be a whole number of at least 1")
    divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
    if img_size % patch_size:
        raise ParameterError(
            f"patch_size = {patch_size} does not divide img_size = {img_size}: try one of {divisors(img_size)}"
        )
    if depth % 2 == 0:
        raise ParameterError(
            f"depth = {depth} is even: layers are paired around a middle one; try {depth - 1} or {depth + 1}"
        )
    if embed_dim % num_heads:
        raise ParameterError(
            f"num_heads = {num_heads} does not divide embed_dim = {embed_dim}: try one of {[d for d in divisors(embed_dim) if d <= 32]}"
        )
    if embed_dim % 2:
        raise ParameterError(
            f"embed_dim = {embed_dim} is odd: the time embedding is half cosines, half sines; try {embed_dim + 1}"
        )


def check_experiment(e):
    "Fields of different sections that contradict each other raise `ParameterError`."
    m, d, p, t, s = e.model, e.data, e.diffusion, e.train, e.sampling
    kind = d.dataset.partition(":")[0]
    if m.model not in MODELS:
        raise ParameterError(f"model = {m.model!r}: allowed are {', '.join(map(repr, MODELS))}")
    if kind in PATHS and not d.dataset.partition(":")[2]:
        raise ParameterError(f"dataset = {d.dataset!r}: a path must follow, as in {kind}:PATH")
    if kind not in DATASET_DEFAULTS:
        raise ParameterError(
            f"dataset = {d.dataset!r}: allowed are {', '.join(DATASET_DEFAULTS)} ({', '.join(PATHS)} as {PATHS[0]}:PATH)"
        )
    if m.model == "UViT":
        check_geometry(
            d.img_size, m.patch_size, m.embed_dim, m.depth, m.num_heads
        )  # the other backbones say themselves what fits
    if m.model == "UViT" and m.options:
        raise ParameterError(
            f"options = {m.options!r}: U-ViT has none; its choices are skip, time, conv, patch_embed, pos_embed"
        )
    if (p.process == "edm") != (p.prediction == "edm"):
        raise ParameterError(
            f"process = {p.process!r} with prediction = {p.prediction!r}: edm goes with edm"
        )
    if p.variance == "learned" and p.process not in ("sd", "linear"):
        raise ParameterError(
            "variance = 'learned' needs the 1000 steps of process = 'linear' or 'sd'"
        )
    if s.cfg_channels > d.in_chans:
        raise ParameterError(
            f"cfg_channels = {s.cfg_channels}: images have {d.in_chans} channels; use 0 for all"
        )
    if s.cfg_schedule != "constant" and p.process == "edm":
        raise ParameterError(
            "cfg_schedule = 'power_cosine': edm has no times from 0 to 1000; use constant"
        )
    if p.beta_max <= p.beta_min:
        raise ParameterError(f"beta_max = {p.beta_max} must exceed beta_min = {p.beta_min}")
    if len(t.betas) != 2 or max(t.betas) >= 1:
        raise ParameterError(f"betas = {t.betas}: two numbers in [0, 1)")
    if not t.ema_rates or max(t.ema_rates) >= 1:
        raise ParameterError(f"ema_rates = {t.ema_rates}: at least one number in [0, 1)")
    if t.batch_size % e.execution.processes:
        raise ParameterError(
            f"batch_size = {t.batch_size} on processes = {e.execution.processes}: each takes an equal part, so the number of processes must divide the batch"
        )
    if t.p_uncond >= 1:
        raise ParameterError(f"p_uncond = {t.p_uncond}: a probability below 1")
    if t.p_uncond and m.condition == "none":
        raise ParameterError(
            f"p_uncond = {t.p_uncond} with condition = 'none': there is no label to drop; try condition = 'class' or p_uncond = 0"
        )
    if s.cfg_scale != 1 and not t.p_uncond:
        raise ParameterError(
            f"cfg_scale = {s.cfg_scale} needs a model trained with p_uncond > 0; try cfg_scale = 1"
        )
    known = ("ema", "raw") + tuple(f"ema_{r}" for r in t.ema_rates)
    if s.weights not in known:
        raise ParameterError(f"weights = {s.weights!r}: this run keeps {', '.join(known)}")


SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "diffusion": DiffusionConfig,
    "train": TrainConfig,
    "sampling": SamplingConfig,
    "evaluation": EvalConfig,
    "execution": ExecConfig,
}
IDENTITY_SECTIONS = (
    "model",
    "data",
    "diffusion",
    "train",
)  # with the seed: what the identity of a run is made of


@dataclass(frozen=True)
class Experiment:
    "Everything that is needed to repeat a number."

    protocol: str = "paper"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvalConfig = EvalConfig()
    execution: ExecConfig = ExecConfig()
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "seed", coerce("seed", self.seed, int))
        if not 0 <= self.seed < 2**31:
            raise ParameterError(f"seed = {self.seed}: allowed are 0 .. 2**31 - 1")
        check_experiment(self)

    def to_dict(self):
        return dataclasses.asdict(self)

    @property
    def run_id(self):
        return run_id(self)


PARAMETERS = {
    f.name: (section, f) for section, cls in SECTIONS.items() for f in fields(cls)
}  # flat names, unique
assert len(PARAMETERS) == sum(len(fields(c)) for c in SECTIONS.values()), (
    "two sections share a field name"
)


def with_overrides(
    exp: Experiment,  # where to start
    **overrides,  # flat field names, and `seed`; None means: keep
) -> Experiment:  # a new experiment
    "Change fields by their flat names. Raises `ParameterError` for an unknown one, with the closest known names."
    import difflib

    parts = {}
    for k, v in overrides.items():
        if k != "seed" and k not in PARAMETERS:
            close = difflib.get_close_matches(k, list(PARAMETERS) + ["seed", "protocol"], n=3)
            raise ParameterError(
                f"unknown parameter {k!r}"
                + (
                    f": did you mean {', '.join(close)}?"
                    if close
                    else f". Known: {', '.join(PARAMETERS)}, seed, protocol"
                )
            )
        if v is not None and k != "seed":
            parts.setdefault(PARAMETERS[k][0], {})[k] = v
    seed = overrides.get("seed")
    return replace(
        exp,
        **{s: replace(getattr(exp, s), **kw) for s, kw in parts.items()},
        **({} if seed is None else {"seed": seed}),
    )


DATASET_DEFAULTS = {
    "digits": {
        "img_size": 8,
        "in_chans": 1,
        "num_classes": 10,
        "holdout": 297,
        "flip": False,
        "features": "digits_cnn",
    },
    "cifar10": {
        "img_size": 32,
        "in_chans": 3,
        "num_classes": 10,
        "holdout": 0,
        "flip": True,
        "features": "resnet20_cifar10",
    },
    "celeba64": {
        "img_size": 64,
        "in_chans": 3,
        "num_classes": 0,
        "holdout": 0,
        "flip": True,
        "features": "inception",
    },
    "imagenet64": {
        "img_size": 64,
        "in_chans": 3,
        "num_classes": 1000,
        "holdout": 0,
        "flip": True,
        "features": "inception",
    },
    "imagenet256": {
        "img_size": 32,
        "in_chans": 4,
        "num_classes": 1000,
        "holdout": 0,
        "flip": True,
        "features": "inception",
        "latent_scale": 0.18215,
    },
    "imagenet512": {
        "img_size": 64,
        "in_chans": 4,
        "num_classes": 1000,
        "holdout": 0,
        "flip": True,
        "features": "inception",
        "latent_scale": 0.18215,
    },
    "mscoco256": {
        "img_size": 32,
        "in_chans": 4,
        "num_classes": 0,
        "holdout": 0,
        "flip": False,
        "features": "inception",
        "latent_scale": 0.23010,
    },
    "digits_latents": {
        "img_size": 8,
        "in_chans": 4,
        "num_classes": 10,
        "holdout": 297,
        "flip": False,
        "features": "digits_cnn",
        "latent_scale": 0.74,
    },
    "shapes": {
        "img_size": 16,
        "in_chans": 3,
        "num_classes": 0,
        "holdout": 0,
        "flip": False,
        "features": "none",
        "text_tokens": 8,
        "text_dim": 96,
    },
    "latents": {
        "img_size": 32,
        "in_chans": 4,
        "num_classes": 0,
        "holdout": 0,
        "flip": True,
        "features": "inception",
        "latent_scale": 0.18215,
    },
    "folder": {
        "img_size": 32,
        "in_chans": 3,
        "num_classes": 0,
        "holdout": 0,
        "flip": True,
        "features": "inception",
    },
    "npz": {
        "img_size": 32,
        "in_chans": 3,
        "num_classes": 0,
        "holdout": 0,
        "flip": True,
        "features": "inception",
    },
}
PATHS = ("folder", "npz", "latents")  # a path follows: folder:PATH
CONTENT = {  # sums of the sets whose content is known beforehand
    "digits": "2416f53c252145aee6ed650df0f5dddf38f6fd593dcb563e598b84e376e6a1bf",
    "cifar10": "60abcb233472de85d15a903122252b72e71ac98516de8b10f55ce18298abd4c1",
    "shapes": "b7bfd66de1fab5557c6965f95c7c2f3d8fe9528f252cc563da1c84977541baeb",
    "digits_latents": "734ed6fed7123b2db05110e8c23b2d7f5e27cb8adb06cae0b001a9e904976b0c",  # the digits and the encoder in the package
}


def released(
    dataset,
    name,
    n_steps,
    batch_size,
    *,
    lr=2e-4,
    betas=(0.99, 0.99),
    warmup_steps=5000,
    process="vp",
    p_uncond=0.0,
    sampler="dpm_solver_fast",
    nfe=50,
    cfg_scale=1.0,
    decoder="",
    condition="none",
    num_samples=50_000,
    curve_nfe=0,
    use_checkpoint=False,
    labels="uniform",
):
    "One released configuration as an `Experiment`; what is not said is common to all ten."
    facts = {k: v for k, v in DATASET_DEFAULTS[dataset].items() if k != "features"}
    return Experiment(
        "paper",
        ModelConfig(condition=condition, **preset(name)),
        DataConfig(dataset=dataset, **facts),
        DiffusionConfig(process=process),
        TrainConfig(
            n_steps=n_steps,
            batch_size=batch_size,
            lr=lr,
            betas=betas,
            warmup_steps=warmup_steps,
            p_uncond=p_uncond,
        ),
        SamplingConfig(
            sampler=sampler, nfe=nfe, cfg_scale=cfg_scale, decoder=decoder, labels=labels
        ),
        EvalConfig(
            num_samples=num_samples,
            curve_steps=tuple(range(50_000, n_steps, 50_000)),
            curve_sampler="dpm_solver_fast" if sampler == "euler_maruyama" else "",
            curve_nfe=curve_nfe,
        ),
        ExecConfig(use_checkpoint=use_checkpoint),
        seed=1234,
    )


_em = {"sampler": "euler_maruyama", "nfe": 1000, "curve_nfe": 50}
_latent = {"condition": "class", "use_checkpoint": True, "decoder": "original", "p_uncond": 0.15}
_huge = {
    "condition": "class",
    "use_checkpoint": True,
    "decoder": "ema",
    "p_uncond": 0.10,
    "process": "sd",
    "sampler": "dpm_solver_pp_fast",
}
_text = {
    "condition": "text",
    "decoder": "original",
    "p_uncond": 0.10,
    "process": "sd",
    "sampler": "dpm_solver_pp_fast",
    "betas": (0.9, 0.9),
    "cfg_scale": 2.0,
    "num_samples": 30_000,
}
CONFIGS = {
    "CIFAR10 U-ViT-S/2": released(
        "cifar10", "U-ViT-S/2", 500_000, 128, betas=(0.99, 0.999), warmup_steps=2500, **_em
    ),
    "CelebA 64x64 U-ViT-S/4": released("celeba64", "U-ViT-S/4", 500_000, 128, **_em),
    "ImageNet 64x64 U-ViT-M/4": released(
        "imagenet64",
        "U-ViT-M/4",
        300_000,
        1024,
        lr=3e-4,
        condition="class",
        use_checkpoint=True,
        labels="frequency",
    ),
    "ImageNet 64x64 U-ViT-L/4": released(
        "imagenet64",
        "U-ViT-L/4",
        300_000,
        1024,
        lr=3e-4,
        condition="class",
        use_checkpoint=True,
        labels="frequency",
    ),
    "ImageNet 256x256 U-ViT-L/2": released(
        "imagenet256", "U-ViT-L/2", 300_000, 1024, cfg_scale=1.4, **_latent
    ),
    "ImageNet 256x256 U-ViT-H/2": released(
        "imagenet256", "U-ViT-H/2", 500_000, 1024, cfg_scale=1.4, **_huge
    ),
    "ImageNet 512x512 U-ViT-L/4": released(
        "imagenet512", "U-ViT-L/4", 500_000, 1024, cfg_scale=1.7, **_latent
    ),
    "ImageNet 512x512 U-ViT-H/4": released(
        "imagenet512", "U-ViT-H/4", 500_000, 1024, cfg_scale=1.7, **_huge
    ),
    "MS-COCO 256x256 U-ViT-S/2": released("mscoco256", "U-ViT-S/2", 1_000_000, 256, **_text),
    "MS-COCO 256x256 U-ViT-S/2 (Deep)": released(
        "mscoco256", "U-ViT-S/2 (Deep)", 1_000_000, 256, **_text
    ),
}

_digits = DataConfig(
    dataset="digits", **{k: v for k, v in DATASET_DEFAULTS["digits"].items() if k != "features"}
)
_cifar = CONFIGS["CIFAR10 U-ViT-S/2"]
LAPTOP = Experiment(
    "laptop",
    ModelConfig(
        embed_dim=64, depth=7, num_heads=4, condition="class", pos_std=0.5, conv_init="identity"
    ),
    _digits,
    DiffusionConfig(process="cosine"),
    TrainConfig(
        n_steps=4000,
        batch_size=64,
        lr=3e-3,
        betas=(0.9, 0.99),
        warmup_steps=100,
        lr_schedule="cosine",
        lr_final=0.02,
        ema_rates=(0.999,),
        ema_ramp=True,
        p_uncond=0.1,
        precision="bf16",
    ),
    SamplingConfig(sampler="dpm_solver_pp_2m", nfe=20, cfg_scale=1.3, clip=True),
    EvalConfig(
        features="digits_cnn",
        num_samples=1000,
        curve_steps=(1000, 2000, 3000),
        curve_samples=500,
        loss_images=297,
    ),
    ExecConfig(checkpoint_seconds=20.0),
)
SMOKE = replace(
    LAPTOP,
    protocol="smoke",
    model=replace(LAPTOP.model, embed_dim=32, depth=3, num_heads=2),
    train=replace(LAPTOP.train, n_steps=20, batch_size=16, warmup_steps=4),
    sampling=replace(LAPTOP.sampling, nfe=6),
    evaluation=replace(
        LAPTOP.evaluation,
        num_samples=80,
        curve_steps=(10,),
        curve_samples=80,
        loss_images=32,
        loss_levels=4,
    ),
)
GPU = replace(
    _cifar,
    protocol="gpu",
    seed=0,
    train=replace(
        _cifar.train, n_steps=10_000, warmup_steps=500, ema_rates=(0.999, 0.995), precision="bf16"
    ),
    sampling=replace(_cifar.sampling, sampler="dpm_solver_fast", nfe=50),
    evaluation=EvalConfig(
        features="resnet20_cifar10",
        num_samples=10_000,
        curve_steps=(5000,),
        curve_samples=5000,
        loss_steps=(2500, 7500),
    ),
    execution=ExecConfig(keep_checkpoint=True),
)
CPU = replace(
    _cifar,
    protocol="cpu",
    seed=0,
    model=replace(
        _cifar.model,
        patch_size=4,
        embed_dim=128,
        depth=9,
        num_heads=4,
        pos_std=0.5,
        conv_init="identity",
    ),
    train=replace(
        _cifar.train,
        n_steps=3000,
        batch_size=64,
        lr=1e-3,
        warmup_steps=400,
        ema_rates=(0.995, 0.999),
        precision="bf16",
    ),
    sampling=replace(_cifar.sampling, sampler="dpm_solver_pp_2m", nfe=25, clip=True),
    evaluation=EvalConfig(
        features="resnet20_cifar10",
        num_samples=500,
        loss_steps=(1000, 2000),
        loss_images=1000,
        loss_levels=20,
    ),
    execution=ExecConfig(threads=1, attention="math", keep_checkpoint=True),
)
PROTOCOLS = {"smoke": SMOKE, "laptop": LAPTOP, "cpu": CPU, "gpu": GPU, "paper": _cifar}

RECIPES = {  # (protocol, data set): fields that differ from the protocol's
    ("smoke", "shapes"): {
        "condition": "text",
        "patch_size": 4,
        "prediction": "x0",
        "cfg_scale": 2.0,
    },
    ("smoke", "digits_latents"): {"clip": False},  # a latent is not an image in [-1, 1]
    ("laptop", "digits_latents"): {
        "clip": False,
        "n_steps": 3000,
        "curve_steps": (1000, 2000),
        "cfg_scale": 1.5,
    },
    ("gpu", "digits_latents"): {"condition": "class", "p_uncond": 0.1},
    ("laptop", "shapes"): {
        "condition": "text",
        "patch_size": 4,
        "prediction": "x0",
        "n_steps": 1800,
        "cfg_scale": 2.0,
        "curve_steps": (300, 600, 1200),
        "curve_samples": 200,
        "loss_images": 500,
    },
    ("gpu", "shapes"): {
        "condition": "text",
        "patch_size": 4,
        "prediction": "x0",
        "p_uncond": 0.1,
        "cfg_scale": 2.0,
    },
}


def project_root() -> Path:  # the folder of this project, where `settings.ini` and `results/` are
    "The project's folder: `UVIT_REPRO_ROOT`, else upwards from here, else the checkout this package runs from, else here."
    if os.environ.get("UVIT_REPRO_ROOT"):
        return Path(os.environ["UVIT_REPRO_ROOT"]).resolve()
    here = Path.cwd().resolve()
    ours = lambda p: (
        (p / "settings.ini").is_file()
        and "lib_name = uvit_repro" in (p / "settings.ini").read_text()
    )
    for p in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if ours(p):
            return p
    return here


def data_root(
    given: str = "",  # `data_root` of the experiment
) -> Path:  # where data sets are looked for
    "The folder of the data sets: as given, else `UVIT_DATA`, else `data/` in the project."
    return Path(given or os.environ.get("UVIT_DATA") or project_root() / "data").expanduser()


def default_protocol() -> str:
    "What this machine can do (design: `smoke` in tests, `gpu` with CUDA and CIFAR-10, else `laptop`)."
    if os.environ.get("IN_TEST"):
        return "smoke"
    root = data_root()
    if not any(
        (root / p).exists()
        for p in ("cifar-10-batches-py", "cifar10/train.npz", "cifar10/cifar-10-batches-py")
    ):
        return "laptop"
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def experiment(
    protocol: str = None,  # smoke | laptop | cpu | gpu | paper; None: what the machine can do
    dataset: str = None,  # None: the protocol's
    preset_name: str = None,  # a row of Table 2, as in U-ViT-S/2; None: the protocol's
    **overrides,  # any field by its flat name; None keeps the protocol's value
) -> Experiment:  # resolved and checked
    "The experiment that a chapter's parameters ask for."
    protocol = protocol or default_protocol()
    if protocol not in PROTOCOLS:
        raise ParameterError(f"protocol = {protocol!r}: allowed are {', '.join(PROTOCOLS)}")
    base, kind = PROTOCOLS[protocol], (dataset or "").partition(":")[0]
    if dataset and protocol == "paper" and kind in DATASET_DEFAULTS:
        options = {n: c for n, c in CONFIGS.items() if c.data.dataset == dataset}
        base = next(
            (c for n, c in options.items() if preset_name and n.endswith(f" {preset_name}")),
            next(iter(options.values()), base),
        )
    if dataset and base.data.dataset != dataset and kind in DATASET_DEFAULTS:
        facts = dict(DATASET_DEFAULTS[kind])
        features = facts.pop("features")
        base = replace(
            base,
            data=DataConfig(dataset=dataset, **facts),
            evaluation=replace(base.evaluation, features=features),
        )
        base = with_overrides(base, **RECIPES.get((protocol, kind), {}))
    sizes = preset(preset_name) if preset_name else {}
    exp = with_overrides(base, **{"dataset": dataset, **sizes, **overrides})
    within = lambda steps: tuple(
        s for s in steps if s < exp.train.n_steps
    )  # a shorter run keeps fewer points
    return replace(
        exp,
        evaluation=replace(
            exp.evaluation,
            curve_steps=within(exp.evaluation.curve_steps),
            loss_steps=within(exp.evaluation.loss_steps),
        ),
    )


def content_name(
    data: DataConfig,  # as opened
) -> tuple[str, str]:  # (short name, content)
    "What the data are called and what they are, whatever path they were read from."
    sha = data.data_sha256 or CONTENT.get(data.dataset, "")
    name = next((n for n, s in CONTENT.items() if s == sha), data.dataset.partition(":")[0])
    if not sha:
        if name in PATHS:
            raise ValueError(
                f"{data.dataset}: its content is not known yet; open it first with uvit_repro.data.images.open_data(exp)"
            )
        sha = f"name:{name}"
    return name, sha


def identity(
    exp: Experiment,  # any experiment
) -> dict:  # what the hash is taken of
    "The training experiment, without defaults, data by content."
    keep = lambda s: {f.name: v for f in fields(s) if (v := getattr(s, f.name)) != f.default}
    d = {name: keep(getattr(exp, name)) for name in IDENTITY_SECTIONS}
    for k in ("dataset", "data_sha256"):
        d["data"].pop(k, None)
    d["data"]["content"] = content_name(exp.data)[1]
    return dict({k: v for k, v in d.items() if v}, seed=exp.seed)


def digest(obj, n=10) -> str:
    "The first characters of the sha256 of an object's canonical JSON."
    return hashlib.sha256(
        json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()[:n]


def key_seed(
    *key,  # anything with a stable repr: seed, purpose, step, name
) -> int:  # a seed for a random generator, below 2**63
    "Randomness as a function of its purpose: the same key gives the same numbers, whatever ran before."
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def variant_name(
    m: ModelConfig,  # a backbone
) -> str:  # the choices of Figure 2 that differ from the adopted ones, or `adopted`
    "How a variant is called in figures and names."
    show = lambda v: f"{v:.4g}" if isinstance(v, float) else v
    names = ("skip", "time", "conv", "patch_embed", "pos_embed", "mlp_ratio")
    return (
        ",".join(
            [
                f"{k}={show(getattr(m, k))}"
                for k in names
                if getattr(m, k) != ModelConfig.__dataclass_fields__[k].default
            ]
            + [m.options] * bool(m.options)
        )
        or "adopted"
    )


def run_id(exp: Experiment) -> str:
    "Name and hash of the training experiment: the folder under results/runs."
    m = exp.model
    size = next(
        (
            n
            for n in TABLE2
            if m.model == "UViT"
            and all(getattr(m, k) == v for k, v in TABLE2[n].items() if k != "conv")
        ),
        f"{m.model}-{m.embed_dim}x{m.depth}",
    )
    slug = (
        f"{content_name(exp.data)[0]}-{size}-{m.patch_size}-{variant_name(m)}-s{exp.seed}".lower()
    )
    return (
        "".join(c if c.isalnum() else "-" for c in slug).replace("--", "-")
        + "-"
        + digest(identity(exp))
    )


def eval_id(
    exp: Experiment,  # with the sampling and evaluation of this measurement
    step: int,  # training step of the weights
    num_samples: int,  # images drawn; 0: the held-out loss, which needs none
) -> str:  # short name of one measurement of one run
    "Step, sampler and a hash of sampling and evaluation; curve settings are not part of it."
    s, e = exp.sampling, exp.evaluation
    if not num_samples:
        return f"{step:07d}-loss-{digest({'weights': s.weights, 'images': e.loss_images, 'levels': e.loss_levels}, 8)}"
    what = dict(
        dataclasses.asdict(s),
        features=e.features,
        num_samples=num_samples,
        reference_sha256=e.reference_sha256,
    )
    for k in (
        "labels",
        "cfg_channels",
        "cfg_schedule",
        "cfg_power",
        "reference_sha256",
    ):  # fields that came later do not change the older names
        if what[k] == PARAMETERS[k][1].default:
            del what[k]
    return f"{step:07d}-{s.sampler}{s.nfe}-{digest(what, 8)}"


def deviations(
    exp: Experiment,  # what was run
) -> list[tuple]:  # (field, ours, the paper's), one for each difference
    "Every field of model, data, diffusion, training, sampling and evaluation that is not the released one."
    kind = content_name(replace(exp.data, data_sha256=exp.data.data_sha256 or "?"))[0]
    options = [c for c in CONFIGS.values() if c.data.dataset == kind] or [_cifar]
    near = lambda c: sum(
        getattr(c.model, f.name) == getattr(exp.model, f.name) for f in fields(c.model)
    )
    ref = max(options, key=near)
    return [
        (f.name, getattr(getattr(exp, s), f.name), getattr(getattr(ref, s), f.name))
        for s in SECTIONS
        if s != "execution"
        for f in fields(SECTIONS[s])
        if f.name != "data_sha256"
        and getattr(getattr(exp, s), f.name) != getattr(getattr(ref, s), f.name)
    ]


def parameters_cell() -> str:
    "The source of a `parameters` cell with every field of an experiment."
    head = [
        (
            "protocol",
            "str",
            "smoke | laptop | cpu | gpu | paper; None: what this machine can do (smoke under nbdev_test)",
        ),
        ("seed", "int", "seed of initial weights, data order and noise"),
        ("out_dir", "str", "where runs go; None: results/runs (smoke: a temporary folder)"),
    ]
    kinds = {
        n: getattr(SECTIONS[s].__annotations__[n], "__name__", "str")
        for n, (s, f) in PARAMETERS.items()
    }
    rows = head + [
        (
            n,
            "str" if kinds[n] == "tuple" else kinds[n],
            f.metadata["doc"]
            + (
                f": {' | '.join(c or '(empty)' for c in f.metadata['choices'])}"
                if f.metadata["choices"]
                else ""
            ),
        )
        for n, (s, f) in PARAMETERS.items()
        if not n.endswith("_sha256")
    ]
    return "\n".join(f"{f'{n}: {k} = None':32s}# {doc}" for n, k, doc in rows)


def check_params(
    ns: dict,  # globals() of the notebook; `_names_before` was taken before the parameters cell
    valid,  # names that may be given
):
    "Raise `ParameterError` for a name that papermill put in and nobody reads. Does nothing when cells are run again."
    before = ns.pop("_names_before", None)
    if before is None:
        return
    bad = sorted(k for k in set(ns) - before - set(valid) if not k.startswith("_"))
    if bad:
        import difflib

        hint = [
            f"{b} (did you mean {', '.join(c)}?)"
            if (c := difflib.get_close_matches(b, valid, n=2))
            else b
            for b in bad
        ]
        raise ParameterError(
            f"unknown parameter {'; '.join(hint)}. Valid: {', '.join(sorted(valid))}"
        ) from None


def describe(
    exp: Experiment,  # any
) -> str:  # a page of text
    "An experiment in full, as chapters print it."
    lines = [f"protocol {exp.protocol}, seed {exp.seed}"]
    for s in SECTIONS:
        lines.append(
            f"{s:11s}"
            + "  ".join(
                f"{f.name}={getattr(getattr(exp, s), f.name)}"
                for f in fields(SECTIONS[s])
                if getattr(getattr(exp, s), f.name) != ""
            )
        )
    return "\n".join(lines)


def from_dict(
    d: dict,  # `to_dict()`, perhaps read from a run.json of an older version
) -> Experiment:  # checked again
    "The experiment of a record. Unknown fields raise `ParameterError`."
    parts = {s: dict(d.get(s, {})) for s in SECTIONS}
    if "checkpoint_keep" in parts["execution"]:  # its name in older records
        parts["execution"]["activation_budget"] = parts["execution"].pop("checkpoint_keep")
    for s, kw in parts.items():
        if extra := set(kw) - {f.name for f in fields(SECTIONS[s])}:
            raise ParameterError(f"unknown {s} field(s) in the record: {', '.join(sorted(extra))}")
    return Experiment(
        protocol=d["protocol"], seed=d["seed"], **{s: SECTIONS[s](**kw) for s, kw in parts.items()}
    )


def main_metric(
    exp: Experiment,  # any
) -> str:  # the distance that its feature network gives
    "The name of the headline measure: FID with Inception, a Frechet distance over other features (never called FID)."
    net = exp.evaluation.features
    return "fid" if net == "inception" else f"fd_{net.removesuffix('_cifar10')}_test"
