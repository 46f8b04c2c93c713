"""What goes wrong around a claim: it hangs, crashes, eats memory; the disk is full or read-only. Nothing else is lost by it."""

import errno
import os
import subprocess
from types import SimpleNamespace

import pytest

from paperclaims.fixtures import evidence as store
from paperclaims.fixtures.runs.limits import LEAST_MEMORY, _available_gib, _is_shortage
from paperclaims.fixtures.runs.summary import Summary
from paperclaims.tests.suite import Suite, body

pytest_plugins = ["pytester"]
PASSES = "evidence.require('v', 0 if arm.control else 1, above=1)"
# Waits for a mutex that it holds itself, and keeps the interpreter's lock meanwhile: no signal handler of Python ever runs.
DEAF = "import ctypes; lock = ctypes.create_string_buffer(64); [ctypes.PyDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"
SEGFAULT = "import ctypes; ctypes.string_at(0)"
WORKERS = ["-n", "1", "--dist", "loadfile"]


@pytest.fixture
def suite(pytester, monkeypatch):
    return Suite(pytester, monkeypatch)


def two_claims(suite: Suite, problem: str) -> None:
    """A paper whose first claim arm has a problem, with another claim behind it, and a second paper."""
    suite.paper(
        "alpha",
        f"""
        @claim("Has a problem.", **STATED)
        def test_first(arm, evidence):
            {PASSES}
            if not arm.control:
                {problem}

        @claim("Comes next.", **STATED)
        def test_second(arm, evidence):
            {PASSES}
        """,
    )
    suite.paper("beta", body(PASSES))


def others(suite: Suite) -> set[str]:
    return {record["outcome"] for record in suite.records_of() if not record["nodeid"].endswith("test_first[claim]")}


def test_a_claim_that_takes_too_long_is_ended_and_what_it_measured_is_kept(suite):
    two_claims(suite, "time.sleep(60)")
    result = suite.run("--claim-timeout", "0.5")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["*took longer than 0.5 s: make the claim cheaper, or give --claim-timeout SECONDS*"])
    record = suite.records()["test_first[claim]"]
    assert (record["outcome"], len(record["requirements"])) == ("crashed", 1)
    assert record["message"].startswith("took longer than 0.5 s")
    assert record["duration"] < 30


@pytest.mark.parametrize("swallow", ["except Exception: pass", "finally: pass"])
def test_no_handler_of_a_claim_keeps_it_running(suite, swallow):
    two_claims(suite, f"try: time.sleep(60)\n                {swallow}")
    suite.run("--claim-timeout", "0.5", "-k", "first and not control").assert_outcomes(failed=1, deselected=5)


def test_no_limit_when_asked_for_none_and_no_alarm_is_left_behind(suite):
    two_claims(suite, "time.sleep(0.7)")
    suite.run("--claim-timeout", "0", "--claim-memory", "0").assert_outcomes(passed=6)
    suite.run("--claim-timeout", "-1").stderr.fnmatch_lines(["*--claim-timeout and --claim-memory take a number from 0*"])


@pytest.mark.parametrize("end", ["deaf", "segfault"])
def test_without_workers_a_dead_process_keeps_what_was_before_and_a_second_run_goes_on(suite, end):
    two_claims(suite, DEAF if end == "deaf" else SEGFAULT)
    suite.paper("aaa", body(PASSES))
    result = suite.run("--claim-timeout", "0.5", process=True)
    assert result.ret != 0
    result.stderr.fnmatch_lines(
        ["Timeout (0:00:00.75*" if end == "deaf" else "*Segmentation fault*", "*test_alpha.py*in test_first"]
    )
    assert suite.outcomes() == {"test_it[claim]": "passed", "test_it[control]": "passed", "test_first[claim]": "running"}
    suite.run("--claim-timeout", "0.5", "--resume", process=True)
    assert others(suite) <= {"passed", "running"}
    assert suite.records("reports/evidence/local/beta").keys() == {"test_it[claim]", "test_it[control]"}
    assert suite.outcomes()["test_second[control]"] == "passed"


