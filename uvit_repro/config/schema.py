"""One experiment is one frozen object: what is trained, on what, how it is sampled and measured."""

from dataclasses import asdict, dataclass, fields, replace

from uvit_repro.config.identity import run_id
from uvit_repro.config.presets import DATASETS, MODELS, PATHS
from uvit_repro.config.settings import (
    BELOW_1,
    ParameterError,
    Section,
    closest,
    coerce,
    listed,
    refuse,
    setting,
    shown,
)

SKIPS = ("concat", "add", "add_linear", "linear_add", "none", "add_scaled")
TIMES = ("token", "adaln", "adaln_literal", "adaln_zero")
CONVS = ("after", "before", "none")
ATTENTION = ("auto", "sdpa", "math", "flash", "efficient", "cudnn")
PROCESSES = ("vp", "sd", "linear", "cosine", "edm")
POSITIONS = ("learned", "sincos2d", "none")
PREDICTIONS = ("noise", "x0", "v", "edm")
DPM_SOLVERS = ("dpm_solver_fast", "dpm_solver_pp_fast", "ddim", "dpm_solver_pp_2m")
SAMPLERS = ("euler_maruyama", *DPM_SOLVERS, "heun", "ancestral")
GUIDANCES = ("constant", "power_cosine")
FEATURES = ("inception", "resnet20_cifar10", "resnet56_cifar10", "digits_cnn", "none")
SIZE = {"low": 1, "high": 2**16}
BELOW = {"low": 0, "high": BELOW_1}
SEED = {"low": 0, "high": 2**31 - 1}


@dataclass(frozen=True)
class ModelConfig(Section):
    "The backbone (Section 3, Figure 2). Image size, channels and classes come from the data."

    model: str = setting("UViT", "backbone, a key of MODELS")
    patch_size: int = setting(2, "side of a patch in pixels", **SIZE)
    embed_dim: int = setting(512, "width D of a token", **SIZE)
    depth: int = setting(13, "layers as the paper counts them, odd", low=1, high=1000)
    num_heads: int = setting(8, "attention heads", **SIZE)
    mlp_ratio: float = setting(4.0, "hidden width of the MLP over D", low=0.01, high=1000)
    qkv_bias: bool = setting(False, "bias on the qkv projection")
    mlp_time_embed: bool = setting(False, "two-layer MLP on the time embedding (never released)")
    condition: str = setting("none", "what the model is conditioned on", ("none", "class", "text"))
    skip: str = setting("concat", "how the long skip is merged (Figure 2a)", SKIPS)
    time: str = setting("token", "how the time enters (Figure 2b)", TIMES)
    conv: str = setting("after", "3x3 convolution and the last linear layer (Figure 2c)", CONVS)
    patch_embed: str = setting("linear", "patch embedding (Figure 2d)", ("linear", "conv"))
    pos_embed: str = setting("learned", "position embedding (Figure 2e)", POSITIONS)
    pos_std: float = setting(0.02, "standard deviation of the initial position embedding", low=0)
    conv_init: str = setting("default", "initial final convolution", ("default", "identity"))
    options: str = setting("", "options of other backbones, as in NAME=VALUE,NAME=VALUE")


@dataclass(frozen=True)
class DataConfig(Section):
    "The images (Section 5.1)."

    dataset: str = setting("cifar10", "a key of DATASETS, folder:PATH or npz:PATH")
    img_size: int = setting(32, "side of the network's input, in pixels or latent pixels", **SIZE)
    in_chans: int = setting(3, "channels of the network's input", **SIZE)
    num_classes: int = setting(0, "classes (0 = as found in the data, or none)", low=0, high=10**6)
    holdout: int = setting(0, "images held out, for sets without a test split", low=0)
    flip: bool = setting(True, "random horizontal flip")
    latent_scale: float = setting(1.0, "factor on autoencoder latents", low=0)
    text_tokens: int = setting(77, "tokens of an encoded caption", **SIZE)
    text_dim: int = setting(768, "width of each of them", **SIZE)
    data_sha256: str = setting("", "checksum of the content, found when the data are opened")


