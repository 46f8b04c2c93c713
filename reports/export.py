"""report.json: everything the pages say, for machines."""

import json
from collections import Counter
from collections.abc import Iterable

from paperclaims.reports.model import ORDER, Claim, Paper


def as_json(found: list[Paper], problems: list[str], built: str) -> dict:
    """The content of report.json; `built` is when, in ISO form."""
    topics = list(dict.fromkeys(paper.topic for paper in found))
    return {
        "schema": 1,
        "built": built,
        "totals": {
            "papers": len(found),
            "claims": sum(len(paper.claims) for paper in found),
            "verdicts": totals(found),
            "fresh_seeds": rates(found),
            "mutants": mutants(found),
        },
        "topics": {topic: totals(paper for paper in found if paper.topic == topic) for topic in topics},
        "runs": runs(record for paper in found for record in paper.records),
        "papers": [_paper(paper) for paper in found],
        "problems": problems,
    }


def totals(found: Iterable[Paper]) -> dict[str, int]:
    """Number of papers by verdict, in the order of the report, the verdicts that nobody has left out."""
    counts = Counter(paper.verdict for paper in found)
    return {verdict: counts[verdict] for verdict in ORDER if counts[verdict]}


def rates(found: Iterable[Paper]) -> dict[str, int]:
    """Over all claims and settings that ran under fresh seeds: papers, claims, seeds kept and tried, defects, stale papers."""
    papers = [paper for paper in found if paper.rates]
    all_rates = [rate for paper in papers for rate in paper.rates]
    return {
        "papers": len(papers),
        "claims": len(all_rates),
        "kept": sum(rate["kept"] for rate in all_rates),
        "of": sum(rate["of"] for rate in all_rates),
        "defects": sum(rate["defect"] for rate in all_rates),
        "stale": sum(any(rate["stale"] for rate in paper.rates) for paper in papers),
    }


def mutants(found: Iterable[Paper]) -> dict[str, int]:
    """Over all papers whose implementation was mutated: papers, mutants noticed and counted, stale papers."""
    papers = [paper for paper in found if paper.mutants]
    return {
        "papers": len(papers),
        "noticed": sum(paper.mutants["noticed"] for paper in papers),
        "counted": sum(paper.mutants["counted"] for paper in papers),
        "stale": sum(paper.mutants["stale"] for paper in papers),
    }


def runs(records: Iterable[dict]) -> list[dict]:
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
            "papers": len({record["slug"] for record in group}),
            "stale": len({record["slug"] for record in group if record.get("stale")}),
        }
        for group in found.values()
    ]


def _paper(paper: Paper) -> dict:
    plain = ("slug", "title", "topic", "year", "arxiv", "verdict", "why", "missing", "margin", "duration", "stale")
    mutated = None
    if paper.mutants:
        mutated = {key: paper.mutants[key] for key in ("noticed", "counted", "interval", "stale", "label", "time")}
        where = ("module", "line", "column", "operator", "original", "mutated")
        mutated["survivors"] = [{key: found[key] for key in where} for found in paper.survivors]
    return {
        **{key: getattr(paper, key) for key in plain},
        "mutants": mutated,
        "claims": [_claim(claim) for claim in paper.claims],
    }


def _claim(claim: Claim) -> dict:
    stated = ("test", "statement", "scale", "control", "differs", "central", "paper_value")
    ran = ("outcome", "message", "label", "stale", "seed", "duration", "time", "requirements")
    rate = ("kept", "of", "interval", "defect", "stale", "label", "time")
    return {
        **{key: claim.record[key] for key in stated},
        "verdict": claim.verdict,
        "margin": claim.margin,
        "settings": [
            {
                "params": setting.params,
                "status": setting.status,
                "reason": setting.reason,
                "arms": {arm: {key: record[key] for key in ran} for arm, record in setting.arms.items()},
                "fresh_seeds": {key: setting.rate[key] for key in rate} if setting.rate else None,
            }
            for setting in claim.settings
        ],
    }
