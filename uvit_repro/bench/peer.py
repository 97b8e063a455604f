"""The released code beside ours: loaded from a checkout, given our weights, compared, timed."""

import contextlib
import copy
import importlib
import io
import logging
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from uvit_repro.bench.contestants import (
    Contestant,
    Sampling,
    TrainingOptions,
    bench_inputs,
    bench_network,
    describe,
)
from uvit_repro.bench.results import bench_row
from uvit_repro.config import Experiment, ParameterError
from uvit_repro.data.files import sha256_file
from uvit_repro.runs.devices import tf32_off
from uvit_repro.sample import initial_noise

MODULES = ("libs.uvit", "sde", "utils", "dpm_solver_pytorch")
MAX_OUTPUT_DIFFERENCE = 1e-5  # absolute, one forward pass in float32
MAX_IMAGE_DIFFERENCE = 1e-4  # of the largest value, a short solve in float32


class OutputsDiffer(RuntimeError):
    "The released code and ours do not compute the same; nothing is timed."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def isolated_imports(
    folder: Path,
    names: tuple,  # of modules
):
    "Inside, names are imported from a folder; afterwards the interpreter knows nothing of it."
    tops = {n.partition(".")[0] for n in names} | {"absl"}
    ours = {k: m for k, m in sys.modules.items() if k.partition(".")[0] in tops}
    path, flag = list(sys.path), sys.dont_write_bytecode
    for k in ours:
        del sys.modules[k]
    absl = types.ModuleType("absl")  # the released code only takes its logging from there
    absl.logging = logging
    sys.modules.update({"absl": absl, "absl.logging": logging})
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, flag
        for k in [k for k in sys.modules if k.partition(".")[0] in tops]:
            del sys.modules[k]
        sys.modules.update(ours)


