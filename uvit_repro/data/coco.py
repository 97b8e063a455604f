"""MS-COCO 2014: captions, evaluation prompts, images; captions encoded once into a store."""

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import DataConfig, ParameterError, key_seed
from uvit_repro.data.clip import ClipText
from uvit_repro.data.fetch import missing
from uvit_repro.data.files import printable
from uvit_repro.data.folders import Listing
from uvit_repro.data.images import Data
from uvit_repro.data.latent_sets import LatentStore, from_store
from uvit_repro.data.store import Encoding, Store, StoreError, find_store, write_store

N_PROMPTS, N_HELD_OUT = 30_000, 5_000
LATENTS, CAPTIONS = "mscoco256_latents", "mscoco256_clip"  # folders of the two stores


class Captioned(NamedTuple):
    "One image of MS-COCO."

    id: int
    file: str
    captions: tuple[str, ...]


def read_captions(
    root,  # the folder of the data sets
    split: str,  # train | val
) -> list[Captioned]:  # by id
    "Images and their captions. Raises `FileNotFoundError` or `ValueError` naming what is wrong."
    path = Path(root) / "coco" / "annotations" / f"captions_{split}2014.json"
    shown = printable(path)
    if not path.is_file():
        raise missing("coco", root, f"{shown} is not there")
    try:
        d = json.loads(path.read_bytes())
        found = {i["id"]: (i["file_name"], []) for i in d["images"]}
        for a in d["annotations"]:
            found[a["image_id"]][1].append(a["caption"])
    except (ValueError, KeyError, TypeError) as e:
        text = f"{shown} is not a caption file of MS-COCO ({type(e).__name__}: {e})"
        raise ValueError(f"{text}; wanted are images and annotations, as JSON") from None
    bare = [i for i, (_, captions) in found.items() if not captions]
    if bare:
        raise ValueError(f"{shown}: {len(bare)} image(s) without caption, first id {bare[0]}")
    return [Captioned(i, found[i][0], tuple(found[i][1])) for i in sorted(found)]


