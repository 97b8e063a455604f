"""The equivalence certificate: outputs, training steps and samples beside the released code's."""

import contextlib
import hashlib
import json
import os

import torch

from uvit_repro.config import DiffusionConfig, project_root
from uvit_repro.data.files import source_sum, write_json
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.devices import pick_device, tf32_off
from uvit_repro.sample import Denoiser, dpm_solver_fast, euler_maruyama
from uvit_repro.train import golden_file, golden_training, largest_difference
from uvit_repro.uvit import load_official

FORWARD = ("uvit_unconditional", "uvit_class_conditional", "uvit_text")
TRAINING = ("train_vpsde", "train_discrete_class")
SAMPLING = ("sample_vpsde", "sample_discrete_guided")
# Twenty Adam updates amplify gradient noise of 1e-6, which any other order of summation has, to
# 7e-4 in the largest weight but to 2e-5 in the norm of all: weights are compared by their norm.
TOLERANCES = {"forward": 1e-5, "training": 1e-4, "losses": 1e-5, "sampling": 1e-4}


def golden_forward(name: str, device="cpu") -> float:
    "Largest difference of one forward pass from the released code's."
    arrays, part = golden_file(name)
    cfg, inputs = json.loads(str(arrays["config"])), part("input")
    model = load_official(part("state"), cfg["num_heads"], cfg.get("num_clip_token")).to(device)
    cond = {k: inputs[k].to(device) for k in ("y", "context") if k in inputs}
    with torch.inference_mode():
        out = model(inputs["x"].to(device), inputs["timesteps"].to(device), **cond)
    return float((out.cpu() - torch.tensor(arrays["output"])).abs().max())


def golden_sampling(name: str, device="cpu") -> float:
    "Largest difference of sampled images from the released code's, over their largest value."
    arrays, _ = golden_file(name)
    guided = "y" in arrays.files
    trained, part = golden_file("train_discrete_class" if guided else "train_vpsde")
    heads = json.loads(str(trained["config"]))["net"]["num_heads"]
    model, scale, null, cond = load_official(part("final"), heads).to(device), 1.0, None, {}
    if guided:
        scale = 1 + float(arrays["released_scale"])
        null = {"y": torch.tensor(int(arrays["null_class"]))}
        cond = {"y": torch.tensor(arrays["y"]).to(device)}
    diffusion = Diffusion(DiffusionConfig(process="sd" if guided else "vp"))
    denoiser = Denoiser(model, diffusion, scale, null=null)
    start, got = torch.tensor(arrays["x_init"]).to(device), {}
    for key in (k for k in arrays.files if k.startswith("dpm_solver")):
        got[key] = dpm_solver_fast(denoiser, start, int(key.split("/")[1]), pp=guided, **cond)
    if "euler_maruyama/output" in arrays.files:
        noise = torch.tensor(arrays["euler_maruyama/noise"]).to(device)
        steps = int(arrays["euler_maruyama/steps"])
        got["euler_maruyama/output"] = euler_maruyama(denoiser, start, steps, noise.__getitem__)
    return max(largest_difference(x.cpu(), arrays[key]) for key, x in got.items())


def certificate(
    device="cpu",  # where to compute
) -> list[dict]:  # rows: what, file, difference, tolerance, ok
    "Outputs, 20 training steps and samples beside the released code's, in full float32."
    device, found = pick_device(str(device)), []  # what, file, difference
    with tf32_off():
        found += [("forward", name, golden_forward(name, device)) for name in FORWARD]
        for name in TRAINING:
            errors = golden_training(name, device)
            found.append(("losses", name, errors.pop("loss")))
            found.append(("training", name, max(errors.values())))
        found += [("sampling", name, golden_sampling(name, device)) for name in SAMPLING]
    rows = []
    for what, name, difference in found:
        row = {"what": what, "file": name, "difference": difference, "tolerance": TOLERANCES[what]}
        rows.append({**row, "ok": bool(difference < TOLERANCES[what])})
    return rows


def cached_certificate(device="cpu") -> list[dict]:
    "The certificate of this code on this machine: computed once, then read."
    on_gpu = str(device).startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else f"cpu-{os.cpu_count()}"
    key = hashlib.sha256(f"{name} {torch.__version__} {source_sum()}".encode()).hexdigest()[:12]
    path = project_root() / "results" / "cache" / f"certificate-{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    rows = certificate(device)
    with contextlib.suppress(OSError):  # a folder that can't be written costs the time again
        write_json(path, rows)
    return rows
