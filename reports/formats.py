"""The files that the report reads, field by field. What does not fit is named, so that one broken file costs nothing else.

A shape is written as a value: a type (`float` stands for any finite number), a set of allowed values, [shape] for a list,
(shape, shape) for a list of that length, {key: shape} for a mapping with at least these keys, {str: shape} for any mapping,
a pattern for a string that fits it, `Maybe(shape)` for one that may be null, `Either(a, b)` for one of several.
"""

import math
import re
from dataclasses import dataclass

LARGEST = 1e200  # beyond it, sums and ratios of two numbers overflow


@dataclass(frozen=True)
class Maybe:
    shape: object


class Either(tuple):
    def __new__(cls, *shapes: object):
        return super().__new__(cls, shapes)


NAME = re.compile(r"[A-Za-z0-9_]+")
PATH = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_./-]*\.py")
SHARE = (float, float)
WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", list: "a list", dict: "a mapping"}

SOURCES = {"hash": str, "files": [PATH]}
MACHINE = {"system": str, "processor": str, "cores": Maybe(int), "memory_gib": Maybe(float)}
MACHINE |= {"python": str, "accelerator": Maybe(str)}
RAN = {"sources": SOURCES, "packages": {str: str}, "machine": MACHINE, "time": str}
INTERVAL = {"estimate": float, "low": float, "high": float}
REQUIREMENT = INTERVAL | {"n": int, "level": float, "method": str, "quantity": str, "unit": str}
REQUIREMENT |= {"above": Maybe(float), "below": Maybe(float), "outcome": {"met", "contradicted", "inconclusive"}}
RECORDED = {"quantity": str, "value": Either(float, str, INTERVAL), "unit": str}
CURVE = {"name": str, "series": str, "x_label": str, "y_label": str, "log": {"", "x", "y", "xy"}}
CURVE |= {"x": [float], "y": [float], "low": Maybe([float]), "high": Maybe([float])}

# One arm of one claim, as fixtures.plugin writes it.
EVIDENCE = {"slug": NAME, "topic": NAME, "test": NAME, "params": str, "arm": {"claim", "control"}, "nodeid": str}
EVIDENCE |= {"module": PATH, "line": int, "statement": str, "scale": {"paper", "reduced", "mechanism"}, "control": str}
EVIDENCE |= {"differs": Maybe(str), "control_breaks": [str], "central": bool, "paper_value": Maybe(str), "needs": Maybe(str)}
EVIDENCE |= {"expected": {"reproduced", "not reproduced", "inconclusive"}, "reason": Maybe(str), "outcome": str, "message": str}
EVIDENCE |= {"requirements": [REQUIREMENT], "records": [RECORDED], "curves": [CURVE], "seed": int, "seeds": [int]}
EVIDENCE |= {"duration": float, "command": str} | RAN

# How often the claims of a paper kept their verdict under other seeds.
SEED_RUN = {"seed": int, "kept": bool, "status": str, "reason": Maybe(str), "duration": float}
RATE = {"test": NAME, "params": str, "statement": str, "central": bool, "expected": str, "runs": [SEED_RUN]}
RATE |= {"kept": int, "of": int, "interval": SHARE, "defect": bool}
FRESH_SEEDS = {"schema": {1}, "slug": NAME, "topic": NAME, "module": PATH, "claims": [RATE]} | RAN

# Which deliberate errors in a paper's implementation its tests and claims noticed.
MUTANT = {"module": PATH, "line": int, "column": int, "operator": str, "original": str, "mutated": str}
MUTANT |= {"outcome": {"noticed", "survived", "equivalent"}, "noticed_by": Maybe(str), "reason": Maybe(str), "duration": float}
MUTANTS = {"schema": {1}, "slug": NAME, "topic": NAME, "seed": int, "mutants": [MUTANT], "noticed": int, "counted": int}
MUTANTS |= {"modules": [{"module": PATH, "possible": int, "sampled": int}], "interval": Maybe(SHARE)} | RAN

