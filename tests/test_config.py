"Experiments: what is refused, what a run is called, and that published names stay."

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from uvit_repro.config import (
    CONFIGS,
    LAPTOP,
    PARAMETERS,
    PROTOCOLS,
    TABLE2,
    Experiment,
    ModelConfig,
    ParameterError,
    Section,
    TrainConfig,
    check_geometry,
    check_params,
    describe,
    deviations,
    eval_id,
    experiment,
    from_dict,
    key_seed,
    preset,
    read_options,
    setting,
    with_overrides,
)
from uvit_repro.config.durations import format_duration, parse_duration
from uvit_repro.config.settings import coerce
from uvit_repro.runs import run_experiment

PUBLISHED = sorted(Path(__file__).parents[1].glob("results/published/*/run.json"))


# ---- settings


def test_values_are_brought_to_their_type():
    assert coerce("lr", 1, float) == 1.0 and coerce("n_steps", 1e4, int) == 10_000
    assert coerce("betas", "0.9, 0.99", tuple[float, ...]) == (0.9, 0.99)
    assert coerce("betas", [0.9, 1], tuple[float, ...]) == (0.9, 1.0)
    assert coerce("curve_steps", 5, tuple[int, ...]) == (5,)


BAD_VALUES = [
    *(None, "two", "٣", "", b"1", [], {}, {1}, object(), 1j, 2.5, True),
    *(10**400, -(10**400), float("nan"), float("inf"), -float("inf"), ["a", [1]], "nan", "1e999"),
    *(
        "x" * 10_000,
        "a\nb\x1b[31m",
        [float("nan")],
        "0.9,٣",
        (10**400,),
        range(10**12),
        ParameterError,
    ),
]


@pytest.mark.parametrize("name", [*PARAMETERS, "seed", "protocol"])
def test_every_setting_refuses_wrong_values_in_one_short_line(name):
    for value in BAD_VALUES:
        try:
            if name == "protocol":
                exp = experiment(value if value is not None else "tiny")
            else:
                exp = with_overrides(LAPTOP, **{name: value})
        except ParameterError as error:
            text = str(error)
            assert len(text) < 400 and text.isprintable() and name in text, (name, value, text)
        else:  # what is accepted is a value of the setting's own type
            assert exp == from_dict(json.loads(json.dumps(exp.to_dict())))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"patch_sze": 2}, "did you mean patch_size"),
        ({"zzz": 2}, r"known are model, patch_size.* \(\d+ in all\)"),
        ({"patch_size": 3}, r"try one of \[1, 2, 4, 8\]"),
        ({"depth": 8}, "try 7 or 9"),
        ({"num_heads": 3}, "must divide 64"),
        ({"skip": "cat"}, "'concat'"),
        ({"dataset": "mnist"}, "cifar10"),
        ({"dataset": 5}, "expected str"),
        ({"dataset": "folder:"}, "a path must follow"),
        ({"preset_name": 5}, "expected str"),
        ({"n_steps": 0}, "at least 1"),
        ({"n_steps": 10**9 + 1}, "at most 1000000000"),
        ({"lr": float("nan")}, "finite"),
        ({"p_mean": float("inf")}, "finite"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"betas": (0.9, 1.0)}, "at most 0.99"),
        ({"ema_rates": ()}, "at least one"),
        ({"seed": -1}, "at least 0"),
        ({"weights": "ema_0.5"}, "ema_0.999"),
        ({"p_uncond": 0.1, "condition": "none"}, "no label to drop"),
        ({"p_uncond": 0.0}, "needs p_uncond > 0"),
        ({"prediction": "edm"}, "edm goes with"),
        ({"num_classes": 20}, "ten classes"),
        ({"options": "a=1"}, "U-ViT has none"),
        ({"processes": 3}, "multiple of processes"),
    ],
)
def test_impossible_experiments_say_what_is_allowed(fields, text):
    with pytest.raises(ParameterError, match=text):
        experiment("laptop", **fields)


