"""Time and memory of operators against peers: the one place that knows the files in reports/benchmarks.

A file an operator and machine, reports/benchmarks/SLUG.json or reports/benchmarks/MACHINE/SLUG.json:

    {"schema": 1, "slug": "cut_cross_entropy", "kernel": "linear_cross_entropy, forward and backward",
     "baseline": "full logits", "machine": {...}, "packages": {"torch": "2.13.0"}, "time": "2026-11-21T14:07:19+00:00",
     "module": "kernels/losses/cut_cross_entropy.py", "sources": fixtures.evidence.sources of that module (both may be null),
     "ceilings": [{"threads": 1, "dtype": "float32", "flops_per_second": 1.1e11, "bytes_per_second": 1.4e10}], measured there,
     "rows": [{"variant": "ours", "own": true, "size": "small", "shape": [1024, 16000, 384], "threads": 1, "dtype": "float32",
               "seconds": 0.41, "ratio": 0.93, "low": 0.91, "high": 0.95,    # time over the baseline's, 99 % interval
               "peak_bytes": 21000000, "least_flops": 3.8e10, "least_bytes": 5.2e7,
               "aa": [0.99, 1.01]}]}                                         # the first variant over itself

`least_flops` and `least_bytes` are what no implementation can do without; with the machine's ceilings they give the floor:
the time below which nobody can go. On a GPU `threads` is 0. A file without `schema` is read as far as it says the same.
"""

import math
import statistics
from itertools import groupby
from pathlib import Path

from paperclaims.reports import formats

OWN, FLOOR = "ours", "the floor at this machine's ceilings"


def complete(content: object, path: Path) -> str | None:
    """Fill in what the first files did not state; returns what is wrong with the content, or None."""
    if not isinstance(content, dict):
        return formats.fault(content, formats.BENCHMARK)
    rows = content.get("rows")
    if "schema" not in content and isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        ones = (row for row in rows if all(math.isclose(_number(row.get(key)), 1) for key in ("low", "high")))
        old = {
            "schema": 1,
            "slug": path.stem,
            "kernel": path.stem.replace("_", " "),
            "baseline": next((row.get("variant") for row in ones), ""),
        }
        old |= {"packages": {"torch": content.get("torch", "")}, "time": None, "module": None, "sources": None, "ceilings": []}
        content |= old | content
        for row in rows:
            row |= {"own": str(row.get("variant")).startswith(OWN), "dtype": "float32"} | row
    wrong = formats.fault(content, formats.BENCHMARK)
    if wrong is None:
        numbers = [row[key] for row in rows for key in ("seconds", "ratio", "low", "high")]
        numbers += [found[key] for found in content["ceilings"] for key in ("flops_per_second", "bytes_per_second")]
        wrong = "a time or a ceiling that is not above zero" if min(numbers, default=1) <= 0 else None
    return wrong


def floor(content: dict, row: dict) -> float | None:
    """Seconds that the row's operations and bytes take at the machine's ceilings; None where none were measured."""
    for ceiling in content["ceilings"]:
        if (ceiling["threads"], ceiling["dtype"]) == (row["threads"], row["dtype"]):
            return max(row["least_flops"] / ceiling["flops_per_second"], row["least_bytes"] / ceiling["bytes_per_second"])
    return None


def tables(content: dict) -> list[dict]:
    """A table for each size, number of threads and dtype of a file, the fastest variant first."""

    def setting(row: dict) -> tuple:
        return row["threads"], row["dtype"], row["least_flops"], row["size"], row["shape"]

    found = []
    for (threads, dtype, flops, size, shape), group in groupby(sorted(content["rows"], key=setting), key=setting):
        rows = sorted(group, key=lambda row: row["seconds"])
        slowest, largest = max(row["high"] for row in rows), max(row["peak_bytes"] for row in rows) or 1
        least = floor(content, rows[0])
        lines = [
            row
            | {
                "time_bar": [round(100 * row[key] / slowest, 2) for key in ("low", "ratio", "high")],
                "memory_bar": round(100 * row["peak_bytes"] / largest, 2),
                "over_floor": row["seconds"] / least if least else None,
                "baseline": row["variant"] == content["baseline"],
            }
            for row in rows
        ]
        aa = rows[0]["aa"]
        about = {
            "threads": threads,
            "dtype": dtype,
            "size": size,
            "shape": shape,
            "flops": flops,
            "bytes": rows[0]["least_bytes"],
        }
        about |= {"floor": least, "one": round(100 / slowest, 2), "aa": aa, "trustworthy": aa[0] <= 1 <= aa[1]}
        found.append(about | {"rows": lines})
    return found


def plots(content: dict) -> list[dict]:
    """Time over the baseline's and peak memory over sizes, for the page's script: a pair for each number of threads and dtype."""
    found = []
    for (threads, dtype), group in groupby(tables(content), key=lambda table: (table["threads"], table["dtype"])):
        sizes = list(group)
        if len({table["flops"] for table in sizes}) < 2:
            continue
        time, memory = {}, {}
        for table in sizes:
            x = table["flops"] / 1e9
            for row in sorted(table["rows"], key=lambda row: (not row["own"], row["variant"])):
                _point(time, row["variant"], row["own"], x, row["ratio"])
                _point(memory, row["variant"], row["own"], x, row["peak_bytes"] / 2**20)
            if table["floor"]:
                rate = statistics.median(row["ratio"] / row["seconds"] for row in table["rows"])
                _point(time, FLOOR, False, x, table["floor"] * rate)
        baseline = f"times {content['baseline'] or 'the baseline'}"
        for lines, title, label, log in ((time, "Time", baseline, "x"), (memory, "Peak memory", "MiB", "xy")):
            about = {"title": f"{title} over size, {setting_name(threads, dtype)}", "setting": "", "y_label": label, "log": log}
            found.append(about | {"x_label": "least operations (GFLOP)", "series": list(lines.values())})
    return found


def setting_name(threads: int, dtype: str) -> str:
    where = "on the GPU" if threads == 0 else "1 thread" if threads == 1 else f"{threads} threads"
    return f"{where}, {dtype}"


def _point(lines: dict[str, dict], name: str, own: bool, x: float, y: float) -> None:
    dash = "dot" if name == FLOOR else "solid" if own else "dash"
    line = lines.setdefault(name, {"name": name, "arm": "", "x": [], "y": [], "low": None, "high": None, "dash": dash})
    line["x"].append(x)
    line["y"].append(y)


def _number(value: object) -> float:
    return value if isinstance(value, (int, float)) else math.nan