@pytest.mark.parametrize("end", ["deaf", "segfault"])
def test_with_workers_a_dead_one_is_replaced_and_everything_else_runs(suite, end):
    two_claims(suite, DEAF if end == "deaf" else SEGFAULT)
    for slug in ("a", "b"):  # files that the worker has finished when it dies
        suite.paper(slug, body(PASSES))
    result = suite.run("--claim-timeout", "0.5", *WORKERS, process=True)
    result.assert_outcomes(passed=9, failed=1)
    record = suite.records()["test_first[claim]"]
    assert record["outcome"] == "crashed"
    for part in (
        "crashed while running",
        "deaf to --claim-timeout",
        "python -m pytest 'claims/topic/test_alpha.py::test_first[claim]'",
    ):
        assert part in record["message"]
    assert others(suite) == {"passed"}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited on Linux only")
@pytest.mark.parametrize("eat", ["numpy.ones(2**28)", "[bytearray(2**20) for _ in range(2000)]"], ids=["at once", "bit by bit"])
def test_a_claim_that_eats_memory_fails_alone(suite, eat):
    two_claims(suite, f"import numpy; {eat}")
    result = suite.run("--claim-memory", "0.25")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["*asked for more than 0.25 GiB of memory: make the claim smaller, or give --claim-memory GIB*"])
    assert suite.records()["test_first[claim]"]["outcome"] == "crashed"


def test_what_a_shortage_of_memory_looks_like():
    torch_says = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B"
    assert _is_shortage(RuntimeError(torch_says))
    assert _is_shortage(OSError(12, "Cannot allocate memory"))
    assert _is_shortage(MemoryError())
    assert not _is_shortage(RuntimeError("shapes differ"))
    assert _available_gib() <= store.memory_gib()
    assert LEAST_MEMORY >= 1


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for about ten records."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_failure_and_the_evidence_before_it_is_whole(suite, small_disk):
    fill = f"open('{small_disk}/ballast', 'wb', buffering=0).write(bytes(2**20))"
    suite.paper("aaa", body(PASSES))
    two_claims(suite, fill)
    result = suite.run(f"--evidence={small_disk}")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*cannot write evidence to */alpha (No space left on device): free space there or give*"])
    result.stdout.fnmatch_lines(["*met*v: 1, required >= 1*"])  # what could not be written is on the terminal
    records, problems = store.read(small_disk)
    assert not problems
    assert {record["slug"] for record in records if record["outcome"] == "passed"} == {"aaa"}
    assert not list(small_disk.rglob(".*"))
    (small_disk / "ballast").unlink()
    two_claims(suite, "pass")
    result = suite.run(f"--evidence={small_disk}", "--resume")
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["*6 passed, 2 unchanged*"])


def test_a_folder_that_is_read_only_is_a_clear_failure(suite, small_disk):
    suite.paper("alpha", body(PASSES))
    suite.run(f"--evidence={small_disk}").assert_outcomes(passed=2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = suite.run(f"--evidence={small_disk}")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*cannot write evidence to */alpha (Read-only file system): free space there or give*"])
    assert {record["outcome"] for record in store.read(small_disk)[0]} == {"passed"}


def test_a_full_disk_does_not_hide_that_a_worker_died(suite, monkeypatch):
    suite.paper("alpha", body(PASSES))
    suite.run().assert_outcomes(passed=2)
    option = SimpleNamespace(evidence=None)
    summary = Summary(SimpleNamespace(rootpath=suite.pytester.path, option=option))
    nodeid = "claims/topic/test_alpha.py::test_it[claim]"
    report = pytest.TestReport(nodeid, ("", 0, ""), {}, "failed", "worker 'gw0' crashed", "???")

    def full(*_):
        raise OSError(errno.ENOSPC, "cannot write evidence to alpha")

    monkeypatch.setattr(store, "write_json", full)
    summary.pytest_runtest_logreport(report)
    assert report.longrepr.startswith("worker 'gw0' crashed: ")
    assert "cannot write evidence to alpha" in report.longrepr
    assert suite.outcomes()["test_it[claim]"] == "passed"
