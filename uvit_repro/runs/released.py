"""Any of the ten released files is recognised by the shapes of its tensors and evaluated with its own process, solver, guidance, decoder and labels; a killed evaluation goes on where it stopped."""

import ast
import contextlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import (
    CONFIGS,
    Experiment,
    ParameterError,
    content_name,
    deviations,
    digest,
    eval_id,
    from_dict,
    resolve_name,
    run_id,
    with_overrides,
)
from uvit_repro.config import (
    data_root as data_folder,
)
from uvit_repro.data.coco import TextStore
from uvit_repro.data.files import (
    CheckpointError,
    load_tensors,
    run_lock,
    sha256_file,
    sweep_unfinished,
    write_json,
)
from uvit_repro.data.features import feature_status
from uvit_repro.data.images import Data, open_data, summary
from uvit_repro.data.references import read_reference
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.devices import join_processes, pick_device
from uvit_repro.runs.records import conditions, runs_root
from uvit_repro.runs.run import (
    Run,
    _has,
    _read_info,
    cached_certificate,
    evaluated_network,
    keep_picture,
    measure_samples,
    recorded,
)
from uvit_repro.sample import check_sampler
from uvit_repro.uvit import load_official, official_shape

SOURCE = "https://github.com/baofff/U-ViT#pretrained-models"
RELEASED = {  # key of CONFIGS: (file, its ID at Google Drive, reference statistics)
    "CIFAR10 U-ViT-S/2": (
        "cifar10_uvit_small.pth",
        "1yoYyuzR_hQYWU0mkTj659tMTnoCWCMv-",
        "fid_stats_cifar10_train_pytorch.npz",
    ),
    "CelebA 64x64 U-ViT-S/4": (
        "celeba64_uvit_small.pth",
        "13YpbRtlqF1HDBNLNRlKxLTbKbKeLE06C",
        "fid_stats_celeba64_train_50000_ddim.npz",
    ),
    "ImageNet 64x64 U-ViT-M/4": (
        "imagenet64_uvit_mid.pth",
        "1igVgRY7-A0ZV3XqdNcMGOnIGOxKr9azv",
        "fid_stats_imagenet64_guided_diffusion.npz",
    ),
    "ImageNet 64x64 U-ViT-L/4": (
        "imagenet64_uvit_large.pth",
        "19rmun-T7RwkNC1feEPWinIo-1JynpW7J",
        "fid_stats_imagenet64_guided_diffusion.npz",
    ),
    "ImageNet 256x256 U-ViT-L/2": (
        "imagenet256_uvit_large.pth",
        "1w7T1hiwKODgkYyMH9Nc9JNUThbxFZgs3",
        "fid_stats_imagenet256_guided_diffusion.npz",
    ),
    "ImageNet 256x256 U-ViT-H/2": (
        "imagenet256_uvit_huge.pth",
        "13StUdrjaaSXjfqqF7M47BzPyhMAArQ4u",
        "fid_stats_imagenet256_guided_diffusion.npz",
    ),
    "ImageNet 512x512 U-ViT-L/4": (
        "imagenet512_uvit_large.pth",
        "1mkj4aN2utHMBTWQX9l1nYue9vleL7ZSB",
        "fid_stats_imagenet512_guided_diffusion.npz",
    ),
    "ImageNet 512x512 U-ViT-H/4": (
        "imagenet512_uvit_huge.pth",
        "1uegr2o7cuKXtf2akWGAN2Vnlrtw5YKQq",
        "fid_stats_imagenet512_guided_diffusion.npz",
    ),
    "MS-COCO 256x256 U-ViT-S/2": (
        "mscoco_uvit_small.pth",
        "15JsZWRz2byYNU6K093et5e5Xqd4uwA8S",
        "fid_stats_mscoco256_val.npz",
    ),
    "MS-COCO 256x256 U-ViT-S/2 (Deep)": (
        "mscoco_uvit_small_deep.pth",
        "1gHRy8sn039Wy-iFL21wH8TiheHK8Ky71",
        "fid_stats_mscoco256_val.npz",
    ),
}


