"""Small projects with claims in them, run by pytest itself: for the tests of the protocol and of what surrounds it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from paperclaims.fixtures import evidence as store

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = f"""
import sys, types
from pathlib import Path
package = types.ModuleType("paperclaims")
package.__path__ = [str(Path(__file__).parent), {str(ROOT)!r}]
sys.modules["paperclaims"] = package
pytest_plugins = ["paperclaims.fixtures.plugin"]
"""
HEADER = """
import os, signal, time
import pytest
from paperclaims.fixtures.protocol import claim, inconclusive, not_reproduced
from paperclaims.fixtures.statistics import Interval, mean_interval
STATED = dict(scale="paper", control="the mechanism")
def interval(low, high): return Interval((low + high) / 2, low, high, 8)
"""


class Suite:
    """A project with claims in it, and the evidence that runs of it left."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
        self.pytester = pytester
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        pytester.makeconftest(CONFTEST)
        options = "--import-mode=importlib --continue-on-collection-errors"
        pytester.makefile(".ini", pytest=f"[pytest]\naddopts = {options}\ntestpaths = claims")

    def paper(self, slug: str, body: str) -> None:
        path = self.pytester.path / "claims" / "topic" / f"test_{slug}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + textwrap.dedent(body))

    def run(self, *arguments: str, process: bool = False) -> pytest.RunResult:
        for cached in (store.sources, store.harness, store.packages, store._scan, store._data_files):
            cached.cache_clear()
        run = self.pytester.runpytest_subprocess if process else self.pytester.runpytest_inprocess
        return run("-p", "xdist", "-p", "no:cacheprovider", *arguments)

    def start(self, *arguments: str) -> subprocess.Popen:
        """A run in a process of its own, and that in a session of its own, to be killed."""
        command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", *arguments]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        return subprocess.Popen(command, cwd=self.pytester.path, start_new_session=True, **quiet)

    def records_of(self, folder: str = "reports/evidence/local") -> list[dict]:
        return [json.loads(path.read_text()) for path in (self.pytester.path / folder).rglob("*.json")]

    def records(self, folder: str = "reports/evidence/local") -> dict[str, dict]:
        """Records by "test[id]"."""
        return {record["nodeid"].split("::")[1]: record for record in self.records_of(folder)}

    def outcomes(self) -> dict[str, str]:
        return {name: record["outcome"] for name, record in self.records().items()}


def body(requirement: str, marks: str = "", breaks: str = "()") -> str:
    return f"""
    {marks}
    @claim("It works.", control_breaks={breaks}, **STATED)
    def test_it(arm, evidence):
        {requirement}
    """
