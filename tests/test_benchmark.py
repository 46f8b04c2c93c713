"""The benchmark's rows, their file, and what replaces what in it."""

import json
import time

import pytest
import torch

from paperclaims.fixtures.benchmark import ceiling, measure, table, threads, write

CELL = {"baseline": "short", "size": "small", "shape": (4,), "least_flops": 8, "least_bytes": 16}


def variants():
    return {
        "short": lambda: (time.sleep(1e-3), torch.zeros(1000)),
        "ours": lambda: (time.sleep(3e-3), torch.zeros(4000)),
    }


def test_rows_tell_time_over_the_baseline_and_peak_bytes():
    short, ours = measure(variants(), **CELL)
    assert (short["ratio"], short["own"], ours["own"]) == (1.0, False, True)
    assert 1.5 < ours["ratio"] < 6
    assert ours["low"] <= ours["ratio"] <= ours["high"]
    assert (short["peak_bytes"], ours["peak_bytes"]) == (4000, 16000)
    assert table([ours, short]).splitlines()[1].startswith("short")


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with threads(0):
        assert torch.get_num_threads() == before


def test_a_baseline_that_is_not_measured_is_refused():
    with pytest.raises(ValueError, match="is none of the variants"):
        measure(variants(), **CELL | {"baseline": "nobody"})


def test_ceilings_are_what_the_machine_reaches():
    found = ceiling(1, flops=1e8, megabytes=1)
    assert found["flops_per_second"] > 1e8
    assert found["bytes_per_second"] > 1e7


def test_a_cell_measured_again_replaces_its_rows_only(tmp_path):
    about = {"kernel": "sum", "baseline": "short", "module": "kernels/backend.py", "folder": tmp_path}
    rows = measure(variants(), **CELL)
    larger = [row | {"size": "large"} for row in rows]
    ceilings = [ceiling(1, flops=1e6, megabytes=1)]
    write("some", [*rows, *larger], **about, ceilings=ceilings)
    path = write("some", [row | {"seconds": 9.0} for row in rows], **about)
    kept = json.loads(path.read_text())
    assert [(row["size"], row["seconds"] == 9.0) for row in kept["rows"]] == [("large", False)] * 2 + [("small", True)] * 2
    assert kept["ceilings"] == ceilings
    other = json.loads(write("some", rows, **about | {"kernel": "another"}).read_text())
    assert len(other["rows"]) == 2
    assert other["ceilings"] == []
