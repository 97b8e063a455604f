"""A released file is an experiment whose network is given: recognised by the shapes of its tensors,
sampled and measured with its authors' settings."""

import argparse
import ast
import json
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from uvit_repro.config import (
    CONFIGS,
    Experiment,
    ParameterError,
    data_root,
    deviations,
    digest,
    from_dict,
    run_id,
    with_overrides,
)
from uvit_repro.data.autoencoder import load_autoencoder
from uvit_repro.data.coco import TextStore
from uvit_repro.data.files import CheckpointError, load_tensors, sha256_file
from uvit_repro.data.folders import find_imagenet64, imagenet_files
from uvit_repro.data.images import Data, open_data
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.devices import join_processes, pick_device, thread_count
from uvit_repro.runs.evaluate import RunContext, measurements_of
from uvit_repro.runs.experiment import Run, perform, with_reference
from uvit_repro.runs.records import read_info, runs_root
from uvit_repro.sample import check_sampler
from uvit_repro.uvit import load_official, official_shape

SOURCE = "https://github.com/baofff/U-ViT#pretrained-models"
FROM_MODEL = ("patch_size", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "mlp_time_embed")
NEEDED = (
    "patch_embed.proj.weight",
    "pos_embed",
    "mid_block.attn.qkv.weight",
    "decoder_pred.weight",
)


def shape_of(exp: Experiment) -> dict:
    "The sizes that a U-ViT of this experiment leaves in its weights."
    m, d = exp.model, exp.data
    classes = d.num_classes + (exp.train.p_uncond > 0)
    return {
        "img_size": d.img_size,
        "in_chans": d.in_chans,
        **{k: getattr(m, k) for k in (*FROM_MODEL, "conv", "skip")},
        "num_classes": classes if m.condition == "class" else None,
        "text": (d.text_tokens, d.text_dim) if m.condition == "text" else None,
    }


def shape_of_file(sd: dict, text_tokens: int = 77) -> dict:
    "The sizes that weights show, as `shape_of`. Raises `CheckpointError` when not a U-ViT's."
    if not isinstance(sd, dict):
        raise CheckpointError(f"not a U-ViT checkpoint: it is a {type(sd).__name__}")
    for name in NEEDED:
        if not isinstance(sd.get(name), Tensor):
            has = ", ".join(map(str, list(sd)[:4]))
            raise CheckpointError(f"not a U-ViT checkpoint: it has no {name} (it has {has}, ...)")
    width, chans, patch, _ = sd["patch_embed.proj.weight"].shape
    s = official_shape(sd, text_tokens)
    text = (s.pop("num_clip_token"), s.pop("clip_dim")) if "clip_dim" in s else None
    return {**s, "in_chans": chans, "embed_dim": width, "patch_size": patch, "text": text}


def differences(found: dict, wanted: dict) -> list[str]:
    "What a file has instead of what an experiment needs."
    other = (k for k in wanted if found[k] != wanted[k])
    return [f"{k} = {found[k]} instead of {wanted[k]}" for k in other]


def identify(
    sd: dict,  # state dictionary of a released file
) -> str:  # its key in CONFIGS
    "Which of the ten released models these weights are. Raises `CheckpointError` when none."
    found = shape_of_file(sd)
    apart = {name: differences(found, shape_of(exp)) for name, exp in CONFIGS.items()}
    nearest = min(apart, key=lambda name: len(apart[name]))
    if apart[nearest]:
        raise CheckpointError(
            f"none of the ten released models has these sizes; the nearest is {nearest}, but "
            f"{', '.join(apart[nearest])}. For a file of your own give its experiment "
            "(exp = ..., --experiment run.json)"
        )
    return nearest


@dataclass(frozen=True)
class ReleasedExperiment(Experiment):
    "An experiment whose weights come from a file and not from training."

    files: tuple = ()  # pairs (what it is, sha256): checkpoint, autoencoder, contexts, class counts

    @property
    def run_id(self) -> str:
        "Its sizes, and a hash of what it was made from."
        return f"released-{'-'.join(run_id(self).split('-')[:-2])}-{digest(sorted(self.files))}"


def released_settings(
    sd: dict,  # the weights
    exp: Experiment | None = None,  # how to sample and measure them; None: as one of the ten
    **overrides,  # any field by its flat name
) -> Experiment:  # checked against the weights
    "The released settings of a file's kind, or those of a given experiment."
    exp = exp or CONFIGS[identify(sd)]
    found = differences(shape_of_file(sd, exp.data.text_tokens), shape_of(exp))
    if found:
        raise CheckpointError(f"the file is not of this experiment: {', '.join(found)}")
    fixed = {"curve_steps": (), "loss_steps": (), "processes": int(os.environ.get("WORLD_SIZE", 1))}
    exp = with_overrides(exp, **{**overrides, **fixed})
    if exp.train.precision == "fp16" and pick_device(exp.execution.device).type == "cpu":
        exp = with_overrides(exp, precision="fp32")  # half precision is for GPUs
    check_sampler(exp.sampling.sampler, exp.sampling.nfe, Diffusion(exp.diffusion).process)
    return exp


