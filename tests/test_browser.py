"""The report in a real browser, from disk: what a reader sees is what was measured, and nothing is fetched from a network.

By default on a made-up report of 429 papers; the environment variable PAPERCLAIMS_REPORT names a folder with another one.
"""

import json
import os
import re
import time
from pathlib import Path

import pytest

from paperclaims.fixtures import evidence as store
from paperclaims.reports import build as builder
from paperclaims.reports import screenshot
from paperclaims.reports.model import ORDER
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

# What a card on a small screen says: the cells of a row with what the style sheet puts before and after them.
CARD = """row => [...row.cells].map((cell) => {
  const around = (where) => getComputedStyle(cell, where).content.replace(/^"|"$|^none$/g, "");
  return around("::before") + cell.innerText + around("::after");
}).join("|")"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if given := os.environ.get("PAPERCLAIMS_REPORT"):
        return Path(given).resolve()
    root = tmp_path_factory.mktemp("repository")
    synthetic.repository(root, synthetic.catalogue(), complete=True)
    for path in sorted((root / "reports" / "evidence" / "local").iterdir())[::40]:
        store.write_json(root / "old" / "local" / path.name, synthetic.earlier(json.loads(path.read_text())))
    start = time.process_time()
    builder.build(root / "site", root / "reports" / "evidence", root, old=root / "old")
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
        page.on("requestfailed", lambda request: problems.append(f"{request.failure}: {request.url}"))
        page.on("request", lambda request: None if request.url.startswith(("file://", "data:")) else problems.append(request.url))
        page.goto((site / name).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [problem for problem in problems if not problem.startswith("net::ERR_ABORTED")] == []  # left while loading


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


def pages(site: Path, report: dict) -> list[str]:
    """One page of each kind, and that of the paper with the most claims."""
    most = max(report["papers"], key=lambda paper: (len(paper["claims"]), bool(paper["mutants"])))
    return [*sorted(path.name for path in site.glob("*.html")), f"papers/{most['slug']}.html"]


def test_a_full_report_is_small_and_opens_at_once(chromium, site, report):
    sizes = {path.name: path.stat().st_size for path in (site / "papers").iterdir()}
    assert len(sizes) == report["totals"]["papers"]
    assert (site / "index.html").stat().st_size < 600_000
    assert max(sizes.values()) < 400_000
    assert sum(sizes.values()) / len(sizes) < 100_000
    context = chromium.new_context()
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # processor time, whatever else the machine does
    page.goto((site / "index.html").as_uri())
    found = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    context.close()
    assert 0 < found["TaskDuration"] < 1


def test_the_index_says_what_report_json_says(visit, report):
    page = visit("index.html")
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


def rate(paper: dict) -> float | None:
    rates = [s["fresh_seeds"] for claim in paper["claims"] for s in claim["settings"] if s["fresh_seeds"]]
    return min((rate["kept"] / rate["of"] for rate in rates), default=None)


def test_the_table_sorts_both_ways_with_gaps_last(visit, report):
    page = visit("index.html")
    page.evaluate("window.opened = 'once'")
    for key in page.eval_on_selector_all("th[data-sort]", "heads => heads.map((head) => head.dataset.sort)"):
        values = {paper["slug"]: rate(paper) if key == "seeds" else paper[key] for paper in report["papers"]}
        if key == "claims":
            values = {slug: len(found) or None for slug, found in values.items()}
        if key == "title":
            values = {slug: title.lower() for slug, title in values.items()}
        if key == "verdict":
            values = {slug: ORDER.index(verdict) for slug, verdict in values.items()}
        for reverse, order in ((False, "ascending"), (True, "descending")):
            page.locator(f'th[data-sort="{key}"] button').click()
            assert page.locator("th[aria-sort]").get_attribute("aria-sort") == order
            found = [values[slug] for slug in shown(page)]
            known = [value for value in found if value is not None]
            assert found == sorted(known, reverse=reverse) + [None] * (len(found) - len(known)), key
        assert f"sort=-{key}" in page.url
    assert page.evaluate("window.opened") == "once"
    order = shown(page)
    page.reload()
    assert shown(page) == order


def test_the_index_works_from_the_keyboard(visit, report):
    page = visit("index.html")
    paper = report["papers"][-1]
    page.keyboard.press("/")
    page.keyboard.type(paper["slug"])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/papers/{paper['slug']}.html")
    assert page.locator("h1").inner_text() == " ".join(paper["title"].split())


def test_everything_on_the_index_can_be_done_from_the_keyboard(visit, report):
    page = visit("index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    reached = []
    for _ in range(200):
        page.keyboard.press("Tab")
        element = "document.activeElement"
        reached.append(page.evaluate(f"{element}.dataset.value || {element}.name || {element}.textContent.trim()"))
        if page.evaluate(f"{element}.matches('td.title a')"):
            break
        assert page.evaluate(f"getComputedStyle({element}).outlineStyle") != "none", reached[-1]
    expected = ["Papers", "How to read this", *report["totals"]["verdicts"], "q", "verdict", "topic", "scale", "Clear", "Year"]
    assert [name for name in expected if name not in reached] == []
    page.locator('th[data-sort="year"] button').focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert page.locator('th[data-sort="year"]').get_attribute("aria-sort") == "descending"
    verdict, count = next(iter(report["totals"]["verdicts"].items()))
    page.locator(f'.legend [data-value="{verdict}"]').focus()
    page.keyboard.press("Enter")
    assert len(shown(page)) == count
    assert page.evaluate("document.activeElement.dataset.value") == verdict
    page.keyboard.press("/")
    page.keyboard.type("no paper has this")
    assert shown(page) == []
    page.keyboard.press("Escape")
    assert len(shown(page)) == report["totals"]["papers"]


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
    command = page.locator("aside .command code").first.inner_text()
    page.locator("aside button.copy").first.click()
    deadline = time.monotonic() + 20  # the word "Copied" is gone after a moment, the clipboard stays
    while page.evaluate("navigator.clipboard.readText()") != command and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert page.evaluate("navigator.clipboard.readText()") == command


def test_neighbours_of_a_topic_lead_to_each_other(visit, report):
    topic = max(report["topics"], key=lambda name: sum(report["topics"][name].values()))
    slugs = [paper["slug"] for paper in report["papers"] if paper["topic"] == topic][:3]
    page = visit(f"papers/{slugs[0]}.html")
    assert page.locator("[rel=prev]").count() == 0
    for slug in slugs[1:]:
        page.locator("[rel=next]").click()
        page.wait_for_url(f"**/{slug}.html")
    page.locator("[rel=prev]").click()
    page.wait_for_url(f"**/{slugs[1]}.html")


def test_on_a_server_the_lines_to_copy_name_it(chromium, site, report):
    slug = report["papers"][0]["slug"]
    context = chromium.new_context()
    context.route(
        "**/*", lambda route: route.fulfill(path=site / route.request.url.removeprefix("http://papers.test/some/where/"))
    )
    page = context.new_page()
    page.goto(f"http://papers.test/some/where/papers/{slug}.html")
    snippet = page.locator(".command code", has_text="badges/").inner_text()
    context.close()
    assert f"(http://papers.test/some/where/badges/{slug}.svg)](http://papers.test/some/where/papers/{slug}.html)" in snippet


def test_cards_on_a_phone_hold_what_the_table_holds(visit, report):
    paper = max(report["papers"], key=lambda found: (rate(found) is not None, len(found["claims"])))
    page = visit("index.html")
    page.set_viewport_size({"width": 400, "height": 900})
    page.get_by_label("Search").fill(paper["slug"])
    card = page.locator(f'tr[data-slug="{paper["slug"]}"]')
    content = card.evaluate(CARD)
    assert paper["verdict"] in content
    assert "margin" in content
    if found := rate(paper):
        assert re.search(r"\|(\d+/\d+)(stale)? seeds\|", content), (content, found)
    assert card.evaluate("row => row.getBoundingClientRect().height") < 140


def test_every_kind_of_page_is_whole_and_readable(visit, site, report):
    for name in pages(site, report):
        grounds = []
        for dark in (False, True):
            page = visit(name, dark=dark)
            assert page.locator("h1").is_visible()
            page.evaluate("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
            contrast, text = page.evaluate(CONTRAST)
            assert contrast >= 4.5, (name, dark, text)
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds[0] != grounds[1]
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)"), name
        for plot in page.locator(".chart").all():
            plot.scroll_into_view_if_needed()
            plot.locator(".scatterlayer .trace").first.wait_for(state="attached")
        for width in (400, 800, 1000, 1350, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)


def test_papers_of_every_verdict_fit_a_phone(visit, report):
    for paper in samples(report):
        page = visit(f"papers/{paper['slug']}.html")
        page.set_viewport_size({"width": 400, "height": 900})
        page.evaluate("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, paper["slug"]
