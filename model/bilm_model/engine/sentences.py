"""Sentences into a batch, and what it returns for them.

Legend: L layers with the token layer, T tokens, D width, P projection, C cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bilm_model.engine.state import LstmState
from bilm_model.engine.types import OutputSpec, TokenChoice
from bilm_model.scalar_mix import Selection

ALL_LAYERS = OutputSpec(Selection())
"""Every layer of every token, in float32."""


@dataclass(frozen=True, eq=False)
class PlainSentence:
    """A sentence by itself, for use without a server (`EngineSentence`).

    Attributes:
        tokens: None empty, without boundaries.
        state: h (L - 1, 2, P) and c (L - 1, 2, C) to continue from; None: zero.
        output: What an engine returns for it; a batch by itself returns all layers with the boundaries.
        return_state: Whether an engine returns the state after it.
        deferrable: Whether a round may leave it out.
        choice: For which of its tokens an engine returns that; None: for all.
    """

    tokens: Sequence[str]
    state: LstmState | None = None
    output: OutputSpec = ALL_LAYERS
    return_state: bool = False
    deferrable: bool = False
    choice: TokenChoice | None = None


def steps_of(n_tokens: int) -> int:
    """Return the tokens and boundaries of a sentence; one without tokens has no boundaries either."""
    return n_tokens + 2 if n_tokens else 0


@dataclass(frozen=True, eq=False)
class EmbeddedSentence:
    """What came of it.

    Attributes:
        layers: (L, T + 2, D) with the boundaries, on the engine's device; (L, 0, D) without tokens.
        h: (L - 1, 2, P) after the sentence, on the engine's device.
        c: (L - 1, 2, C) likewise.
    """

    layers: Tensor
    h: Tensor
    c: Tensor
