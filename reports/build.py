"""The HTML report: one index, one page a paper, a page on the method, and report.json.

`python -m paperclaims.reports.build [--evidence FOLDER] [--out FOLDER]` writes a folder that opens from disk, without a network.
"""

import argparse
import datetime
import importlib.resources
import json
import os
import shutil
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import jinja2

from paperclaims.fixtures import catalogue
from paperclaims.fixtures import evidence as store
from paperclaims.reports import model, plots, text

HERE = Path(__file__).resolve().parent
SITE = HERE / "site"
NEEDED = {
    "slug",
    "topic",
    "test",
    "params",
    "arm",
    "nodeid",
    "module",
    "line",
    "statement",
    "scale",
    "control",
    "outcome",
    "time",
}
NEEDED |= {"requirements", "records", "curves", "sources", "packages", "machine", "seeds", "duration", "command", "expected"}


def build(out: Path = SITE, evidence: Path = store.EVIDENCE, root: Path = store.ROOT) -> dict:
    """Write the site to `out`, whole or not at all, and return the content of its report.json.

    Args:
        out: folder of the site; what an earlier build left there is replaced.
        evidence: a folder with a subfolder per machine, or what one run wrote (a subfolder per paper).
        root: the repository whose catalogue and sources the pages show and link to.

    Raises:
        OSError: `out` exists and is not a site of ours, or cannot be written.
        ValueError: the catalogue has a faulty row.
    """
    out, root = Path(out).resolve(), Path(root).resolve()
    if out.exists() and not (out / "report.json").exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} has other files in it and will not be replaced: choose another folder with --out")
    rows = catalogue.load(root)
    by_label, problems = read_evidence(Path(evidence), set(rows))
    records = store.current(by_label, root)
    for slug in sorted({record["slug"] for record in records} - set(rows)):
        problems.append(f"{slug}: has evidence but no row in the catalogue, so it has no page")
    papers = model.papers(rows.values(), records, by_label, root)
    report = model.as_json(papers, problems, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as temporary:
        fresh, old = Path(temporary) / "new", Path(temporary) / "old"
        write_site(fresh, out, root, papers, report)
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    return report


def read_evidence(folder: Path, slugs: set[str]) -> tuple[dict[str, list[dict]], list[str]]:
    """Usable records by machine label, and a sentence for each file or record that could not be used."""
    if not folder.is_dir():
        return {}, [f"{folder}: no such folder, so the report has no evidence"]
    if any(path.name in slugs for path in folder.iterdir() if path.is_dir()):
        records, problems = store.read(folder)
        by_label = {"local": records}
    else:
        by_label, problems = store.read_all(folder)
    usable = {}
    for label, records in by_label.items():
        usable[label] = [record for record in records if record.keys() >= NEEDED]
        for record in records:
            if lacking := NEEDED - record.keys():
                name = record.get("nodeid", "a record without an id")
                problems.append(f"{label}: {name} left out, it lacks {', '.join(sorted(lacking))}; rerun its paper")
    return usable, problems


def write_site(folder: Path, out: Path, root: Path, papers: list[model.Paper], report: dict) -> None:
    """Write every file of the site into the new `folder`; links to the repository are those of the final place, `out`."""
    shutil.copytree(HERE / "static", folder)
    (folder / "papers").mkdir()
    script = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    (folder / "plotly.min.js").write_bytes(script.read_bytes())
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    source = {level: os.path.relpath(root, out.joinpath(*level)).replace(os.sep, "/") for level in ((), ("papers",))}
    environment = template_environment()
    shared = {
        "built": report["built"][:16].replace("T", " ") + " UTC",
        "totals": report["totals"],
        "problems": report["problems"],
    }
    pages = {"index": index_values(papers), "method": {}}
    for name, values in pages.items():
        page = environment.get_template(f"{name}.html.jinja").render(**shared, **values, base="", repo=source[()])
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    template, fused = environment.get_template("paper.html.jinja"), kernels(root)
    for _, topic in groupby(papers, key=lambda paper: paper.topic):
        neighbours = list(topic)
        for position, paper in enumerate(neighbours):
            values = paper_values(paper, neighbours, position, root, fused)
            page = template.render(**shared, **values, base="../", repo=source[("papers",)])
            (folder / "papers" / f"{paper.slug}.html").write_text(page, encoding="utf-8")


def index_values(papers: list[model.Paper]) -> dict:
    """What the index shows besides the totals."""
    claims = [(paper, claim) for paper in papers for claim in paper.claims]
    decided = [(paper, claim) for paper, claim in claims if claim.margin is not None]
    topics = {topic: list(found) for topic, found in groupby(papers, key=lambda paper: paper.topic)}
    return {
        "papers": sorted(papers, key=lambda paper: (model.ORDER.index(paper.verdict), paper.title.casefold())),
        "topics": {
            topic: (model.totals(found), len(found), sum(bool(p.claims) for p in found)) for topic, found in topics.items()
        },
        "tested": sum(bool(paper.claims) for paper in papers),
        "weakest": sorted(decided, key=lambda pair: pair[1].margin)[:8],
        "slowest": sorted(claims, key=lambda pair: -pair[1].duration)[:8],
        "runs": runs([record for paper in papers for record in paper.records]),
    }


def paper_values(paper: model.Paper, topic: list[model.Paper], position: int, root: Path, fused: dict[str, list[str]]) -> dict:
    """What a paper's page shows: `topic` are the papers of its topic, `fused` the kernels by slug."""
    first = max(0, min(position - 3, len(topic) - 7))
    imported = sorted({path for record in paper.records for path in record["sources"]["files"]})
    own = [paper.module, f"impl/{paper.topic}/{paper.slug}.py", *fused.get(paper.slug, [])]
    own += [path for path in imported if not path.startswith("fixtures/")]
    return {
        "paper": paper,
        "files": [path for path in dict.fromkeys(own) if (root / path).is_file()],
        "helpers": [path for path in imported if path not in own and (root / path).is_file()],
        "near": [other for other in topic[first : first + 7] if other is not paper],
        "runs": runs(paper.records),
        "curves": {claim.record["test"]: curve_values(claim) for claim in paper.claims},
    }


def curve_values(claim: model.Claim) -> list[dict]:
    return plots.curve_plots([(setting.params, setting.arms) for setting in claim.settings])


def interval_plots(claim: model.Claim) -> list[str]:
    """A figure for each requirement of the claim, over its settings and both arms."""
    names = dict.fromkeys(found["quantity"] for record in claim.records for found in record["requirements"])

    def named(record: dict, quantity: str) -> dict | None:
        return next((found for found in record["requirements"] if found["quantity"] == quantity), None)

    groups = {
        name: [(s.params, {arm: named(s.arms[arm], name) for arm in model.ARMS if arm in s.arms}) for s in claim.settings]
        for name in names
    }
    broken = {name for record in claim.records if record["arm"] == "control" for name in record["control_breaks"]}
    return [plots.interval_plot(name, group, name in broken) for name, group in groups.items()]


def runs(records: list[dict]) -> list[dict]:
    """The set-ups that the records come from: label, machine, packages, seeds given, first and last time, duration."""
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(json.dumps([record["label"], record["machine"]], sort_keys=True), []).append(record)
    return [
        {
            "label": group[0]["label"],
            "machine": group[0]["machine"],
            "packages": {name: version for record in group for name, version in record["packages"].items()},
            "seeds": sorted({record["seed"] for record in group}),
            "first": min(record["time"] for record in group)[:16].replace("T", " "),
            "last": max(record["time"] for record in group)[:16].replace("T", " "),
            "duration": sum(record["duration"] for record in group),
            "tests": len(group),
        }
        for group in found.values()
    ]


def kernels(root: Path) -> dict[str, list[str]]:
    """Kernel modules of the repository by the slug they are named after."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "kernels").rglob("*.py")):
        found.setdefault(path.stem, []).append(path.relative_to(root).as_posix())
    return found


def template_environment() -> jinja2.Environment:
    """Templates in which every value is escaped unless it is markup of ours."""
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "ORDER": model.ORDER,
        "interval_plots": interval_plots,
        "bounds": text.bounds,
        "interval": text.interval,
    }
    environment.filters |= {
        "number": text.number,
        "duration": text.duration,
        "widths": text.widths,
        "kind": lambda verdict: verdict.replace(" ", "-"),
        "words": lambda name: name.replace("_", " "),
    }
    return environment


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the HTML report.")
    parser.add_argument("--evidence", type=Path, default=store.EVIDENCE, help="evidence to show (default reports/evidence)")
    parser.add_argument("--out", type=Path, default=SITE, help="where to write the site (default reports/site)")
    options = parser.parse_args()
    report = build(options.out, options.evidence)
    for problem in report["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in report["totals"]["verdicts"].items())
    print(f"{report['totals']['papers']} papers: {verdicts}\nreport: {(options.out / 'index.html').resolve().as_uri()}")


if __name__ == "__main__":
    main()
