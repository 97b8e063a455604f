"""The handwritten digits of scikit-learn, as 8x8 pixels and as latents of 4x8x8."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from uvit_repro.config import DataConfig, digest
from uvit_repro.data.autoencoder import Autoencoder, digits_autoencoder, enlarge, halve
from uvit_repro.data.encode import data_source, encode_images
from uvit_repro.data.images import Data, check_content, check_size, from_arrays
from uvit_repro.data.latent_sets import LatentDecoder, LatentStore, from_store, store_decoder
from uvit_repro.data.store import VERSION, Encoding, in_cache


def load_digits(
    cfg: DataConfig,  # img_size 8, in_chans 1
    root=None,  # not used: the images are part of scikit-learn
) -> Data:  # 1,797 images less the held-out ones
    "UCI optical recognition of handwritten digits, test part (not in the paper)."
    from sklearn.datasets import load_digits as embedded

    check_size("digits", (8, 8, 1), cfg)
    raw = embedded()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    data = from_arrays("digits", images, raw.target, 10, cfg.holdout)
    check_content("digits", data.sha256, "scikit-learn")
    return data


def digits_store(
    digits: Data,  # all of them, none held out
    ae: Autoencoder,  # the digits' own
) -> LatentStore:
    "The digits' latents, encoded when first needed."
    source, how = data_source(digits, enlarge), Encoding(batch=100, shard_rows=500)

    def make(path: Path) -> LatentStore:
        return encode_images(source, ae, path, how, say=lambda line: None)

    return in_cache(f"digits_latents-{digest([digits.sha256, ae.sha256, VERSION], 12)}", make)


def load_digits_latents(
    cfg: DataConfig,  # img_size 8, in_chans 4
    root=None,  # where another decoder would be
) -> Data:  # pixels stay the 8x8 digits
    "The digits as latents; `decode` gives 8x8 pixels, `decode.large` the autoencoder's 16x16."
    digits = load_digits(DataConfig(dataset="digits", img_size=8, in_chans=1), root)
    store = digits_store(digits, digits_autoencoder())
    data = from_store(store, cfg, "digits_latents", root, pixels=digits.train_images)

    def load(decoder: str, device) -> Autoencoder:
        return store_decoder(store, root, device, "" if decoder == "original" else decoder)

    decode = LatentDecoder(load, cfg.latent_scale, halve)
    return replace(data, decode=decode, pixels_sha256=digits.sha256)
