"""Protocols: the same experiment at five scales, and `experiment()`, which chapters call."""

import os
from dataclasses import replace
from pathlib import Path

from uvit_repro.config.identity import content_name
from uvit_repro.config.presets import DATASET_DEFAULTS, TABLE5, preset
from uvit_repro.config.schema import DataConfig, Experiment, with_overrides
from uvit_repro.config.settings import coerce, refuse


def _on(exp: Experiment, dataset: str) -> Experiment:
    "An experiment on another data set, with the defaults of that set."
    facts = dict(DATASET_DEFAULTS[dataset.partition(":")[0]])
    evaluation = replace(exp.evaluation, features=facts.pop("features"))
    return replace(exp, data=DataConfig(dataset=dataset, **facts), evaluation=evaluation)


def _released(name: str, dataset: str, n_steps: int, **settings) -> Experiment:
    "A released configuration (Table 5) with the settings that all ten share."
    common = {
        "betas": (0.99, 0.99),
        "warmup_steps": 5000,
        "features": "inception",
        "curve_steps": tuple(range(50_000, n_steps, 50_000)),
    }
    sizes = preset(name[name.index("U-ViT") :])
    base = _on(Experiment(seed=1234), dataset)
    return with_overrides(base, n_steps=n_steps, **{**common, **sizes, **settings})


CONFIGS = {name: _released(name, **row) for name, row in TABLE5.items()}
PAPER = CONFIGS["CIFAR10 U-ViT-S/2"]


def _protocol(name: str, base: Experiment, *groups: dict) -> Experiment:
    "A protocol: another experiment with groups of settings changed."
    changes = {name: value for group in groups for name, value in group.items()}
    return replace(with_overrides(base, **changes), protocol=name)


LAPTOP = _protocol(
    "laptop",
    _on(Experiment(), "digits"),
    {"embed_dim": 64, "depth": 7, "num_heads": 4, "condition": "class", "process": "cosine"},
    {"pos_std": 0.5, "conv_init": "identity"},
    {"n_steps": 4000, "batch_size": 64, "lr": 3e-3, "betas": (0.9, 0.99), "warmup_steps": 100},
    {"lr_schedule": "cosine", "lr_final": 0.02, "ema_rates": (0.999,), "ema_ramp": True},
    {"p_uncond": 0.1, "precision": "bf16", "checkpoint_seconds": 20.0},
    {"sampler": "dpm_solver_pp_2m", "nfe": 20, "cfg_scale": 1.3, "clip": True},
    {"num_samples": 1000, "curve_steps": (1000, 2000, 3000), "curve_samples": 500},
    {"loss_images": 297},
)
SMOKE = _protocol(
    "smoke",
    LAPTOP,
    {"embed_dim": 32, "depth": 3, "num_heads": 2},
    {"n_steps": 20, "batch_size": 16, "warmup_steps": 4, "nfe": 6},
    {"num_samples": 80, "curve_steps": (10,), "curve_samples": 80},
    {"loss_images": 32, "loss_levels": 4},
)
GPU = _protocol(
    "gpu",
    PAPER,
    {"seed": 0, "n_steps": 10_000, "warmup_steps": 500, "ema_rates": (0.999, 0.995)},
    {"precision": "bf16", "keep_checkpoint": True},
    {"sampler": "dpm_solver_fast", "nfe": 50, "features": "resnet20_cifar10"},
    {"num_samples": 10_000, "curve_steps": (5000,), "curve_samples": 5000},
    {"curve_sampler": "", "curve_nfe": 0, "loss_steps": (2500, 7500)},
)
CPU = _protocol(
    "cpu",
    GPU,
    {"patch_size": 4, "embed_dim": 128, "depth": 9, "num_heads": 4},
    {"pos_std": 0.5, "conv_init": "identity", "threads": 1, "attention": "math"},
    {"n_steps": 3000, "batch_size": 64, "lr": 1e-3, "warmup_steps": 400},
    {"ema_rates": (0.995, 0.999), "sampler": "dpm_solver_pp_2m", "nfe": 25, "clip": True},
    {"num_samples": 500, "curve_steps": (), "curve_samples": 10_000},
    {"loss_steps": (1000, 2000), "loss_images": 1000},
)
PROTOCOLS = {"smoke": SMOKE, "laptop": LAPTOP, "cpu": CPU, "gpu": GPU, "paper": PAPER}

