import signal

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


@pytest.fixture(autouse=True)
def same_numbers():
    "Every test draws the same numbers, alone and among others."
    torch.manual_seed(0)
