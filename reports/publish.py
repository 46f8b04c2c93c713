"""Publish the last local run under a machine's label: python -m paperclaims.reports.publish LABEL."""

import argparse

from paperclaims.fixtures.evidence import publish

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Copy the last local run's evidence to reports/evidence/LABEL, to be committed.")
    parser.add_argument("label", help="the machine, in a word: cpu, h200, ...")
    label = parser.parse_args().label
    if not label.isidentifier() or label == "local":
        parser.error(f"a label is one word, not 'local': {label!r}")
    print(f"{len(publish(label))} papers published as {label}")
