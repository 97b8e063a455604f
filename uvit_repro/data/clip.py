"""The released code's text encoder: the text half of CLIP ViT-L/14, through open_clip."""

from pathlib import Path

import torch
from torch import Tensor

from uvit_repro.config import ParameterError
from uvit_repro.data.fetch import missing
from uvit_repro.data.files import load_tensors, printable, weights_sum

CLIP_MODEL = "ViT-L-14-quickgelu"  # ViT-L-14 would compute a plain GELU
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def find_clip(
    root,  # the folder of the data sets
    path: str = "",  # a file given by hand
) -> Path:  # an existing file
    "The weights of CLIP ViT-L/14, or `FileNotFoundError` with the command that fetches them."
    places = [Path(root) / "clip" / f for f in CLIP_FILES]
    if path:
        places = [Path(path).expanduser()]
    for p in places:
        if p.is_file():
            return p
    raise missing("clip", root, f"CLIP ViT-L/14 is not at {printable(places[0])}")


def build_tower(
    config: dict,  # as in `open_clip.get_model_config(name)`: quick_gelu, text_cfg
):  # open_clip's TextTransformer, frozen, with random weights
    "The text half of a model of open_clip, without its image half."
    from open_clip.transformer import QuickGELU, TextTransformer

    sizes = {k: config["text_cfg"][k] for k in ("context_length", "vocab_size", "width", "heads")}
    tower = TextTransformer(
        **sizes,
        layers=config["text_cfg"]["layers"],
        output_dim=None,
        act_layer=QuickGELU if config.get("quick_gelu") else torch.nn.GELU,
        output_tokens=True,
    )
    return tower.eval().requires_grad_(False)


class ClipText:
    "Captions to the tokens of a U-ViT: (n, 77, 768), last hidden state after the final norm."

    def __init__(
        self,
        tower,  # of `build_tower`, with its weights
        name: str = "",  # of the file
        device="cpu",  # where it computes
    ):
        from open_clip.tokenizer import SimpleTokenizer

        self.tower, self.name, self.device = tower.to(device), name, torch.device(device)
        self.length, self.width = tower.context_length, tower.width
        self.tokenizer = SimpleTokenizer(context_length=self.length)
        self.sha256 = weights_sum(tower.state_dict())

    def tokens(self, captions: list) -> Tensor:
        "Token ids (n, 77): start, words, end (repeated, as the released tokenizer does)."
        ids, end = self.tokenizer(list(captions)), self.tokenizer.eot_token_id
        behind = torch.arange(self.length) > (ids == end).int().argmax(1, keepdim=True)
        return torch.where(behind, end, ids)

    @torch.inference_mode()
    def encode(self, captions: list) -> Tensor:
        "float32 (n, 77, 768), on the encoder's device."
        return self.tower(self.tokens(captions).to(self.device))[1]

    @property
    def null(self) -> Tensor:
        return self.encode([""])[0]


def text_weights(
    state: dict,  # tensors of a model of open_clip, or of its text half
) -> dict:  # those of the text half, float32, under the names of `build_tower`
    "The text half of a CLIP model. Raises `ParameterError` when there is none."
    wanted = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
    for prefix in ("text.", ""):
        part = {k[len(prefix) :]: v.float() for k, v in state.items() if k.startswith(prefix)}
        if "token_embedding.weight" in part:
            return {k: v for k, v in part.items() if k.startswith(wanted)}
    text = f"no text encoder among {len(state)} tensors ({', '.join(list(state)[:3])}, ...)"
    raise ParameterError(f"{text}: wanted is a CLIP model as open_clip stores it")


def load_clip(
    root,  # the folder of the data sets
    path: str = "",  # a file given by hand
    device="cpu",  # where it computes
    config: dict = None,  # None: that of CLIP_MODEL
) -> ClipText:
    "The released code's text encoder."
    import open_clip

    file = find_clip(root, path)
    tower = build_tower(config or open_clip.get_model_config(CLIP_MODEL))
    try:
        tower.load_state_dict(text_weights(load_tensors(file)))
    except RuntimeError as e:
        why = str(e).splitlines()[-1].strip()
        raise ParameterError(f"{printable(file)} is not {CLIP_MODEL}: {why}") from None
    return ClipText(tower, file.name, device)
