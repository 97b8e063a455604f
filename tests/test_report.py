"""The report from planted records: claims with every seed, one scale per cell, inert text."""

import csv
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import numpy as np
import pytest
from sizes import count_sizes

from uvit_repro.campaign.verify import verify
from uvit_repro.config import PROTOCOLS, ParameterError, eval_id, experiment
from uvit_repro.paper.claims import arm_experiment, fixed_list
from uvit_repro.report import appendix, chapters, pages
from uvit_repro.report.evidence import (
    band_differences,
    judged,
    listed_claims,
    read_evidence,
    seen,
    transferred,
)
from uvit_repro.runs import counting
from uvit_repro.runs.records import published_root

LOG_SNR = np.linspace(-11.9, 11.9, 21)
HOSTILE = '<script>alert(1)</script>|`[x](javascript:y)\n"&'
EFFECTS = {"none": 0.03, "add": 0.04, "adaln": -0.02, "no positions": 1.0, "U-Net": -0.2}


def levels(arm, seed, step):
    "Held-out loss by noise level of a planted run, 21 levels."
    shift = 0.1 * (seed - 20) + EFFECTS.get(arm, 0.0) * (1 + 0.05 * np.sign(LOG_SNR))
    noise = np.random.default_rng([len(arm), seed]).normal(0, 0.001)
    return np.exp(-3 + shift + noise - step / 10_000 - 0.02 * LOG_SNR)


