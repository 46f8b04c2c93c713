"""A made-up repository with evidence for every paper, for the tests of the report: its sources, its catalogue, its runs."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from paperclaims.fixtures import evidence as store
from paperclaims.fixtures.protocol import Arm, Claim, Evidence, judge
from paperclaims.fixtures.statistics import Interval

TOPICS = ("attention", "losses", "low_rank", "sparsity", "theory", "vision", "quantization")
MARKUP = "Rank <b>one</b> & </script><script>document.title='broken'</script> \"quoted\" {{ 7 * 7 }}"
MACHINE = {
    "system": "Linux x86_64",
    "processor": "Some Processor 3000",
    "cores": 2,
    "memory_gib": 23.5,
    "python": "3.11.2",
    "accelerator": None,
}
KINDS = (
    "reproduced",
    "in part",
    "not reproduced",
    "inconclusive",
    "needs an accelerator",
    "missing extra",
    "failed",
    "not run",
    "not encoded",
)


def catalogue(papers: int = 429) -> list[dict]:
    """Rows of a catalogue; the first has markup wherever text is free."""
    rows = []
    for i in range(papers):
        row = {
            "slug": f"method_{i:03d}_x",
            "topic": TOPICS[i % len(TOPICS)],
            "title": f"Learning to Measure Without Looking, Part {i}",
            "year": 2015 + i % 11,
            "claim": f"Mechanism {i} lowers the error at equal cost.",
            "missing": "not encoded yet" if kind(i) == "not encoded" else "",
            **({"arxiv": f"2101.{i:05d}"} if i % 3 else {}),
            **({"authors": ["A. Author", "B. Writer"]} if i % 2 else {}),
        }
        rows.append(row | {"title": MARKUP, "claim": MARKUP, "authors": [MARKUP]} if i == 0 else row)
    return rows


def kind(index: int) -> str:
    """The verdict that paper number `index` is made to have."""
    return KINDS[index % len(KINDS)]


def repository(root: Path, rows: list[dict], label: str = "local") -> list[dict]:
    """Write the catalogue, the sources of every encoded paper and the evidence of its runs below `root`; return the records."""
    for topic in {row["topic"] for row in rows}:
        own = [{key: value for key, value in row.items() if key != "topic"} for row in rows if row["topic"] == topic]
        path = root / "claims" / topic / "papers.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(toml(**row) for row in own))
    records = []
    for index, row in enumerate(rows):
        if kind(index) == "not encoded":
            continue
        module = root / "claims" / row["topic"] / f"test_{row['slug']}.py"
        method = root / "impl" / row["topic"] / f"{row['slug']}.py"
        for path, text in ((module, "def test_main(): ...\n\n\ndef test_other(): ...\n"), (method, "def method(): ...\n")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = [] if kind(index) == "not run" else runs(root, row, index)
        if found:
            store.write_json(root / "reports" / "evidence" / label / f"{row['slug']}.json", found)
        records += found
    return records


def toml(slug: str, **values: object) -> str:
    """A catalogue row; strings and lists of JSON are strings and lists of TOML."""
    return "\n".join([f"[{slug}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


def runs(root: Path, row: dict, index: int) -> list[dict]:
    """The records of one paper: a headline claim and a second one under two settings, both arms each."""
    rng = np.random.default_rng(index)
    text = MARKUP if index == 0 else None
    first = Claim(
        text or "The method lowers the error against the tuned baseline.",
        "paper" if index % 3 == 0 else "reduced",
        text or "the term's weight is zero",
        None if index % 3 == 0 else "digits instead of ImageNet, 64 dimensions instead of 8,192",
        ("error",),
        True,
        text or "71.4 % top-1 (Table 5)",
        "cuda" if kind(index) == "needs an accelerator" else None,
    )
    status = kind(index)
    central = status not in ("inconclusive", "needs an accelerator")
    second = Claim(
        "The cost does not grow with the width.", "mechanism", "every column is kept", "a stand-in", ("peak memory",), central
    )
    expected = status if status in ("not reproduced", "inconclusive") else "reproduced"
    records = []
    for arm in Arm:
        records.append(record(root, row, first, arm, "test_main", 4, "", expected, status, rng, text))
        for params in ("0.1", "0.2"):
            other = "not reproduced" if status == "in part" and params == "0.2" else "reproduced"
            plain = status if status == "missing extra" else "reproduced"
            records.append(record(root, row, second, arm, "test_other", 19, params, other, plain, rng, None))
    return records


def record(root, row, claim, arm, test, line, params, expected, status, rng, text) -> dict:
    """One arm of one claim as a run would have written it."""
    evidence = Evidence(claim, arm, expected)
    good = expected == "reproduced" and not arm.control
    if status not in ("needs an accelerator", "missing extra"):
        centre = 0.5 if expected == "inconclusive" and not arm.control else 0.42 if good else 0.61
        centre += 0.01 * rng.standard_normal() * (expected != "inconclusive")
        if test == "test_main":
            evidence.require("error", Interval(centre, centre - 0.03, centre + 0.03, 8, 0.99, "t"), below=0.5, unit="%")
            evidence.require("exactness", 3e-16, below=1e-9)
            steps = np.arange(1, 25)
            loss = centre + steps**-0.7
            evidence.curve(
                "loss",
                steps,
                loss,
                low=loss - 0.05,
                high=loss + 0.05,
                series=text or "ours",
                x_label="step",
                y_label="loss",
                log="x",
            )
            evidence.curve("loss", steps, loss + 0.1, series="baseline", x_label="step", y_label="loss", log="x")
        else:
            evidence.require("peak memory", 2**20 if good else 24_641_536_000, below=2**21, unit="B")
        evidence.record("gradient norm", 0.25)
        evidence.record("learning rate", Interval(0.1, 0.05, 0.2), "1/step")
    outcome, message = "passed", judge(claim, arm, expected, evidence.requirements) if evidence.requirements else ""
    if message:
        outcome = "failed"
    if status in ("needs an accelerator", "missing extra"):
        outcome = "skipped"
        message = "no CUDA device here" if claim.needs else "needs somepackage: pip install 'paperclaims[peers]'"
    if status == "failed" and arm.control:
        outcome, message = "crashed", text or "ZeroDivisionError: division by zero"
    module = f"claims/{row['topic']}/test_{row['slug']}.py"
    nodeid = f"{module}::{test}[{'-'.join(filter(None, [params, str(arm)]))}]"
    return {
        "schema": store.SCHEMA,
        **{"slug": row["slug"], "topic": row["topic"], "test": test, "params": params, "arm": str(arm), "nodeid": nodeid},
        **{"module": module, "line": line, **asdict(claim), "control_breaks": list(claim.control_breaks)},
        **{"expected": expected, "reason": None if expected == "reproduced" else text or "the baseline, tuned, does as well"},
        "requirements": [requirement.as_dict() for requirement in evidence.requirements],
        **{"records": evidence.records, "curves": evidence.curves, "outcome": outcome, "message": message},
        **{
            "seed": 0,
            "seeds": [11, 12, 13, 14],
            "duration": float(rng.uniform(0.2, 9)),
            "command": f"python -m pytest '{nodeid}' --seed 0",
        },
        **{"sources": store.sources(root / module, root), "packages": {"numpy": "2.3.1", "torch": "2.13.0"}, "machine": MACHINE},
        "time": "2026-11-21T14:07:19+00:00",
    }
