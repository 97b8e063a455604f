"""Training with files: resumed where it stopped, checkpoints, the loss log, a line of progress."""

import csv
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from uvit_repro.config import Experiment
from uvit_repro.config.durations import format_duration
from uvit_repro.data.files import write_atomic
from uvit_repro.data.images import Batches, Data
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.checkpoints import (
    drop_checkpoints,
    find_checkpoint,
    find_shorter_run,
    save_checkpoint,
    save_weights,
    weights_path,
)
from uvit_repro.runs.devices import ALONE, DistributedContext, pick_device
from uvit_repro.runs.execution import attention_choice, set_attention, set_residual, wants_compile
from uvit_repro.train import Trainer, build_model, fit, lr_at

PROGRESS_SECONDS = 15.0  # between lines of progress
SAVING_SHARE = 0.02  # of the time, at most, goes into checkpoints


class TrainingFailed(RuntimeError):
    "Training met a loss that is not finite."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


class LossLog:
    "Losses of a run: kept on the device until they are reported, then checked, averaged, logged."

    def __init__(self, exp: Experiment, folder: Path, say=print):
        self.cfg, self.folder = exp.train, folder
        self.rows, self.pending = [], []
        self.earlier = []  # losses that were pending when the checkpoint was made
        self.say, self.said, self.first = say, -math.inf, None  # time and step of progress lines
        self.start = time.perf_counter()

    def seconds(self) -> float:
        "Seconds of training, over all attempts."
        return time.perf_counter() - self.start

    def values(self) -> Tensor:
        "The losses since the last report, on the CPU."
        losses = torch.tensor(self.earlier)
        if self.pending:
            losses = torch.cat([losses, torch.stack(self.pending).float().cpu()])
        return losses

    def state_dict(self) -> dict:
        "What a resumed run needs to write the same log."
        pending = self.values().tolist()
        return {"rows": self.rows, "pending": pending, "seconds": self.seconds()}

    def load_state_dict(self, state: dict) -> None:
        "Continue a log."
        self.rows, self.earlier = state["rows"], state["pending"]
        self.start = time.perf_counter() - state["seconds"]

    def check(self, step: int) -> Tensor:
        "The losses since the last report. Raises `TrainingFailed` when one is not finite."
        losses = self.values()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            at = step - len(losses) + i
            path = self.folder / "checkpoint.pt"
            good = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint yet"
            raise TrainingFailed(
                f"loss {losses[i]:.3g} at step {at}, learning rate {lr_at(self.cfg, at):.3g}; "
                f"{good}. A smaller lr, a longer warm-up or precision = 'fp32' may help."
            )
        return losses

    def report(self, step: int) -> None:
        "Log the mean loss since the last report."
        mean = float(self.check(step).mean())
        self.pending, self.earlier = [], []
        self.rows.append((step, mean, lr_at(self.cfg, step - 1), self.seconds()))
        now = time.perf_counter()
        if self.first is None:
            self.first, self.first_at = step, now
        if step == self.cfg.n_steps or now - self.said >= PROGRESS_SECONDS:
            self.said = now
            self.say(f"step {step:>6}/{self.cfg.n_steps}  loss {mean:.4f}{self.speed(step, now)}")

    def speed(self, step: int, now: float) -> str:
        "Images per second since the first report, and the time left."
        seconds = now - self.first_at
        if step == self.first or not seconds:
            return ""
        rate = (step - self.first) / seconds
        left = format_duration((self.cfg.n_steps - step) / rate)
        return f"  {rate * self.cfg.batch_size:.0f} images/s  {left} left"

    def write(self) -> None:
        "log.csv: step, mean loss since the row before, learning rate, seconds of training."
        rows = [(s, f"{x:.7g}", f"{r:.6g}", f"{t:.2f}") for s, x, r, t in self.rows]

        def write(path):
            with open(path, "w", newline="", encoding="utf-8") as f:
                table = csv.writer(f, lineterminator="\n")
                table.writerow(["step", "loss", "lr", "seconds"])
                table.writerows(rows)

        write_atomic(self.folder / "log.csv", write)


