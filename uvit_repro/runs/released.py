"""A released file is an experiment whose network is given: recognised by the shapes of its tensors,
sampled and measured with its authors' settings."""

import argparse
import ast
import contextlib
import json
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from uvit_repro import config
from uvit_repro.config import CONFIGS, PARAMETERS, Experiment, ParameterError, with_overrides
from uvit_repro.data.autoencoder import load_autoencoder
from uvit_repro.data.coco import TextStore
from uvit_repro.data.files import CheckpointError, load_tensors, sha256_file
from uvit_repro.data.images import Data, open_data
from uvit_repro.data.latent_sets import LatentDecoder
from uvit_repro.runs.counting import meta_model
from uvit_repro.runs.devices import pick_device, thread_count
from uvit_repro.runs.evaluate import RunContext, measurements_of
from uvit_repro.runs.experiment import Run, check_request, perform, with_reference
from uvit_repro.runs.records import runs_root
from uvit_repro.uvit import load_official, official_shape

SOURCE = "https://github.com/baofff/U-ViT#pretrained-models"
FILES = ("path", "experiment", "out_dir", "autoencoder", "contexts")  # arguments beside settings


def sizes(
    sd: dict,  # state dictionary
    text_tokens: int,  # of a text model
) -> dict:
    "The sizes that a U-ViT's weights show. Raises `CheckpointError` for other weights."
    try:
        width, chans, patch, _ = sd["patch_embed.proj.weight"].shape
        own = {"in_chans": chans, "embed_dim": width, "patch_size": patch}
        return {**official_shape(sd, text_tokens), **own}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        why = f"{type(e).__name__}: {e}"[:200]
        raise CheckpointError(f"not a U-ViT checkpoint ({why})") from None


def differences(sd: dict, exp: Experiment) -> list[str]:
    "What weights have instead of what an experiment needs."
    weights = sd, meta_model(exp).state_dict()
    found, wanted = (sizes(w, exp.data.text_tokens) for w in weights)
    other = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    return [f"{k} = {found.get(k)} instead of {wanted.get(k)}" for k in other]


def identify(
    sd: dict,  # state dictionary of a released file
) -> str:  # its key in CONFIGS
    "Which of the ten released models these weights are. Raises `CheckpointError` when none."
    apart = {name: differences(sd, exp) for name, exp in CONFIGS.items()}
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
        sizes = "-".join(config.run_id(self).split("-")[:-2])
        return f"released-{sizes}-{config.digest(sorted(self.files))}"


def released_settings(
    sd: dict,  # the weights
    exp: Experiment | None = None,  # how to sample and measure them; None: as one of the ten
    **overrides,  # any field by its flat name
) -> Experiment:  # checked against the weights
    "The released settings of a file's kind, or those of a given experiment."
    exp = exp or CONFIGS[identify(sd)]
    if found := differences(sd, exp):
        raise CheckpointError(f"the file is not of this experiment: {', '.join(found)}")
    fixed = {"curve_steps": (), "loss_steps": (), "processes": int(os.environ.get("WORLD_SIZE", 1))}
    exp = with_overrides(exp, **{**overrides, **fixed})
    if exp.train.precision == "fp16" and pick_device(exp.execution.device).type == "cpu":
        exp = with_overrides(exp, precision="fp32")  # half precision is for GPUs
    return exp


def without_data(exp: Experiment, why: FileNotFoundError) -> Data:
    "What a data set that is not here leaves: enough to sample, nothing to compare with."
    d, none = exp.data, torch.zeros(0, dtype=torch.long)
    names = [str(i) for i in range(d.num_classes)]
    notes = [f"data set not open: {d.dataset} ({str(why).splitlines()[0].split('. ')[0]})"]
    images = torch.empty((0, d.in_chans, d.img_size, d.img_size), dtype=torch.uint8)
    return Data(d.dataset, None, none, images, none, d.num_classes, names, "", notes)


def with_decoder(exp: Experiment, data: Data, autoencoder) -> tuple[Data, str]:
    "The data with the decoder of a latent model, and the checksum of its weights."
    root, device = config.data_root(exp.execution.data_root), pick_device(exp.execution.device)
    ae = load_autoencoder(str(autoencoder or exp.sampling.decoder), root, device)
    if ae.latent_chans != exp.data.in_chans:
        raise ParameterError(
            f"autoencoder {ae.name}: its latents have {ae.latent_chans} channels, the model's "
            f"have {exp.data.in_chans}"
        )
    shape = (ae.image_chans, *[exp.data.img_size * ae.factor] * 2)
    if data.shape != shape:
        data = replace(data, test_images=torch.empty((0, *shape), dtype=torch.uint8))
    return replace(data, decode=LatentDecoder(lambda *_: ae, exp.data.latent_scale)), ae.sha256


