"""Tests hand parts in: few look at private attributes or patch what they test, and their number doesn't grow."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[2]
OWN = ("self", "cls")
MAX_PRIVATE, MAX_PATCHES = 20, 8


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_uses(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each use of a private attribute of something else, and of each import of a private name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in OWN):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from (node.lineno for name in node.names if _is_private(name.name))


def patches(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each call or assignment that replaces an attribute of a module or a class."""
    imported = {
        (name.asname or name.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _replaces(node, imported):
            yield node.lineno
        elif isinstance(node, ast.Assign):
            yield from (node.lineno for target in node.targets if _is_of(target, imported))


def _replaces(call: ast.Call, imported: set[str]) -> bool:
    name = ast.unparse(call.func)
    if name == "setattr" or (name.startswith("vars(") and name.endswith(".update")):
        return _is_of(call.args[0] if name == "setattr" else call.func, imported)
    if name.endswith("patch.dict"):
        return ast.unparse(call.args[0]) != "os.environ"
    return name.endswith((".setattr", ".patch", "patch.object")) or name == "patch"


def _is_of(node: ast.AST, imported: set[str]) -> bool:
    """Return whether it is something imported, an attribute of it, or an entry of its `vars`."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        if isinstance(node, ast.Subscript) and not isinstance(node.value, ast.Call):
            return False  # of a mapping, as the environment is one
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) != "vars":
                return False
            node = node.args[0]
        else:
            node = node.value
    return isinstance(node, ast.Name) and node.id in imported


def found(look: object) -> list[str]:
    assert callable(look)
    return [
        f"{path.relative_to(TESTS)}:{line}"
        for path in sorted(TESTS.rglob("*.py"))
        for line in look(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_few_private_attributes() -> None:
    uses = found(private_uses)
    assert len(uses) <= MAX_PRIVATE, "\n".join(uses)


def test_few_patches() -> None:
    uses = found(patches)
    assert len(uses) <= MAX_PATCHES, "\n".join(uses)


def test_the_counting_sees_what_it_should() -> None:
    tree = ast.parse(
        """
import os, a.b
from c import D, _hidden
from __future__ import annotations
x = D()._private
self._own = self._other = D.__name__
monkeypatch.setattr(os, "fsync", None)
mock.patch("os.fsync")
vars(a.b)["name"] = None
vars(a.b).update(name=None)
D.method = None
x.field = 1
os.environ["x"] = "y"
setattr(x, "field", 1)
setattr(D, "field", 1)
"""
    )
    assert list(private_uses(tree)) == [3, 5]
    assert sorted(patches(tree)) == [7, 8, 9, 10, 11, 15]
