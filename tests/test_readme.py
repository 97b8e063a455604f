"""The README's numbers have records, its links have targets, its commands exist."""

import math
import re
from pathlib import Path

import pandas as pd

from uvit_repro.cli import make_parser
from uvit_repro.report.evidence import judged, read_evidence

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_length():
    assert len(TEXT.splitlines()) <= 150


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT) + re.findall(r'src="([^"]+)"', TEXT)
    local = [link for link in links if "://" not in link]
    assert len(local) > 15
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))
    used = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", TEXT, re.M))
    assert {"report", "test"} <= used <= targets


def test_commands_are_parsed():
    commands = re.findall(r"(?:^|`)uvit-repro ([^`#\n]+)", TEXT, re.M)
    assert len(commands) >= 8
    for command in commands:
        words = command.split()
        if "--help" not in words and words[0] != "released":  # parses the rest by itself
            make_parser().parse_args(words)


def change(difference: float) -> str:
    "A log ratio as the README writes it: a percentage, or a factor where it is large."
    ratio = math.exp(difference)
    return f"{100 * (ratio - 1):+.1f} %" if ratio < 2 else f"×{ratio:.2f}"


def headline(verdict) -> tuple[str, str, str]:
    "Claim, our differences at each seed, word: a row of the README without the paper's words."
    parts = []
    for effect in verdict.effects:
        if effect.differences:
            seeds = ", ".join(change(d) for d in effect.differences.values())
            steps = " (equal time)" if effect.comparison.steps else ""
            pair = f"{effect.comparison.worse} against {effect.comparison.better}"
            parts.append(f"{pair}{steps}: {seeds}")
    return verdict.id, "; ".join(parts), verdict.word


def test_headline_claims_follow_from_the_records():
    "Where this fails, copy the rows on the left of the difference into the README."
    evidence = read_evidence("published")
    verdicts = [v for v in judged(evidence, "cpu")[0] if v.word != "not run"]
    rows = [row.split("|")[1:-1] for row in TEXT.splitlines() if re.match(r"\| U\d\d ", row)]
    written = [(row[0].split()[0], row[2].strip(), row[3].strip()) for row in rows]
    assert [headline(verdict) for verdict in verdicts] == written
    recorded = sum(record.experiment.protocol == "cpu" for record in evidence.records.values())
    assert f"({recorded} of 36 planned runs so far)" in TEXT


def test_speed_ratios_have_their_record():
    record = re.search(r"\[record\]\((\S+bench\.csv)\)", TEXT)[1]
    table = pd.read_csv(ROOT / record)
    table = table[table.metric == "speedup"].set_index(["what", "precision"])
    for what in ("train", "sample"):
        row = table.loc[(what, "bf16")]
        assert f"{row.value:.2f} times [{row.low:.2f}, {row.high:.2f}]" in TEXT


def test_every_chapter_is_in_the_map():
    for chapter in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        assert f"(nbs/{chapter.name})" in TEXT, chapter.name
