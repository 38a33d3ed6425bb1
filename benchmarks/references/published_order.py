"""The baseline's network: the published order of work, written plainly.

As AllenNLP's `ElmoEmbedder` and bilm-tf have it: a batch is padded to its longest sentence; every place of it, padding
included, goes through the convolutions, one filter width after another; the LSTMs take one Python step a token, and
each step has its own product with the input. Products are torch's own.

Legend: B sentences, T places of the longest (boundaries included), R sentences that reach a place, S characters,
F filters, C cells, P projection, L layers.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from bilm_model.alphabet import MAX_CHARACTERS
from bilm_model.bilm import Bilm
from bilm_model.characters import NO_TOKEN, character_ids, with_boundaries
from bilm_model.contexts.direction import Direction
from bilm_model.contexts.lstm import FORGET_BIAS, ClippedProjectedLstm
from bilm_model.inputs.token_encoder import TokenEncoder
from torch import Tensor

Parameters = dict[str, Tensor]


class PublishedOrder:
    """The same function as `Bilm`, of the same parameters."""

    def __init__(self, bilm: Bilm) -> None:
        self._config = bilm.config
        self._encoder: TokenEncoder = bilm.encoder
        self._directions = [_cells(direction) for direction in bilm.directions if isinstance(direction, Direction)]

    @torch.inference_mode()
    def run(self, sentences: Sequence[Sequence[str]]) -> list[Tensor]:
        """Embed one batch: the layers (L + 1, T of the sentence, 2·P) of each sentence."""
        marked = [with_boundaries(tokens) for tokens in sentences]
        # longest first, so that the sentences which reach a place are the first rows
        order = sorted(range(len(marked)), key=lambda b: -len(marked[b]))
        lengths = [len(marked[b]) for b in order]
        layers = self._contextualize(self.encode(_padded_ids([marked[b] for b in order], lengths[0])), lengths)
        result = [layers] * len(marked)
        for row, b in enumerate(order):
            result[b] = layers[:, row, : lengths[row]]
        return result

    def encode(self, ids: Tensor) -> Tensor:
        """Character ids (B, T, S) -> (B, T, P)."""
        B, T, S = ids.shape
        cnn = self._encoder.char_cnn
        characters = F.embedding(ids.view(-1, S), cnn.embedding).transpose(1, 2)  # (B·T, E, S)
        activate = torch.relu if self._config.activation == "relu" else torch.tanh
        found = []
        for kernel, bias in zip(cnn.kernels, cnn.biases, strict=True):
            found.append(activate(F.conv1d(characters, kernel, bias).max(dim=-1).values))
        x = torch.cat(found, dim=-1)  # (B·T, F)
        for highway in self._encoder.highways:
            gate = torch.sigmoid(_linear(x, highway, "gate"))
            x = gate * torch.relu(_linear(x, highway, "transform")) + (1 - gate) * x
        if self._encoder.projection is not None:
            x = _linear(x, self._encoder, "projection")
        return x.view(B, T, -1)

    def _contextualize(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Token vectors (B, T, P) -> (L + 1, B, T, 2·P)."""
        layers = [torch.cat([tokens, tokens], dim=-1)]
        inputs = [tokens, tokens]
        for number in range(self._config.n_layers):
            outputs = []
            for d, cells in enumerate(self._directions):
                output = self._layer(inputs[d], lengths, cells[number], backward=d == 1)
                total = output + inputs[d]
                outputs.append(total if self._config.residual == "published" and number else output)
                inputs[d] = total if self._config.residual == "input_to_input" else outputs[d]
            layers.append(torch.cat(outputs, dim=-1))
        return torch.stack(layers)

    def _layer(self, x: Tensor, lengths: list[int], cell: Parameters, *, backward: bool) -> Tensor:
        """One layer of one direction, step by step: x (B, T, P) -> (B, T, P).

        Backward, places come last to first: a sentence joins at its own end, which reverses it within its length.
        """
        B, T, _ = x.shape
        h, c = x.new_zeros(B, self._config.projection_dim), x.new_zeros(B, self._config.cell_dim)
        y = x.new_zeros(B, T, self._config.projection_dim)
        n_rows = 0 if backward else B
        for place in reversed(range(T)) if backward else range(T):
            while backward and n_rows < B and lengths[n_rows] > place:
                n_rows += 1
            while not backward and lengths[n_rows - 1] <= place:
                n_rows -= 1
            h_step, c_step = self.step(x[:n_rows, place], h[:n_rows], c[:n_rows], cell)
            h[:n_rows], c[:n_rows], y[:n_rows, place] = h_step, c_step, h_step
        return y

    def cells(self, direction: int) -> list[Parameters]:
        """Return the layers of a direction, 0 forward, 1 backward."""
        return self._directions[direction]

    def step(self, x: Tensor, h: Tensor, c: Tensor, cell: Parameters) -> tuple[Tensor, Tensor]:
        """X (R, P), h (R, P), c (R, C) -> the next h and c."""
        gates = F.linear(x, cell["input"], cell["bias"]) + F.linear(h, cell["recurrent"])
        i, j, f, o = gates.chunk(4, dim=-1)
        c = torch.sigmoid(f + FORGET_BIAS) * c + torch.sigmoid(i) * torch.tanh(j)
        c = torch.clamp(c, -self._config.cell_clip, self._config.cell_clip)
        h = torch.sigmoid(o) * torch.tanh(c)
        if "projection" in cell:
            h = torch.clamp(F.linear(h, cell["projection"]), -self._config.proj_clip, self._config.proj_clip)
        return h, c


def _cells(direction: Direction) -> list[Parameters]:
    return [_cell(layer) for layer in direction.layers if isinstance(layer, ClippedProjectedLstm)]


def _cell(layer: ClippedProjectedLstm) -> Parameters:
    bias = layer.input.bias
    assert bias is not None
    cell: Parameters = {"input": layer.input.weight, "recurrent": layer.recurrent.weight, "bias": bias}
    if layer.projection is not None:
        cell["projection"] = layer.projection.weight
    return cell


def _linear(x: Tensor, module: torch.nn.Module, name: str) -> Tensor:
    return F.linear(x, module.get_parameter(f"{name}.weight"), module.get_parameter(f"{name}.bias"))


def _padded_ids(marked: Sequence[Sequence[str]], n_places: int) -> Tensor:
    """Character ids (B, T, S), 0 where a sentence has ended."""
    ids = np.full((len(marked), n_places, MAX_CHARACTERS), NO_TOKEN, dtype=np.int64)
    for row, tokens in enumerate(marked):
        ids[row, : len(tokens)] = character_ids(tokens)
    return torch.from_numpy(ids)
