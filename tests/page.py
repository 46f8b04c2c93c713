"""A page of the report as a browser reads it, for the report's tests."""

import html.parser
from pathlib import Path


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
