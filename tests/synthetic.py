"""A made-up repository for the tests of the report: its sources, its catalogue, its runs, fresh seeds, mutants and benchmarks."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from paperclaims.fixtures import evidence as store
from paperclaims.fixtures.protocol import Arm, Claim, Evidence, judge
from paperclaims.fixtures.statistics import Interval, proportion_interval

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


def kind(index: int, complete: bool = False) -> str:
    """The verdict that paper number `index` is made to have; in a `complete` corpus every paper has evidence."""
    found = KINDS[index % len(KINDS)]
    return "reproduced" if complete and found in ("not run", "not encoded") else found


def repository(root: Path, rows: list[dict], label: str = "local", complete: bool = False) -> list[dict]:
    """Write the catalogue, the sources of every encoded paper and the evidence of its runs below `root`; return the records.

    A `complete` corpus is of the size that all papers make when they are encoded: evidence for each, with as many records as
    the published ones have on average, half of it from a second machine too, fresh seeds, mutants and a benchmark.
    """
    for topic in {row["topic"] for row in rows}:
        own = [{key: value for key, value in row.items() if key != "topic"} for row in rows if row["topic"] == topic]
        path = root / "claims" / topic / "papers.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(toml(**row) for row in own))
    records = []
    for index, row in enumerate(rows):
        if kind(index, complete) == "not encoded":
            continue
        module = root / "claims" / row["topic"] / f"test_{row['slug']}.py"
        method = root / "impl" / row["topic"] / f"{row['slug']}.py"
        for path, text in ((module, "def test_main(): ...\n\n\ndef test_other(): ...\n"), (method, "def method(): ...\n")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = [] if kind(index, complete) == "not run" else runs(root, row, index, complete)
        if found:
            store.write_json(root / "reports" / "evidence" / label / f"{row['slug']}.json", found)
        if found and complete:
            if index % 2:
                other = [record | {"machine": MACHINE | {"accelerator": "Some Card"}} for record in found]
                store.write_json(root / "reports" / "evidence" / "card" / f"{row['slug']}.json", other)
            store.write_json(
                root / "reports" / "fresh_seeds" / "local" / f"{row['slug']}.json", fresh_seeds(found, index % 5 and 1)
            )
            store.write_json(root / "reports" / "mutants" / "local" / f"{row['slug']}.json", mutants(found, index % 4))
        records += found
    if complete:
        store.write_json(root / "reports" / "benchmarks" / "card" / f"{rows[0]['slug']}.json", benchmark(rows[0]["slug"]))
    return records


def toml(slug: str, **values: object) -> str:
    """A catalogue row; strings and lists of JSON are strings and lists of TOML."""
    return "\n".join([f"[{slug}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


def runs(root: Path, row: dict, index: int, complete: bool = False) -> list[dict]:
    """The records of one paper: a headline claim and a second one under two settings (five in a complete corpus), both arms."""
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
        "cuda" if kind(index, complete) == "needs an accelerator" else None,
    )
    status = kind(index, complete)
    central = status not in ("inconclusive", "needs an accelerator")
    second = Claim(
        "The cost does not grow with the width.", "mechanism", "every column is kept", "a stand-in", ("peak memory",), central
    )
    expected = status if status in ("not reproduced", "inconclusive") else "reproduced"
    records = []
    for arm in Arm:
        records.append(record(root, row, first, arm, "test_main", 4, "", expected, status, rng, text))
        for params in ("0.1", "0.2", "0.4", "0.8", "1.6") if complete else ("0.1", "0.2"):
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


def fresh_seeds(records: list[dict], lost: int = 0, seeds: int = 10) -> dict:
    """How often the claims of these records held at fresh seeds: the first one was lost at `lost` of them."""
    claims = []
    for record in (record for record in records if record["arm"] == "claim"):
        kept = [bool(claims) or i >= lost for i in range(seeds)]
        interval = proportion_interval(sum(kept), seeds)
        tried = [
            {"seed": 11 + i, "kept": held, "status": "reproduced" if held else "failed", "reason": "", "duration": 3.1}
            for i, held in enumerate(kept)
        ]
        about = {key: record[key] for key in ("test", "params", "statement", "central", "expected")}
        rate = {"kept": sum(kept), "of": seeds, "interval": [interval.low, interval.high], "defect": interval.high < 0.99}
        claims.append(about | {"runs": tried} | rate)
    about = {key: records[0][key] for key in ("slug", "topic", "module", "sources", "packages", "machine", "time")}
    return {"schema": 1, **about, "claims": claims}


def mutants(records: list[dict], survived: int = 0, of: int = 20) -> dict:
    """What planting errors in these records' implementation found: the first `survived` unnoticed, the last one equivalent."""
    module = records[0]["module"].replace("claims/", "impl/").replace("test_", "")
    source = MARKUP if records[0]["statement"] == MARKUP else "x[i] < n"
    outcomes = ["survived"] * survived + ["noticed"] * (of - survived) + ["equivalent"]
    found = [
        {
            **{
                "module": module,
                "line": 10 + i,
                "column": 4,
                "operator": "comparison",
                "original": source,
                "mutated": "x[i] <= n",
            },
            **{"outcome": outcome, "noticed_by": records[0]["nodeid"] if outcome == "noticed" else None, "reason": ""},
            "duration": 1.5,
        }
        for i, outcome in enumerate(outcomes)
    ]
    interval = proportion_interval(of - survived, of)
    about = {key: records[0][key] for key in ("slug", "topic", "sources", "packages", "machine", "time")}
    modules = [{"module": module, "possible": 3 * of, "sampled": of + 1}]
    counts = {"noticed": of - survived, "counted": of, "interval": [interval.low, interval.high]}
    return {"schema": 1, **about, "seed": 0, "modules": modules, "mutants": found, **counts}


