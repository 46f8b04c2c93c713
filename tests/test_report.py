"""The report: what it says is what was measured, whatever the catalogue and the evidence hold."""

import json
import re
import urllib.parse
from pathlib import Path

import pytest

from paperclaims.fixtures import catalogue
from paperclaims.fixtures import evidence as store
from paperclaims.reports import build as builder
from paperclaims.reports import model, pages
from paperclaims.tests import synthetic
from paperclaims.tests.page import Page

SLUG = "method_{:03d}_x".format


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    synthetic.repository(folder, synthetic.catalogue(18))
    return folder


@pytest.fixture(scope="module")
def report(root):
    return build(root)


def build(root: Path, **options) -> dict:
    reports = root / "reports"
    return builder.build(**{"out": reports / "site", "evidence": reports / "evidence", "root": root, **options})


def paper(report: dict, index: int) -> dict:
    return next(found for found in report["papers"] if found["slug"] == SLUG(index))


def page(root: Path, index: int) -> Page:
    return Page(root / "reports" / "site" / "papers" / f"{SLUG(index)}.html")


def test_every_mix_of_records_gets_its_verdict(root, report):
    for index in range(18):
        assert paper(report, index)["verdict"] == synthetic.kind(index)
        shown = page(root, index)
        badges = [attrs["class"] for tag, attrs in shown.tags if tag == "span" and attrs.get("class", "").startswith("verdict ")]
        assert badges[0] == f"verdict {synthetic.kind(index).replace(' ', '-')}"
        assert paper(report, index)["why"].replace("'", "’") in shown.text.replace("'", "’")


def test_totals_add_up(root, report):
    totals = report["totals"]
    assert totals["papers"] == len(report["papers"]) == sum(totals["verdicts"].values()) == 18
    assert totals["claims"] == sum(len(found["claims"]) for found in report["papers"])
    for verdict, count in totals["verdicts"].items():
        assert count == sum(topic.get(verdict, 0) for topic in report["topics"].values()) > 0
    assert report == json.loads((root / "reports" / "site" / "report.json").read_text())


def test_the_numbers_of_the_pages_are_those_of_the_evidence(root, report):
    records = store.read(root / "reports" / "evidence")[0]
    measured = {(r["nodeid"], q["quantity"]): q for r in records for q in r["requirements"]}
    counted = 0
    for index in range(18):
        shown = [float(attrs["value"]) for _, attrs in page(root, index).tags if attrs.get("class") == "estimate"]
        expected = []
        for claim in paper(report, index)["claims"]:
            for setting in claim["settings"]:
                for arm, record in setting["arms"].items():
                    params = "-".join(filter(None, [setting["params"], arm]))
                    nodeid = f"claims/{paper(report, index)['topic']}/test_{SLUG(index)}.py::{claim['test']}[{params}]"
                    assert all(measured[nodeid, q["quantity"]] == q for q in record["requirements"])
                    expected += [q["estimate"] for q in record["requirements"]]
        assert shown == expected
        counted += len(shown)
    assert counted == len(measured) > 50


def test_rankings_name_the_weakest_and_the_slowest_claims(root, report):
    claims = [(found["slug"], claim) for found in report["papers"] for claim in found["claims"]]
    took = {
        (slug, claim["test"]): sum(arm["duration"] for setting in claim["settings"] for arm in setting["arms"].values())
        for slug, claim in claims
    }
    margins = {(slug, claim["test"]): claim["margin"] for slug, claim in claims if claim["margin"] is not None}
    lists = (root / "reports" / "site" / "index.html").read_text().split('<ol class="ranking">')[1:]
    shown = [re.findall(r'papers/(\w+)\.html#(\w+)"', part.split("</ol>")[0]) for part in lists]
    assert shown == [sorted(margins, key=margins.get)[:8], sorted(took, key=took.get, reverse=True)[:8]]
    for found in report["papers"]:
        total = sum(took[found["slug"], claim["test"]] for claim in found["claims"])
        own = [claim["margin"] for claim in found["claims"] if claim["central"] and claim["margin"] is not None]
        assert found["margin"] == min(own, default=None)
        assert found["duration"] == (pytest.approx(total) if found["claims"] else None)


