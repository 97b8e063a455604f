"""What to do about a missing file: the command that fetches or makes it, in one place."""

import shlex
from pathlib import Path

AUTOENCODERS = {"original": "sd-v1-vae", "ema": "sd-vae-ft-ema"}  # folder of each
COMMANDS = {  # name: a sentence and commands; ROOT is the folder of the data sets
    "cifar10": """Fetch it (163 MB) with
    python -c "import sys, torchvision.datasets as d; \
d.CIFAR10(sys.argv[1], download=True)" ROOT""",
    "celeba64": """Fetch it (1.4 GB; needs the package gdown) with
    python -c "import sys, torchvision.datasets as d; \
d.CelebA(sys.argv[1], 'all', download=True)" ROOT""",
    "imagenet64": """Get the devkit and the train and val archives of ILSVRC2012 (144 GB) from \
https://image-net.org into ROOT/imagenet, then unpack them with
    python -c "import sys, torchvision.datasets as d; \
[d.ImageNet(sys.argv[1], s) for s in ('train', 'val')]" ROOT/imagenet""",
    "imagenet256": """Encode ImageNet once (84 GB, half of it with --dtype float16) with
    uvit-repro encode images --source imagenet --img-size 256 --data-root ROOT""",
    "imagenet512": """Encode ImageNet once (336 GB, half of it with --dtype float16) with
    uvit-repro encode images --source imagenet --img-size 512 --data-root ROOT""",
    "coco": """Get MS-COCO 2014 (20 GB) with
    mkdir -p ROOT/coco && cd ROOT/coco && \
for f in zips/train2014 zips/val2014 annotations/annotations_trainval2014; \
do curl -LOC - http://images.cocodataset.org/$f.zip; done; unzip -q '*.zip'""",
    "mscoco256": """Encode MS-COCO once (3 and 105 GB, half of it with --dtype float16) with
    uvit-repro encode images --source mscoco --data-root ROOT
    uvit-repro encode captions --data-root ROOT""",
    "clip": """Fetch it (1.7 GB, of which the text half is used) with
    python -c "import sys, huggingface_hub as h; h.hf_hub_download(\
'timm/vit_large_patch14_clip_224.openai', 'open_clip_model.safetensors', \
local_dir=sys.argv[1])" ROOT/clip""",
    "original": """Fetch it (335 MB) with
    python -c "import sys, huggingface_hub as h; h.snapshot_download(\
'CompVis/stable-diffusion-v1-4', allow_patterns=['vae/*.json', 'vae/*.safetensors'], \
local_dir=sys.argv[1])" ROOT/autoencoders/sd-v1-vae""",
    "ema": """Fetch it (335 MB) with
    python -c "import sys, huggingface_hub as h; h.snapshot_download(\
'stabilityai/sd-vae-ft-ema', allow_patterns=['*.json', '*.safetensors'], \
local_dir=sys.argv[1])" ROOT/autoencoders/sd-vae-ft-ema""",
}


def how_to_get(
    name: str,  # of a data set, coco, clip, or a key of AUTOENCODERS
    root,  # the folder of the data sets
) -> str:  # a sentence, then commands on lines of their own
    "How something missing is fetched or made."
    return COMMANDS[name].replace("ROOT", shlex.quote(str(Path(root))))


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
