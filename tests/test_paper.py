"The record of published numbers, the registry of its cells, the claims and their fixed list."

import csv
import json
import math
import subprocess
from datetime import datetime
from importlib import resources
from pathlib import Path

import pytest
import torch

from uvit_repro.config import (
    CONFIGS,
    PROTOCOLS,
    TABLE2,
    ModelConfig,
    ParameterError,
    experiment,
    with_overrides,
)
from uvit_repro.paper import numbers as paper
from uvit_repro.paper.claims import arm_experiment, fixed_list, load_claims, queued_experiments
from uvit_repro.paper.registry import KEY, KINDS, cell_id, registry, select
from uvit_repro.runs.experiment import run_experiment

CELLS = registry()


def quiet(line):
    pass


def rows_of(name: str) -> list[dict]:
    path = resources.files("uvit_repro") / "paper" / "tables" / name
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


# ---- numbers


def test_every_row_is_read_and_named_once():
    df, rows = paper.load_paper(), rows_of("uvit_tables.csv")
    assert df[list(rows[0])].to_dict("records") == rows
    assert not df.duplicated(["source", "dataset", "method", "metric", "condition"]).any()


def test_conditions_are_parsed():
    df = paper.load_paper("Figure 2a", "CIFAR10", "FID")
    assert (
        set(df.num_samples) == {10_000} and df.steps.min() == 100_000 and df.steps.max() == 500_000
    )
    assert set(df.reading_error) == {0.1, 0.15, 0.2, 0.4}
    assert set(paper.load_paper("Table 3", metric="FID").nfe) == {4, 5, 10, 15, 20}
    coco = paper.load_paper("Table 4", metric="FID")
    assert set(coco.num_samples) == {30_000}
    assert coco[coco.method == "U-ViT-S/2"].steps.tolist() == [1_000_000]  # "1M iterations"
    words = paper.load_paper("Section 3.1")
    assert words.number.isna().all() and words.steps.isna().all()


def test_a_caller_cannot_damage_the_cache():
    df = paper.load_paper("Table 2")
    df["number"] = 0
    df.loc[:, "method"] = "gone"
    assert paper.published("Table 2", "", "U-ViT-Small", "layers") == 13
    paper.figure2("a").overrides.iloc[-1]["skip"] = "changed"
    assert paper.FIGURE2["a"][1][-1][1] == {"skip": "none"} and paper.figure2("a").overrides.iloc[
        -1
    ] == {"skip": "none"}


@pytest.mark.parametrize(
    "kw, part",
    [
        ({"source": "Table 99"}, "'Table 7'"),
        ({"source": "Table 1", "dataset": "cifar10"}, "'CIFAR10'"),
        ({"source": "Table 1", "metric": "KID"}, "'FID'"),
        ({"paper": "SiT"}, "'GenViT'"),
    ],
)
def test_unknown_names_list_the_known(kw, part):
    with pytest.raises(ValueError) as e:
        paper.load_paper(**kw)
    assert part in str(e.value) and repr(list(kw.values())[-1]) in str(e.value)


def test_other_papers_do_not_mix_in():
    assert set(paper.load_paper().paper) == {"U-ViT"}
    assert set(paper.load_paper(paper=None).paper) == {"U-ViT", "DiffiT", "GenViT"}
    assert paper.published("Table 1", "ImageNet 256x256", "DiffiT", "FID", paper="DiffiT") == 1.73
    with pytest.raises(ValueError):
        paper.load_paper("Abstract")  # a source of DiffiT only


