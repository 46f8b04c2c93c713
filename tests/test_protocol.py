"""The protocol, seen from outside: small suites run by pytest itself."""

import json
import signal

import pytest

from paperclaims.tests.suite import HEADER, Suite, body

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester, monkeypatch):
    return Suite(pytester, monkeypatch)


def test_a_claim_passes_when_it_is_met_and_its_control_contradicted(suite):
    suite.paper("alpha", body("evidence.require('gain', interval(-1, 0) if arm.control else interval(2, 3), above=1)"))
    suite.run().assert_outcomes(passed=2)
    assert suite.outcomes() == {"test_it[claim]": "passed", "test_it[control]": "passed"}


@pytest.mark.parametrize(
    ("requirement", "breaks", "message"),
    [
        ("evidence.require('gain', interval(2, 3), above=1)", "()", "*'gain' is met*"),
        ("evidence.require('gain', interval(0, 3) if arm.control else 2, above=1)", "()", "*'gain' is inconclusive*"),
        (
            "evidence.require('a', 2, above=1); evidence.require('b', 0 if arm.control else 2, above=1)",
            "'a'",
            "*'a' is met*",
        ),
        (
            "[evidence.require(name, 0 if arm.control else 2, above=1) for name in 'ab']",
            "'a'",
            "*also breaks 'b'*",
        ),
        ("evidence.require('gain', 1 / 0 if arm.control else 2, above=1)", "()", "*ZeroDivisionError*"),
        ("evidence.require('gain', float('nan') if arm.control else 2, above=1)", "()", "*not finite*"),
        ("evidence.require('gain', float('-inf') if arm.control else 2, above=1)", "()", "*not finite*"),
    ],
    ids=["meets the rule", "undecided", "breaks another", "breaks one more", "crashes", "measures NaN", "measures -inf"],
)
def test_a_control_that_does_not_contradict_what_it_has_to_fails_the_run(suite, requirement, breaks, message):
    suite.paper("alpha", body(requirement, breaks=breaks))
    result = suite.run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines([message])
    records = suite.records()
    assert records["test_it[claim]"]["outcome"] == "passed"
    assert records["test_it[control]"]["outcome"] in ("failed", "crashed")


@pytest.mark.parametrize(
    ("mark", "claim_value", "passed"),
    [
        ("", "interval(2, 3)", True),
        ("", "interval(0, 3)", False),
        ("", "interval(0, 0.5)", False),
        ("@not_reproduced('no gain')", "interval(0, 0.5)", True),
        ("@not_reproduced('no gain')", "interval(0, 3)", False),
        ("@not_reproduced('no gain')", "interval(2, 3)", False),
        ("@inconclusive('too small')", "interval(0, 3)", True),
        ("@inconclusive('too small')", "interval(2, 3)", False),
        ("@inconclusive('too small')", "interval(0, 0.5)", False),
    ],
)
def test_the_claim_arm_has_to_bear_out_the_expected_verdict(suite, mark, claim_value, passed):
    suite.paper("alpha", body(f"evidence.require('gain', interval(0, 0.5) if arm.control else {claim_value}, above=1)", mark))
    suite.run().assert_outcomes(passed=1 + passed, failed=1 - passed)
    assert suite.outcomes() == {"test_it[claim]": "passed" if passed else "failed", "test_it[control]": "passed"}


