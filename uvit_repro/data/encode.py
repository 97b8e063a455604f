"""Images through an autoencoder once, into a store; what `uvit-repro encode` does."""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from uvit_repro.config import DataConfig, ParameterError, data_root
from uvit_repro.data.autoencoder import Autoencoder, load_autoencoder
from uvit_repro.data.clip import load_clip
from uvit_repro.data.coco import (
    CAPTIONS,
    LATENTS,
    N_PROMPTS,
    Coco,
    Texts,
    encode_texts,
    evaluation_prompts,
    read_captions,
)
from uvit_repro.data.fetch import how_to_get
from uvit_repro.data.files import printable
from uvit_repro.data.folders import Listing, find_imagenet64, list_folder, notes_on
from uvit_repro.data.images import Data, locate
from uvit_repro.data.latent_sets import LatentStore
from uvit_repro.data.npz import load_npz
from uvit_repro.data.store import Encoding, Store, write_store
from uvit_repro.runs.devices import pick_device


@dataclass(frozen=True)
class Source:
    "Images to be encoded."

    name: str
    key: str  # changes with what is read
    count: int  # images, or files of which damaged ones are left out
    shape: tuple  # of an image, (C, H, W)
    read: Callable  # (first, end) -> uint8 (n, C, H, W), and labels, checksums and notes of them
    class_names: list
    held_out: int = 0  # how many of the last images are held out
    sha256: str = ""  # of the content; empty: that of the files, once they are read


def data_source(
    data: Data,  # in memory: training images, then held-out ones
    prepare=lambda images: images,  # function of the pixels
) -> Source:
    "The images of an opened data set, in their own order."
    images = prepare(torch.cat([data.train_images, data.test_images]))
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()

    def read(a: int, b: int) -> tuple:
        return images[a:b], {"labels": labels[a:b]}

    about = data.name, data.sha256, len(images), tuple(images.shape[1:]), read
    return Source(*about, data.class_names, len(data.test_labels), data.sha256)


def file_source(
    listing: Listing,
    name: str,
    held_out: int = 0,  # how many of the last files are held out
    again: str = "",  # how to get the files again; empty: damaged ones are left out
) -> Source:
    "Image files, in the order of their names."
    classes = sorted({c for c, _ in listing.files} - {""})
    number = {c: i for i, c in enumerate(classes)}

    def read(a: int, b: int) -> tuple:
        images, files = listing.read(a, b)
        good = [f for f in files if not f.problem]
        if len(good) < len(files) and (again or not good):
            bad = next(f for f in files if f.problem)
            raise ValueError(f"{printable(bad.name)} can't be read ({bad.problem}). {again}")
        labels, sums = [number.get(f.label, 0) for f in good], [f.sha256 for f in good]
        return images, {"labels": labels, "sums": sums, "notes": notes_on(files)}

    shape = listing.in_chans, listing.img_size, listing.img_size
    return Source(name, listing.key(), len(listing.files), shape, read, classes, held_out)


def _moments(images, autoencoder: Autoencoder, how: Encoding) -> np.ndarray:
    "Moments of images and of their mirrors, (B, 1 or 2, 2c, h, w)."
    views = [images, images.flip(-1)] if how.mirror else [images]
    m = torch.stack([autoencoder.encode(v).cpu() for v in views], 1).numpy()
    with np.errstate(over="ignore"):
        out = m.astype(how.dtype)
    if not np.isfinite(out).all():
        text = f"moments not finite as {how.dtype} (largest {np.nanmax(np.abs(m)):.3g})"
        raise FloatingPointError(f"{text}: use dtype = float32, and check the autoencoder")
    return out


def shard_sums(moments: np.ndarray) -> list[float]:
    "Number of latents, sum of their means, sum of their expected squares."
    c = moments.shape[2] // 2
    mean = moments[:, :, :c].astype(np.float64)
    var = np.exp(np.clip(moments[:, :, c:].astype(np.float64), -30, 20))
    return [mean.size, float(mean.sum()), float((mean**2 + var).sum())]