def released_command(
    name: str,  # a key of RELEASED
) -> str:
    "The command that evaluates a released file as the authors did."
    file, _, stats = RELEASED[name]
    return f"python -m uvit_repro.runs.released {file} --reference {stats}"


def shape_of(
    exp: Experiment,  # any, of a U-ViT
) -> dict:  # what a state dictionary of it shows
    "The sizes that a network of this experiment leaves in its weights."
    m, d, text = exp.model, exp.data, exp.model.condition == "text"
    same = {
        k: getattr(m, k)
        for k in (
            "patch_size",
            "embed_dim",
            "depth",
            "mlp_ratio",
            "qkv_bias",
            "mlp_time_embed",
            "conv",
            "skip",
        )
    }
    return dict(
        img_size=d.img_size,
        in_chans=d.in_chans,
        **same,
        num_classes=d.num_classes + (exp.train.p_uncond > 0) if m.condition == "class" else None,
        text=(d.text_tokens, d.text_dim) if text else None,
    )


def shape_of_file(
    sd: dict,  # a released state dictionary
    text_tokens=77,  # of a text model
) -> dict:  # as `shape_of`
    "What a state dictionary says about its network. Raises `CheckpointError` for one that is not a U-ViT's."
    needed = (
        "patch_embed.proj.weight",
        "pos_embed",
        "mid_block.attn.qkv.weight",
        "mid_block.mlp.fc1.weight",
        "decoder_pred.weight",
    )
    if gone := [k for k in needed if not isinstance(sd, dict) or not isinstance(sd.get(k), Tensor)]:
        raise CheckpointError(
            f"not a U-ViT checkpoint: it has no {gone[0]}"
            + (
                f" (it has {', '.join(map(str, list(sd)[:4]))}, ...)"
                if isinstance(sd, dict)
                else f" (it is a {type(sd).__name__})"
            )
        )
    dim, chans, patch, _ = sd["patch_embed.proj.weight"].shape
    s = official_shape(sd, text_tokens)
    return {
        "img_size": s["img_size"],
        "in_chans": chans,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": s["depth"],
        "mlp_ratio": s["mlp_ratio"],
        "qkv_bias": s["qkv_bias"],
        "mlp_time_embed": s["mlp_time_embed"],
        "conv": s["conv"],
        "skip": s["skip"],
        "num_classes": s["num_classes"],
        "text": (s["num_clip_token"], s["clip_dim"]) if s.get("clip_dim") else None,
    }


def _differences(found: dict, wanted: dict) -> str:
    return ", ".join(
        f"{k} = {found[k]} instead of {wanted[k]}" for k in wanted if found[k] != wanted[k]
    )


def identify(
    sd: dict,  # state dictionary of a released file
) -> str:  # its key in CONFIGS
    "Which of the ten released models these weights belong to. Raises `CheckpointError` with the differences from each when it is none."
    found = shape_of_file(sd)
    for name, exp in CONFIGS.items():
        if shape_of(exp) == found:
            return name
    lines = [f"  {name}: {_differences(found, shape_of(exp))}" for name, exp in CONFIGS.items()]
    raise CheckpointError(
        f"none of the ten released models has these sizes: {', '.join(f'{k} {v}' for k, v in found.items())}. The ten:\n"
        + "\n".join(lines)
        + "\nFor a file of your own give its experiment (exp = ..., --experiment run.json)"
    )


def check_shape(sd: dict, exp: Experiment, what: str):
    "Raise `CheckpointError` when weights are not those of an experiment."
    if diff := _differences(shape_of_file(sd, exp.data.text_tokens), shape_of(exp)):
        raise CheckpointError(f"the file is not {what}: {diff}")