@pytest.mark.parametrize("mark", ["not_reproduced('null')", "inconclusive('null')"])
def test_one_parameter_set_can_be_marked(suite, mark):
    value = "interval(0, 3)" if "inconclusive" in mark else "interval(0, 0.5)"
    suite.paper(
        "alpha",
        f"""
        @claim("It works.", **STATED)
        @pytest.mark.parametrize("size", [1, pytest.param(2, marks={mark})])
        def test_it(arm, size, evidence):
            value = interval(2, 3) if size == 1 else {value}
            evidence.require("gain", interval(0, 0.5) if arm.control else value, above=1)
        """,
    )
    suite.run().assert_outcomes(passed=4)
    assert suite.records()["test_it[2-claim]"]["reason"] == "null"


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("@claim('It works.', scale='paper')", "*control*"),
        ("@claim('It works.', scale='paper', control=' ')", "*a claim needs a statement and a control*"),
        ("@claim('It works.', scale='huge', control='c')", "*scale is 'huge'*"),
        ("@claim('It works.', scale='reduced', control='c')", "*differs*"),
        ("@claim('It works.', scale='paper', control='c', needs='tpu')", "*needs is 'tpu'*"),
        ("@not_reproduced('')\n@claim('It works.', scale='paper', control='c')", "*say why in a sentence*"),
        ("", "*has no control*"),
    ],
)
def test_an_incomplete_claim_is_refused_at_collection_and_hides_nobody(suite, declaration, message):
    suite.paper("alpha", "")
    path = suite.pytester.path / "claims/topic/test_alpha.py"
    path.write_text(HEADER + f"{declaration}\ndef test_it(arm, evidence):\n    evidence.require('v', 1, above=0)\n")
    suite.paper("beta", body("evidence.require('v', -1 if arm.control else 1, above=0)"))
    result = suite.run()
    result.assert_outcomes(errors=1, passed=2)
    result.stdout.fnmatch_lines([message])


def test_a_claim_without_the_arguments_of_the_protocol_is_refused(suite):
    suite.paper("alpha", "@claim('It works.', **STATED)\ndef test_it(evidence): pass")
    result = suite.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*missing: [[]'arm'[]]*"])


@pytest.mark.parametrize(
    ("requirement", "breaks", "message"),
    [
        ("pass", "()", "*made no requirement*"),
        ("[evidence.require(name, 1, above=0) for name in 'ab']", "()", "*control_breaks names nothing*"),
        ("evidence.require('a', 1, above=0)", "'b'", "*control_breaks names*'b'*"),
        ("[evidence.require('a', 1, above=0) for _ in range(2)]", "()", "*required before*"),
        ("evidence.require('a', 1)", "()", "*finite bounds*"),
        ("evidence.require('a', 1, between=(2, 1))", "()", "*finite bounds in order*"),
        ("evidence.require('a', 1, between=(0, 1), below=2)", "()", "*not both*"),
        ("evidence.require('a', 1, above=float('nan'))", "()", "*finite bounds*"),
        ("evidence.record('a', float('nan'))", "()", "*not finite*"),
        ("evidence.curve('a', [1, 2], [1])", "()", "*one length*"),
        ("evidence.curve('a', [1], [float('nan')])", "()", "*not finite*"),
    ],
)
def test_a_requirement_that_cannot_decide_is_an_error(suite, requirement, breaks, message):
    suite.paper("alpha", body(requirement, breaks=breaks))
    result = suite.run()
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines([message])


def test_bounds_are_inclusive_for_exact_numbers_and_whole_intervals_decide(suite):
    suite.paper(
        "alpha",
        """
        @claim("It works.", control_breaks="equal", **STATED)
        def test_it(arm, evidence):
            assert evidence.require("at least", 1, above=1).outcome == "met"
            assert evidence.require("at most", 1, below=1).outcome == "met"
            assert evidence.require("between", interval(0, 1), between=(0, 1)).outcome == "met"
            assert evidence.require("half in", interval(-1, 1), above=-2, below=1).outcome == "met"
            evidence.require("equal", 3 if arm.control else 2, between=(2, 2))
        """,
    )
    suite.run().assert_outcomes(passed=2)


def test_every_requirement_of_a_failing_body_is_in_the_evidence_and_on_the_terminal(suite):
    suite.paper(
        "alpha",
        """
        @claim("It works.", control_breaks="first", paper_value="71.4 % (Table 5)", **STATED)
        def test_it(arm, seeds, evidence):
            evidence.require("first", interval(0, 0.5), above=1, unit="points")
            evidence.require("second", 0 if arm.control else 7, below=8)
            evidence.record("aside", seeds(2)[0])
            evidence.curve("loss", [1, 2], [3, 4], low=[2, 3], high=[4, 5])
        """,
    )
    result = suite.run("--seed", "5")
    result.assert_outcomes(passed=1, failed=1)
    record = suite.records()["test_it[claim]"]
    assert [r["outcome"] for r in record["requirements"]] == ["contradicted", "met"]
    assert (record["seed"], len(record["seeds"])) == (5, 2)
    assert record["records"][0]["value"] == record["seeds"][0]
    assert record["curves"][0]["high"] == [4, 5]
    result.stdout.fnmatch_lines(
        [
            "*The claim does not hold here: 'first' is contradicted.*",
            "*claim arm of: It works.*",
            "*71.4 % (Table 5)*",
            "*contradicted first: 0.25 points in [[]0, 0.5[]] (99%, n = 8), required >= 1*",
            "*met*second: 7, required <= 8*",
            f"*seeds: *{record['seeds'][0]} {record['seeds'][1]} (--seed 5)*",
            "*rerun: *python -m pytest 'claims/topic/test_alpha.py::test_it[[]claim[]]' --seed 5*",
        ]
    )


