"""The diagrams, held against the code that they show, and the pictures against their sources."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from bilm_api.constants import Reason
from bilm_server.config import ServerConfig

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "docs" / "diagrams"
SOURCES = {path.stem: path for path in FOLDER.glob("*.puml")}
SEQUENCES = sorted(set(SOURCES) - {"classes"})
OUTSIDE = {"caller", "callers", "balancer", "supervisor"}
CODE = (ROOT / "server" / "bilm_server", ROOT / "model" / "bilm_model" / "engine")

Names = dict[str, set[str]]


@dataclass
class Code:
    """What the packages hold.

    Attributes:
        members: methods and attributes of each class, functions of each module.
        seen: for each class, the names that stand in its module.
    """

    members: Names = field(default_factory=dict)
    seen: Names = field(default_factory=dict)


@cache
def code() -> Code:
    found = Code()
    for path in (path for folder in CODE for path in sorted(folder.glob("*.py"))):
        module = ast.parse(path.read_text(encoding="utf-8"))
        found.members[path.stem] = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        names = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
        names |= {alias.name for node in ast.walk(module) if isinstance(node, ast.ImportFrom) for alias in node.names}
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        for node in classes:
            found.members[node.name] = set(members_of(node))
            found.seen[node.name] = names | {other.name for other in classes}
    return found


def members_of(node: ast.ClassDef) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            yield part.name
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield part.attr


def text_of(name: str) -> str:
    return SOURCES[name].read_text(encoding="utf-8")


def lines_of(name: str) -> list[str]:
    return [line.strip() for line in text_of(name).splitlines()]


@pytest.fixture(scope="module")
def shown() -> Names:
    """The classes of the class diagram with their members."""
    blocks = re.findall(
        r"^ *(?:class|interface) (\w+)(?: <<\w+>>)?(?: \{\n(.*?)\n *\})?$", text_of("classes"), re.M | re.S
    )
    return {name: set(re.findall(r"^ *(\w+)(?:\(\))?$", body, re.M)) for name, body in blocks}


# ---- the class diagram ----


def test_every_class_and_member_is_in_the_code(shown: Names) -> None:
    assert len(shown) == len(re.findall(r"^ *(?:class|interface) ", text_of("classes"), re.M)) > 20
    for name, members in shown.items():
        assert members <= code().members.get(name, set()), name
        assert name in code().seen


def test_methods_and_attributes_are_told_apart(shown: Names) -> None:
    written = set(re.findall(r"^    (\w+)\(\)$", text_of("classes"), re.M))
    methods = {
        node.name
        for path in (path for folder in CODE for path in folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any(isinstance(by, ast.Name) and by.id == "property" for by in node.decorator_list)
    }
    assert written
    assert written <= methods


def test_every_relation_is_in_the_code(shown: Names) -> None:
    found = []
    for line in lines_of("classes"):
        relation = re.fullmatch(r'(\w+) (\*--|-->|\.\.>|<\|\.\.) (?:"[^"]*" )?(\w+)(?: : .*)?', line)
        assert (relation is None) == (not re.search(r"--|\.\.", line)), line
        if relation is None:
            continue
        left, arrow, right = relation.groups()
        found.append(line)
        assert {left, right} <= shown.keys(), line
        if arrow == "<|..":
            assert {name for name in code().members[left] if not name.startswith("_")} <= code().members[right], line
        else:
            assert right in code().seen[left], line
    assert len(found) > 20


# ---- the sequence diagrams ----


def participants(name: str) -> dict[str, str]:
    """What each is called in the diagram, and in the code."""
    found = {}
    for line in lines_of(name):
        if match := re.fullmatch(r'(?:actor|participant) (?:"(\w+)[^"]*"(?: as (\w+))?|(\w+))', line):
            found[match[2] or match[1] or match[3]] = match[1] or match[3]
    return found


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_participant_and_message_is_in_the_code(name: str) -> None:
    who, n_methods = participants(name), 0
    assert set(who.values()) - OUTSIDE <= code().members.keys()
    for line in lines_of(name):
        message = re.fullmatch(r"(\w+) (-->|->x|->) (\w+) : (.*)", line)
        assert (message is None) == ("->" not in line), line
        if message is None:
            continue
        sender, arrow, receiver, text = message.groups()
        assert {sender, receiver} <= who.keys(), line
        methods = set(re.findall(r"\b(\w+)\(\)", text)) if arrow == "->" else set()
        assert methods <= code().members.get(who[receiver], set()), line
        n_methods += len(methods)
    assert n_methods >= 5


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_named_exists(name: str) -> None:
    text = text_of(name).replace("\\n", "\n")
    for owner, member in re.findall(r"\b([A-Z]\w+)\.(\w+)\(\)", text):
        assert member in code().members[owner]
    flags = {flag.replace("-", "_") for flag in re.findall(r"(?<!\S)--([a-z][a-z-]+)", text)}
    assert flags <= set(ServerConfig.model_fields)
    assert set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)) <= {*Reason, "NOT_SERVING"}


# ---- the pictures ----


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SOURCES)
def test_the_picture_was_made_of_the_source(name: str, render: ModuleType) -> None:
    svg = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    # The only comment: PlantUML's own ones tell of the machine
    assert re.findall(r"<!--(.*?)-->", svg, re.S) == [f" source: {render.source_hash(SOURCES[name])} "], "make diagrams"


@pytest.mark.parametrize("name", SOURCES)
def test_the_picture_shows_everybody(name: str, shown: Names) -> None:
    """Without Graphviz, PlantUML draws its complaint and calls that a success."""
    tree = ElementTree.fromstring((FOLDER / f"{name}.svg").read_bytes())
    texts = {element.text for element in tree.iter() if element.tag.endswith("}text")}
    assert set(participants(name).values()) | (set(shown) if name == "classes" else set()) <= texts


@pytest.mark.parametrize("name", SOURCES)
def test_the_picture_has_white_paper_and_tells_nothing_of_the_machine(name: str) -> None:
    tree = ElementTree.fromstring((FOLDER / f"{name}.svg").read_bytes())
    paper = tree[0]
    assert (paper.tag.rpartition("}")[2], paper.get("width"), paper.get("fill")) == ("rect", "100%", "#FFFFFF")
    for element in tree.iter():
        for text in (element.text or "", *element.attrib.values()):
            assert re.search(r"(^|[\s\"'(])(/|~/|[A-Z]:\\|file:)\w", text) is None


def test_every_picture_has_a_source_and_a_link() -> None:
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(SOURCES)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(diagrams/(\w+)\.svg\)", page)) == set(SOURCES)