class Contexts:
    "Encoded prompts from a file, read as they are needed; takes the place of `texts` of a data set."

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"contexts = {str(path)!r}: no such file. Wanted: safetensors with contexts (N, L, D), one for each image, and null (L, D), the empty text"
            )
        try:
            self.file = safe_open(str(path), "pt")
            names = set(self.file.keys())
        except SafetensorError as e:
            raise CheckpointError(f"contexts = {str(path)!r} can't be used: {e}") from None
        if not {"contexts", "null"} <= names:
            raise CheckpointError(
                f"contexts = {str(path)!r} has {', '.join(sorted(names))}; wanted are contexts (N, L, D) and null (L, D)"
            )
        self.rows, self.null = self.file.get_slice("contexts"), self.file.get_tensor("null").float()
        if self.rows.get_shape()[1:] != list(self.null.shape):
            raise CheckpointError(
                f"contexts = {str(path)!r}: contexts {self.rows.get_shape()} and null {list(self.null.shape)} do not go together"
            )

    def __len__(self):
        return self.rows.get_shape()[0]

    def __getitem__(self, part: slice) -> Tensor:
        return self.rows[part].float()

    def prompts(self, n: int) -> "Contexts":
        "The fixed sequence of prompts, at least n of them."
        if n > len(self):
            raise ParameterError(
                f"num_samples = {n}: {self.path} has {len(self)} prompts; encode more, or ask for at most as many images"
            )
        return self


def open_contexts(
    path,  # a file of safetensors, or a folder of chapter 08
) -> tuple:  # (object with `prompts` and `null`, sum)
    "Encoded prompts and the sum of what they are read from."
    if not Path(path).is_dir():
        return Contexts(path), sha256_file(Path(path))
    return TextStore(path), sha256_file(Path(path) / "index.json")  # which has the sums of all files


def class_counts(
    exp: Experiment,
    root,  # an experiment with classes, the folder of the data sets
) -> np.ndarray:  # training images of each class, or None where they can't be counted
    "How often each class of ImageNet occurs in training; the images are listed, not read."
    from uvit_repro.data.folders import imagenet_files, imagenet_folder

    try:
        files, names, _ = imagenet_files(imagenet_folder(root), exp.data.num_classes)
    except FileNotFoundError:
        return None
    return np.bincount(np.searchsorted(names, [c for c, _ in files]), minlength=len(names))


@dataclass(frozen=True)
class ReleasedExperiment(Experiment):
    "An experiment whose weights come from a file and not from training."

    files: tuple = ()  # pairs (what it is, sha256): checkpoint, autoencoder, contexts, class counts

    @property
    def run_id(self) -> str:
        return f"released-{'-'.join(run_id(self).split('-')[:-2])}-{digest(sorted(self.files))}"


def released_settings(
    sd: dict,
    name: str = None,  # the weights, and which of the ten they are; None: found from the shapes
    exp: Experiment = None,  # for a file that is none of the ten: how it is to be sampled and measured
    **overrides,  # any field by its flat name
) -> Experiment:  # checked against the weights
    "How a file is evaluated: the released settings of its kind, or those of a given experiment."
    if exp is None:
        if name is not None and name not in CONFIGS:
            raise ParameterError(
                f"name = {name!r}: the ten are {', '.join(map(repr, CONFIGS))}; for another file give its experiment"
            )
        name = name or identify(sd)
        exp = CONFIGS[name]
    check_shape(sd, exp, name or "of this experiment")
    exp = with_overrides(
        exp,
        **{
            "curve_steps": (),
            "loss_steps": (),
            **overrides,
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
        },
    )
    if exp.train.precision == "fp16" and pick_device(exp.execution.device).type == "cpu":
        exp = with_overrides(exp, precision="fp32")  # half precision is for GPUs
    check_sampler(exp.sampling.sampler, exp.sampling.nfe, Diffusion(exp.diffusion).process)
    return exp