DRAWS = """
    import random, numpy, torch
    @claim("It draws.", **STATED)
    @pytest.mark.parametrize("size", [1, 2])
    def test_it(arm, size, rng, seeds, evidence):
        evidence.record("rng", rng.random())
        evidence.record("seed", seeds(3)[2])
        evidence.record("global", random.random() + numpy.random.random() + torch.rand(()).item())
        evidence.require("v", 0 if arm.control else 1, above=1)
    """


def test_arms_parameters_and_workers_draw_the_same_numbers_which_seed_and_paper_move(suite):
    suite.paper("alpha", DRAWS)
    suite.paper("beta", DRAWS)

    def draws(*arguments: str) -> dict[str, set]:
        suite.run(*arguments, process=True).assert_outcomes(passed=8)
        local = "reports/evidence/local"
        return {slug: {str(r["records"]) for r in suite.records(f"{local}/{slug}").values()} for slug in ("alpha", "beta")}

    alone = draws()
    assert all(len(drawn) == 1 for drawn in alone.values())
    assert alone["alpha"] != alone["beta"]
    assert draws("-n", "2", "--dist", "loadfile") == alone
    assert draws("-n", "2", "--dist", "load") == alone
    moved = draws("--seed", "1")
    assert all(moved[slug] != alone[slug] for slug in alone)


def test_ids_are_stable_and_workers_do_not_overwrite_each_other(suite):
    for slug in ("alpha", "beta"):
        suite.paper(
            slug,
            """
            @claim("It works.", **STATED)
            @pytest.mark.parametrize("name", ["a/b", "a-claim", "x" * 90])
            @pytest.mark.parametrize("size", [-1, 2.5])
            def test_it(arm, size, name, evidence):
                evidence.record("echo", f"{name} {size} {arm}")
                evidence.require("v", 0 if arm.control else 1, above=1)
            """,
        )
    for arguments in ([], ["-n", "2", "--dist", "load"]):
        suite.run(*arguments, process=True).assert_outcomes(passed=24)
        paths = list((suite.pytester.path / "reports/evidence/local").rglob("*.json"))
        assert len(paths) == 24
        for path in paths:
            record = json.loads(path.read_text())
            name, size, arm = record["records"][0]["value"].split(" ")
            test_id = f"{size}-{name}-{arm}"
            assert record["nodeid"] == f"claims/topic/test_{path.parent.name}.py::test_it[{test_id}]"
            assert (record["arm"], record["outcome"]) == (arm, "passed")