def latent_statistics(sums: list) -> dict:
    "Standard deviation of drawn latents, and the factor that makes it 1."
    n, total, squares = np.sum(sums, 0)
    std = float(np.sqrt(squares / n - (total / n) ** 2))
    return {"drawn_std": std, "scale": 1 / std if std > 0 else None}


def encode_images(
    source: Source,
    autoencoder: Autoencoder,  # it computes where it lies
    path,  # the store's folder
    how: Encoding,
    say=print,  # progress and damage
) -> LatentStore:
    "Encode images once. The same call resumes, repairs, or finds that all is done."
    C, H, W = source.shape
    if autoencoder.image_chans != C or H != W or H % autoencoder.factor:
        text = f"squares of {autoencoder.image_chans} channel(s)"
        text += f", the side a multiple of {autoencoder.factor}"
        raise ParameterError(f"images {C}x{H}x{W}: this autoencoder takes {text}")
    encoder = {k: getattr(autoencoder, k) for k in ("sha256", "encoder_sha256")}
    job = {
        **asdict(how),
        "kind": "latents",
        "count": source.count,
        "source": source.key,
        "autoencoder": encoder,
        "shape": [2 * autoencoder.latent_chans, H // autoencoder.factor, W // autoencoder.factor],
        "image_shape": [C, H, W],
    }

    def make_shard(a: int, b: int) -> tuple[dict, dict]:
        images, record = source.read(a, b)
        moments = np.concatenate([_moments(x, autoencoder, how) for x in images.split(how.batch)])
        return {"moments": moments}, record | {"statistics": shard_sums(moments)}

    def make_index(records: list[dict]) -> tuple[dict, dict]:
        kept = [[v for r in records for v in r.get(k, ())] for k in ("labels", "sums", "notes")]
        content = json.dumps([source.class_names, *kept[:2]]).encode()
        sha256 = source.sha256 or hashlib.sha256(content).hexdigest()
        index = {
            **job,
            "source": {"name": source.name, "held_out": source.held_out, "sha256": sha256},
            "autoencoder": {"name": autoencoder.name, **encoder},
            "class_names": source.class_names,
            "notes": kept[2][:1000],
            "statistics": latent_statistics([r["statistics"] for r in records]),
        }
        return {"labels": np.array(kept[0], np.int64)}, index

    write_store(path, job, make_shard, make_index, say)
    return LatentStore(path)


def open_source(
    name: str,  # imagenet | mscoco | folder:PATH | npz:PATH
    img_size: int | None,  # side of the prepared images; mscoco has its own
    root: Path,  # the folder of the data sets
    channels: int,  # of the images
) -> Source:
    "What `encode images --source` names."
    kind = name.partition(":")[0]
    if kind not in ("imagenet", "mscoco", "folder", "npz"):
        raise ParameterError(
            f"--source {name!r}: known are imagenet, mscoco, folder:PATH, npz:PATH"
        )
    if kind == "mscoco":
        coco = Coco(root)
        return file_source(coco.listing(), coco.name, coco.held_out, how_to_get("coco", root))
    if not img_size:
        raise ParameterError(f"--source {name} needs --img-size, as in --img-size 256")
    if kind == "npz":
        cfg = DataConfig(dataset=name, img_size=img_size, in_chans=channels)
        return data_source(load_npz(cfg, root))
    base = find_imagenet64(root) if kind == "imagenet" else locate(name, root)
    return file_source(list_folder(base, img_size, channels), name)


def _add_common(parser: argparse.ArgumentParser, batch: int):
    "Options of everything that encodes."
    add = parser.add_argument
    add("--dtype", default="float32", choices=("float32", "float16"), help="numbers in the files")
    add("--batch", type=int, default=batch, help=f"encoded at once (default: {batch})")
    add("--shard-rows", type=int, default=1024, help="rows of a file (default: 1024)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--data-root", default="", help="folder of the data sets (default: UVIT_DATA, or data/)")


def add_encode_arguments(parser: argparse.ArgumentParser):
    "The arguments of `uvit-repro encode`."
    sub = parser.add_subparsers(dest="encode_what", metavar="WHAT", required=True)
    images = sub.add_parser("images", help="images through an autoencoder")
    add = images.add_argument
    add("--source", required=True, help="imagenet, mscoco, folder:PATH or npz:PATH")
    add("--img-size", type=int, help="side of the prepared images")
    add("--autoencoder", default="original", help="original, ema, digits or a path")
    add("--out", help="the store's folder (default for imagenet and mscoco: under the data root)")
    add("--no-mirror", action="store_true", help="leave the mirror images out")
    _add_common(images, 32)
    captions = sub.add_parser("captions", help="the captions and prompts of MS-COCO")
    prompts = sub.add_parser("prompts", help="prompts alone, for released checkpoints")
    prompts.add_argument("--out", required=True, help="the store's folder")
    chosen = prompts.add_mutually_exclusive_group()
    chosen.add_argument("--file", help="one's own, one a line (default: those of MS-COCO)")
    chosen.add_argument("--count", type=int, default=N_PROMPTS, help="the first of MS-COCO")
    for p in (captions, prompts):
        p.add_argument("--clip", default="", help="weights of CLIP ViT-L/14")
        _add_common(p, 64)
    verify = sub.add_parser("verify", help="read a store and compare all checksums")
    verify.add_argument("path", help="the store's folder")


def _encode_images(args, root: Path, how: Encoding, say) -> Store:
    default = {"mscoco": LATENTS, "imagenet": f"imagenet{args.img_size}_latents"}
    if not args.out and args.source not in default:
        raise ParameterError("--out is missing: the folder of the new store")
    ae = load_autoencoder(args.autoencoder, root, pick_device(args.device))
    source = open_source(args.source, args.img_size, root, ae.image_chans)
    mirror = not args.no_mirror and args.source != "mscoco"  # the paper flips no image of MS-COCO
    out = args.out or root / default[args.source]
    return encode_images(source, ae, out, replace(how, mirror=mirror), say)


def _texts(args, root: Path) -> Texts:
    "The captions and prompts that the command line names."
    if args.encode_what == "captions":
        return Coco(root).texts()
    if args.file:
        lines = Path(args.file).read_text(encoding="utf-8").splitlines()
        prompts = [t for t in lines if t.strip()]
    else:
        val = read_captions(root, "val")
        prompts = [val[i].captions[k] for i, k in evaluation_prompts(val, args.count)]
    if not prompts:
        raise ParameterError(f"{args.file or '--count'}: no prompt in it")
    return Texts([], prompts)


def run_encode(
    args: argparse.Namespace,  # of `add_encode_arguments`
    say=print,  # progress
) -> dict:  # folder, rows, and what was read or found
    "Encode images or captions into a store, or verify one."
    if args.encode_what == "verify":
        found = Store(args.path).verify()
        say("whole: {rows:,} rows, {files} files, {bytes:,} bytes".format(**found))
        return {"folder": str(args.path), **found}
    root, found, text = data_root(args.data_root), {}, ""
    how = Encoding(args.dtype, args.batch, args.shard_rows)
    if args.encode_what == "images":
        store = _encode_images(args, root, how, say)
        found = store.index["statistics"]
        text = f", latent_scale for unit variance {found['scale']:.5g}"
    else:
        path = args.out if args.encode_what == "prompts" else root / CAPTIONS
        texts, clip = _texts(args, root), load_clip(root, args.clip, pick_device(args.device))
        store = encode_texts(path, texts, clip, how, say)
    say(f"{printable(store.path)}: {len(store):,} rows{text}")
    return {"folder": str(store.path), "rows": len(store), **found}