AUTOENCODER = {
    "autoencoder": "uvit_repro.data.autoencoder:load_autoencoder"
}  # chapter 07, resolved when used: (name or path, folder of the data sets, device) -> .decode, .sha256


def open_decoder(
    exp: Experiment,
    autoencoder,
    root,
    device,  # latent experiment; weights given by path, or None: by the name in `decoder`; folder of the data sets
) -> tuple:  # function from scaled latents to pixels, shape of an image, sum of the weights
    "The decoder of a latent model. Raises before anything is sampled when its weights are absent or of another geometry."
    ae = resolve_name(AUTOENCODER, "autoencoder")(
        str(autoencoder or exp.sampling.decoder), root, device
    )
    if ae.latent_chans != exp.data.in_chans:
        raise ParameterError(
            f"autoencoder {ae.name}: its latents have {ae.latent_chans} channels, the model's have {exp.data.in_chans}"
        )
    side, scale = exp.data.img_size * ae.factor, exp.data.latent_scale
    return (
        (lambda z, decoder="": ae.decode(z.float() / scale)),
        (ae.image_chans, side, side),
        ae.sha256,
    )


def stand_in(
    exp: Experiment,
    why: str,
    shape: tuple,
    counts=None,  # in place of whose data; why they are not open; of an image; training images of each class
) -> Data:  # without a single image
    "What stands for a data set that is not at hand: enough to sample, nothing to compare with."
    labels = (
        torch.zeros(0, dtype=torch.long)
        if counts is None
        else torch.repeat_interleave(
            torch.arange(len(counts)), torch.from_numpy(np.asarray(counts))
        )
    )
    return Data(
        exp.data.dataset,
        None,
        labels,
        torch.empty((0, *shape), dtype=torch.uint8),
        torch.zeros(0, dtype=torch.long),
        exp.data.num_classes,
        [str(i) for i in range(exp.data.num_classes)],
        "",
        [f"data set not open: {exp.data.dataset} ({why})"],
    )


def open_released(
    exp: Experiment,
    files: dict,  # settings; sums of the files so far, by what they are
    autoencoder=None,
    contexts=None,  # paths, or None
) -> tuple:  # (ReleasedExperiment, Data)
    "Everything that sampling and measuring need besides the weights, checked before the first image."
    ref, root, device = (
        exp.execution.reference,
        data_folder(exp.execution.data_root),
        pick_device(exp.execution.device),
    )
    if ref:
        exp = replace(
            exp,
            evaluation=replace(
                exp.evaluation, reference_sha256=read_reference(ref, exp.evaluation.features).sha256
            ),
        )
    kind, C, decode, shape, counts = (
        exp.data.dataset,
        exp.data.num_classes,
        None,
        (exp.data.in_chans, exp.data.img_size, exp.data.img_size),
        None,
    )
    if exp.sampling.decoder or autoencoder:
        decode, shape, files["autoencoder"] = open_decoder(exp, autoencoder, root, device)
    if exp.sampling.labels == "frequency" and kind == "imagenet64":
        counts = class_counts(exp, root)
    try:
        if kind == "imagenet64" and ref:
            raise FileNotFoundError(
                "the reference statistics stand for its images"
            )  # 138 GB need not be read for FID
        exp, data = open_data(exp)
    except FileNotFoundError as e:
        data = stand_in(exp, str(e).splitlines()[0].split(". ")[0], shape, counts)
    if exp.sampling.labels == "frequency":
        if not len(data):
            exp = with_overrides(exp, labels="uniform")
            data.notes.append(
                f"labels: uniform instead of by frequency ({kind} is not here to count its classes)"
            )
        else:
            files["class counts"] = digest(data.train_labels.bincount(minlength=C).tolist(), 64)
    if decode:
        data = replace(
            data,
            decode=decode,
            test_images=data.test_images
            if data.shape == shape
            else torch.empty((0, *shape), dtype=torch.uint8),
        )
    if contexts:
        texts, files["contexts"] = open_contexts(contexts)
        data = replace(data, texts=texts)
    if exp.model.condition == "text" and data.texts is None:
        raise FileNotFoundError(
            f"{kind} is not at hand, and a text model needs its prompts encoded: give contexts = PATH (chapter 08 writes one), or the data set itself: {data.notes[0].partition('(')[2][:-1]}"
        )
    if data.texts is not None:
        data.texts.prompts(exp.evaluation.num_samples)
    return ReleasedExperiment(
        **{f: getattr(exp, f) for f in Experiment.__dataclass_fields__},
        files=tuple(sorted(files.items())),
    ), data


