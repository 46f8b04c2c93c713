"""Pictures that stand alone: the corpus in one image, and a badge a paper. SVG with nothing fetched from anywhere."""

import re
from itertools import groupby
from pathlib import Path

from markupsafe import escape

from paperclaims.reports import screenshot
from paperclaims.reports.export import totals
from paperclaims.reports.model import ORDER, Paper

WIDTH, TOP, ROW, LABEL = 1200, 170, 25, 118
CELL, STEP, ACROSS = 13, 16, 27  # size of a cell, from one to the next, cells in a line
LIGHT = dict(
    zip(ORDER, ("#0072b2", "#56a8dc", "#d55e00", "#d9a400", "#9463a6", "#b79cc4", "#1c2126", "#9aa2ab", "#d4d7d3"), strict=True)
)
DARK = dict(
    zip(ORDER, ("#4aa8e0", "#8fd0f5", "#f08a3c", "#e8c04a", "#bd93cf", "#8b7797", "#f4f5f5", "#717a84", "#3c4349"), strict=True)
)
DARK_TEXT = {"in part", "inconclusive", "missing extra", "not run", "not encoded"}  # on these colours white is too faint
BADGE = {"not reproduced": "#b24e00"}  # dark enough for white letters
SCALES = {"paper": "paper's scale", "reduced": "reduced scale", "mechanism": "mechanism only"}
# Advance widths in Verdana at 11 px, to one decimal; what is not listed is taken as 7. The badge states the length that it
# needs, so that another font fits as well.
NARROW = {**dict.fromkeys("ijl.,:;'|", 3.6), **dict.fromkeys("frt()- I", 4.6), **dict.fromkeys("mwMW%", 10.4), "·": 4.4}


