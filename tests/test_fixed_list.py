"""The fixed list of claims: every run that a claim needs is queued once, and a longer run continues a shorter one."""

import pytest
import torch

from uvit_repro.config import PROTOCOLS, ParameterError, experiment
from uvit_repro.paper.fixed_list import arm_experiment, fixed_list, queued_experiments
from uvit_repro.runs.run import run_experiment


def quiet(line):
    pass


def test_every_run_of_the_list_is_queued_exactly_once():
    entry = fixed_list("cpu")
    queued = [e.run_id for e in queued_experiments("cpu")]
    assert len(queued) == len(set(queued))
    for arm in entry["arms"]:
        for seed in entry["seeds"].get(arm, entry["seeds"]["default"]):
            assert arm_experiment("cpu", arm, seed).run_id in queued


def test_claims_name_arms_and_measured_steps():
    entry = fixed_list("cpu")
    for claim in entry["claims"]:
        arms = [
            claim[k] for k in ("best", "better", "worse", "from", "to") if k in claim
        ] + claim.get("others", [])
        assert len(arms) >= 2 and set(arms) <= set(entry["arms"])
        assert claim["kind"] == "direction" or claim["kind"] == "best_of" or claim["margin"] > 0
        for arm, step in claim.get("equal_time", {}).items():
            e = arm_experiment("cpu", arm, 20)
            assert step == e.train.n_steps or step in e.evaluation.loss_steps


def test_adopted_arm_is_the_protocol():
    assert arm_experiment("cpu", "adopted", 20).run_id == experiment("cpu", seed=20).run_id
    assert PROTOCOLS["cpu"].train.n_steps == fixed_list("cpu")["step"]


def test_unknown_protocol_and_arm_are_refused():
    with pytest.raises(ParameterError, match="no fixed list: allowed are cpu"):
        fixed_list("laptop")
    with pytest.raises(ParameterError, match="allowed are adopted, none"):
        arm_experiment("cpu", "nothing", 20)


def test_a_longer_run_continues_a_shorter_one(tmp_path):
    fields = {
        "lr_schedule": "constant",
        "curve_steps": (),
        "loss_steps": (),
        "num_samples": 80,
        "keep_checkpoint": True,
    }
    long_fields = {**fields, "n_steps": 20, "loss_steps": (5,)}
    unbroken = run_experiment(experiment("smoke", **long_fields), tmp_path / "a", quiet)
    short = run_experiment(
        experiment("smoke", **{**fields, "n_steps": 12, "loss_steps": (5,)}), tmp_path / "b", quiet
    )
    continued = run_experiment(experiment("smoke", **long_fields), tmp_path / "b", quiet)
    assert continued.info["training"]["continued_from"] == {"run_id": short.run_id, "step": 12}
    assert unbroken.info["training"]["continued_from"] is None
    assert continued.info["training"]["steps"] == 8
    for name in ("weights-0000005.safetensors", "weights-0000020.safetensors"):
        assert (unbroken.folder / name).read_bytes() == (continued.folder / name).read_bytes()
    other = run_experiment(
        experiment("smoke", **{**long_fields, "lr": 1e-4}), tmp_path / "b", quiet
    )
    assert other.info["training"]["continued_from"] is None
    assert torch.load(short.folder / "resume-0000012.pt", weights_only=True)["step"] == 12