def released_network(
    sd: dict,
    exp: Experiment,  # weights, settings
) -> tuple:  # (network on its device, diffusion)
    "The network of a file, ready to be evaluated."
    device = pick_device(exp.execution.device)
    return evaluated_network(
        load_official(
            sd, exp.model.num_heads, exp.data.text_tokens if exp.model.condition == "text" else None
        ),
        exp,
        device,
    )


def _unfinished(exp: Experiment, data: Data, folder: Path, info: dict) -> bool:
    "Whether the measurement is missing, or was made without something that is there now."
    step, n = exp.train.n_steps, exp.evaluation.num_samples
    said = info.get("evaluations", {}).get(eid := eval_id(exp, step, n), {})
    return (
        info.get("status") != "ok"
        or not _has(folder, eid)
        or (not said.get("features_found", True) and feature_status(exp.evaluation.features)[0])
        or said.get("images", 0) < len(data.test_images)
    )


def evaluate_released(
    path,  # a released file, or one of the same format
    name: str = None,  # which of the ten, a key of CONFIGS; None: found from its shapes
    num_samples: int = None,  # images; None: as released
    out_dir=None,  # folder of runs; None: results/runs
    reference=None,  # npz with mu and sigma, the statistics FID is measured against
    data_root="",  # folder of the data sets
    autoencoder=None,  # latent models: weights by path; None: as the configuration's `decoder` names them
    contexts=None,  # text models: encoded prompts, see `open_contexts`; None: those of the data set
    sample_batch: int = None,
    device: str = None,  # images at a time; where to compute
    exp: Experiment = None,  # settings of a file that is none of the ten
    say=print,
    chapter="04d",
    paper_ref="",  # progress; noted beside each measurement
    **overrides,  # any further field by its flat name: nfe, sampler, cfg_scale, sample_seed
) -> Run:  # finished
    "Sample and measure a released checkpoint with its own settings. What is done is not done again."
    sd, path = load_tensors(path), Path(path)
    settings = {
        "num_samples": num_samples,
        "reference": str(reference) if reference else None,
        "data_root": str(data_root) if data_root else None,
        "sample_batch": sample_batch,
        "device": device,
    }
    command = typed_command(
        path,
        dict(name=name, out_dir=out_dir, autoencoder=autoencoder, contexts=contexts, **settings),
        overrides,
        exp is not None,
    )
    exp = released_settings(sd, name, exp, **settings, **overrides)
    exp, data = open_released(exp, {"checkpoint": sha256_file(path)}, autoencoder, contexts)
    checkpoint = {"file": path.name, "bytes": path.stat().st_size, "model": name_of(exp)}
    return _evaluate(
        sd,
        exp,
        data,
        runs_root(out_dir) / exp.run_id,
        say,
        {"chapter": chapter, "paper_ref": paper_ref or ("README" if checkpoint["model"] else "")},
        checkpoint,
        command,
    )


def name_of(exp: Experiment) -> str:
    "Which of the ten an experiment's weights are, or ``."
    return next((n for n, e in CONFIGS.items() if shape_of(e) == shape_of(exp)), "")


