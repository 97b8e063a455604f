"""The released code's text encoder: the text half of CLIP ViT-L/14, through open_clip."""

from pathlib import Path

import torch
from torch import Tensor

from uvit_repro.config import ParameterError
from uvit_repro.data.fetch import missing
from uvit_repro.data.files import load_tensors, printable, weights_sum

CLIP_MODEL = "ViT-L-14-quickgelu"  # ViT-L-14 would compute a plain GELU


class ClipText:
    "Captions to the tokens of a U-ViT: (n, 77, 768), last hidden state after the final norm."

    def __init__(
        self,
        model,  # of open_clip
        name: str = "",  # of the file of its weights
        device="cpu",  # where it computes
    ):
        from open_clip.tokenizer import SimpleTokenizer

        model.visual = None  # the image half is not needed
        self.model = model.eval().requires_grad_(False).to(device)
        self.name, self.device = name, torch.device(device)
        self.length, self.width = model.positional_embedding.shape
        self.tokenizer = SimpleTokenizer(context_length=self.length)
        self.sha256 = weights_sum(model.state_dict())

    def tokens(self, captions: list) -> Tensor:
        "Token ids (n, 77): start, words, end (repeated, as the released tokenizer does)."
        ids, end = self.tokenizer(list(captions)), self.tokenizer.eot_token_id
        behind = torch.arange(self.length) > (ids == end).int().argmax(1, keepdim=True)
        return torch.where(behind, end, ids)

    @torch.inference_mode()
    def encode(self, captions: list) -> Tensor:
        "float32 (n, 77, 768), on the encoder's device."
        m = self.model
        x = m.token_embedding(self.tokens(captions).to(self.device)) + m.positional_embedding
        return m.ln_final(m.transformer(x, attn_mask=m.attn_mask))


def load_clip(
    root,  # the folder of the data sets
    path: str = "",  # a file given by hand
    device="cpu",  # where it computes
    name: str = CLIP_MODEL,  # of the model in open_clip
) -> ClipText:
    "The released code's text encoder, or `FileNotFoundError` with the command that fetches it."
    import open_clip

    file = Path(path or Path(root) / "clip" / "open_clip_model.safetensors").expanduser()
    if not file.is_file():
        raise missing("clip", root, f"CLIP ViT-L/14 is not at {printable(file)}")
    model = open_clip.create_model(name)
    try:
        model.load_state_dict(load_tensors(file))
    except RuntimeError as e:
        why = str(e).splitlines()[-1].strip()
        raise ParameterError(f"{printable(file)} is not {name}: {why}") from None
    return ClipText(model, file.name, device)
