"""Two runs side by side: what the comparison says is what was changed."""

import copy
import json

import pytest

from paperclaims.fixtures import evidence as store
from paperclaims.reports import build, compare
from paperclaims.tests import synthetic
from paperclaims.tests.page import Page

SLUG = "method_{:03d}_x".format


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    synthetic.repository(folder, synthetic.catalogue(12))
    build.build(folder / "site", folder / "reports" / "evidence", folder)
    return folder


@pytest.fixture
def new(root):
    return json.loads((root / "site" / "report.json").read_text())


def requirement(report: dict, index: int, claim: int = 0, arm: str = "claim") -> dict:
    paper = next(found for found in report["papers"] if found["slug"] == SLUG(index))
    return paper["claims"][claim]["settings"][0]["arms"][arm]["requirements"][0]


def test_a_run_does_not_differ_from_itself(root, new):
    found = compare.compare(copy.deepcopy(new), new)
    assert found["compared"] > 50
    changed = ("verdicts", "appeared", "vanished", "claims", "added", "removed", "numbers", "rules", "time", "setup")
    assert [found[name] for name in changed] == [[]] * 9 + [{}]
    assert compare.compare(compare.load(root / "reports" / "evidence", root), new)["numbers"] == []
    assert compare.compare(compare.load(root / "reports" / "evidence" / "local", root), new)["numbers"] == []
    assert compare.load(root / "site", root) == compare.load(root / "site" / "report.json", root) == new


def test_what_was_changed_is_found_and_nothing_else(new):
    old = copy.deepcopy(new)
    paper = next(found for found in old["papers"] if found["slug"] == SLUG(0))
    paper["verdict"] = "inconclusive"
    paper["claims"][0]["settings"][0]["status"] = "inconclusive"
    near, far, turned = (requirement(old, index) for index in (0, 1, 9))
    near |= {key: near[key] + 0.001 for key in ("estimate", "low", "high")}
    far |= {key: far[key] / 2 for key in ("estimate", "low", "high")}
    turned |= {"outcome": "contradicted"}
    requirement(old, 2, claim=1)["below"] = 5
    moved = compare.compare(old, new)
    assert [(change["slug"], change["old"], change["new"]) for change in moved["verdicts"]] == [
        (SLUG(0), "inconclusive", "reproduced")
    ]
    assert [(change["slug"], change["test"], change["old"]) for change in moved["claims"]] == [
        (SLUG(0), "test_main", "inconclusive")
    ]
    assert [(move["slug"], move["changed"], move["apart"]) for move in moved["numbers"]] == [
        (SLUG(9), True, False),
        (SLUG(1), False, True),
        (SLUG(0), False, False),
    ]
    assert moved["numbers"][1]["relative"] == pytest.approx(1.0)
    assert moved["numbers"][2]["change"] == pytest.approx(-0.001)
    assert [(rule["slug"], rule["old"], rule["new"]) for rule in moved["rules"]] == [
        (SLUG(2), "at most 5 B", "at most 2,097,152 B")
    ]
    said = "\n".join(compare.summary(moved))
    assert "1 verdict and 1 claim changed; 3 of " in said
    assert f"{SLUG(0)}: inconclusive -> reproduced" in said
    assert f"{SLUG(1)} test_main, claim: error" in said
    assert len(compare.summary(moved, most=1)) == 3


def test_papers_and_claims_of_one_run_only_are_listed_apart(new):
    old = copy.deepcopy(new)
    old["papers"] = [paper for paper in old["papers"] if paper["slug"] != SLUG(0)]
    next(found for found in old["papers"] if found["slug"] == SLUG(1))["claims"].pop()
    found = compare.compare(old, new)
    assert [paper["slug"] for paper in found["appeared"]] == [SLUG(0)]
    assert [(claim["slug"], claim["test"], claim["params"]) for claim in found["added"]] == [
        (SLUG(1), "test_other", "0.1"),
        (SLUG(1), "test_other", "0.2"),
    ]
    assert found["verdicts"] == found["claims"] == found["vanished"] == found["removed"] == []
    back = compare.compare(new, old)
    assert back["vanished"] == found["appeared"]
    assert back["removed"] == found["added"]


def test_time_and_set_ups_that_differ_are_named(new):
    old = copy.deepcopy(new)
    for claim in next(found for found in old["papers"] if found["slug"] == SLUG(0))["claims"]:
        for setting in claim["settings"]:
            for arm in setting["arms"].values():
                arm["duration"] *= 2
                arm["seed"] = 7
    old["runs"][0]["packages"] |= {"torch": "2.12.0"}
    found = compare.compare(old, new)
    assert [(change["slug"], round(change["new"] / change["old"], 6)) for change in found["time"]] == [(SLUG(0), 0.5)]
    assert found["setup"] == {"seed": ("0, 7", "0"), "torch": ("2.12.0", "2.13.0")}
    old.pop("runs")
    assert compare.compare(old, new)["setup"] == {"seed": ("0, 7", "0")}


def test_the_page_and_the_terminal_say_it(root, new, tmp_path, monkeypatch, capsys):
    records = json.loads((root / "reports" / "evidence" / "local" / f"{SLUG(0)}.json").read_text())
    for record in records:
        for found in record["requirements"]:
            if found["quantity"] == "error":
                found |= {key: found[key] * 0.9 for key in ("estimate", "low", "high")}
    store.write_json(tmp_path / "old" / "cpu" / f"{SLUG(0)}.json", records)
    monkeypatch.setattr(build.catalogue, "load", lambda *_, load=build.catalogue.load: load(root))
    monkeypatch.setattr(
        build, "build", lambda *given, make=build.build, **options: make(*given, root=root, **options | {"picture": False})
    )
    command = ["build", "--evidence", str(root / "reports" / "evidence"), "--out", str(tmp_path / "site")]
    monkeypatch.setattr("sys.argv", [*command, "--compare", str(tmp_path / "old")])
    assert build.main() == 0
    said = capsys.readouterr().out
    assert "compared with 2026-11-21 14:07: 0 verdicts and 0 claims changed; 2 of 8 numbers moved" in said
    assert "9 papers appeared" in said
    shown = Page(tmp_path / "site" / "compare.html")
    changes = [float(attrs["value"]) for tag, attrs in shown.tags if attrs.get("class") == "change"]
    assert sorted(changes) == sorted(
        move["change"] for move in json.loads((tmp_path / "site" / "compare.json").read_text())["numbers"]
    )
    assert "+11 %" in shown.text
    assert "compare.html" in Page(tmp_path / "site" / "index.html").links
    monkeypatch.setattr("sys.argv", [*command, "--compare", str(tmp_path / "nowhere")])
    assert build.main() == 1
    assert "no comparison: " in capsys.readouterr().err
    assert not (tmp_path / "site" / "compare.html").exists()
    assert (tmp_path / "site" / "index.html").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 1, "built": "", "papers": [{"slug": "a"}]}', "[" * 100_000])
def test_what_is_no_report_is_refused_with_a_reason(root, tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json is no"):
        compare.load(tmp_path, root)