# Time and memory of an operator and its peers: see reports/benchmarks.py.
MEASURED = {"variant": str, "own": bool, "size": str, "shape": [int], "threads": int, "dtype": str, "seconds": float}
MEASURED |= {"ratio": float, "low": float, "high": float, "peak_bytes": float, "least_flops": float, "least_bytes": float}
MEASURED |= {"aa": SHARE}
CEILING = {"threads": int, "dtype": str, "flops_per_second": float, "bytes_per_second": float}
BENCHMARK = {"schema": {1}, "slug": NAME, "kernel": str, "baseline": str, "machine": MACHINE, "packages": {str: str}}
BENCHMARK |= {"time": Maybe(str), "module": Maybe(PATH), "sources": Maybe(SOURCES), "ceilings": [CEILING], "rows": [MEASURED]}

# An older report.json, as far as two runs are compared.
ARM = {"outcome": str, "requirements": [REQUIREMENT], "seed": int, "duration": float, "label": str}
SETTING = {"params": str, "status": str, "arms": {str: ARM}}
CLAIM = {"test": str, "statement": str, "central": bool, "verdict": str, "settings": [SETTING]}
PAPER = {"slug": NAME, "title": str, "verdict": str, "claims": [CLAIM]}
RUN = {"label": str, "machine": MACHINE, "packages": {str: str}}
REPORT = {"schema": {1}, "built": str, "papers": [PAPER]}


def fault(value: object, shape: object, where: str = "") -> str | None:
    """The first place in which `value` does not have the shape, in words, or None."""
    if isinstance(shape, Maybe):
        return None if value is None else fault(value, shape.shape, where)
    if isinstance(shape, Either):
        found = [fault(value, one, where) for one in shape]
        return None if None in found else found[0]
    if isinstance(shape, dict):
        return _mapping_fault(value, shape, where)
    if isinstance(shape, (list, tuple)):
        return _list_fault(value, shape, where)
    return None if _fits(value, shape) else f"{where or 'it'} is {_short(value)}, not {_words(shape)}"


def record_fault(record: object) -> str | None:
    """What is wrong with a record of evidence, or None."""
    found = fault(record, EVIDENCE)
    if found:
        return found
    if record["outcome"] == "passed" and not record["requirements"]:
        return "it passed without a requirement"
    for requirement in record["requirements"]:
        if requirement["above"] is None and requirement["below"] is None:
            return f"requirement {_short(requirement['quantity'])} has no bound"
    for interval in [*record["requirements"], *(entry["value"] for entry in record["records"])]:
        if isinstance(interval, dict) and not interval["low"] <= interval["estimate"] <= interval["high"]:
            return f"an interval from {interval['low']} to {interval['high']} around {interval['estimate']}"
    for curve in record["curves"]:
        if len({len(curve[key]) for key in ("x", "y", "low", "high") if curve[key] is not None}) != 1:
            return f"curve {_short(curve['name'])} has columns of several lengths"
    return None


def _mapping_fault(value: object, shape: dict, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where or 'it'} is {_short(value)}, not a mapping"
    if str in shape:
        texts = (fault(key, str, f"a key of {where or 'it'}") for key in value)
        inner = (fault(item, shape[str], f"{where}.{key}".strip(".")) for key, item in value.items())
        return next((found for found in (*texts, *inner) if found), None)
    if lacking := sorted(shape.keys() - value.keys()):
        return f"{where or 'it'} lacks {', '.join(lacking)}"
    return next((found for key in shape if (found := fault(value[key], shape[key], f"{where}.{key}".strip(".")))), None)


def _list_fault(value: object, shape: list | tuple, where: str) -> str | None:
    if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
        return f"{where or 'it'} is {_short(value)}, not a list" + f" of {len(shape)}" * isinstance(shape, tuple)
    shapes = shape if isinstance(shape, tuple) else shape * len(value)
    return next((found for i, one in enumerate(shapes) if (found := fault(value[i], one, f"{where}[{i}]"))), None)


def _fits(value: object, shape: object) -> bool:
    if isinstance(shape, set):
        return isinstance(value, (str, int)) and not isinstance(value, bool) and value in shape
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if shape is bool or isinstance(value, bool):
        return shape is bool and isinstance(value, bool)
    if shape is str:
        return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    if shape is int:
        return isinstance(value, int) and abs(value) < LARGEST
    return isinstance(value, (int, float)) and abs(value) < LARGEST and math.isfinite(value)


def _words(shape: object) -> str:
    if isinstance(shape, set):
        return "one of " + ", ".join(sorted(map(repr, shape)))
    return f"a text like {shape.pattern}" if isinstance(shape, re.Pattern) else WORDS[shape]


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