def open_released(exp: Experiment, files: dict, autoencoder=None, contexts=None) -> tuple:
    "The `ReleasedExperiment` and its data; `files` receives the checksums of what else is read."
    exp = with_reference(exp)
    try:
        exp, data = open_data(exp)
    except FileNotFoundError as e:
        data = without_data(exp, e)
    if exp.sampling.decoder or autoencoder:
        data, files["autoencoder"] = with_decoder(exp, data, autoencoder)
    if exp.sampling.labels == "frequency" and len(data):
        counts = data.train_labels.bincount(minlength=exp.data.num_classes)
        files["class counts"] = config.digest(counts.tolist(), 64)
    elif exp.sampling.labels == "frequency":
        exp = with_overrides(exp, labels="uniform")
        data.notes.append("labels: uniform instead of by frequency (no images to count classes)")
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
    fields = {f: getattr(exp, f) for f in Experiment.__dataclass_fields__}
    return ReleasedExperiment(**fields, files=tuple(sorted(files.items()))), data


def evaluate_released(
    path,  # a released file, or one of the same format
    exp: Experiment | None = None,  # settings of a file that is none of the ten
    out_dir=None,  # folder of runs; None: results/runs
    autoencoder=None,  # latent models: weights by path
    contexts=None,  # text models: folder of encoded prompts
    say=print,  # progress lines
    where: dict | None = None,  # chapter and paper_ref, noted beside each measurement
    **overrides,  # any field by its flat name: num_samples, reference, data_root, device, nfe
) -> Run:  # finished
    "Sample and measure a released checkpoint with its own settings; completed work is cached."
    path, sd, own_settings = Path(path), load_tensors(path), exp is not None
    overrides = {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}
    exp = released_settings(sd, exp, **overrides)
    exp, data = open_released(exp, {"checkpoint": sha256_file(path)}, autoencoder, contexts)
    check_request(exp, data)
    folder, reference = runs_root(out_dir) / exp.run_id, exp.execution.reference
    options = {"out_dir": out_dir, "autoencoder": autoencoder, "contexts": contexts, **overrides}
    if own_settings:  # the record itself holds them
        options["experiment"] = folder / "run.json"
    given = {f"--{name.replace('_', '-')}": v for name, v in options.items() if v is not None}
    words = [str(word) for pair in given.items() for word in pair]
    sha256 = exp.evaluation.reference_sha256
    about = {
        "command": shlex.join(["uvit-repro", "released", str(path), *words]),
        "deviations": [list(d) for d in config.deviations(exp) if not d[0].endswith("_steps")],
        "checkpoint": {"file": path.name, "bytes": path.stat().st_size},
        "files": dict(exp.files),
        "reference": {"file": Path(reference).name, "sha256": sha256} if reference else None,
    }

    def load() -> torch.nn.Module:
        tokens = exp.data.text_tokens if exp.model.condition == "text" else None
        return load_official(sd, exp.model.num_heads, tokens)

    where = where or {"chapter": "released"}
    with thread_count(exp.execution.threads):
        ctx = RunContext(exp, data, folder, say, load=load, where=where, about=about)
        return perform(ctx)


# ---------------------------------------------------------------- the command


def literal(text: str):
    "A number, a tuple or a truth value as Python writes them; anything else is a text."
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def add_released_arguments(parser: argparse.ArgumentParser) -> None:
    "A file, and settings as --FIELD VALUE."
    parser.usage = "%(prog)s CHECKPOINT [--FIELD VALUE ...]"
    parser.add_argument("path", help=f"a released file ({SOURCE}) or one of its format")
    parser.add_argument("--experiment", help="run.json of your own file")
    for name in (*FILES[2:], *PARAMETERS):
        parser.add_argument(f"--{name.replace('_', '-')}", type=literal)


def run_released(args: argparse.Namespace, say) -> dict:  # for `--json`
    "Sample and measure a released U-ViT checkpoint; rerun to resume."
    given = {k: v for k, v in vars(args).items() if k in (*FILES, *PARAMETERS) and v is not None}
    if "experiment" in given:
        record = json.loads(Path(given.pop("experiment")).read_text(encoding="utf-8"))
        given["exp"] = config.from_dict(record["experiment"])
    run = evaluate_released(say=say, **given)
    table = run.measurements()
    rows = table[table.eval_id == measurements_of(run.exp)[-1].eval_id]
    if os.environ.get("RANK", "0") == "0":
        say(run.folder)
        say(rows[["metric", "value", "num_samples", "status", "note"]].to_string(index=False))
    return {"folder": str(run.folder), "eval_id": rows.eval_id.iloc[0]}
