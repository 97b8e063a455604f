"""A released file is an experiment whose network is given: recognised by the shapes of its tensors,
sampled and measured with the settings of its authors."""

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
from uvit_repro.data.folders import imagenet_files, imagenet_folder
from uvit_repro.data.images import Data, open_data
from uvit_repro.diffusion import Diffusion
from uvit_repro.runs.devices import join_processes, pick_device, thread_count
from uvit_repro.runs.evaluate import RunContext, measurements_of
from uvit_repro.runs.experiment import Run, perform, with_reference
from uvit_repro.runs.records import read_info, runs_root
from uvit_repro.sample import check_sampler
from uvit_repro.uvit import load_official, official_shape

SOURCE = "https://github.com/baofff/U-ViT#pretrained-models"
SIZES = "patch_size embed_dim depth mlp_ratio qkv_bias mlp_time_embed conv skip".split()  # noqa: SIM905
NEEDED = (
    "patch_embed.proj.weight",
    "pos_embed",
    "mid_block.attn.qkv.weight",
    "decoder_pred.weight",
)


def shape_of(
    exp: Experiment,  # any, of a U-ViT
) -> dict:
    "The sizes that a network of this experiment leaves in its weights."
    m, d = exp.model, exp.data
    classes = d.num_classes + (exp.train.p_uncond > 0)
    return {
        "img_size": d.img_size,
        "in_chans": d.in_chans,
        **{k: getattr(m, k) for k in SIZES},
        "num_classes": classes if m.condition == "class" else None,
        "text": (d.text_tokens, d.text_dim) if m.condition == "text" else None,
    }


def shape_of_file(
    sd: dict,  # a released state dictionary
    text_tokens: int = 77,  # of a text model
) -> dict:  # as `shape_of`
    "The sizes that a state dictionary shows. Raises `CheckpointError` when it is not a U-ViT's."
    if not isinstance(sd, dict):
        raise CheckpointError(f"not a U-ViT checkpoint: it is a {type(sd).__name__}")
    for name in NEEDED:
        if not isinstance(sd.get(name), Tensor):
            has = ", ".join(map(str, list(sd)[:4]))
            raise CheckpointError(f"not a U-ViT checkpoint: it has no {name} (it has {has}, ...)")
    width, chans, patch, _ = sd["patch_embed.proj.weight"].shape
    s = {**official_shape(sd, text_tokens), "embed_dim": width, "patch_size": patch}
    text = (s["num_clip_token"], s["clip_dim"]) if s.get("clip_dim") else None
    found = {k: s[k] for k in ("img_size", *SIZES, "num_classes")}
    return {**found, "in_chans": chans, "text": text}


def differences(found: dict, wanted: dict) -> str:
    "What a file has instead of what an experiment needs."
    other = [k for k in wanted if found[k] != wanted[k]]
    return ", ".join(f"{k} = {found[k]} instead of {wanted[k]}" for k in other)


def identify(
    sd: dict,  # state dictionary of a released file
) -> str:  # its key in CONFIGS
    "Which of the ten released models these weights are. Raises `CheckpointError` when none."
    found = shape_of_file(sd)
    apart = {name: differences(found, shape_of(exp)) for name, exp in CONFIGS.items()}
    for name, diff in apart.items():
        if not diff:
            return name
    nearest = sorted(apart, key=lambda n: apart[n].count(" instead of "))[:2]
    raise CheckpointError(
        "none of the ten released models has these sizes. The nearest: "
        + "; ".join(f"{name}: {apart[name]}" for name in nearest)
        + ". For a file of your own give its experiment (exp = ..., --experiment run.json)"
    )


class Contexts:
    "Encoded prompts in a file, read as they are needed; takes the place of a data set's `texts`."

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"contexts = {str(path)!r}: no such file")
        try:
            self.file = safe_open(str(path), "pt")
            self.rows = self.file.get_slice("contexts")
            self.null = self.file.get_tensor("null").float()
        except SafetensorError as e:
            raise CheckpointError(
                f"contexts = {str(path)!r} can't be used ({e}); it should hold contexts (N, L, D), "
                "one for each image, and null (L, D), the empty text"
            ) from None
        if self.rows.get_shape()[1:] != list(self.null.shape):
            raise CheckpointError(
                f"contexts = {str(path)!r}: contexts {self.rows.get_shape()} and null "
                f"{list(self.null.shape)} do not go together"
            )

    def __len__(self):
        return self.rows.get_shape()[0]

    def __getitem__(self, part: slice) -> Tensor:
        return self.rows[part].float()

    def prompts(self, n: int) -> "Contexts":
        "The fixed sequence of prompts, at least n of them."
        if n > len(self):
            raise ParameterError(
                f"num_samples = {n}: {self.path} has {len(self)} prompts; encode more, or ask "
                "for at most as many images"
            )
        return self


