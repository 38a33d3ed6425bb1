"""The biLM as AllenNLP's `Elmo` runs it: a padded batch in, the padded layers and their mask out.

Legend: B sentences, T tokens of the longest, N rows of all sentences, P projection, L LSTM layers, V cached words.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilm_model.alphabet import CHARACTER_COUNT, MAX_CHARACTERS
from bilm_model.bilm import Bilm
from bilm_model.characters import BEGIN_TOKEN, END_TOKEN, character_ids, check_ids
from bilm_model.config import BilmConfig
from bilm_model.elmo.batches import PaddedBatch
from bilm_model.elmo.layout import PublishedEncoder, PublishedLstms, published_tensors

log = logging.getLogger(__name__)

_CACHED_AT_ONCE = 1024
"""Words of a vocabulary that are encoded together."""


class ElmoBilm(nn.Module):
    """The biLM below `Elmo`, with the parameter names of AllenNLP's `_ElmoBiLm`; see `from_bilm`.

    Attributes:
        num_layers: layers that `forward` returns.
    """

    def __init__(self, config: BilmConfig, *, carry_state: bool = False) -> None:
        super().__init__()
        self.num_layers = config.layer_count
        self._width = config.width
        self._warned_of_words = False
        # In AllenNLP's order, which is that of an optimiser's states
        self._token_embedder = PublishedEncoder(config)
        self.register_module("_word_embedding", None)
        self._elmo_lstm = PublishedLstms(config, stateful=carry_state)

    @classmethod
    def from_bilm(cls, bilm: Bilm, *, requires_grad: bool = False, carry_state: bool = False) -> "ElmoBilm":
        """Build the module from a loaded model, whose tensors it may share.

        Args:
            bilm: the model.
            requires_grad: whether the biLM is trained, too.
            carry_state: see `PublishedLstms.stateful`.
        """
        with torch.device("meta"):
            module = cls(bilm.config, carry_state=carry_state)
        module.load_state_dict(published_tensors(bilm.config, bilm.state_dict()), assign=True)
        return module.requires_grad_(requires_grad)

    def get_output_dim(self) -> int:
        """Return the components of a vector."""
        return self._width

    def reset_states(self) -> None:
        """Forget the state of earlier batches."""
        self._elmo_lstm.reset_states()

    def create_cached_cnn_embeddings(self, tokens: Sequence[str]) -> None:
        """Encode a vocabulary's words once; `forward` then looks them up by their places in it.

        Args:
            tokens: the words; the first one stands for padding.

        Raises:
            CharacterError: A token is empty or isn't valid Unicode.
        """
        weight = self._token_embedder._char_embedding_weights
        ids = torch.from_numpy(character_ids(tokens)).long()
        with torch.no_grad():
            parts = [self._token_embedder(part.to(weight.device)) for part in ids.split(_CACHED_AT_ONCE)]
        vectors = torch.cat(parts)
        vectors[0] = 0.0
        self._word_embedding = nn.Embedding.from_pretrained(vectors, freeze=not weight.requires_grad, padding_idx=0)

    def forward(self, inputs: Tensor, word_inputs: Tensor | None = None) -> dict[str, Any]:
        """Embed a padded batch.

        Args:
            inputs: (B, T, 50) character ids, zero where there is no token.
            word_inputs: (B, T) places in the cached vocabulary, 0 where there is no token.

        Returns:
            "activations": the layers, L + 1 tensors (B, T + 2, 2·P), boundaries included, zero behind them; "mask":
            (B, T + 2), true where there is a token or a boundary. A sentence without tokens has its two boundaries.

        Raises:
            TypeError, ValueError: An argument isn't of this form.
            CharacterError: A character id is not in the alphabet.
        """
        self._check_inputs(inputs)
        if word_inputs is not None and self._are_cached(inputs, word_inputs):
            batch = PaddedBatch.of(word_inputs > 0, "word_inputs")
            entries = self._look_up(word_inputs.reshape(-1)[batch.token_places()])
        else:
            batch = PaddedBatch.of((inputs > 0).any(dim=-1), "inputs")
            entries = self._encode(inputs.reshape(-1, MAX_CHARACTERS)[batch.token_places()])
        # Not entries[…], whose gradient threads sum up in whatever order they come
        rows = F.embedding(batch.row_sources(), entries)
        layers = self._elmo_lstm(rows, batch.row_lengths())
        return {"activations": [batch.pad(layer) for layer in layers], "mask": batch.mask()}

    def _encode(self, ids: Tensor) -> Tensor:
        """Character ids (tokens, 50) -> (2 + tokens, P), the boundaries first."""
        return self._token_embedder(torch.cat([self._boundary_ids(ids.device), ids.long()]))  # type: ignore[no-any-return]

    def _look_up(self, words: Tensor) -> Tensor:
        """Places in the vocabulary (tokens,) -> (2 + tokens, P), the boundaries first, without gradient as AllenNLP."""
        with torch.no_grad():
            boundaries = self._token_embedder(self._boundary_ids(words.device))
        assert self._word_embedding is not None  # noqa: S101 - `_are_cached` has looked
        return torch.cat([boundaries, self._word_embedding(words.long())])

    def _boundary_ids(self, device: torch.device) -> Tensor:
        return torch.from_numpy(character_ids([BEGIN_TOKEN, END_TOKEN])).long().to(device)

    def _check_inputs(self, inputs: Tensor) -> None:
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs: {type(inputs).__name__} (expected a tensor of character ids; see batch_to_ids)")
        if inputs.dim() != 3 or inputs.shape[-1] != MAX_CHARACTERS:
            raise ValueError(f"inputs: shape {tuple(inputs.shape)} (expected (batch, tokens, {MAX_CHARACTERS}))")
        _check_indices("inputs", inputs, self._token_embedder._char_embedding_weights.device)
        if bool(((inputs < 0) | (inputs >= CHARACTER_COUNT)).any()):
            check_ids(inputs.cpu().numpy())

    def _are_cached(self, inputs: Tensor, word_inputs: Tensor) -> bool:
        """Return whether all words can be looked up; if not, `inputs` has their characters, as in AllenNLP."""
        if self._word_embedding is None:
            self._warn_of_words("word_inputs: passed without vocab_to_cache; computing from the characters")
            return False
        _check_indices("word_inputs", word_inputs, inputs.device)
        if word_inputs.shape != inputs.shape[:2]:
            raise ValueError(f"word_inputs: shape {tuple(word_inputs.shape)} (expected {tuple(inputs.shape[:2])})")
        if not word_inputs.numel():
            return True
        lowest, highest = (int(bound) for bound in word_inputs.aminmax())
        n_words = self._word_embedding.num_embeddings
        if lowest < 0:
            raise ValueError(f"word_inputs: {lowest} (expected 0 to {n_words - 1}, the places in vocab_to_cache)")
        if highest >= n_words:
            self._warn_of_words(
                f"word_inputs: {highest} (expected 0 to {n_words - 1}, the places in vocab_to_cache); computing such "
                "batches from the characters, which is slower"
            )
            return False
        return True

    def _warn_of_words(self, message: str) -> None:
        """Log once, not with every batch."""
        if not self._warned_of_words:
            log.warning(message)
        self._warned_of_words = True


def _check_indices(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16):
        raise TypeError(f"{name}: {tensor.dtype} (expected integers, such as torch.int64)")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device} (expected {device}, where the module is)")
