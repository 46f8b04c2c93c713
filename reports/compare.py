"""Two runs side by side: verdicts that changed, numbers that moved and by how much, rules that were rewritten, time."""

import json
from collections import Counter
from pathlib import Path

from paperclaims.fixtures import catalogue
from paperclaims.reports import export, formats, inputs, model
from paperclaims.reports.text import bounds

SAME = 1e-9  # two numbers that differ by less than this share of their size are the same
SLOWER, LEAST_SECONDS = 1.5, 2.0


def load(old: Path, root: Path) -> dict:
    """An older report.json, from the file, from the site that holds it, or made from a folder of evidence.

    Raises:
        ValueError: there is nothing that could be compared; the message says why.
    """
    old = Path(old)
    path = old / "report.json" if (old / "report.json").is_file() else old
    if path.is_file():
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not readable as a report.json ({error})") from None
        wrong = formats.fault(report, formats.REPORT) or formats.fault(report.get("runs", []), [formats.RUN], "runs")
        if wrong:
            raise ValueError(f"{path} is no report.json that this version reads ({wrong})")
        return report
    if not old.is_dir():
        raise ValueError(f"{old}: there is no such file or folder")
    rows = catalogue.load(root)
    by_label, problems = inputs.read_evidence(old, set(rows))
    records = inputs.preferred(by_label)
    if not records:
        raise ValueError("; ".join(problems) or f"{old} holds no evidence")
    papers = model.papers(rows.values(), records, {}, root)
    return export.as_json(papers, problems, max(record["time"] for record in records))


def compare(old: dict, new: dict) -> dict:
    """What changed between two reports, as report.json has them.

    Returns:
        verdicts: papers with evidence in both whose verdict is another one: slug, title, old, new.
        appeared, vanished: papers with evidence in only one of them: slug, title, verdict.
        claims: settings of claims whose status is another one: slug, test, params, statement, old, new.
        added, removed: settings that only one run of a paper has: slug, test, params, statement, status.
        numbers: estimates that moved: where, old and new requirement, change, relative, apart (the intervals do not overlap),
            changed (another outcome); the ones that matter first.
        rules: requirements whose bounds were rewritten: where, old, new (in words).
        time: papers that take SLOWER times as long as before, or less than that share, and LEAST_SECONDS longer or shorter.
        setup: by name what the runs differ in: packages, seed, machine.
        compared, papers: numbers and papers that both runs have.
    """
    before, after = ({paper["slug"]: paper for paper in report["papers"] if paper["claims"]} for report in (old, new))
    both = [slug for slug in after if slug in before]
    numbers_before, numbers_after = _numbers(before), _numbers(after)
    shared = [key for key in numbers_after if key in numbers_before]
    moved = [_move(key, numbers_before[key], numbers_after[key]) for key in shared]
    return {
        "built": {"old": old["built"], "new": new["built"]},
        "papers": len(both),
        "compared": len(shared),
        "verdicts": [
            {"slug": slug, "title": after[slug]["title"], "old": before[slug]["verdict"], "new": after[slug]["verdict"]}
            for slug in both
            if before[slug]["verdict"] != after[slug]["verdict"]
        ],
        "appeared": [_named(after[slug]) for slug in after if slug not in before],
        "vanished": [_named(before[slug]) for slug in before if slug not in after],
        **_claims({slug: before[slug] for slug in both}, {slug: after[slug] for slug in both}),
        "numbers": sorted(filter(None, moved), key=_weight),
        "rules": [rule for key in shared if (rule := _rule(key, numbers_before[key], numbers_after[key]))],
        "time": _times(before, after, both),
        "setup": _setup(old, new),
    }


def summary(found: dict, most: int = 10) -> list[str]:
    """The comparison in a few lines for a terminal."""
    apart = sum(move["apart"] for move in found["numbers"])
    counts = {name: len(found[name]) for name in ("verdicts", "claims", "rules", "appeared", "vanished", "added", "removed")}
    head = [f"{_count(counts['verdicts'], 'verdict')} and {_count(counts['claims'], 'claim')} changed"]
    head.append(f"{len(found['numbers'])} of {found['compared']} numbers moved, {apart} of them beyond both intervals")
    head.append(f"{_count(counts['rules'], 'rule')} rewritten")
    head += [f"{_count(counts[name], 'paper')} {name}" for name in ("appeared", "vanished") if counts[name]]
    head += [f"{_count(counts[name], 'claim')} {name}" for name in ("added", "removed") if counts[name]]
    lines = [f"compared with {found['built']['old'][:16].replace('T', ' ')}: {'; '.join(head)}"]
    lines += [f"  {change['slug']}: {change['old']} -> {change['new']}" for change in found["verdicts"]]
    for move in found["numbers"]:
        if move["changed"] or move["apart"]:
            name = f"{move['slug']} {move['test']}{f' [{params}]' if (params := move['params']) else ''}, {move['arm']}"
            share = "" if move["relative"] is None else f" ({move['relative']:+.0%})"
            ends = f"{move['old']['estimate']:.4g} -> {move['new']['estimate']:.4g}{share}"
            lines.append(f"  {name}: {move['quantity']} {ends}, {move['new']['outcome']}")
    return lines if len(lines) <= most + 1 else [*lines[: most + 1], f"  and {len(lines) - most - 1} more: see compare.html"]


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _named(paper: dict) -> dict:
    return {key: paper[key] for key in ("slug", "title", "verdict")}


