"""What the report shows, from the catalogue and the evidence: plain values, no markup."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paperclaims.fixtures import catalogue
from paperclaims.fixtures.evidence import sources
from paperclaims.fixtures.verdict import (
    ACCELERATOR,
    EXTRA,
    FAILED,
    IN_PART,
    INCONCLUSIVE,
    NOT_ENCODED,
    NOT_REPRODUCED,
    REPRODUCED,
    claim_status,
    paper_verdict,
)

NOT_RUN = "not run"
ORDER = (REPRODUCED, IN_PART, NOT_REPRODUCED, INCONCLUSIVE, ACCELERATOR, EXTRA, FAILED, NOT_RUN, NOT_ENCODED)
ARMS = ("claim", "control")


@dataclass(frozen=True)
class Setting:
    """One claim under one set of parameters.

    `arms` has a record for each arm that ran; `others` what other machines measured: label, arms, status, stale; `rate` how
    often the verdict held under fresh seeds, as the file says it, with label and stale.
    """

    params: str
    status: str
    reason: str
    arms: dict[str, dict]
    others: tuple[dict, ...] = ()
    rate: dict | None = None

    @property
    def margin(self) -> float | None:
        """The least distance of a decisive interval to its threshold, in interval widths; None where all is exact or open."""
        if self.status == REPRODUCED:
            decisive = self.arms["claim"]["requirements"]
        elif self.status == NOT_REPRODUCED:
            broken = [r for r in self.arms["claim"]["requirements"] if r["outcome"] == "contradicted"]
            decisive = sorted(broken, key=lambda r: math.inf if margin(r) is None else margin(r))[-1:]
        else:
            return None
        control = self.arms["control"]
        decisive = decisive + [r for r in control["requirements"] if r["quantity"] in control["control_breaks"]]
        return min((found for found in map(margin, decisive) if found is not None), default=None)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper: the first record stands for what all its records state alike."""

    record: dict
    verdict: str
    settings: tuple[Setting, ...]

    @property
    def records(self) -> list[dict]:
        return [record for setting in self.settings for record in setting.arms.values()]

    @property
    def broken(self) -> list[tuple[Setting, str, dict]]:
        """The arms that ended otherwise than they should have, with their settings."""
        arms = [(setting, arm, record) for setting in self.settings for arm, record in setting.arms.items()]
        return [found for found in arms if found[2]["outcome"] not in ("passed", "skipped")]

    @property
    def reasons(self) -> list[str]:
        return list(dict.fromkeys(setting.reason for setting in self.settings if setting.reason))

    @property
    def margin(self) -> float | None:
        return min((s.margin for s in self.settings if s.margin is not None), default=None)

    @property
    def duration(self) -> float:
        return sum(record["duration"] for record in self.records)

    @property
    def rate(self) -> dict | None:
        """The rate of the setting that kept its verdict least often."""
        return lowest(setting.rate for setting in self.settings)

    @property
    def command(self) -> str:
        """Reruns every setting and both arms under the recorded seed."""
        return f"python -m pytest {self.record['module']}::{self.record['test']} --seed {self.record['seed']}"

    @property
    def headline(self) -> dict | None:
        """The claim arm's requirement that the control breaks: what stands beside the paper's number."""
        record = self.settings[0].arms.get("claim")
        found = record["requirements"] if record else []
        return next((r for r in found if r["quantity"] in record["control_breaks"]), found[0] if found else None)


@dataclass(frozen=True)
class Paper(catalogue.Paper):
    """A row of the catalogue with what its claims measured."""

    verdict: str = NOT_ENCODED
    why: str = ""
    claims: tuple[Claim, ...] = ()
    mutants: dict | None = None

    @property
    def module(self) -> str:
        """Where its claims are or belong."""
        return f"claims/{self.topic}/test_{self.slug}.py"

    @property
    def records(self) -> list[dict]:
        return [record for claim in self.claims for record in claim.records]

    @property
    def stale(self) -> bool:
        return any(record["stale"] for record in self.records)

    @property
    def scales(self) -> list[str]:
        return list(dict.fromkeys(claim.record["scale"] for claim in self.claims if claim.record["central"]))

    @property
    def margin(self) -> float | None:
        return min((c.margin for c in self.claims if c.record["central"] and c.margin is not None), default=None)

    @property
    def duration(self) -> float | None:
        return sum(claim.duration for claim in self.claims) if self.claims else None

    @property
    def rates(self) -> list[dict]:
        return [setting.rate for claim in self.claims for setting in claim.settings if setting.rate]

    @property
    def rate(self) -> dict | None:
        """The rate of the claim, side findings included, that kept its verdict least often."""
        return lowest(self.rates)

    @property
    def survivors(self) -> list[dict]:
        return [found for found in self.mutants["mutants"] if found["outcome"] == "survived"] if self.mutants else []


def lowest(rates: Iterable[dict | None]) -> dict | None:
    """The rate that is least, of equal ones that of more seeds; None where there is none."""
    return min((rate for rate in rates if rate), key=lambda rate: (rate["kept"] / rate["of"], -rate["of"]), default=None)


def margin(requirement: dict) -> float | None:
    """Distance of the interval to the bound that decides, in interval widths: 0 when it straddles, None for an exact number."""
    low, high = requirement["low"], requirement["high"]
    if high <= low:
        return None
    above = -math.inf if requirement["above"] is None else requirement["above"]
    below = math.inf if requirement["below"] is None else requirement["below"]
    inside, outside = min(low - above, below - high), max(above - high, low - below)
    return max(inside, outside, 0.0) / (high - low)