def test_side_findings_do_not_count(root, report):
    assert paper(report, 1)["why"] == "Of 2 central claims, 1 held here, 1 held in part."
    records = [
        r | {"label": "local", "stale": False} for r in store.read(root / "reports" / "evidence")[0] if r["slug"] == SLUG(1)
    ]
    side = [r | {"test": "test_side", "line": 90, "central": False} for r in records if r["test"] == "test_main"]
    row = catalogue.load(root)[SLUG(1)]
    (found,) = model.papers([row], records + side, {}, root)
    assert len(found.claims) == 3
    assert found.why == paper(report, 1)["why"]


def test_markup_in_the_catalogue_and_the_evidence_is_text(root, report):
    shown = page(root, 0)
    title = " ".join(synthetic.MARKUP.split())
    assert shown.text.count(title) > 8
    assert not [tag for tag, _ in shown.tags if tag == "b" and title in tag]
    scripts = [attrs for tag, attrs in shown.tags if tag == "script"]
    assert [attrs.get("type", attrs.get("src")) for attrs in scripts] == ["application/json", "../paper.js"]
    assert json.loads(shown.islands[0])["series"][0]["name"] == synthetic.MARKUP
    index = Page(root / "reports" / "site" / "index.html")
    assert title in index.text
    assert [attrs.get("src") for tag, attrs in index.tags if tag == "script"] == ["index.js"]
    assert "49" not in index.text.split(title)[0][-20:]


def test_all_links_resolve_and_nothing_comes_from_a_network(root, report):
    site = root / "reports" / "site"
    read = {path: Page(path) for path in site.rglob("*.html")}
    assert len(read) == 18 + 4
    for path, found in read.items():
        for link in found.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme == "https":
                assert parts.netloc == "arxiv.org"
            elif link != "data:,":
                target = (path.parent / parts.path).resolve() if parts.path else path
                assert target.exists(), (path, link)
                if parts.fragment and "=" not in parts.fragment:
                    assert parts.fragment in read[target].ids, (path, link)
        for _, attrs in found.tags:
            assert not re.match(r"(https?:)?//", attrs.get("src") or "")
    assert "http" not in re.sub(r"https://arxiv\.org", "", (site / "index.html").read_text() + (site / "style.css").read_text())


def test_what_did_not_hold_says_so_fairly(root, report):
    shown = page(root, 11)
    assert paper(report, 11)["verdict"] == "not reproduced"
    assert "Did not hold here: the baseline, tuned, does as well" in shown.text
    assert "What differed from the paper: digits instead of ImageNet" in shown.text
    for path in (root / "reports" / "site").rglob("*.html"):
        assert "refuted" not in path.read_text()


def test_a_crash_is_shown_with_its_message(root, report):
    shown = page(root, 6)
    assert "The control arm crashed." in shown.text
    assert "ZeroDivisionError: division by zero" in shown.text
    assert "no verdict until somebody has looked" in shown.text


def test_a_paper_without_tests_shows_its_claim(root, report):
    shown = page(root, 8)
    assert "Mechanism 8 lowers the error at equal cost." in shown.text
    assert "This paper has no tests yet" in shown.text
    assert "python -m pytest --paper method_007_x" in page(root, 7).text


def test_without_evidence_every_paper_still_has_its_page(root, tmp_path):
    report = build(root, out=tmp_path / "site", evidence=tmp_path / "nowhere")
    assert report["totals"]["verdicts"] == {"not run": 16, "not encoded": 2}
    assert "no such folder" in report["problems"][0]
    assert len(list((tmp_path / "site" / "papers").iterdir())) == 18


def test_broken_evidence_is_named_and_the_rest_is_shown(root, report, tmp_path):
    evidence = tmp_path / "evidence"
    good = root / "reports" / "evidence" / "local" / f"{SLUG(9)}.json"
    (evidence / "local").mkdir(parents=True)
    (evidence / "local" / good.name).write_text(good.read_text())
    (evidence / "local" / "half.json").write_text(good.read_text()[:500])
    (evidence / "local" / "old.json").write_text(json.dumps([{"schema": 0}]))
    (evidence / "local" / "thin.json").write_text(json.dumps([{"schema": store.SCHEMA, "nodeid": "claims/a.py::test_b"}]))
    (evidence / "local" / "list.json").write_text("[1]")
    (evidence / "local" / "deep.json").write_text("[" * 100_000)
    (evidence / "local" / "bytes.json").write_bytes(b"\xff\xfe")
    found = build(root, out=tmp_path / "site", evidence=evidence)
    assert paper(found, 9) == paper(report, 9)
    problems = "\n".join(found["problems"])
    assert len(found["problems"]) == 6
    for name in ("half.json", "old.json", "list.json", "deep.json", "bytes.json", "claims/a.py::test_b left out"):
        assert name in problems
    assert "6 things could not be used" in Page(tmp_path / "site" / "index.html").text


