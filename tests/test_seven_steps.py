"""The way of one parameter from `-p patch_size 2` to the convolution has few steps."""

import traceback
from pathlib import Path

import pytest

import uvit_repro
from uvit_repro import uvit
from uvit_repro.config import experiment
from uvit_repro.runs import run_experiment

LIBRARY = Path(uvit_repro.__file__).parent


class Arrived(Exception):
    "Raised where the parameter arrives."


def test_a_parameter_reaches_the_convolution_in_seven_steps(tmp_path, monkeypatch):
    seen, original = {}, uvit.PatchEmbed.__init__
    exp = experiment(
        "smoke", patch_size=2, embed_dim=36
    )  # steps one and two: the cell and `experiment`

    def arrive(self, patch_size, in_chans, embed_dim, *args):
        frames = traceback.extract_stack()
        calls = [f.name for f in frames if Path(f.filename).is_relative_to(LIBRARY)]
        if embed_dim != exp.model.embed_dim or "least_memory" in calls:
            # A network of the equivalence certificate, or one that only counts its bytes.
            return original(self, patch_size, in_chans, embed_dim, *args)
        seen["calls"] = calls
        seen["patch_size"] = patch_size
        raise Arrived

    monkeypatch.setattr(uvit.PatchEmbed, "__init__", arrive)
    with pytest.raises(Arrived):
        run_experiment(exp, tmp_path, lambda line: None)
    assert seen["patch_size"] == 2
    calls = iter(seen["calls"])
    steps = ["run_experiment", "train", "build_model", "from_config", "__init__"]
    assert all(step in calls for step in steps), seen["calls"]
    assert len(seen["calls"]) <= 10, " ".join(seen["calls"])
