"""`--resume`: what runs again, and that a run that was killed at any moment ends in the report of an unbroken one."""

import json
import random
import time

import pytest

from paperclaims.fixtures import evidence as store
from paperclaims.reports.build import build
from paperclaims.tests.suite import Suite, body

pytest_plugins = ["pytester"]
LOG = "open('ran', 'a').write(os.environ['PYTEST_CURRENT_TEST'].split(' ')[0] + '\\n')"
PASSES = "evidence.require('v', 0 if arm.control else 1, above=1)"


@pytest.fixture
def suite(pytester, monkeypatch):
    return Suite(pytester, monkeypatch)


def logged(statement: str) -> str:
    return body(f"{LOG}; {statement}")


def ran(suite: Suite) -> list[str]:
    """Papers whose claims have run since the last call, one entry an arm."""
    log = suite.pytester.path / "ran"
    found = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return sorted(line.split("::")[0].rpartition("test_")[2].removesuffix(".py") for line in found)


@pytest.mark.parametrize("workers", [[], ["-n", "1", "--dist", "loadfile"]], ids=["one process", "xdist"])
def test_what_has_passed_is_not_run_again_and_is_counted(suite, workers):
    for slug in ("alpha", "beta"):
        suite.paper(slug, logged(PASSES))
    suite.run("-k", "alpha").assert_outcomes(passed=2, deselected=2)
    result = suite.run("--resume", *workers, process=bool(workers))
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*reproduced *2*2*alpha, beta*", "1 claim unchanged since *-*-* *:* UTC, not run again"])
    result.stdout.fnmatch_lines(["*2 passed, 2 unchanged*"])
    assert ran(suite) == ["alpha", "alpha", "beta", "beta"]
    result = suite.run("--resume", *workers, process=bool(workers))
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*reproduced *2*2*alpha, beta*", "2 claims unchanged since *", "*4 unchanged*"])
    assert ran(suite) == []
    suite.run().assert_outcomes(passed=4)


@pytest.mark.parametrize(
    "end",
    ["evidence.require('v', 1, above=1)", "1 / 0", "pytest.skip('missing extra: x')"],
    ids=["failed", "crashed", "skipped"],
)
def test_whatever_did_not_pass_runs_again_with_its_other_arm(suite, end):
    suite.paper("alpha", logged(PASSES))
    suite.paper("beta", logged(f"{PASSES} if not arm.control else {end}"))
    suite.run()
    assert ran(suite) == ["alpha", "alpha", "beta", "beta"]
    suite.run("--resume")
    assert ran(suite) == ["beta", "beta"]
    suite.run("--resume", "--seed", "1", "-k", "alpha")
    assert ran(suite) == ["alpha", "alpha"]


def test_an_edit_reruns_just_the_claims_above_it(suite):
    files = {
        "impl/topic/method.py": "from paperclaims.impl.topic.shared import TABLE\n",
        "impl/topic/shared.py": "import pathlib\nTABLE = pathlib.Path(__file__).with_name('table.csv').read_text()\n",
        "impl/topic/table.csv": "1,2\n",
        "impl/topic/other.py": "",
    }
    for name, text in files.items():
        (suite.pytester.path / name).parent.mkdir(parents=True, exist_ok=True)
        (suite.pytester.path / name).write_text(text)
    for slug, module in (("alpha", "method"), ("beta", "shared"), ("gamma", "other")):
        suite.paper(slug, logged(f"import paperclaims.impl.topic.{module}; {PASSES}"))
    suite.run().assert_outcomes(passed=6)
    ran(suite)

    def rerun_after(name: str, text: str) -> list[str]:
        path = suite.pytester.path / name
        path.write_text(path.read_text() + text)
        suite.run("--resume")
        return sorted(set(ran(suite)))

    assert rerun_after("impl/topic/other.py", "X = 1\n") == ["gamma"]
    assert rerun_after("impl/topic/method.py", "X = 1\n") == ["alpha"]
    assert rerun_after("impl/topic/shared.py", "X = 1\n") == ["alpha", "beta"]
    assert rerun_after("impl/topic/table.csv", "3,4\n") == ["alpha", "beta"]
    assert rerun_after("claims/topic/test_beta.py", "X = 1\n") == ["beta"]
    assert rerun_after("conftest.py", "\nX = 1\n") == ["alpha", "beta", "gamma"]
    assert rerun_after("conftest.py", "") == []