def typed_command(
    path: Path,
    given: dict,
    overrides: dict,
    own: bool,  # of `evaluate_released`; own: with an experiment
) -> str:
    "The command that repeats an evaluation."
    words = ["python -m uvit_repro.runs.released", shlex.quote(str(path))] + (
        ["--experiment run.json"] if own else []
    )
    words += [
        f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in given.items() if v is not None
    ]
    return " ".join(
        words + [f"--set {k}={shlex.quote(str(v))}" for k, v in overrides.items() if v is not None]
    )


def _evaluate(
    sd: dict,
    exp: Experiment,
    data: Data,
    folder: Path,
    say,
    where: dict,
    checkpoint: dict,
    command: str,
) -> Run:
    "Sample, measure, record; a failure is recorded and raised."
    device = pick_device(exp.execution.device)
    team = join_processes(exp.execution.processes, device)
    lead = team.rank == 0
    with run_lock(folder, say) if lead else contextlib.nullcontext():
        if lead:
            sweep_unfinished(folder)
        info, todo = team.first(
            lambda: (i := _read_info(folder), _unfinished(exp, data, folder, i))
        )
        if not todo:
            return Run(folder, exp, info, fresh=False)
        if lead and data.notes:
            summary(data.notes)
        if (
            lead
            and exp.evaluation.features != "none"
            and not (found := feature_status(exp.evaluation.features))[0]
        ):
            say(f"its distances will be not run: {found[1]}")
        keep, n = (
            (lambda: write_json(folder / "run.json", info) if lead else None),
            exp.evaluation.num_samples,
        )
        changed = [
            list(d) for d in deviations(exp) if d[0] not in ("curve_steps", "loss_steps")
        ]  # those are about training
        info.update(
            run_id=exp.run_id,
            status="running",
            experiment=exp.to_dict(),
            command=command,
            deviations=changed,
            checkpoint=checkpoint,
            files=dict(exp.files),
            reference={
                "file": Path(exp.execution.reference).name,
                "sha256": exp.evaluation.reference_sha256,
            }
            if exp.execution.reference
            else None,
        )
        info.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        info.setdefault("evaluations", {})
        with recorded(info, keep, [eval_id(exp, exp.train.n_steps, n)]):
            if lead:
                info["certificate"] = cached_certificate(device)
            info.update(
                conditions=conditions(device),
                data={
                    "name": content_name(exp.data)[0],
                    "sha256": data.sha256,
                    "train": len(data),
                    "held_out": len(data.test_images),
                    "notes": data.notes[:50],
                },
            )
            entry = measure_samples(
                exp,
                data,
                folder,
                exp.train.n_steps,
                n,
                say,
                team,
                network=lambda: released_network(sd, exp),
                **where,
            )
            for e in entry.values():
                e["images"] = len(data.test_images)
            info["evaluations"].update(entry)
            if lead:
                keep_picture(exp, data, folder, n)
        return Run(folder, exp, info, fresh=True)


EXAMPLES = """examples:
  python -m uvit_repro.runs.released cifar10_uvit_small.pth --reference fid_stats_cifar10_train_pytorch.npz
  python -m uvit_repro.runs.released imagenet256_uvit_huge.pth --num-samples 1000 --sample-batch 50 --autoencoder stable-diffusion/autoencoder_kl_ema.pth
  python -m uvit_repro.runs.released imagenet256_uvit_huge.pth --reference fid_stats_imagenet256_guided_diffusion.npz --set nfe=20 --set cfg_scale=1
  python -m uvit_repro.runs.released mine.pth --experiment results/runs/NAME/run.json --num-samples 1000
  torchrun --nproc_per_node 8 -m uvit_repro.runs.released imagenet512_uvit_large.pth --reference fid_stats_imagenet512_guided_diffusion.npz"""


