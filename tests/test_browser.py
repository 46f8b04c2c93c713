"""The report in a real browser, from disk: what a reader sees is what was measured, and nothing is fetched from a network.

By default on a made-up report of 429 papers; the environment variable PAPERCLAIMS_REPORT names a folder with another one.
"""

import json
import os
import time
from pathlib import Path

import pytest

from paperclaims.reports import build as builder
from paperclaims.reports import screenshot
from paperclaims.tests import synthetic

pytest.importorskip("playwright", reason="needs playwright: pip install 'paperclaims[dev]'")
if screenshot.chromium() is None:
    pytest.skip("needs Chromium: apt install chromium, or name one in the variable CHROMIUM", allow_module_level=True)

# The least contrast of a text on the page with what is behind it, and that text.
CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0) return [r, g, b];
    }
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("main *, header *, footer *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(".chart, title, script")) continue;
    const style = getComputedStyle(element);
    const front = light(parse(element.tagName === "text" ? style.fill : style.color).slice(0, 3));
    const back = light(behind(element));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.textContent.trim().slice(0, 40)];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if given := os.environ.get("PAPERCLAIMS_REPORT"):
        return Path(given).resolve()
    root = tmp_path_factory.mktemp("repository")
    synthetic.repository(root, synthetic.catalogue())
    start = time.process_time()
    builder.build(root / "site", root / "reports" / "evidence", root)
    assert time.process_time() - start < 20
    return root / "site"


@pytest.fixture(scope="module")
def report(site):
    return json.loads((site / "report.json").read_text())


@pytest.fixture(scope="module")
def chromium():
    with screenshot.browser() as running:
        yield running


