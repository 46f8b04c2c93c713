"""Evidence on disk, and the verdicts made from it."""

import errno
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from paperclaims.fixtures import evidence as store
from paperclaims.fixtures.verdict import paper_verdict


def record(**changes) -> dict:
    made = {
        **{"schema": store.SCHEMA, "slug": "alpha", "topic": "topic", "test": "test_it", "params": "", "arm": "claim", "line": 1},
        **{"module": "claims/topic/test_alpha.py", "central": True, "needs": None, "expected": "reproduced", "reason": None},
        **{"outcome": "passed", "message": "", "sources": {"hash": "", "files": []}},
    } | changes
    return {"nodeid": f"{made['module']}::{made['test']}[{made['params']}-{made['arm']}]"} | made


def both(**changes) -> list[dict]:
    return [record(arm=arm, **changes) for arm in ("claim", "control")]


def write_many(arguments: tuple[Path, str]) -> None:
    path, text = arguments
    for _ in range(50):
        store.write_json(path, [text] * 2000)


def test_a_reader_never_sees_half_a_file_however_many_write(tmp_path):
    path = tmp_path / "record.json"
    store.write_json(path, ["first"])
    with ProcessPoolExecutor(2) as pool:
        writing = pool.map(write_many, [(path, "a" * 50), (path, "b" * 50)])
        for _ in range(200):
            assert len(set(json.loads(path.read_text()))) == 1
        list(writing)
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_failed_write_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    store.write_json(path, ["old"])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device.*--evidence FOLDER"):
        store.write_json(path, ["new"])
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(path, [float("nan")])
    assert json.loads(path.read_text()) == ["old"]
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"schema": 99}', "[]x"])
def test_a_file_that_is_no_evidence_is_left_out_with_a_word(tmp_path, content):
    store.write_json(tmp_path / "good.json", record())
    (tmp_path / "bad.json").write_text(content)
    records, problems = store.read(tmp_path)
    assert records == [record()]
    assert len(problems) == 1
    assert "bad.json" in problems[0]