@pytest.mark.parametrize("fields", [{"embed_dim": 2**16, "num_heads": 1}, {"batch_size": 10**6}])
def test_sizes_beyond_memory_are_refused_before_they_are_allocated(tmp_path, fields):
    exp = experiment("laptop", **fields)
    monster = with_overrides(exp, depth=99)
    with pytest.raises(ParameterError, match="GiB of memory") as error:
        run_experiment(monster, tmp_path)
    assert len(str(error.value)) < 400 and not list(tmp_path.glob("*/run.json"))


def test_features_that_do_not_fit_the_images_are_refused_before_training(tmp_path):
    with pytest.raises(ParameterError, match="resnet20_cifar10 takes 3x32x32"):
        run_experiment(experiment("smoke", features="resnet20_cifar10"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_protocol_and_foreign_sections_are_refused():
    with pytest.raises(ParameterError, match="laptop"):
        experiment("tiny")
    with pytest.raises(ParameterError, match="expected ModelConfig"):
        Experiment(model=5)


def test_geometry_of_huge_sizes_is_checked_at_once():
    with pytest.raises(ParameterError, match="must divide"):
        check_geometry(10**9, 7, 512, 13, 8)
    with pytest.raises(ParameterError, match="patch_size = 0"):
        check_geometry(32, 0, 512, 13, 8)


@dataclass(frozen=True)
class Options(Section):
    split: str = setting("9:3", "text")
    bias: bool = setting(True, "a switch")
    kind: str = setting("a", "a choice", ("a", "b"))
    n: int = setting(3, "a number", low=1)
    rate: float = setting(0.1, "a number", low=0)


def test_options_are_typed():
    assert read_options("", Options) == Options()
    assert read_options("split=6:6, bias=false,n=4", Options) == Options("6:6", False, n=4)


@pytest.mark.parametrize("text", ["m=1", "n", "n=x", "n=٣", "n=0", "kind=c", "bias=2", "rate=nan"])
def test_wrong_options_are_refused(text):
    with pytest.raises(ParameterError) as error:
        read_options(text, Options)
    assert len(str(error.value)) < 400 and text.partition("=")[0] in str(error.value)


def test_unread_parameters_of_a_notebook_are_refused_once():
    names = {"a": 1, "patch_sze": 2, "_names_before": {"a"}}
    with pytest.raises(ParameterError, match="did you mean patch_size"):
        check_params(names, ["patch_size"])
    check_params(names, ["patch_size"])  # the cell is run again
    check_params({"a": 1, "patch_size": 2, "_names_before": {"a"}}, ["patch_size"])


# ---- presets and protocols


def test_presets_are_table2():
    sizes = {"patch_size": 2, "embed_dim": 512, "depth": 13, "num_heads": 8, "conv": "after"}
    assert preset("U-ViT-S/2") == sizes
    assert preset("U-ViT-S/2 (Deep)")["depth"] == 17 and preset("U-ViT-H/4")["conv"] == "none"
    for (name, row), millions in zip(TABLE2.items(), (44, 58, 131, 287, 501), strict=True):
        blocks = (13 * row["depth"] - 1) * row["embed_dim"] ** 2 / 1e6
        assert abs(blocks / millions - 1) < 0.015, name


@pytest.mark.parametrize("name", ["U-ViT-X/2", "U-ViT-S", "U-ViT-S/two", "U-ViT-S/0", "U-ViT-S/٣"])
def test_unknown_presets_are_refused(name):
    with pytest.raises(ParameterError, match="U-ViT-S/P"):
        preset(name)


def test_experiment_resolves_protocol_data_and_preset():
    assert experiment("laptop") == LAPTOP
    released = CONFIGS["ImageNet 256x256 U-ViT-H/2"]
    assert experiment("paper", "imagenet256", "U-ViT-H/2") == released
    assert experiment("laptop", patch_size=4, seed=3).model.patch_size == 4
    assert experiment("laptop", n_steps=1500).evaluation.curve_steps == (1000,)
    assert experiment("gpu", "celeba64").evaluation.features == "inception"
    assert experiment("laptop", "shapes").train.n_steps == 1800


def test_deviations_from_the_released_configuration():
    assert deviations(CONFIGS["CIFAR10 U-ViT-S/2"]) == []
    assert ("n_steps", 10_000, 500_000) in deviations(PROTOCOLS["gpu"])


@pytest.mark.parametrize("name", [*CONFIGS, *PROTOCOLS])
def test_records_read_back(name):
    exp = {**CONFIGS, **PROTOCOLS}[name]
    assert from_dict(json.loads(json.dumps(exp.to_dict()))) == exp
    assert f"seed {exp.seed}" in describe(exp)


@pytest.mark.parametrize("record", [None, [], {}, {"protocol": "x", "seed": 0, "model": 5}])
def test_foreign_records_are_refused(record):
    with pytest.raises(ParameterError):
        from_dict(record)


def test_old_records_load():
    record = LAPTOP.to_dict()
    record["execution"] |= {"attention": "matrix", "compile": False, "checkpoint_keep": 2.0}
    del record["execution"]["activation_budget"]
    execution = from_dict(record).execution
    assert (execution.attention, execution.compile) == ("math", "off")
    assert execution.activation_budget == 2.0
    record["model"]["colour"] = "red"
    with pytest.raises(ParameterError, match="colour"):
        from_dict(record)


# ---- identity


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.parent.name)
def test_published_runs_keep_their_names(path):
    record = json.loads(path.read_text("utf-8"))
    assert from_dict(record["experiment"]).run_id == path.parent.name


def test_training_names_a_run_and_nothing_else_does():
    same = [{"sampler": "ddim"}, {"device": "cpu"}, {"data_root": "/x"}, {"num_samples": 5}]
    same += [{"threads": 1}, {"weights": "raw"}, {"attention": "math"}]
    other = [{"seed": 1}, {"precision": "fp32"}, {"data_sha256": "0" * 64}, {"skip": "none"}]
    other += [{"lr": 1e-3}, {"holdout": 10}]
    assert {with_overrides(LAPTOP, **kw).run_id for kw in same} == {LAPTOP.run_id}
    assert len({with_overrides(LAPTOP, **kw).run_id for kw in other} | {LAPTOP.run_id}) == 7


@dataclass(frozen=True)
class LaterTrainConfig(TrainConfig):
    label_smoothing: float = setting(0.0, "a field that does not exist yet", low=0)


def test_later_fields_at_their_default_keep_names():
    later = replace(LAPTOP, train=LaterTrainConfig(**dataclasses.asdict(LAPTOP.train)))
    assert later.run_id == LAPTOP.run_id
    changed = replace(later, train=replace(later.train, label_smoothing=0.1))
    assert changed.run_id != LAPTOP.run_id


def test_measurements_are_named_by_sampling_and_evaluation():
    a = eval_id(LAPTOP, 1000, 500)
    assert eval_id(with_overrides(LAPTOP, curve_samples=7), 1000, 500) == a
    assert eval_id(with_overrides(LAPTOP, cfg_scale=2.0), 1000, 500) != a
    assert eval_id(with_overrides(LAPTOP, labels="frequency"), 1000, 500) != a
    assert "loss" in eval_id(LAPTOP, 1000, 0)


def test_key_seed_is_a_function_of_its_key():
    keys = [(s, p, i) for s in range(3) for p in ("noise", "t") for i in range(50)]
    assert len({key_seed(*key) for key in keys}) == len(keys)
    assert key_seed(0, "noise", 5) == key_seed(0, "noise", 5) < 2**63


def test_durations():
    assert [format_duration(s) for s in (42, 185, 3720, 86400 * 12.5)] == [
        "42s",
        "3m05s",
        "1h02m",
        "12.5 days",
    ]
    assert [parse_duration(t) for t in (540, "90s", "9m", "1h")] == [540, 90, 540, 3600]
    with pytest.raises(ParameterError, match="not a duration"):
        parse_duration("٣m")


def test_model_defaults_are_the_adopted_variant():
    assert ModelConfig() == CONFIGS["CIFAR10 U-ViT-S/2"].model
