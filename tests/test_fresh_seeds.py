"""Fresh seeds: runs of a real small suite, and the rules on runs of a stand-in for pytest that costs nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paperclaims.fixtures import evidence as store
from paperclaims.fixtures.runs import fresh_seeds

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = f"""
import sys, types
package = types.ModuleType("paperclaims")
package.__path__ = [{str(ROOT)!r}]
sys.modules["paperclaims"] = package
pytest_plugins = ["paperclaims.fixtures.plugin"]
"""
CLAIMS = """
import os
import pytest
from paperclaims.fixtures.optional import need
from paperclaims.fixtures.protocol import claim, not_reproduced

STATED = dict(scale="paper", control="the mechanism")

@claim("It works.", **STATED)
@pytest.mark.parametrize("size", [1, 2])
def test_robust(arm, size, evidence):
    evidence.require("v", 0 if arm.control else 1, above=1)

@not_reproduced("null")
@claim("It does not.", central=False, **STATED)
def test_null(arm, evidence):
    evidence.require("v", 0, above=1)

@claim("It depends.", **STATED)
def test_flips(arm, evidence, pytestconfig):
    evidence.require("v", 0 if arm.control else pytestconfig.option.seed % 2, above=1)

@pytest.mark.serial
@claim("It is fast.", **STATED)
def test_alone(arm, evidence):
    evidence.require("v", 0 if arm.control else 1, above=1)

@claim("It needs something.", **STATED)
def test_skipped(arm, evidence):
    need("no_such_package_anywhere", extra="peers")

@claim("It kills.", **STATED)
def test_zz_kills(arm, evidence, pytestconfig):
    if pytestconfig.option.seed == 2 and not arm.control:
        os._exit(3)
    evidence.require("v", 0 if arm.control else 1, above=1)
"""
# Writes what pytest would: a claim named `keeps_X` keeps its verdict under the seeds whose last digit is below X. Every seed
# that ran is in `ran`; under a seed that has a file `hang<seed>` it never ends.
STAND_IN = '''
import json, sys, time
from pathlib import Path
ids = [f"claims/topic/test_{name}" for name in ("alpha.py::test_keeps_10", "alpha.py::test_keeps_9", "beta.py::test_keeps_5")]
if "--collect-only" in sys.argv:
    print("\\n".join(f"{id}[{arm}]" for id in ids for arm in ("claim", "control")))
    sys.exit()
options = dict(a.removeprefix("--").split("=") for a in sys.argv if a.startswith("--") and "=" in a)
seed = int(options["seed"])
names = next(Path(a[1:]).read_text().splitlines() for a in sys.argv if a.startswith("@"))
with open("ran", "a") as file:
    file.write(f"{seed} {len(names)}\\n")
while Path(f"hang{seed}").exists():
    time.sleep(0.05)
for number, nodeid in enumerate(names):
    module, test = nodeid.removesuffix("]").split("::")
    test, arm = test.split("[")
    kept = arm == "control" or seed % 10 < int(test.removeprefix("test_keeps_"))
    record = {
        "schema": SCHEMA, "module": module, "test": test, "params": "", "arm": arm, "line": number, "needs": None,
        "statement": "It works.", "central": True, "expected": "reproduced", "reason": None, "duration": 0.5,
        "outcome": "passed" if kept else "failed", "message": "" if kept else "'v' is contradicted.",
        "sources": SOURCES[module], "packages": {}, "machine": {"cores": 2},
    }
    path = Path(options["evidence"], str(number) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
'''  # fmt: skip


class Suite:
    """A small checkout with two papers, and the stand-in as its pytest."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.out, self.monkeypatch = root, root / "out", monkeypatch
        self.edit("")

    def edit(self, text: str) -> None:
        """Another text for all claims, as far as their sources go."""
        store.sources.cache_clear()
        sources = {}
        for module in ("claims/topic/test_alpha.py", "claims/topic/test_beta.py"):
            (self.root / module).parent.mkdir(parents=True, exist_ok=True)
            (self.root / module).write_text(text)
            sources[module] = store.sources(self.root / module, self.root)
        script = self.root / "stand_in.py"
        script.write_text(f"SCHEMA, SOURCES = {store.SCHEMA}, {sources!r}\n{STAND_IN}")
        self.pytest = [sys.executable, "-S", str(script)]
        self.monkeypatch.setattr(fresh_seeds, "PYTEST", self.pytest)

    def run(self, *arguments: str) -> int:
        (self.root / "ran").write_text("")
        return fresh_seeds.main([*self.options, *arguments])

    @property
    def options(self) -> list[str]:
        return ["--root", str(self.root), "--out", str(self.out), "--workers", "2"]

    @property
    def ran(self) -> list[tuple[int, int]]:
        """(seed, number of tests) of every run since the last start, by seed."""
        return sorted(tuple(map(int, line.split())) for line in (self.root / "ran").read_text().splitlines())

    def claim(self, slug: str, test: str) -> dict:
        content = json.loads((self.out / f"{slug}.json").read_text())
        return next(claim for claim in content["claims"] if claim["test"] == test)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    yield Suite(tmp_path, monkeypatch)
    signal.signal(signal.SIGTERM, handler)


