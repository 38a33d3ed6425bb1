"""`bilm-serve` whose device fails on request: the first token of a sentence says how, in the round that computes it."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import bilm_server.main
import torch
from bilm_model.engine.types import Engine, EngineResult
from bilm_server.config import ServerConfig
from bilm_server.inference.types import Sentence
from bilm_server.served_model import ServedModel, load_served_model

ASSERT = "<assert>"
"""An assertion in a kernel, after which nothing can be computed in the process any more."""
MEMORY = "<memory>"
"""More memory than the device has; the next round has enough."""
_ERROR_ASSERT = 710  # cudaErrorAssert
_BYTES = 2**50


class _FailingEngine:
    """An engine, until a round computes one of those sentences."""

    def __init__(self, inner: Engine[Sentence]) -> None:
        self._inner, self._present = inner, set[Sentence]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def join(self, sentences: Sequence[Sentence]) -> None:
        self._inner.join(sentences)
        self._present.update(sentences)

    def drop(self, sentences: Iterable[Sentence]) -> None:
        dropped = list(sentences)
        self._present.difference_update(dropped)
        self._inner.drop(dropped)

    def warm_up(self) -> None:
        self._present.clear()
        self._inner.warm_up()

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> Sequence[EngineResult[Sentence]]:
        first, device = {sentence.tokens[0] for sentence in self._present}, self._inner.description.device
        if ASSERT in first:
            _fail(torch.device(device))
        if MEMORY in first:
            torch.empty(_BYTES, dtype=torch.uint8, device=device)
        ended = self._inner.advance(leave_out=leave_out, max_steps=max_steps)
        self._present.difference_update(result.sentence for result in ended)
        return ended


def _fail(device: torch.device) -> None:
    """Let an assertion fail on the device; on a CPU, raise what that would."""
    if device.type == "cuda":
        torch._assert_async(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)
    error = torch.AcceleratorError("the check lets the device fail")
    error.error_code = _ERROR_ASSERT  # type: ignore[attr-defined] # what torch sets from C
    raise error


def load_failing_model(config: ServerConfig) -> ServedModel:
    """Load a model whose device fails on request."""
    model = load_served_model(config)
    return replace(model, engine=cast(Engine[Sentence], _FailingEngine(model.engine)))


if __name__ == "__main__":
    sys.exit(bilm_server.main.main(None, load_failing_model))