def open_decoder(exp: Experiment, autoencoder) -> tuple:  # function, shape of an image, checksum
    "The decoder of a latent model. Raises when its weights are absent or of another geometry."
    root, device = data_root(exp.execution.data_root), pick_device(exp.execution.device)
    ae = load_autoencoder(str(autoencoder or exp.sampling.decoder), root, device)
    if ae.latent_chans != exp.data.in_chans:
        raise ParameterError(
            f"autoencoder {ae.name}: its latents have {ae.latent_chans} channels, the model's "
            f"have {exp.data.in_chans}"
        )
    side, scale = exp.data.img_size * ae.factor, exp.data.latent_scale

    def decode(z: Tensor, decoder: str = "") -> Tensor:
        return ae.decode(z.float() / scale)

    return decode, (ae.image_chans, side, side), ae.sha256


def class_counts(exp: Experiment) -> Tensor | None:
    "Training images of each class of ImageNet 64x64; listed, not read."
    if exp.sampling.labels != "frequency" or exp.data.dataset != "imagenet64":
        return None
    try:
        folder = find_imagenet64(data_root(exp.execution.data_root))
        files, names, _ = imagenet_files(folder, exp.data.num_classes)
    except FileNotFoundError:
        return None
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[c] for c, _ in files]).bincount(minlength=len(names))


def stand_in(exp: Experiment, why: str, shape: tuple) -> Data:
    "Replacement for a data set that is not here: enough to sample, nothing to compare with."
    classes, counts = exp.data.num_classes, class_counts(exp)
    none, images = torch.zeros(0, dtype=torch.long), torch.empty((0, *shape), dtype=torch.uint8)
    labels = none if counts is None else torch.arange(len(counts)).repeat_interleave(counts)
    names, note = [str(i) for i in range(classes)], f"data set not open: {exp.data.dataset} ({why})"
    return Data(exp.data.dataset, None, labels, images, none, classes, names, "", [note])


def open_released(
    exp: Experiment,  # settings
    files: dict,  # checksums of the files so far, by what they are
    autoencoder=None,  # path, or None: as the configuration's `decoder` names it
    contexts=None,  # folder of encoded prompts, or None: those of the data set
) -> tuple[ReleasedExperiment, Data]:
    "Everything besides the weights, checked before the first image."
    exp, side = with_reference(exp), exp.data.img_size
    decode, shape = None, (exp.data.in_chans, side, side)
    if exp.sampling.decoder or autoencoder:
        decode, shape, files["autoencoder"] = open_decoder(exp, autoencoder)
    try:
        if exp.data.dataset == "imagenet64" and exp.execution.reference:
            raise FileNotFoundError("the reference statistics stand for its images")
        exp, data = open_data(exp)
    except FileNotFoundError as e:
        data = stand_in(exp, str(e).splitlines()[0].split(". ")[0], shape)
    if exp.sampling.labels == "frequency" and len(data):
        counts = data.train_labels.bincount(minlength=exp.data.num_classes)
        files["class counts"] = digest(counts.tolist(), 64)
    elif exp.sampling.labels == "frequency":
        exp = with_overrides(exp, labels="uniform")
        data.notes.append("labels: uniform instead of by frequency (no images to count classes)")
    if decode:
        data = replace(data, decode=decode)
        if data.shape != shape:
            data = replace(data, test_images=torch.empty((0, *shape), dtype=torch.uint8))
    data = with_texts(exp, data, files, contexts)
    fields = {f: getattr(exp, f) for f in Experiment.__dataclass_fields__}
    return ReleasedExperiment(**fields, files=tuple(sorted(files.items()))), data


def with_texts(exp: Experiment, data: Data, files: dict, contexts) -> Data:
    "The data with the prompts of a text model."
    if contexts:
        data = replace(data, texts=TextStore(contexts))
        files["contexts"] = sha256_file(Path(contexts) / "index.json")
    if exp.model.condition == "text" and data.texts is None:
        raise FileNotFoundError(
            f"{exp.data.dataset} is not here, and a text model needs its prompts encoded: give "
            "contexts = DIR, made by uvit-repro encode prompts, or the data set"
        )
    if data.texts is not None:
        data.texts.prompts(exp.evaluation.num_samples)
    return data


