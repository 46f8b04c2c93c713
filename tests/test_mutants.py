"""The mutants: what is broken and what is left alone, and whole runs on a small checkout."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paperclaims.fixtures.runs import mutants
from paperclaims.fixtures.runs.mutation import mutations

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = (ROOT / "conftest.py").read_text()
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")


# Where a source can be broken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "operator", "expected"),
    [
        ("a + b", "arithmetic", {"a - b"}),
        ("a*b", "arithmetic", {"a/b"}),
        ("(a + (b))  ** c", "arithmetic", {"(a - (b))  ** c", "(a + (b))  * c"}),
        ("x -= f(1)", "arithmetic", {"x += f(1)"}),
        ("a < b <= c", "comparison", {"a <= b <= c", "a > b <= c", "a < b < c", "a < b >= c"}),
        ("a not in b", "comparison", {"a in b"}),
        ("a is b", "comparison", {"a is not b"}),
        ("a and b or c", "logic", {"a or b or c", "a and b and c"}),
        ("x = a if b > c else d", "condition", {"x = a if not (b > c) else d"}),
        ("x = [a for a in b if a]", "condition", {"x = [a for a in b if not (a)]"}),
        ("if a == b: c()", "condition", set()),  # the same as a != b
        ("not a", "condition", {"a"}),
        ("f(2, 0.5, 0.0, True, 1j, 'a')", "constant", {f"f({x}, 1j, 'a')" for x in (
            "3, 0.5, 0.0, True", "2, 1.0, 0.0, True", "2, 0.5, 1.0, True", "2, 0.5, 0.0, False")}),
        ("x[-1]", "sign", {"x[1]"}),
        ("-(a - b)", "sign", {"(a - b)"}),
        ("a + b * c", "term", {"a", "(b * c)", "a + b", "a + c"}),
        ("a / b - c", "term", {"(a / b)", "a - c"}),
        ("a or b or c", "term", {"(b or c)", "(a or c)", "(a or b)"}),
        ("f(a, g(b), c)", "arguments", {"f(g(b), a, c)"}),
        ("f(a, a); f(*a, b)", "arguments", set()),
        ("f(a, dim=0, keepdim=c)", "keyword", {"f(a, keepdim=c)", "f(a, dim=0)"}),
        ("f(dim=(0),)", "keyword", {"f()"}),
        ("f(a, device=b, **c)", "keyword", set()),
        ("x[i] = a", "statement", {"pass"}),
        ("x = a", "statement", set()),
        ("f(a)", "statement", {"pass"}),
        ("min(a.sum(), key=max)", "twin", {"max(a.sum(), key=max)", "min(a.mean(), key=max)", "min(a.sum(), key=min)"}),
        ("floor(sum(a))", "twin", set()),  # only methods, but for built-in ones
    ],
)  # fmt: skip
def test_faults(source, operator, expected):
    found = [m for m in mutations(source) if m.operator == operator]
    assert {m.apply(source) for m in found} == expected
    assert len(found) == len(expected)


def test_what_is_left_alone():
    source = '''
"""1 + 1"""
__all__ = ["a", "b"]
@decorate(1 + 1, tuned=2)
def f(a: Literal[1, 2], *, b: "int" = None) -> Literal[1] | None:
    """a + b"""
    c: Literal[1] = a
    raise ValueError(f"{a + 1}" "-1" % (b or c))
    print(f"{a + 1:>{b * 2}}")
'''
    assert [(m.operator, m.mutated) for m in mutations(source)] == [("statement", "pass")]


def test_a_fault_says_where_it_is_and_what_it_does():
    source = "x = 1\nif x:\n    «ä» = {'ß': y - (\n        2 *   z)}\n".replace("«ä»", "ä")
    found = next(m for m in mutations(source) if m.operator == "arithmetic" and m.text == "+")
    assert (found.line, found.column, found.line_text) == (3, 16, "ä = {'ß': y - (")
    assert (found.original, found.mutated) == ("y - ( 2 * z)", "y + ( 2 * z)")
    assert found.apply(source) == source.replace("-", "+")


@pytest.mark.parametrize("path", sorted((ROOT / "impl").rglob("*.py")), ids=lambda path: path.stem)
def test_mutants_of_the_library_are_python(path):
    source = path.read_text(encoding="utf-8")
    for mutant in {mutant.operator: mutant for mutant in mutations(source)}.values():  # one of each kind
        assert mutant.apply(source) != source
        compile(mutant.apply(source), path, "exec")


def test_the_sample_is_reproducible_and_spread():
    possible = {"a": mutations("x = [" + "1, " * 60 + "]"), "b": mutations("x = [" + "1, " * 30 + "]"), "c": []}
    drawn = mutants.sample(possible, 10, seed=3)
    assert drawn == mutants.sample(possible, 10, seed=3)
    assert drawn != mutants.sample(possible, 10, seed=4)
    assert [module for module, _ in drawn] == ["a"] * 7 + ["b"] * 3
    assert len({(module, mutant) for module, mutant in drawn}) == 10
    assert len(mutants.sample(possible, 1000, seed=0)) == 90
    assert mutants.sample({"a": []}, 5, seed=0) == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "equivalent_mutants").glob("*.toml")), ids=lambda path: path.stem)
def test_mutants_named_as_equivalent_are_possible(path):
    paper = mutants.papers(ROOT, slug=path.stem)[0]
    sources = {module: (ROOT / module).read_text(encoding="utf-8") for module in paper.modules}
    known = {mutants.identity(module, mutant) for module, source in sources.items() for mutant in mutations(source)}
    assert not mutants.equivalents(ROOT, path.stem).keys() - known


# Whole runs -------------------------------------------------------------------------------------------------------------------

MODULE = '''"""A method."""

def shifted_mean(values, shift=0.5):
    """Mean of the values, shifted."""
    count, total = 0, 0.0
    while count < len(values):
        total += values[count]
        count += 1
    return total / count + shift

def spare(x):
    return abs(x + 0) + 3
'''
TESTS = """
from paperclaims.impl.topic.toy import shifted_mean

