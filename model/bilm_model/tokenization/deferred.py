"""A tokenizer whose library is loaded later: by `load`, or with the first text."""

import threading
from collections.abc import Callable

from bilm_model.tokenization.types import TokenizedText, Tokenizer


class DeferredTokenizer:
    """Stands for a tokenizer from the beginning; any thread may use it.

    Attributes:
        name: of the tokenizer.
    """

    def __init__(self, name: str, new: Callable[[], Tokenizer]) -> None:
        """Keep what makes the tokenizer.

        Args:
            name: of the tokenizer, which is known before.
            new: loads and returns it; called once, unless it raises.
        """
        self.name = name
        self._new, self._lock = new, threading.Lock()
        self._tokenizer: Tokenizer | None = None

    @property
    def loaded(self) -> bool:
        """Whether a text is tokenised without loading anything first."""
        return self._tokenizer is not None

    def load(self) -> None:
        """Load the tokenizer, or wait for another thread that does.

        Raises:
            Exception: what kept it from being loaded.
        """
        self._ready()

    def __call__(self, text: str) -> TokenizedText:
        """See `Tokenizer`."""
        return self._ready()(text)

    def _ready(self) -> Tokenizer:
        tokenizer = self._tokenizer
        if tokenizer is None:
            with self._lock:
                tokenizer = self._tokenizer = self._tokenizer or self._new()
        return tokenizer
