"""Training with files: resumed where it stopped, checkpoints, the loss log, a line of progress."""

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
from uvit_repro.runs import checkpoints, execution
from uvit_repro.runs.checkpoints import weights_path
from uvit_repro.runs.devices import ALONE, DistributedContext, pick_device
from uvit_repro.train import Trainer, build_model, fit, lr_at

PROGRESS_SECONDS = 15.0  # between lines of progress
RECORDED = ("residual", "use_checkpoint", "activation_budget")  # options, beside what was done
SAVING_SHARE = 0.02  # of the time, at most, goes into checkpoints


class TrainingFailed(RuntimeError):
    "Training met a loss that is not finite."


class LossLog:
    "Losses of a run: kept on the device until they are reported, then checked, averaged, logged."

    def __init__(self, exp: Experiment, folder: Path, say, step: int, state: dict | None):
        self.cfg, self.folder, self.say, self.first_step = exp.train, folder, say, step
        state = state or {"rows": [], "pending": [], "seconds": 0.0}
        self.rows, self.pending = state["rows"], state["pending"]
        self.seconds_before, self.start = state["seconds"], time.perf_counter()
        self.said = -math.inf  # time of the last line of progress

    def seconds(self) -> float:
        "Seconds of training, over all attempts."
        return self.seconds_before + time.perf_counter() - self.start

    def images_per_second(self, step: int) -> float:
        "The speed of this attempt."
        images = (step - self.first_step) * self.cfg.batch_size
        return images / (time.perf_counter() - self.start)

    def check(self, step: int) -> Tensor:
        "The losses since the last report. Raises `TrainingFailed` when one is not finite."
        losses = torch.tensor([float(loss) for loss in self.pending])
        if not losses.isfinite().all():
            i = int((~losses.isfinite()).nonzero()[0])
            at, path = step - len(losses) + i, self.folder / "checkpoint.pt"
            good = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint yet"
            raise TrainingFailed(
                f"loss {losses[i]:.3g} at step {at}, learning rate {lr_at(self.cfg, at):.3g}; "
                f"{good}. A smaller lr, a longer warm-up or precision = 'fp32' may help."
            )
        return losses

    def report(self, step: int) -> None:
        "Log the mean loss since the last report."
        mean, last, now = float(self.check(step).mean()), self.cfg.n_steps, time.perf_counter()
        self.pending = []
        self.rows.append((step, mean, lr_at(self.cfg, step - 1), self.seconds()))
        if step == last or now - self.said >= PROGRESS_SECONDS:
            speed, self.said = self.images_per_second(step), now
            left = format_duration((last - step) * self.cfg.batch_size / speed)
            self.say(f"step {step:>6}/{last}  loss {mean:.4f}  {speed:.0f} images/s  {left} left")

    def state_dict(self, step: int) -> dict:
        "What a resumed run needs to write the same log."
        pending = self.check(step).tolist()
        return {"rows": self.rows, "pending": pending, "seconds": self.seconds()}

    def write(self) -> None:
        "log.csv: step, mean loss since the row before, learning rate, seconds of training."
        rows = [f"{s},{x:.7g},{r:.6g},{t:.2f}" for s, x, r, t in self.rows]
        text = "\n".join(["step,loss,lr,seconds", *rows, ""])
        write_atomic(self.folder / "log.csv", lambda p: p.write_text(text, "utf-8", newline="\n"))


