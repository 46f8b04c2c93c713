"""The report: what it says is what was measured, whatever the catalogue and the evidence hold."""

import html.parser
import json
import math
import re
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.fixtures import catalogue
from paperclaims.fixtures import evidence as store
from paperclaims.fixtures.protocol import Requirement
from paperclaims.fixtures.statistics import Interval
from paperclaims.reports import build as builder
from paperclaims.reports import model, plots, text
from paperclaims.tests import synthetic

SLUG = "method_{:03d}_x".format


class Page(html.parser.HTMLParser):
    """Links, ids, scripts and text of a page as a browser reads them."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.tags, self.pieces, self.islands = [], set(), [], [], []
        self.open = None
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [attrs[key] for key in ("href", "src", "data-plotly") if attrs.get(key)]
        self.ids.add(attrs.get("id"))
        self.open = attrs.get("type", "script") if tag == "script" else None

    def handle_data(self, data):
        if self.open is None:
            self.pieces.append(data)
        elif self.open == "application/json":
            self.islands.append(data)

    def handle_endtag(self, tag):
        self.open = None


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
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) == 18 + 2
    for path, found in pages.items():
        for link in found.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme == "https":
                assert parts.netloc == "arxiv.org"
            elif link != "data:,":
                target = (path.parent / parts.path).resolve() if parts.path else path
                assert target.exists(), (path, link)
                if parts.fragment and "=" not in parts.fragment:
                    assert parts.fragment in pages[target].ids, (path, link)
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
    (evidence / "local" / "bytes.json").write_bytes(b"\xff\xfe")
    found = build(root, out=tmp_path / "site", evidence=evidence)
    assert paper(found, 9) == paper(report, 9)
    problems = "\n".join(found["problems"])
    assert len(found["problems"]) == 5
    for name in ("half.json", "old.json", "list.json", "bytes.json", "claims/a.py::test_b left out"):
        assert name in problems
    assert "5 pieces of evidence left out" in Page(tmp_path / "site" / "index.html").text


def test_the_folder_of_a_single_run_can_be_shown(root, report, tmp_path):
    for record in store.read(root / "reports" / "evidence" / "local")[0]:
        store.write_json(store.record_path(tmp_path / "run", record["slug"], record["nodeid"]), record)
    found = build(root, out=tmp_path / "site", evidence=tmp_path / "run")
    assert found["papers"] == report["papers"]


def test_other_machines_are_listed_and_the_shown_one_is_named(root, tmp_path):
    evidence = tmp_path / "evidence"
    records = json.loads((root / "reports" / "evidence" / "local" / f"{SLUG(9)}.json").read_text())
    store.write_json(evidence / "cpu" / f"{SLUG(9)}.json", records)
    card = {**synthetic.MACHINE, "accelerator": "Some Card"}
    store.write_json(evidence / "card" / f"{SLUG(9)}.json", [r | {"machine": card} for r in records])
    found = build(root, out=tmp_path / "site", evidence=evidence)
    labels = {arm["label"] for claim in paper(found, 9)["claims"] for s in claim["settings"] for arm in s["arms"].values()}
    assert len(labels) == 1
    other = ({"cpu", "card"} - labels).pop()
    shown = Page(tmp_path / "site" / "papers" / f"{SLUG(9)}.html").text
    assert re.search(rf"shown above: {labels.pop()} \): {other} , ", shown)


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
    monkeypatch.setattr(builder, "paper_values", lambda *_: 1 / 0)
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


def requirement(estimate, low, high, above=None, below=None) -> dict:
    return Requirement("q", Interval(estimate, low, high, 8), above, below).as_dict()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (requirement(5, 4, 6, above=3), 0.5),
        (requirement(5, 4, 6, below=3), 0.5),
        (requirement(5, 4, 6, above=5), 0.0),
        (requirement(5, 4, 6, 3, 10), 0.5),
        (requirement(5, 4, 6, 7, 10), 0.5),
        (requirement(5, 4, 6, 1, 2), 1.0),
        (requirement(5, 5, 5, above=3), None),
    ],
)
def test_margin_counts_widths_to_the_bound_that_decides(found, expected):
    assert model.margin(found) == expected


values = st.one_of(st.floats(-1e9, 1e9, allow_subnormal=False), st.floats(1e-12, 1e12), st.sampled_from([0.0, 1.0, -1.0]))


@settings(deadline=None)
@given(*[st.lists(values, min_size=3, max_size=3).map(sorted)] * 2, values, st.booleans())
def test_a_plot_shows_on_which_side_of_the_bound_an_interval_lies(claim, control, bound, upper):
    sides = {"below" if upper else "above": bound}
    shown = [requirement(middle, low, high, **sides) for low, middle, high in (claim, control)]
    axis = plots.axis_for(shown)
    edge = axis.at(bound)
    for found in shown:
        low, middle, high = axis.at(found["low"]), axis.at(found["estimate"]), axis.at(found["high"])
        assert 0 <= low <= middle <= high <= 100
        ends = {"met": low <= edge and high <= edge if upper else low >= edge and high >= edge}
        ends["contradicted"] = low >= edge and high >= edge if upper else low <= edge and high <= edge
        assert ends.get(found["outcome"], low <= edge <= high)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 7
    assert [position for position, _ in ticks] == sorted({position for position, _ in ticks})
    assert len({label for _, label in ticks}) == len(ticks)
    plots.interval_plot("q", [("", {"claim": shown[0], "control": shown[1]})])


@pytest.mark.parametrize(
    ("sides", "shade", "flag"),
    [
        ({"below": 4}, (0.0, 50.0), "← at most 4"),
        ({"above": 4}, (50.0, 50.0), "at least 4 →"),
        ({"above": 2, "below": 4}, (4.0, 46.0), "2 to 4"),
    ],
)
def test_a_plot_draws_the_interval_and_shades_the_side_that_satisfies(sides, shade, flag):
    shown = {"claim": requirement(3, 2, 3.5, **sides), "control": requirement(6, 6, 6, **sides)}
    drawn = plots.interval_plot("q", [("", shown)])
    rectangle = re.search(r'class="satisfied" x="([\d.]+)%" width="([\d.]+)%"', drawn)
    assert tuple(map(float, rectangle.groups())) == shade
    assert 'cx="27.0%"' in drawn
    assert '<line x1="4.0%" x2="38.5%"' in drawn
    assert '<svg x="96.0%" y="50%" class="mark"><path' in drawn
    assert flag in drawn
    edges = {shade[0], shade[0] + shade[1]} - {0.0, 100.0}
    assert {float(x) for x in re.findall(r'class="bound" x1="([\d.]+)%"', drawn)} == edges


def test_the_bound_is_labelled_inside_the_plot():
    for value, anchor in ((10, "start"), (90, "end")):
        for side in ("below", "above"):
            ends = [requirement(0, 0, 0, **{side: value}), requirement(100, 100, 100, **{side: value})]
            drawn = plots.interval_plot("q", [("", dict(zip(("claim", "control"), ends, strict=True)))])
            assert f'y="13" text-anchor="{anchor}"' in drawn


def test_a_plot_says_what_the_control_has_to_do():
    shown = {"claim": requirement(1, 1, 1, below=2), "control": requirement(3, 3, 3, below=2)}
    assert "contradicted, as it must be" in plots.interval_plot("q", [("", shown)], must_break=True)
    assert "contradicted, need not break" in plots.interval_plot("q", [("", shown)], must_break=False)
    shown["control"] = shown["claim"]
    assert "met, should not be" in plots.interval_plot("q", [("", shown)], must_break=True)


def test_pages_tell_which_requirement_the_control_has_to_break(root, report):
    shown = page(root, 9).text
    assert "contradicted, as it must be" in shown
    assert shown.count("met, need not break") == 1


def test_margin_of_a_setting_looks_at_what_decides_it():
    def arm(*requirements):
        named = [found | {"quantity": name} for name, found in zip("ab", requirements, strict=False)]
        return {"requirements": named, "control_breaks": ["a"]}

    wide, near, broken = requirement(5, 4, 6, above=2), requirement(5, 4, 6, above=3.8), requirement(5, 4, 6, above=9)
    claim = model.Setting("", "reproduced", "", {"claim": arm(wide, near), "control": arm(broken, near)})
    assert claim.margin == pytest.approx(0.1)
    claim = model.Setting("", "reproduced", "", {"claim": arm(wide, wide), "control": arm(requirement(5, 4, 6, above=6.4), near)})
    assert claim.margin == pytest.approx(0.2)
    claim = model.Setting("", "not reproduced", "", {"claim": arm(broken, near), "control": arm(broken, near)})
    assert claim.margin == pytest.approx(1.5)
    assert model.Setting("", "inconclusive", "", {"claim": arm(near), "control": arm(broken)}).margin is None


def test_the_axis_is_logarithmic_where_a_linear_one_would_hide_the_small():
    assert plots.axis_for([requirement(1, 0.9, 1.1, below=900)]).kind == "linear"
    assert plots.axis_for([requirement(1, 0.9, 1.1, below=2000)]).kind == "log"
    assert plots.axis_for([requirement(0, 0, 0, below=1e-9), requirement(0.3, 0.3, 0.3, below=1e-9)]).kind == "symlog"
    assert plots.axis_for([requirement(0.1, -0.1, 0.3, above=0), requirement(1e-9, -0.2, 0.2, above=0)]).kind == "linear"
    nothing = requirement(0, -2e-16, 2e-16, below=-0.7)
    assert plots.axis_for([requirement(-0.2, -0.4, 0.02, below=-0.7), nothing]).kind == "linear"
    assert plots.axis_for([requirement(1e-16, 1e-16, 1e-16, below=0.5), requirement(0.9, 0.9, 0.9, below=0.5)]).kind == "linear"
    near = plots.Axis("linear", 1e5, 1e5 + 0.004).ticks()
    assert near[1][1] == "100,000.002"
    assert plots.Axis("log", 0, 4).ticks() == [(4.0, "1"), (27.0, "10"), (50.0, "100"), (73.0, "10³"), (96.0, "10⁴")]


def test_curves_share_a_plot_and_what_both_arms_drew_alike_appears_once():
    def curve(series, y):
        about = {"name": "loss", "series": series, "x_label": "step", "y_label": "", "log": "x"}
        return about | {"x": [1.0, 2.0], "y": y, "low": None, "high": None}

    arms = {"claim": {"curves": [curve("ours", [2.0, 1.0]), curve("base", [3.0, 3.0])]}}
    arms["control"] = {"curves": [curve("ours", [3.0, 2.0]), curve("base", [3.0, 3.0])]}
    (plot,) = plots.curve_plots([("", arms)])
    assert [(series["name"], series["arm"]) for series in plot["series"]] == [
        ("ours", "claim"),
        ("base", "claim"),
        ("ours", "control"),
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (24_000, "24,000"),
        (-3, "−3"),
        (0.123456, "0.1235"),
        (1234.6, "1,235"),
        (123456.789, "123,457"),
        (2.5e-4, "2.5×10⁻⁴"),
        (1e-9, "10⁻⁹"),
        (-1e-9, "−10⁻⁹"),
        (1.5e15, "1.5×10¹⁵"),
        (0.1 + 0.2, "0.3"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_short(value, shown):
    assert text.number(value) == shown


def test_an_interval_has_the_digits_that_its_width_justifies():
    assert text.interval(0.123456, 0.101, 0.145) == ("0.123", "[0.101, 0.145]")
    assert text.interval(71.44, 68.1, 74.9) == ("71.4", "[68.1, 74.9]")
    assert text.interval(0.2, -0.53, 0.98, 1.0) == ("0.20", "[−0.53, 0.98]")
    assert text.interval(0.05, 0.04, 0.06) == ("0.050", "[0.040, 0.060]")
    assert text.interval(3.0, 3.0, 3.0) == ("3", "")
    assert text.interval(1.0, 1 - 1e-12, 1 + 1e-12) == ("1", "± 10⁻¹²")
    assert text.interval(2e-5, 1e-5, 3e-5) == ("2×10⁻⁵", "[10⁻⁵, 3×10⁻⁵]")


def test_requirements_in_words():
    assert text.bounds(0.5, None, "%") == "at least 0.5 %"
    assert text.bounds(None, 100_000.5) == "at most 100,000.5"
    assert text.bounds(1, 2) == "1 to 2"
    assert text.bounds(4, 4, "bits") == "exactly 4 bits"
