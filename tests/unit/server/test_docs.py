"""Pages that list what the code has, held against the code."""

import importlib.util
import re
from pathlib import Path

import pytest
from bilm_client.batch.settings import RunSettings
from bilm_server.config import ServerConfig
from bilm_training.recipe import Data, Distillation, Optimisation, Recipe, Softmax
from pydantic_settings import BaseSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("title", "settings"), [("bilm-serve", ServerConfig), ("bilm-embed", RunSettings)])
def test_every_flag_is_listed_with_its_default(title: str, settings: type[BaseSettings]) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    section = page.partition(f"## `{title}`")[2].partition("\n#")[0]
    listed = dict(re.findall(r"^\| `(--[a-z0-9-]+)` \| (.*?) \|", section, flags=re.MULTILINE))
    expected = {}
    for name, field in settings.model_fields.items():
        if field.is_required():
            continue
        shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
        expected[f"--{name.replace('_', '-')}"] = "" if shown in (None, "", ()) or shown is False else f"`{shown}`"
    assert listed == expected


def test_the_training_page_lists_every_key_of_a_recipe() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    listing = page.partition("## The recipe")[2].partition("\n#")[0]
    listed = re.findall(r"^\| `([a-z_.]+)` \| (.*?) \| (.*?) \|$", listing, flags=re.MULTILINE)
    expected = [("seed", "", Recipe.model_fields["seed"].description)]
    for section in (Data, Softmax, Optimisation, Distillation):
        for name, field in section.model_fields.items():
            default = "" if field.is_required() or field.default is None else f"`{_toml(field.default)}`"
            expected.append((f"{section.__name__.lower()}.{name}", default, field.description))
    assert listed == expected


def _toml(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("source", sorted((ROOT / "docs" / "diagrams").glob("*.puml")), ids=lambda path: path.stem)
def test_a_picture_was_made_of_its_source_and_has_a_link(source: Path) -> None:
    spec = importlib.util.spec_from_file_location("render", source.with_name("render.py"))
    assert spec is not None
    assert spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    svg = source.with_suffix(".svg").read_text(encoding="utf-8")
    assert re.findall(r"<!--(.*?)-->", svg, re.S) == [f" source: {render.source_hash(source)} "], "make diagrams"
    assert f"(diagrams/{source.stem}.svg)" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    tracked = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/bilm_*/**/*.py")]
    named = re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)+\.py)`", page.read_text(encoding="utf-8"))
    missing = [name for name in named if not (ROOT / name).exists() and not any(f"/{name}" in path for path in tracked)]
    assert missing == []
