"""One name, one thing."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDERS = ("benchmarks", "client", "model", "server", "system")


def test_no_two_classes_share_a_name() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    names = Counter(node.name for module in modules for node in ast.walk(module) if isinstance(node, ast.ClassDef))
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []
