"""Autoencoders between pixels and latents: found, loaded without unpickling, run."""

from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from uvit_repro.data.fetch import AUTOENCODERS, how_to_get
from uvit_repro.data.files import printable, weights_sum
from uvit_repro.data.images import to_model, to_uint8

DIGITS_VAE = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
    "mid_block_add_attention": False,
}


class Autoencoder:
    "`diffusers.AutoencoderKL` behind two calls: pixels to moments, latents to pixels."

    def __init__(
        self,
        vae,  # diffusers.AutoencoderKL
        name: str = "",  # how it is found again: original, ema, digits or a path
        device="cpu",  # where it computes
    ):
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.name, self.device = name, torch.device(device)
        self.image_chans, self.latent_chans = vae.config.in_channels, vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        state = vae.state_dict()
        self.sha256 = weights_sum(state)
        self.encoder_sha256 = weights_sum(state, ("encoder.", "quant_conv."))

    @torch.inference_mode()
    def encode(
        self,
        images: Tensor,  # uint8 (B, C, H, W), sides multiples of `factor`
    ) -> Tensor:  # float32 (B, 2c, h, w): mean, then log-variance
        "The moments of images."
        x = to_model(images.to(self.device, non_blocking=True))
        return self.vae.encode(x).latent_dist.parameters.float()

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,  # (B, c, h, w), on the autoencoder's own scale
    ) -> Tensor:  # uint8 (B, C, H, W), on the same device
        "The pixels of latents, a few at a time: a decoder needs much memory."
        few = max(1, 2**20 // (latents.shape[-2] * latents.shape[-1] * self.factor**2))
        parts = [self.vae.decode(z.to(self.device).float()).sample for z in latents.split(few)]
        return torch.cat([to_uint8(x) for x in parts]).to(latents.device)


def find_autoencoder(
    name: str,  # original | ema | a folder under autoencoders/ | a path
    root,  # the folder of the data sets
) -> Path:  # a folder with config.json
    "Where an autoencoder is, or `FileNotFoundError` with the command that fetches it."
    place = Path(root) / "autoencoders" / AUTOENCODERS.get(name, name)
    for p in (place, place / "vae", Path(name).expanduser().absolute()):
        if (p / "config.json").is_file():
            return p
    how = f"Known names are {', '.join(AUTOENCODERS)}; a folder needs config.json (diffusers)"
    if name in AUTOENCODERS:
        how = how_to_get(name, root)
    raise FileNotFoundError(f"autoencoder {name!r} is not at {printable(place)}. {how}")


def load_autoencoder(
    name: str,  # as for `find_autoencoder`, or digits
    root,  # the folder of the data sets
    device="cpu",  # where it computes
) -> Autoencoder:
    "An autoencoder by name or by path; nothing is downloaded, nothing is unpickled."
    from diffusers import AutoencoderKL

    if name == "digits":
        return digits_autoencoder(device)
    path = find_autoencoder(name, root)
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        vae = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, **options)
    except Exception as e:
        why = (str(e) or type(e).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} can't be used as an autoencoder: {why}. Get it again") from None
    return Autoencoder(vae, name if name in AUTOENCODERS else str(path), device)


def digits_autoencoder(device="cpu") -> Autoencoder:
    "The autoencoder of 16x16 digits with its shipped weights."
    from diffusers import AutoencoderKL
    from safetensors.torch import load

    file = resources.files("uvit_repro.data") / "weights" / "digits_autoencoder.safetensors"
    vae = AutoencoderKL(**DIGITS_VAE)
    vae.load_state_dict(load(file.read_bytes()))
    return Autoencoder(vae, "digits", device)


def enlarge(
    images: Tensor,  # uint8, (B, C, H, W)
    times=16,  # corrections
) -> Tensor:  # uint8, (B, C, 2H, 2W)
    "Bicubic to twice the side, such that 2x2 averages are the pixels again."
    x = images.float()
    y = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
    for _ in range(times):
        y = (y + F.interpolate(x - F.avg_pool2d(y, 2), scale_factor=2)).clamp(0, 255)
    return y.round().to(torch.uint8)


def halve(
    images: Tensor,  # uint8, (B, C, 2H, 2W)
) -> Tensor:  # uint8, (B, C, H, W)
    "2x2 averages."
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
