import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bilm_model.bilm import Bilm
from bilm_model.config import SIZES, Residual, from_options, to_options
from bilm_model.errors import ConfigError
from bilm_model.weights.options import read_options


@pytest.mark.parametrize(("size", "count"), [("small", 13_593_296), ("medium", 28_027_728), ("original", 93_600_848)])
def test_named_sizes_are_the_published_models(size: str, count: int) -> None:
    with torch.device("meta"):
        assert Bilm(SIZES[size]).parameter_count == count


@pytest.mark.parametrize("size", SIZES)
def test_options_round_trip(size: str) -> None:
    assert from_options(json.loads(json.dumps(to_options(SIZES[size])))) == SIZES[size]


@pytest.mark.parametrize("residual", get_args(Residual))
def test_residuals_round_trip(residual: Residual) -> None:
    config = replace(SIZES["small"], residual=residual)
    options = to_options(config)
    assert from_options(options) == config
    assert options["lstm"]["use_skip_connections"] == (residual == "published")
    # What the published options can say is written as ever, and so the models' versions stay
    assert options["lstm"].get("residual") == ("input_to_input" if residual == "input_to_input" else None)
    assert from_options({**options, "lstm": {**options["lstm"], "residual": residual}}) == config


def test_a_residual_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"residual: expected one of .*, found 'sideways'"):
        replace(SIZES["tiny"], residual="sideways")  # type: ignore[arg-type]


def test_training_options_count_one_character_less() -> None:
    options = to_options(SIZES["small"])
    options["char_cnn"]["n_characters"] = 261
    assert from_options(options) == SIZES["small"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lstm.dim", None, "lstm.dim: missing"),
        ("lstm.dim", "512", "lstm.dim: expected a number, found '512'"),
        ("lstm.dim", 0.5, "lstm.dim: expected a whole number"),
        ("lstm.n_layers", 0, "n_layers: expected at least 1, found 0"),
        ("lstm.cell_clip", float("nan"), "cell_clip: expected a positive number"),
        ("lstm.use_skip_connections", 1, "lstm.use_skip_connections: expected true or false"),
        ("lstm.residual", "sideways", "lstm.residual: expected one of"),
        ("lstm.residual", ["none"], "lstm.residual: expected one of"),
        (
            "lstm.residual",
            "input_to_input",
            "lstm.use_skip_connections: expected false beside lstm.residual 'input_to_input', found True",
        ),
        ("lstm.residual", "none", "lstm.use_skip_connections: expected false beside lstm.residual 'none', found True"),
        ("lstm.projection_dim", 8192, "projection_dim: expected at most 4096"),
        ("char_cnn.filters", [], "filters: expected at least one"),
        ("char_cnn.filters", [[51, 3]], "filters: expected widths from 1 to 50, found 51"),
        ("char_cnn.filters", "wide", "char_cnn.filters: expected a list"),
        ("char_cnn.activation", "gelu", "activation: expected one of"),
        ("char_cnn.n_characters", 300, "char_cnn.n_characters: expected 262"),
        ("char_cnn.max_characters_per_token", 40, "max_characters_per_token: expected 50"),
        ("char_cnn.embedding", 4, "char_cnn.embedding: expected an object"),
    ],
)
def test_bad_options_are_named(key: str, value: Any, message: str) -> None:
    options = copy.deepcopy(to_options(SIZES["original"]))
    section, name = key.split(".")
    if value is None:
        del options[section][name]
    else:
        options[section][name] = value
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        from_options(options)


def test_a_published_residual_that_skips_nothing() -> None:
    options = to_options(replace(SIZES["tiny"], residual="none"))
    options["lstm"]["residual"] = "published"
    with pytest.raises(ConfigError, match="expected true beside lstm.residual 'published', found False"):
        from_options(options)


def test_unreadable_options(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    for content in (b"{", b"[]", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="options"):
            read_options(path)
    with pytest.raises(ConfigError, match="nowhere"):
        read_options(tmp_path / "nowhere.json")