def test_published_is_one_number_or_an_error():
    assert paper.published("Table 1", "ImageNet 256x256", "U-ViT-H/2", "FID") == 2.29
    table3 = ("Table 3", "ImageNet 256x256", "U-ViT-H/2", "FID")
    assert (
        paper.published(*table3, nfe=5, steps=500_000)
        == paper.published(*table3, condition="5 sampling steps", steps=500_000)
        == 4.64
    )
    with pytest.raises(ValueError, match="10 rows match.*16.48"):
        paper.published(*table3)
    with pytest.raises(ValueError, match="no rows match.*U-ViT-H/2"):
        paper.published("Table 3", "ImageNet 256x256", "U-ViT-X", "FID")
    with pytest.raises(ValueError, match="is a word.*4x RTX"):
        paper.published("Table 6", "CIFAR10", "U-ViT-S/2", "devices")
    with pytest.raises(ValueError, match="condition = 'step': known are"):
        paper.published(*table3, step=500_000)


def test_low_confidence_only_on_request():
    low = ("Figure 3", "CIFAR10", "depth 9", "FID")
    with pytest.raises(ValueError, match="confidence low"):
        paper.published(*low)
    assert paper.published(*low, confidence="low") == 13


def test_figure2():
    d = paper.figure2()
    assert list(d.columns) == [
        "panel",
        "variant",
        "overrides",
        "steps",
        "fid",
        "error",
        "confidence",
    ]
    assert len(d) == sum(len(paper.load_paper(f"Figure 2{p}")) for p in "abcde") == 119
    for p, g in d.groupby("panel"):
        assert g.overrides.iloc[0] == {} and g.variant.iloc[0] == paper.FIGURE2[p][1][0][0]
        assert all(v.steps.is_monotonic_increasing for _, v in g.groupby("variant"))
        end = g[g.steps == 500_000]
        assert end.fid.idxmin() == end.index[0]  # the adopted variant ends best in every panel
    with pytest.raises(ValueError, match="'a', 'b', 'c', 'd', 'e'"):
        paper.figure2("f")


def test_figure2_variants_are_models():
    base, seen = CONFIGS["CIFAR10 U-ViT-S/2"], set()
    for _, variants in paper.FIGURE2.values():
        for _, o in variants[1:]:
            seen.add(with_overrides(base, **o).run_id)  # raises for an impossible field or value
    assert (
        len(seen) == sum(len(v) - 1 for _, v in paper.FIGURE2.values()) == 10
        and base.run_id not in seen
    )
    assert paper.FIGURE2["e"][1][-1][1] == {"pos_embed": "none"} and "(3) None" not in set(
        paper.figure2("e").variant
    )


def test_table2_is_config():
    t = paper.table2()
    for (_, row), c in zip(t.iterrows(), TABLE2.values(), strict=True):
        assert (row.layers, row.hidden_size, row.heads) == (
            c["depth"],
            c["embed_dim"],
            c["num_heads"],
        )
        assert row.mlp_size == row.hidden_size * ModelConfig().mlp_ratio


def table5():
    "The released configurations that Table 5 summarises, one row per (dataset, method)."
    df = paper.load_paper("Table 5")
    df = df[df["condition"].str.startswith("value in the official config")]
    df = df.assign(cell=df["number"].astype(object).where(df["number"].notna(), df["value"]))
    return df.pivot(index=["dataset", "method"], columns="metric", values="cell")


@pytest.mark.parametrize("name", CONFIGS)
def test_table5_is_config(name):
    t = table5()
    theirs = t.loc[next(i for i in t.index if " ".join(i) == name)].dropna().to_dict()
    assert (
        theirs.pop("optimizer") == "AdamW" and theirs.pop("dropout") == 0
    )  # no fields: the only optimiser, and no dropout anywhere
    ours = paper.as_table5(CONFIGS[name])
    assert set(ours) == set(theirs)
    for k, v in theirs.items():
        assert ours[k] == v if isinstance(v, str) else math.isclose(ours[k], v, rel_tol=1e-12), (
            k,
            ours[k],
            v,
        )


def test_table5_keeps_the_released_value():
    t = table5()
    assert t.shape[0] == 10 and t.loc[("ImageNet 256x256", "U-ViT-L/2"), "p_uncond"] == 0.15
    assert (
        paper.published("Table 5", "ImageNet 256x256", "U-ViT-L/2", "p_uncond", confidence="medium")
        == 0.1
    )  # as printed