END = {
    "failure": "evidence.require('never', 0, above=1)",
    "exception": "raise RuntimeError('broken')",
    "exit": "os._exit(3)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("workers", [False, True], ids=["one process", "xdist"])
@pytest.mark.parametrize("end", END)
def test_evidence_survives_the_end_of_the_next_claim(suite, end, workers):
    suite.paper(
        "alpha",
        f"""
        @claim("Comes first.", **STATED)
        def test_first(arm, evidence):
            evidence.require("v", 0 if arm.control else 1, above=1)

        @claim("Ends badly.", control_breaks="v", **STATED)
        def test_second(arm, evidence):
            evidence.require("v", 0 if arm.control else 1, above=1)
            if arm.control:
                {END[end]}

        @claim("Comes last.", **STATED)
        def test_third(arm, evidence):
            evidence.require("v", 0 if arm.control else 1, above=1)
        """,
    )
    result = suite.run(*(["-n", "2", "--dist", "loadfile"] if workers else []), process=True)
    outcomes = suite.outcomes()
    assert [outcomes[f"test_{which}"] for which in ("first[claim]", "first[control]", "second[claim]")] == ["passed"] * 3
    died = end in ("exit", "kill")
    if died and not workers:
        assert result.ret in (3, -signal.SIGKILL)
        assert outcomes["test_second[control]"] == "running"
        assert "test_third[claim]" not in outcomes
    else:
        result.assert_outcomes(passed=5, failed=1)
        assert outcomes["test_second[control]"] == ("failed" if end == "failure" else "crashed")
        assert outcomes["test_third[control]"] == "passed"
    if died and workers:
        assert "crashed while running" in suite.records()["test_second[control]"]["message"]


def test_a_run_ends_with_the_verdicts_and_the_slowest_papers(suite):
    suite.paper("alpha", body("evidence.require('v', 0 if arm.control else 1, above=1)"))
    suite.paper("beta", body("evidence.require('v', 0, above=1)", "@not_reproduced('null')"))
    suite.paper("gamma", body("evidence.require('v', interval(0, 2), above=1)", "@inconclusive('small')"))
    suite.paper("delta", body("pytest.skip('missing extra: pip install x')"))
    suite.paper("epsilon", body("raise RuntimeError('broken')"))
    for arguments in ([], ["-n", "2"]):
        result = suite.run(*arguments, process=True)
        result.stdout.fnmatch_lines(
            [
                "*reproduced *1*1*alpha*",
                "*not reproduced *1*1*beta*",
                "*inconclusive *1*1*gamma*",
                "*missing extra *1*1*delta*",
                "*failed *1*1*epsilon*",
                "missing extra: delta: test_it: *pip install x*",
                "failed: epsilon: test_it: *RuntimeError: broken*",
                "slowest: *",
            ]
        )


def test_claims_that_need_a_gpu_skip_without_one(suite, monkeypatch):
    suite.paper("alpha", body("evidence.require('v', 1, above=0)").replace("**STATED", "needs='cuda', **STATED"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = suite.run(process=True)
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*needs an accelerator *1*1*alpha*"])


def test_paper_selects_exactly_one_and_a_wrong_name_is_told_the_nearest(suite):
    for slug in ("alpha", "alpha_two", "beta"):
        suite.paper(slug, body("evidence.require('v', 0 if arm.control else 1, above=1)"))
    suite.run("--paper", "alpha").assert_outcomes(passed=2)
    suite.run("-k", "alpha").assert_outcomes(passed=4, deselected=2)
    result = suite.run("--paper", "alfa")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no claims for the paper 'alfa'. Nearest papers: alpha*"])
    suite.run("-k", "betta").stdout.fnmatch_lines(["*Nearest papers: beta.*"])
    assert suite.run("--seed", "-1").ret == pytest.ExitCode.USAGE_ERROR


def test_a_folder_that_cannot_be_written_is_a_clear_failure_of_the_claim(suite):
    suite.paper("alpha", body("evidence.require('v', 0 if arm.control else 1, above=1)"))
    (suite.pytester.path / "full").write_text("not a folder")
    result = suite.run("--evidence", "full")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*cannot write evidence to full/alpha*--evidence FOLDER*"])


def test_a_test_that_measures_time_has_the_machine_to_itself(suite):
    for slug in "abcd":
        mark = "@pytest.mark.serial" if slug in "bc" else ""
        suite.paper(
            slug,
            f"""
            {mark}
            @claim("It works.", **STATED)
            def test_it(arm, evidence):
                evidence.record("start", time.monotonic())
                time.sleep(0.3)
                evidence.record("end", time.monotonic())
                evidence.require("v", 0 if arm.control else 1, above=1)
            """,
        )
    suite.run("-n", "4", "--dist", "loadfile", process=True).assert_outcomes(passed=8)
    spans = {"alone": [], "shared": []}
    for slug in "abcd":
        for record in suite.records(f"reports/evidence/local/{slug}").values():
            span = tuple(entry["value"] for entry in record["records"])
            spans["alone" if slug in "bc" else "shared"].append(span)
    everything = spans["alone"] + spans["shared"]
    for start, end in spans["alone"]:
        assert sum(other_start < end and start < other_end for other_start, other_end in everything) == 1
