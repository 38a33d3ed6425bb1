import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES, BilmConfig, to_options
from bilm_model.errors import ModelError, WeightsError
from bilm_model.weights import hdf5, single_file
from bilm_model.weights.convert import main
from bilm_model.weights.header import inspect
from bilm_model.weights.loading import load
from bilm_model.weights.shapes import parameter_count, parameter_shapes
from bilm_model.weights.version import content_version


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    single_file.write(path, SIZES["tiny"], random_bilm(SIZES["tiny"]).state_dict())
    return path


def test_there_and_back_is_the_same_model(golden: Path, tmp_path: Path) -> None:
    single, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    assert main([str(golden), str(single)]) == 0
    assert main([str(single), str(folder)]) == 0
    with h5py.File(golden / "weights.hdf5") as before, h5py.File(folder / "weights.hdf5") as after:
        for key, _, _ in hdf5.names(load(str(golden)).bilm.config):
            assert np.array_equal(before[key][()], after[key][()]), key
    assert load(str(golden)).version == load(str(single)).version == load(str(folder)).version


def test_float16_rounds_and_is_another_version(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    assert main([str(golden), str(path), "--dtype", "float16"]) == 0
    exact, rounded = load(str(golden)), load(str(path))
    assert exact.version != rounded.version
    for name, tensor in exact.bilm.state_dict().items():
        assert torch.equal(tensor.half().float(), rounded.bilm.state_dict()[name])


def test_two_files(golden: Path, tmp_path: Path) -> None:
    weights, options = tmp_path / "elmo_weights.hdf5", tmp_path / "elmo_options.json"
    shutil.copy(golden / "weights.hdf5", weights)
    shutil.copy(golden / "options.json", options)
    assert load(str(weights), options).version == load(str(golden)).version
    assert load(str(tmp_path)).version == load(str(golden)).version
    with pytest.raises(WeightsError, match="--options"):
        load(str(weights))


def test_a_model_is_known_without_its_weights(golden: Path, tmp_path: Path) -> None:
    single = tmp_path / "model.safetensors"
    assert main([str(golden), str(single)]) == 0
    for source in (str(golden), str(single), "random:tiny", ""):
        loaded, header = load(source), inspect(source)
        assert (header.name, header.config, header.parameter_count) == (
            loaded.name, loaded.bilm.config, loaded.bilm.parameter_count
        )  # fmt: skip


def test_files_that_do_not_go_together_are_seen_without_reading_weights(golden: Path, tmp_path: Path) -> None:
    options = json.loads((golden / "options.json").read_text(encoding="utf-8"))
    options["lstm"]["n_layers"] += 1
    (tmp_path / "options.json").write_text(json.dumps(options), encoding="utf-8")
    shutil.copy(golden / "weights.hdf5", tmp_path)
    with pytest.raises(WeightsError, match="missing, expected shape") as missing:
        load(str(tmp_path))
    with pytest.raises(WeightsError, match=re.escape(str(missing.value))):
        inspect(str(tmp_path))
    single_file.write(single := tmp_path / "a.safetensors", SIZES["tiny"], random_bilm(SIZES["tiny"]).state_dict())
    single.write_bytes(single.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        inspect(str(single))


def test_what_the_published_options_cannot_say_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SIZES["tiny"], residual="input_to_input")
    single, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    version = single_file.write(single, config, random_bilm(config).state_dict())
    assert load(str(single)).bilm.config == config
    assert main([str(single), str(folder)]) == 1
    assert "residual: expected 'published' or 'none', found 'input_to_input'" in capsys.readouterr().err
    assert not folder.exists()
    assert main([str(single), str(tmp_path / "copy.safetensors")]) == 0
    # With our own key in the options, such a folder can be read
    folder.mkdir()
    hdf5.write(folder / "weights.hdf5", config, random_bilm(config).state_dict())
    (folder / "options.json").write_text(json.dumps(to_options(config)), encoding="utf-8")
    assert load(str(folder)).version == version


def test_the_options_part_of_a_version_stays() -> None:
    """Callers pin versions, and states name them."""
    assert content_version(SIZES["tiny"], {}) == "4b21bf7632a7c4b7"
    assert content_version(replace(SIZES["tiny"], residual="none"), {}) == "5b6b9e494214fe38"


def test_an_output_is_not_overwritten_unasked(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("precious")
    assert main([str(single), str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert output.read_text() == "precious"


def _delete(file: h5py.File) -> None:
    del file["CNN_proj/W_proj"]


def _reshape(file: h5py.File) -> None:
    del file["CNN/b_cnn_0"]
    file["CNN/b_cnn_0"] = np.zeros(3, np.float32)


def _poison(file: h5py.File) -> None:
    file["char_embed"][3, 1] = np.nan


def _add(file: h5py.File) -> None:
    file["CNN_high_0/W_extra"] = np.zeros(3, np.float32)


def _integers(file: h5py.File) -> None:
    shape = file["char_embed"].shape
    del file["char_embed"]
    file["char_embed"] = np.zeros(shape, np.int32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_delete, r"CNN_proj/W_proj: missing, expected shape \(124, 16\)"),
        (_reshape, r"CNN/b_cnn_0: expected shape \(4,\), found \(3,\)"),
        (_poison, "char_embed: holds values that are not finite"),
        (_add, "CNN_high_0/W_extra: not part of the model"),
        (_integers, "char_embed: expected floating-point numbers, found int32"),
    ],
)
def test_damage_to_published_weights_is_named(
    damage: Callable[[h5py.File], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[2] / "data" / "golden" / "relu-2highway", folder)
    with h5py.File(folder / "weights.hdf5", "r+") as file:
        damage(file)
    with pytest.raises(WeightsError, match=message):
        load(str(folder))


def test_a_cut_off_published_file(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden, tmp_path / "model")
    path = tmp_path / "model" / "weights.hdf5"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(WeightsError, match="weights.hdf5"):
        load(str(tmp_path / "model"))


def _rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    path.write_bytes(save(tensors, metadata=metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("encoder.projection.bias"), r"encoder.projection.bias: missing, expected shape \(8,\)"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "extra: not part of the model"),
        (
            lambda t, m: t.update({"encoder.projection.bias": torch.zeros(9)}),
            r"encoder.projection.bias: expected shape \(8,\), found \(9,\)",
        ),
        (lambda t, m: t["encoder.projection.bias"].fill_(float("nan")), "projection.bias: holds values that are not"),
        (lambda t, m: t["encoder.projection.bias"].add_(1.0), "version: expected .* damaged"),
        (lambda t, m: t.update({"encoder.projection.bias": torch.zeros(8, dtype=torch.int32)}), "expected float32"),
        (lambda t, m: m.pop("options"), "metadata options: missing"),
        (lambda t, m: m.update(format="other/9"), "metadata format: expected bilm-serve/1, found other/9"),
        (lambda t, m: m.update(options="{"), "metadata options"),
        (lambda t, m: m.update(options=json.dumps({"lstm": {}})), "char_cnn: missing"),
    ],
)
def test_damage_to_our_file_is_named(
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], None], message: str, single: Path
) -> None:
    _rewritten(single, change)
    with pytest.raises(WeightsError, match=message):
        load(str(single))


