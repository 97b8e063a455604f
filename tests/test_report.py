"Every row of the record has its cell, every number of ours its run, every link its target, and the committed report is what the committed records give."

import csv
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from uvit_repro.paper.claims import load_claims
from uvit_repro.paper.registry import registry
from uvit_repro.report import pages as R
from uvit_repro.runs.records import load_results, published_root

ROOT = Path(__file__).resolve().parent.parent
DATA, CELLS = ROOT / "uvit_repro" / "paper" / "tables", registry()
quiet = lambda line: None


class Page(HTMLParser):
    "Texts of elements that have an id, all ids, all links."

    def __init__(self, text):
        super().__init__()
        self.ids, self.hrefs, self.text, self.links, self.marks, self.open = [], [], {}, {}, {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a:
            self.ids.append(a["id"])
            self.marks[a["id"]] = set(a.get("class", "").split())
        if tag == "a" and "href" in a:
            self.hrefs.append(a["href"])
            for _, i in self.open:
                if i:
                    self.links.setdefault(i, []).append(a["href"])
        if tag in ("td", "tr", "th"):
            self.open.append((tag, a.get("id")))
            if a.get("id"):
                self.text.setdefault(a["id"], "")

    def handle_endtag(self, tag):
        if tag in ("td", "tr", "th") and self.open:
            self.open.pop()

    def handle_data(self, data):
        for _, i in self.open:
            if i:
                self.text[i] += data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A report with its tables and the pages of the chapters."
    root = tmp_path_factory.mktemp("results")
    start = time.perf_counter()
    R.write_report(quiet, root)
    print(f"\n  report in {time.perf_counter() - start:.1f} s", end=" ")
    return root


@pytest.fixture(scope="module")
def page(root):
    return Page((root / "report.html").read_text())


def record():
    "The rows of the record as the files have them: (key, value)."
    for name, fixed in (("uvit_tables.csv", {"paper": "U-ViT"}), ("other_tables.csv", {})):
        for r in csv.DictReader(open(DATA / name, newline="")):
            r = {**r, **fixed}
            yield (
                (r["paper"], r["source"], r["dataset"], r["method"], r["metric"], r["condition"]),
                r["value"],
            )
    for r in csv.DictReader(open(DATA / "uvit_fig7_cka.csv", newline="")):
        yield (
            (
                "U-ViT",
                "Figure 7",
                "CIFAR10",
                r["setting"],
                f"cka_{r['block_i']}_{r['block_j']}",
                "entry of the matrix",
            ),
            r["cka"],
        )


def test_every_row_of_the_record_has_its_value_in_its_cell(page):
    name = {
        k: c
        for c, *k in CELLS[
            ["cell", "paper", "place", "dataset", "row", "column", "condition"]
        ].itertuples(index=False, name=None)
        for k in [tuple(k)]
    }
    bad = [
        (k, v, page.text.get(f"cell-{name[k]}"))
        for k, v in record()
        if page.text.get(f"cell-{name[k]}") != v
    ]
    assert len(name) == sum(1 for _ in record()) == 832 + 216 + 507 and not bad, bad[:5]


def test_names_of_elements_are_unique(page):
    assert len(page.ids) == len(set(page.ids))


def test_marks_of_confidence_and_quotation(root, page):
    text, kinds = (
        (root / "report.html").read_text(),
        {c: page.marks[f"cell-{c}"] for c in CELLS.cell},
    )
    for c in CELLS.itertuples():
        assert (c.confidence if c.confidence != "high" else "v") in kinds[c.cell] and (
            "quoted" in kinds[c.cell]
        ) == (c.kind == "quoted"), c.cell
    assert ".v.low{" in text and ".v.quoted{" in text


def test_ours_stands_beside_the_paper_with_its_run(root, page):
    ev = R.evidence(page=root)
    filled = R.fill(CELLS, ev)
    for c in CELLS.itertuples():
        for p, runs in filled.get(c.cell, {}).items():
            i = f"ours-{'' if p == 'paper' else p + '-'}{c.cell}"
            hits = [h for g in runs for h in g]
            assert [float(v) for v in re.findall(r"-?[\d.]+(?:e-?\d+)?", page.text[i])] == [
                float(f"{h['value']:.4g}") for h in hits
            ], i
            assert [Path(h).parts[-2] for h in page.links[i]] == [
                h["run_id"] for h in hits
            ] and all((root / h).resolve().is_file() for h in page.links[i])
        if c.kind in R.MEASURED and "paper" not in filled.get(c.cell, {}) and not R.is_entry(c):
            assert page.text[f"ours-{c.cell}"] == "not run", c.cell
        if c.kind == "computed":
            assert page.text[f"ours-{c.cell}"] == R.counted(c) != ""


def test_measured_values_are_those_of_the_ledger(root):
    df = load_results("all")
    filled = R.fill(CELLS, R.evidence(page=root))
    for at in filled.values():
        for h in (
            h for runs in at.values() for g in runs for h in g if not h["eval_id"].startswith("cka")
        ):
            assert h["value"] in set(
                df[(df.run_id == h["run_id"]) & (df.eval_id == h["eval_id"])].value
            )


def test_all_claims_with_verdicts_and_what_would_decide_them(root, page):
    df = pd.read_csv(root / "report" / "claims.csv", keep_default_na=False)
    claims = load_claims()
    assert [i for i in page.ids if i.startswith("claim-")] == [
        f"claim-{i}" for i in claims.id
    ] and len(claims) == 70
    first = df.drop_duplicates("id").set_index("id")
    for c in claims.itertuples():
        t, r = page.text[f"claim-{c.id}"], first.loc[c.id]
        assert (
            c.claim in t
            and r.verdict in t
            and ("exploratory" in t.replace(r.reason, "")) == (r.exploratory in (True, "True"))
        )
        if r.verdict not in ("supported", "contradicted"):
            assert (r.command and r.command in t) or (r.needs and r.needs in t), c.id
    for h in page.links.get("claim-U06", []):
        assert (root / h).resolve().is_file()


def test_every_place_is_in_the_contents_and_has_its_data(root, page):
    for paper, place in R.places(CELLS):
        n = R.anchor(paper, place)
        assert n in page.ids and f"#{n}" in page.hrefs and f"report/{n}.csv" in page.hrefs, n
        df = pd.read_csv(root / "report" / f"{n}.csv", dtype=str, keep_default_na=False)
        mine = CELLS[(CELLS.paper == paper) & (CELLS.place == place)]
        assert list(df.cell) == list(mine.cell) and list(df.paper) == list(mine.value), n
    for f in (root / "report").glob("*.png"):
        assert f.with_suffix(".svg").exists() and f"report/{f.name}" in page.hrefs
    for n in ("figure2_laptop", "figure3_laptop", "figure5", "figure7", "forest"):
        if (root / "report" / f"{n}.png").exists():
            assert (root / "report" / f"{n}.csv").stat().st_size > 100


def dead(path: Path) -> list:
    "Internal links of a page that lead nowhere."
    here, out = Page(path.read_text()), []
    for h in here.hrefs:
        file, _, name = h.partition("#")
        if re.match(r"[a-z]+:", h):
            continue
        at = (path.parent / unquote(file)).resolve() if file else path
        if not at.exists():
            out.append(h)
        elif (
            name
            and at.suffix == ".html"
            and not {name, unquote(name)} & set((here if at == path else Page(at.read_text())).ids)
        ):
            out.append(h)  # browsers try both
    return out


def test_no_internal_link_is_dead(root, page):
    pages = [root / "report.html", *sorted((root / "chapters").glob("*.html"))]
    assert (
        len(pages) == len(list((published_root() / "chapters").glob("[0-9]*.ipynb")))
        and sum(h.startswith("chapters/") for h in page.hrefs) == len(pages) - 1
    )
    assert {p.name: d for p in pages if (d := dead(p))} == {}
    assert dead_is_found(root)


def dead_is_found(root):
    (root / "x.html").write_text(
        '<a href="report.html#summary-of-nothing">a</a><a href="nowhere.csv">b</a><a href="report.html#forest">c</a>'
    )
    found = dead(root / "x.html")
    (root / "x.html").unlink()
    return found == ["report.html#summary-of-nothing", "nowhere.csv"]


def test_pages_of_chapters_are_made_again_only_when_they_change(root):
    said = []
    R.chapter_pages(root / "chapters", said.append)
    assert said == []
    one = next((root / "chapters").glob("01*.html"))
    whole = one.read_text()
    one.write_text(whole[:-20])
    R.chapter_pages(root / "chapters", said.append)
    assert said == [f"page {one.name}"] and one.read_text() == whole


def test_an_empty_record_still_has_every_cell(tmp_path):
    ev = R.evidence("runs", tmp_path, tmp_path)
    (tmp_path / "report").mkdir()
    text = "".join(
        R.place_html(g, {}, ev, tmp_path / "report") for _, g in CELLS.groupby(["paper", "place"])
    )
    p = Page(text)
    assert (
        all(p.text[f"cell-{c.cell}"] == c.value for c in CELLS.itertuples())
        and sum(t == "not run" for t in p.text.values()) > 300
    )
    assert not re.search(r"href=\"[^\"]*run\.json", text)


@pytest.fixture(scope="module")
def published():
    return R.published_report()


def test_the_committed_report_is_what_the_records_give(published):
    text, figures = published
    path = published_root() / "report.md"
    assert path.read_text() == text, "the records changed: make publish"
    for n in figures:
        assert (published_root() / "report" / f"{n}.png").stat().st_size < 400_000
    assert {p.stem for p in (published_root() / "report").glob("*.png")} == set(figures)


def test_the_committed_report_is_whole(published):
    text, _ = published
    rows = [l for l in text.splitlines() if l.startswith("|")]
    for l in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in l or (published_root() / l).exists(), l
    assert (
        all(f"| {i} |" in text for i in load_claims().id)
        and "Equivalence certificate" in text
        and "44,255,328" in text
    )
    for c in CELLS.itertuples():
        if not R.is_entry(c):
            assert R.md_value(c).replace("|", "\\|") in text, c.cell
    width = 0
    for l in text.splitlines():  # every row of a table has as many columns as its head
        n = len(re.findall(r"(?<!\\)\|", l)) if l.startswith("|") else 0
        assert not (n and width) or n == width, l[:200]
        width = n
    assert len(rows) > 400 and "/runs/" not in text


def test_the_report_has_nothing_of_today_or_of_this_machine(published):
    text, _ = published
    import datetime
    import os

    assert (
        str(ROOT) not in text
        and os.uname().nodename not in text
        and not re.search(r"\b20\d\d-\d\d-\d\d\b", text)
    )


def test_the_committed_report_stays_small():
    files = [published_root() / "report.md", *(published_root() / "report").iterdir()]
    assert sum(p.stat().st_size for p in files) < 800_000


def test_a_page_hides_code_or_shows_it_in_colours(tmp_path):
    import nbformat
    import nbformat.v4 as v4

    nb = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# T\n\n## One\n\n[next](02_x.ipynb)"),
            v4.new_code_cell("#| hide\nsecret = 1 < 2"),
            v4.new_code_cell(
                "1+1",
                outputs=[
                    v4.new_output("execute_result", data={"text/plain": "2"}),
                    v4.new_output("display_data", data={"text/html": "<b>bold</b>"}),
                ],
            ),
        ]
    )
    nbformat.write(nb, tmp_path / "t.ipynb")
    page = R.to_html(tmp_path / "t.ipynb", tmp_path / "t.html").read_text()
    assert (
        'href="02_x.html"' in page
        and "secret" not in page
        and ">2<" in page.replace("\n", "")
        and 'href="#One"' in page
        and "viewport" in page
        and "<b>bold</b>" in page
    )
    page = R.to_html(
        tmp_path / "t.ipynb",
        tmp_path / "t.html",
        code=True,
        back='<a href="r.html">r</a>',
        note="<!-- n -->",
    ).read_text()
    assert (
        "#| hide" not in page
        and 'href="r.html"' in page
        and page.endswith("<!-- n -->")
        and "<i>part" not in page
        and page.index("secret") < page.index("<b>bold</b>")
    )
    assert (
        re.search(r'<span class="n">secret</span>.*<span class="o">&lt;</span>', page)
        and ".highlight .n" in page
    )


