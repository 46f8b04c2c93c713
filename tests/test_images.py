"""Pictures of the report: whole, true to the verdicts, and safe with any text."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest

from paperclaims.reports import build, images, model, screenshot
from paperclaims.tests import synthetic
from paperclaims.tests.page import Page

SVG = "{http://www.w3.org/2000/svg}"
SLUG = "method_{:03d}_x".format


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    synthetic.repository(root, synthetic.catalogue(60))
    report = build.build(root / "site", root / "reports" / "evidence", root, picture=True)
    return root / "site", report


def paper(verdict: str, title: str = "A title", **other) -> model.Paper:
    about = {"slug": "a", "topic": "t", "title": title, "year": 2020, "claim": "", "missing": ""}
    return model.Paper(**about, verdict=verdict, **other)


def test_the_corpus_has_a_cell_for_each_paper_in_the_form_of_its_verdict(site):
    folder, report = site
    tree = ElementTree.parse(folder / "corpus.svg").getroot()
    cells = [group for group in tree.iter(f"{SVG}g") if group.find(f"{SVG}use") is not None]
    shown = {group.find(f"{SVG}title").text: group.find(f"{SVG}use").attrib for group in cells}
    assert len(cells) == 60
    assert len({(use["x"], use["y"]) for use in shown.values()}) == 60
    for found in report["papers"]:
        assert shown[f"{found['title']}: {found['verdict']}"]["href"] == "#" + found["verdict"].replace(" ", "-")
    height, right = float(tree.attrib["height"]), float(tree.attrib["width"])
    assert all(0 < float(use["x"]) < right - 20 and 0 < float(use["y"]) < height - 40 for use in shown.values())
    forms = {symbol.attrib["id"] for symbol in tree.iter(f"{SVG}symbol")}
    assert {use["href"][1:] for use in shown.values()} <= forms
    words = " ".join(text.text for text in tree.iter(f"{SVG}text"))
    for verdict, count in report["totals"]["verdicts"].items():
        assert f"{count} {verdict}" in words


def test_forms_tell_verdicts_apart_without_colour():
    symbols = re.findall(r'<symbol id="([\w-]+)" class="[\w-]+" [^>]*>(.*?)</symbol>', images._symbols())
    assert {name.replace("-", " ") for name, _ in symbols} == set(model.ORDER)
    assert len({form for _, form in symbols}) == len(model.ORDER)


def test_a_topic_of_many_papers_takes_several_lines():
    many = [paper("reproduced", title=str(i)) for i in range(70)]
    uses = re.findall(r'<g><title>.*?<use href="#reproduced" x="([\d.]+)" y="([\d.]+)"', images.corpus(many, ""))
    assert sorted(Counter(y for _, y in uses).values()) == [16, 27, 27]
    assert max(float(x) for x, _ in uses) < 600


@pytest.mark.parametrize("text", [synthetic.MARKUP, "\x00\x08\x1b ]]> <!-- &amp; \ufffe", "’\U0001f600"])
def test_any_text_makes_a_whole_file(text):
    for picture in (images.corpus([paper("failed", text)], text), images.badge(paper("failed", text))):
        tree = ElementTree.fromstring(picture)
        assert not list(tree.iter(f"{SVG}script"))
        assert "<b>" not in picture
    if text.isprintable():
        assert [title.text for title in ElementTree.fromstring(images.badge(paper("failed", text)))][1] == f"{text}: failed"


def test_a_badge_names_the_verdict_and_its_scale(site):
    folder, report = site
    for found in report["papers"]:
        tree = ElementTree.parse(folder / "badges" / f"{found['slug']}.svg").getroot()
        right = [text.text for text in tree.iter(f"{SVG}text")][1]
        central = [claim["scale"] for claim in found["claims"] if claim["central"]]
        decided = found["verdict"] in ("reproduced", "in part", "not reproduced", "inconclusive")
        assert right.split(" · ")[0] == found["verdict"]
        assert right.startswith(f"{found['verdict']} · ") == decided
        if decided:
            best = next(scale for scale in images.SCALES if scale in central)
            assert images.SCALES[best] in right
            assert ("and smaller" in right) == (len(set(central)) > 1)
        (snippet,) = re.findall(r"\[!\[.*?\)\]\(.*?\)", Page(folder / "papers" / f"{found['slug']}.html").text)
        assert snippet == f"[![paperclaims: {right}](ADDRESS/badges/{found['slug']}.svg)](ADDRESS/papers/{found['slug']}.html)"


def test_letters_on_a_badge_stand_out():
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for verdict in model.ORDER:
        found = images.badge(paper(verdict))
        ground = light(re.search(r'<path [^>]*fill="(#\w{6})"', found)[1])
        letters = re.findall(r'<text [^>]*fill="(#\w+)"', found)[1]
        letters = light("#ffffff" if letters == "#fff" else letters)
        assert (max(ground, letters) + 0.05) / (min(ground, letters) + 0.05) >= 4.5, verdict


def test_the_picture_is_made_where_there_is_a_browser(site, tmp_path, monkeypatch):
    folder, _ = site
    page = Page(folder / "share.html")
    assert ("corpus.png" in page.links) == (folder / "corpus.png").exists()
    if (folder / "corpus.png").exists():
        assert (folder / "corpus.png").read_bytes()[16:20] == (2400).to_bytes(4)
    monkeypatch.setattr(screenshot, "chromium", lambda: str(tmp_path / "nothing"))
    assert not screenshot.png(folder / "corpus.svg", tmp_path / "corpus.png")
    assert not (tmp_path / "corpus.png").exists()
