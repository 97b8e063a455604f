"""The handwritten digits of scikit-learn, as 8x8 pixels and as latents of 4x8x8."""

import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from uvit_repro.config import DataConfig, digest, project_root
from uvit_repro.data.autoencoder import (
    Autoencoder,
    digits_autoencoder,
    enlarge,
    halve,
    load_autoencoder,
)
from uvit_repro.data.encode import Encoding, data_source, encode_images
from uvit_repro.data.images import (
    Data,
    canonical,
    check_content,
    check_size,
    from_arrays,
    ordered_sum,
)
from uvit_repro.data.latent_sets import LatentDecoder, LatentStore, from_store
from uvit_repro.data.store import VERSION


def load_digits(
    cfg: DataConfig,  # img_size 8, in_chans 1
    root=None,  # not used: the images are part of scikit-learn
) -> Data:  # 1,797 images less the held-out ones
    "UCI optical recognition of handwritten digits, test part (not in the paper)."
    from sklearn.datasets import load_digits as embedded

    check_size("digits", (8, 8, 1), cfg)
    raw = embedded()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    images, labels = canonical(images, raw.target)
    sha256, names = ordered_sum((images, labels)), [str(i) for i in range(10)]
    check_content("digits", sha256, "scikit-learn")
    return from_arrays("digits", images, labels, names, sha256, cfg.holdout)


def digits_store(
    digits: Data,  # all of them, none held out
    ae: Autoencoder,  # the digits' own
) -> LatentStore:
    "The digits' latents, encoded when first needed: in results/cache, or in a temporary folder."
    name = f"digits_latents-{digest([digits.sha256, ae.sha256, VERSION], 12)}"
    user = os.getuid() if hasattr(os, "getuid") else 0
    temporary = Path(tempfile.gettempdir()) / f"uvit-latents-{user}"
    for base in (project_root() / "results" / "cache", temporary):
        with suppress(OSError):  # a folder that can't be written
            how = Encoding(batch=100, shard_rows=500)
            return encode_images(data_source(digits, enlarge), ae, base / name, how, _quiet)
    raise OSError(f"no place for the digits' latents: tried results/cache and {temporary}")


def _quiet(line: str):
    pass


def load_digits_latents(
    cfg: DataConfig,  # img_size 8, in_chans 4
    root=None,  # where another decoder would be
) -> Data:  # pixels stay the 8x8 digits
    "The digits as latents; `decode` gives 8x8 pixels, `decode.large` the autoencoder's 16x16."
    digits = load_digits(DataConfig(dataset="digits", img_size=8, in_chans=1), root)

    def load(decoder: str, device) -> Autoencoder:
        own = decoder in ("", "original")
        return digits_autoencoder(device) if own else load_autoencoder(decoder, root, device)

    decode, store = (
        LatentDecoder(load, cfg.latent_scale, halve),
        digits_store(digits, load("", "cpu")),
    )
    data = from_store(store, cfg, "digits_latents", root, decode, digits.train_images)
    return replace(data, pixels_sha256=digits.sha256)  # whoever knows the digits knows these