def _numbers(papers: dict[str, dict]) -> dict[tuple, dict]:
    """Every requirement by paper, test, parameters, arm and quantity."""
    return {
        (slug, claim["test"], setting["params"], arm, requirement["quantity"]): requirement
        for slug, paper in papers.items()
        for claim in paper["claims"]
        for setting in claim["settings"]
        for arm, record in setting["arms"].items()
        for requirement in record["requirements"]
    }


def _where(key: tuple) -> dict:
    return dict(zip(("slug", "test", "params", "arm", "quantity"), key, strict=True))


def _move(key: tuple, old: dict, new: dict) -> dict | None:
    """How far a number moved, or None where it stands."""
    ends = [(old[end], new[end]) for end in ("estimate", "low", "high")]
    if old["outcome"] == new["outcome"] and all(abs(b - a) <= SAME * max(abs(a), abs(b)) for a, b in ends):
        return None
    change = new["estimate"] - old["estimate"]
    apart = new["low"] > old["high"] or new["high"] < old["low"]
    relative = change / abs(old["estimate"]) if old["estimate"] else None
    ran = {"old": old, "new": new, "change": change, "relative": relative, "apart": apart}
    return _where(key) | ran | {"changed": old["outcome"] != new["outcome"]}


def _weight(move: dict) -> tuple:
    """Sorts by what matters: another outcome, intervals that do not overlap, then the distance in widths."""
    width = max(move[run]["high"] - move[run]["low"] for run in ("old", "new"))
    size = abs(move["change"]) / width if width else abs(move["relative"] or 0.0)
    return not move["changed"], not move["apart"], -size


def _rule(key: tuple, old: dict, new: dict) -> dict | None:
    rules = [bounds(one["above"], one["below"], one["unit"]) for one in (old, new)]
    same = (old["above"], old["below"], old["unit"]) == (new["above"], new["below"], new["unit"])
    return None if same else _where(key) | {"old": rules[0], "new": rules[1]}


def _claims(old: dict[str, dict], new: dict[str, dict]) -> dict[str, list[dict]]:
    """The entries `claims`, `added` and `removed` of `compare`, for papers that both runs have."""

    def settings(papers: dict[str, dict]) -> dict[tuple, tuple[dict, str]]:
        return {
            (slug, claim["test"], setting["params"]): (
                {"slug": slug, "test": claim["test"], "params": setting["params"], "statement": claim["statement"]},
                setting["status"],
            )
            for slug, paper in papers.items()
            for claim in paper["claims"]
            for setting in claim["settings"]
        }

    before, after = settings(old), settings(new)
    changed = [key for key in after if key in before and before[key][1] != after[key][1]]
    return {
        "claims": [after[key][0] | {"old": before[key][1], "new": after[key][1]} for key in changed],
        "added": [after[key][0] | {"status": after[key][1]} for key in after if key not in before],
        "removed": [before[key][0] | {"status": before[key][1]} for key in before if key not in after],
    }


def _times(before: dict, after: dict, both: list[str]) -> list[dict]:
    def seconds(paper: dict) -> float:
        arms = (record for claim in paper["claims"] for setting in claim["settings"] for record in setting["arms"].values())
        return sum(record["duration"] for record in arms)

    found = []
    for slug in both:
        old, new = seconds(before[slug]), seconds(after[slug])
        if abs(new - old) >= LEAST_SECONDS and not 1 / SLOWER < (new / old if old else SLOWER) < SLOWER:
            found.append({"slug": slug, "old": old, "new": new, "change": new - old})
    return sorted(found, key=lambda one: -abs(one["change"]))


def _setup(old: dict, new: dict) -> dict[str, tuple[str, str]]:
    """What differs between the runs' set-ups; empty for reports that do not state them."""

    def seeds(report: dict) -> str:
        arms = [r for p in report["papers"] for c in p["claims"] for s in c["settings"] for r in s["arms"].values()]
        counts = Counter(record["seed"] for record in arms)
        return ", ".join(str(seed) for seed, _ in sorted(counts.items())[:12]) + (", ..." if len(counts) > 12 else "")

    def stated(report: dict) -> dict[str, str]:
        runs = report.get("runs", [])
        names = sorted({f"{run['label']}: {run['machine']['accelerator'] or run['machine']['processor']}" for run in runs})
        versions: dict[str, set[str]] = {}
        for run in runs:
            for name, version in run["packages"].items():
                versions.setdefault(name, set()).add(version)
        packages = {name: " and ".join(sorted(found)) for name, found in versions.items()}
        return {"seed": seeds(report), **({"machine": "; ".join(names)} if runs else {}), **packages}

    before, after = stated(old), stated(new)
    return {name: (before[name], after[name]) for name in after if name in before and before[name] != after[name]}