class TrainingRun:
    "One run in training: trainer, data, log and files, resumed from what is there."

    def __init__(self, exp: Experiment, net, data: Data, folder: Path, say, team):
        self.exp, self.folder, self.say, self.team = exp, folder, say, team
        self.device, ex = pick_device(exp.execution.device), exp.execution
        state = self.find_state(net) or {}
        self.continued = state.get("continued_from")
        self.attention = {"path": current_path(state.get("attention", ""))}
        if ex.attention != "auto" or not state:
            self.attention = team.first(lambda: execution.attention_choice(exp, self.device))
        execution.set_attention(net, self.attention["path"])
        execution.set_residual(net, ex.residual)
        self.compiled = execution.wants_compile(ex.compile, self.device, exp.train.n_steps)
        compiled, diffusion = self.compiled and ex.compile, Diffusion(exp.diffusion)
        self.trainer = Trainer(net, diffusion, exp.train, self.device, compiled)
        if state:
            self.trainer.load_state_dict(state)
            say(f"resumed at step {self.trainer.step}")
        self.log = LossLog(exp, folder, say, self.trainer.step, state.get("log"))
        t, d = exp.train, exp.data
        about = t.batch_size, exp.seed, d.flip, t.p_uncond, d.num_classes, self.device
        part = team.rank, team.size
        self.batches = Batches(data, *about, part, exp.model.condition, d.latent_scale)

    def find_state(self, net) -> dict | None:
        "The state to go on from; the first process looks first, because it sets files aside."

        def look() -> dict | None:
            state = checkpoints.find_checkpoint(self.folder, self.exp.run_id, net, self.say)
            return state or checkpoints.find_shorter_run(self.exp, self.folder, net, self.say)

        state = look() if self.team.rank == 0 else None
        found = self.team.first(lambda: state is not None)
        return look() if found and self.team.rank else state

    def state_dict(self) -> dict:
        "A checkpoint."
        return {
            **self.trainer.state_dict(),
            "run_id": self.exp.run_id,
            "log": self.log.state_dict(self.trainer.step),
            "attention": self.attention["path"],
            "continued_from": self.continued,
        }

    def summary(self) -> dict:
        "What the record keeps about training."
        ex, report, step = self.exp.execution, self.trainer.compiled, self.trainer.step
        on_gpu = self.device.type == "cuda"
        return {
            "steps": step - self.log.first_step,
            "seconds": self.log.seconds(),
            "images_per_second": self.log.images_per_second(step),
            "attention": self.attention["path"],
            "attention_seconds": self.attention.get("seconds"),
            "compile": self.compiled,
            "compile_report": asdict(report) if report else None,
            "processes": self.team.size,
            "continued_from": self.continued,
            **{name: getattr(ex, name) for name in RECORDED},
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        }

    def finish(self, keep) -> None:
        """Write what stays. The final weights come last: they mean that training is over, and
        a run that is killed at any moment before them trains its last steps again."""
        self.log.write()
        keep(self.summary())
        if self.exp.execution.keep_checkpoint:
            path, state = self.folder / f"resume-{self.trainer.step:07d}.pt", self.state_dict()
            write_atomic(path, lambda p: torch.save(state, p))
        checkpoints.save_weights(self.folder, self.trainer)
        checkpoints.drop_checkpoints(self.folder)

    def run(self, keep) -> None:
        "Train to the last step."
        exp, n_steps = self.exp, self.exp.train.n_steps
        kept_steps = {*exp.evaluation.curve_steps, *exp.evaluation.loss_steps} - {n_steps}
        asked, saved, saving = exp.execution.checkpoint_seconds, time.perf_counter(), 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for step, loss in fit(self.trainer, self.batches, exp.seed, exp.model.condition, self.team):
            self.log.pending.append(loss)
            if step % exp.execution.log_every == 0 or step == n_steps:
                self.log.report(step)
            if self.team.rank:
                continue  # the first process writes
            if step in kept_steps:
                checkpoints.save_weights(self.folder, self.trainer)
            if step == n_steps:
                self.finish(keep)
            elif time.perf_counter() - saved >= checkpoint_interval(asked, saving):
                start = time.perf_counter()
                self.log.write()
                checkpoints.save_checkpoint(self.folder, self.state_dict())
                saved = time.perf_counter()
                saving = saved - start


def checkpoint_interval(asked: float, saving: float) -> float:
    "Seconds between checkpoints: as asked, but at most 2 % of the time goes into saving them."
    return max(asked, saving * (1 / SAVING_SHARE - 1)) if asked else 0.0


def current_path(attention: str) -> str:
    "Today's name of an attention path; older records say `matrix`."
    return "math" if attention == "matrix" else attention


def train(
    exp: Experiment,  # with its data opened
    data: Data,  # by uvit_repro.data.images.open_data
    folder: Path,  # the run's folder, held by the caller
    say=print,  # progress lines
    team: DistributedContext = ALONE,  # the processes of this run
    keep=lambda summary: None,  # receives the summary before the final weights are written
) -> bool:  # whether there was anything to do
    "Train to the last step from the newest checkpoint; no-op when the final weights exist."
    if team.first(weights_path(folder, exp.train.n_steps).exists):
        if team.rank == 0:
            checkpoints.drop_checkpoints(folder)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    TrainingRun(exp, build_model(exp), data, folder, say, team).run(keep)
    team.gather(None)  # nobody goes on before the final weights are there
    return True
