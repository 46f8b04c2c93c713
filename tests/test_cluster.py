"""Claims on a Ray cluster of two nodes on this machine: the verdicts of a local run, whatever dies on the way."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from paperclaims.fixtures.runs.tasks import plan
from paperclaims.tests.suite import Suite, body

pytest_plugins = ["pytester"]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[cluster]'")
PASSES = "evidence.require('v', 0 if arm.control else 1, above=1)"


@pytest.fixture
def suite(pytester, monkeypatch):
    return Suite(pytester, monkeypatch)


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def test_without_ray_the_option_says_what_to_install(suite, monkeypatch):
    suite.paper("alpha", body(PASSES))
    monkeypatch.setitem(sys.modules, "ray", None)
    result = suite.run("--cluster", "auto")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--cluster needs Ray*pip install -e '.[[]cluster[]]'*"])


@needs_ray
def test_where_no_cluster_is_the_option_says_how_to_start_one(suite):
    suite.paper("alpha", body(PASSES))
    result = suite.run("--cluster", "127.0.0.1:1", process=True)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no Ray cluster at 127.0.0.1:1 that this process can join*ray start --head*"])


def test_short_papers_share_a_task_and_special_needs_have_their_own():
    def item(slug: str, needs: str | None = None, serial: bool = False) -> SimpleNamespace:
        path = Path(f"claims/topic/test_{slug}.py")
        obj = SimpleNamespace(claim=SimpleNamespace(needs=needs))
        marks = {"serial": True} if serial else {}
        return SimpleNamespace(nodeid=f"{path}::test_it", path=path, obj=obj, get_closest_marker=marks.get)

    items = [item("long"), *(item(f"short{i}") for i in range(10)), item("gpu", "cuda"), item("clock", serial=True)]
    took = {item.nodeid: 10.0 for item in items} | {items[0].nodeid: 500.0}
    tasks = plan(items, took, cpus=2)
    assert [str(task) for task in tasks[:2]] == ["clock", "long"]
    assert [len(task.tests) for task in tasks] == [1, 1, 6, 4, 1]
    assert [task.cuda for task in tasks] == [False] * 4 + [True]
    assert len(plan(items, took, cpus=100)) == len(items)
    assert len(plan(items, {}, cpus=2)) == len(items)


@needs_ray
def test_a_cluster_gives_the_verdicts_of_a_local_run(suite, cluster):
    suite.paper("alpha", body(PASSES))
    suite.paper("beta", body("evidence.require('v', 0, above=1)", "@not_reproduced('null')"))
    suite.paper("gamma", body("pytest.skip('missing extra: pip install x')"))
    suite.paper("delta", body(PASSES).replace("**STATED", "needs='cuda', **STATED"))
    suite.paper("epsilon", body(PASSES, "@pytest.mark.serial"))
    suite.paper("zeta", body(f"{PASSES} if arm.control else os.kill(os.getpid(), signal.SIGSEGV)"))
    suite.paper(
        "eta",
        """
        @claim("It works.", **STATED)
        @pytest.mark.parametrize("size", [1, 2])
        def test_it(arm, size, rng, seeds, evidence):
            evidence.record("drawn", rng.random() + seeds(2)[1])
            evidence.require("v", 0 if arm.control and size == 1 else 1, above=1)
        """,
    )

    def run(*arguments: str) -> tuple:
        folder = arguments[0].strip("-")
        result = suite.run("--seed", "3", f"--evidence={folder}", *arguments, process=True)
        records = {record["nodeid"]: record for record in suite.records_of(folder)}
        for record in records.values():
            for own in ("time", "duration", "machine"):
                del record[own]
            if record["outcome"] == "crashed":
                assert "Alone: python -m pytest" in record.pop("message")
        verdicts = [line for line in result.stdout.lines if line.startswith("│")]
        return records, verdicts, result.ret

    local = run("-n", "2", "--dist", "loadfile")
    assert len(local[0]) == 16
    assert run("--cluster", cluster.address) == local


@needs_ray
def test_a_task_whose_worker_died_runs_again(suite, cluster, tmp_path):
    suite.paper(
        "alpha",
        body(f"""
        flag = {str(tmp_path / "died")!r}
        if not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        {PASSES}"""),
    )
    result = suite.run("--cluster", cluster.address, process=True)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["cluster: alpha was lost with its worker or node (*) and submitted again"])


@needs_ray
def test_a_node_killed_in_the_middle_loses_nothing(suite, cluster, tmp_path):
    for slug in "abcd":
        suite.paper(
            slug,
            body(f"""
            open({str(tmp_path)!r} + "/{slug}-" + os.environ["RAY_RAYLET_PID"], "w").close()
            time.sleep(1.5)
            {PASSES}"""),
        )
    node = next(iter(cluster.worker_nodes))
    raylet = node.all_processes["raylet"][0].process.pid
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--cluster", cluster.address]
    running = suite.pytester.popen(command, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.name.endswith(f"-{raylet}") for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output.decode()
    assert b"submitted again" in output
    assert set(suite.outcomes().values()) == {"passed"}
    assert len(list(tmp_path.iterdir())) > 4
