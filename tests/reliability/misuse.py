"""Odd settings, odd commands, odd combinations: refused in one line, or carried out."""

import contextlib
import io
import math
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from reliability.artefacts import Workshop, complaints, quiet
from reliability.children import in_child
from uvit_repro.cli import main
from uvit_repro.config import (
    PARAMETERS,
    PROTOCOLS,
    ParameterError,
    experiment,
    from_dict,
    with_overrides,
)
from uvit_repro.runs.experiment import run_experiment

LONGEST_MESSAGE = 400  # characters
PATIENCE = 5  # seconds for one setting
ODD_VALUES = (
    *(0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**10, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "nan",
        "inf",
        "1e999",
        "true",
        "none",
        "None",
        "auto",
        "\u0663",
        "\uff15",
        "x" * 9999,
    ),
    *("a\nb", "\x1b[31m", "../..", "/", "folder:", "npz:", "latents:", "1,2", "1,,2", "(1, 2)"),
    *(True, False, b"bytes", [], [1, 2], [[1]], (), (1, "x"), {}, {"a": 1}, set(), object(), 1j),
    *(range(3), len, math, type, Ellipsis, "0x10", "1_000", "=", "a=b,c", "window=4", "mult=1"),
)


class TooSlow(BaseException):
    "A setting that hangs."


def stop(*_):
    raise TooSlow


@contextlib.contextmanager
def patience(seconds: int):
    "Raise `TooSlow` inside the block after some seconds."
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bad_message(text: str, names=()) -> str:
    "What is wrong with a message, or nothing."
    if len(text) > LONGEST_MESSAGE:
        return f"a message of {len(text)} characters: {text[:80]}"
    if not text.replace(" ", "").isprintable():
        return f"control characters in {text!r}"
    if names and not any(name in text for name in names):
        return f"the message names none of {names}: {text}"
    return ""


def odd_value(rng: random.Random, name: str):
    "A value that a person or a program might give by mistake, or one that is allowed."
    field = PARAMETERS[name][1] if name in PARAMETERS else None
    choices = field.metadata["choices"] if field is not None else None
    if choices and rng.random() < 0.4:
        return rng.choice(choices)
    if field is not None and isinstance(field.default, int | float) and rng.random() < 0.2:
        return field.default * rng.choice((0, 1, 2, 3, 0.5, -1, 10, 1000))
    return rng.choice(ODD_VALUES)


def one_setting(rng: random.Random) -> tuple[str, str]:
    "An experiment with one to three odd settings."
    names = rng.sample([*PARAMETERS, "seed", "protocol", "nonsense"], rng.choice((1, 1, 2, 3)))
    given = {name: odd_value(rng, name) for name in names}
    protocol = given.pop("protocol", rng.choice(list(PROTOCOLS)))
    try:
        case = f"setting {protocol!r:.40} {given!r:.200}"
    except ValueError:  # an integer of too many digits
        case = f"setting {sorted(names)}"
    try:
        with patience(PATIENCE):
            exp = experiment(protocol, **given)
            if from_dict(exp.to_dict()) != exp:
                return case, "it reads back as another experiment"
    except ParameterError as e:
        return case, bad_message(str(e))
    except TooSlow:
        return case, "it hangs"
    except Exception as e:
        return case, f"{type(e).__name__}: {str(e)[:200]}"
    return case, ""


WORDS = (
    *("", "x", "-1", "0", "fig2", "all", "claims", "table1", "smoke", "laptop", "--json", "9" * 99),
    *("nan", "1e9", "-5m", "5 parsecs", "\u0665", "a\nb", "\x1b[2J", "/nowhere", ".", "slurm", "="),
    *("--out-dir", "--seeds", "--protocol", "--budget", "--nonsense", "--only", "--origin", "runs"),
)
COMMANDS = (
    *(("plan",), ("plan", "fig2", "--protocol"), ("verify", "--origin"), ("report", "--only")),
    *(("run", "nowhat", "--protocol"), ("run", "fig2", "--protocol", "smoke", "--budget", "0")),
    *(("run", "fig2", "--workers", "0"), ("run", "fig2", "--processes", "0", "--protocol")),
    *(("collect", "/nowhere"), ("publish", "nowhat"), ("bench", "--what", "nowhat", "--quick")),
    *(("encode", "nowhat"), ("status", "--wait", "-1"), ("nonsense",), (), ("released",)),
)