def evaluation_prompts(
    images: list[Captioned],  # the validation images
    n: int,  # how many
) -> list:  # (position of the image, number of its caption)
    "The fixed prompts: shuffled passes over the images, one random caption each time."
    out = []
    for p in range(-(-n // len(images))):
        g = torch.Generator().manual_seed(key_seed("mscoco prompts", p))
        order = torch.randperm(len(images), generator=g).tolist()
        chance = torch.rand(len(images), generator=g).tolist()
        out += [(i, int(u * len(images[i].captions))) for i, u in zip(order, chance, strict=True)]
    return out[:n]


def coco_crop(im, side: int) -> np.ndarray:
    "Centre square, then Lanczos."
    from PIL import Image

    c = min(im.size)
    x, y = (im.size[0] - c) // 2, (im.size[1] - c) // 2
    return np.asarray(im.crop((x, y, x + c, y + c)).resize((side, side), Image.LANCZOS))


class Texts(NamedTuple):
    "What a text model is trained on and asked for."

    captions: list  # lists of str: the captions of each training image
    prompts: list  # str, evaluation prompts
    source: str = ""  # the images they belong to


class Coco:
    "MS-COCO 2014 on disk."

    def __init__(
        self,
        root,  # the folder of the data sets
        held_out=N_HELD_OUT,  # images of the first prompts
        prompts=N_PROMPTS,  # evaluation prompts
    ):
        self.base = Path(root) / "coco"
        self.train, self.val = read_captions(root, "train"), read_captions(root, "val")
        self.prompts = evaluation_prompts(self.val, prompts)
        self.held_out = min(held_out, len(self.val), prompts)
        said = [(c.id, c.captions) for c in self.train]
        said += [(self.val[i].id, k, self.val[i].captions[k]) for i, k in self.prompts]
        self.name = f"mscoco 2014, captions {hashlib.sha256(repr(said).encode()).hexdigest()}"

    def texts(self) -> Texts:
        "The captions of the training images, and the prompts."
        prompts = [self.val[i].captions[k] for i, k in self.prompts]
        return Texts([list(c.captions) for c in self.train], prompts, self.name)

    def listing(self, side=256) -> Listing:
        "The training images, then the held-out ones."
        files = [self.base / "train2014" / c.file for c in self.train]
        held = [self.val[i].file for i, _ in self.prompts[: self.held_out]]
        files += [self.base / "val2014" / f for f in held]
        return Listing(self.base, [("", f) for f in files], side, crop=coco_crop)


class Prompts:
    "A sequence of encoded prompts: `len`, and slices (b - a, L, D), made when they are asked for."

    def __init__(self, n: int, read):  # read is a function of (first, end)
        self.n, self.read = n, read

    def __len__(self):
        return self.n

    def __getitem__(self, part: slice) -> Tensor:
        return self.read(*part.indices(self.n)[:2])


class TextStore(Store):
    """Encoded texts: the empty one, the captions of each training image in turn, the evaluation
    prompts; held-out image i is that of prompt i."""

    kind = "captions"

    def __init__(self, path):
        super().__init__(path)
        i = self.index
        text = f"{i['texts']} {i['encoder']} {tuple(i['shape'])} {i['dtype']}"
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.counts = torch.tensor(i["counts"], dtype=torch.long)
        self.first = 1 + self.counts.cumsum(0) - self.counts
        self.start = 1 + int(self.counts.sum())  # row of the first prompt
        self.null = self.encoded([0])[0].float()

    @cached_property
    def captions(self) -> list[str]:
        "All texts, row by row."
        return [t for record in self.records() for t in record["captions"]]

    def encoded(self, numbers) -> Tensor:
        "Contexts (B, L, D) of some rows, in the store's number format."
        return torch.from_numpy(self.rows("contexts", numbers))

    def numbers(self, index: Tensor, u: Tensor) -> Tensor:
        "Rows of caption floor(u K) of training images."
        return self.first[index] + (u.double() * self.counts[index]).long()

    def read(
        self,
        index: Tensor,  # training images
        u: Tensor,  # in [0, 1): which of their captions
    ) -> Tensor:  # (B, L, D)
        "One caption of each training image."
        return self.encoded(self.numbers(index, u))

    def test(self, index: Tensor) -> Tensor:
        "The captions of held-out images."
        return self.encoded(self.start + np.asarray(index))

    def prompts(self, n: int) -> Prompts:
        "The first n evaluation prompts, encoded."
        found = len(self) - self.start
        if n > found:
            text = f"num_samples = {n}: {printable(self.path)} has {found} prompts"
            raise ParameterError(f"{text}; ask for at most as many, or encode more")
        return Prompts(n, lambda a, b: self.encoded(np.arange(self.start + a, self.start + b)))

    def prompt(self, i: int) -> str:
        "Evaluation prompt i in words."
        return self.captions[self.start + i]


def encode_texts(
    path,  # the store's folder
    texts: Texts,
    encoder: ClipText,  # or anything with encode, length, width, sha256, name
    how: Encoding,
    say=print,  # progress and damage
) -> TextStore:
    "Encode texts once. The same call resumes, repairs, or finds that all is done."
    rows = ["", *(t for group in texts.captions for t in group), *texts.prompts]
    job = {
        "kind": "captions",
        "texts": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "count": len(rows),
        "encoder": encoder.sha256,
        "shape": [encoder.length, encoder.width],
        "dtype": how.dtype,
        "batch": how.batch,
        "shard_rows": how.shard_rows,
    }

    def make_shard(a: int, b: int) -> tuple[dict, dict]:
        parts = [rows[i : min(i + how.batch, b)] for i in range(a, b, how.batch)]
        encoded = [encoder.encode(part).cpu().numpy().astype(how.dtype) for part in parts]
        contexts = np.concatenate(encoded)
        if not np.isfinite(contexts).all():
            raise FloatingPointError(f"contexts not finite as {how.dtype}: use dtype = float32")
        return {"contexts": contexts}, {"captions": rows[a:b]}

    counts = [len(group) for group in texts.captions]
    index = {**job, "counts": counts, "source": texts.source, "encoder_name": encoder.name}
    write_store(path, job, make_shard, lambda records: ({}, index), say)
    return TextStore(path)


def find_mscoco256(root) -> Path:
    "Encoded captions with their images, or `FileNotFoundError` with the command that makes both."
    find_store("mscoco256", LATENTS, root)
    return find_store("mscoco256", CAPTIONS, root)


def load_mscoco256(
    cfg: DataConfig,  # latents of 4x32x32, texts of 77x768
    root,  # the folder of the data sets
) -> Data:  # 82,783 training images with five captions or more, 5,000 held-out ones
    "MS-COCO at 256x256 as latents and encoded captions (Section 5.1)."
    texts = TextStore(find_mscoco256(root))
    images = LatentStore(texts.path.with_name(LATENTS))
    found, want = images.index["source"]["name"], texts.index["source"]
    if found != want:
        text = f"{printable(images.path)} and {CAPTIONS} hold different captions or images"
        raise StoreError(f"{text}: remove one of them and encode it again")
    data = from_store(images, cfg, "mscoco256", root)
    sha256 = hashlib.sha256(f"{data.sha256} {texts.sha256}".encode()).hexdigest()
    return replace(data, texts=texts, sha256=sha256)