class TrainingRun:
    "One run in training: trainer, data, log and files, resumed from what is there."

    def __init__(
        self,
        exp: Experiment,  # with its data opened
        data: Data,  # its data
        folder: Path,  # of the run, held by the caller
        say=print,  # progress lines
        team: DistributedContext = ALONE,  # the processes; the first one writes
    ):
        self.exp, self.folder, self.team = exp, folder, team
        self.say = say if team.rank == 0 else lambda line: None
        self.device = pick_device(exp.execution.device)
        net = build_model(exp)
        state = self.find_state(net)
        self.continued = state.get("continued_from") if state else None
        self.attention = self.pick_attention(state)
        set_attention(net, self.attention["path"])
        set_residual(net, exp.execution.residual)
        self.compiled = wants_compile(exp.execution.compile, self.device, exp.train.n_steps)
        self.trainer = Trainer(
            net,
            Diffusion(exp.diffusion),
            exp.train,
            self.device,
            self.compiled and exp.execution.compile,
        )
        self.log = LossLog(exp, folder, self.say)
        if state:
            self.trainer.load_state_dict(state)
            self.log.load_state_dict(state["log"])
            self.say(f"resumed at step {self.trainer.step}")
        self.batches = open_batches(exp, data, self.device, team)
        self.first_step = self.trainer.step
        self.start = self.saved_at = time.perf_counter()
        self.saving_seconds = 0.0

    def find_state(self, net) -> dict | None:
        "The state to go on from; the first process looks first, because it sets files aside."
        state = None
        if self.team.rank == 0:
            state = self.look(net)
        if self.team.first(lambda: state is not None) and state is None:
            state = self.look(net)
        return state

    def look(self, net) -> dict | None:
        "This run's own checkpoint, or the end of a shorter run."
        state = find_checkpoint(self.folder, self.exp.run_id, net, self.say)
        return state or find_shorter_run(self.exp, self.folder, net, self.say)

    def pick_attention(self, state: dict | None) -> dict:  # path; seconds of each that was timed
        "The attention path: as asked, as it began, or the fastest one."
        if state and self.exp.execution.attention == "auto":
            return {"path": current_path(state["attention"])}
        return self.team.first(lambda: attention_choice(self.exp, self.device))

    def state_dict(self) -> dict:
        "A checkpoint."
        return {
            **self.trainer.state_dict(),
            "run_id": self.exp.run_id,
            "log": self.log.state_dict(),
            "attention": self.attention["path"],
            "continued_from": self.continued,
        }

    def summary(self) -> dict:
        "What the record keeps about training."
        ex, cuda = self.exp.execution, self.device.type == "cuda"
        steps, report = self.trainer.step - self.first_step, self.trainer.compiled
        seconds = time.perf_counter() - self.start
        return {
            "steps": steps,
            "seconds": self.log.seconds(),
            "images_per_second": steps * self.exp.train.batch_size / seconds,
            "attention": self.attention["path"],
            "attention_seconds": self.attention.get("seconds"),
            "residual": ex.residual,
            "compile": self.compiled,
            "compile_report": asdict(report) if report else None,
            "processes": self.team.size,
            "continued_from": self.continued,
            "use_checkpoint": ex.use_checkpoint,
            "activation_budget": ex.activation_budget,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
        }

    def checkpoint_due(self) -> bool:
        "Whether it is time for a checkpoint: when asked, but at most 2 % of the time goes into it."
        asked = self.exp.execution.checkpoint_seconds
        if asked:
            asked = max(asked, self.saving_seconds * (1 / SAVING_SHARE - 1))
        return time.perf_counter() - self.saved_at >= asked

    def save(self) -> None:
        "Write a checkpoint and measure what it takes."
        self.log.check(self.trainer.step)
        start = time.perf_counter()
        self.log.write()
        save_checkpoint(self.folder, self.state_dict())
        self.saved_at = time.perf_counter()
        self.saving_seconds = self.saved_at - start

    def finish(self, keep) -> None:
        """Write what stays. The final weights come last: they mean that training is over, and
        a run that is killed at any moment before them trains its last steps again."""
        self.log.write()
        keep(self.summary())
        if self.exp.execution.keep_checkpoint:
            path = self.folder / f"resume-{self.trainer.step:07d}.pt"
            write_atomic(path, lambda p: torch.save(self.state_dict(), p))
        save_weights(self.folder, self.trainer)
        drop_checkpoints(self.folder)

    def run(self, keep) -> None:
        "Train to the last step."
        exp, n_steps = self.exp, self.exp.train.n_steps
        kept_steps = {*exp.evaluation.curve_steps, *exp.evaluation.loss_steps} - {n_steps}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        condition = exp.model.condition
        for step, loss in fit(self.trainer, self.batches, exp.seed, condition, self.team):
            self.log.pending.append(loss)
            if step % exp.execution.log_every == 0 or step == n_steps:
                self.log.report(step)
            if self.team.rank:
                continue  # the first process writes
            if step in kept_steps:
                save_weights(self.folder, self.trainer)
            if step == n_steps:
                self.finish(keep)
            elif self.checkpoint_due():
                self.save()


def current_path(attention: str) -> str:
    "Today's name of an attention path; older records say `matrix`."
    return "math" if attention == "matrix" else attention


def open_batches(exp: Experiment, data: Data, device, team: DistributedContext) -> Batches:
    "The training batches of an experiment, or one process's rows of them."
    return Batches(
        data,
        exp.train.batch_size,
        exp.seed,
        exp.data.flip,
        exp.train.p_uncond,
        exp.data.num_classes,
        device,
        (team.rank, team.size),
        exp.model.condition,
        exp.data.latent_scale,
    )


def train(
    exp: Experiment,  # with its data opened
    data: Data,  # by uvit_repro.data.images.open_data
    folder: Path,  # the run's folder, held by the caller
    say=print,  # progress lines
    team: DistributedContext = ALONE,  # the processes of this run
    keep=lambda summary: None,  # receives the summary before the final weights are written
) -> dict:  # steps done here, seconds in all, images per second, how it was computed
    "Train to the last step from the newest checkpoint; no-op when the final weights exist."
    if team.first(weights_path(folder, exp.train.n_steps).exists):
        if team.rank == 0:
            drop_checkpoints(folder)
        return {"steps": 0}
    folder.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(exp, data, folder, say, team)
    run.run(keep)
    team.gather(None)  # nobody goes on before the final weights are there
    return run.summary()


def read_log(folder: Path):
    "log.csv of a run as a DataFrame: step, loss, lr, seconds."
    import pandas as pd

    return pd.read_csv(Path(folder) / "log.csv")


def plot_loss(
    folders: dict,  # label -> a run's folder
    ax=None,  # where to draw
):
    "Loss against step, one line per run."
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(6, 3))[1]
    for label, folder in folders.items():
        log = read_log(folder)
        ax.plot(log.step, log.loss, label=label)
    ax.set(xlabel="step", ylabel="mean squared error", yscale="log")
    ax.legend()
    return ax
