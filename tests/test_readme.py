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


def test_headline_words_follow_from_the_records():
    evidence = read_evidence("published")
    verdicts = {v.id: v for v in judged(evidence, "cpu")[0]}
    rows = [row.split("|")[1:-1] for row in TEXT.splitlines() if re.match(r"\| U\d\d ", row)]
    assert {row[0].split()[0] for row in rows} == {
        id for id, verdict in verdicts.items() if verdict.word != "not run"
    }
    for claim, _, ours, word in rows:
        verdict = verdicts[claim.split()[0]]
        assert word.strip() == verdict.word
        for effect in verdict.effects:
            for difference in effect.differences.values():
                change = math.exp(difference)
                assert f"{100 * (change - 1):+.1f} %" in ours or f"×{change:.2f}" in ours
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
