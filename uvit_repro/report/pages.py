"""Write the report: outcome, claims, surprises, figures, threats, costs, appendix."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from uvit_repro.bench.results import load_bench, newest, speed_table
from uvit_repro.config import PROTOCOLS, ParameterError, closest, deviations, project_root, shown
from uvit_repro.data.files import source_sum, write_atomic
from uvit_repro.paper.claims import arm_experiment, fixed_list, load_claims, queued_experiments
from uvit_repro.paper.numbers import read_table
from uvit_repro.paper.registry import place_slug
from uvit_repro.report import appendix, figures
from uvit_repro.report.chapters import chapter_list, write_pages
from uvit_repro.report.evidence import (
    SCALES,
    Evidence,
    comparison_name,
    effect_rows,
    has_list,
    judged,
    read_evidence,
    seen,
)
from uvit_repro.report.statistics import AGREES, DISAGREES, NOT_RUN, OPEN, Effect, Verdict, power
from uvit_repro.runs.counting import params_of
from uvit_repro.runs.records import published_root, runs_root

FIGURES = {  # name for `--only`: function of the evidence
    "fig2": figures.draw_figure2,
    "fig3": figures.draw_figure3,
    "fig7": figures.draw_figure7,
}
PAPER_IMAGES = 500_000 * 128  # of a run on CIFAR-10
WORDS = (AGREES, DISAGREES, OPEN, NOT_RUN)
SHOWN = ["row", "quantity", "condition", "printed", "ours", "seen in", "confidence", "why"]


@dataclass(frozen=True)
class Link:
    "Text that leads to a file."

    text: str
    href: str  # relative to the page


@dataclass(frozen=True)
class Table:
    "A table of the report, also written as CSV."

    name: str  # of its file
    title: str
    rows: list[dict]  # cells are text, numbers, links, or lists of these
    command: str = ""  # that runs what is missing

    @property
    def columns(self) -> list[str]:
        "The columns in the order of their first appearance."
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def to_csv(self, folder: Path) -> Path:
        "Write the table without links."
        path = folder / f"{self.name}.csv"
        rows = [{name: plain_text(cell) for name, cell in row.items()} for row in self.rows]
        pd.DataFrame(rows, columns=self.columns).to_csv(path, index=False)
        return path


def plain_text(cell) -> str:
    "A cell without markup."
    if isinstance(cell, (list, tuple)):
        return ", ".join(map(plain_text, cell))
    if isinstance(cell, Link):
        return cell.text
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def markdown_text(value) -> Markup:
    "Text that Markdown shows as it is."
    if isinstance(value, Markup):
        return value
    out = str(escape(value)).replace("\n", " ").replace("&#39;", "'").replace("&#34;", '"')
    for mark in "|[]`*":
        out = out.replace(mark, f"&#{ord(mark)};")
    return Markup(out)


def show(cell, text=escape, link='<a href="{href}">{text}</a>') -> Markup:
    "A cell with its links, in HTML or with other functions in Markdown."
    if isinstance(cell, (list, tuple)):
        return Markup(", ").join(show(part, text, link) for part in cell)
    if isinstance(cell, Link):
        return Markup(link).format(text=text(cell.text), href=cell.href)
    return text(plain_text(cell))


def percent(log_ratio: float) -> str:
    "A log ratio as a difference in percent, or as a factor where it is large."
    if abs(log_ratio) > 0.7:
        return f"×{np.exp(log_ratio):.3g}"
    return f"{100 * np.expm1(log_ratio):+.1f}\N{NO-BREAK SPACE}%"


class Report:
    "Everything that the templates show, computed once."

    def __init__(
        self,
        ev: Evidence,
        page: Path,  # folder of the page, from which links lead to the records
    ):
        self.ev, self.page = ev, Path(page)
        self.listed = [p for p in SCALES if has_list(p)]
        self.unlisted = [p for p in ev.protocols if p not in self.listed]
        results = {p: judged(ev, p) for p in self.listed}
        self.verdicts: dict[str, list[Verdict]] = {p: v for p, (v, _) in results.items()}
        self.values = {p: values for p, (_, values) in results.items()}
        problems = [x for values in self.values.values() for x in values.attrs["problems"]]
        self.refused = [*ev.refused, *problems]
        self.claim_words = load_claims().set_index("id")
        self.numbers = appendix.paper_numbers(ev)
        self.counts = appendix.count_summary(self.numbers)
        self.certificate = appendix.certificate(ev)

    def run_link(self, run_id: str, text: str | None = None) -> Link:
        "A link to the record of a run."
        path = os.path.relpath(self.ev.records[run_id].folder / "run.json", self.page)
        return Link(text or run_id, Path(path).as_posix())

    # ---- Outcome ----

    @functools.cache  # noqa: B019 - a report lives as long as its process
    def facts(self, protocol: str) -> dict:
        "What the sentences about a fixed list say."
        e, entry, verdicts = PROTOCOLS[protocol], fixed_list(protocol), self.verdicts[protocol]
        queued = [e.run_id for e in queued_experiments(protocol)]
        images = e.train.n_steps * e.train.batch_size
        spread = next((x for v in verdicts for x in v.effects if x.df), None)
        return {
            "parameters": params_of(e),
            "steps": entry["step"],
            "images": images,
            "share": 100 * images / PAPER_IMAGES,
            "done": sum(run_id in self.ev.records for run_id in queued),
            "total": len(queued),
            "claims": len(verdicts),
            "complete": sum(not v.missing for v in verdicts),
            "words": {w: [v.id for v in verdicts if v.word == w] for w in WORDS},
            "caveats": {
                claim["id"]: claim["caveat"] for claim in entry["claims"] if "caveat" in claim
            },
            "seeds": sorted({len(seeds) for seeds in entry["seeds"].values()}),
            "sd": spread.sd if spread else None,
            "power": power(0.01, spread.sd, 2, spread.df) if spread else None,
            "entry": entry,
        }

    def on_scale(self, protocol: str) -> int:
        "How many runs of a protocol have its own data; a few others stand in the appendix."
        data = PROTOCOLS[protocol].data.dataset
        return sum(r.experiment.data.dataset == data for r in self.ev.at(protocol))

    @property
    def trained(self) -> tuple[int, int]:
        "How many printed numbers that need training have a run of ours, and how many there are."
        cells = self.numbers[(self.numbers.kind == "reproducible") & self.numbers.published]
        return int((cells.runs.map(len) > 0).sum()), len(cells)

    @property
    def further_claims(self) -> int:
        "How many claims are neither judged nor arithmetic."
        listed = {v.id for verdicts in self.verdicts.values() for v in verdicts}
        return len(self.claim_words) - len(listed | set(appendix.ARITHMETIC))

    # ---- Headline claims ----

    def seed_links(self, effect: Effect, protocol: str) -> list[Link]:
        "Each seed's difference, leading to the record of the worse arm."
        arm = effect.comparison.worse
        return [
            self.run_link(arm_experiment(protocol, arm, seed).run_id, f"s{seed} {percent(d)}")
            for seed, d in effect.differences.items()
        ]

    def seen_lines(self, claim: dict, protocol: str) -> list[dict]:  # what, measures
        "What runs outside a list showed about a claim at one protocol."
        found = seen(self.ev, claim, protocol).sort_values("seed")
        found["text"] = "s" + found.seed.astype(str) + " " + found.difference.map(percent)
        lines = []
        for pair, runs in found.groupby("pair", sort=False):
            groups = runs.groupby("measure", sort=False)
            links = {
                figures.measure_words(m): map(self.run_link, g.run_id, g.text) for m, g in groups
            }
            lines.append({"what": pair, "measures": [(m, list(x)) for m, x in links.items()]})
        return lines

    @functools.cache  # noqa: B019
    def headline(self, protocol: str) -> list[dict]:
        "The rows of the table of headline claims."
        rows = []
        claims = fixed_list(protocol)["claims"]
        for claim, verdict in zip(claims, self.verdicts[protocol], strict=True):
            said, effects = self.claim_words.loc[verdict.id], verdict.effects
            done = sum(len(e.differences) for e in effects)
            planned = sum(len(e.comparison.seeds) for e in effects)
            row = {"id": verdict.id, "claim": said.claim}
            row |= {name: claim.get(name, "") for name in ("note", "caveat")}
            row |= {"paper": said.paper_numbers, "source": said.source, "word": verdict.word}
            row |= {"pairs": f"{done} of {planned} pairs", "reason": verdict.reason}
            row |= {"effects": [e for e in effects if e.differences]}
            rows.append(row | {"seen": {p: self.seen_lines(claim, p) for p in self.unlisted}})
        return rows

    def headline_table(self, protocol: str) -> Table:
        "The headline claims of a protocol as a table, without what was only seen."
        rows = []
        for row in self.headline(protocol):
            plain = {k: v for k, v in row.items() if k not in ("effects", "seen")}
            for e in row["effects"]:
                plain[comparison_name(e)] = [percent(e.effect), *self.seed_links(e, protocol)]
            rows.append(plain)
        return Table(f"headline_{protocol}", f"Headline claims, {SCALES[protocol]}", rows)

    # ---- Surprises ----

    @functools.cached_property
    def surprises(self) -> list[dict]:  # text, links
        "Everything that points against the paper, computed from the records."
        found = [s for p in self.listed for v in self.verdicts[p] for s in self.against_list(v)]
        found.sort(key=lambda s: f"verdict: {DISAGREES}" not in s["text"])
        claims = fixed_list("cpu")["claims"]
        found += [s for p in self.unlisted for claim in claims for s in self.against_seen(claim, p)]
        for c in self.counts[2].itertuples():
            ours = f"{appendix.counts()[c.cell]:.5g}"
            text = f"{c.place}: we count {ours} ({c.quantity}) for {c.row}; printed: {c.printed}."
            found.append({"text": text, "links": []})
        return found

    def against_list(self, verdict: Verdict) -> Iterable[dict]:
        "Comparisons of the fixed list, and bands of noise, that point the other way at every seed."
        effects = effect_rows([verdict], self.values[verdict.protocol])
        for e in (e for e in verdict.effects if e.differences):
            start = f"{SCALES[verdict.protocol]}, {verdict.id}, {comparison_name(e)}:"
            mine = effects[effects.comparison == comparison_name(e)]
            for name in ["difference", *(c for c in mine if c.startswith("log-SNR"))]:
                if mine[name].max() < e.comparison.threshold:
                    where = "" if name == "difference" else f" at {name}"
                    listed = ", ".join(map(percent, mine[name]))
                    text = f"{start} held-out loss{where} against the paper at every seed"
                    text += f" ({listed}; verdict: {verdict.word})."
                    links = self.seed_links(e, verdict.protocol)
                    yield {"text": text, "links": [Link(x.text.split()[0], x.href) for x in links]}
                    break

    def against_seen(self, claim: dict, protocol: str) -> Iterable[dict]:
        "Measures that point the other way at every seed of runs outside a list."
        found = seen(self.ev, claim, protocol).sort_values("seed")
        for pair, runs in found.groupby("pair", sort=False):
            parts, opposed = [], False
            for measure, group in runs.groupby("measure"):
                against = group.difference.max() < -claim.get("margin", 0.0)
                side = "against the paper" if against else "with it"
                listed = ", ".join(map(percent, group.difference))
                parts.append(f"{figures.measure_words(measure)} {side} ({listed})")
                opposed |= against
            if opposed:
                text = f"{SCALES[protocol]}, {claim['id']}, {pair}: {'; '.join(parts)}."
                one = runs.drop_duplicates("run_id")
                links = list(map(self.run_link, one.run_id, "s" + one.seed.astype(str)))
                yield {"text": text, "links": links}

    # ---- Tables and figures ----

    @functools.cached_property
    def cost(self) -> Table:
        "What settling the rest would cost."
        return Table("cost", "What it would cost to settle the rest", appendix.cost_rows(self.ev))

    @functools.cached_property
    def published_tables(self) -> list[Table]:
        "One table for each table and figure of the papers."
        out = []
        plain = self.numbers[~self.numbers.quantity.str.match(r"cka_\d")]
        for (paper, place), group in plain.groupby(["paper", "place"], sort=False):
            rows = [
                {k: c[k] for k in SHOWN} | {"runs": [self.run_link(r, "run") for r in c["runs"]]}
                for c in group.to_dict("records")
            ]
            name = place_slug(paper, place)
            missing = ((group.kind == "reproducible") & (group.ours == "")).any()
            command = f"uvit-repro run {name} --protocol paper" if missing else ""
            out.append(Table(f"numbers_{name}", f"{paper}, {place}", rows, command))
        return out

    def protocol_tables(self, protocol: str) -> list[Table]:
        "Departures, variants and runs of one protocol."
        scale = f"{protocol}: {SCALES[protocol]}"
        columns = ("setting", "here", "paper")
        departures = deviations(PROTOCOLS[protocol])
        changed = [dict(zip(columns, map(plain_text, row), strict=True)) for row in departures]
        d = self.ev.differences[self.ev.differences.protocol == protocol].sort_values("seed")
        variants = []
        for (variant, steps), group in d.groupby(["variant", "steps"]):
            row = {"variant": variant, "steps": steps}
            for m, g in group.groupby("measure", sort=False):
                links = map(self.run_link, g.run_id, g.difference.map(percent))
                row[figures.measure_words(m)] = list(links)
            variants.append(row)
        rows = appendix.run_rows(self.ev, protocol)
        runs = [row | {"run": self.run_link(row["run"])} for row in rows]
        found = {
            "departures": ("Settings that depart from the paper", changed),
            "variants": ("Variants over the adopted model", variants),
            "runs": ("Runs", runs),
        }
        return [Table(f"{k}_{protocol}", f"{title}, {scale}", v) for k, (title, v) in found.items()]

    @functools.cached_property
    def appendix(self) -> list[Table]:
        "The appendix but for the published numbers."
        verdicts = [(p, v) for p in self.listed for v in self.verdicts[p] if v.word != NOT_RUN]
        words = {v.id: f"{v.word} at protocol {p}" for p, v in verdicts}
        disagreements = read_table("disagreements.csv").to_dict("records")
        protocols = dict.fromkeys([*self.listed, *self.ev.protocols])
        speeds = speed_table(newest(load_bench())).to_dict("records")
        tables = [
            Table("certificate", "Equivalence with the released code", self.certificate),
            Table("claims", "All claims", appendix.claim_rows(self.numbers, words)),
            *(table for p in protocols for table in self.protocol_tables(p)),
            Table("speed", "Speed beside the released code", speeds),
            Table("disagreements", "Where the sources disagree", disagreements),
        ]
        return [table for table in tables if table.rows]

    @property
    def tables(self) -> list[Table]:
        "Every table of the report."
        headlines = [self.headline_table(p) for p in self.listed]
        return [*headlines, self.cost, *self.appendix, *self.published_tables]

    @property
    def drawings(self) -> dict:  # name for `--only` -> function that draws one figure or several
        "Every figure of the report, not yet drawn."
        ev, partial = self.ev, functools.partial
        effects = {p: effect_rows(self.verdicts[p], self.values[p]) for p in self.listed}
        parts = {f"effects_{p}": partial(figures.draw_effects, p, e) for p, e in effects.items()}
        parts |= {name: partial(draw, ev) for name, draw in FIGURES.items()}
        parts |= {f"running_{p}": partial(figures.draw_running, ev, p) for p in self.listed}
        parts |= {f"samples_{p}": partial(figures.draw_samples, ev, p) for p in ev.protocols}
        return parts

    def save_figures(self, target: Path, suffixes=("png", "svg", "csv")) -> list[figures.Figure]:
        "Draw and write every figure."
        drawn = [figure for draw in self.drawings.values() for figure in draw()]
        for figure in drawn:
            figures.save(figure, target, suffixes)
        return drawn

    def save_part(self, only: str, target: Path) -> Path:  # the picture, else the table
        "Write the figures and tables of one name: fig2, headline, table1, cost, ..."
        tables = {t.name.removeprefix("numbers_"): t for t in self.tables}
        parts, paths = self.drawings, []
        names = [n for n in (only, *(f"{only}_{p}" for p in SCALES)) if n in parts or n in tables]
        for name in names:
            if name in parts:
                paths += [figures.save(figure, target) for figure in parts[name]()]
            if name in tables:
                paths.append(tables[name].to_csv(target))
        if paths:
            return paths[0]
        hint = f"no such part: {closest(only, [*parts, *tables, 'headline', 'samples'])}"
        raise ParameterError(
            f"only = {shown(only)}: {'no record to draw it from yet' if names else hint}"
        )


def render(
    report: Report,
    template: str,  # report.html.j2 | report.md.j2
    drawn: list[figures.Figure],  # saved under report/
    chapters: list[dict] = (),  # of `chapter_list`
) -> str:
    "The page as text; everything that is no markup is escaped."
    markdown = template.endswith(".md.j2")
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("uvit_repro.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        **({"finalize": markdown_text} if markdown else {}),
    )
    form = {"text": markdown_text, "link": "[{text}]({href})"} if markdown else {}
    env.filters["cell"] = functools.partial(show, **form)
    env.globals.update(scales=SCALES, percent=percent, comparison_name=comparison_name)
    return env.get_template(template).render(report=report, figures=drawn, chapters=chapters)


def inputs_sum(root: Path, out_dir) -> str:
    "A checksum of everything a page is made from: code and records."
    h = hashlib.sha256(f"{source_sum()} {root}".encode())
    for template in sorted((Path(__file__).parent / "templates").iterdir()):
        h.update(template.read_bytes())
    for folder in (runs_root(out_dir), published_root()):
        for path in sorted(folder.glob("*/*.*")):
            stat = path.stat()
            h.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return h.hexdigest()


def write_report(
    say=print,
    root=None,  # folder of the page; None: results
    out_dir=None,  # folder of this machine's runs; None: results/runs
    only: str | None = None,  # one part: fig2, headline, table1, ...
) -> Path:  # the page, or the part
    "Write report.html, its tables and figures, and the pages of the chapters."
    root = Path(root or project_root() / "results").resolve()
    target, page = root / "report", root / "report.html"
    target.mkdir(parents=True, exist_ok=True)
    if only:
        return Report(read_evidence("all", out_dir), root).save_part(only, target)
    stamp = f"<!-- made from {inputs_sum(root, out_dir)} -->"
    if page.is_file() and page.read_text(encoding="utf-8").endswith(stamp):
        say("report: up to date")
        return page
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        chapter_pages = pool.submit(write_pages, root / "chapters")
        report = Report(read_evidence("all", out_dir), root)
        say(f"report: {len(report.ev.records)} records")
        for name, why in report.refused:
            say(f"left out: {name}: {why}")
        drawn = report.save_figures(target)
        for table in report.tables:
            table.to_csv(target)
        report.numbers.drop(columns="runs").to_csv(target / "numbers.csv", index=False)
        text = render(report, "report.html.j2", drawn, chapter_list())
        chapter_pages.result()
    return write_atomic(page, lambda path: path.write_text(text + stamp, encoding="utf-8"))


def write_published(say=print, root=None) -> Path:
    "Write results/published/report.md and its figures from published records alone."
    root = Path(root or published_root())
    (root / "report").mkdir(parents=True, exist_ok=True)
    report = Report(read_evidence("published"), root)
    drawn = report.save_figures(root / "report", suffixes=("png",))
    text = render(report, "report.md.j2", drawn)
    say(f"{len(text):,} characters, {len(drawn)} figures: {root / 'report.md'}")
    return write_atomic(root / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
