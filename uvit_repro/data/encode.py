"""Images through an autoencoder once, into a store; what `uvit-repro encode` does."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import (
    DATASET_DEFAULTS,
    DATASETS,
    DataConfig,
    ParameterError,
    data_root,
    resolve_name,
)
from uvit_repro.data.autoencoder import Autoencoder, enlarge, load_autoencoder
from uvit_repro.data.clip import load_clip
from uvit_repro.data.coco import (
    N_PROMPTS,
    Coco,
    Texts,
    coco_paths,
    encode_texts,
    evaluation_prompts,
    read_captions,
)
from uvit_repro.data.files import printable
from uvit_repro.data.folders import imagenet_folder, load_folder
from uvit_repro.data.images import Data, read_ahead
from uvit_repro.data.latent_sets import LatentStore, Source
from uvit_repro.data.store import Store, write_store
from uvit_repro.runs.devices import pick_device


def data_source(
    data: Data,  # training images, then held-out ones
    prepare=lambda u8: u8,  # function of the pixels
    name: str = "",  # where they come from; empty: the data's own name
) -> Source:
    "The images of an opened data set, in their own order."
    n = len(data)

    def read(a: int, b: int) -> Tensor:
        cut = min(max(n, a), b)
        parts = [data.test_images[cut - n : b - n]] if b > cut else []
        if cut > a:
            whole = data.train_images is not None
            train = data.train_images[a:cut] if whole else data.stream.read_range(a, cut)
            parts.insert(0, train)
        return prepare(torch.cat(parts))

    if data.stream is not None:
        data.stream.strict = True  # a store holds what its checksum says
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    names, held = list(data.class_names), len(data.test_labels)
    return Source(name or data.name, data.sha256, labels, names, held, read, data.notes[:1000])


def _moments(images: Tensor, autoencoder: Autoencoder, dtype: str, mirror: bool) -> np.ndarray:
    "Moments of images and of their mirrors, (B, 1 or 2, 2c, h, w)."
    views = [images, images.flip(-1)] if mirror else [images]
    m = torch.stack([autoencoder.encode(v).cpu() for v in views], 1).numpy()
    with np.errstate(over="ignore"):
        out = m.astype(dtype)
    if not np.isfinite(out).all():
        text = f"moments not finite as {dtype} (largest {np.nanmax(np.abs(m)):.3g})"
        raise FloatingPointError(f"{text}: use dtype = float32, and check the autoencoder")
    return out


def shard_statistics(moments: np.ndarray) -> dict:
    "Sums per channel over rows, views and positions: means, their squares, variances."
    c = moments.shape[2] // 2
    mean = moments[:, :, :c].astype(np.float64)
    var = np.exp(np.clip(moments[:, :, c:].astype(np.float64), -30, 20))
    sums = {"mean": mean, "square": mean**2, "variance": var}
    sums = {k: a.sum((0, 1, 3, 4)).tolist() for k, a in sums.items()}
    return {"n": int(mean.size // max(c, 1)), **sums}


def merge_statistics(parts: list) -> dict:
    "Per channel: mean and deviation of the means, mean variance; of draws: deviation, factor to 1."
    n = max(sum(p["n"] for p in parts), 1)
    mean, square, var = (
        sum(np.array(p[k]) for p in parts) / n for k in ("mean", "square", "variance")
    )
    std = float(np.sqrt((square + var).mean() - mean.mean() ** 2))
    return {
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
        "variance": var.tolist(),
        "drawn_std": std,
        "scale": 1 / std if std > 0 else None,
    }


@dataclass(frozen=True)
class Encoding:
    "How a store is written."

    dtype: str = "float32"  # float32 | float16
    batch: int = 32  # images encoded at once: part of what decides the bits
    shard_rows: int = 4096  # images in a shard: what a kill can cost
    pixels: bool = False  # keep the pixels too
    mirror: bool = True  # encode each image's mirror as well


def encode_images(
    source: Source,
    autoencoder: Autoencoder,  # it computes where it lies
    path,  # the store's folder
    how: Encoding = Encoding(),
    say=print,  # progress and damage
) -> LatentStore:
    "Encode images once. The same call resumes, repairs, or finds that all is done."
    C, H, W = source.shape
    if autoencoder.image_chans != C or H != W or H % autoencoder.factor:
        text = f"squares of {autoencoder.image_chans} channel(s)"
        text += f", the side a multiple of {autoencoder.factor}"
        raise ParameterError(f"images {C}x{H}x{W}: this autoencoder takes {text}")
    encoder = {k: getattr(autoencoder, k) for k in ("sha256", "encoder_sha256")}
    images = {"sha256": source.sha256, "held_out": source.held_out}
    job = asdict(how) | {
        "kind": "latents",
        "count": len(source.labels),
        "source": images,
        "autoencoder": encoder,
        "shape": list(autoencoder.shape(H)),
        "image_shape": [C, H, W],
    }

    def encode(a: int, b: int, progress) -> tuple[dict, dict]:
        moments, kept = [], []
        bounds = ((i, min(i + how.batch, b)) for i in range(a, b, how.batch))
        for (first, end), u8 in read_ahead(lambda ab: source.read(*ab), bounds):
            moments.append(_moments(u8, autoencoder, how.dtype, how.mirror))
            kept += [u8.numpy()] if how.pixels else []
            progress(end - first)
        arrays = {"moments": np.concatenate(moments)}
        if how.pixels:
            arrays["pixels"] = np.concatenate(kept)
        return arrays, {"statistics": shard_statistics(arrays["moments"])}

    def finish(records: list[dict]) -> tuple[dict, dict]:
        statistics = merge_statistics([r["statistics"] for r in records])
        index = job | {
            "source": {"name": source.name, **images},
            "autoencoder": {"name": autoencoder.name, **encoder},
            "class_names": source.class_names,
            "notes": list(source.notes),
            "statistics": statistics,
        }
        return {"labels": np.array(source.labels, np.int64)}, index

    write_store(path, job, encode, finish, say)
    return LatentStore(path)


RELEASED_PROMPTS = (  # of the released training script, and of Figure 6
    "A green train is coming down the tracks.",
    "A group of skiers are preparing to ski down a mountain.",
    "A small kitchen with a low ceiling.",
    "A group of elephants walking in muddy water.",
    "A living area with a television and a table.",
    "A road with traffic lights, street lights and cars.",
    "A bus driving in a city area with traffic signs.",
    "A bus pulls over to the curb close to an intersection.",
    "A group of people are walking and one is holding an umbrella.",
    "A baseball player taking a swing at an incoming ball.",
    "A city street line with brick buildings and trees.",
    "A close up of a plate of broccoli and sauce.",
)


def open_source(
    name: str,  # imagenet | mscoco | folder:PATH | npz:PATH | a pixel data set by its name
    img_size: int | None,  # side of the prepared images, for imagenet and folders
    root: Path,  # the folder of the data sets
    channels: int,  # of the images
) -> Source:
    "What `encode images --source` names."
    kind = name.partition(":")[0]
    if kind == "mscoco":
        return Coco(root).source()
    dataset = f"folder:{imagenet_folder(root)}" if kind == "imagenet" else name
    if kind in ("imagenet", "folder"):
        if not img_size:
            raise ParameterError(f"--source {name} needs --img-size, as in --img-size 256")
        cfg = DataConfig(dataset=dataset, img_size=img_size, in_chans=channels)
        return data_source(load_folder(cfg, root), name=name)
    latent_or_text = ("latent_scale", "text_dim")
    pixels = [k for k, v in DATASET_DEFAULTS.items() if not any(f in v for f in latent_or_text)]
    if kind not in pixels:
        known = f"imagenet, mscoco, folder:PATH, npz:PATH, {', '.join(pixels)}"
        raise ParameterError(f"--source {name!r}: known are {known}")
    fields = {k: DATASET_DEFAULTS[kind][k] for k in ("img_size", "in_chans")}
    if kind == "npz":
        fields.update(img_size=img_size or fields["img_size"], in_chans=channels)
    data = resolve_name(DATASETS, kind)(DataConfig(dataset=name, **fields), root)
    return data_source(data, enlarge if kind == "digits" else lambda u8: u8, name)


def _add_common(parser: argparse.ArgumentParser, batch: int, shard_rows: int):
    "Options of everything that encodes."
    add = parser.add_argument
    add("--dtype", default="float32", choices=("float32", "float16"), help="numbers in the files")
    add("--batch", type=int, default=batch, help=f"encoded at once (default: {batch})")
    add("--shard-rows", type=int, default=shard_rows, help=f"in a file (default: {shard_rows})")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--data-root", default="", help="folder of the data sets (default: UVIT_DATA, or data/)")


def add_encode_arguments(parser: argparse.ArgumentParser):
    "The arguments of `uvit-repro encode`."
    sub = parser.add_subparsers(dest="encode_what", metavar="WHAT", required=True)
    images = sub.add_parser("images", help="images through an autoencoder")
    add = images.add_argument
    add("--source", required=True, help="imagenet, mscoco, folder:PATH, npz:PATH or a data set")
    add("--img-size", type=int, help="side of the prepared images")
    add("--autoencoder", default="original", help="original, ema, digits or a path")
    add("--out", help="the store's folder (default for imagenet and mscoco: under the data root)")
    add("--pixels", action="store_true", help="keep the pixels, for small sets")
    add("--no-mirror", action="store_true", help="leave the mirror images out")
    _add_common(images, 32, 4096)
    captions = sub.add_parser("captions", help="the captions and prompts of MS-COCO")
    prompts = sub.add_parser("prompts", help="prompts alone, for released checkpoints")
    prompts.add_argument("--out", required=True, help="the store's folder")
    chosen = prompts.add_mutually_exclusive_group()
    chosen.add_argument("--file", help="one's own, one a line (default: those of MS-COCO)")
    chosen.add_argument("--released", action="store_true", help="the twelve of Figure 6")
    chosen.add_argument("--count", type=int, default=N_PROMPTS, help="the first of MS-COCO")
    for p in (captions, prompts):
        p.add_argument("--clip", default="", help="weights of CLIP ViT-L/14")
        _add_common(p, 64, 1024)
    verify = sub.add_parser("verify", help="read a store and compare all checksums")
    verify.add_argument("path", help="the store's folder")


def _encode_images(args, root: Path, options: dict, say) -> Store:
    ae = load_autoencoder(args.autoencoder, root, pick_device(args.device))
    out = args.out
    if args.source == "mscoco":
        out = out or coco_paths(root)[0]
    elif args.source == "imagenet":
        out = out or root / f"imagenet{args.img_size}_latents"
    if not out:
        raise ParameterError("--out is missing: the folder of the new store")
    source = open_source(args.source, args.img_size, root, ae.image_chans)
    mirror = not args.no_mirror and args.source != "mscoco"  # the paper flips no image of MS-COCO
    how = Encoding(pixels=args.pixels, mirror=mirror, **options)
    return encode_images(source, ae, out, how, say)


def _texts(args, root: Path) -> Texts:
    "The captions and prompts that the command line names."
    if args.encode_what == "captions":
        return Coco(root).texts()
    if args.released:
        return Texts([], list(RELEASED_PROMPTS))
    if args.file:
        lines = Path(args.file).read_text(encoding="utf-8").splitlines()
        prompts = [t for t in lines if t.strip()]
    else:
        val = read_captions(root / "coco" / "annotations" / "captions_val2014.json")
        prompts = [val[i].captions[k] for i, k in evaluation_prompts(val, args.count)]
    if not prompts:
        raise ParameterError(f"{args.file or '--count'}: no prompt in it")
    return Texts([], prompts)


def run_encode(
    args: argparse.Namespace,  # of `add_encode_arguments`
    say=print,  # progress
) -> dict:  # folder, rows, and what was read or found
    "Do what `uvit-repro encode` was asked for."
    if args.encode_what == "verify":
        found = Store(args.path).verify(say)
        say("whole: {rows:,} rows, {files} files, {bytes:,} bytes".format(**found))
        return {"folder": str(args.path), **found}
    root = data_root(args.data_root)
    options = {k: getattr(args, k) for k in ("dtype", "batch", "shard_rows")}
    if args.encode_what == "images":
        store = _encode_images(args, root, options, say)
        found = {k: store.index["statistics"][k] for k in ("drawn_std", "scale")}
        text = f", latent_scale for unit variance {found['scale']:.5g}"
    else:
        texts, path, found, text = _texts(args, root), coco_paths(root)[1], {}, ""
        if args.encode_what == "prompts":
            path = args.out
        clip = load_clip(root, args.clip, pick_device(args.device))
        store = encode_texts(path, texts, clip, **options, say=say)
    say(f"{printable(store.path)}: {len(store):,} rows{text}")
    return {"folder": str(store.path), "rows": len(store), **found}