def test_mean():
    assert shifted_mean([1.0, 2.0, 6.0], 0.0) == 3.0
"""
CLAIMS = """
from paperclaims.fixtures.protocol import claim
from paperclaims.impl.topic.toy import shifted_mean

@claim("It shifts.", scale="paper", control="no shift")
def test_it_shifts(arm, evidence):
    evidence.require("shift", shifted_mean([1.0], *[0.0] * arm.control) - 1.0, between=(0.4, 0.6))
"""
EQUIVALENTS = '''
[[equivalent]]
module = "impl/topic/toy.py"
line = "return abs(x + 0) + 3"
original = "x + 0"
mutated = "x - 0"
reason = "zero has no sign that abs() keeps"

[[equivalent]]
module = "impl/topic/toy.py"
line = "return 7"
original = "7"
mutated = "8"
reason = "not there any more"
'''  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one paper in it; its method, a test, a claim and the fixtures of this one."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "fixtures", root / "fixtures", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "conftest.py", root / "conftest.py")
    for path, text in {
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]',
        "impl/topic/toy.py": MODULE,
        "tests/impl/test_toy.py": TESTS,
        "tests/equivalent_mutants/toy.toml": EQUIVALENTS,
        "claims/topic/test_toy.py": CLAIMS,
        "claims/topic/test_without_module.py": CLAIMS,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def start(root, *arguments, **environment):
    """The command in a process of its own."""
    script = f"import sys, types; p = sys.modules['paperclaims'] = types.ModuleType('p'); p.__path__ = [{str(ROOT)!r}]\n"
    script += "from paperclaims.fixtures.runs import mutants; sys.exit(mutants.main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", script, "--root", str(root), "--out", str(root.parent / "out"), *arguments]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        command, env=os.environ | {"COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment, **told
    )


def fingerprint(root):
    return {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


@needs_fork
def test_mutants_are_noticed_by_tests_then_claims_or_survive(checkout):
    before = fingerprint(checkout)
    process = start(checkout, "--sample", "0", "--workers", "2", "--timeout", "2", "--least", "0.95")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert fingerprint(checkout) == before
    assert (checkout.parent / "out" / "toy.json").exists(), output
    result = json.loads((checkout.parent / "out" / "toy.json").read_text())
    found = {(m["original"], m["mutated"]): m for m in result["mutants"]}

    def outcome(original, mutated):
        mutant = found[original, mutated]
        return mutant["outcome"], (mutant["noticed_by"] or "").rpartition("/")[2], mutant["reason"]

    assert outcome("total / count", "total * count")[:2] == ("noticed", "test_toy.py::test_mean")
    assert "assert" in outcome("total / count", "total * count")[2]
    assert outcome("count += 1", "pass") == ("noticed", "test_toy.py::test_mean", "took too long")
    assert outcome("0.5", "1.0")[:2] == ("noticed", "test_toy.py::test_it_shifts[claim]")
    assert outcome("3", "4") == ("survived", "", "")
    assert outcome("x + 0", "x - 0") == ("equivalent", "", "zero has no sign that abs() keeps")
    assert result["modules"] == [{"module": "impl/topic/toy.py", "possible": 23, "sampled": 23}]
    counts = [sum(m["outcome"] == kind for m in result["mutants"]) for kind in ("noticed", "survived")]
    assert (result["noticed"], result["counted"]) == (counts[0], sum(counts))
    assert result["interval"][0] < counts[0] / sum(counts) < result["interval"][1]
    assert result["sources"]["files"][0] == "claims/topic/test_toy.py"
    assert result["machine"]["cores"] == os.cpu_count()
    lines = output.splitlines()
    assert "survived  impl/topic/toy.py:12  3  ->  4" in lines
    assert "named as equivalent, but not possible any more: impl/topic/toy.py: return 7" in lines
    assert any(line.startswith(f"noticed {counts[0]} of {sum(counts)}: ") for line in lines)


@needs_fork
def test_a_run_that_is_killed_leaves_the_checkout_as_it_was(checkout, tmp_path):
    flag = tmp_path / "broken"
    hang = f"""