def test_an_executed_copy_says_nothing_of_this_machine(tmp_path):
    import nbformat
    import nbformat.v4 as v4

    out, err = (
        v4.new_output("stream", name=n, text=t)
        for n, t in (("stdout", f"wrote {ROOT}/x"), ("stderr", "noise"))
    )
    nb = v4.new_notebook(
        metadata={"papermill": {"a": 1}},
        cells=[
            v4.new_code_cell(
                "1", outputs=[out, err], metadata={"tags": ["parameters"], "papermill": {"b": 2}}
            )
        ],
    )
    nbformat.write(nb, tmp_path / "e.ipynb")
    text = R.publish_copy(tmp_path / "e.ipynb", tmp_path / "copy.ipynb").read_text()
    assert (
        not any(w in text for w in ("papermill", "noise", str(ROOT)))
        and "wrote ./x" in text
        and "parameters" in text
    )


def test_large_tables_are_left_out_of_executed_copies(tmp_path):
    import nbformat

    nb = nbformat.v4.new_notebook()
    nb.cells = [
        nbformat.v4.new_code_cell(
            "1",
            outputs=[
                nbformat.v4.new_output("display_data", data={"text/html": "x" * n})
                for n in (10, R.LARGE + 1)
            ],
        )
    ]
    nbformat.write(nb, tmp_path / "e.ipynb")
    texts = [
        o.data["text/html"]
        for o in nbformat.read(R.publish_copy(tmp_path / "e.ipynb", tmp_path / "c.ipynb"), 4)
        .cells[0]
        .outputs
    ]
    assert texts[0] == "x" * 10 and "left out" in texts[1]


def test_disagreements_are_data_with_a_source():
    df = R.disagreements()
    assert len(df) >= 14 and not (df == "").any().any() and df.subject.is_unique
