"""The published weight file: HDF5 as bilm-tf wrote it and AllenNLP reads it.

Foreign conventions, all undone here: matrices multiply from the right (x·W), so each is the transpose of ours;
convolution kernels have the axes (1, width, in, out); the row of character id 0 is missing; and in a highway the gate
called 'carry' is the one that lets the *transformed* value through, that is, the transform gate of the literature.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from bilm_system.files import open_ordinary

from bilm_model.config import BilmConfig
from bilm_model.errors import WeightsError
from bilm_model.weights.shapes import Shapes, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Axes:
    """How a stored array relates to ours: the order of axes that makes theirs of ours."""

    permutation: tuple[int, ...]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in self.permutation)

    def to_stored(self, ours: "Tensor") -> "Tensor":
        return ours.permute(self.permutation)

    def from_stored(self, theirs: "Tensor") -> "Tensor":
        return theirs.permute(tuple(int(axis) for axis in np.argsort(self.permutation)))


class _Kernel(_Axes):
    """A kernel: ours (out, in, width), theirs (1, width, in, out)."""

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *super().stored_shape(shape))

    def to_stored(self, ours: "Tensor") -> "Tensor":
        return super().to_stored(ours).unsqueeze(0)

    def from_stored(self, theirs: "Tensor") -> "Tensor":
        return super().from_stored(theirs.squeeze(0))


class _Embedding(_Axes):
    """The characters: theirs lack the row of 'no token here', which is zero."""

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] - 1, shape[1])

    def to_stored(self, ours: "Tensor") -> "Tensor":
        return ours[1:]

    def from_stored(self, theirs: "Tensor") -> "Tensor":
        import torch  # noqa: PLC0415 - see _read_dataset

        return torch.cat([theirs.new_zeros(1, theirs.shape[1]), theirs])


_VECTOR, _MATRIX = _Axes((0,)), _Axes((1, 0))
_KERNEL, _EMBEDDING = _Kernel((2, 1, 0)), _Embedding((0, 1))


def names(config: BilmConfig) -> Iterator[tuple[str, str, _Axes]]:
    """Return a table of (key in the file, name of ours, axes) for every parameter of such a biLM."""
    yield "char_embed", "encoder.char_cnn.embedding", _EMBEDDING
    for k in range(len(config.filters)):
        yield f"CNN/W_cnn_{k}", f"encoder.char_cnn.kernels.{k}", _KERNEL
        yield f"CNN/b_cnn_{k}", f"encoder.char_cnn.biases.{k}", _VECTOR
    for k in range(config.n_highway):
        for theirs, ours in (("carry", "gate"), ("transform", "transform")):
            yield f"CNN_high_{k}/W_{theirs}", f"encoder.highways.{k}.{ours}.weight", _MATRIX
            yield f"CNN_high_{k}/b_{theirs}", f"encoder.highways.{k}.{ours}.bias", _VECTOR
    if config.has_cnn_projection:
        yield "CNN_proj/W_proj", "encoder.projection.weight", _MATRIX
        yield "CNN_proj/b_proj", "encoder.projection.bias", _VECTOR
    for d in range(2):
        for k in range(config.n_layers):
            cell, layer = f"RNN_{d}/RNN/MultiRNNCell/Cell{k}/LSTMCell", f"directions.{d}.layers.{k}"
            yield f"{cell}/W_0", f"{layer}.gates", _MATRIX
            yield f"{cell}/B", f"{layer}.input.bias", _VECTOR
            if config.has_lstm_projection:
                yield f"{cell}/W_P_0", f"{layer}.projection.weight", _MATRIX


def read(path: Path, config: BilmConfig) -> "dict[str, Tensor]":
    """Read a published weight file.

    Returns:
        float32 tensors by our parameters' names.

    Raises:
        WeightsError: if the file can't be read, a key is missing or unknown, has another shape than the options
            demand, or holds values that are not finite numbers.
    """
    tensors = {}
    with _datasets(path, config) as datasets:
        for key, name, axes, dataset in datasets:
            tensors.update(_ours(name, axes.from_stored(_read_dataset(dataset, path, key)), config))
    return tensors


def check(path: Path, config: BilmConfig) -> None:
    """Check that a published weight file has all weights, in their shapes.

    Raises:
        WeightsError: as `read` does, except for what the weights hold.
    """
    with _datasets(path, config) as datasets:
        for _ in datasets:
            pass


def write(path: Path, config: BilmConfig, tensors: "dict[str, Tensor]") -> None:
    """Write float32 tensors, by our parameters' names, as a published weight file.

    The file says nothing of how the layers are joined: other tools take that from the options, which have no word for
    the residual "input_to_input". `convert` refuses such a model.

    Made in memory: a write that fails inside HDF5, on a full disk, ends the process by SIGSEGV.

    Raises:
        OSError: The file can't be written.
    """
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        for key, name, axes in names(config):
            file[key] = axes.to_stored(_theirs(name, tensors)).float().contiguous().numpy()
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


# W_0 holds the input's and the recurrent half of the gates, one above the other; ours are two matrices, because the
# two projections are computed at different times.


def _joined_shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if not name.endswith(".gates"):
        return shapes[name]
    stem = name.removesuffix(".gates")
    (rows, inputs), (_, recurrent) = shapes[f"{stem}.input.weight"], shapes[f"{stem}.recurrent.weight"]
    return (rows, inputs + recurrent)


def _ours(name: str, tensor: "Tensor", config: BilmConfig) -> "dict[str, Tensor]":
    if not name.endswith(".gates"):
        return {name: tensor.contiguous()}
    stem, inputs = name.removesuffix(".gates"), config.projection_dim
    return {
        f"{stem}.input.weight": tensor[:, :inputs].contiguous(),
        f"{stem}.recurrent.weight": tensor[:, inputs:].contiguous(),
    }


def _theirs(name: str, tensors: "dict[str, Tensor]") -> "Tensor":
    if not name.endswith(".gates"):
        return tensors[name]
    stem = name.removesuffix(".gates")
    import torch  # noqa: PLC0415 - see _read_dataset

    return torch.cat([tensors[f"{stem}.input.weight"], tensors[f"{stem}.recurrent.weight"]], dim=1)


@contextmanager
def _datasets(path: Path, config: BilmConfig) -> Iterator[Iterator[tuple[str, str, _Axes, h5py.Dataset]]]:
    """Open a file; what comes is its checked datasets, each with its key, our name of it, and its axes."""
    try:
        # Given a name, HDF5 locks the file, which not every file system can
        with open_ordinary(path) as raw, h5py.File(raw, "r") as file:
            _refuse_unknown_keys(_stored_keys(file, path, config), path, config)
            yield _checked(file, path, config)
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, OverflowError) as error:  # h5py's, for damage
        raise WeightsError(f"{path}: not a readable HDF5 file: {error}") from error


def _checked(file: h5py.File, path: Path, config: BilmConfig) -> Iterator[tuple[str, str, _Axes, h5py.Dataset]]:
    expected = parameter_shapes(config)
    for key, name, axes in names(config):
        yield key, name, axes, _dataset(file, path, key, axes.stored_shape(_joined_shape(expected, name)))


def _dataset(file: h5py.File, path: Path, key: str, shape: tuple[int, ...]) -> h5py.Dataset:
    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset):
        raise WeightsError(f"{path}: {key}: missing, expected shape {shape}")
    if dataset.shape != shape:
        raise WeightsError(f"{path}: {key}: expected shape {shape}, found {dataset.shape}")
    if not np.issubdtype(dataset.dtype, np.floating):
        raise WeightsError(f"{path}: {key}: expected floating-point numbers, found {dataset.dtype}")
    _check_storage(dataset, path, key)
    return dataset


def _read_dataset(dataset: h5py.Dataset, path: Path, key: str) -> "Tensor":
    import torch  # noqa: PLC0415 - a check of the file's shapes doesn't need it

    with np.errstate(over="ignore"):  # of float64: infinite then, and refused
        array = dataset[()].astype(np.float32)
    if not np.isfinite(array).all():
        raise WeightsError(f"{path}: {key}: holds values that are not finite numbers")
    return torch.from_numpy(array)


def _check_storage(dataset: h5py.Dataset, path: Path, key: str) -> None:
    """Make sure that the numbers are in the file, one after another.

    Elsewhere (another file, another dataset), in pieces or compressed, a small file could be any number of bytes, and
    read from wherever it says; published files are plain.
    """
    properties = dataset.id.get_create_plist()
    plain = properties.get_layout() in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS) and not dataset.external
    if not plain or properties.get_nfilters():
        raise WeightsError(
            f"{path}: {key}: stored in pieces, compressed or outside of the file; `h5repack -l CONTI -f NONE` undoes it"
        )
    expected, found = dataset.nbytes, dataset.id.get_storage_size()
    if found != expected:
        raise WeightsError(f"{path}: {key}: expected {expected} bytes in the file, found {found}")


# Objects of a published file: the biLM's groups and weights, and whatever training left; far from these numbers
_MAX_OBJECTS, _MAX_DEPTH = 10_000, 10


def _stored_keys(file: h5py.File, path: Path, config: BilmConfig) -> list[str]:
    """Return the keys of all objects in the groups with a biLM's weights, none of them behind a soft or external link.

    Without h5py's `visititems`, which goes down as deep as the file says, on the C stack.
    """
    found, n_objects = [], 0
    groups = {key.split("/")[0] for key, _, _ in names(config)}
    waiting = [group for group in sorted(groups) if file.id.links.exists(group.encode())]
    while waiting:
        key, n_objects = waiting.pop(), n_objects + 1
        if n_objects > _MAX_OBJECTS or key.count("/") > _MAX_DEPTH:
            raise WeightsError(f"{path}: {key}: too many objects, or too deep, for a model")
        if not isinstance(file.get(key, getlink=True), h5py.HardLink):
            raise WeightsError(f"{path}: {key}: a link to elsewhere, expected a weight or a group")
        item = file[key]
        if isinstance(item, h5py.Group) and len(item) <= _MAX_OBJECTS:
            waiting += [f"{key}/{name}" for name in item]
        else:
            found.append(key)
    return found


def _refuse_unknown_keys(found: list[str], path: Path, config: BilmConfig) -> None:
    """A weight that the options don't mention means that the options belong to another model."""
    known = {key for key, _, _ in names(config)}
    # bilm-tf's training leaves its own softmax and counters beside the biLM's weights
    unknown = sorted(key for key in found if key not in known)
    if unknown:
        raise WeightsError(f"{path}: {unknown[0]}: not part of the model that the options describe")
