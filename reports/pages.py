"""Every file of the site, written from the papers and the report into a folder."""

import importlib.resources
import json
import os
import shutil
from itertools import groupby
from pathlib import Path

import jinja2

from paperclaims.reports import benchmarks, export, images, model, plots, text
from paperclaims.reports.inputs import Inputs

HERE = Path(__file__).resolve().parent
MOST_PROBLEMS, MOST_MOVES = 30, 400


def write(
    folder: Path,
    out: Path,
    root: Path,
    papers: list[model.Paper],
    found: Inputs,
    report: dict,
    comparison: dict | None,
    picture: bool,
) -> None:
    """Write the site into the new `folder`; links to the repository are those of the final place, `out`."""
    shutil.copytree(HERE / "static", folder)
    (folder / "papers").mkdir()
    script = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    (folder / "plotly.min.js").write_bytes(script.read_bytes())
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    source = {level: os.path.relpath(root, out.joinpath(*level)).replace(os.sep, "/") for level in ((), ("papers",))}
    built = report["built"][:16].replace("T", " ") + " UTC"
    drawn = images.write(folder, papers, built, picture)
    environment = template_environment()
    shared = {"built": built, "totals": report["totals"], "problems": report["problems"], "compared": comparison is not None}
    kernels = kernel_values(found.benchmarks, {paper.slug for paper in papers})
    pages = {
        "index": index_values(papers, found),
        "method": method_values(),
        "share": {"drawn": drawn},
        "kernels": {"kernels": kernels},
    }
    if comparison is not None:
        (folder / "compare.json").write_text(json.dumps(comparison, indent=1, allow_nan=False), encoding="utf-8")
        pages["compare"] = compare_values(comparison, papers)
    for name, values in pages.items():
        page = environment.get_template(f"{name}.html.jinja").render(**shared, **values, base="", repo=source[()])
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    template, fused = environment.get_template("paper.html.jinja"), kernel_files(root)
    measured = {content["slug"] for content in found.benchmarks}
    for _, topic in groupby(papers, key=lambda paper: paper.topic):
        neighbours = list(topic)
        for position, paper in enumerate(neighbours):
            values = paper_values(paper, neighbours, position, root, fused) | {"benchmarked": paper.slug in measured}
            page = template.render(**shared, **values, base="../", repo=source[("papers",)])
            (folder / "papers" / f"{paper.slug}.html").write_text(page, encoding="utf-8")


def index_values(papers: list[model.Paper], found: Inputs) -> dict:
    """What the index shows besides the totals."""
    claims = [(paper, claim) for paper in papers for claim in paper.claims]
    decided = [(paper, claim) for paper, claim in claims if claim.margin is not None]
    rated = [(paper, claim) for paper, claim in claims if claim.rate and claim.rate["kept"] < claim.rate["of"]]
    topics = {topic: list(group) for topic, group in groupby(papers, key=lambda paper: paper.topic)}
    shown = [record for paper in papers for record in paper.records]
    used = {record["label"] for record in shown}
    others = [r | {"label": label} for label, records in found.by_label.items() if label not in used for r in records]
    return {
        "papers": sorted(papers, key=lambda paper: (model.ORDER.index(paper.verdict), paper.title.casefold())),
        "topics": {
            topic: (export.totals(group), len(group), sum(bool(p.claims) for p in group)) for topic, group in topics.items()
        },
        "tested": sum(bool(paper.claims) for paper in papers),
        "weakest": sorted(decided, key=lambda pair: pair[1].margin)[:8],
        "slowest": sorted(claims, key=lambda pair: -pair[1].duration)[:8],
        "shakiest": sorted(rated, key=lambda pair: pair[1].rate["kept"] / pair[1].rate["of"])[:8],
        "runs": export.runs(shown),
        "others": export.runs(others),
        "most_problems": MOST_PROBLEMS,
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
        "before": topic[position - 1] if position else None,
        "after": topic[position + 1] if position + 1 < len(topic) else None,
        "runs": export.runs(paper.records),
        "curves": {claim.record["test"]: curve_values(claim) for claim in paper.claims},
        "badge_words": images.verdict_words(paper),
    }


def kernel_values(contents: list[dict], slugs: set[str]) -> list[dict]:
    """Each file with its tables and plots; `anchor` is the slug alone for a kernel's first machine, `known`: it has a page."""
    first: dict[str, dict] = {}
    return [
        content
        | {"tables": benchmarks.tables(content), "plots": benchmarks.plots(content), "known": content["slug"] in slugs}
        | {"anchor": content["slug"] + f"-{content['label']}" * (first.setdefault(content["slug"], content) is not content)}
        for content in contents
    ]


