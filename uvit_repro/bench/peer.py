"""The released code, loaded from a checkout with our weights, compared with ours and timed."""

import contextlib
import copy
import importlib
import io
import logging
import sys
import types
from pathlib import Path

import torch
from torch import nn

from uvit_repro.bench.contestants import Contestant, Options, Sampling
from uvit_repro.bench.results import bench_row
from uvit_repro.config import ParameterError, SamplingConfig
from uvit_repro.data.files import sha256_file
from uvit_repro.runs.devices import tf32_off
from uvit_repro.sample import initial_noise

MODULES = ("libs.uvit", "sde", "utils", "dpm_solver_pytorch")
SIZES = ("patch_size", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias", "mlp_time_embed")
TOLERANCES = {"output": 1e-5, "images": 1e-4}  # of the largest value, in float32


class OutputsDiffer(RuntimeError):
    "The released code and ours do not compute the same; nothing is timed."


class Peer:
    "A checkout of the released U-ViT."

    def __init__(self, folder):
        self.folder = Path(folder).expanduser().resolve()
        absl = types.SimpleNamespace(logging=logging)  # all that the released code uses of it
        if "absl" not in sys.modules:
            sys.modules["absl"] = absl
        sys.path.insert(0, str(self.folder))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                modules = [importlib.import_module(name) for name in MODULES]
        except ImportError as e:
            raise ParameterError(
                f"peer = {str(folder)!r} can't be imported: {e}. It must be a checkout of the "
                "released U-ViT (git clone https://github.com/baofff/U-ViT) with its dependencies"
            ) from None
        finally:
            sys.path.remove(str(self.folder))
            if sys.modules["absl"] is absl:
                del sys.modules["absl"]
        self.uvit, self.sde, self.utils, self.solver = modules
        self.version = f"sha256 of libs/uvit.py {sha256_file(self.folder / 'libs' / 'uvit.py')}"
        self.attention = getattr(self.uvit, "ATTENTION_MODE", "unknown")

    def network(self, ours: Contestant) -> nn.Module:
        "Their network of the same sizes as ours, with the same initial weights."
        m, d = ours.exp.model, ours.exp.data
        classes = d.num_classes + (ours.exp.train.p_uncond > 0)
        with torch.device("meta"):  # drawn weights would only be overwritten
            net = self.uvit.UViT(
                img_size=d.img_size,
                in_chans=d.in_chans,
                depth=m.depth - 1,
                conv=m.conv == "after",
                num_classes=classes if m.condition == "class" else -1,
                use_checkpoint=ours.exp.execution.use_checkpoint,
                **{name: getattr(m, name) for name in SIZES},
            )
        net.load_state_dict(ours.network().state_dict(), assign=True)
        return net.to(ours.device)

    def noise_prediction(self, net):
        "Their wrapper of a network: noise prediction on the continuous process."
        with contextlib.redirect_stdout(io.StringIO()):
            return self.sde.ScoreModel(net, pred="noise_pred", sde=self.sde.VPSDE())


def peer_accelerator(precision: str, device: torch.device):
    "`accelerate` as `accelerate launch --mixed_precision` sets it up, with nothing of ours."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")


class PeerContestant(Contestant):
    "The released code under its own launch settings, doing what one of our contestants does."

    def __init__(self, peer: Peer, ours: Contestant, precision: str = ""):
        vars(self).update(vars(ours))  # model, batch, device, ...
        self.peer = peer
        self.precision = precision or ("fp16" if ours.device.type == "cuda" else "fp32")
        self.columns = {**ours.columns, "impl": "released", "compile": "off"}
        self.columns.update(precision=self.precision, attention=peer.attention)
        if self.exp.execution.use_checkpoint:
            self.columns["note"] += " gradient checkpointing, as its configuration has it"


class PeerTraining(PeerContestant):
    "One training step per call; latent models: continuous loss, which costs the same."

    warmup = 20  # in float16 the loss scale starts too high, and the first updates are skipped

    def prepare(self) -> None:
        config, utils = self.exp.train, self.peer.utils
        self.net = self.peer.network(self).train()
        self.average = copy.deepcopy(self.net)
        how = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas}
        optimizer = utils.get_optimizer(self.net.parameters(), name="adamw", **how)
        warmup = {"warmup_steps": config.warmup_steps}
        self.schedule = utils.get_lr_scheduler(optimizer, name="customized", **warmup)
        self.accelerator = peer_accelerator(self.precision, self.device)
        net, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        self.score, self.data = self.peer.noise_prediction(net), self.inputs()

    def call(self) -> None:
        x0, cond = self.data
        self.optimizer.zero_grad()
        loss = self.peer.sde.LSimple(self.score, x0, pred="noise_pred", **cond).mean()
        self.loss = loss.detach()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.peer.utils.ema(self.average, self.net, self.exp.train.ema_rates[0])


class PeerSampling(PeerContestant):
    "One set of images per call by fast DPM-Solver, as in the released `eval.py`."

    warmup, slow = 1, True

    def prepare(self) -> None:
        net = peer_accelerator(self.precision, self.device).prepare(self.peer.network(self))
        self.score = self.peer.noise_prediction(net.eval())
        seed = SamplingConfig().sample_seed
        self.noise = initial_noise(seed, 0, self.batch, self.shape, self.device)
        self.cond = self.inputs()[1]

    def call(self) -> None:
        schedule = self.peer.solver.NoiseScheduleVP(schedule="linear")
        how = {"time_input_type": "0", "model_kwargs": self.cond}
        fn = self.peer.solver.model_wrapper(self.score.noise_pred, schedule, **how)
        solver = self.peer.solver.DPM_Solver(fn, schedule)
        self.images = solver.sample(self.noise, steps=self.options.nfe, eps=1e-4).float().cpu()


def check_outputs(
    peer: Peer,
    model: str,  # as in `bench_experiment`
    device: torch.device,
) -> list:  # rows of bench.csv: the differences
    "Compare both codes with the same weights and inputs in float32. Raises `OutputsDiffer`."
    ours = Sampling(model, 2, Options(nfe=6), device)
    theirs = PeerSampling(peer, ours, "fp32")
    x, cond = ours.inputs()
    t = torch.tensor([1.0, 999.0], device=device)
    with tf32_off(), torch.inference_mode():
        nets = (ours.network().to(device), peer.network(ours))
        a, b = (net.eval()(x, t, **cond) for net in nets)
        for contestant in (ours, theirs):
            contestant.prepare()
            contestant.call()
    found = {"output": (a, b), "images": (ours.images, theirs.images)}
    rows, columns = [], {**theirs.columns, "what": "outputs"}
    for name, (mine, released) in found.items():
        difference = float((mine - released).abs().max() / released.abs().max())
        allowed = TOLERANCES[name]
        if not difference < allowed:
            raise OutputsDiffer(
                f"{name} differ by {difference:.2g} of the largest value, with the same weights "
                f"and inputs in float32 (allowed: {allowed:g}); nothing was timed"
            )
        columns["note"] = f"same weights and inputs, float32, allowed {allowed:g}"
        row = bench_row(columns, f"max_difference_{name}", difference, "of the largest value")
        rows.append(row)
    return rows
