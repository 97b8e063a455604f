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
from uvit_repro.data import files
from uvit_repro.data.files import CheckpointError, load_tensors, write_atomic
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


def read_checkpoint(path: Path, run_id: str, net: nn.Module) -> dict:
    "A checkpoint. Raises `CheckpointError` when it is damaged, or not of this run and network."
    state = load_tensors(path)
    if not isinstance(state, dict) or not set(state) >= FIELDS:
        raise CheckpointError(f"{path} is not a checkpoint of this package")
    if state["run_id"] != run_id:
        raise CheckpointError(f"{path} belongs to run {state['run_id']}, not to {run_id}")
    got, want = ({k: v.shape for k, v in s.items()} for s in (state["net"], net.state_dict()))
    if got != want:
        raise CheckpointError(f"{path} is of a network of another size")
    return state


def find_checkpoint(folder: Path, run_id: str, net: nn.Module, say=print) -> dict | None:
    """The newest whole checkpoint; damaged or foreign files are set aside.

    Raises `CheckpointError` when nothing is left of what was there."""
    errors = []
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        path = folder / name
        try:
            if path.exists():
                return read_checkpoint(path, run_id, net)
        except CheckpointError as e:
            errors.append(f"{e} It was set aside as {files.set_aside(path).name}.")
            say(errors[-1])
    if errors:
        raise CheckpointError(
            " ".join(errors) + " There is no earlier checkpoint; start the same command again to "
            "train from the first step."
        )
    return None


def find_shorter_run(exp: Experiment, folder: Path, net: nn.Module, say=print) -> dict | None:
    """The final state of the longest run that is equal but for fewer steps at a constant rate.

    The weights that it kept are copied to the folder of the new run."""
    if exp.train.lr_schedule != "constant":
        return None
    wanted = {*exp.evaluation.curve_steps, *exp.evaluation.loss_steps}
    for path in sorted(folder.parent.glob("*/resume-*.pt"), key=lambda p: p.name, reverse=True):
        step, name = int(path.stem.split("-")[1]), path.parent.name
        shorter = replace(exp, train=replace(exp.train, n_steps=step))
        kept = [weights_path(path.parent, s) for s in wanted if s <= step]
        if step >= exp.train.n_steps or shorter.run_id != name or not all(p.exists() for p in kept):
            continue
        try:
            state = read_checkpoint(path, name, net)
            for p in kept:
                check_weights(p)
                write_atomic(folder / p.name, lambda to, p=p: shutil.copyfile(p, to))
        except CheckpointError as e:
            say(f"{name} can't be continued: {e}")
            continue
        return {**state, "continued_from": {"run_id": name, "step": step}}
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
    return {p.stem: files.sha256_file(p) for p in sorted(folder.glob("weights-*.safetensors"))}


def check_weights(path: Path) -> None:
    "Raise `CheckpointError` when weights differ from the checksum in the record beside them."
    want = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        record = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        want = record.get("weights_sha256", {}).get(path.stem)
    if want and path.exists() and files.sha256_file(path) != want:
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
    start = f"ema_{exp.train.ema_rates[0]}/" if kind == "ema" else f"{kind}/"
    tensors, net = load_tensors(path), empty_model(exp)
    try:
        net.load_state_dict({k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)})
    except RuntimeError as e:
        why = str(e).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit this experiment: {why}") from None
    return net.eval()