def make_parser():
    "The arguments of the command."
    import argparse

    ap = argparse.ArgumentParser(
        prog="python -m uvit_repro.runs.released",
        description="Sample and measure a released U-ViT checkpoint with its own settings; the same command goes on where it stopped.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ap.add_argument("checkpoint", help=f"a released file ({SOURCE}), or one of the same format")
    ap.add_argument(
        "--name",
        help="which of the ten it is, as in 'ImageNet 256x256 U-ViT-H/2' (default: found from its shapes)",
    )
    ap.add_argument(
        "--experiment",
        metavar="JSON",
        help="settings of a file that is none of the ten: run.json of a run",
    )
    ap.add_argument("--num-samples", type=int, help="images (default: 50,000, for MS-COCO 30,000)")
    ap.add_argument(
        "--reference",
        metavar="NPZ",
        help="statistics for FID: mu and sigma (default: those of the training images, where they are)",
    )
    ap.add_argument(
        "--autoencoder",
        metavar="PATH",
        help="latent models: weights of the autoencoder (default: where chapter 07 looks for them)",
    )
    ap.add_argument(
        "--contexts",
        metavar="PATH",
        help="text models: encoded prompts, a file or a folder of chapter 08 (default: those of the data set)",
    )
    ap.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of the data sets (default: UVIT_DATA, else data/ in the project)",
    )
    ap.add_argument("--out-dir", metavar="DIR", help="folder of runs (default: results/runs)")
    ap.add_argument("--sample-batch", type=int, help="images at a time (default: 500)")
    ap.add_argument("--device", help="auto, cpu, cuda, cuda:1")
    ap.add_argument(
        "--set",
        dest="fields",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="change a setting: nfe=20, sampler=ddim, cfg_scale=1, sample_seed=1, precision=bf16; may be repeated",
    )
    return ap


def report_lines(run: Run) -> list[str]:
    "What a person wants to see of an evaluation."
    at = eval_id(run.exp, run.exp.train.n_steps, run.exp.evaluation.num_samples)
    rows = run.measurements().query("eval_id == @at").to_dict("records")
    s, e = run.exp.sampling, run.exp.evaluation
    lines = [
        f"{run.folder}",
        f"{s.sampler}, {s.nfe} evaluations, guidance {s.cfg_scale}, labels {s.labels}, {e.num_samples} images",
    ]
    lines += [
        f"{r['metric']:28s} {r['value']:.5g}   ({r['num_samples']:.0f} images)"
        for r in rows
        if r["status"] == "ok"
    ]
    why = {}
    for r in rows:
        if r["status"] != "ok":
            why.setdefault(r["note"], []).append(r["metric"])
    lines += [f"not run: {', '.join(names)}\n    {reason}" for reason, names in why.items()]
    if name := name_of(run.exp):
        from uvit_repro.paper.numbers import load_paper

        dataset, _, method = name.rpartition(" U-ViT")
        fid = load_paper("README", dataset, "FID")
        lines.append(
            f"{'README, same file':28s} {fid[fid.method == 'U-ViT' + method].value.item()}   (FID, {CONFIGS[name].evaluation.num_samples} images, released settings)"
        )
    return lines


def main(
    argv: list = None,  # arguments; None: of the process
) -> int:  # exit code
    "`python -m uvit_repro.runs.released PATH`: 0 done, 1 failed, 2 a request that can't be carried out."
    ap = make_parser()
    a = vars(ap.parse_args(argv))
    fields = {}
    for f in a.pop("fields"):
        k, eq, v = f.partition("=")
        if not eq:
            ap.error(f"--set {f}: expected FIELD=VALUE")
        try:
            fields[k] = ast.literal_eval(v)
        except (ValueError, SyntaxError):
            fields[k] = v
    try:
        path, job = a.pop("checkpoint"), a.pop("experiment")
        exp = from_dict(json.loads(Path(job).read_text())["experiment"]) if job else None
        run = evaluate_released(
            path, exp=exp, say=lambda line: print(line, flush=True), **a, **fields
        )
    except (ParameterError, FileNotFoundError, CheckpointError) as e:
        print(f"uvit_repro.runs.released: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as e:
        print(f"failed: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(report_lines(run)))
    return 0


if __name__ == "__main__" and "get_ipython" not in globals():
    sys.exit(main())