def one_command(rng: random.Random, folder: Path) -> tuple[str, str]:
    "A command line with odd words; none of them starts a run."
    words = [*rng.choice(COMMANDS), *rng.choices(WORDS, k=rng.randint(1, 3))]
    case, out, err = f"command {words!r}", io.StringIO(), io.StringIO()
    words += ["--out-dir", str(folder)] if words[0] in ("plan", "status", "publish") else []
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patience(60):
            code = main([w if len(w) < 99 else w[:99] for w in words])
    except SystemExit as e:
        code = e.code
    except TooSlow:
        return case, "it hangs"
    except BaseException as e:
        return case, f"{type(e).__name__}: {str(e)[:200]}"
    said = err.getvalue()
    if "Traceback" in said + out.getvalue():
        return case, "a traceback"
    if code not in (0, 1, 2):
        return case, f"exit {code}"
    if code == 2 and "usage:" not in said:
        return case, bad_message(said.strip().splitlines()[-1] if said.strip() else "x" * 999)
    return case, ""


def setting_cases(shop: Workshop, count: int, seed: int) -> Iterator[tuple[str, str]]:
    "Yield (case, failure or nothing): nine settings to one command."
    rng, folder = random.Random(f"settings {seed}"), shop.root / "nothing"
    for number in range(count):
        yield one_command(rng, folder) if number % 10 == 9 else one_setting(rng)


CHOICES = {  # what combinations are made of
    "model": ("UViT", "UViT", "UViT", "UNet-latent", "ADM", "GenViT", "IU-ViT", "ASCEND"),
    "patch_size": (1, 2, 4, 8),
    "depth": (1, 2, 3, 5),
    "embed_dim": (16, 32, 48),
    "num_heads": (1, 2, 3),
    "condition": ("none", "class", "text"),
    "process": ("vp", "sd", "linear", "cosine", "edm"),
    "prediction": ("noise", "x0", "v", "edm"),
    "variance": ("fixed", "fixed", "learned"),
    "loss": ("mse", "l1"),
    "sampler": PARAMETERS["sampler"][1].metadata["choices"],
    "nfe": (1, 2, 3, 5, 6),
    "cfg_scale": (0.0, 1.0, 1.5),
    "cfg_schedule": ("constant", "power_cosine"),
    "weights": ("ema", "raw", "ema_0.5"),
    "labels": ("uniform", "frequency"),
    "features": ("none", "digits_cnn", "inception", "resnet20_cifar10"),
    "precision": ("fp32", "bf16", "fp16"),
    "residual": ("float32", "bfloat16"),
    "use_checkpoint": (True, False),
    "activation_budget": (0.0, 1.0, 3.0),
    "ema_before": (True, False),
    "ema_rates": ((0.9,), (0.5, 0.9)),
    "lr_schedule": ("constant", "cosine"),
    "grad_clip": (0.0, 1.0),
    "batch_size": (1, 3, 16),
    "p_uncond": (0.0, 0.1),
    "num_classes": (0, 3, 10, 12),
    "skip": PARAMETERS["skip"][1].metadata["choices"],
    "time": PARAMETERS["time"][1].metadata["choices"],
    "conv": PARAMETERS["conv"][1].metadata["choices"],
    "pos_embed": PARAMETERS["pos_embed"][1].metadata["choices"],
    "patch_embed": ("linear", "conv"),
    "dataset": ("digits", "digits", "digits_latents", "shapes"),
    "curve_steps": ((), (1,), (1, 2), (5,)),
    "loss_steps": ((), (1,), (9,)),
    "holdout": (0, 10, 1700, 1797),
    "num_samples": (1, 7, 20),
    "processes": (1, 1, 1, 1, 2),
}


def odd_combination(rng: random.Random) -> dict:
    "A few settings that are each allowed."
    names = rng.sample(list(CHOICES), rng.randint(2, 6))
    return {name: rng.choice(CHOICES[name]) for name in names}


def run_small(given: dict, folder: Path) -> str:  # the state of the run
    "Carry out an experiment of three steps."
    small = {"n_steps": 3, "num_samples": 8, "curve_samples": 4, "curve_steps": (), "threads": 1}
    recipe = with_overrides(experiment("smoke", **{k: given[k] for k in given if k == "dataset"}))
    base = with_overrides(recipe, loss_images=8, loss_levels=2, **small)
    return run_experiment(with_overrides(base, **given), folder, quiet).info["status"]


def combination_cases(shop: Workshop, count: int, seed: int) -> Iterator[tuple[str, str]]:
    "Yield (case, failure or nothing) for each odd combination."
    rng, scratch = random.Random(f"combinations {seed}"), shop.root / "combinations"
    for number in range(count):
        given, folder = odd_combination(rng), scratch / str(number)
        ending = in_child(run_small, (given, folder), folder)
        trained = list(folder.rglob("weights-*"))
        refused = ending.error.startswith(("ParameterError", "FileNotFoundError", "ValueError"))
        failure = ""
        if ending.error and (trained or not refused):
            failure = f"{'after training: ' if trained else ''}{ending.error[:300]}"
        elif ending.error:
            failure = bad_message(ending.error)
        elif wrong := complaints("runs", folder):
            failure = f"verify: {wrong[0]}"
        yield f"combination {given}", failure
        shutil.rmtree(folder, ignore_errors=True)
