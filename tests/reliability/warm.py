"""Imported once by the server that children are forked from: they inherit what it has computed."""

import tempfile
from pathlib import Path

import torch

from reliability.artefacts import encode_small, train_small

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    train_small(Path(folder))
    encode_small(Path(folder))
