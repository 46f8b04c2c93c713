"""Imports point one way: claims to fixtures, impl and kernels; impl to kernels; nobody back."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"claims", "fixtures", "impl", "kernels", "reports", "tests"}
FORBIDDEN = {
    "kernels": PARTS - {"kernels"},
    "impl": PARTS - {"impl", "kernels"},
    "fixtures": {"claims", "reports", "tests"},
    "reports": {"claims", "tests"},
    "claims": {"claims", "reports", "tests"},
}
# What a library module may import when it is imported; other packages only inside the function that needs them.
LIBRARY = {"numpy", "paperclaims", "scipy", "torch"}


def imported(path: Path, inside: bool = True) -> set[str]:
    """Names of the modules that a file imports; with `inside` also those imported in functions.

    Relative imports are resolved, `from package import module` gives `package.module` too.
    """
    names = set()
    package = ["paperclaims", *path.relative_to(ROOT).parts[:-1]]
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), str(path))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names.update([source, *(f"{source}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in ("import_module", "__import__"):
            names.update(argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
        if inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))
    return names


def reaches(names: set[str], parts: set[str]) -> set[str]:
    """Those names that lie in one of the project's parts, under its import name or as bare folders."""
    return {name for name in names if set(name.removeprefix("paperclaims.").split(".")[:1]) & parts and _ours(name)}


def _ours(name: str) -> bool:
    return name.startswith("paperclaims.") or name.split(".")[0] in PARTS


def modules(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_point_one_way(part):
    wrong = {path.relative_to(ROOT).as_posix(): reaches(imported(path), FORBIDDEN[part]) for path in modules(part)}
    assert not {path: names for path, names in wrong.items() if names}


@pytest.mark.parametrize("part", ["impl", "kernels"])
def test_library_imports_without_the_suite(part):
    allowed = LIBRARY | set(sys.stdlib_module_names) | ({"triton"} if part == "kernels" else set())
    tops = {path.relative_to(ROOT).as_posix(): {n.split(".")[0] for n in imported(path, inside=False)} for path in modules(part)}
    assert not {path: names - allowed for path, names in tops.items() if names - allowed}


def test_imports_use_the_one_name():
    """`from paperclaims.impl.x.y import z`: never relative, never the bare folder, whose name belongs to other projects."""
    wrong = {}
    for path in (path for part in PARTS for path in modules(part)):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        bare = [name for name in imported(path) if name.split(".")[0] in PARTS]
        if relative or bare:
            wrong[path.relative_to(ROOT).as_posix()] = relative + bare
    assert not wrong


def test_folders_are_namespace_packages():
    assert not [path.relative_to(ROOT).as_posix() for part in PARTS for path in (ROOT / part).rglob("__init__.py")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import paperclaims.claims.losses.test_x", True),
        ("from paperclaims import claims", True),
        ("from paperclaims.claims import losses", True),
        ("from ..claims.losses import test_x", True),
        ("from claims.losses import test_x", True),
        ("def f():\n    from paperclaims.claims import losses", True),
        ("import importlib\nimportlib.import_module('paperclaims.claims.x')", True),
        ("from paperclaims.impl.claims import x", False),
        ("import torch.claims", False),
        ("from paperclaims.kernels import x", False),
    ],
)
def test_the_walk_sees_every_form(source, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "impl").mkdir()
    (tmp_path / "impl" / "x.py").write_text(source)
    assert bool(reaches(imported(tmp_path / "impl" / "x.py"), {"claims"})) is expected


def test_imports_in_functions_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "x.py").write_text("import torch\nif True:\n    import scipy\ndef f():\n    import sklearn\n")
    assert imported(tmp_path / "x.py", inside=False) == {"torch", "scipy"}
    assert imported(tmp_path / "x.py") == {"torch", "scipy", "sklearn"}