def benchmark(slug: str) -> dict:
    """A kernel that is twice as fast as the baseline and takes a tenth of its memory, at three sizes, with a known floor."""
    rows = []
    for size, n in (("small", 1024), ("middle", 2048), ("large", 4096)):
        flops, moved = 6.0 * n * 32_000 * 512, 8.0 * (n + 32_000) * 512
        for variant, ratio, memory in (
            ("full logits", 1.0, 12.0),
            ("ours", 0.5, 1.2),
            ("ours, 512 tokens", 0.6, 1.0),
            (MARKUP, 1.4, 6.0),
        ):
            spread = 0.0 if variant == "full logits" else 0.05
            shape = {"variant": variant, "own": variant.startswith("ours"), "size": size, "shape": [n, 32_000, 512]}
            time = {"seconds": ratio * flops / 5e10, "ratio": ratio, "low": ratio - spread, "high": ratio + spread}
            least = {"peak_bytes": memory * n * 32_000, "least_flops": flops, "least_bytes": moved}
            rows.append(shape | {"threads": 1, "dtype": "float32"} | time | least | {"aa": [0.98, 1.03]})
    ceilings = [{"threads": 1, "dtype": "float32", "flops_per_second": 1.25e11, "bytes_per_second": 1e10}]
    about = {"schema": 1, "slug": slug, "kernel": "made-up loss, forward and backward", "baseline": "full logits"}
    about |= {
        "machine": MACHINE | {"accelerator": "Some Card"},
        "packages": {"torch": "2.13.0"},
        "time": "2026-11-21T14:07:19+00:00",
    }
    return about | {"module": None, "sources": None, "ceilings": ceilings, "rows": rows}


def earlier(records: list[dict]) -> list[dict]:
    """The records as another run might have left them: other errors, another rule, an older package, twice the time."""
    for record in records:
        record["packages"] = record["packages"] | {"torch": "2.12.0"}
        record["duration"] *= 2
        for found in record["requirements"]:
            if found["quantity"] == "error":
                found |= {key: found[key] * 0.85 for key in ("estimate", "low", "high")}
            elif found["quantity"] == "exactness":
                found["below"] = 1e-8
    return records
