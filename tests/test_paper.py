"The record of published numbers, as a user of the library reads it."

import math
from importlib import resources

import pytest

from uvit_repro.config import CONFIGS, TABLE2, ModelConfig, with_overrides
from uvit_repro.paper import numbers as paper


def test_every_row_is_read_and_named_once():
    raw = (
        (resources.files("uvit_repro") / "paper" / "tables" / "uvit_tables.csv")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    df = paper.load_paper()
    assert len(df) == len(raw) - 1
    assert not df.duplicated(["source", "dataset", "method", "metric", "condition"]).any()
    assert list(raw[0].split(",")) == [c for c in df.columns if c in raw[0].split(",")]


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
    with pytest.raises(ValueError, match="columns are"):
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
    with pytest.raises(ValueError, match="a, b, c, d, e"):
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


@pytest.mark.parametrize("name", CONFIGS)
def test_table5_is_config(name):
    t = paper.table5()
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
    t = paper.table5()
    assert t.shape[0] == 10 and t.loc[("ImageNet 256x256", "U-ViT-L/2"), "p_uncond"] == 0.15
    assert (
        paper.published("Table 5", "ImageNet 256x256", "U-ViT-L/2", "p_uncond", confidence="medium")
        == 0.1
    )  # as printed
    assert str(t.batch_size.dtype) == "int64"


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


def test_claims():
    c = paper.load_claims()
    assert (
        len(c) == 68 and c.id.is_unique and set(c.protocol) == {"P0", "P1", "P2", "P3", "P4", "PC"}
    )
