"The README's numbers have runs, its links have targets, its commands exist."

import re
from pathlib import Path

import pandas as pd

from uvit_repro.config import experiment
from uvit_repro.runs.records import load_results

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_links_and_pictures_are_there():
    links = [l for l in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in l]
    missing = [
        l for l in links if not (ROOT / l).exists() and l != "results/report.html"
    ]  # the report is made by the first command
    assert len(links) > 15 and not missing, missing


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", TEXT, re.M))
    assert {"report", "test"} <= used <= targets


def test_headline_numbers_have_runs():
    "Every row of the first table equals a committed measurement, rounded as printed."
    df = load_results("published")
    rows = re.findall(r"^\| seed (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) % \|", TEXT, re.M)
    assert len(rows) >= 2
    for seed, fd, real, agree in rows:
        g = (
            df[(df.run_id == experiment("laptop", seed=int(seed)).run_id) & (df.step == 4000)]
            .set_index("metric")
            .value
        )
        assert [fd, real, agree] == [
            f"{g['fd_digits_cnn_test']:.2f}",
            f"{g['fd_digits_cnn_real']:.2f}",
            f"{100 * g['class_agreement']:.1f}",
        ]


def test_speed_table_has_its_record():
    "Every ratio of the speed table equals the linked benchmark, rounded as printed."
    record = re.search(r"\[record\]\((\S+bench\.csv)\)", TEXT)[1]
    df = pd.read_csv(ROOT / record)
    df = df[df.metric == "speedup"].set_index(["what", "precision"])
    text = lambda r: f"{r.value:.2f}x [{r.low:.2f}, {r.high:.2f}]"
    rows = re.findall(r"^\| (training|sampling), [^|]+ \| ([^|]+) \| ([^|]+) \|$", TEXT, re.M)
    assert len(rows) == 2
    for what, low, full in rows:
        name = {"training": "train", "sampling": "sample"}[what]
        assert [low, full] == [text(df.loc[(name, p)]) for p in ("bf16", "fp32")]


def test_every_chapter_is_in_the_map_with_its_executed_copy():
    for nb in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        assert f"(nbs/{nb.name})" in TEXT and f"(results/published/chapters/{nb.name})" in TEXT, (
            nb.name
        )


def test_executed_copies_are_small_and_whole():
    import json

    copies = sorted((ROOT / "results" / "published" / "chapters").glob("*.ipynb"))
    assert {c.name for c in copies} == {p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert sum(c.stat().st_size for c in copies) < 2e5 * len(copies)  # was 3 MB for 13 chapters
    for c in copies:
        cells = json.loads(c.read_text())["cells"]
        assert not any(o["output_type"] == "error" for x in cells for o in x.get("outputs", [])), (
            c.name
        )
        assert any(
            "image/png" in o.get("data", {}) for x in cells for o in x.get("outputs", [])
        ) or c.name[:3] in ("00a", "00c", "13b"), c.name
