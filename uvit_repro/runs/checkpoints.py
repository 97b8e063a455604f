"""Checkpoints and weights of a run: written whole, checked when read, continued by a longer run."""

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from uvit_repro.config import Experiment
from uvit_repro.data.files import (
    CheckpointError,
    load_tensors,
    set_aside,
    sha256_file,
    write_atomic,
)
from uvit_repro.train import Trainer, empty_model

FIELDS = {"run_id", "step", "net", "optimizer", "emas", "log"}  # of every checkpoint


def save_checkpoint(folder: Path, state: dict) -> None:
    "Write checkpoint.pt, keeping the one before as checkpoint.prev.pt."
    new = write_atomic(folder / "checkpoint.new.pt", lambda p: torch.save(state, p))
    if (folder / "checkpoint.pt").exists():
        os.replace(folder / "checkpoint.pt", folder / "checkpoint.prev.pt")
    os.replace(new, folder / "checkpoint.pt")


def drop_checkpoints(folder: Path) -> None:
    "Remove what a finished run no longer needs."
    for path in folder.glob("checkpoint*.pt"):
        path.unlink()


def check_checkpoint(
    path: Path,  # where it was read
    state: dict,  # what was read
    run_id: str,  # whose it should be
    net: nn.Module,  # whose weights it should hold
) -> None:
    "Raise `CheckpointError` when a checkpoint belongs to something else."
    if not isinstance(state, dict) or not set(state) >= FIELDS:
        raise CheckpointError(f"{path} is not a checkpoint of this package")
    want = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in state["net"].items()}
    if want != got:
        k = next(k for k in {**want, **got} if want.get(k) != got.get(k))
        raise CheckpointError(
            f"{path} is of another size: {k} is {got.get(k, 'absent')} there and "
            f"{want.get(k, 'absent')} in this model"
        )
    if state["run_id"] != run_id:
        raise CheckpointError(f"{path} belongs to run {state['run_id']}, not to {run_id}")


def find_checkpoint(
    folder: Path,  # of the run
    run_id: str,  # its name
    net: nn.Module,  # its network
    say=print,  # told what was set aside
) -> dict | None:  # the newest usable state
    """The newest whole checkpoint; damaged or foreign files are set aside.

    Raises `CheckpointError` when nothing is left of what was there."""
    errors = []
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = load_tensors(path)
            check_checkpoint(path, state, run_id, net)
            return state
        except CheckpointError as e:
            errors.append(f"{e} It was set aside as {set_aside(path).name}.")
            say(errors[-1])
    if errors:
        raise CheckpointError(
            " ".join(errors) + " There is no earlier checkpoint; start the same command again to "
            "train from the first step."
        )
    return None


def shorter_runs(
    exp: Experiment,  # what is to be trained
    folder: Path,  # its folder
) -> list:  # (steps, final state), the longest first
    "Runs on this machine that are equal but for fewer steps at a constant rate."
    found = []
    if exp.train.lr_schedule == "constant":
        for path in folder.parent.glob("*/resume-*.pt"):
            step = int(path.stem.split("-")[1])
            shorter = replace(exp.train, n_steps=step)
            name = path.parent.name
            if step < exp.train.n_steps and replace(exp, train=shorter).run_id == name:
                found.append((step, path))
    return sorted(found, reverse=True)


def find_shorter_run(
    exp: Experiment,  # what is to be trained
    folder: Path,  # its folder, which receives the weights that the shorter run kept
    net: nn.Module,  # its network
    say=print,  # told what was set aside
) -> dict | None:  # the state to continue from, with `continued_from`
    "The final state of the longest run that this one continues."
    wanted = {*exp.evaluation.curve_steps, *exp.evaluation.loss_steps}
    for step, path in shorter_runs(exp, folder):
        kept = [weights_path(path.parent, s) for s in wanted if s <= step]
        if not all(p.exists() for p in kept):
            continue
        try:
            state = load_tensors(path)
            check_checkpoint(path, state, path.parent.name, net)
            for p in kept:
                check_weights(p)
                write_atomic(folder / p.name, lambda to, p=p: shutil.copyfile(p, to))
        except CheckpointError as e:
            say(f"{path.parent.name} can't be continued: {e}")
            continue
        return {**state, "continued_from": {"run_id": path.parent.name, "step": state["step"]}}
    return None


def weights_path(folder: Path, step: int) -> Path:
    "Where the weights of a step are kept."
    return folder / f"weights-{step:07d}.safetensors"


def save_weights(folder: Path, trainer: Trainer) -> Path:
    "Write the raw weights and every average of them, the artefact that sampling reads."
    from safetensors.torch import save_file

    sets = {"raw": dict(trainer.net.named_parameters())}
    sets.update({name: ema.state_dict() for name, ema in trainer.emas.items()})
    tensors = {
        f"{kind}/{name}": p.detach().float().cpu().contiguous()
        for kind, parameters in sets.items()
        for name, p in parameters.items()
    }
    return write_atomic(weights_path(folder, trainer.step), lambda p: save_file(tensors, p))


def weights_sums(folder: Path) -> dict:  # sha256 by the stem of the file
    "Checksums of the weights in a folder."
    return {p.stem: sha256_file(p) for p in sorted(folder.glob("weights-*.safetensors"))}


def check_weights(path: Path) -> None:
    "Raise `CheckpointError` when weights differ from the checksum in the record beside them."
    want = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        record = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        want = record.get("weights_sha256", {}).get(path.stem)
    if want and sha256_file(path) != want:
        raise CheckpointError(
            f"{path} is damaged: its content does not match the checksum in run.json. Run the "
            "experiment again: the file is set aside and the weights are trained again"
        )


def load_weights(
    exp: Experiment,  # of the run; `exp.sampling.weights` names the set
    folder: Path,  # of the run
    step: int,  # one of its kept steps
) -> nn.Module:  # on the CPU, in eval mode
    "The network of a run, with the weights of a step."
    path = weights_path(folder, step)
    if not path.exists():
        kept = sorted(int(p.stem.split("-")[1]) for p in folder.glob("weights-*.safetensors"))
        raise FileNotFoundError(
            f"{folder.name} has no weights of step {step}; kept are {kept or 'none'}. Steps are "
            "kept when curve_steps or loss_steps name them before training."
        )
    check_weights(path)
    kind = exp.sampling.weights
    kind = f"ema_{exp.train.ema_rates[0]}" if kind == "ema" else kind
    tensors = load_tensors(path)
    state = {k.removeprefix(f"{kind}/"): v for k, v in tensors.items() if k.startswith(f"{kind}/")}
    net = empty_model(exp)
    try:
        net.load_state_dict(state)
    except RuntimeError as e:
        why = str(e).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit this experiment: {why}") from None
    return net.eval()