def open_contexts(
    path,  # a file of safetensors, or a folder of chapter 08
) -> tuple:  # (object with `prompts` and `null`, checksum)
    "Encoded prompts, and the checksum of what they are read from."
    if not Path(path).is_dir():
        return Contexts(path), sha256_file(Path(path))
    return TextStore(path), sha256_file(Path(path) / "index.json")


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
    name: str | None = None,  # which of the ten; None: found from the shapes
    exp: Experiment | None = None,  # for another file: how it is to be sampled and measured
    **overrides,  # any field by its flat name
) -> Experiment:  # checked against the weights
    "The released settings of a file's kind, or those of a given experiment."
    if exp is None:
        if name is not None and name not in CONFIGS:
            raise ParameterError(f"name = {name!r}: allowed are {', '.join(map(repr, CONFIGS))}")
        name = name or identify(sd)
        exp = CONFIGS[name]
    diff = differences(shape_of_file(sd, exp.data.text_tokens), shape_of(exp))
    if diff:
        raise CheckpointError(f"the file is not {name or 'of this experiment'}: {diff}")
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
    root = data_root(exp.execution.data_root)
    if exp.sampling.labels != "frequency" or exp.data.dataset != "imagenet64":
        return None
    try:
        files, names, _ = imagenet_files(imagenet_folder(root), exp.data.num_classes)
    except FileNotFoundError:
        return None
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[c] for c, _ in files]).bincount(minlength=len(names))


def stand_in(exp: Experiment, why: str, shape: tuple, counts: Tensor | None) -> Data:
    "Replacement for a data set that is not here: enough to sample, nothing to compare with."
    none = torch.zeros(0, dtype=torch.long)
    classes = exp.data.num_classes
    labels = none if counts is None else torch.arange(len(counts)).repeat_interleave(counts)
    names, note = [str(i) for i in range(classes)], f"data set not open: {exp.data.dataset} ({why})"
    images = torch.empty((0, *shape), dtype=torch.uint8)
    return Data(exp.data.dataset, None, labels, images, none, classes, names, "", [note])


def open_released(
    exp: Experiment,  # settings
    files: dict,  # checksums of the files so far, by what they are
    autoencoder=None,  # path, or None: as the configuration's `decoder` names it
    contexts=None,  # path, or None: those of the data set
) -> tuple[ReleasedExperiment, Data]:
    "Everything besides the weights, checked before the first image."
    exp, side = with_reference(exp), exp.data.img_size
    decode, shape, counts = None, (exp.data.in_chans, side, side), class_counts(exp)
    if exp.sampling.decoder or autoencoder:
        decode, shape, files["autoencoder"] = open_decoder(exp, autoencoder)
    try:
        if exp.data.dataset == "imagenet64" and exp.execution.reference:
            raise FileNotFoundError("the reference statistics stand for its images")
        exp, data = open_data(exp)
    except FileNotFoundError as e:
        data = stand_in(exp, str(e).splitlines()[0].split(". ")[0], shape, counts)
    if exp.sampling.labels == "frequency" and len(data):
        counts = data.train_labels.bincount(minlength=exp.data.num_classes)
        files["class counts"] = digest(counts.tolist(), 64)
    elif exp.sampling.labels == "frequency":
        exp = with_overrides(exp, labels="uniform")
        data.notes.append("labels: uniform instead of by frequency (no images to count classes)")
    if decode:
        empty = torch.empty((0, *shape), dtype=torch.uint8)
        held_out = data.test_images if data.shape == shape else empty
        data = replace(data, decode=decode, test_images=held_out)
    data = with_texts(exp, data, files, contexts)
    fields = {f: getattr(exp, f) for f in Experiment.__dataclass_fields__}
    return ReleasedExperiment(**fields, files=tuple(sorted(files.items()))), data


def with_texts(exp: Experiment, data: Data, files: dict, contexts) -> Data:
    "The data with the prompts of a text model."
    if contexts:
        texts, files["contexts"] = open_contexts(contexts)
        data = replace(data, texts=texts)
    if exp.model.condition == "text" and data.texts is None:
        raise FileNotFoundError(
            f"{exp.data.dataset} is not here, and a text model needs its prompts encoded: give "
            "contexts = PATH (chapter 08 writes one), or the data set"
        )
    if data.texts is not None:
        data.texts.prompts(exp.evaluation.num_samples)
    return data


