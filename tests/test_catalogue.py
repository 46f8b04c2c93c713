"""The catalogue's rows, and that a wrong row is refused with its file and slug."""

import collections
import re
from pathlib import Path

import pytest

from paperclaims.fixtures.catalogue import ROOT, Paper, load

PAPERS = load()

# Traces of the systems that titles and sentences were taken from.
MARKUP = re.compile(r"[$\\{}<>^`*_~#]|--|\.\.\.|…|\s{2}|&[a-z]+;|^\s|\s$|\( | \)")


def test_every_paper_has_its_row():
    assert len(PAPERS) == 429
    assert len({paper.topic for paper in PAPERS.values()}) == 28
    assert len({paper.title.casefold() for paper in PAPERS.values()}) == 429
    known = [paper.arxiv for paper in PAPERS.values() if paper.arxiv]
    assert len(known) == len(set(known)) >= 420


def test_no_slug_is_part_of_another():
    """So that `pytest -k SLUG` means one paper."""
    slugs = sorted(PAPERS)
    assert not [(one, other) for one in slugs for other in slugs if one != other and one in other]


def test_no_slug_is_part_of_a_path_of_another_paper():
    """`-k` also looks at the folders' names."""
    topics = {paper.topic for paper in PAPERS.values()} | {"claims", "test"}
    assert not [(slug, topic) for slug in PAPERS for topic in topics if slug in topic]


def test_every_topic_folder_is_in_the_catalogue():
    folders = {path.name for path in (ROOT / "claims").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}
    assert folders == {paper.topic for paper in PAPERS.values()}


@pytest.mark.parametrize("folder", ["claims", "impl", "tests/impl"])
def test_modules_of_papers_stand_where_the_catalogue_says(folder):
    """claims/<topic>/test_<slug>.py and impl/<topic>/<slug>.py have a row in that topic; so do the tests of impl."""
    stray = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        slug = path.stem.removeprefix("test_")
        topic = path.parent.name if folder != "tests/impl" else PAPERS[slug].topic if slug in PAPERS else None
        if path.name != "conftest.py" and (slug not in PAPERS or PAPERS[slug].topic != topic):
            stray.append(path.relative_to(ROOT).as_posix())
    assert not stray


def test_encoded_papers_no_longer_say_that_they_are_not():
    encoded = {path.stem.removeprefix("test_") for path in (ROOT / "claims").rglob("test_*.py")}
    assert {slug for slug, paper in PAPERS.items() if paper.missing == "not encoded yet"} == set(PAPERS) - encoded


def test_years():
    for paper in PAPERS.values():
        assert 2010 <= paper.year <= 2030, paper
        if paper.arxiv and paper.slug != "learning_curve_extrapolation":  # put on arXiv seven years after it appeared
            assert abs(2000 + int(paper.arxiv[:2]) - paper.year) <= 1, paper


def test_titles_are_clean():
    assert not [paper.title for paper in PAPERS.values() if MARKUP.search(paper.title) or len(paper.title) < 10]


def test_claims_are_one_plain_sentence():
    """One sentence, ended and not cut off, that speaks of the paper and not of how it might be tested."""
    faults = collections.defaultdict(list)
    for slug, paper in PAPERS.items():
        prose = re.sub(r"\b(e\.g|i\.i\.d|al)\.", lambda match: match[0].replace(".", ""), paper.claim)
        if not re.fullmatch(r"[^.!?…]*(\.\d[^.!?…]*)*\.", prose):
            faults["not one sentence"].append(slug)
        if not 60 <= len(paper.claim) <= 350:
            faults["length"].append(slug)
        if re.search(r"testable here|not testable|abstract|reconstructed|the row|\bTODO\b|\bwe\b", paper.claim, re.IGNORECASE):
            faults["note"].append(slug)
        if re.search(r"\$|\\|<[a-z/]|  |--|`", paper.claim):
            faults["markup"].append(slug)
    assert not dict(faults)


# Wrong rows

GOOD = {"title": '"A Paper"', "year": "2024", "claim": '"It holds."', "missing": '""'}


def write(root: Path, topic: str = "losses", slug: str = "method", **changed: str | None) -> None:
    rows = {key: value for key, value in (GOOD | changed).items() if value is not None}
    path = root / "claims" / topic / "papers.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[{slug}]\n" + "\n".join(f"{key} = {value}" for key, value in rows.items()), encoding="utf-8")


def test_row_is_read(tmp_path):
    write(tmp_path, arxiv='"2401.00001"', authors='["A. Author", "B. Writer"]')
    expected = Paper("method", "losses", "A Paper", 2024, "It holds.", "", "2401.00001", ("A. Author", "B. Writer"))
    assert load(tmp_path) == {"method": expected}


def test_optional_values_may_be_left_out(tmp_path):
    write(tmp_path)
    assert load(tmp_path) == {"method": Paper("method", "losses", "A Paper", 2024, "It holds.", "")}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"title": None}, "lacks title"),
        ({"claim": None, "year": None}, "lacks claim, year"),
        ({"missing": None}, "lacks missing"),
        ({"colour": '"red"'}, "unknown values colour"),
        ({"title": '""'}, "title is empty"),
        ({"authors": "[]"}, "authors is empty"),
        ({"authors": "[1]"}, "no list of names"),
        ({"year": '"2024"'}, "year is '2024'"),
        ({"year": "true"}, "year is True"),
        ({"year": "24"}, "year is 24"),
        ({"arxiv": '"24.1"'}, "no arXiv identifier"),
        ({"arxiv": '"2413.00001"'}, "no arXiv identifier"),
        ({"arxiv": '"2401.00001v2"'}, "no arXiv identifier"),
    ],
)
def test_wrong_row_is_refused(tmp_path, changed, said):
    write(tmp_path, **changed)
    with pytest.raises(ValueError, match=f"^claims/losses/papers.toml: method: .*{re.escape(said)}"):
        load(tmp_path)


@pytest.mark.parametrize("arxiv", ["2401.00001", "0704.0001", "cs/0112017", "math.ST/0605001", "cond-mat/9705001"])
def test_arxiv_identifiers(tmp_path, arxiv):
    write(tmp_path, arxiv=f'"{arxiv}"')
    assert load(tmp_path)["method"].arxiv == arxiv


@pytest.mark.parametrize("slug", ["Method", "two__lines", "_method", "method_", "2method", "me-thod"])
def test_wrong_slug_is_refused(tmp_path, slug):
    write(tmp_path, slug=slug)
    with pytest.raises(ValueError, match=f"papers.toml: {slug}: a slug has"):
        load(tmp_path)


def test_slug_in_two_topics_is_refused(tmp_path):
    write(tmp_path, topic="losses")
    write(tmp_path, topic="vision")
    with pytest.raises(ValueError, match=r"claims/vision/papers\.toml: method: the slug is taken by claims/losses"):
        load(tmp_path)


def test_file_that_is_no_toml_is_named(tmp_path):
    write(tmp_path, title="unquoted")
    with pytest.raises(ValueError, match=r"claims/losses/papers\.toml: "):
        load(tmp_path)


def test_value_outside_a_table_is_refused(tmp_path):
    (tmp_path / "claims" / "losses").mkdir(parents=True)
    (tmp_path / "claims" / "losses" / "papers.toml").write_text('method = "x"')
    with pytest.raises(ValueError, match=r"papers\.toml: method: a row is a table"):
        load(tmp_path)
