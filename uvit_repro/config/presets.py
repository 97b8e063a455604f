"""The facts that experiments are made of: Table 2, Table 5, and the defaults of each data set."""

import importlib
import re

from uvit_repro.config.settings import ParameterError, listed, refuse, shown

# A network is called as network(x, t, y=labels) or network(x, t, context=tokens), or without either
# where it has no condition: x is (B, C, H, W), t is (B,), 0 to 999 (EDM: log(sigma) / 4). It
# returns a tensor like x.
MODELS = {  # functions of (model, data, p_uncond, use_checkpoint, activation_budget)
    "UViT": "uvit_repro.uvit:from_config",
    "UNet-latent": "uvit_repro.unet:latent_from_config",
    "ADM": "uvit_repro.unet:adm_from_config",
    "GenViT": "uvit_repro.genvit:from_config",
    "IU-ViT": "uvit_repro.ascend:iuvit_from_config",
    "ASCEND": "uvit_repro.ascend:from_config",
    "DiffiT-latent": "uvit_repro.diffit:from_config",
    "DiffiT-image": "uvit_repro.diffit:image_from_config",
}
DATASETS = {  # functions of (data section, folder of the data sets)
    "digits": "uvit_repro.data.digits:load_digits",
    "cifar10": "uvit_repro.data.cifar10:load_cifar10",
    "celeba64": "uvit_repro.data.folders:load_celeba64",
    "imagenet64": "uvit_repro.data.folders:load_imagenet64",
    "imagenet256": "uvit_repro.data.latent_sets:load_imagenet",
    "imagenet512": "uvit_repro.data.latent_sets:load_imagenet",
    "mscoco256": "uvit_repro.data.coco:load_mscoco256",
    "digits_latents": "uvit_repro.data.digits:load_digits_latents",
    "shapes": "uvit_repro.data.shapes:load_shapes",
    "latents": "uvit_repro.data.latent_sets:load_latents",
    "folder": "uvit_repro.data.folders:load_folder",
    "npz": "uvit_repro.data.npz:load_npz",
}


def resolve_name(registry: dict, key: str):
    "Import what MODELS or DATASETS names. Raises `ParameterError` with the known keys."
    if key not in registry:
        raise ParameterError(f"unknown {shown(key)}: known are {listed(registry)}")
    module, _, attr = registry[key].partition(":")
    return getattr(importlib.import_module(module), attr)


TABLE2 = {
    "U-ViT-S": {"embed_dim": 512, "depth": 13, "num_heads": 8, "conv": "after"},
    "U-ViT-S (Deep)": {"embed_dim": 512, "depth": 17, "num_heads": 8, "conv": "after"},
    "U-ViT-M": {"embed_dim": 768, "depth": 17, "num_heads": 12, "conv": "after"},
    "U-ViT-L": {"embed_dim": 1024, "depth": 21, "num_heads": 16, "conv": "after"},
    "U-ViT-H": {"embed_dim": 1152, "depth": 29, "num_heads": 16, "conv": "none"},
}
HEADS = {row["embed_dim"]: row["num_heads"] for row in TABLE2.values()}  # weights do not tell heads


def preset(
    name: str,  # a row of Table 2 with a patch size: `U-ViT-S/2`, `U-ViT-S/2 (Deep)`, `U-ViT-H/4`
) -> dict:  # fields of `ModelConfig`
    "Sizes of a model of the paper (Table 2). Raises `ParameterError` for an unknown name."
    match = re.fullmatch(r"(U-ViT-\w+)/([1-9]\d{0,4})( \(Deep\))?", str(name), re.ASCII)
    row = f"{match[1]}{match[3] or ''}" if match else ""
    if row not in TABLE2:
        known = [f"{k}/P".replace(" (Deep)/P", "/P (Deep)") for k in TABLE2]
        refuse("preset", name, f"known are {listed(known)}, P being the patch size")
    return {"patch_size": int(match[2]), **TABLE2[row]}