def test_other_package_versions_run_again(suite):
    suite.paper("alpha", logged(PASSES))
    suite.run().assert_outcomes(passed=2)
    for path in (suite.pytester.path / "reports/evidence/local").rglob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"packages": record["packages"] | {"numpy": "1.0"}}))
    suite.run("--resume").assert_outcomes(passed=2)


@pytest.mark.parametrize("change", ["", "{", '{"schema": 0}', '["x"]', None], ids=["empty", "half", "old", "list", "lacking"])
def test_evidence_that_cannot_be_used_is_named_and_made_again(suite, change):
    for slug in ("alpha", "beta"):
        suite.paper(slug, logged(PASSES))
    suite.run().assert_outcomes(passed=4)
    ran(suite)
    broken = sorted((suite.pytester.path / "reports/evidence/local/alpha").glob("*.json"))[0]
    lacking = {key: value for key, value in json.loads(broken.read_text()).items() if key != "sources"}
    broken.write_text(json.dumps(lacking) if change is None else change)
    result = suite.run("--resume")
    assert ran(suite) == ["alpha", "alpha"]
    if change is not None:
        result.stdout.fnmatch_lines([f"*{broken.name}: left out, not readable as evidence (*"])
    assert set(suite.outcomes().values()) == {"passed"}
    result = suite.run("--resume")
    assert ran(suite) == []
    assert "left out" not in result.stdout.str()


def test_a_claim_that_ended_the_process_does_not_stand_in_the_way_of_the_others(suite):
    suite.paper("alpha", logged("os.kill(os.getpid(), signal.SIGKILL)"))
    suite.paper("beta", logged(PASSES))
    suite.run(process=True)
    assert ran(suite) == ["alpha"]
    suite.run("--resume", process=True)
    assert ran(suite) == ["alpha", "beta", "beta"]


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--dist", "loadfile"]], ids=["one process", "xdist"])
def test_a_run_killed_at_any_moment_ends_in_the_report_of_an_unbroken_one(suite, tmp_path, workers):
    rows = []
    for slug, value in (("alpha", "1"), ("beta", "rng.random()"), ("gamma", "0")):
        suite.paper(
            slug,
            f"""
            @claim("It works.", **STATED)
            @pytest.mark.parametrize("size", [1, 2])
            def test_it(arm, size, rng, seeds, evidence):
                time.sleep(0.05)
                evidence.curve("drawn", range(3000), rng.random(3000))
                evidence.record("seed", seeds(1)[0])
                evidence.require("v", -1 if arm.control else {value}, above=0)
            """,
        )
        rows.append(f'[{slug}]\ntitle = "T"\nyear = 2025\nclaim = "It works."\nmissing = ""\n')
    (suite.pytester.path / "claims/topic/papers.toml").write_text("\n".join(rows))
    suite.run("--evidence=unbroken").assert_outcomes(passed=12)

    pause = random.Random(0)
    for wanted in (6,) if workers else (2, 7):
        running = suite.start("--evidence=broken", "--resume", *workers)
        while running.poll() is None and len(finished(suite)) < wanted:
            time.sleep(0.002)
        time.sleep(pause.uniform(0, 0.1))
        running.kill()
        running.wait()
    suite.run("--evidence=broken", "--resume", *workers, process=bool(workers))
    time.sleep(0.3)  # a worker that outlived its run would write now
    assert report(suite, tmp_path, "broken") == report(suite, tmp_path, "unbroken")


def finished(suite: Suite) -> list[dict]:
    return [record for record in suite.records_of("broken") if record["outcome"] == "passed"]


def report(suite: Suite, out, folder: str) -> tuple:
    """What the report says of the evidence in `folder`, and the evidence itself, without times."""
    made = build(out / folder, suite.pytester.path / folder, suite.pytester.path)
    text = json.dumps([made["papers"], made["totals"], made["problems"]], indent=1).splitlines()
    records, problems = store.read(suite.pytester.path / folder)
    own = [{key: value for key, value in record.items() if key not in ("time", "duration")} for record in records]
    return [line for line in text if '"time"' not in line and '"duration"' not in line], own, problems
