"""The engine of the commit to compare with, driven as the present one is: `Engine` as far as measurements need it.

Runs in a process whose PYTHONPATH names that commit's packages, and imports none of this tree's besides benchmarks'.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_BOUNDARIES = 2


@dataclass(frozen=True)
class FormerCapacity:
    """What sentences take up, or may: `Capacity`."""

    rows: int
    steps: int

    def __sub__(self, other: "FormerCapacity") -> "FormerCapacity":
        return FormerCapacity(self.rows - other.rows, self.steps - other.steps)

    def fits(self, other: "FormerCapacity") -> bool:
        """Return whether the other one fits into this one."""
        return other.rows <= self.rows and other.steps <= self.steps


@dataclass(frozen=True)
class FormerOutput:
    """What to return for a sentence: `OutputSpec`."""

    selection: Any
    data_type: str


class FormerEngine:
    """Drives the former engine.

    Args:
        engine: `bilm_model.engine.engine.Engine` of that commit.
        max_rows: sentences that it takes.
        max_tokens: tokens and boundaries that it takes.
    """

    def __init__(self, engine: Any, max_rows: int, max_tokens: int) -> None:
        self._engine = engine
        self._sentence = import_module("bilm_model.engine.engine").Sentence
        self._torch = import_module("torch")
        self._sentences: dict[Any, Any] = {}
        self.capacity = FormerCapacity(max_rows, max_tokens)

    @property
    def in_flight(self) -> int:
        """Sentences that have joined and not come back."""
        return int(self._engine.n_in_flight)

    @property
    def used(self) -> FormerCapacity:
        """What of the capacity they take up."""
        return self.capacity - FormerCapacity(self._engine.free_rows, self._engine.free_tokens)

    @property
    def stats(self) -> Any:
        """Counters, with `steps` and `ticks`."""
        return self._engine.stats

    @property
    def backend(self) -> str:
        """Device and implementation."""
        return str(self._engine.backend)

    def need(self, n_tokens: int) -> FormerCapacity:
        """Return what a sentence of so many tokens takes up."""
        return FormerCapacity(1, n_tokens + _BOUNDARIES)

    def join(self, sentences: Iterable[Any]) -> None:
        """Take sentences in, one by one."""
        for sentence in sentences:
            self._sentences[self._engine.join(self._sentence(sentence.tokens))] = sentence

    def advance(self) -> Sequence[Any]:
        """Execute a round; return the vectors of those that ended, made as that commit's server made them."""
        return [self._vectors(self._sentences.pop(ticket), embedded) for ticket, embedded in self._engine.advance()]

    def _vectors(self, sentence: Any, embedded: Any) -> Any:
        output = sentence.output
        selected = output.selection(embedded.layers).to(getattr(self._torch, output.data_type))
        return selected.contiguous().numpy()


def new_former_engine(
    model: str, options: dict[str, Any], words: Sequence[Sequence[str]], backend: Any
) -> FormerEngine:
    """Return the engine, warm, with the words in its caches.

    Args:
        model: as bilm-serve's --model.
        options: of that commit's `EngineOptions`.
        words: sentences whose words are to be known.
        backend: what to compute with, called with biLM, memory, rows and cache; None: that commit's own.
    """
    engines, loading, torch = (
        import_module(name) for name in ("bilm_model.engine.engine", "bilm_model.weights.loading", "torch")
    )
    if backend is not None:
        vars(engines)["_new_backend"] = backend
    bilm = loading.load(model).bilm
    engine = engines.Engine(bilm, torch.device("cpu"), engines.EngineOptions(**options))
    engine.warm_up()
    engine.run([engines.Sentence(tuple(tokens)) for tokens in words])
    return FormerEngine(engine, engine.max_rows, engine.max_tokens)


def former_output(layers: str, pool: str, data_type: str) -> FormerOutput:
    """Return what a caller asks for by these words."""
    return FormerOutput(import_module("bilm_model.scalar_mix").Selection(layers, pool), data_type)
