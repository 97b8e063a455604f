"""What a run and a measurement are called: readable names with a hash of what was done."""

import dataclasses
import hashlib
import json

from uvit_repro.config.presets import CONTENT, PATHS, TABLE2

IDENTITY_SECTIONS = ("model", "data", "diffusion", "train")  # with the seed: the identity of a run
LATER_FIELDS = ("labels", "cfg_channels", "cfg_schedule", "cfg_power", "reference_sha256")
VARIANT_FIELDS = ("skip", "time", "conv", "patch_embed", "pos_embed", "mlp_ratio")


def digest(obj, n: int = 10) -> str:
    "The first n characters of the SHA-256 of an object's canonical JSON."
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:n]


def key_seed(*key) -> int:
    "A seed below 2**63 from anything with a stable repr: the run's seed, purpose, step, name."
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def content_name(data) -> tuple[str, str]:
    "The short name and the content of a `DataConfig`, whatever path the data were read from."
    content = data.data_sha256 or CONTENT.get(data.dataset, "")
    kind = data.dataset.partition(":")[0]
    name = next((n for n, sha in CONTENT.items() if sha == content), kind)
    if not content and name in PATHS:
        cure = "open it first with uvit_repro.data.images.open_data(exp)"
        raise ValueError(f"{data.dataset}: its content is not known yet; {cure}")
    return name, content or f"name:{name}"


def changed(section) -> dict:
    "The fields of a section that are not at their default."
    values = {f: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {f.name: value for f, value in values.items() if value != f.default}


def identifying(exp) -> dict:
    "What a run id hashes: settings of training off their defaults, content of the data, seed."
    parts = {name: changed(getattr(exp, name)) for name in IDENTITY_SECTIONS}
    parts["data"] = {k: v for k, v in parts["data"].items() if k not in ("dataset", "data_sha256")}
    parts["data"]["content"] = content_name(exp.data)[1]
    return {**{name: fields for name, fields in parts.items() if fields}, "seed": exp.seed}


def variant_name(model) -> str:
    "The choices of Figure 2 and options in which a `ModelConfig` departs, or `adopted`."
    text = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in changed(model).items()}
    parts = [f"{name}={text[name]}" for name in VARIANT_FIELDS if name in text]
    return ",".join([*parts, *filter(None, [model.options])]) or "adopted"


def size_name(model) -> str:
    "The row of Table 2 that a `ModelConfig` is, or its backbone with width and depth."
    for name, row in TABLE2.items() if model.model == "UViT" else ():
        if all(getattr(model, k) == v for k, v in row.items() if k != "conv"):
            return name
    return f"{model.model}-{model.embed_dim}x{model.depth}"


def run_id(exp) -> str:
    "Name and hash of the training experiment: the folder under results/runs."
    m = exp.model
    name = f"{content_name(exp.data)[0]}-{size_name(m)}-{m.patch_size}-{variant_name(m)}"
    slug = "".join(c if c.isalnum() else "-" for c in f"{name}-s{exp.seed}".lower())
    return f"{slug.replace('--', '-')}-{digest(identifying(exp))}"


def eval_id(
    exp,  # an `Experiment` with the sampling and evaluation of this measurement
    step: int,  # training step of the weights
    num_samples: int,  # images drawn; 0: the held-out loss, which needs none
) -> str:  # short name of one measurement of one run
    "Step, sampler, and a hash of sampling and evaluation without the settings of the curve."
    s, e = exp.sampling, exp.evaluation
    if not num_samples:
        what = {"weights": s.weights, "images": e.loss_images, "levels": e.loss_levels}
        return f"{step:07d}-loss-{digest(what, 8)}"
    what = {**dataclasses.asdict(s), "features": e.features, "num_samples": num_samples}
    what["reference_sha256"] = e.reference_sha256
    at_default = set(LATER_FIELDS) - set(changed(s)) - set(changed(e))  # older names have none
    what = {name: value for name, value in what.items() if name not in at_default}
    return f"{step:07d}-{s.sampler}{s.nfe}-{digest(what, 8)}"


def main_metric(exp) -> str:
    "The headline measure: FID with Inception; over other features a Frechet distance, not FID."
    features = exp.evaluation.features
    return "fid" if features == "inception" else f"fd_{features.removesuffix('_cifar10')}_test"