def method_values() -> dict:
    """A made-up requirement in each of its three outcomes, drawn as on a paper's page."""
    ends = {"met": (3.1, 2.2, 4.0, "met"), "contradicted": (0.1, -0.8, 1.0, "contradicted")}
    ends["inconclusive"] = (1.7, 0.6, 2.8, "inconclusive")

    def requirement(name: str) -> dict:
        estimate, low, high, outcome = ends[name]
        about = {"quantity": "accuracy gained", "unit": "points", "above": 1.5, "below": None, "level": 0.99, "outcome": outcome}
        return about | {"estimate": estimate, "low": low, "high": high}

    arms = {"claim": requirement("met"), "control": requirement("contradicted")}
    return {
        "example": plots.interval_plot("accuracy gained", [("", arms)]),
        "undecided": plots.interval_plot("accuracy gained", [("", {"claim": requirement("inconclusive")})]),
    }


def compare_values(comparison: dict, papers: list[model.Paper]) -> dict:
    """The comparison with the papers' titles, the numbers cut to those that matter most."""
    titles = {paper.slug: paper.title for paper in papers}
    return {
        "found": comparison,
        "titles": titles,
        "most": MOST_MOVES,
        "apart": sum(move["apart"] for move in comparison["numbers"]),
    }


def curve_values(claim: model.Claim) -> list[dict]:
    return plots.curve_plots([(setting.params, setting.arms) for setting in claim.settings])


def interval_plots(claim: model.Claim) -> list[str]:
    """A figure for each requirement of the claim, over its settings and both arms."""
    names = dict.fromkeys(found["quantity"] for record in claim.records for found in record["requirements"])
    groups = {
        name: [(s.params, {arm: named(s.arms[arm], name) for arm in model.ARMS if arm in s.arms}) for s in claim.settings]
        for name in names
    }
    broken = {name for record in claim.records if record["arm"] == "control" for name in record["control_breaks"]}
    return [plots.interval_plot(name, group, name in broken) for name, group in groups.items()]


def side_by_side(claim: model.Claim) -> dict | None:
    """The claim on every machine that measured it, as a table; None where only one did.

    Returns:
        machines: label, machine, time and stale of each column, the shown one first; rows: setting, arm, quantity, the rule's
        requirement and, by label, what was measured or None.
    """
    if not any(setting.others for setting in claim.settings):
        return None
    arms: dict[str, dict[tuple[str, str], dict]] = {}
    machines: dict[str, dict] = {}
    for setting in claim.settings:
        shown = [(record["label"], arm, record, record["stale"]) for arm, record in setting.arms.items()]
        others = [(o["label"], arm, record, o["stale"]) for o in setting.others for arm, record in o["arms"].items()]
        for label, arm, record, stale in shown + others:
            arms.setdefault(label, {})[setting.params, arm] = record
            first = {"label": label, "machine": record["machine"], "time": record["time"], "stale": False}
            machine = machines.setdefault(label, first)
            machine["stale"] |= stale
    rows = []
    for params, arm in dict.fromkeys(place for found in arms.values() for place in found):
        records = {label: found.get((params, arm)) for label, found in arms.items()}
        for quantity in dict.fromkeys(r["quantity"] for record in records.values() if record for r in record["requirements"]):
            measured = {label: named(record, quantity) if record else None for label, record in records.items()}
            rule = next(found for found in measured.values() if found)
            rows.append({"params": params, "arm": arm, "quantity": quantity, "rule": rule, "measured": measured})
    return {"machines": list(machines.values()), "rows": rows}


def named(record: dict, quantity: str) -> dict | None:
    return next((found for found in record["requirements"] if found["quantity"] == quantity), None)


def kernel_files(root: Path) -> dict[str, list[str]]:
    """Kernel modules of the repository by the slug they are named after."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "kernels").rglob("*.py")):
        found.setdefault(path.stem, []).append(path.relative_to(root).as_posix())
    return found


def rates(claim: model.Claim) -> list[tuple[str, dict, int]]:
    """Parameters, rate and number of settings of each line about fresh seeds: settings that kept every seed share one."""
    rated = [setting for setting in claim.settings if setting.rate]
    whole: dict[tuple, list] = {}
    for setting in rated:
        if setting.rate["kept"] == setting.rate["of"]:
            whole.setdefault(tuple(setting.rate[key] for key in ("expected", "of", "stale")), []).append(setting)
    lines = [(group[0].params, group[0].rate, len(group)) for group in whole.values()]
    return lines + [(setting.params, setting.rate, 1) for setting in rated if setting.rate["kept"] < setting.rate["of"]]


def template_environment() -> jinja2.Environment:
    """Templates in which every value is escaped unless it is markup of ours."""
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shapes = (text.number, text.duration, text.widths, text.percent, text.signed, text.seconds)
    environment.filters |= {function.__name__: function for function in shapes}
    environment.filters |= {
        "bytes": text.bytes_,
        "kind": lambda verdict: verdict.replace(" ", "-"),
        "words": lambda name: name.replace("_", " "),
    }
    environment.globals |= {
        "ORDER": model.ORDER,
        "interval_plots": interval_plots,
        "side_by_side": side_by_side,
        "rates": rates,
        "setting_name": benchmarks.setting_name,
        "bounds": text.bounds,
        "interval": text.interval,
    }
    return environment
