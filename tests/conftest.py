import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers():
    "Every test draws the same numbers, alone and among others."
    torch.manual_seed(0)