def test_the_folder_of_a_single_run_can_be_shown(root, report, tmp_path):
    for record in store.read(root / "reports" / "evidence" / "local")[0]:
        store.write_json(store.record_path(tmp_path / "run", record["slug"], record["nodeid"]), record)
    found = build(root, out=tmp_path / "site", evidence=tmp_path / "run")
    assert found["papers"] == report["papers"]


@pytest.mark.parametrize("age", ["card", "old"])
def test_other_machines_stand_beside_the_shown_one_and_stale_ones_are_marked(root, tmp_path, age):
    evidence = tmp_path / "evidence"
    records = json.loads((root / "reports" / "evidence" / "local" / f"{SLUG(9)}.json").read_text())
    store.write_json(evidence / "cpu" / f"{SLUG(9)}.json", records)
    card = {**synthetic.MACHINE, "accelerator": "Some Card"}
    sources = {"hash": "0", "files": []} if age == "old" else records[0]["sources"]
    store.write_json(evidence / age / f"{SLUG(9)}.json", [r | {"machine": card, "sources": sources} for r in records])
    found = build(root, out=tmp_path / "site", evidence=evidence)
    labels = {arm["label"] for claim in paper(found, 9)["claims"] for s in claim["settings"] for arm in s["arms"].values()}
    assert labels == {"cpu"}
    shown = Page(tmp_path / "site" / "papers" / f"{SLUG(9)}.html")
    marks = [attrs.get("title") for tag, attrs in shown.tags if tag == "span" and attrs.get("class") == "stale"]
    assert ("The sources have changed since this was recorded there." in marks) == (age == "old")
    assert "The sources have changed since this evidence was recorded: run it again." not in marks
    assert "On 2 machines Arm Quantity Required cpu " in shown.text
    assert (" old stale Some Card" if age == "old" else " card Some Card") in shown.text


def test_evidence_older_than_its_sources_is_marked(root, tmp_path):
    records = json.loads((root / "reports" / "evidence" / "local" / f"{SLUG(9)}.json").read_text())
    old = [record | {"sources": {"hash": "0", "files": []}} for record in records]
    store.write_json(tmp_path / "evidence" / "local" / f"{SLUG(9)}.json", old)
    found = build(root, out=tmp_path / "site", evidence=tmp_path / "evidence")
    assert paper(found, 9)["stale"]
    assert "stale" in Page(tmp_path / "site" / "papers" / f"{SLUG(9)}.html").text


def test_a_build_that_fails_leaves_the_old_site(root, report, tmp_path, monkeypatch):
    build(root, out=tmp_path / "site")
    (tmp_path / "site" / "old.txt").write_text("from an earlier build")
    monkeypatch.setattr(pages, "paper_values", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(root, out=tmp_path / "site")
    assert (tmp_path / "site" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    monkeypatch.undo()
    build(root, out=tmp_path / "site")
    assert not (tmp_path / "site" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_folder_of_somebody_else_is_not_replaced(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        build(root, out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_says_what_it_wrote(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build", "--evidence", str(tmp_path / "none"), "--out", str(tmp_path / "site")])
    builder.main()
    said = capsys.readouterr()
    assert (tmp_path / "site" / "index.html").as_uri() in said.out
    assert "no such folder" in said.err


def test_pages_tell_which_requirement_the_control_has_to_break(root, report):
    shown = page(root, 9).text
    assert "contradicted, as it must be" in shown
    assert shown.count("met, need not break") == 1


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["not reproduced"], "The headline claim did not hold here."),
        (
            ["not reproduced", "reproduced"],
            "The headline claim did not hold here. Of 2 central claims, 1 held here, 1 did",
        ),
        (["inconclusive", "not reproduced"], "No central claim held here. Of 2 central claims, 1 did not hold here, 1 could not"),
    ],
)
def test_why_a_paper_is_not_reproduced(verdicts, said):
    claims = tuple(model.Claim({"central": True}, verdict, ()) for verdict in verdicts)
    assert model._why("not reproduced", claims).startswith(said)