@pytest.fixture
def visit(chromium, site):
    """`visit(page, dark=...)` opens a page of the report; whatever it complains about or fetches fails the test."""
    problems, contexts = [], []

    def opened(name: str, dark: bool = False):
        size = {"width": 1200, "height": 900}
        contexts.append(chromium.new_context(viewport=size, color_scheme="dark" if dark else "light"))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on("request", lambda request: None if request.url.startswith(("file://", "data:")) else problems.append(request.url))
        page.goto((site / name).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def shown(page) -> list[str]:
    """Slugs of the rows of the table that can be seen, in their order."""
    return page.eval_on_selector_all(".papers tbody tr:not([hidden])", "rows => rows.map((row) => row.dataset.slug)")


def samples(report: dict) -> list[dict]:
    """A paper for each verdict, the one with the most claims."""
    best: dict[str, dict] = {}
    for paper in report["papers"]:
        if len(paper["claims"]) >= len(best.get(paper["verdict"], {"claims": ()})["claims"]):
            best[paper["verdict"]] = paper
    return list(best.values())


def estimates(paper: dict) -> list[float]:
    arms = [arm for claim in paper["claims"] for setting in claim["settings"] for arm in setting["arms"].values()]
    return [requirement["estimate"] for arm in arms for requirement in arm["requirements"]]


def test_the_index_says_what_report_json_says(visit, report):
    start = time.perf_counter()
    page = visit("index.html")
    assert time.perf_counter() - start < 5
    counts = page.eval_on_selector_all(
        ".legend a", "links => links.map((link) => [link.dataset.value, Number(link.querySelector('data').value)])"
    )
    assert dict(counts) == report["totals"]["verdicts"]
    rows = page.eval_on_selector_all(
        ".papers tbody tr", "rows => rows.map((row) => [row.dataset.slug, [...row.cells].map((cell) => cell.innerText.trim())])"
    )
    cells = dict(rows)
    assert len(rows) == report["totals"]["papers"]
    for paper in report["papers"]:
        title, topic, year, verdict, claims, *_ = cells[paper["slug"]]
        assert title.startswith(" ".join(paper["title"].split()))
        assert (topic, year, verdict) == (paper["topic"].replace("_", " "), str(paper["year"]), paper["verdict"])
        assert claims == (str(len(paper["claims"])) if paper["claims"] else "")


def test_search_filters_and_their_address(visit, report):
    page = visit("index.html")
    paper = samples(report)[0]
    page.get_by_label("Search").fill(paper["slug"])
    assert shown(page) == [paper["slug"]]
    assert paper["slug"] in page.url
    page.reload()
    assert shown(page) == [paper["slug"]]
    page.get_by_label("Search").fill("no paper has this")
    assert shown(page) == []
    page.get_by_role("button", name="Clear the search and the filters").click()
    assert len(shown(page)) == report["totals"]["papers"]
    page.locator(".tools").get_by_label("Verdict").select_option(paper["verdict"])
    assert len(shown(page)) == report["totals"]["verdicts"][paper["verdict"]]
    page.locator(".tools").get_by_label("Topic").select_option(paper["topic"])
    assert len(shown(page)) == report["topics"][paper["topic"]][paper["verdict"]]
    page.locator(".tools").get_by_role("button", name="Clear").click()
    page.locator(".tools").get_by_label("Scale").select_option("paper")
    scales = [{claim["scale"] for claim in found["claims"] if claim["central"]} for found in report["papers"]]
    assert len(shown(page)) == sum("paper" in found for found in scales)


def test_shares_and_topics_filter_the_table(visit, report):
    page = visit("index.html")
    for verdict, count in report["totals"]["verdicts"].items():
        page.locator(f'.legend [data-value="{verdict}"]').click()
        assert len(shown(page)) == count
    topic = report["papers"][0]["topic"]
    page.locator(f'.legend [data-value="{verdict}"]').click()
    page.locator(f'.topics [data-value="{topic}"]').click()
    assert len(shown(page)) == sum(report["topics"][topic].values())
    assert page.locator("[aria-current]").count() == 1


@pytest.mark.parametrize("key", ["title", "topic", "year", "claims", "margin", "duration"])
def test_the_table_sorts_both_ways_with_gaps_last(visit, report, key):
    page = visit("index.html")
    values = {paper["slug"]: paper[key] for paper in report["papers"]}
    if key == "claims":
        values = {slug: len(found) or None for slug, found in values.items()}
    if key == "title":
        values = {slug: title.lower() for slug, title in values.items()}
    for reverse, order in ((False, "ascending"), (True, "descending")):
        page.locator(f'th[data-sort="{key}"] button').click()
        assert page.locator("th[aria-sort]").get_attribute("aria-sort") == order
        found = [values[slug] for slug in shown(page)]
        known = [value for value in found if value is not None]
        assert found == sorted(known, reverse=reverse) + [None] * (len(found) - len(known))
    assert f"sort=-{key}" in page.url


def test_the_index_works_from_the_keyboard(visit, report):
    page = visit("index.html")
    paper = report["papers"][-1]
    page.keyboard.press("/")
    page.keyboard.type(paper["slug"])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/papers/{paper['slug']}.html")
    assert page.locator("h1").inner_text() == " ".join(paper["title"].split())


def test_paper_pages_say_what_report_json_says(visit, report):
    for paper in samples(report):
        page = visit(f"papers/{paper['slug']}.html")
        assert page.locator(".judgement .verdict").inner_text() == paper["verdict"]
        found = page.eval_on_selector_all("data.estimate", "all => all.map((one) => Number(one.value))")
        assert found == estimates(paper)
        assert page.locator("section.claim").count() == len(paper["claims"])
        figures = page.locator(".intervals svg[role=img]").count()
        assert figures == len(found)


def test_curves_are_drawn_when_they_come_into_view(visit, site):
    name = next((path.name for path in sorted((site / "papers").glob("*.html")) if 'class="chart"' in path.read_text()), None)
    if name is None:
        pytest.skip("this report has no curves")
    page = visit(f"papers/{name}")
    plot = page.locator(".chart").first
    plot.scroll_into_view_if_needed()
    plot.locator(".scatterlayer .trace").first.wait_for(state="attached")
    before = plot.locator(".gtitle, .xtitle, text").first.evaluate("element => getComputedStyle(element).fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    assert plot.locator(".gtitle, .xtitle, text").first.evaluate("element => getComputedStyle(element).fill") != before


def test_the_command_can_be_copied(visit, report):
    paper = next(found for found in report["papers"] if found["claims"])
    page = visit(f"papers/{paper['slug']}.html")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.bring_to_front()
    command = page.locator("aside .command code").inner_text()
    page.locator("aside button.copy").click()
    deadline = time.monotonic() + 20  # the word "Copied" is gone after a moment, the clipboard stays
    while page.evaluate("navigator.clipboard.readText()") != command and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert page.evaluate("navigator.clipboard.readText()") == command


def test_no_page_is_wider_than_the_window(visit, report):
    for name in ("index.html", "method.html", *(f"papers/{paper['slug']}.html" for paper in samples(report))):
        page = visit(name)
        page.evaluate("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
        for width in (400, 800, 1000, 1350, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)


def test_light_and_dark_are_both_readable(visit, report):
    paper = max(report["papers"], key=lambda found: len(found["claims"]))
    for name in ("index.html", "method.html", f"papers/{paper['slug']}.html"):
        grounds = []
        for dark in (False, True):
            page = visit(name, dark=dark)
            page.evaluate("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
            contrast, text = page.evaluate(CONTRAST)
            assert contrast >= 4.5, (name, dark, text)
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds[0] != grounds[1]