def papers(
    rows: Iterable[catalogue.Paper],
    records: Iterable[dict],
    by_label: dict[str, list[dict]],
    root: Path,
    fresh_seeds: dict[str, dict] | None = None,
    mutants: dict[str, dict] | None = None,
) -> list[Paper]:
    """Every row of the catalogue with its verdict, by topic and slug.

    Args:
        rows: the catalogue.
        records: the evidence to show, each with `label` and `stale` (fixtures.evidence.current).
        by_label: all evidence by machine, to set beside it what else was measured.
        root: the repository, to tell a paper that is encoded from one that is not, and stale evidence from fresh.
        fresh_seeds, mutants: a file's content by slug, with `label` and `stale` (reports.inputs).
    """
    shown: dict[str, list[dict]] = {}
    for record in records:
        shown.setdefault(record["slug"], []).append(record)
    elsewhere: dict[str, list[dict]] = {}
    for label, found in by_label.items():
        for record in found:
            elsewhere.setdefault(record["slug"], []).append(record | {"label": label})
    made = []
    for row in sorted(rows, key=lambda row: (row.topic, row.slug)):
        seeds, mutated = (fresh_seeds or {}).get(row.slug), (mutants or {}).get(row.slug)
        claims = _claims(shown.get(row.slug, []), elsewhere.get(row.slug, []), _rates(seeds), root)
        verdict = paper_verdict(shown.get(row.slug, [])).verdict
        if verdict == NOT_ENCODED and (root / Paper(**vars(row)).module).exists():
            verdict = NOT_RUN
        made.append(Paper(**vars(row), verdict=verdict, why=_why(verdict, claims), claims=claims, mutants=mutated))
    return made


def _rates(seeds: dict | None) -> dict[tuple[str, str], dict]:
    """By test and parameters the rates that rest on at least one seed."""
    if seeds is None:
        return {}
    about = {key: seeds[key] for key in ("label", "stale", "time")}
    return {(found["test"], found["params"]): found | about for found in seeds["claims"] if found["of"] > 0}


def _claims(records: list[dict], elsewhere: list[dict], rates: dict, root: Path) -> tuple[Claim, ...]:
    tests: dict[str, list[dict]] = {}
    for record in sorted(records, key=lambda record: record["line"]):
        tests.setdefault(record["test"], []).append(record)
    claims = []
    for test, found in tests.items():
        settings = []
        for params in dict.fromkeys(record["params"] for record in found):
            arms = {arm: r for arm in ARMS for r in found if r["params"] == params and r["arm"] == arm}
            status = claim_status(arms.values())
            others = _others(arms, elsewhere, root)
            settings.append(Setting(params, status.status, status.reason, arms, others, rates.get((test, params))))
        claims.append(Claim(found[0], paper_verdict(found).verdict, tuple(settings)))
    return tuple(claims)


def _others(arms: dict[str, dict], elsewhere: list[dict], root: Path) -> tuple[dict, ...]:
    """What other machines measured for the same claim and parameters."""
    ids = {record["nodeid"] for record in arms.values()}
    used = {record["label"] for record in arms.values()}
    labels: dict[str, list[dict]] = {}
    for record in elsewhere:
        if record["nodeid"] in ids and record["label"] not in used and record["outcome"] != "skipped":
            labels.setdefault(record["label"], []).append(record)
    return tuple(
        {
            "label": label,
            "arms": {arm: record for arm in ARMS for record in found if record["arm"] == arm},
            "status": claim_status(found).status,
            "stale": any(r["sources"]["hash"] != sources(root / r["module"], root)["hash"] for r in found),
        }
        for label, found in sorted(labels.items())
    )


def _why(verdict: str, claims: tuple[Claim, ...]) -> str:
    central = [claim for claim in claims if claim.record["central"]] or list(claims)
    counts = Counter(claim.verdict for claim in central)
    held, n = counts[REPRODUCED], len(central)
    words = {NOT_REPRODUCED: "did not hold here", IN_PART: "held in part", REPRODUCED: "held here"}
    words |= {INCONCLUSIVE: "could not be decided here", ACCELERATOR: "need an accelerator", EXTRA: "need a missing package"}
    parts = ", ".join(f"{counts[status]} {words[status]}" for status in ORDER if counts[status] and status in words)
    several = f"Of {n} central claims, {parts}." if n > 1 else ""
    if verdict == REPRODUCED:
        subject = "The central claim" if n == 1 else f"All {held} central claims"
        return f"{subject} held here, and every control broke the rule that it had to break."
    if verdict == IN_PART:
        return several or "The central claim held under some of its settings and not under others."
    if verdict == NOT_REPRODUCED:
        first = "The headline claim did not hold here." if central[0].verdict == NOT_REPRODUCED else "No central claim held here."
        return f"{first} {several}".strip()
    if verdict == INCONCLUSIVE:
        return several or "The effect is smaller than what this set-up can resolve."
    return {
        ACCELERATOR: "Only a GPU can decide this, and no run on one has been recorded yet.",
        EXTRA: "An optional package was missing when this ran; the message below says what to install.",
        FAILED: "A run ended in a way that nobody expected: there is no verdict until somebody has looked.",
        NOT_RUN: "The claims are written, but no run of them has been recorded here yet.",
        NOT_ENCODED: "Nobody has written this paper's claims as tests yet, so nothing is known about it here.",
    }[verdict]
