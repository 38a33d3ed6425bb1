"""The biLM, plain: what every faster path is measured against.

Legend: N rows (tokens and boundaries of all sentences), B sentences, L LSTM layers, C cells, P projection.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bilm_model.config import BilmConfig
from bilm_model.contexts.direction import Direction
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.contexts.packing import Packing
from bilm_model.inputs.token_encoder import TokenEncoder


@dataclass(frozen=True, eq=False)
class BilmState:
    """What a biLM remembers of each sentence.

    Attributes:
        h: (L, 2, B, P) recurrent outputs; directions are forward, backward.
        c: (L, 2, B, C) cells.
    """

    h: Tensor
    c: Tensor


class Bilm(nn.Module):
    """A bidirectional language model over characters (ELMo; Peters et al. 2018)."""

    def __init__(self, config: BilmConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TokenEncoder(config)
        self.directions = nn.ModuleList(Direction(config) for _ in ("forward", "backward"))

    @classmethod
    def parameter_shapes(cls, config: BilmConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter of such a biLM, by name; nothing is allocated."""
        with torch.device("meta"):
            return {name: tuple(parameter.shape) for name, parameter in cls(config).named_parameters()}

    @classmethod
    def from_tensors(cls, config: BilmConfig, tensors: Mapping[str, Tensor]) -> "Bilm":
        """A biLM of these parameters (by name; the tensors are used, not copied), in evaluation mode."""
        with torch.device("meta"):
            bilm = cls(config)
        bilm.load_state_dict(dict(tensors), assign=True)
        return bilm.requires_grad_(False).eval()

    def forward(self, ids: Tensor, lengths: list[int], state: BilmState | None = None) -> tuple[Tensor, BilmState]:
        """Embed sentences laid end to end.

        Args:
            ids: (N, 50) character ids, boundaries included, sentence after sentence.
            lengths: rows of each sentence, N together; a sentence may have none.
            state: to continue from; None: zero.

        Returns:
            The layers, (L + 1, N, 2·P), boundaries included; and the state after each sentence.
        """
        return run_directions(self.directions, self.encoder(ids), lengths, state or self.zero_state(len(lengths)))

    def zero_state(self, n_sentences: int) -> BilmState:
        """Return the state before any text."""
        shape = (self.config.n_layers, 2, n_sentences)
        zeros = self.encoder.char_cnn.embedding.new_zeros
        return BilmState(zeros(*shape, self.config.projection_dim), zeros(*shape, self.config.cell_dim))

    def lstms(self, direction: int) -> list[ClippedProjectedLstm]:
        """Return the LSTM layers of a direction, 0 forward, 1 backward."""
        return list(cast(Direction, self.directions[direction]).layers)  # type: ignore[arg-type]

    @property
    def product_dtype(self) -> torch.dtype:
        """The format of the products' weights."""
        return self.lstms(0)[0].input.weight.dtype

    @property
    def parameter_count(self) -> int:
        """Parameters as published: without the zero row that stands for 'no token here'."""
        return sum(parameter.numel() for parameter in self.parameters()) - self.config.char_dim

    def to_bfloat16_products(self) -> "Bilm":
        """Round the weights of all products to bfloat16, in place; see `affine`."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and not name.endswith("embedding"):
                    parameter.data = parameter.data.to(torch.bfloat16)
        return self


def run_directions(
    directions: Iterable[Callable[..., tuple[list[Tensor], Tensor, Tensor]]],
    tokens: Tensor,
    lengths: list[int],
    state: BilmState,
) -> tuple[Tensor, BilmState]:
    """Run both directions over sentences laid end to end.

    Args:
        directions: forward and backward, each a `Direction` or called like one.
        tokens: (N, P) token vectors, boundaries included, sentence after sentence.
        lengths: rows of each sentence, N together.
        state: before these sentences.

    Returns:
        As `Bilm.forward`.
    """
    packing = Packing.of(lengths, tokens.device)
    h, c = state.h[:, :, packing.order], state.c[:, :, packing.order]
    columns, ends = [], []
    for d, (direction, places) in enumerate(zip(directions, packing.directions(), strict=True)):
        outputs, *end = direction(tokens[places], packing, h[:, d], c[:, d])
        inverse = torch.argsort(places)
        columns.append(torch.stack([tokens, *(output[inverse] for output in outputs)]))
        ends.append(end)
    h, c = (torch.stack(parts, dim=1)[:, :, packing.inverse_order] for parts in zip(*ends, strict=True))
    return torch.cat(columns, dim=-1), BilmState(h, c)


@torch.no_grad()
def initialize(bilm: Bilm, generator: torch.Generator) -> Bilm:
    """Fill a biLM with random weights, in place, as bilm-tf starts its training.

    Uniform over ±√(3 / fan-in) for every matrix (variance 1 / fan-in), zero biases, −2 for the highways' gates so that
    they begin by carrying their input on.
    """
    for name, parameter in bilm.named_parameters():
        if name.endswith("gate.bias"):
            parameter.fill_(-2.0)
        elif "bias" in name:
            parameter.zero_()
        elif name.endswith("embedding"):
            parameter.uniform_(-1.0, 1.0, generator=generator)[0] = 0.0
        else:
            bound = (3.0 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
    return bilm


def random_bilm(config: BilmConfig, seed: int = 0) -> Bilm:
    """A biLM with random weights, the same for the same seed."""
    return initialize(Bilm(config), torch.Generator().manual_seed(seed)).requires_grad_(False).eval()