@dataclass(frozen=True)
class DiffusionConfig(Section):
    "The process and what the network predicts (Section 2)."

    process: str = setting("vp", "schedule (sd: of Stable Diffusion, linear: of ADM)", PROCESSES)
    prediction: str = setting("noise", "meaning of the network's output", PREDICTIONS)
    beta_min: float = setting(0.1, "beta(0) of the VP-SDE", low=0)
    beta_max: float = setting(20.0, "beta(1) of the VP-SDE", low=0)
    variance: str = setting("fixed", "variance of each step (DiffiT)", ("fixed", "learned"))
    loss: str = setting("mse", "norm of the error (l1: GenViT)", ("mse", "l1"))
    p_mean: float = setting(-1.2, "EDM: mean of log sigma in training")
    p_std: float = setting(1.2, "EDM: its standard deviation", low=0)
    sigma_data: float = setting(0.5, "EDM: standard deviation of the data", low=0)


@dataclass(frozen=True)
class TrainConfig(Section):
    "Optimization (Section 5.1, Appendix A, Table 5)."

    n_steps: int = setting(500_000, "optimizer updates", low=1)
    batch_size: int = setting(128, "images per update, over all processes", low=1, high=10**6)
    lr: float = setting(2e-4, "AdamW learning rate after the warm-up", low=0)
    betas: tuple[float, ...] = setting((0.99, 0.999), "AdamW betas", **BELOW)
    weight_decay: float = setting(0.03, "AdamW weight decay, on all parameters", low=0)
    warmup_steps: int = setting(2500, "linear warm-up from 0", low=0)
    lr_schedule: str = setting("constant", "after the warm-up", ("constant", "cosine"))
    lr_final: float = setting(0.0, "cosine: final rate over lr", low=0)
    ema_rates: tuple[float, ...] = setting((0.9999,), "EMA decays; the first is reported", **BELOW)
    ema_ramp: bool = setting(False, "rate at step s is at most (1+s)/(10+s)")
    ema_before: bool = setting(False, "average the weights before each update (GenViT)")
    p_uncond: float = setting(0.0, "share of labels dropped for guidance", **BELOW)
    precision: str = setting("fp16", "autocast type", ("fp32", "bf16", "fp16"))
    grad_clip: float = setting(0.0, "largest gradient norm (0 = no clipping)", low=0)


@dataclass(frozen=True)
class SamplingConfig(Section):
    "From noise to images (Appendix A)."

    sampler: str = setting("dpm_solver_fast", "solver", SAMPLERS)
    nfe: int = setting(50, "network evaluations per image (a guided one counts once)", low=1)
    cfg_scale: float = setting(1.0, "guidance w: uncond + w (cond - uncond)", low=0)
    cfg_channels: int = setting(0, "channels that are guided (0 = all; DiffiT: 3)", low=0)
    cfg_schedule: str = setting("constant", "guidance over time (DiffiT)", GUIDANCES)
    cfg_power: float = setting(4.0, "exponent of power_cosine", low=0)
    clip: bool = setting(False, "clip the predicted clean image to [-1, 1]")
    weights: str = setting("ema", "ema (the first rate), ema_RATE, or raw")
    sample_seed: int = setting(0, "seed of the noise of each sample", **SEED)
    labels: str = setting("uniform", "evenly, or as in training", ("uniform", "frequency"))
    decoder: str = setting("", "autoencoder weights for latents", ("", "original", "ema"))


@dataclass(frozen=True)
class EvalConfig(Section):
    "What is measured, and when."

    features: str = setting("inception", "feature extractor of the distances", FEATURES)
    reference_sha256: str = setting("", "checksum of `reference`, found when it is opened")
    num_samples: int = setting(50_000, "images sampled at the end of training", low=1)
    curve_steps: tuple[int, ...] = setting((), "steps whose weights are kept and measured", low=1)
    curve_samples: int = setting(10_000, "images sampled at each of them", low=1)
    curve_sampler: str = setting("", "their solver (empty = the same)", ("", *SAMPLERS))
    curve_nfe: int = setting(0, "their evaluations (0 = the same)", low=0)
    loss_steps: tuple[int, ...] = setting((), "further steps: held-out loss only", low=1)
    loss_images: int = setting(2000, "held-out images of the denoising loss", low=1)
    loss_levels: int = setting(20, "noise levels of the denoising loss", low=1)