def evaluate_released(
    path,  # a released file, or one of the same format
    name: str | None = None,  # which of the ten, a key of CONFIGS; None: found from its shapes
    exp: Experiment | None = None,  # settings of a file that is none of the ten
    out_dir=None,  # folder of runs; None: results/runs
    autoencoder=None,  # latent models: weights by path
    contexts=None,  # text models: encoded prompts, see `open_contexts`
    say=print,  # progress lines
    **overrides,  # any field by its flat name: num_samples, reference, data_root, device, nfe
) -> Run:  # finished
    "Sample and measure a released checkpoint with its own settings; completed work is cached."
    path, sd = Path(path), load_tensors(path)
    given = {"name": name, "out_dir": out_dir, "autoencoder": autoencoder, "contexts": contexts}
    overrides = {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}
    foreign = exp is not None
    exp = released_settings(sd, name, exp, **overrides)
    exp, data = open_released(exp, {"checkpoint": sha256_file(path)}, autoencoder, contexts)
    folder = runs_root(out_dir) / exp.run_id
    model = next((n for n, e in CONFIGS.items() if shape_of(e) == shape_of(exp)), "")
    reference = exp.execution.reference
    about = {
        "command": typed_command(path, given, overrides, folder / "run.json" if foreign else None),
        "deviations": [
            list(d) for d in deviations(exp) if d[0] not in ("curve_steps", "loss_steps")
        ],
        "checkpoint": {"file": path.name, "bytes": path.stat().st_size, "model": model},
        "files": dict(exp.files),
        "reference": {"file": Path(reference).name, "sha256": exp.evaluation.reference_sha256}
        if reference
        else None,
    }
    tokens = exp.data.text_tokens if exp.model.condition == "text" else None
    before = read_info(folder)
    eid = measurements_of(exp)[-1].eval_id
    known = (
        before.get("data", {}).get("held_out", 0) if eid in before.get("evaluations", {}) else None
    )
    with thread_count(exp.execution.threads):
        ctx = RunContext(
            exp,
            data,
            folder,
            say,
            join_processes(exp.execution.processes, pick_device(exp.execution.device)),
            load=lambda: load_official(sd, exp.model.num_heads, tokens),
            where={"chapter": "released", "paper_ref": "README" if model else ""},
            about=about,
            again=known is not None and known < len(data.test_images),
        )
        return perform(ctx)


def typed_command(path: Path, given: dict, overrides: dict, run_json: Path | None) -> str:
    "The command that repeats an evaluation."
    words = ["python", "-m", "uvit_repro.runs.released", str(path)]
    if run_json:  # the record itself holds the settings
        words += ["--experiment", str(run_json)]
    for name, value in given.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in overrides.items():
        if value is not None:
            words += ["--set", f"{name}={value}"]
    return shlex.join(words)


def report_lines(run: Run) -> list[str]:
    "What a person wants to see of an evaluation."
    table = run.measurements()
    table = table[table.eval_id == measurements_of(run.exp)[-1].eval_id]
    done, missing = table[table.status == "ok"], table[table.status != "ok"]
    lines = [str(run.folder)]
    lines += [
        f"{r.metric:28s} {r.value:.5g}   ({r.num_samples:.0f} images)" for r in done.itertuples()
    ]
    lines += [f"not run: {r.metric} ({r.note})" for r in missing.itertuples()]
    name = run.info["checkpoint"]["model"]
    if name:
        from uvit_repro.paper.numbers import load_paper

        dataset, _, method = name.rpartition(" U-ViT")
        fid = load_paper("README", dataset, "FID")
        value = fid[fid.method == "U-ViT" + method].value.item()
        samples = CONFIGS[name].evaluation.num_samples
        lines.append(f"{'README, same file':28s} {value}   (FID, {samples} images)")
    return lines


def make_parser() -> argparse.ArgumentParser:
    "The arguments of the command."
    parser = argparse.ArgumentParser(
        prog="python -m uvit_repro.runs.released",
        description="Sample and measure a released U-ViT checkpoint; rerun to resume.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help=f"a released file ({SOURCE}), or one of the same format")
    add("--name", help="which of the ten it is (default: found from its shapes)")
    add("--experiment", metavar="JSON", help="run.json with the settings of another file")
    add("--autoencoder", metavar="PATH", help="latent models: weights of the autoencoder")
    add("--contexts", metavar="PATH", help="text models: encoded prompts of chapter 08")
    add("--out-dir", metavar="DIR", help="folder of runs (default: results/runs)")
    for option in ("reference", "data-root", "num-samples", "sample-batch", "device"):
        add(f"--{option}", help=f"the field {option.replace('-', '_')} of the experiment")
    add("--set", dest="fields", metavar="FIELD=VALUE", action="append", default=[])
    return parser


def parse_fields(args: dict) -> dict:
    "Arguments of the command as those of `evaluate_released`."
    for field in args.pop("fields"):
        key, equals, value = field.partition("=")
        if not equals:
            raise ParameterError(f"--set {field}: expected FIELD=VALUE")
        try:
            args[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            args[key] = value
    for key in ("num_samples", "sample_batch"):
        if args[key] is not None:
            args[key] = int(args[key])
    path = args.pop("experiment")
    if path:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        args["exp"] = from_dict(record["experiment"])
    return args


def main(
    argv: list | None = None,  # arguments; None: of the process
) -> int:  # 0 done, 1 failed, 2 a request that can't be carried out
    "`python -m uvit_repro.runs.released PATH`."
    try:
        args = parse_fields(vars(make_parser().parse_args(argv)))
        path = args.pop("checkpoint")
        run = evaluate_released(path, say=lambda line: print(line, flush=True), **args)
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
