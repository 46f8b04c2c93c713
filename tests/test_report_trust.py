"""What the report says about the tests themselves: rates under fresh seeds, planted errors; and about kernels."""

import json
import re

import pytest

from paperclaims.fixtures import evidence as store
from paperclaims.reports import benchmarks, build, formats, publish
from paperclaims.tests import synthetic
from paperclaims.tests.page import Page

SLUG = "method_{:03d}_x".format


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    synthetic.repository(folder, synthetic.catalogue(7), complete=True)
    return folder


@pytest.fixture
def made(root, tmp_path):
    """`made()` builds the report and returns it with a function that reads a page."""

    def make():
        report = build.build(tmp_path / "site", root / "reports" / "evidence", root)
        return report, lambda name: Page(tmp_path / "site" / name)

    return make


@pytest.fixture
def changed(root):
    """`changed(kind, slug)` gives the content of a file to alter; the altered one is written and later taken back."""
    kept = {}

    def change(kind: str, slug: str, alter) -> None:
        path = next((root / "reports" / kind).rglob(f"{slug}.json"))
        kept.setdefault(path, path.read_text())
        store.write_json(path, alter(json.loads(path.read_text())))

    yield change
    for path, text in kept.items():
        path.write_text(text)


def test_rates_and_planted_errors_are_shown_and_add_up(made):
    report, page = made()
    rates = [s["fresh_seeds"] for paper in report["papers"] for claim in paper["claims"] for s in claim["settings"]]
    seeds = report["totals"]["fresh_seeds"]
    assert seeds == {
        **{"papers": 7, "claims": len(rates), "kept": sum(r["kept"] for r in rates), "of": 10 * len(rates)},
        **{"defects": 0, "stale": 0},
    }
    assert report["totals"]["mutants"] == {"papers": 7, "noticed": 7 * 20 - 9, "counted": 140, "stale": 0}
    index = page("index.html")
    assert f"kept their verdict in {seeds['kept']} of {seeds['of']} runs" in index.text
    assert "131 of 140 ( 94 % ) in the implementations of 7 papers were noticed" in index.text.replace("(94 %)", "( 94 % )")
    shown = page(f"papers/{SLUG(3)}.html")
    assert "Stayed inconclusive at 9 of 10 [46 %, >99 %] fresh seeds (not at --seed 11 )." in shown.text
    assert "Held at 9 of 10 [46 %, >99 %] fresh seeds (not at --seed 11 )." in page(f"papers/{SLUG(1)}.html").text
    assert "In each of 5 settings: held at 10 of 10 [59 %, 100 %] fresh seeds." in shown.text
    assert "17 of 20 small errors planted in the implementation were noticed" in shown.text
    assert [f"impl/sparsity/{SLUG(3)}.py:{line}" in shown.text for line in (9, 10, 11, 12, 13)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert "stale" not in shown.text


def test_the_table_shows_the_claim_that_held_least_often(made):
    _, page = made()
    cells = [attrs for tag, attrs in page("index.html").tags if tag == "tr" and "data-slug" in attrs]
    assert {row["data-slug"]: row["data-seeds"] for row in cells} == {SLUG(i): "1.0" if i % 5 == 0 else "0.9" for i in range(7)}


@pytest.mark.parametrize("kind", ["fresh_seeds", "mutants"])
def test_what_was_measured_from_older_sources_is_marked(made, changed, kind):
    changed(kind, SLUG(3), lambda content: content | {"sources": content["sources"] | {"hash": "0"}})
    report, page = made()
    assert report["totals"][kind]["stale"] == 1
    shown = page(f"papers/{SLUG(3)}.html")
    assert "stale" in shown.text
    assert "stale" in page("index.html").text
    assert "stale" not in page(f"papers/{SLUG(4)}.html").text


def test_a_defect_is_called_one(made, changed):
    def lose(content):
        first = content["claims"][0]
        runs = [run | {"kept": i < 20} for i, run in enumerate(first["runs"] * 5)]
        return content | {"claims": [first | {"runs": runs, "kept": 20, "of": 50, "interval": [0.23, 0.6], "defect": True}]}

    changed("fresh_seeds", SLUG(3), lose)
    report, page = made()
    assert report["totals"]["fresh_seeds"]["defects"] == 1
    assert "a defect of this test" in page(f"papers/{SLUG(3)}.html").text
    index = page("index.html").text
    assert "1 depends on the seed" in index
    assert "20/50" in index.split("Claims that depend on the seed")[1]


def test_a_rate_without_a_place_is_named(made, changed):
    def rename(content):
        return content | {"claims": [claim | {"test": "test_gone"} for claim in content["claims"][:1]]}

    changed("fresh_seeds", SLUG(3), rename)
    report, _ = made()
    assert report["problems"] == [
        f"{SLUG(3)}: test_gone has fresh seeds but no evidence, so its rate is not shown; run the paper"
    ]


def test_broken_files_are_named_and_cost_nothing_else(root, made):
    before, _ = made()
    contents = ["{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "slug": "../../x"}', "\x00", "[" * 100_000, "[NaN]"]
    paths = []
    for kind in ("fresh_seeds", "mutants", "benchmarks"):
        good = json.loads(next((root / "reports" / kind).rglob("*.json")).read_text())
        for number, content in enumerate([*contents, json.dumps(good | {"slug": "<b>"}), json.dumps(good | {"machine": None})]):
            paths.append(root / "reports" / kind / "broken" / f"{number}.json")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            paths[-1].write_text(content)
    try:
        report, page = made()
    finally:
        for path in paths:
            path.unlink()
    assert len(report["problems"]) == len(paths) == 30
    assert all(any(problem.startswith(f"{path}: left out (") for problem in report["problems"]) for path in paths)
    assert "30 things could not be used" in page("index.html").text
    assert report["papers"] == before["papers"]


def test_local_results_can_be_published(root, made):
    for kind in publish.RESULTS:
        paths = publish.publish_results("cpu", kind, root / "reports")
        assert [path.name for path in paths] == [f"{SLUG(i)}.json" for i in range(7)]
        assert all(path.read_text() == (path.parents[1] / "local" / path.name).read_text() for path in paths)
        for path in paths:
            path.unlink()


def test_local_results_are_preferred_to_published_ones(root, made, changed):
    for kind in ("fresh_seeds", "mutants"):
        path = root / "reports" / kind / "zzz" / f"{SLUG(3)}.json"
        store.write_json(path, json.loads((root / "reports" / kind / "local" / path.name).read_text()) | {"time": "1999-01-01"})
    page = made()[1]
    assert "1999-01-01" not in page(f"papers/{SLUG(3)}.html").text


def test_the_kernels_page_shows_what_was_measured(root, made):
    _, page = made()
    shown = page("kernels.html")
    rows = json.loads((root / "reports" / "benchmarks" / "card" / f"{SLUG(0)}.json").read_text())["rows"]
    for name, key in (("seconds", "seconds"), ("ratio", "ratio"), ("peak", "peak_bytes")):
        found = [float(attrs["value"]) for tag, attrs in shown.tags if tag == "data" and attrs.get("class") == name]
        assert sorted(found) == sorted(row[key] for row in rows)
    floors = [float(found) for found in re.findall(r"([\d.]+) ×", shown.text.replace("1,024 ×", "").replace("32,000 ×", ""))]
    assert [found for found in floors if found < 100][:4] == [1.25, 1.5, 2.5, 3.5]
    assert " ".join(synthetic.MARKUP.split()) in shown.text
    plots = [json.loads(island) for island in shown.islands]
    assert [plot["title"] for plot in plots] == ["Time over size, 1 thread, float32", "Peak memory over size, 1 thread, float32"]
    assert [series["name"] for series in plots[0]["series"]][:2] == ["ours", "ours, 512 tokens"]
    link = [attrs["href"] for tag, attrs in page(f"papers/{SLUG(0)}.html").tags if "kernels.html#" in attrs.get("href", "")]
    assert link == [f"../kernels.html#{SLUG(0)}"]
    assert SLUG(0) in shown.ids


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    content = synthetic.benchmark("a")
    row = content["rows"][0]
    assert benchmarks.floor(content, row) == row["least_flops"] / 1.25e11
    content["ceilings"][0]["bytes_per_second"] = 1e7
    assert benchmarks.floor(content, row) == row["least_bytes"] / 1e7
    assert benchmarks.floor(content, row | {"threads": 2}) is None


def test_the_first_benchmark_files_are_read_too(tmp_path):
    rows = [{key: value for key, value in row.items() if key not in ("own", "dtype")} for row in synthetic.benchmark("a")["rows"]]
    content = {"machine": synthetic.MACHINE, "torch": "2.13.0", "rows": rows}
    assert benchmarks.complete(content, tmp_path / "cut_cross_entropy.json") is None
    assert formats.fault(content, formats.BENCHMARK) is None
    assert (content["slug"], content["baseline"], content["packages"]) == (
        "cut_cross_entropy",
        "full logits",
        {"torch": "2.13.0"},
    )
    assert [row["own"] for row in content["rows"][:4]] == [False, True, True, False]
    assert benchmarks.tables(content)[0]["floor"] is None


def test_without_benchmarks_the_page_says_how_to_get_them(root, tmp_path):
    synthetic.repository(tmp_path, synthetic.catalogue(3))
    build.build(tmp_path / "site", tmp_path / "reports" / "evidence", tmp_path)
    assert "nox -s benchmarks" in Page(tmp_path / "site" / "kernels.html").text