def test_a_claim_that_flips_gets_more_seeds_and_is_a_defect(suite, capsys):
    assert suite.run("--times", "10") == 1
    assert suite.ran == [(seed, 6) for seed in range(1, 11)] + [(seed, 2) for seed in range(11, 51)]
    flips = suite.claim("beta", "test_keeps_5")
    often, always = (suite.claim("alpha", test) for test in ("test_keeps_9", "test_keeps_10"))
    assert (flips["kept"], flips["of"], flips["defect"]) == (25, 50, True)
    assert flips["interval"] == pytest.approx([0.3159, 0.6841], abs=1e-3)
    assert (often["kept"], often["of"], often["defect"]) == (9, 10, False)
    assert (always["kept"], always["of"], always["defect"]) == (10, 10, False)
    assert {key: often[key] for key in ("params", "statement", "central", "expected")} == {
        "params": "", "statement": "It works.", "central": True, "expected": "reproduced"
    }  # fmt: skip
    assert often["runs"][0] == {"seed": 1, "kept": True, "status": "reproduced", "reason": "", "duration": 1.0}
    broken = {"seed": 9, "kept": False, "status": "failed", "reason": "claim arm failed: 'v' is contradicted.", "duration": 1.0}
    assert often["runs"][8] == broken
    output = capsys.readouterr().out
    assert "DEFECT: beta: test_keeps_5: claim arm failed: 'v' is contradicted." in output
    assert "broke: alpha: test_keeps_9:" in output
    both = " ".join(f"'claims/topic/test_beta.py::test_keeps_5[{arm}]'" for arm in ("claim", "control"))
    assert f"  python -m pytest {both} --seed 5" in output.splitlines()
    assert "3 claims, 44 of 70 runs kept their verdict: 62.86% (goal 99%)" in output
    content = json.loads((suite.out / "beta.json").read_text())
    assert {key: content[key] for key in ("schema", "slug", "topic", "module")} == {
        "schema": store.SCHEMA, "slug": "beta", "topic": "topic", "module": "claims/topic/test_beta.py"
    }  # fmt: skip
    assert content["machine"] == {"cores": 2}


def test_what_is_there_from_the_same_sources_is_not_run_again(suite):
    assert suite.run("--times", "2") == 0
    assert suite.ran == [(1, 6), (2, 6)]
    assert suite.run("--times", "4") == 0
    assert suite.ran == [(3, 6), (4, 6)]
    assert suite.run("--first", "2", "--times", "2", "--again") == 0
    assert suite.ran == [(2, 6), (3, 6)]
    assert [run["seed"] for run in suite.claim("alpha", "test_keeps_10")["runs"]] == [1, 2, 3, 4]
    suite.edit("# changed")
    assert suite.run("--first", "4", "--times", "1") == 0
    assert suite.ran == [(4, 6)]
    assert [run["seed"] for run in suite.claim("alpha", "test_keeps_10")["runs"]] == [4]