class Peer:
    "A checkout of the released U-ViT."

    def __init__(self, folder):
        self.folder = Path(folder).expanduser().resolve()
        files = [self.folder / f"{n.replace('.', '/')}.py" for n in MODULES]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ParameterError(
                f"peer = {str(folder)!r} is not a checkout of the released U-ViT "
                f"({', '.join(missing)} missing). "
                "Fetch one with: git clone https://github.com/baofff/U-ViT"
            )
        self.version = f"sha256 of libs/uvit.py {sha256_file(files[0])}"
        try:
            with isolated_imports(self.folder, MODULES):
                modules = [importlib.import_module(n) for n in MODULES]
        except ImportError as e:
            raise ParameterError(
                f"peer = {str(folder)!r} can't be imported: {e}. "
                "Install what it needs, or check that the checkout is complete"
            ) from None
        self.uvit, self.sde, self.utils, self.solver = modules
        self.attention = getattr(self.uvit, "ATTENTION_MODE", "unknown")

    def network(self, exp: Experiment, checkpoint: bool = False) -> nn.Module:
        "Their network of the same sizes, filled with our initial weights."
        m, d = exp.model, exp.data
        names = ("patch_size", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias", "mlp_time_embed")
        sizes = {"img_size": d.img_size, "in_chans": d.in_chans, "use_checkpoint": checkpoint}
        sizes.update({n: getattr(m, n) for n in names})
        sizes.update(depth=m.depth - 1, conv=m.conv == "after")
        with torch.device("meta"):  # drawn weights would only be overwritten
            classes = d.num_classes + (exp.train.p_uncond > 0) if m.condition == "class" else -1
            net = self.uvit.UViT(**sizes, num_classes=classes)
        net.load_state_dict(bench_network(exp).state_dict(), assign=True)
        return net

    def score_model(self, net):
        "Their wrapper of a network: noise prediction on the continuous process."
        with contextlib.redirect_stdout(io.StringIO()):
            return self.sde.ScoreModel(net, pred="noise_pred", sde=self.sde.VPSDE())


def peer_accelerator(precision: str, device: torch.device):
    "`accelerate` as `accelerate launch --mixed_precision` sets it up, with nothing of ours."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    mixed = {"fp32": "no"}.get(precision, precision)
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")


class PeerContestant(Contestant):
    "The released code under its own launch settings, doing what one of our contestants does."

    def __init__(self, peer: Peer, ours: Contestant, precision: str = ""):
        self.peer, self.ours, self.exp, self.device = peer, ours, ours.exp, ours.device
        self.items, self.flops, self.warmup = ours.items, ours.flops, ours.warmup
        self.precision = precision or ("fp16" if ours.device.type == "cuda" else "fp32")
        self.columns = {**ours.columns, "impl": "released", "compile": "off"}
        self.columns.update(precision=self.precision, attention=peer.attention)
        notes = [self.columns.get("note", "")]
        if self.exp.execution.use_checkpoint:
            notes.append("gradient checkpointing, as its configuration has it")
        if self.exp.data.in_chans == 4:
            notes.append("continuous loss in place of its discrete one: same network cost")
        self.columns["note"] = "; ".join(filter(None, notes))


class PeerTraining(PeerContestant):
    "One training step of the released code per call."

    def prepare(self) -> None:
        config, utils = self.exp.train, self.peer.utils
        checkpoint = self.exp.execution.use_checkpoint
        self.net = self.peer.network(self.exp, checkpoint).to(self.device)
        self.average = copy.deepcopy(self.net)
        optimizer = utils.get_optimizer(
            self.net.parameters(),
            name="adamw",
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self.schedule = utils.get_lr_scheduler(
            optimizer, name="customized", warmup_steps=config.warmup_steps
        )
        self.accelerator = peer_accelerator(self.precision, self.device)
        net, self.optimizer = self.accelerator.prepare(self.net.train(), optimizer)
        self.model = self.peer.score_model(net)
        self.inputs = bench_inputs(self.exp, self.device)
        for _ in range(20 if self.accelerator.scaler else 0):
            self.call()  # the loss scale starts too high, and the first updates are skipped
            if not self.accelerator.optimizer_step_was_skipped:
                break

    def call(self) -> None:
        x0, cond = self.inputs
        self.optimizer.zero_grad()
        loss = self.peer.sde.LSimple(self.model, x0, pred="noise_pred", **cond).mean()
        self.loss = loss.detach()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.peer.utils.ema(self.average, self.net, self.exp.train.ema_rates[0])


class PeerSampling(PeerContestant):
    "One set of images of the released code per call: fast DPM-Solver, as in its `eval.py`."

    def prepare(self) -> None:
        exp, d = self.exp, self.exp.data
        net = self.peer.network(exp, exp.execution.use_checkpoint).to(self.device)
        net = peer_accelerator(self.precision, self.device).prepare(net).eval()
        scale = self.ours.sampling.cfg_scale - 1  # their scale is ours less 1

        def guided(x, t, y):  # two calls, as released
            out = net(x, t, y=y)
            return out + scale * (out - net(x, t, y=torch.full_like(y, d.num_classes)))

        self.model = self.peer.score_model(guided if scale else net)
        shape = (d.in_chans, d.img_size, d.img_size)
        self.noise = initial_noise(
            self.ours.sampling.sample_seed, 0, self.items, shape, self.device
        )
        self.cond = bench_inputs(exp, self.device)[1]

    def call(self) -> None:
        solver, images = self.peer.solver, []
        schedule = solver.NoiseScheduleVP(schedule="linear")
        for start in range(0, self.items, 500):
            cond = {k: v[start : start + 500] for k, v in self.cond.items()}
            fn = solver.model_wrapper(
                self.model.noise_pred, schedule, time_input_type="0", model_kwargs=cond
            )
            with contextlib.redirect_stdout(io.StringIO()):
                batch = solver.DPM_Solver(fn, schedule).sample(
                    self.noise[start : start + 500],
                    steps=self.ours.sampling.nfe,
                    eps=1e-4,
                    adaptive_step_size=False,
                    fast_version=True,
                )
            images.append(batch.float().cpu())
        self.images = torch.cat(images)


def check_outputs(
    peer: Peer,
    exp: Experiment,
    device,
    nfe: int = 6,  # evaluations of the short solve
) -> list:  # rows of bench.csv: the differences
    "Compare both codes with the same weights and inputs in float32. Raises `OutputsDiffer`."
    exp, options = replace(exp, train=replace(exp.train, batch_size=2)), TrainingOptions()
    x, cond = bench_inputs(exp, device)
    t = torch.tensor([1.0, 999.0], device=device)
    with tf32_off(), torch.inference_mode():
        nets = [net.to(device).eval() for net in (bench_network(exp), peer.network(exp))]
        a, b = (net(x, t, **cond) for net in nets)
        output = float((a - b).abs().max())
        ours = Sampling(exp, options, device, nfe)
        theirs = PeerSampling(peer, ours, "fp32")
        for contestant in (ours, theirs):
            contestant.prepare()
            contestant.call()
    images = float((ours.images - theirs.images).abs().max() / theirs.images.abs().max())
    rows, columns = [], describe(exp, options, what="outputs", impl="released")
    for name, found, allowed, unit in (
        ("output", output, MAX_OUTPUT_DIFFERENCE, "absolute"),
        ("images", images, MAX_IMAGE_DIFFERENCE, "of the largest value"),
    ):
        if not found < allowed:
            raise OutputsDiffer(
                f"the {name} differ by {found:.2g} ({unit}) in float32 with the same weights and "
                f"inputs (allowed: {allowed:g}); nothing was timed against {peer.folder}"
            )
        note = f"same weights and inputs, float32, allowed {allowed:g}"
        rows.append(bench_row(columns, f"max_difference_{name}", found, unit, note=note))
    return rows
