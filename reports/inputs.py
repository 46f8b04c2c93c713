"""What the report is made from: evidence, rates under fresh seeds, mutants and benchmarks, each with the problems met."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from paperclaims.fixtures import evidence as store
from paperclaims.reports import benchmarks, formats

SHOWN = "local"


@dataclass
class Inputs:
    """Everything on disk that could be used, and a sentence for each thing that could not.

    `by_label` has the records of evidence by machine, `fresh_seeds` and `mutants` one file's content a slug, `benchmarks` one
    for each operator and machine; contents bear the `label` they come from and whether they are `stale`.
    """

    by_label: dict[str, list[dict]] = field(default_factory=dict)
    fresh_seeds: dict[str, dict] = field(default_factory=dict)
    mutants: dict[str, dict] = field(default_factory=dict)
    benchmarks: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read(evidence: Path, root: Path, slugs: set[str]) -> Inputs:
    """The evidence of one folder, and what stands below `root`/reports; `slugs` are those of the catalogue."""
    found = Inputs()
    found.by_label, found.problems = read_evidence(evidence, slugs)
    reports = Path(root) / "reports"
    for name, shape in (("fresh_seeds", formats.FRESH_SEEDS), ("mutants", formats.MUTANTS)):
        for content in _files(reports / name, lambda content, _, shape=shape: formats.fault(content, shape), found.problems):
            getattr(found, name)[content["slug"]] = content
    found.benchmarks = list(_files(reports / "benchmarks", benchmarks.complete, found.problems))
    for content in [*found.fresh_seeds.values(), *found.mutants.values(), *found.benchmarks]:
        content["stale"] = stale(content, root)
    return found


def read_evidence(folder: Path, slugs: set[str]) -> tuple[dict[str, list[dict]], list[str]]:
    """Usable records by machine label, and a sentence for each file or record that could not be used.

    `folder` has a subfolder a machine with a file a paper, or is that of a machine, or is what a run wrote: a subfolder a paper.
    """
    try:
        inside = list(Path(folder).iterdir())
    except OSError as error:
        return {}, [f"{folder}: {'no such folder' if not folder.exists() else error.strerror}, so the report has no evidence"]
    if any(path.name in slugs for path in inside if path.is_dir()):
        records, problems = store.read(folder)
        by_label = {SHOWN: records}
    elif any(path.suffix == ".json" for path in inside):
        records, problems = store.read(folder)
        by_label = {Path(folder).resolve().name: records}
    else:
        by_label, problems = store.read_all(folder)
    usable: dict[str, list[dict]] = {}
    for label, records in by_label.items():
        usable[label] = []
        for record in records:
            if wrong := formats.record_fault(record):
                problems.append(f"{label}: {record.get('nodeid', 'a record without an id')} left out ({wrong}); rerun its paper")
            else:
                usable[label].append(record)
    return usable, problems


def preferred(by_label: dict[str, list[dict]]) -> list[dict]:
    """One record for each test id and arm, current or not: the local one before published ones, and a run before a skip."""
    chosen: dict[str, dict] = {}
    for label in sorted(by_label, key=lambda name: (name == SHOWN, name)):
        for record in by_label[label]:
            shown = chosen.get(record["nodeid"])
            if shown is None or record["outcome"] != "skipped" or shown["outcome"] == "skipped":
                chosen[record["nodeid"]] = record | {"label": label, "stale": False}
    return sorted(chosen.values(), key=lambda r: (r["topic"], r["slug"], r["line"], r["params"], r["arm"]))


def stale(record: dict, root: Path) -> bool:
    """Whether the sources that something was measured from have changed since; what does not say is taken as fresh."""
    module = record.get("module") or f"claims/{record.get('topic')}/test_{record['slug']}.py"
    return record["sources"] is not None and record["sources"]["hash"] != store.sources(Path(root) / module, Path(root))["hash"]


def _files(folder: Path, check: Callable[[object, Path], str | None], problems: list[str]) -> Iterable[dict]:
    """The contents of a folder's files, published ones first and the local ones last, marked with their label."""
    for path in sorted(folder.rglob("*.json"), key=lambda path: (path.parent.name == SHOWN, path)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            wrong = check(content, path)
        except (OSError, ValueError, RecursionError) as error:
            wrong = f"not readable, {error}"
        if wrong:
            problems.append(f"{path}: left out ({wrong}); run it again or delete it")
        else:
            yield content | {"label": path.parent.name if path.parent != folder else ""}
