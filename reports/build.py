"""The HTML report: an index, a page a paper, pages on the method, the kernels and what changed, images, and report.json.

`python -m paperclaims.reports.build [--evidence FOLDER] [--out FOLDER] [--compare OLD]` writes a folder that opens from disk,
without a network.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

from paperclaims.fixtures import catalogue
from paperclaims.fixtures import evidence as store
from paperclaims.reports import compare, export, inputs, model, pages

SITE = pages.HERE / "site"


def build(
    out: Path = SITE,
    evidence: Path = store.EVIDENCE,
    root: Path = store.ROOT,
    old: Path | None = None,
    picture: bool = False,
) -> dict:
    """Write the site to `out`, whole or not at all, and return the content of its report.json.

    Args:
        out: folder of the site; what an earlier build left there is replaced.
        evidence: a folder with a subfolder per machine, or what one run wrote (a subfolder per paper).
        root: the repository whose catalogue and sources the pages show and link to.
        old: an earlier run to compare with: a folder of evidence, a report.json, or the site that holds it. What changed goes to
            compare.html and compare.json; where it cannot be read, the report's problems say so.
        picture: whether to make a PNG of the corpus as well, where there is a browser.

    Raises:
        OSError: `out` exists and is not a site of ours, or cannot be written.
        ValueError: the catalogue has a faulty row.
    """
    out, root = Path(out).resolve(), Path(root).resolve()
    if out.exists() and not (out / "report.json").exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} has other files in it and will not be replaced: choose another folder with --out")
    rows = catalogue.load(root)
    found = inputs.read(Path(evidence), root, set(rows))
    records = store.current(found.by_label, root)
    for slug in sorted({record["slug"] for record in records} - set(rows)):
        found.problems.append(f"{slug}: has evidence but no row in the catalogue, so it has no page")
    papers = model.papers(rows.values(), records, found.by_label, root, found.fresh_seeds, found.mutants)
    found.problems += unmatched(papers, found)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report, comparison = export.as_json(papers, found.problems, now), None
    if old is not None:
        try:
            comparison = compare.compare(compare.load(old, root), report)
        except ValueError as error:
            found.problems.append(f"no comparison: {error}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as temporary:
        fresh, previous = Path(temporary) / "new", Path(temporary) / "old"
        pages.write(fresh, out, root, papers, found, report, comparison, picture)
        if out.exists():
            out.rename(previous)
        try:
            fresh.rename(out)
        except OSError:
            if previous.exists():
                previous.rename(out)
            raise
    return report


def unmatched(papers: list[model.Paper], found: inputs.Inputs) -> list[str]:
    """A sentence for each thing that was measured and has no place in the report, so that it does not vanish unseen."""
    slugs = {paper.slug for paper in papers}
    settings = {(paper.slug, c.record["test"], s.params) for paper in papers for c in paper.claims for s in c.settings}
    problems = []
    for name, contents in (("fresh seeds", found.fresh_seeds), ("mutants", found.mutants)):
        problems += [
            f"{slug}: has {name} but no row in the catalogue, so it has no page" for slug in sorted(contents.keys() - slugs)
        ]
    for slug, content in found.fresh_seeds.items():
        for claim in content["claims"] if slug in slugs and not content["stale"] else ():
            if claim["of"] and (slug, claim["test"], claim["params"]) not in settings:
                name = f"{claim['test']} {claim['params']}".strip()
                problems.append(f"{slug}: {name} has fresh seeds but no evidence, so its rate is not shown; run the paper")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the HTML report.")
    parser.add_argument("--evidence", type=Path, default=store.EVIDENCE, help="evidence to show (default reports/evidence)")
    parser.add_argument("--out", type=Path, default=SITE, help="where to write the site (default reports/site)")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="an earlier run: its evidence folder, site or report.json")
    options = parser.parse_args()
    try:
        catalogue.load()
    except ValueError as error:
        return _refuse(f"the catalogue cannot be read: {error}")
    try:
        report = build(options.out, options.evidence, old=options.compare, picture=True)
    except OSError as error:
        why = f"cannot write {options.out} ({error.strerror}); give another folder with --out"
        return _refuse(why if error.strerror else str(error))
    for problem in report["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in report["totals"]["verdicts"].items())
    print(f"{report['totals']['papers']} papers: {verdicts}\nreport: {(options.out / 'index.html').resolve().as_uri()}")
    changed = options.out / "compare.json"
    if changed.exists():
        print("\n".join(compare.summary(json.loads(changed.read_text(encoding="utf-8")))))
    return int(options.compare is not None and not changed.exists())


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
