"""The claims that are judged at a protocol, fixed before their runs, and the order in which those runs are queued."""

import functools
import json
from importlib import resources

from uvit_repro.config import Experiment, ParameterError, experiment


@functools.cache
def _file() -> dict:
    return json.loads(
        (resources.files("uvit_repro") / "paper" / "tables" / "fixed_list.json").read_text("utf-8")
    )


def fixed_list(
    protocol: str,  # a protocol with a fixed list: cpu
) -> dict:  # arms, seeds, claims, queue, measure, step
    "The fixed list of a protocol; `ParameterError` for a protocol without one."
    known = [name for name, entry in _file().items() if isinstance(entry, dict)]
    if protocol not in known:
        raise ParameterError(
            f"protocol = {protocol!r} has no fixed list: allowed are {', '.join(known)}"
        )
    return _file()[protocol]


def arm_experiment(
    protocol: str,  # a protocol with a fixed list
    arm: str,  # name of an arm of the list
    seed: int,  # seed of the run
    long: bool = False,  # the longer run of the list
) -> Experiment:  # the run behind one arm and seed
    "The experiment of one arm at one seed."
    entry = fixed_list(protocol)
    if arm not in entry["arms"]:
        raise ParameterError(f"arm = {arm!r}: allowed are {', '.join(entry['arms'])}")
    fields = dict(entry["arms"][arm])
    if long:
        fields.update(entry["long"])
    return experiment(protocol, seed=seed, **fields)


def queued_experiments(
    protocol: str,  # a protocol with a fixed list
) -> list[Experiment]:  # every run of the list, in the order of the queue
    "The runs of the fixed list in the order in which they are to be run."
    return [
        arm_experiment(protocol, arm, seed, part.get("long", False))
        for part in fixed_list(protocol)["queue"]
        for seed in part["seeds"]
        for arm in part["arms"]
    ]