_IMAGES = {"in_chans": 3, "num_classes": 0, "holdout": 0, "flip": True, "features": "inception"}
_LATENTS = {**_IMAGES, "in_chans": 4, "latent_scale": 0.18215}
_DIGITS = {"img_size": 8, "in_chans": 1, "num_classes": 10, "holdout": 297, "flip": False}
_DIGITS = {**_DIGITS, "features": "digits_cnn"}
_CIFAR10 = {"img_size": 32, "num_classes": 10, "features": "resnet20_cifar10"}
_SHAPES = {"img_size": 16, "flip": False, "features": "none", "text_tokens": 8, "text_dim": 96}
DATASET_DEFAULTS = {  # fields of `DataConfig`, and the feature extractor
    "digits": _DIGITS,
    "cifar10": {**_IMAGES, **_CIFAR10},
    "celeba64": {**_IMAGES, "img_size": 64},
    "imagenet64": {**_IMAGES, "img_size": 64, "num_classes": 1000},
    "imagenet256": {**_LATENTS, "img_size": 32, "num_classes": 1000},
    "imagenet512": {**_LATENTS, "img_size": 64, "num_classes": 1000},
    "mscoco256": {**_LATENTS, "img_size": 32, "flip": False, "latent_scale": 0.23010},
    "digits_latents": {**_DIGITS, "in_chans": 4, "latent_scale": 0.74},
    "shapes": {**_IMAGES, **_SHAPES},
    "latents": {**_LATENTS, "img_size": 32},
    "folder": {**_IMAGES, "img_size": 32},
    "npz": {**_IMAGES, "img_size": 32},
}
PATHS = ("folder", "npz", "latents")  # a path follows: folder:PATH
CONTENT = {  # sha256 of the content of data sets that never change
    "digits": "2416f53c252145aee6ed650df0f5dddf38f6fd593dcb563e598b84e376e6a1bf",
    "cifar10": "60abcb233472de85d15a903122252b72e71ac98516de8b10f55ce18298abd4c1",
    "shapes": "b7bfd66de1fab5557c6965f95c7c2f3d8fe9528f252cc563da1c84977541baeb",
    # the digits seen through the autoencoder of this package
    "digits_latents": "734ed6fed7123b2db05110e8c23b2d7f5e27cb8adb06cae0b001a9e904976b0c",
}

_CLASSES = {"condition": "class", "use_checkpoint": True, "batch_size": 1024}
_PIXELS = {**_CLASSES, "n_steps": 300_000, "lr": 3e-4, "labels": "frequency"}
_LATENT = {**_CLASSES, "n_steps": 500_000, "cfg_scale": 1.4}
_LARGE = {**_LATENT, "decoder": "original", "p_uncond": 0.15}
_DISCRETE = {"process": "sd", "sampler": "dpm_solver_pp_fast", "p_uncond": 0.1}
_HUGE = {**_LATENT, **_DISCRETE, "decoder": "ema"}
_TEXT = {"condition": "text", "decoder": "original", "cfg_scale": 2.0}
_COCO = {"n_steps": 1_000_000, "batch_size": 256, "betas": (0.9, 0.9), "num_samples": 30_000}
_COCO = {**_COCO, **_TEXT, **_DISCRETE}
_SMALL = {"n_steps": 500_000, "batch_size": 128, "sampler": "euler_maruyama", "nfe": 1000}
_SMALL = {**_SMALL, "curve_sampler": "dpm_solver_fast", "curve_nfe": 50}
_CIFAR = {"betas": (0.99, 0.999), "warmup_steps": 2500}
TABLE5 = {  # the released configurations: data set, and settings beyond those common to all
    "CIFAR10 U-ViT-S/2": {"dataset": "cifar10", **_SMALL, **_CIFAR},
    "CelebA 64x64 U-ViT-S/4": {"dataset": "celeba64", **_SMALL},
    "ImageNet 64x64 U-ViT-M/4": {"dataset": "imagenet64", **_PIXELS},
    "ImageNet 64x64 U-ViT-L/4": {"dataset": "imagenet64", **_PIXELS},
    "ImageNet 256x256 U-ViT-L/2": {"dataset": "imagenet256", **_LARGE, "n_steps": 300_000},
    "ImageNet 256x256 U-ViT-H/2": {"dataset": "imagenet256", **_HUGE},
    "ImageNet 512x512 U-ViT-L/4": {"dataset": "imagenet512", **_LARGE, "cfg_scale": 1.7},
    "ImageNet 512x512 U-ViT-H/4": {"dataset": "imagenet512", **_HUGE, "cfg_scale": 1.7},
    "MS-COCO 256x256 U-ViT-S/2": {"dataset": "mscoco256", **_COCO},
    "MS-COCO 256x256 U-ViT-S/2 (Deep)": {"dataset": "mscoco256", **_COCO},
}