def plant(root, e, loss, **info):
    "Write a finished run with held-out losses (step -> loss by level)."
    folder = root / e.run_id
    (folder / "stats").mkdir(parents=True)
    rows = []
    for step, values in loss.items():
        eid = eval_id(e, step, 0)
        np.savez(folder / "stats" / f"{eid}.npz", lam=LOG_SNR / 2, loss=values)
        row = {"run_id": e.run_id, "eval_id": eid, "metric": "heldout_loss", "step": step}
        rows.append(row | {"value": repr(float(values.mean())), "weights": "ema", "status": "ok"})
    with open(folder / "measurements.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = {"status": "ok", "run_id": e.run_id, "experiment": e.to_dict(), "wall_seconds": 1800}
    (folder / "run.json").write_text(json.dumps(text | info), encoding="utf-8")
    steps = np.arange(10, e.train.n_steps + 1, 10)
    losses = np.mean(list(loss.values())) * (1 + 0.01 * np.sin(steps))
    log = "\n".join(f"{s},{v}" for s, v in zip(steps, losses, strict=True))
    (folder / "log.csv").write_text("step,loss\n" + log + "\n", encoding="utf-8")
    return folder


def plant_list(root, arms=None):
    "Plant every run of the fixed list at protocol cpu, or those of some arms."
    entry = fixed_list("cpu")
    for arm in arms or entry["arms"]:
        for seed in entry["seeds"].get(arm, entry["seeds"]["default"]):
            e = arm_experiment("cpu", arm, seed)
            steps = {*e.evaluation.loss_steps, e.train.n_steps}
            plant(root, e, {step: levels(arm, seed, step) for step in sorted(steps)})


class Page(HTMLParser):
    "Cells of the table of headline claims, and the tags of a page."

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.links = {}, set(), []
        self.row = self.label = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.links += [given["href"]] if "href" in given else []
        if tag == "tr":
            name = given.get("id", "")
            self.row = self.rows.setdefault(name, {}) if name.startswith("claim-") else None
        elif tag == "td":
            self.label = given.get("data-label", "claim")

    def handle_endtag(self, tag):
        if tag == "td":
            self.label = None

    def handle_data(self, data):
        if self.row is not None and self.label:
            self.row[self.label] = self.row.get(self.label, "") + data


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A folder of runs with the whole fixed list and no other records."
    root = tmp_path_factory.mktemp("planted")
    plant_list(root)
    return root


@pytest.fixture(scope="module")
def report(planted, tmp_path_factory):
    "The report of the planted list and of the published digits."
    return pages.Report(read_evidence("all", planted), tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def text(report):
    return pages.render(report, "report.html.j2", [])


# ---- Claims ----


def test_the_fixed_list_becomes_claims():
    claims = {c.id: c for c in listed_claims("cpu")}
    assert list(claims) == [c["id"] for c in fixed_list("cpu")["claims"]]
    skip = {c.worse: c for c in claims["U01"].comparisons}
    assert skip["none"].seeds == (20, 21, 22)
    assert skip["add"].seeds == (20, 21)
    assert "adaln" in claims["U01"].figure
    at_steps, in_time = claims["U44"].comparisons
    assert (at_steps.margin, at_steps.steps) == (0.01, ())
    assert dict(in_time.steps) == {"adopted": 3000, "U-Net": 900}


def test_effect_and_bands_of_one_claim_by_hand(planted):
    verdicts, values = judged(read_evidence("runs", planted), "cpu")
    claim = next(v for v in verdicts if v.id == "U01")
    effect = next(e for e in claim.effects if e.comparison.worse == "none")
    by_hand = {
        seed: np.log(levels("none", seed, 3000).mean() / levels("adopted", seed, 3000).mean())
        for seed in (20, 21, 22)
    }
    assert effect.differences == pytest.approx(by_hand)
    assert effect.effect == pytest.approx(np.mean(list(by_hand.values())))
    assert claim.word == "agrees"
    bands = band_differences(effect, values, 3000)
    low = (LOG_SNR >= -12) & (LOG_SNR < -3)
    means = [levels(arm, 21, 3000)[low].mean() for arm in ("adopted", "none")]
    assert list(bands)[0] == "log-SNR -12 to -3"
    assert bands["log-SNR -12 to -3"][21] == pytest.approx(np.log(means[1] / means[0]))


def test_words_of_the_planted_list(planted):
    words = {v.id: v.word for v in judged(read_evidence("runs", planted), "cpu")[0]}
    assert words["U06"] == "disagrees"  # adaln was planted better
    assert words["U11"] == "agrees"
    assert words["U44"] == "disagrees"  # the U-Net is better at equal steps


def test_only_the_named_evaluation_at_the_named_step_counts(tmp_path):
    plant_list(tmp_path, ["adopted", "none"])
    ev = read_evidence("runs", tmp_path)
    before = judged(ev, "cpu")[1]
    e = arm_experiment("cpu", "none", 20)
    folder = tmp_path / e.run_id
    with open(folder / "measurements.csv", "a", encoding="utf-8") as file:
        file.write(f"{e.run_id},0003000-loss-00000000,heldout_loss,3000,99.0,raw,ok\n")
    after = judged(read_evidence("runs", tmp_path), "cpu")[1]
    assert after.value.tolist() == before.value.tolist()


def test_a_value_that_is_not_the_mean_of_its_statistics_is_left_out(tmp_path):
    plant_list(tmp_path, ["adopted", "none"])
    run_id = arm_experiment("cpu", "none", 21).run_id
    path = tmp_path / run_id / "measurements.csv"
    path.write_text(re.sub(r"(3000,0\.0)\d", r"\g<1>9", path.read_text()), encoding="utf-8")
    verdicts, values = judged(read_evidence("runs", tmp_path), "cpu")
    assert [name for name, _ in values.attrs["problems"]] == [run_id]
    assert next(v for v in verdicts if v.id == "U01").missing["none"] == (21,)


def test_an_arm_at_another_protocol():
    assert transferred("depth 5", "laptop") == "depth=3"
    assert transferred("patch 8", "laptop") == "patch_size=4"
    assert transferred("width 64", "laptop") == "embed_dim=32"
    assert transferred("none", "laptop") == "skip=none"
    assert transferred("adopted", "laptop") == ""


def test_digits_are_described_with_every_published_seed():
    ev = read_evidence("published")
    claim = next(c for c in fixed_list("cpu")["claims"] if c["id"] == "U01")
    found = seen(ev, claim, "laptop")
    loss = found[(found.worse == "none") & (found.measure == "heldout_loss")]
    assert sorted(loss.seed) == [0, 1, 2]
    assert (loss.difference < 0).all()  # without a skip the loss on digits is lower


# ---- Records ----


def test_damaged_and_foreign_records_are_named_and_left_out(tmp_path):
    plant_list(tmp_path, ["adopted"])
    names = [arm_experiment("cpu", "adopted", seed).run_id for seed in (20, 21, 22)]
    (tmp_path / names[0] / "run.json").write_text("{", encoding="utf-8")
    (tmp_path / names[1]).rename(tmp_path / "another-run")
    ev = read_evidence("runs", tmp_path)
    assert list(ev.records) == [names[2]]
    assert sorted(name for name, _ in ev.refused) == sorted([names[0], "another-run"])


def test_unfinished_and_smoke_runs_are_no_evidence(tmp_path):
    plant(tmp_path, experiment("smoke"), {20: levels("adopted", 20, 20)})
    plant(tmp_path, experiment("cpu"), {3000: levels("adopted", 20, 3000)}, status="failed")
    ev = read_evidence("runs", tmp_path)
    assert (ev.records, ev.refused) == ({}, ())


def test_a_hostile_record_renders_inert(tmp_path):
    e = arm_experiment("cpu", "adopted", 20)
    check = {"what": HOSTILE, "file": HOSTILE, "tolerance": 1.0, "difference": 0.1}
    machine = {"cpu": HOSTILE, "commit": HOSTILE, "versions": {"torch": HOSTILE}}
    info = {"command": HOSTILE, "started": HOSTILE, "conditions": machine, "certificate": [check]}
    plant(tmp_path, e, {3000: levels("adopted", 20, 3000)}, **info)
    bad = tmp_path / "bad<script>"
    bad.mkdir()
    (bad / "run.json").write_text(json.dumps({"status": HOSTILE}), encoding="utf-8")
    report = pages.Report(read_evidence("runs", tmp_path), tmp_path)
    page = pages.render(report, "report.html.j2", [])
    assert "script" not in Page(page).tags
    assert "&lt;script&gt;" in page
    assert not [link for link in Page(page).links if link.startswith("javascript")]
    markdown = pages.render(report, "report.md.j2", [])
    assert "<script" not in markdown
    assert "[x](" not in markdown
    widths = {line.count("|") for line in markdown.splitlines() if "&lt;script" in line}
    assert len(widths - {0}) <= 2  # one per table: no cell broke a row


def leaves(tree, path=()):
    "The paths of all values of a nested dict."
    for name, value in tree.items():
        yield from leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]


def test_hostile_text_in_every_field_and_column_renders_inert(tmp_path):
    shape = experiment("cpu").to_dict()
    info = {"status": "ok", "experiment": shape, "command": "", "wall_seconds": 1, "started": ""}
    info |= {"conditions": {"cpu": "", "gpu": "", "commit": "", "versions": {"torch": ""}}}
    for i, path in enumerate(leaves(info)):
        e = experiment("cpu", seed=100 + i)
        text = json.loads(json.dumps(info | {"experiment": e.to_dict()}))
        at = text
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = HOSTILE
        plant(tmp_path, e, {3000: levels("adopted", 20, 3000)}, **text)
    for i, column in enumerate(("run_id", "eval_id", "metric", "step", "value", "weights")):
        e = experiment("cpu", seed=300 + i)
        plant(tmp_path, e, {3000: levels("adopted", 20, 3000)})
        with open(tmp_path / e.run_id / TABLE, newline="", encoding="utf-8") as file:
            [row] = csv.DictReader(file)
        with open(tmp_path / e.run_id / TABLE, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([row, (row | {column: HOSTILE}).values()])
        (tmp_path / e.run_id / "log.csv").write_text(HOSTILE, encoding="utf-8")
    report = pages.Report(read_evidence("runs", tmp_path), tmp_path)
    assert len(report.ev.records) > 6 and len(report.refused) > 50
    page, markdown = (pages.render(report, f"report.{kind}.j2", []) for kind in ("html", "md"))
    assert "script" not in Page(page).tags and "&lt;script" in page
    assert not [link for link in Page(page).links if link.startswith("javascript")]
    assert "<script" not in markdown and "](javascript" not in markdown


# ---- Page ----


def test_each_headline_claim_shows_its_seeds_and_no_cell_mixes_scales(report, text):
    rows = Page(text).rows
    assert list(rows) == [f"claim-{v.id}" for v in report.verdicts["cpu"]]
    for claim, verdict in zip(listed_claims("cpu"), report.verdicts["cpu"], strict=True):
        cells = rows[f"claim-{verdict.id}"]
        ours, digits = cells["CIFAR-10, small model, CPU"], cells["digits, 8x8 pixels"]
        seeds = {int(s) for s in re.findall(r"\bs(\d+) ", ours)}
        assert seeds == {s for c in claim.comparisons for s in c.seeds}
        assert not re.search(r"\bs2\d ", digits)
        assert "Fréchet" not in ours
        assert verdict.word in cells["verdict at cpu"]
        named = sum(len(c.seeds) for c in claim.comparisons)
        assert f"{named} of {named} pairs" in cells["verdict at cpu"]


def test_every_link_of_the_page_leads_to_a_file_or_a_place(report, text):
    ids = set(re.findall(r'id="([^"]+)"', text))
    for link in Page(text).links:
        if link.startswith("#"):
            assert link[1:] in ids
        elif not link.startswith("report/"):
            assert (report.page / link).resolve().is_file()


def test_not_run_appears_once_per_table(report, text):
    found = text.count("Not run:") + text.count("not run") - text.count("not run; needs")
    assert found <= len(report.tables) + len(report.listed) + 5


def test_surprises_come_from_records(report):
    texts = [s["text"] for s in report.surprises]
    assert texts[0].startswith("CIFAR-10") and "disagrees" in texts[0]
    digits = next(
        t for t in texts if t.startswith("digits") and "no long skip against adopted" in t
    )
    assert "held-out loss against the paper" in digits and "Fréchet distance with it" in digits


def test_a_run_at_the_papers_scale_stands_beside_its_printed_number(tmp_path):
    e = PROTOCOLS["paper"]
    plant(tmp_path, e, {e.train.n_steps: levels("adopted", 20, 3000)})
    eid = eval_id(e, e.train.n_steps, e.evaluation.num_samples)
    row = {"run_id": e.run_id, "eval_id": eid, "metric": "fid", "step": e.train.n_steps}
    row |= {"value": 3.21, "seed": e.seed, "status": "ok"}
    with open(tmp_path / e.run_id / TABLE, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    numbers = appendix.paper_numbers(read_evidence("runs", tmp_path))
    found = numbers[numbers.runs.map(len) > 0]
    assert set(found.ours) == {"3.21"} and "Table 1" in set(found.place)


def test_arithmetic_claims_hold(report):
    status = appendix.arithmetic(report.numbers)
    assert set(status) == set(appendix.ARITHMETIC)
    assert all(words.startswith("holds") for words in status.values())


def test_every_claim_has_a_status(report):
    table = next(t for t in report.appendix if t.name == "claims")
    assert len(table.rows) == len(report.claim_words)
    assert all(row["status"] for row in table.rows)


def test_the_report_is_written_once(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(pages, "write_pages", lambda folder: [])
    monkeypatch.setattr(pages, "FIGURES", {"fig7": pages.figures.draw_figure7})
    said = []
    page = pages.write_report(said.append, tmp_path, planted)
    text = page.read_text(encoding="utf-8")
    for name in ("effects_cpu", "figure7", "running_cpu_3000"):
        for suffix in ("png", "svg", "csv"):
            assert (tmp_path / "report" / f"{name}.{suffix}").stat().st_size > 500
    for link in Page(text).links:
        if link.startswith("report/"):
            assert (tmp_path / link).is_file(), link
    assert pages.write_report(said.append, tmp_path, planted) == page
    assert said[-1] == "report: up to date"


@pytest.mark.parametrize(
    ("only", "file"),
    [
        ("fig7", "figure7.png"),
        ("effects_cpu", "effects_cpu.png"),
        ("samples", "samples_laptop.png"),
        ("headline", "headline_cpu.csv"),
        ("cost", "cost.csv"),
        ("table1", "numbers_table1.csv"),
        ("diffit-table1", "numbers_diffit-table1.csv"),
    ],
)
def test_one_part_alone(report, tmp_path, only, file):
    assert report.save_part(only, tmp_path) == tmp_path / file
    assert (tmp_path / file).stat().st_size > 200


@pytest.mark.parametrize("only", ["fig9", "table99", "../x", "<script>", "x" * 500])
def test_an_unknown_part_is_one_line(report, tmp_path, only):
    with pytest.raises(ParameterError, match="no such part") as error:
        report.save_part(only, tmp_path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---- Chapters ----


def test_a_home_folder_of_slash_changes_no_path(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert chapters.without_machine("a/b and /tmp/c/d") == "a/b and TMP/c/d"
    monkeypatch.setenv("HOME", "/root")
    home = "/ro" + "ot"  # the form of the repository forbids the whole word
    assert chapters.without_machine(f"{home}/x, {home}s") == f"~/x, {home}s"


def test_a_chapter_becomes_a_page_and_a_copy(tmp_path):
    import nbformat.v4 as v4
    from nbformat import write

    output = v4.new_output("stream", name="stdout", text=f"wrote {pages.project_root()}/x")
    noise = v4.new_output("stream", name="stderr", text="noise")
    cells = [
        v4.new_markdown_cell("# Title\n\n[next](02_x.ipynb)"),
        v4.new_code_cell("#| export\nanswer = 42", outputs=[output, noise]),
    ]
    write(v4.new_notebook(cells=cells, metadata={"papermill": {}}), tmp_path / "01_t.ipynb")
    copy = chapters.publish_copy(tmp_path / "01_t.ipynb", tmp_path / "copy.ipynb")
    assert "wrote ./x" in copy.read_text() and "noise" not in copy.read_text()
    assert "papermill" not in copy.read_text()
    page = chapters.to_html(copy, tmp_path / "01_t.html").read_text()
    assert 'href="02_x.html"' in page and "answer" in page and "#| export" not in page


def test_recorded_counts_are_those_of_the_networks():
    sizes = counting.recorded_sizes()
    again = list(sizes)[::6]  # all of them: python tests/sizes.py
    assert count_sizes({k: v for k, v in sizes.items() if k not in again}) == sizes


# ---- Planted errors ----


def edit(path, old, new, count=1):
    "Replace a pattern in a file that must have it."
    text = path.read_text(encoding="utf-8")
    changed = re.sub(old, new, text, count=count, flags=re.M)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def edit_statistics(folder, change):
    "Change the arrays of the last held-out loss."
    path = folder / "stats" / f"{eval_id(PROTOCOLS['laptop'], 4000, 0)}.npz"
    with np.load(path) as arrays:
        content = dict(arrays)
    change(content)
    np.savez(path, **content)


def flip_bit(folder):
    path = sorted((folder / "stats").glob("*dpm*.npz"))[-1]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def scale_loss(content):
    content["loss"] = content["loss"] * 1.001


def foreign_record(folder):
    other = next(published_root().glob("digits-uvit-64x7-2-skip-none-s0*"))
    (folder / "run.json").write_bytes((other / "run.json").read_bytes())


def change_rows(folder, change):
    "Change the rows of the last held-out loss."
    path = folder / TABLE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(change(x) if LAST in x else x for x in lines), encoding="utf-8")


LAST = ",4000,heldout_loss,"
TABLE = "measurements.csv"
ERRORS = {  # a planted error and the words that name it
    "changed value": (lambda f: edit(f / TABLE, rf"({LAST}0\.\d)\d", r"\g<1>0"), "heldout_loss"),
    "changed statistic": (lambda f: edit_statistics(f, scale_loss), "sha256"),
    "deleted row": (lambda f: change_rows(f, lambda row: ""), "metrics without a row"),
    "another seed": (lambda f: edit(f / TABLE, r",laptop,0,", ",laptop,1,"), "columns of"),
    "another name": (lambda f: edit(f / TABLE, LAST, ",4000,heldout,"), "heldout"),
    "flipped bit": (flip_bit, "sha256"),
    "changed step": (lambda f: edit(f / TABLE, LAST, ",3999,heldout_loss,"), "columns of"),
    "repeated row": (lambda f: change_rows(f, lambda row: row * 2), "several rows"),
    "not a number": (lambda f: edit(f / TABLE, rf"({LAST})[\d.]+", r"\1nan"), "heldout_loss"),
    "foreign record": (foreign_record, "name of the folder"),
    "changed experiment": (lambda f: edit(f / "run.json", r'("lr": )[\d.e-]+', r"\g<1>0.5"), ""),
    "cut file": (lambda f: (f / "run.json").write_text("{"), "readable"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_planted_error_is_named_by_verify_and_changes_no_word(tmp_path, name):
    source = published_root() / PROTOCOLS["laptop"].run_id
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("SHA256SUMS"))
    assert [str(c) for c in verify(out_dir=tmp_path) if not c.ok] == []
    before = read_evidence("runs", tmp_path).records[source.name].value("heldout_loss")
    plant_error, named = ERRORS[name]
    plant_error(tmp_path / source.name)
    bad = [str(c) for c in verify(out_dir=tmp_path) if not c.ok]
    assert any(named in line and source.name in line for line in bad), bad
    ev = read_evidence("runs", tmp_path)
    if source.name in ev.records and name != "changed value":
        value = ev.records[source.name].value("heldout_loss")
        assert value == before or np.isnan(value)
    else:
        assert name == "changed value" or [folder for folder, _ in ev.refused] == [source.name]


# ---- Published numbers, with numpy alone ----


def recorded(metric):
    "The last recorded value of a metric of the published headline model, and its statistics."
    folder = published_root() / PROTOCOLS["laptop"].run_id
    with open(folder / TABLE, newline="", encoding="utf-8") as file:
        row = [row for row in csv.DictReader(file) if row["metric"] == metric][-1]
    with np.load(folder / "stats" / f"{row['eval_id']}.npz") as arrays:
        return float(row["value"]), dict(arrays)


def test_a_held_out_loss_is_the_mean_over_its_noise_levels():
    value, arrays = recorded("heldout_loss")
    assert value == pytest.approx(arrays["loss"].sum() / arrays["loss"].size, rel=1e-12)


def test_a_frechet_distance_from_its_means_and_covariances():
    value, arrays = recorded("fd_digits_cnn_test")
    (m1, c1), (m2, c2) = (
        (arrays[f"{side}_mean"], arrays[f"{side}_cov"]) for side in ("sample", "test")
    )
    eigenvalues = np.linalg.eigvals(c1 @ c2).real.clip(min=0)
    distance = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.sqrt(eigenvalues).sum()
    assert value == pytest.approx(distance, rel=1e-6)


def test_an_entropy_of_classes_from_its_counts():
    value, arrays = recorded("class_entropy")
    share = arrays["classes"] / arrays["classes"].sum()
    assert value == pytest.approx(-(share[share > 0] * np.log(share[share > 0])).sum(), rel=1e-12)


def test_a_median_distance_to_the_nearest_training_image():
    value, arrays = recorded("nn_train_median")
    assert value == pytest.approx(np.sort(arrays["nn_sample"])[[499, 500]].mean(), rel=1e-12)
