"""The biLM with AllenNLP's modules and parameter names, over the reference network's arithmetic.

AllenNLP stores three things in another way than `Bilm`: gates are in the order input, forget, candidate, output, with
the forget gate's constant in the bias; the two halves of a highway are one matrix, whose gate is negative (it lets the
*input* through); and the bias of a cell belongs to the recurrent product. The parameters here are AllenNLP's own, not
copies: gradients, optimiser states and names in training scripts are those of AllenNLP's modules.

Legend: N rows, B sentences, R rows of a step, S characters of a token, F filters, L LSTM layers, C cells, P projection.
"""

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from bilm_model.affine import Affine, sigmoid
from bilm_model.alphabet import CHARACTER_COUNT
from bilm_model.bilm import BilmState, run_directions
from bilm_model.config import BilmConfig
from bilm_model.contexts.direction import run_layers
from bilm_model.contexts.lstm import FORGET_BIAS, advance_cells, run_steps
from bilm_model.contexts.packing import Packing
from bilm_model.inputs.char_cnn import largest_responses


class PublishedHighways(nn.Module):
    """Highway layers, each one matrix: the transform above the gate of what is carried on."""

    def __init__(self, dim: int, n_layers: int) -> None:
        super().__init__()
        self._layers = nn.ModuleList(Affine(dim, 2 * dim) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        """X (N, F) -> (N, F)."""
        for layer in self._layers:
            transform, carry = layer(x).chunk(2, dim=-1)
            transformed = torch.relu(transform)
            x = transformed + sigmoid(carry) * (x - transformed)
        return x


class PublishedEncoder(nn.Module):
    """Characters -> a token's vector before the LSTMs: AllenNLP's `_ElmoCharacterEncoder` without its padding."""

    def __init__(self, config: BilmConfig) -> None:
        super().__init__()
        self._config = config
        self._char_embedding_weights = nn.Parameter(torch.empty(CHARACTER_COUNT, config.char_dim))
        for k, (width, count) in enumerate(config.filters):
            self.add_module(f"char_conv_{k}", nn.Conv1d(config.char_dim, count, width))
        self._highways = PublishedHighways(config.n_filters, config.n_highway)
        self._projection = Affine(config.n_filters, config.projection_dim) if config.has_cnn_projection else None

    def forward(self, ids: Tensor) -> Tensor:
        """Character ids (N, S) -> (N, P)."""
        convolutions = [cast(nn.Conv1d, self.get_submodule(f"char_conv_{k}")) for k in range(len(self._config.filters))]
        filters = [(convolution.weight, cast(Tensor, convolution.bias)) for convolution in convolutions]
        x = self._highways(largest_responses(ids, self._char_embedding_weights, filters, self._config.activation))
        return cast(Tensor, x if self._projection is None else self._projection(x))


class PublishedLstm(nn.Module):
    """One layer of one direction: AllenNLP's `LstmCellWithProjection`."""

    def __init__(self, config: BilmConfig) -> None:
        super().__init__()
        self._cell_clip, self._proj_clip = config.cell_clip, config.proj_clip
        self.input_linearity = Affine(config.projection_dim, 4 * config.cell_dim, bias=False)
        self.state_linearity = Affine(config.projection_dim, 4 * config.cell_dim)
        self.state_projection: Affine | None = None
        if config.has_lstm_projection:
            self.state_projection = Affine(config.cell_dim, config.projection_dim, bias=False)

    def forward(self, x: Tensor, packing: Packing, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer over all steps, as `ClippedProjectedLstm.forward`."""
        return run_steps(self._step, self.input_linearity(x), packing, h, c)

    def _step(self, gates_x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step: the input projection (R, 4·C), h (R, P), c (R, C) -> the next h and c."""
        i, f, j, o = (gates_x + self.state_linearity(h)).chunk(4, dim=-1)
        h, c = advance_cells((i, j, f, o), c, self._cell_clip)
        if self.state_projection is not None:
            h = self.state_projection(h).clamp(-self._proj_clip, self._proj_clip)
        return h, c


class PublishedLstms(nn.Module):
    """The LSTM layers of both directions: AllenNLP's `ElmoLstm`.

    Attributes:
        stateful: whether each row of a batch continues where the row of this number ended in the batch before. In
            AllenNLP it does; here it doesn't unless this is set.
    """

    def __init__(self, config: BilmConfig, *, stateful: bool = False) -> None:
        super().__init__()
        self._config, self.stateful = config, stateful
        for k in range(config.n_layers):
            self.add_module(f"forward_layer_{k}", PublishedLstm(config))
            self.add_module(f"backward_layer_{k}", PublishedLstm(config))
        self._state: BilmState | None = None

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Run sentences laid end to end.

        Args:
            tokens: (N, P) token vectors, boundaries included.
            lengths: rows of each sentence, N together.

        Returns:
            (L + 1, N, 2·P); layer 0 is the token vector twice.
        """
        directions = [partial(run_layers, self._layers(name), residual=self._config.residual) for name in _DIRECTIONS]
        layers, state = run_directions(directions, tokens, lengths, self._state_before(len(lengths), tokens))
        if self.stateful:
            self._keep(state)
        return layers

    def reset_states(self) -> None:
        """Forget what earlier batches left; of no effect unless `stateful`."""
        self._state = None

    def _layers(self, direction: str) -> list[PublishedLstm]:
        return [cast(PublishedLstm, self.get_submodule(f"{direction}_layer_{k}")) for k in range(self._config.n_layers)]

    def _state_before(self, n_sentences: int, like: Tensor) -> BilmState:
        """Return the state for the rows of a batch: zero, but for the rows that have one."""
        shape = (self._config.n_layers, 2, n_sentences)
        h, c = (like.new_zeros(*shape, size) for size in (self._config.projection_dim, self._config.cell_dim))
        if self.stateful and self._state is not None:
            n_kept = min(n_sentences, self._state.h.shape[2])
            h[:, :, :n_kept] = self._state.h[:, :, :n_kept]
            c[:, :, :n_kept] = self._state.c[:, :, :n_kept]
        return BilmState(h, c)

    def _keep(self, state: BilmState) -> None:
        """Keep the state after a batch; a smaller batch leaves the other rows as they are. No gradient goes back."""
        h, c = state.h.detach(), state.c.detach()
        if self._state is not None and self._state.h.shape[2] > h.shape[2]:
            h = torch.cat([h, self._state.h[:, :, h.shape[2] :].to(h)], dim=2)
            c = torch.cat([c, self._state.c[:, :, c.shape[2] :].to(c)], dim=2)
        self._state = BilmState(h, c)


_DIRECTIONS = ("forward", "backward")


def published_tensors(config: BilmConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a biLM's parameters by AllenNLP's names below `_elmo_lstm`, in AllenNLP's layout.

    Args:
        config: of the biLM.
        tensors: by the names of `Bilm`'s parameters.
    """
    return {**_encoder_tensors(config, tensors), **_lstm_tensors(config, tensors)}


def _encoder_tensors(config: BilmConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"_char_embedding_weights": ours["encoder.char_cnn.embedding"]}
    for k in range(len(config.filters)):
        found[f"char_conv_{k}.weight"] = ours[f"encoder.char_cnn.kernels.{k}"]
        found[f"char_conv_{k}.bias"] = ours[f"encoder.char_cnn.biases.{k}"]
    for k in range(config.n_highway):
        for part in ("weight", "bias"):
            stem = f"encoder.highways.{k}"
            found[f"_highways._layers.{k}.{part}"] = torch.cat(
                [ours[f"{stem}.transform.{part}"], -ours[f"{stem}.gate.{part}"]]
            )
    if config.has_cnn_projection:
        for part in ("weight", "bias"):
            found[f"_projection.{part}"] = ours[f"encoder.projection.{part}"]
    return {f"_token_embedder.{name}": tensor for name, tensor in found.items()}


def _lstm_tensors(config: BilmConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for d, direction in enumerate(_DIRECTIONS):
        for k in range(config.n_layers):
            theirs, stem = f"_elmo_lstm.{direction}_layer_{k}", f"directions.{d}.layers.{k}"
            bias = _reordered(ours[f"{stem}.input.bias"])
            bias.chunk(4)[1].add_(FORGET_BIAS)
            found[f"{theirs}.input_linearity.weight"] = _reordered(ours[f"{stem}.input.weight"])
            found[f"{theirs}.state_linearity.weight"] = _reordered(ours[f"{stem}.recurrent.weight"])
            found[f"{theirs}.state_linearity.bias"] = bias
            if config.has_lstm_projection:
                found[f"{theirs}.state_projection.weight"] = ours[f"{stem}.projection.weight"]
    return found


def _reordered(gates: Tensor) -> Tensor:
    """Gates input, candidate, forget, output (4·C, …) in the order input, forget, candidate, output: a copy."""
    i, j, f, o = gates.chunk(4)
    return torch.cat([i, f, j, o])