@pytest.fixture
def project(tmp_path):
    """A project with one paper whose module imports a method, which imports another."""
    for path, text in {
        "claims/topic/test_alpha.py": "from paperclaims.impl.topic.alpha import f\nimport sklearn\ndef test_it(): ...\n",
        "impl/topic/alpha.py": "from paperclaims.impl.topic import shared\nimport torch, json\n",
        "impl/topic/shared.py": "import paperclaims.kernels.k\n",
        "kernels/k.py": "",
        "impl/topic/other.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for cached in (store.sources, store.packages, store._scan, store._data_files):
        cached.cache_clear()
    return tmp_path


def test_the_sources_of_a_claim_are_what_it_imports_from_the_project(project):
    module = project / "claims/topic/test_alpha.py"
    found = store.sources(module, project)
    assert found["files"] == ["claims/topic/test_alpha.py", "impl/topic/alpha.py", "impl/topic/shared.py", "kernels/k.py"]
    assert {"torch", "scikit-learn", "numpy"} <= set(store.packages(module, project))
    assert "json" not in store.packages(module, project)
    for name, changes in (("impl/topic/other.py", False), ("kernels/k.py", True)):
        (project / name).write_text("changed = 1\n")
        store.sources.cache_clear()
        assert (store.sources(module, project)["hash"] != found["hash"]) is changes


def test_the_last_local_run_is_shown_but_never_a_skip_in_place_of_a_result(project):
    fresh = {"sources": store.sources(project / "claims/topic/test_alpha.py", project)}
    published = both(**fresh, message="published")
    shown = store.current({"cpu": published, "local": both(**fresh, message="local")}, project)
    assert [(r["label"], r["stale"]) for r in shown] == [("local", False)] * 2
    shown = store.current({"cpu": published, "local": both(**fresh, outcome="skipped")}, project)
    assert [r["label"] for r in shown] == ["cpu"] * 2
    shown = store.current({"local": both(**fresh, outcome="skipped"), "a100": published}, project)
    assert [r["label"] for r in shown] == ["a100"] * 2
    shown = store.current({"cpu": published, "local": both(message="of older sources")}, project)
    assert [(r["label"], r["stale"]) for r in shown] == [("cpu", False)] * 2


def test_evidence_older_than_its_sources_is_marked_and_what_is_gone_is_left_out(project):
    fresh = {"sources": store.sources(project / "claims/topic/test_alpha.py", project)}
    assert {r["stale"] for r in store.current({"cpu": both()}, project)} == {True}
    assert store.current({"cpu": both(test="test_gone")}, project) == []
    assert store.current({"cpu": both(module="claims/topic/test_gone.py")}, project) == []
    shown = store.current({"local": both(params="old") + both(params="new", **fresh)}, project)
    assert {r["params"] for r in shown} == {"new"}


def test_publishing_makes_one_file_a_paper_without_skips_for_want_of_an_extra(tmp_path):
    local = tmp_path / "local"
    for found in [*both(), *both(slug="beta", outcome="skipped", needs="cuda"), *both(slug="gamma", outcome="skipped")]:
        store.write_json(store.record_path(local, found["slug"], found["slug"] + found["nodeid"]), found)
    paths = store.publish("cpu", local, tmp_path)
    assert sorted(path.name for path in paths) == ["alpha.json", "beta.json"]
    by_label, problems = store.read_all(tmp_path)
    assert (len(by_label["cpu"]), len(by_label["local"]), problems) == (4, 6, [])


NULL, SMALL = {"expected": "not reproduced", "reason": "no effect"}, {"expected": "inconclusive", "reason": "small"}
GPU, EXTRA = {"needs": "cuda", "outcome": "skipped"}, {"outcome": "skipped", "message": "missing extra"}


@pytest.mark.parametrize(
    ("claims", "verdict"),
    [
        ([{}], "reproduced"),
        ([{}, {}], "reproduced"),
        ([{}, NULL], "in part"),
        ([{}, SMALL], "in part"),
        ([{}, GPU], "in part"),
        ([{}, EXTRA], "in part"),
        ([NULL, {}], "not reproduced"),
        ([SMALL, {}], "in part"),
        ([GPU, {}], "in part"),
        ([NULL], "not reproduced"),
        ([SMALL], "inconclusive"),
        ([SMALL, NULL], "not reproduced"),
        ([GPU], "needs an accelerator"),
        ([GPU, SMALL], "inconclusive"),
        ([EXTRA], "missing extra"),
        ([{}, {"outcome": "failed"}], "failed"),
        ([{}, {"outcome": "crashed"}], "failed"),
        ([{}, {"outcome": "running"}], "failed"),
        ([{}, NULL | {"central": False}], "reproduced"),
        ([{}, {"outcome": "failed", "central": False}], "failed"),
        ([], "not encoded"),
    ],
)
def test_a_papers_verdict_is_that_of_its_central_claims(claims, verdict):
    records = [found for line, changes in enumerate(claims) for found in both(test=f"test_{line}", line=line, **changes)]
    assert paper_verdict(records).verdict == verdict
    assert paper_verdict(records[::-1]).verdict == verdict
    assert paper_verdict(records).reason


def test_a_claim_with_one_arm_is_not_a_verdict():
    assert paper_verdict([record()]).verdict == "failed"
    assert "control arm has not run" in paper_verdict([record()]).reason


def test_parameter_sets_of_the_headline_count_together():
    sets = both(params="1") + both(params="2", **NULL)
    assert paper_verdict(sets).verdict == "in part"
    assert paper_verdict(both(params="1", **NULL) + both(params="2", **NULL) + both(test="b", line=9)).verdict == "not reproduced"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        store.write_json(tmp_path / "record.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o640
