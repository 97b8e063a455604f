"""Claims of the papers, and the few that a protocol judges: fixed, with arms, before their runs."""

import json
from importlib import resources

import pandas as pd

from uvit_repro.config import Experiment, ParameterError, experiment
from uvit_repro.paper.numbers import damaged_table, read_table


def load_claims() -> pd.DataFrame:
    "Every claim that can be checked; `protocol` is the code in front of `cheapest_protocol`."
    df = read_table("claims.csv")
    return df.assign(protocol=df["cheapest_protocol"].str.split().str[0])


def fixed_list(
    protocol: str,  # a protocol with a fixed list: cpu
) -> dict:  # arms, seeds, claims, queue, measure, step
    "The fixed list of a protocol; `ParameterError` for a protocol without one."
    path = resources.files("uvit_repro") / "paper" / "tables" / "fixed_list.json"
    try:
        lists = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise damaged_table("fixed_list.json", error) from None
    if not isinstance(lists.get(protocol), dict):
        allowed = ", ".join(name for name in lists if name != "about")
        raise ParameterError(f"protocol = {protocol!r} has no fixed list: allowed are {allowed}")
    return lists[protocol]


def arm_experiment(
    protocol: str,  # a protocol with a fixed list
    arm: str,  # name of an arm of the list
    seed: int,  # seed of the run
    long: bool = False,  # the longer run of the list
) -> Experiment:  # the run of one arm at one seed
    "The experiment of one arm at one seed."
    fixed = fixed_list(protocol)
    if arm not in fixed["arms"]:
        raise ParameterError(f"arm = {arm!r}: allowed are {', '.join(fixed['arms'])}")
    longer = fixed["long"] if long else {}
    return experiment(protocol, seed=seed, **{**fixed["arms"][arm], **longer})


def queued_experiments(
    protocol: str,  # a protocol with a fixed list
) -> list[Experiment]:
    "Every run of the fixed list, in the order in which the queue runs them."
    return [
        arm_experiment(protocol, arm, seed, part.get("long", False))
        for part in fixed_list(protocol)["queue"]
        for seed in part["seeds"]
        for arm in part["arms"]
    ]