if shifted_mean([1.0], 0.0) != 1.0:
    import os, pathlib, time
    pathlib.Path({str(flag)!r}).write_text(str(os.getpid()))
    time.sleep(600)
"""
    (checkout / "tests" / "impl" / "test_toy.py").write_text(TESTS + hang)
    before = fingerprint(checkout)
    process = start(checkout, "--sample", "0", "--workers", "1", "--timeout", "600", TMPDIR=str(tmp_path))
    wait_for(lambda: flag.exists() and flag.read_text())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert fingerprint(checkout) == before
    if sys.platform == "linux":
        wait_for(lambda: not alive(flag.read_text()))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@needs_fork
@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("tests/impl/test_toy.py", TESTS.replace("3.0\n", "4.0\n"), "toy fails unbroken: tests/impl/test_toy.py::test_mean"),
        ("claims/topic/test_toy.py", CLAIMS.replace("0.4, 0.6", "-1, 1"), "toy fails unbroken: claims/topic/test_toy.py"),
        ("kernels/topic/toy_unused.py", "X = 1", "toy: no test imports kernels/topic/toy_unused.py"),
        ("conftest.py", CONFTEST.replace("[str(ROOT)]", f"[{str(ROOT)!r}, str(ROOT)]"), "which is not the copy's"),
    ],
    ids=["a test fails", "a claim fails", "a module is not used", "another checkout is imported"],
)
def test_without_a_sound_start_there_are_no_mutants(checkout, path, text, message):
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text(text)
    process = start(checkout, "--workers", "1")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert message in output
    assert not (checkout.parent / "out").exists()


def test_a_name_that_matches_nothing(checkout, capsys):
    with pytest.raises(SystemExit) as ended:
        mutants.main(["--root", str(checkout), "--paper", "without_module"])
    assert ended.value.code == 2
    assert "no encoded paper with a module of its own: without_module" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry", ["module = 'a'", "module = 'a'\nline = 'b'\noriginal = 'c'\nmutated = 'd'\nreason = ''", "lines = 'a'"]
)
def test_an_equivalent_mutant_has_all_texts_and_a_reason(checkout, entry):
    (checkout / "tests" / "equivalent_mutants" / "toy.toml").write_text(f"[[equivalent]]\n{entry}")
    with pytest.raises(ValueError, match=r"toy\.toml"):
        mutants.equivalents(checkout, "toy")
