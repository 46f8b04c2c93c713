"""Publish the last local run under a machine's label: python -m paperclaims.reports.publish LABEL."""

import argparse
import json
from pathlib import Path

from paperclaims.fixtures import evidence as store

RESULTS = ("fresh_seeds", "mutants")


def publish_results(label: str, kind: str, reports: Path = store.ROOT / "reports") -> list[Path]:
    """Copy what the last local runs of `kind` (fresh_seeds or mutants) left to the committed folder `label`, a file a paper."""
    paths = []
    for path in sorted((reports / kind / "local").glob("*.json")):
        paths.append(reports / kind / label / path.name)
        store.write_json(paths[-1], json.loads(path.read_text(encoding="utf-8")))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Copy the last local runs' results to reports/.../LABEL, to be committed.")
    parser.add_argument("label", help="the machine, in a word: cpu, h200, ...")
    label = parser.parse_args().label
    if not label.isidentifier() or label == "local":
        parser.error(f"a label is one word, not 'local': {label!r}")
    print(f"{len(store.publish(label))} papers published as {label}")
    for kind in RESULTS:
        if published := publish_results(label, kind):
            print(f"{kind.replace('_', ' ')} of {len(published)} papers published as {label}")