_SHAPES = {"condition": "text", "patch_size": 4, "prediction": "x0", "cfg_scale": 2.0}
_SHAPES_CURVE = {"curve_steps": (300, 600, 1200), "curve_samples": 200, "loss_images": 500}
_LATENTS_CURVE = {"n_steps": 3000, "curve_steps": (1000, 2000), "cfg_scale": 1.5}
RECIPES = {  # (protocol, data set): settings that differ from the protocol's
    ("smoke", "shapes"): _SHAPES,
    ("laptop", "shapes"): {**_SHAPES, "n_steps": 1800, **_SHAPES_CURVE},
    ("gpu", "shapes"): {**_SHAPES, "p_uncond": 0.1},
    ("smoke", "digits_latents"): {"clip": False},  # a latent is not an image in [-1, 1]
    ("laptop", "digits_latents"): {"clip": False, **_LATENTS_CURVE},
    ("gpu", "digits_latents"): {"condition": "class", "p_uncond": 0.1},
}


def project_root() -> Path:  # the folder with `settings.ini` and `results/`
    "`UVIT_REPRO_ROOT`, else upwards from here, else this package's checkout, else here."
    if os.environ.get("UVIT_REPRO_ROOT"):
        return Path(os.environ["UVIT_REPRO_ROOT"]).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        file = folder / "settings.ini"
        if file.is_file() and "lib_name = uvit_repro" in file.read_text("utf-8", "replace"):
            return folder
    return here


def data_root(
    given: str = "",  # `data_root` of the experiment
) -> Path:  # where data sets are looked for
    "The folder of the data sets: as given, else `UVIT_DATA`, else `data/` in the project."
    return Path(given or os.environ.get("UVIT_DATA") or project_root() / "data").expanduser()


def default_protocol() -> str:
    "`smoke` under nbdev_test, `gpu` with CUDA and CIFAR-10, else `laptop`."
    if os.environ.get("IN_TEST"):
        return "smoke"
    places = ("cifar-10-batches-py", "cifar10/train.npz", "cifar10/cifar-10-batches-py")
    if not any((data_root() / place).exists() for place in places):
        return "laptop"
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def released(dataset: str, model: str = "") -> Experiment | None:
    "The released configuration of a data set, of that model if there is one; None without any."
    configs = {name: c for name, c in CONFIGS.items() if c.data.dataset == dataset}
    of_model = [c for name, c in configs.items() if name.endswith(f" {model}")]
    return next(iter([*of_model, *configs.values()]), None)


def experiment(
    protocol: str = None,  # smoke | laptop | cpu | gpu | paper; None: what the machine can do
    dataset: str = None,  # None: the protocol's
    preset_name: str = None,  # a row of Table 2, as in U-ViT-S/2; None: the protocol's
    **overrides,  # any setting by its flat name; None keeps the protocol's value
) -> Experiment:  # resolved and checked
    "The experiment that a chapter's parameters ask for."
    given = {"protocol": protocol, "dataset": dataset, "preset_name": preset_name}
    protocol, dataset, preset_name = (
        "" if value is None else coerce(name, value, str) for name, value in given.items()
    )
    protocol = protocol or default_protocol()
    if protocol not in PROTOCOLS:
        refuse("protocol", protocol, f"allowed are {', '.join(PROTOCOLS)}")
    base, kind = PROTOCOLS[protocol], dataset.partition(":")[0]
    if protocol == "paper":
        base = released(dataset, preset_name) or base
    if dataset not in ("", base.data.dataset) and kind in DATASET_DEFAULTS:
        base = with_overrides(_on(base, dataset), **RECIPES.get((protocol, kind), {}))
    sizes = preset(preset_name) if preset_name else {}
    exp = with_overrides(base, **{"dataset": dataset or None, **sizes, **overrides})
    points = {"curve_steps": exp.evaluation.curve_steps, "loss_steps": exp.evaluation.loss_steps}
    n = exp.train.n_steps  # a shorter run keeps fewer points
    return with_overrides(exp, **{k: tuple(s for s in v if s < n) for k, v in points.items()})


def deviations(exp: Experiment) -> list[tuple]:
    "(setting, ours, the paper's) wherever it is not the nearest released configuration's."
    kind = content_name(replace(exp.data, data_sha256=exp.data.data_sha256 or "?"))[0]
    options = [c for c in CONFIGS.values() if c.data.dataset == kind] or [PAPER]
    model = vars(exp.model)
    near = min(options, key=lambda c: sum(vars(c.model)[k] != v for k, v in model.items()))
    theirs, skip = near.flat(), {"data_sha256", *vars(exp.execution)}
    ours = {name: value for name, value in exp.flat().items() if name not in skip}
    return [(k, v, theirs[k]) for k, v in ours.items() if v != theirs[k]]
