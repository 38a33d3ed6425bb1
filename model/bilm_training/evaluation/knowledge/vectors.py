"""Vectors as the service gives them: from the engine, each sentence from the zero state, float32.

Legend: L layers with the token layer, T tokens of a sentence, N of all, D width.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import numpy as np
from bilm_model.bilm import Bilm
from bilm_model.device import resolve_device
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.sentences import PlainSentence
from numpy.typing import NDArray
from tqdm import tqdm

Vectors = NDArray[np.float32]

_SENTENCES_AT_A_TIME = 2048
"""Bounds the memory for results not copied yet."""


class SentenceEmbedder:
    """Embeds sentences with a biLM, which is left as it is."""

    def __init__(self, bilm: Bilm, device: str = "auto") -> None:
        """Copy the biLM into an engine on the device, see `resolve_device`.

        Raises:
            ModelError: if there is no such device here, or the biLM gives values that are not finite numbers.
        """
        self._config = bilm.config
        copy = deepcopy(bilm).requires_grad_(False).eval()  # as an engine moves its biLM to its device
        self._engine = CellularBatch(copy.to("cpu"), resolve_device(device))
        self._engine.warm_up()

    def each(self, sentences: Sequence[Sequence[str]], title: str) -> Iterator[Vectors]:
        """Yield the vectors (L, T, D) of one sentence after another, boundaries left out; a bar on standard error.

        Raises:
            CharacterError: if a token is empty or not valid Unicode.
            ValueError: if a sentence has more tokens than the engine holds.
        """
        with tqdm(total=len(sentences), desc=title, unit="sentence") as bar:
            for start in range(0, len(sentences), _SENTENCES_AT_A_TIME):
                part = sentences[start : start + _SENTENCES_AT_A_TIME]
                for embedded in self._engine.run([PlainSentence(tokens) for tokens in part]):
                    vectors: Vectors = embedded.layers[:, 1:-1].cpu().numpy()
                    yield vectors
                bar.update(len(part))

    def all(self, sentences: Sequence[Sequence[str]], title: str) -> Vectors:
        """Return the vectors (L, N, D) of all tokens, sentence after sentence.

        Raises:
            CharacterError, ValueError: as `each`.
        """
        n_tokens = sum(map(len, sentences))
        vectors = np.empty((self._config.layer_count, n_tokens, self._config.width), dtype=np.float32)
        start = 0
        for layers in self.each(sentences, title):
            vectors[:, start : start + layers.shape[1]] = layers
            start += layers.shape[1]
        return vectors
