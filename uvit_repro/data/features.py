"""Feature networks that judge images: their weights, how they are loaded, what they compute."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvit_repro.config import CONTENT, ParameterError, data_root
from uvit_repro.runs.devices import tf32_off

SPATIAL_LAYER = "Mixed_6d.branch1x1"  # of Inception, behind its ReLU: the features of sFID


class ResBlock(nn.Module):
    "Two 3x3 convolutions and a parameter-free shortcut (names as in the public weights)."

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.stride = 1 if channels_in == channels_out else 2
        self.pad = (channels_out - channels_in) // 2
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(h + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


class CifarResNet(nn.Module):
    "ResNet of 6n + 2 layers for 32x32 images; uint8 images to (features (N, 64), logits (N, 10))."

    def __init__(self, n: int, weights: dict | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(ResBlock(16, 16) for _ in range(n)))
        self.layer2 = nn.Sequential(ResBlock(16, 32), *(ResBlock(32, 32) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(ResBlock(32, 64), *(ResBlock(64, 64) for _ in range(n - 1)))
        self.linear = nn.Linear(64, 10)
        if weights:
            self.load_state_dict(weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor((0.485, 0.456, 0.406), device=x.device).view(3, 1, 1)
        std = torch.tensor((0.229, 0.224, 0.225), device=x.device).view(3, 1, 1)
        h = F.relu(self.bn1(self.conv1((x.float() / 255 - mean) / std)))
        h = self.layer3(self.layer2(self.layer1(h))).mean((2, 3))
        return h, self.linear(h)


class DigitsCNN(nn.Module):
    "Three convolutions for 8x8 digits; uint8 images to (features (N, 64), logits (N, 10))."

    def __init__(self, weights: dict):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 4, 64)
        self.head = nn.Linear(64, 10)
        self.load_state_dict(weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x.float() / 255)))), 2)
        # A smooth nonlinearity: with ReLU a third of the features was always zero.
        h = F.silu(self.hidden(F.max_pool2d(F.relu(self.conv3(h)), 2).flatten(1)))
        return h, self.head(h)


class Inception(nn.Module):
    "torch-fidelity's Inception; uint8 images to (features, logits, spatial features) in one pass."

    def __init__(self, weights: dict):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        file = io.BytesIO()  # torch-fidelity wants a file: give it the tensors that were checked
        torch.save(weights, file)
        file.seek(0)
        self.net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], file
        )
        self.net.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # guided-diffusion's order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, logits = self.net(x)
        return features, logits, self.spatial


@dataclass(frozen=True)
class FeatureExtractor:
    "A feature network: its weights, what it takes and what it gives."

    short: str  # its name inside metric names
    file: str  # file name of the weights
    sha256: str  # checksum of that file
    url: str  # folder where it is public; empty: part of this package
    network: Callable  # makes it from its weights
    dim: int = 64  # features
    channels: int = 3  # of its input; grey images are repeated to 3
    size: int = 0  # side of its input in pixels; 0: any
    classes_of: str = ""  # the data set whose classes its logits tell apart; empty: none of ours
    spatial: int = 0  # features that keep their place in the image (for sFID)
    batch: int = 500  # images at once

    def takes(self, channels: int, height: int, width: int) -> bool:
        "Whether images of this shape can be judged."
        fits = self.size == 0 or height == width == self.size
        return fits and channels in (1, self.channels)


def _resnet(file: str, sha256: str, n: int) -> FeatureExtractor:
    "A public ResNet that was trained on CIFAR-10."
    url = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
    about = file.partition("-")[0], file, sha256, url, partial(CifarResNet, n)
    return FeatureExtractor(*about, size=32, classes_of="cifar10")


FEATURE_EXTRACTORS = {
    "inception": FeatureExtractor(
        "inception",
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
        Inception,
        dim=2048,
        spatial=2023,
        batch=64,
    ),
    "resnet20_cifar10": _resnet(
        "resnet20-12fca82f.th",
        "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
        3,
    ),
    "resnet56_cifar10": _resnet(
        "resnet56-4bfd9763.th",
        "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        9,
    ),
    "digits_cnn": FeatureExtractor(
        "digits_cnn",
        "digits_cnn.safetensors",
        "caf3d1385c5e2d0a5d6969b251e83707af58bdcacd3189c037842037a5204ce8",
        "",
        DigitsCNN,
        channels=1,
        size=8,
        classes_of="digits",
    ),
}
NO_FEATURES = FeatureExtractor("none", "", "", "", dict, dim=0)  # features = none


def feature_extractor(
    name: str,  # a key of FEATURE_EXTRACTORS, or none
) -> FeatureExtractor:
    "A feature extractor by name. Raises `ParameterError` with the known names."
    if name not in (*FEATURE_EXTRACTORS, "none"):
        known = ", ".join(FEATURE_EXTRACTORS)
        raise ParameterError(f"features = {name!r}: known networks are {known}, none")
    return FEATURE_EXTRACTORS.get(name, NO_FEATURES)


def knows_classes(name: str, data) -> bool:
    "Whether a network's logits tell apart the classes of these data, judged by their pixels."
    known = feature_extractor(name).classes_of
    content = getattr(data, "pixels_sha256", None) or data.sha256
    return known != "" and content == CONTENT[known]


def weights_folders(name: str) -> list[Path]:
    "Where the weights of a network are looked for, in this order."
    if not feature_extractor(name).url:
        return [Path(str(resources.files("uvit_repro") / "data" / "weights"))]
    given = os.environ.get("UVIT_WEIGHTS")
    folders = [Path(given).expanduser()] if given else []
    return [*folders, data_root() / "weights", Path(torch.hub.get_dir()) / "checkpoints"]


def feature_weights(name: str) -> Path | None:
    "The weights file of a network, or None where there is none."
    files = [folder / feature_extractor(name).file for folder in weights_folders(name)]
    return next((f for f in files if f.is_file()), None)


def _checked_weights(name: str) -> bytes:
    "The bytes of a weights file, after its checksum. Messages name the command that fetches it."
    spec, path, folders = feature_extractor(name), feature_weights(name), weights_folders(name)
    fetch = f"curl -L --create-dirs -o {folders[0] / spec.file} {spec.url}"
    if path is None:
        raise FileNotFoundError(
            f"{name}: {spec.file} not found in {', '.join(map(str, folders))}. Fetch it with\n"
            f"  {fetch}\nor set UVIT_WEIGHTS to the folder that holds it."
        )
    blob = path.read_bytes()
    got = hashlib.sha256(blob).hexdigest()
    if got != spec.sha256:
        raise ValueError(
            f"{name}: {path} has sha256 {got}, expected {spec.sha256}; it is truncated or another "
            f"file. Fetch it again with\n  {fetch}"
        )
    return blob


def feature_status(
    name: str,  # a key of FEATURE_EXTRACTORS, or none
) -> tuple[bool, str]:  # usable, and what was found or the command that fetches it
    "Whether a network's weights are here and whole, as `uvit-repro doctor` prints it."
    if feature_extractor(name) is NO_FEATURES:
        return True, "none: no feature network is used"
    try:
        _checked_weights(name)
    except (FileNotFoundError, ValueError) as e:
        return False, str(e)
    return True, f"{name}: {feature_weights(name)}"


def read_weights(
    name: str,  # a key of FEATURE_EXTRACTORS
) -> dict:  # tensors by name
    "Read a network's weights without unpickling, from the same bytes whose checksum was compared."
    if feature_extractor(name) is NO_FEATURES:
        known = ", ".join(FEATURE_EXTRACTORS)
        raise ParameterError(f"features = none has no weights and no features; networks: {known}")
    blob = _checked_weights(name)
    if feature_extractor(name).file.endswith(".safetensors"):
        return safetensors.torch.load(blob)
    state = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {k.removeprefix("module."): v for k, v in state.items()}


def build_extractor(name: str) -> nn.Module:
    "A feature network with its checked weights, ready to judge."
    net = feature_extractor(name).network(read_weights(name))
    return net.eval().requires_grad_(False)


def check_images(images: Tensor, name: str) -> Tensor:
    "Images as a network takes them, grey repeated to RGB. Raises `ParameterError` otherwise."
    shape, dtype = tuple(getattr(images, "shape", ())), getattr(images, "dtype", type(images))
    if dtype != torch.uint8 or len(shape) != 4 or shape[0] == 0:
        raise ParameterError(
            f"images: expected a uint8 tensor (N, C, H, W) with N > 0, got {dtype} {shape}"
        )
    spec = feature_extractor(name)
    if not spec.takes(*shape[1:]):
        fits = [n for n, s in FEATURE_EXTRACTORS.items() if s.takes(*shape[1:])]
        raise ParameterError(
            f"images {'x'.join(map(str, shape[1:]))}: {name} takes {spec.channels}x{spec.size}x"
            f"{spec.size}; networks for these images: {', '.join(fits) or 'none'}"
        )
    return images.expand(-1, spec.channels, -1, -1)


class FeatureNetwork:
    "A feature extractor on a device; its network is built once, when it is first needed."

    def __init__(self, name: str, device="cpu"):
        self.name, self.spec, self.device = name, feature_extractor(name), device

    @cached_property
    def net(self) -> nn.Module:
        return build_extractor(self.name).to(self.device)

    @torch.inference_mode()
    def extract(
        self,
        images: Tensor,  # uint8, (N, C, H, W); read by batches, so it may be a memory-mapped file
    ) -> dict:  # features (N, F), logits (N, K), from Inception spatial (N, 2023); float32, CPU
        "Features and logits of images."
        images, out = check_images(images, self.name), {}
        with tf32_off():
            for batch in images.split(self.spec.batch):
                outputs = self.net(batch.to(self.device).contiguous())
                for kind, v in zip(("features", "logits", "spatial"), outputs, strict=False):
                    out.setdefault(kind, []).append(v.float().cpu())
        return {kind: torch.cat(v) for kind, v in out.items()}
