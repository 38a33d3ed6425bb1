from pathlib import Path

import pytest
from bilm_model.config import SIZES
from bilm_model.errors import ConfigError
from bilm_training.recipe import PRESETS, Recipe, read_recipe, to_toml

from tests.unit.training.training_support import TINY, write, write_recipe

TEXTS = ("data.train=a", "data.valid=b")


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    return read_recipe(str(write(folder / "recipe.toml", text)), overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_read_and_written_back(tmp_path: Path, name: str) -> None:
    recipe = read_recipe(name, TEXTS)
    assert (recipe.data.train, recipe.data.valid) == (Path("a"), Path("b"))
    if name in SIZES:
        assert recipe.architecture == SIZES[name]
    written = to_toml(recipe)
    assert "cell_clip" in written  # defaults, too
    assert read(tmp_path, written) == recipe


def test_a_file_with_everything_in_it_is_written_back(tmp_path: Path) -> None:
    recipe = read_recipe(str(write_recipe(tmp_path)), ["data.max_words=17", "softmax.kind=full", "data.train=é ü"])
    assert recipe.architecture == TINY
    assert (recipe.data.max_words, recipe.softmax.kind, recipe.data.train) == (17, "full", Path("é ü"))
    assert read(tmp_path, to_toml(recipe)) == recipe


def test_an_override_beats_the_file_and_the_file_its_preset(tmp_path: Path) -> None:
    preset = read_recipe("mini", TEXTS)
    text = 'preset = "mini"\nseed = 9\n[data]\ntrain = "t"\nvalid = "v"\n[optimisation]\nbatch = 5\nepochs = 6\n'
    recipe = read(tmp_path, text, "optimisation.epochs=7", "data.valid = w", "softmax.cutoffs=[3, 5]")
    assert (recipe.seed, recipe.data.train, recipe.data.valid) == (9, Path("t"), Path("w"))
    assert (recipe.optimisation.batch, recipe.optimisation.epochs) == (5, 7)
    assert recipe.softmax.cutoffs == (3, 5)
    # what neither mentions is the preset's
    assert recipe.optimisation.model_copy(update={"batch": preset.optimisation.batch, "epochs": 8}) == (
        preset.optimisation.model_copy(update={"epochs": 8})
    )
    assert recipe.architecture == preset.architecture


def test_the_last_override_of_a_key_counts() -> None:
    assert read_recipe("mini", [*TEXTS, "seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set seed: expected key=value, like "),
        ("=3", r"--set =3: expected key=value, like "),
        ("optimisation.=3", r"--set optimisation\.=3: expected key=value, like "),
        ("data.train.x=3", r"--set data\.train\.x=3: train is a value, not a section"),
        ("seed=many", r"mini: seed: .*integer"),
        ("softmax.cutoffs=[5, 3]", r"mini: softmax: .*each above the last, found \(5, 3\)"),
        ("softmax.cutoffs=[0]", r"mini: softmax: .*positive"),
        ("softmax.divisor=100", r"mini: .*softmax: divided by 100 for each of 3 clusters, nothing is left of .*128"),
        ("nothing=1", r"mini: nothing: Extra inputs"),
        ("optimisation.nothing=1", r"mini: optimisation\.nothing: Extra inputs"),
        ("optimisation.learning_rate=nan", r"mini: optimisation\.learning_rate: "),
        ("seed=99999999999999999999", r"mini: seed: "),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_recipe("mini", [*TEXTS, override])


def test_every_error_is_listed(tmp_path: Path) -> None:
    text = """
preset = "mini"
seed = -1
[data]
train = "a"
[architecture]
projection_dim = 9999
[optimisation]
epochs = 0
dropout = 1.0
optimizer = "adam"
precision = "float16"
"""
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    lines = str(error.value).splitlines()
    keys = [line.removeprefix(f"{tmp_path}/recipe.toml: ").partition(":")[0] for line in lines]
    assert sorted(keys) == [
        "architecture",
        "data.valid",
        "optimisation.dropout",
        "optimisation.epochs",
        "optimisation.optimizer",
        "optimisation.precision",
        "seed",
    ]
    assert any("projection_dim: expected at most 512 (dim), found 9999" in line for line in lines)


def test_a_structure_with_a_key_too_many_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.toml: architecture\.n_layer: Unexpected"):
        read(tmp_path, 'preset = "mini"\n[architecture]\nn_layer = 3\n', *TEXTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('preset = "large"\n', r"recipe\.toml: preset: expected one of mini, .*, found 'large'"),
        ("seed = \n", r"recipe\.toml: .*line 1"),
        (b"seed = 1 # \xff\n", r"recipe\.toml: .*utf-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(str(write(tmp_path / "recipe.toml", text)))


def test_what_is_neither_file_nor_preset_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^large: neither a file nor a preset \(mini, small, medium, original, student\)$"
    ):
        read_recipe("large")
    with pytest.raises(ConfigError, match=f"^{tmp_path}: Is a directory$"):
        read_recipe(str(tmp_path))


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = 'preset = "mini"\r\nseed = 5\r\ndata.train = "a"\r\ndata.valid = "b"\r\n'
    (path := tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_recipe(str(path)).seed == 5
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigError, match="recipe.toml: the text is UTF-16"):
        read_recipe(str(path))