def evaluate_released(
    path,  # a released file, or one of the same format
    exp: Experiment | None = None,  # settings of a file that is none of the ten
    out_dir=None,  # folder of runs; None: results/runs
    autoencoder=None,  # latent models: weights by path
    contexts=None,  # text models: folder of encoded prompts
    say=print,  # progress lines
    chapter: str = "released",  # noted beside each measurement
    paper_ref: str = "",  # likewise
    **overrides,  # any field by its flat name: num_samples, reference, data_root, device, nfe
) -> Run:  # finished
    "Sample and measure a released checkpoint with its own settings; completed work is cached."
    path, sd, own_settings = Path(path), load_tensors(path), exp is not None
    overrides = {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}
    exp = released_settings(sd, exp, **overrides)
    exp, data = open_released(exp, {"checkpoint": sha256_file(path)}, autoencoder, contexts)
    folder, reference = runs_root(out_dir) / exp.run_id, exp.execution.reference
    options = {"out_dir": out_dir, "autoencoder": autoencoder, "contexts": contexts, **overrides}
    if own_settings:  # the record itself holds them
        options["experiment"] = folder / "run.json"
    words = [w for k, v in options.items() if v is not None for w in (flag(k), str(v))]
    about = {
        "command": shlex.join(["python", "-m", "uvit_repro.runs.released", str(path), *words]),
        "deviations": [
            list(d) for d in deviations(exp) if d[0] not in ("curve_steps", "loss_steps")
        ],
        "checkpoint": {"file": path.name, "bytes": path.stat().st_size},
        "files": dict(exp.files),
        "reference": None,
    }
    if reference:
        sha256 = exp.evaluation.reference_sha256
        about["reference"] = {"file": Path(reference).name, "sha256": sha256}
    tokens = exp.data.text_tokens if exp.model.condition == "text" else None
    with thread_count(exp.execution.threads):
        ctx = RunContext(
            exp,
            data,
            folder,
            say,
            join_processes(exp.execution.processes, pick_device(exp.execution.device)),
            load=lambda: load_official(sd, exp.model.num_heads, tokens),
            where={"chapter": chapter, "paper_ref": paper_ref},
            about=about,
            # Measured without its data set, which is here now.
            again=read_info(folder).get("data", {}).get("held_out", 0) < len(data.test_images),
        )
        return perform(ctx)


def flag(name: str) -> str:
    "A setting as the command line writes it."
    return f"--{name.replace('_', '-')}"


def parse(argv: list | None) -> tuple[str, dict]:  # the checkpoint; arguments of the evaluation
    "Read the command line: a file, and settings as --FIELD VALUE."
    parser = argparse.ArgumentParser(
        prog="python -m uvit_repro.runs.released",
        usage="%(prog)s CHECKPOINT [--FIELD VALUE ...]",
        description="Sample and measure a released U-ViT checkpoint; rerun to resume.",
        epilog="Fields: autoencoder, contexts, experiment (run.json of your own file), out-dir, "
        "and any field of the experiment, as reference, num-samples, data-root, nfe, device.",
    )
    parser.add_argument("checkpoint", help=f"a released file ({SOURCE}) or one of its format")
    args, rest = parser.parse_known_args(argv)
    flags, values = rest[::2], rest[1::2]
    if len(flags) != len(values) or not all(f.startswith("--") for f in flags):
        raise ParameterError(f"{' '.join(rest)}: expected --FIELD VALUE")
    given = dict(zip((f[2:].replace("-", "_") for f in flags), values, strict=True))
    for name, value in given.items():
        try:
            given[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            continue
    if "experiment" in given:
        record = json.loads(Path(given.pop("experiment")).read_text(encoding="utf-8"))
        given["exp"] = from_dict(record["experiment"])
    return args.checkpoint, given


def report_lines(run: Run) -> list[str]:
    "What a person wants to see of an evaluation."
    lines, table = [str(run.folder)], run.measurements()
    table = table[table.eval_id == measurements_of(run.exp)[-1].eval_id]
    for r in table.itertuples():
        value = f"{r.value:.5g} ({r.num_samples:.0f} images)"
        lines.append(f"{r.metric:28s} {value if r.status == 'ok' else f'not run: {r.note}'}")
    return lines


def main(
    argv: list | None = None,  # arguments; None: of the process
) -> int:  # 0 done, 1 failed, 2 a request that can't be carried out
    "`python -m uvit_repro.runs.released PATH`."
    try:
        path, given = parse(argv)
        run = evaluate_released(path, say=lambda line: print(line, flush=True), **given)
    except (ParameterError, FileNotFoundError, CheckpointError) as e:
        print(f"uvit_repro.runs.released: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; rerun to resume", file=sys.stderr)
        return 130
    except Exception as e:
        print(f"failed: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(report_lines(run)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