def test_figure7():
    for s in ("concatenation", "addition", "no long skip"):
        m = paper.figure7(s).to_numpy()
        assert m.shape == (13, 13) and (m == m.T).all() and (m.diagonal() == 1).all()
    assert (
        paper.figure7("concatenation").to_numpy().mean()
        < paper.figure7("addition").to_numpy().mean()
    )
    with pytest.raises(ValueError, match="no long skip"):
        paper.figure7("none")


# ---- the registry


def test_every_row_of_the_record_is_one_cell_with_its_value():
    want = [{"paper": "U-ViT", **r} for r in rows_of("uvit_tables.csv")]
    want += rows_of("other_tables.csv")
    names = {"source": "place", "method": "row", "metric": "column"}
    want = [{names.get(k, k): v for k, v in r.items()} for r in want]
    for r in rows_of("uvit_fig7_cka.csv"):
        column, value = f"cka_{r['block_i']}_{r['block_j']}", r["cka"]
        known = {"place": "Figure 7", "row": r["setting"], "column": column, "value": value}
        want.append({k: r[k] for k in ("provenance", "confidence")} | known)
    have = CELLS.to_dict("records")
    assert len(have) == len(want) == 832 + 216 + 507 and CELLS.cell.is_unique
    for cell, row in zip(have, want, strict=True):
        assert {k: cell[k] for k in row} == row
        assert cell["cell"] == cell_id(*(cell[k] for k in KEY))


def test_cells_have_a_kind_and_a_run_or_a_reason():
    assert set(CELLS.kind) == set(KINDS)
    runs = CELLS[CELLS.kind == "reproducible"]
    assert (runs.fields.map(len) == 1).all() and (runs.base != "").all()
    assert (CELLS[CELLS.kind == "other model"].reason != "").all()
    for cell in CELLS.itertuples():
        assert cell.base in ("", *CONFIGS) or cell.base.startswith(("U-Net", "DiffiT", "GenViT"))
        for fields in cell.fields if cell.base in CONFIGS else ():
            with_overrides(CONFIGS[cell.base], **fields)


@pytest.mark.parametrize(
    "place, row, column, kinds",
    [
        ("Table 1", "EDM", "FID", {"quoted"}),
        ("Table 1", "U-ViT-H/2", "FID", {"reproducible"}),
        ("Table 1", "U-ViT-H/2", "params_M", {"computed", "part"}),
        ("Table 5", "U-ViT-S/2", "lr", {"setting"}),
        ("Table 6", "U-ViT-S/2", "training_hours", {"time"}),
        ("Appendix A", "U-ViT-L/2", "memory_GB", {"memory"}),
        ("Appendix E", "U-Net (ADM code)", "FID", {"reproducible"}),
        ("Appendix E", "U-ViT-H/2", "gflops", {"computed"}),
        ("Figure 3", "depth 13 -> 17", "FID_direction", {"statement"}),
        ("Section 3.1", "position embedding: none", "outcome", {"statement"}),
    ],
)
def test_known_cells_are_of_their_kind(place, row, column, kinds):
    key = {"paper": "U-ViT", "place": place, "row": row, "column": column}
    cells = CELLS[(CELLS[list(key)] == list(key.values())).all(axis=1)]
    assert set(cells.kind) == kinds


def test_published_numbers_are_what_the_papers_printed_of_their_own():
    counted = CELLS[CELLS.counts]
    assert 400 < len(counted) < 600
    assert counted.number.notna().all() and "quoted" not in set(counted.kind)
    assert not counted.provenance.str.startswith("computed").any()
    assert not counted.place.str.contains("exact|cost|External|README").any()
    assert (counted.place == "Figure 7").sum() == 3 * 13 * 12 / 2
    assert (counted.place == "Table 2").sum() == 25 + 2  # U-ViT's, and DiffiT's two
    fid = counted[(counted.row == "U-ViT-H/2") & (counted.column == "FID")]
    assert (fid.number == 2.29).sum() == 1  # Tables 1 and 7, Appendix E and the README print it