def corpus(papers: list[Paper], built: str) -> str:
    """Every paper as a cell, coloured by its verdict, by topic; 1,200 wide and about half as high."""
    counts = totals(papers)
    topics = [(topic, sorted(found, key=_order)) for topic, found in groupby(papers, key=lambda paper: paper.topic)]
    lines = sum(-(-len(found) // ACROSS) for _, found in topics)
    tested = sum(bool(paper.claims) for paper in papers)
    parts = [
        f'<text class="title" x="40" y="56">Do the claims of {len(papers)} machine-learning papers hold?</text>',
        f'<text class="note" x="40" y="84">{tested} put to the test so far, with the paper’s mechanism and without it.</text>',
        *_legend(counts),
    ]
    column, line, tallest = 0, 0, 0
    for topic, found in topics:
        if column == 0 and line >= lines / 2:
            column, line = 1, 0
        x, y = 40 + column * (WIDTH - 40) / 2, TOP + line * ROW
        parts.append(f'<text class="topic" x="{x:g}" y="{y + 11:g}">{xml(topic.replace("_", " "))}</text>')
        for k, paper in enumerate(found):
            parts.append(_cell(paper, x + LABEL + k % ACROSS * STEP, y + k // ACROSS * ROW))
        line += -(-len(found) // ACROSS)
        tallest = max(tallest, line)
    height = TOP + tallest * ROW + 44
    words = f"paperclaims, {built}. A verdict speaks of the set-up that ran here."
    parts.append(f'<text class="note" x="40" y="{height - 18}">{xml(words)}</text>')
    label = "Papers by verdict: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return _document(WIDTH, height, label, _corpus_style(), f'<rect class="ground" width="{WIDTH}" height="{height}"/>', *parts)


def badge(paper: Paper) -> str:
    """The verdict of one paper, with the scale at which it was reached, in a line."""
    left, right = "paperclaims", verdict_words(paper)
    a, b = _length(left) + 12, _length(right) + 12
    dark = paper.verdict in DARK_TEXT
    colour = BADGE.get(paper.verdict, LIGHT[paper.verdict])
    words = 'y="14" textLength="{:g}" lengthAdjust="spacingAndGlyphs"'
    return _document(
        a + b,
        20,
        f"{left}: {right}",
        "text{font:11px Verdana,DejaVu Sans,Geneva,sans-serif}",
        f"<title>{xml(f'{paper.title}: {right}')}</title>",
        f'<rect width="{a + b:g}" height="20" rx="3" fill="#3a4149"/>',
        f'<path d="M{a:g} 0h{b - 3:g}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{b - 3:g}z" fill="{colour}"/>',
        f'<text x="6" {words.format(a - 12)} fill="#fff">{left}</text>',
        f'<text x="{a + 6:g}" {words.format(b - 12)} fill="{"#14171a" if dark else "#fff"}">{xml(right)}</text>',
    )


def verdict_words(paper: Paper) -> str:
    """The verdict, and the largest scale that every central claim reached, as a bare verdict would promise too much."""
    parts = [paper.verdict]
    if paper.verdict in ("reproduced", "in part", "not reproduced", "inconclusive"):
        scales = [name for scale, name in SCALES.items() if scale in paper.scales]
        parts.append(" and ".join([scales[0], *(["smaller"] if len(scales) > 1 else [])]) if scales else "")
    if paper.stale:
        parts.append("stale")
    return " · ".join(filter(None, parts))


def write(folder: Path, papers: list[Paper], built: str, picture: bool) -> bool:
    """Write corpus.svg and badges/SLUG.svg into `folder`, and corpus.png where `picture` is asked for and can be made."""
    (folder / "corpus.svg").write_text(corpus(papers, built), encoding="utf-8")
    (folder / "badges").mkdir()
    for paper in papers:
        (folder / "badges" / f"{paper.slug}.svg").write_text(badge(paper), encoding="utf-8")
    return picture and screenshot.png(folder / "corpus.svg", folder / "corpus.png")


def xml(text: str) -> str:
    """Text for an XML file: escaped, and without the characters that XML has no way to write."""
    return str(escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)))


def _order(paper: Paper) -> tuple:
    return ORDER.index(paper.verdict), paper.slug


def _legend(counts: dict[str, int]) -> list[str]:
    parts, x = [], 40.0
    for verdict, count in counts.items():
        words = f"{count} {verdict}"
        parts.append(_use(verdict, x, 112, 15))
        parts.append(f'<text class="legend" x="{x + 22:g}" y="125">{words}</text>')
        x += 22 + 7.4 * len(words) + 26
    return parts


def _cell(paper: Paper, x: float, y: float) -> str:
    return f"<g><title>{xml(f'{paper.title}: {paper.verdict}')}</title>{_use(paper.verdict, x, y, CELL)}</g>"


def _use(verdict: str, x: float, y: float, size: float) -> str:
    return f'<use href="#{_kind(verdict)}" x="{round(x, 1):g}" y="{round(y, 1):g}" width="{size:g}" height="{size:g}"/>'


def _kind(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _symbols() -> str:
    """A cell a verdict, on 10 by 10: told apart by form as well as by colour."""
    whole = '<rect width="10" height="10" rx="1.5"/>'
    ring = '<rect class="ring" x=".8" y=".8" width="8.4" height="8.4" rx="1"/>'
    marks = {
        "reproduced": whole,
        "in part": ring + '<path d="M.8 9.2V.8L9.2 9.2z"/>',
        "not reproduced": whole + '<path class="cut" d="M2.8 2.8l4.4 4.4m0-4.4l-4.4 4.4"/>',
        "inconclusive": whole + '<circle class="hole" cx="5" cy="5" r="1.8"/>',
        "needs an accelerator": '<path d="M5 0l5 5-5 5-5-5z"/>',
        "missing extra": '<path class="ring" d="M5 1l4 4-4 4-4-4z"/>',
        "failed": '<path d="M5 0l5 10H0z"/>',
        "not run": ring,
        "not encoded": '<rect x="1" y="1" width="8" height="8" rx="1"/>',
    }
    return "".join(f'<symbol id="{_kind(v)}" class="{_kind(v)}" viewBox="0 0 10 10">{mark}</symbol>' for v, mark in marks.items())


def _corpus_style() -> str:
    def colours(palette: dict, ground: str, ink: str, muted: str) -> str:
        own = "".join(f".{_kind(verdict)}{{fill:{colour};stroke:{colour}}}" for verdict, colour in palette.items())
        return f"{own}.ground,.hole{{fill:{ground}}}.cut{{stroke:{ground}}}text{{fill:{ink}}}.note,.topic{{fill:{muted}}}"

    base = "text{font:15px -apple-system,Segoe UI,Roboto,Helvetica Neue,Arial,sans-serif}.title{font-size:32px;font-weight:650}"
    base += ".topic{font-size:14px}symbol{stroke-width:0}.ring{fill:none;stroke-width:1.6}.cut{stroke-width:1.6}"
    dark = colours(DARK, "#14171a", "#e7e9ea", "#a3abb4")
    return f"{base}{colours(LIGHT, '#fcfcfa', '#1c2126', '#59616b')}@media(prefers-color-scheme:dark){{{dark}}}"


def _document(width: float, height: float, label: str, style: str, *parts: str) -> str:
    symbols = f"<defs>{_symbols()}</defs>" if any("<use" in part for part in parts) else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" aria-label="{xml(label)}"><style>{style}</style>{symbols}{"".join(parts)}</svg>\n'
    )


def _length(text: str) -> float:
    return round(sum(NARROW.get(letter, 7.0) for letter in text), 1)
