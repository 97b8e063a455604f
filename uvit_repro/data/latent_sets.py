"""Stores of latents as data sets: moments to train on, held-out latents, a decoder to pixels."""

import hashlib
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import DataConfig, ParameterError
from uvit_repro.data.autoencoder import Autoencoder, load_autoencoder
from uvit_repro.data.files import printable
from uvit_repro.data.images import Data, check_size, hold_out, locate
from uvit_repro.data.store import Inputs, Store, StoreError, find_store


class LatentStore(Store):
    "Encoded images: `read(index, mirror)` gives their moments."

    kind = "latents"

    def __init__(self, path):
        super().__init__(path)
        self.shape, self.image_shape = tuple(self.index["shape"]), tuple(self.index["image_shape"])
        self.labels = torch.from_numpy(np.array(self.load("labels")))

    @property
    def sha256(self) -> str:
        "Checksum of the content: images, encoder and number format, not the computed bits."
        parts = self.index["source"]["sha256"], self.index["autoencoder"]["encoder_sha256"]
        text = f"{parts[0]} {parts[1]} {self.shape} {self.index['dtype']}"
        return hashlib.sha256(text.encode()).hexdigest()

    def read(
        self,
        index: Tensor,  # examples
        mirror: Tensor = None,  # bool: the mirror image instead
    ) -> Tensor:  # moments (B, 2c, h, w)
        "Moments of some examples."
        views = [0] * len(index) if mirror is None else mirror.int().tolist()
        if any(views) and not self.index["mirror"]:
            where = printable(self.path)
            raise ParameterError(f"{where} was encoded without mirror images: use flip = False")
        return torch.from_numpy(self.rows("moments", index, views))


class LatentDecoder:
    "From the network's scale to pixels. The autoencoder is loaded when it is first needed."

    def __init__(
        self,
        load,  # function of a decoder's name (empty: the default) and a device
        scale: float,  # factor on the latents
        finish=lambda pixels: pixels,  # last step
    ):
        self.load, self.scale, self.finish = lru_cache(1)(load), scale, finish

    def large(self, x: Tensor, decoder: str = "") -> Tensor:
        "What the autoencoder gives: uint8 (B, C, H, W) for x (B, c, h, w)."
        return self.load(decoder, x.device).decode(x.float() / self.scale)

    def __call__(self, x: Tensor, decoder: str = "") -> Tensor:
        return self.finish(self.large(x, decoder))


def store_decoder(store: LatentStore, root, device, decoder: str) -> Autoencoder:
    "The autoencoder that encoded a store, or the one that the configuration names."
    want, where = store.index["autoencoder"], printable(store.path)
    ae = load_autoencoder(decoder or want["name"], root, device)
    if not decoder and ae.sha256 != want["sha256"]:
        text = f"{where} was encoded with another autoencoder of the name {want['name']!r}"
        raise StoreError(f"{text}: name the right one with decoder, or bring it back")
    if 2 * ae.latent_chans != store.shape[0]:
        text = f"decoder = {decoder!r} takes latents of {ae.latent_chans} channels"
        raise ParameterError(f"{text}, {where} has {store.shape[0] // 2}")
    return ae


def _split(store: LatentStore, cfg: DataConfig) -> tuple[Tensor, Tensor]:
    "Rows to train on and held-out rows. Raises where the store is not what is configured."
    (c2, h, w), source, N = store.shape, store.index["source"], len(store)
    check_size(f"latents in {printable(store.path)}", (h, w, c2 // 2), cfg)
    if cfg.latent_scale <= 0:
        factor = store.index["statistics"]["scale"]
        raise ParameterError(f"latent_scale = 0: must be above 0; for unit variance {factor:.5g}")
    own = source["held_out"]
    if not own:
        return hold_out(store.labels, cfg.holdout, source["sha256"])
    if cfg.holdout not in (0, own):
        text = f"holdout = {cfg.holdout}: there are {own} held-out images of its own"
        raise ParameterError(f"{text} in {printable(store.path)}; use holdout = 0")
    return torch.arange(N).split([N - own, own])


def from_store(
    store: LatentStore,  # opened
    cfg: DataConfig,  # img_size and in_chans are those of the latents; holdout, latent_scale
    name: str,  # of the data set
    root=None,  # the folder of the data sets, where the store's autoencoder is
    pixels: Tensor = None,  # uint8 (N, C, H, W) of all rows, where they are known
) -> Data:
    "A store as a data set."
    train, test = _split(store, cfg)
    x, held = None, torch.empty((0, *store.image_shape), dtype=torch.uint8)
    if pixels is not None:
        x, held = pixels[train], pixels[test]
    means = [store.read(i).float().chunk(2, 1)[0] for i in test.split(1000)]
    decode = LatentDecoder(lambda d, on: store_decoder(store, root, on, d), cfg.latent_scale)
    names, notes, labels = store.index["class_names"], store.index["notes"], store.labels
    split = x, labels[train], held, labels[test]
    data = Data(name, *split, len(names), names, store.sha256, notes, Inputs(store, train))
    return replace(data, decode=decode, test_inputs=cfg.latent_scale * torch.cat(means))


def load_latents(
    cfg: DataConfig,  # dataset latents:PATH
    root,  # relative paths are looked for here as well
) -> Data:
    "A store of one's own."
    return from_store(LatentStore(locate(cfg.dataset, root)), cfg, "latents", root)


find_imagenet256 = partial(find_store, "imagenet256", "imagenet256_latents")
find_imagenet512 = partial(find_store, "imagenet512", "imagenet512_latents")


def load_imagenet(
    cfg: DataConfig,  # dataset imagenet256 or imagenet512
    root,  # the folder of the data sets
) -> Data:
    "ImageNet at 256x256 or 512x512 as latents of 4x32x32 or 4x64x64 (Section 5.1)."
    path = find_store(cfg.dataset, f"{cfg.dataset}_latents", root)
    return from_store(LatentStore(path), cfg, cfg.dataset, root)