def test_the_registry_is_a_copy():
    cells = registry()
    cells["kind"] = "gone"
    assert set(registry().kind) == set(KINDS)


@pytest.mark.parametrize(
    "what, near",
    [("tabel1", "table1"), ("fig99", "Known"), ("", "Known"), ("fig", "Known"), ("fig2a-5", "2a")],
)
def test_unknown_names_say_what_is_near(what, near):
    with pytest.raises(ParameterError, match=near):
        select(what)


def test_names_of_tables_and_figures():
    assert {f"Figure 2{p}" for p in "abcde"} <= set(select("fig2").place)
    assert set(select("fig2d").place) == {"Figure 2d"}
    assert set(select("Figure 3").place) == {"Figure 3", "Figure 3 (cost)"}
    assert set(select("table1").paper) == {"U-ViT"}
    assert set(select("diffit-table1").paper) == {"DiffiT"}
    assert len(select("all")) == len(CELLS) and len(select(CELLS.cell[7])) == 1


# ---- claims


def test_claims():
    claims = load_claims()
    assert len(claims) == 70 and claims.id.is_unique
    assert set(claims.protocol) == {"P0", "P1", "P2", "P3", "P4", "PC"}


@pytest.mark.parametrize(
    "arm, run_id",
    [
        ("adopted", "cifar10-uvit-128x9-4-adopted-s20-1cc937026f"),
        ("none", "cifar10-uvit-128x9-4-skip-none-s20-9ba3dd6f5b"),
    ],
)
def test_runs_of_the_fixed_list_keep_their_names(arm, run_id):
    assert arm_experiment("cpu", arm, 20).run_id == run_id


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


ROOT = Path(__file__).resolve().parent.parent


def git(*args: str) -> str:
    "The output of git; empty where there is no git or no repository."
    try:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""


def what_judges(text: str) -> dict:
    "What of a fixed list decides a claim: all but notes in words and the order of its queue."
    entry = json.loads(text)["cpu"]
    claims = [
        {k: v for k, v in claim.items() if k not in ("note", "caveat")} for claim in entry["claims"]
    ]
    names = ("measure", "weights", "step", "log_snr_bands", "arms", "seeds", "long")
    return {**{name: entry.get(name) for name in names}, "claims": claims}


def test_the_fixed_list_is_older_than_every_run_that_it_judges():
    queued = {e.run_id for e in queued_experiments("cpu")}
    records = [json.loads(p.read_bytes()) for p in ROOT.glob("results/published/*/run.json")]
    started = [
        datetime.fromisoformat(r["started"].replace("Z", "+00:00"))
        for r in records
        if r["run_id"] in queued
    ]
    dates = git("log", "--reverse", "--format=%cI").split()
    if not dates or datetime.fromisoformat(dates[0]) > min(started):
        pytest.skip("no history that reaches back to the runs")
    path = "uvit_repro/paper/tables/fixed_list.json"
    today = what_judges((ROOT / path).read_text("utf-8"))
    log = git("log", "--follow", "--format=%H %cI", "--name-only", "--", path).split()
    fixed = datetime.now().astimezone()
    for commit, date, name in zip(log[::3], log[1::3], log[2::3], strict=True):
        if what_judges(git("show", f"{commit}:{name}")) != today:
            break
        fixed = datetime.fromisoformat(date)
    assert started and fixed <= min(started)


def test_damaged_tables_are_named(monkeypatch, tmp_path):
    folder = tmp_path / "paper" / "tables"
    folder.mkdir(parents=True)
    (folder / "claims.csv").write_bytes(b"id\n\xff")
    (folder / "fixed_list.json").write_text('{"cpu": ', "utf-8")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    for work, name in ((load_claims, "claims.csv"), (lambda: fixed_list("cpu"), "fixed_list")):
        with pytest.raises(ValueError, match=f"{name}.*reinstall"):
            work()
    with pytest.raises(ValueError, match="absent.csv.*reinstall"):
        paper.read_table("absent.csv")


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