@dataclass(frozen=True)
class ExecConfig(Section):
    "How this machine does it; not part of the identity of a run."

    device: str = setting("auto", "auto, cpu, cuda, cuda:1")
    threads: int = setting(0, "CPU threads (0 for the default of PyTorch)", low=0, high=1024)
    processes: int = setting(1, "processes, one per GPU, started with torchrun", **SIZE)
    compile: str = setting("auto", "compile blocks (long runs on a GPU)", ("auto", "on", "off"))
    attention: str = setting("auto", "attention kernel (auto: the fastest, timed)", ATTENTION)
    residual: str = setting("float32", "residual stream under autocast", ("float32", "bfloat16"))
    keep_checkpoint: bool = setting(False, "keep the final state, for a longer run to continue")
    use_checkpoint: bool = setting(False, "recompute activations in the backward pass")
    activation_budget: float = setting(0.0, "kept per block, in (B, L, D) tensors", low=0)
    checkpoint_seconds: float = setting(60.0, "seconds between checkpoints", low=0)
    log_every: int = setting(50, "steps between reports", low=1)
    sample_batch: int = setting(500, "images sampled at once", low=1)
    data_root: str = setting("", "folder of the data sets (empty = UVIT_DATA, or data/)")
    reference: str = setting("", "file of mu and sigma to use in place of the training images")


def check(values: dict, *rules: tuple):
    "Raise `ParameterError` for the first broken rule (is it broken?, setting, what is allowed)."
    for broken, name, allowed in rules:
        if broken:
            refuse(name, values[name], allowed)


def check_geometry(
    img_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    paired: bool = True,  # layers are paired around a middle one, as in U-ViT
):
    "Raise `ParameterError`, before any tensor exists, for sizes that do not fit together."
    values = {k: v for k, v in locals().items() if k != "paired"}
    for name, value in values.items():
        if type(value) is not int or value < 1:
            refuse(name, value, "must be a whole number of at least 1")
    patches, heads = ([d for d in range(1, 33) if n % d == 0] for n in (img_size, embed_dim))
    pairs, even = "layers are paired around a middle one", "half cosines, half sines in time"
    check(
        values,
        (img_size % patch_size, "patch_size", f"must divide {img_size}: try one of {patches}"),
        (paired and depth % 2 == 0, "depth", f"{pairs}: try {depth - 1} or {depth + 1}"),
        (embed_dim % num_heads, "num_heads", f"must divide {embed_dim}: try one of {heads}"),
        (embed_dim % 2, "embed_dim", f"{even}: try {embed_dim + 1}"),
    )


def refuse_fields(
    model: ModelConfig,  # of an experiment
    *names: str,  # choices of U-ViT that this backbone does not have
    **instead: str,  # what it offers in place of a choice
):
    "Raise `ParameterError` where an experiment sets a choice that its backbone does not read."
    for name in names:
        if getattr(model, name) != getattr(ModelConfig, name):
            hint = f"; {instead[name]}" if name in instead else ""
            refuse(name, getattr(model, name), f"{model.model} has no such choice{hint}")


def check_experiment(exp):
    "Raise `ParameterError` for settings of different sections that contradict each other."
    m, d, p, t, s = exp.model, exp.data, exp.diffusion, exp.train, exp.sampling
    kind, _, path = d.dataset.partition(":")
    is_uvit, conditional = m.model == "UViT", m.condition != "none"
    is_edm, discrete = p.process == "edm", p.process in ("sd", "linear")
    digits = exp.evaluation.features == "digits_cnn"
    weights = ("ema", "raw", *(f"ema_{rate}" for rate in t.ema_rates))
    check(
        exp.flat(),
        (m.model not in MODELS, "model", f"allowed are {', '.join(MODELS)}"),
        (kind in PATHS and not path, "dataset", f"a path must follow, as in {kind}:PATH"),
        (kind not in DATASETS, "dataset", f"allowed are {', '.join(DATASETS)} (folder:PATH)"),
        (is_uvit and m.options, "options", "U-ViT has none; its choices are skip, time, conv, ..."),
        (is_edm != (p.prediction == "edm"), "process", "edm goes with prediction = 'edm'"),
        (p.variance == "learned" and not discrete, "variance", "needs process = 'linear' or 'sd'"),
        (p.beta_max <= p.beta_min, "beta_max", f"must exceed beta_min = {p.beta_min}"),
        (len(t.betas) != 2, "betas", "expected two numbers"),
        (not t.ema_rates, "ema_rates", "expected at least one number"),
        (t.batch_size % exp.execution.processes, "batch_size", "must be a multiple of processes"),
        (t.p_uncond and not conditional, "p_uncond", "no label to drop: try condition = 'class'"),
        (s.cfg_scale != 1 and not t.p_uncond, "cfg_scale", "needs p_uncond > 0 in training: try 1"),
        (s.cfg_channels > d.in_chans, "cfg_channels", f"of {d.in_chans} channels; 0 is all"),
        (digits and d.num_classes > 10, "num_classes", "features digits_cnn tell ten classes"),
        (is_edm and s.cfg_schedule != "constant", "cfg_schedule", "edm guides at a constant scale"),
        (s.weights not in weights, "weights", f"this run keeps {listed(weights)}"),
    )
    if is_uvit:  # the other backbones check their own sizes
        check_geometry(d.img_size, m.patch_size, m.embed_dim, m.depth, m.num_heads)