def test_a_run_that_is_killed_loses_the_running_seeds_only(suite):
    (suite.root / "hang3").touch()
    script = f"import sys, types; p = sys.modules['paperclaims'] = types.ModuleType('p'); p.__path__ = [{str(ROOT)!r}]\n"
    script += "from paperclaims.fixtures.runs import fresh_seeds\n"
    script += f"fresh_seeds.PYTEST = {suite.pytest!r}; fresh_seeds.main([*{suite.options!r}, '--times', '4'])"
    process = subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.DEVNULL)
    path = suite.out / "beta.json"
    wait_for(lambda: path.exists() and len(suite.claim("beta", "test_keeps_5")["runs"]) == 3)
    process.kill()
    process.wait()
    assert [run["seed"] for run in suite.claim("alpha", "test_keeps_9")["runs"]] == [1, 2, 4]
    (suite.root / "hang3").unlink()
    assert suite.run("--times", "4") == 0
    assert [seed for seed, _ in suite.ran] == [3]


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("arguments", [["--times", "0"], ["--first", "-1"], ["--workers", "0"]])
def test_bad_numbers_are_refused(suite, arguments):
    with pytest.raises(SystemExit):
        suite.run(*arguments)


@pytest.mark.parametrize(
    ("nodeid", "claim"),
    [
        ("claims/t/test_a_b.py::test_it[claim]", ("claims/t/test_a_b.py", "test_it", "")),
        ("claims/t/test_a_b.py::test_it[x-3-control]", ("claims/t/test_a_b.py", "test_it", "x-3")),
        ("claims/t/test_a_b.py::test_it[DP 6, [x]-control]", ("claims/t/test_a_b.py", "test_it", "DP 6, [x]")),
    ],
)
def test_names_of_claims(nodeid, claim):
    found = fresh_seeds.ClaimId.of(nodeid)
    assert (found.module, found.test, found.params) == claim
    assert nodeid in found.nodeids


def test_real_claims_under_two_seeds(tmp_path, monkeypatch, capsys):
    """A crash is not kept, and costs the claims beside it nothing; a skip is left out; what measures time runs as well."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(fresh_seeds, "MORE", 0)
    (tmp_path / "claims" / "topic").mkdir(parents=True)
    (tmp_path / "claims" / "topic" / "test_alpha.py").write_text(CLAIMS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib")
    handler = signal.getsignal(signal.SIGTERM)
    options = ["--root", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "2", "--times", "2"]
    assert fresh_seeds.main([*options, "--paper", "alpha"]) == 0
    signal.signal(signal.SIGTERM, handler)
    content = json.loads((tmp_path / "out" / "alpha.json").read_text())
    runs = {(claim["test"], claim["params"]): [run["kept"] for run in claim["runs"]] for claim in content["claims"]}
    assert runs == {
        ("test_robust", "1"): [True, True],
        ("test_robust", "2"): [True, True],
        ("test_null", ""): [True, True],
        ("test_flips", ""): [True, False],
        ("test_alone", ""): [True, True],
        ("test_zz_kills", ""): [True, False],
    }
    null = next(claim for claim in content["claims"] if claim["test"] == "test_null")
    assert (null["expected"], null["central"], null["runs"][0]["status"]) == ("not reproduced", False, "not reproduced")
    output = capsys.readouterr().out
    assert "1 claims were skipped" in output
    assert fresh_seeds.main([*options, "-k", "no_such_claim"]) == 1
    assert "found no claims" in capsys.readouterr().out
