"""The report survives what it reads and where it writes: broken evidence, full and forbidden folders, a faulty catalogue."""

import copy
import errno
import json
import resource
import xml.etree.ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.fixtures import catalogue
from paperclaims.reports import build, compare, export, formats, images, inputs, model, pages
from paperclaims.tests import synthetic

SLUG = "method_{:03d}_x".format
JUNK = [None, True, -1, 0, 1e300, -1e199, 5e-324, "", "x", "\ud800", "\x00\x1b", synthetic.MARKUP, [], {}, [0], {"a": 1}, 10**400]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    synthetic.repository(folder, synthetic.catalogue(9))
    return folder


@pytest.fixture(scope="module")
def templates():
    return pages.template_environment()


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path to every value inside `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: object, path: tuple, by: object) -> object:
    if not path:
        return by
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], by)
    return changed


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_record_with_one_odd_value_is_left_out_with_a_reason_or_shown(root, templates, data):
    index = data.draw(st.sampled_from([0, 1, 2, 3, 4]))
    records = json.loads((root / "reports" / "evidence" / "local" / f"{SLUG(index)}.json").read_text())
    position = data.draw(st.integers(0, len(records) - 1))
    path = data.draw(st.sampled_from(places(records[position])))
    records[position] = replaced(records[position], path, data.draw(st.sampled_from(JUNK)))
    wrong = formats.record_fault(records[position])
    assert wrong is None or (isinstance(wrong, str) and wrong.encode())
    kept = [record | {"label": "local", "stale": False} for record in records if formats.record_fault(record) is None]
    row = catalogue.load(root)[SLUG(index)]
    papers = model.papers([row], [record for record in kept if record["slug"] == row.slug], {"cpu": kept}, root)
    report = export.as_json(papers, [], "now")
    json.dumps(report, allow_nan=False).encode()
    shared = {"built": "", "totals": report["totals"], "problems": [], "compared": False, "base": "", "repo": ""}
    found = inputs.Inputs(by_label={"cpu": kept})
    for name, values in (
        ("paper", pages.paper_values(papers[0], papers, 0, root, {}) | {"benchmarked": False}),
        ("index", pages.index_values(papers, found)),
        ("compare", pages.compare_values(compare.compare(report, report), papers)),
    ):
        templates.get_template(f"{name}.html.jinja").render(**shared, **values).encode()
    for picture in (images.corpus(papers, ""), images.badge(papers[0])):
        xml.etree.ElementTree.fromstring(picture)


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        (1, float, None),
        (True, float, "it is True, not a finite number"),
        (float("nan"), float, "it is nan, not a finite number"),
        (1, bool, "it is 1, not true or false"),
        (None, formats.Maybe(str), None),
        ("b", {"a"}, "it is 'b', not one of 'a'"),
        ([1, "x"], [int], "[1] is 'x', not a whole number"),
        ([1], (int, int), "it is [1], not a list of 2"),
        ({"a": {"b": 1}}, {"a": {"b": str}}, "a.b is 1, not a text"),
        ({}, {"b": int, "a": int}, "it lacks a, b"),
        ({"k": 1}, {str: str}, "k is 1, not a text"),
        (1, formats.Either(str, int), None),
        ("\ud800", str, "it is '\\ud800', not a text"),
        ("claims/../x.py", formats.PATH, None),
    ],
)
def test_what_does_not_fit_is_named(value, shape, wrong):
    found = formats.fault(value, shape)
    if shape is formats.PATH:
        assert found is not None
    else:
        assert found == wrong


def test_a_full_disk_leaves_the_old_report_and_says_so(root, tmp_path, monkeypatch, capsys):
    site = tmp_path / "site"
    build.build(site, root / "reports" / "evidence", root)
    before = (site / "index.html").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("sys.argv", ["build", "--evidence", str(root / "reports" / "evidence"), "--out", str(site)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert build.main() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr()
    assert said.err == f"error: cannot write {site} (File too large); give another folder with --out\n"
    assert (site / "index.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize("out", ["file", "file/site", "/proc/site"])
def test_a_folder_that_cannot_be_written_is_named(root, tmp_path, monkeypatch, capsys, out):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("sys.argv", ["build", "--evidence", str(root / "reports" / "evidence"), "--out", str(tmp_path / out)])
    assert build.main() == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write {tmp_path / out} (")
    assert len(said.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder_leaves_the_old_report(root, tmp_path, monkeypatch):
    def refuse(self, *_):
        raise PermissionError(errno.EACCES, "Permission denied")

    build.build(tmp_path / "site", root / "reports" / "evidence", root)
    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(PermissionError):
        build.build(tmp_path / "site", root / "reports" / "evidence", root)
    assert (tmp_path / "site" / "report.json").exists()


def test_a_faulty_catalogue_is_named(monkeypatch, capsys):
    def fail(*_):
        raise ValueError("claims/losses/papers.toml: a: lacks title")

    monkeypatch.setattr(build.catalogue, "load", fail)
    monkeypatch.setattr("sys.argv", ["build"])
    assert build.main() == 1
    assert capsys.readouterr().err == "error: the catalogue cannot be read: claims/losses/papers.toml: a: lacks title\n"


def test_evidence_of_one_machine_can_be_read_from_its_own_folder(root):
    slugs = set(catalogue.load(root))
    whole, _ = inputs.read_evidence(root / "reports" / "evidence", slugs)
    alone, problems = inputs.read_evidence(root / "reports" / "evidence" / "local", slugs)
    assert whole == alone
    assert problems == []


def test_a_run_is_preferred_to_a_skip_and_a_local_one_to_a_published_one():
    def record(outcome):
        return {"nodeid": "a", "outcome": outcome, "topic": "t", "slug": "s", "line": 1, "params": "", "arm": "claim"}

    (found,) = inputs.preferred({"local": [record("skipped")], "cpu": [record("passed")]})
    assert (found["label"], found["outcome"]) == ("cpu", "passed")
    (found,) = inputs.preferred({"local": [record("passed")], "cpu": [record("passed")], "zzz": [record("passed")]})
    assert found["label"] == "local"