@dataclass(frozen=True)
class Experiment(Section):
    "Everything that is needed to repeat a number."

    protocol: str = setting("paper", "smoke, laptop, cpu, gpu or paper")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvalConfig = EvalConfig()
    execution: ExecConfig = ExecConfig()
    seed: int = setting(0, "seed of initial weights, data order and noise", **SEED)

    def __post_init__(self):
        super().__post_init__()
        for name, section in SECTIONS.items():
            coerce(name, getattr(self, name), section)
        check_experiment(self)

    def flat(self) -> dict:
        "All settings by their flat names."
        return {n: getattr(getattr(self, section), n) for n, (section, _) in PARAMETERS.items()}

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def run_id(self) -> str:
        return run_id(self)


SECTIONS = {f.name: f.type for f in fields(Experiment) if issubclass(f.type, Section)}
PARAMETERS = {f.name: (name, f) for name, cls in SECTIONS.items() for f in fields(cls)}  # flat


def with_overrides(exp: Experiment, **overrides) -> Experiment:
    "Change settings by their flat names, and `seed`; None keeps a value."
    sections, seed = {}, overrides.pop("seed", None)
    for name, value in overrides.items():
        if name not in PARAMETERS:
            hint = closest(name, [*PARAMETERS, "seed", "protocol"])
            raise ParameterError(f"unknown parameter {shown(name)}: {hint}")
        if value is not None:
            sections.setdefault(PARAMETERS[name][0], {})[name] = value
    changes = {name: replace(getattr(exp, name), **kw) for name, kw in sections.items()}
    return replace(exp, **changes, seed=exp.seed if seed is None else seed)


OLD_NAMES = {"checkpoint_keep": "activation_budget"}
RETIRED = {"cuda_graph", "workers"}  # settings of old records that nothing reads
OLD_VALUES = {"attention": {"matrix": "math"}, "compile": {"False": "off", "True": "on"}}


def from_dict(record: dict) -> Experiment:
    "Read what `to_dict` wrote, perhaps long ago. `ParameterError` for unknown or missing fields."
    if not isinstance(record, dict) or not {"protocol", "seed"} <= set(record):
        raise ParameterError("not the record of an experiment: protocol or seed is missing")
    parts = {}
    for name, section in SECTIONS.items():
        given = coerce(name, record.get(name, {}), dict)
        given = {OLD_NAMES.get(k, k): v for k, v in given.items() if k not in RETIRED}
        given = {k: OLD_VALUES.get(k, {}).get(str(v), v) for k, v in given.items()}
        if extra := set(given) - {f.name for f in fields(section)}:
            raise ParameterError(f"unknown settings in the record: {shown(sorted(extra, key=str))}")
        parts[name] = section(**given)
    return Experiment(protocol=record["protocol"], seed=record["seed"], **parts)


def describe(exp: Experiment) -> str:
    "An experiment in full, one section a line."
    lines = [f"protocol {exp.protocol}, seed {exp.seed}"]
    for name in SECTIONS:
        values = vars(getattr(exp, name)).items()
        lines.append(f"{name:11s}" + "  ".join(f"{k}={v}" for k, v in values if v != ""))
    return "\n".join(lines)


def check_params(names: dict, valid):
    """Raise `ParameterError` for a name that papermill put in and nobody reads; once per session.

    `names` are the notebook's globals; `_names_before` among them precedes the parameters cell.
    """
    before = names.pop("_names_before", names)
    unknown = sorted(k for k in set(names) - set(before) - set(valid) if k[0] != "_")
    if unknown:
        hints = [f"{shown(name)}, {closest(name, valid)}" for name in unknown[:3]]
        raise ParameterError(f"unknown parameter {'; '.join(hints)}") from None