def test_a_cut_off_file_of_ours(single: Path) -> None:
    single.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(str(single))


@pytest.mark.parametrize("source", ["/nowhere", "random:huge", "random:"])
def test_what_does_not_exist(source: str) -> None:
    with pytest.raises(ModelError, match=source):
        load(source)


def test_random_weights_are_the_same_each_time() -> None:
    assert load("random:tiny").version == load("random:tiny").version


# ---- names, forms and full disks ----


@pytest.mark.parametrize(
    ("source", "name"),
    [("elmo_5.5B", "elmo_5.5B"), ("v1.hdf5", "v1.hdf5"), ("a.b.safetensors", "a.b"), ("half.SafeTensors", "half")],
)
def test_a_name_keeps_its_dots(golden: Path, single: Path, tmp_path: Path, source: str, name: str) -> None:
    path = tmp_path / source
    if source.lower().endswith(".safetensors"):
        shutil.copy(single, path)
    else:
        shutil.copytree(golden, path)
    assert load(str(path)).name == name


def test_the_name_of_the_folder_one_is_in(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden)
    assert load(".").name == golden.name


@pytest.mark.parametrize("name", ["weights.HDF5", "weights.bin", "weights.safetensors"])
def test_content_says_what_a_file_is(golden: Path, single: Path, tmp_path: Path, name: str) -> None:
    weights = tmp_path / name
    shutil.copy(golden / "weights.hdf5", weights)
    assert load(str(weights), golden / "options.json").version == load(str(golden)).version
    (ours := tmp_path / "model.h5").write_bytes(single.read_bytes())
    assert load(str(ours)).version == load(str(single)).version


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("model.zip", b"PK\x03\x04" + bytes(100), "a zip archive"),
        ("model.safetensors", b"PK\x03\x04" + bytes(100), "a zip archive"),
        ("weights.HDF5", b"PK\x03\x04" + bytes(100), "a zip archive"),
        ("model.safetensors.gz", b"\x1f\x8b" + bytes(100), "compressed by gzip"),
        ("model.pt", b"\x80\x04" + bytes(100), "a pickle"),
        ("model.json", b'{"lstm": {}}', "JSON"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        ("model.bin", b"something else", "of a form that isn't known"),
        ("model", b"", "empty"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: .*{found}.*expected a .safetensors file, an HDF5") as refused:
        load(str(path))
    assert "\n" not in str(refused.value)


def test_options_beside_what_has_its_own_are_refused(golden: Path, single: Path) -> None:
    for source in (str(single), "random:tiny", ""):
        with pytest.raises(WeightsError, match="--options goes with HDF5 weights only"):
            load(source, golden / "options.json")
    assert load(str(golden), golden / "options.json").version == load(str(golden)).version


def test_published_files_are_not_named_as_one(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(single), str(tmp_path / "model.hdf5")]) == 1
    assert "expected a name that ends in .safetensors, or a folder" in capsys.readouterr().err
    assert not (tmp_path / "model.hdf5").exists()


@pytest.mark.parametrize("name", ["copy.safetensors", "folder"])
def test_a_conversion_without_room_leaves_nothing(
    single: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = single.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 100, size // 3, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            code = main([str(single), str(tmp_path / name)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.endswith(": File too large\n")
        assert list(tmp_path.iterdir()) == [single]


def test_options_may_begin_with_a_byte_order_mark(golden: Path, tmp_path: Path) -> None:
    options = tmp_path / "options.json"
    options.write_bytes(b"\xef\xbb\xbf" + (golden / "options.json").read_bytes())
    assert load(str(golden / "weights.hdf5"), options).version == load(str(golden)).version


# ---- the header alone ------------------------------------------------------------------------------------------------

_NO_PROJECTIONS = replace(SIZES["tiny"], projection_dim=32, n_highway=0, n_layers=3)


@pytest.mark.parametrize("config", [*SIZES.values(), _NO_PROJECTIONS], ids=[*SIZES, "no projections"])
def test_shapes_are_those_of_the_network(config: BilmConfig) -> None:
    assert list(parameter_shapes(config).items()) == list(Bilm.parameter_shapes(config).items())
    with torch.device("meta"):
        assert parameter_count(config) == Bilm(config).parameter_count


def test_a_header_is_read_without_torch(single: Path) -> None:
    code = "import sys; from bilm_model.weights.header import inspect; inspect(sys.argv[1])"
    left = "print([name for name in ('torch', 'numpy', 'h5py', 'safetensors') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}; {left}", single], check=True, text=True, capture_output=True)
    assert done.stdout.strip() == "[]"
