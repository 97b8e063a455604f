"""What to do about a missing file: the command that fetches or makes it, in one place."""

import shlex
from pathlib import Path

AUTOENCODERS = {  # decoder of a configuration: folder, public repository, its files
    "original": (
        "sd-v1-vae",
        "CompVis/stable-diffusion-v1-4",
        ["vae/*.json", "vae/*.safetensors"],
    ),
    "ema": ("sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema", ["*.json", "*.safetensors"]),
}
RELEASED_AUTOENCODERS = {"original": "autoencoder_kl.pth", "ema": "autoencoder_kl_ema.pth"}


def _python(code: str) -> str:
    "A command for Python code, quoted for the shell."
    plain = not set(code) & set('"$`\\!')
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


def _public(name: str, root: Path) -> tuple:
    "(sentence, command) for what lies on public servers."
    imagenet, coco, clip = (str(root / n) for n in ("imagenet", "coco", "clip"))
    cd = f"mkdir -p {shlex.quote(coco)} && cd {shlex.quote(coco)}"
    return {
        "cifar10": (
            "Fetch it (163 MB) with",
            _python(
                f"import torchvision; torchvision.datasets.CIFAR10({str(root)!r}, download=True)"
            ),
        ),
        "celeba64": (
            "Fetch it (1.4 GB; needs the package gdown) with",
            _python(
                f"import torchvision as t; t.datasets.CelebA({str(root)!r}, 'all', download=True)"
            ),
        ),
        "imagenet": (
            "Get the devkit and the train and val archives of ILSVRC2012 (144 GB) from "
            f"https://image-net.org into {imagenet}, then unpack them with",
            _python(
                "from torchvision.datasets import ImageNet; "
                f"[ImageNet({imagenet!r}, s) for s in ('train', 'val')]"
            ),
        ),
        "coco": (
            "Get MS-COCO 2014 (20 GB) with",
            f"{cd} && for f in zips/train2014 zips/val2014 annotations/annotations_trainval2014; "
            "do curl -LOC - http://images.cocodataset.org/$f.zip; done; unzip -q '*.zip'",
        ),
        "clip": (
            "Fetch it (1.7 GB, of which the text half is used) with",
            _python(
                "from huggingface_hub import hf_hub_download as get; get("
                "'timm/vit_large_patch14_clip_224.openai', 'open_clip_model.safetensors', "
                f"local_dir={clip!r})"
            ),
        ),
    }[name]


def how_to_get(
    name: str,  # a data set, a part of one, or autoencoder original | ema
    root,  # the folder of the data sets
) -> str:  # a sentence, then a command on lines of its own
    "How something missing is fetched or made."
    root, option = Path(root), f"--data-root {shlex.quote(str(root))}"
    if name in AUTOENCODERS:
        folder, repo, files = AUTOENCODERS[name]
        place = str(root / "autoencoders" / folder)
        sentence = "Fetch it (335 MB) with"
        command = _python(
            "from huggingface_hub import snapshot_download as get; "
            f"get({repo!r}, allow_patterns={files}, local_dir={place!r})"
        )
    elif name in ("imagenet256", "imagenet512"):
        size = {"imagenet256": 84, "imagenet512": 336}[name]
        sentence = f"Encode ImageNet once ({size} GB, half of it with --dtype float16) with"
        command = f"uvit-repro encode images --source imagenet --img-size {name[8:]} {option}"
    elif name == "mscoco256":
        sentence = "Encode MS-COCO once (3 and 105 GB, half of it with --dtype float16) with"
        command = f"uvit-repro encode images --source mscoco {option}"
        command += f"\n    uvit-repro encode captions {option}"
    else:
        sentence, command = _public("imagenet" if name == "imagenet64" else name, root)
    return f"{sentence}\n    {command}"


def missing(
    name: str,  # as for `how_to_get`
    root,  # the folder of the data sets
    what: str,  # what was looked for, and where
) -> FileNotFoundError:  # to be raised
    "The error for something that is not there, with the command that gets it."
    return FileNotFoundError(
        f"{name}: {what}. {how_to_get(name, root)}\n"
        "or set UVIT_DATA (parameter data_root) to the folder that has it"
    )
