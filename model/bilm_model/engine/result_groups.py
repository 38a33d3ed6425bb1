"""A round's sentences, grouped by the operators that their results need: which rows, and where they are; on the host.

Legend: L layers with the token layer, N rows, n sentences, m vectors, D width.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.transfer import aligned
from bilm_model.engine.types import DataType, OutputSpec, TokenChoice, row_count
from bilm_model.scalar_mix import LayerMix, Pooling, Selection

SHARED_BYTES = 64 * 1024
"""Of memory that pooled results share: bounds what one that is kept keeps beside itself."""
NUMPY_TYPES: dict[DataType, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}
"""What results are on the host; bfloat16, which numpy lacks, as int16 of its bits."""

_KEPT_OUTPUTS = 64
"""Different outputs that are remembered."""

Vectors = NDArray[np.generic]
Choices = Mapping[int, TokenChoice]
"""Those of a round's sentences of which not all tokens come back, by the sentence's number."""


def shape_of(
    n_tokens: int, n_layers: int, width: int, output: OutputSpec, choice: TokenChoice | None = None
) -> tuple[int, ...]:
    """Return the shape of a sentence's vectors: [L] [rows] D."""
    layers = (n_layers,) if output.selection.layers == "all" else ()
    n_rows = row_count(n_tokens, output, choice)
    return (*layers, width) if n_rows is None else (*layers, n_rows, width)


def grouped(outputs: Sequence[OutputSpec]) -> Iterable[tuple[OutputSpec, Sequence[int]]]:
    """Return each different output, with the numbers of its sentences."""
    if outputs.count(outputs[0]) == len(outputs):
        return [(outputs[0], range(len(outputs)))]
    groups: dict[OutputSpec, list[int]] = {}
    last, numbers = None, list[int]()
    for number, output in enumerate(outputs):
        if output is not last:  # the sentences of a call share theirs
            last, numbers = output, groups.setdefault(output, [])
        numbers.append(number)
    return groups.items()


def shares_of(selection: Selection, n_layers: int) -> NDArray[np.float32] | None:
    """Return what each of the layers (L,) is multiplied by; None: layers are not added up.

    Raises:
        ValueError: If a mix has another number of weights than there are layers.
    """
    if isinstance(selection.layers, LayerMix):
        shares = selection.layers.shares()
        if len(shares) != n_layers:
            raise ValueError(f"a mix has {len(shares)} weights, expected one for each of {n_layers} layers")
        return np.array(shares, dtype=np.float32)
    return np.full(n_layers, 1 / n_layers, dtype=np.float32) if selection.layers == "average" else None


def runs_of(steps: SentenceSteps, choices: Choices, max_rows: int) -> list[range]:
    """Return runs of a round's sentences that choose at most so many rows together, but for a run of one."""
    rows = (steps.counts - 2).tolist()
    for number, choice in choices.items():
        rows[number] = max(rows[number], len(choice.rows))
    runs, first, total = list[range](), 0, 0
    for number, count in enumerate(rows):
        if number > first and total + count > max_rows:
            runs.append(range(first, number))
            first, total = number, 0
        total += count
    return [*runs, range(first, len(rows))]


class ResultKind(NamedTuple):
    """What decides by which operators a result is made.

    Attributes:
        layers: A mean is a mix.
        normed: Layers are normalised before they are mixed.
        pooling: See `Selection`.
        unit: Vectors are scaled to length 1.
        data_type: See `OutputSpec`.
    """

    layers: Literal["all", "top", "mix"]
    normed: bool
    pooling: Pooling
    unit: bool
    data_type: DataType

    @property
    def plain(self) -> bool:
        """Whether results are what stands in memory."""
        return self.layers != "mix" and self.pooling == "none" and not self.unit and self.data_type == "float32"


@functools.lru_cache(_KEPT_OUTPUTS)
def _kind_of(output: OutputSpec, n_layers: int) -> tuple[ResultKind, NDArray[np.float32] | None]:
    """Return the kind of an output, and what its layers are multiplied by, see `shares_of`."""
    selection, shares = output.selection, shares_of(output.selection, n_layers)
    normed = isinstance(selection.layers, LayerMix) and selection.layers.layer_norm
    layers: Literal["all", "top", "mix"] = "top" if selection.layers == "top" else "all" if shares is None else "mix"
    return ResultKind(layers, normed, selection.pooling, selection.l2_normalize, output.data_type), shares


class _Rows(NamedTuple):
    """What comes back of sentences of one kind.

    Attributes:
        tokens: (N,) of one sentence behind the other, each counted from its sentence's first.
        counts: (n,) how many of them each sentence has.
        pooled: (m,) how many of them each vector is pooled from.
        spans: The vectors of each sentence, None where there is one without a token axis; None: nowhere are spans.
    """

    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]
    pooled: NDArray[np.int64]
    spans: Sequence[int | None] | None


def _rows_of(counts: NDArray[np.int64], choices: Sequence[TokenChoice | None] | None) -> _Rows:
    """Return the rows of sentences of so many tokens (n,); without choices, all of them."""
    if choices is None:
        tokens = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return _Rows(tokens, counts, counts, None)
    rows = [np.arange(n) if each is None else each.rows for n, each in zip(counts.tolist(), choices, strict=True)]
    lengths = [None if each is None else each.span_lengths for each in choices]
    counts = np.array(list(map(len, rows)))
    if not any(each is not None for each in lengths):
        return _Rows(np.concatenate(rows), counts, counts, None)
    pooled = [each if each is not None else [n] for each, n in zip(lengths, counts.tolist(), strict=True)]
    spans = [None if each is None else len(each) for each in lengths]
    return _Rows(np.concatenate(rows), counts, np.concatenate(pooled), spans)


@dataclass(frozen=True, eq=False)
class ResultGroup:
    """The sentences of one kind in a round.

    Attributes:
        kind: Of them.
        numbers: Theirs.
        rows: Of each.
        arrays: What the operators read of them, by name.
        shape: Of their results together: (vectors of all, L, D) if they are pooled, else (L, rows of all, D); L is 1
            for one layer.
        begin: Of their results among the bytes of the round.
    """

    kind: ResultKind
    numbers: Sequence[int]
    rows: _Rows
    arrays: dict[str, NDArray[np.generic]]
    shape: tuple[int, int, int]
    begin: int

    @property
    def end(self) -> int:
        """Of their results among the bytes of the round."""
        return self.begin + math.prod(self.shape) * np.dtype(NUMPY_TYPES[self.kind.data_type]).itemsize

    def vectors(self, data: NDArray[np.uint8]) -> Iterator[Vectors]:
        """Yield each sentence's, out of the bytes of the round, in memory that keeps little beside it."""
        little = np.dtype(NUMPY_TYPES[self.kind.data_type])
        whole = data[self.begin : self.end].view(little.newbyteorder("=")).reshape(self.shape)
        picked = slice(None) if self.kind.layers == "all" else 0
        if self.kind.pooling == "none":
            for begin, end in itertools.pairwise([0, *np.cumsum(self.rows.counts).tolist()]):
                yield whole[:, begin:end].astype(little)[picked]
        elif self.rows.spans is not None:
            begin = 0
            for n_spans in self.rows.spans:
                found = whole[begin : begin + (n_spans or 1)].astype(little)
                yield found[0, picked] if n_spans is None else found.transpose(1, 0, 2)[picked]
                begin += len(found)
        else:
            n_rows = max(1, SHARED_BYTES // whole[0].nbytes)
            for first in range(0, len(whole), n_rows):
                for vectors in whole[first : first + n_rows].astype(little):
                    yield vectors[picked]


def _indices(
    kind: ResultKind, steps: SentenceSteps, counts: NDArray[np.int64], begins: NDArray[np.int64], rows: _Rows
) -> dict[str, NDArray[np.generic]]:
    """Return what operators read of sentences of one kind.

    Args:
        kind: Of them.
        steps: Of all sentences.
        counts: (n,) steps of each, boundaries included.
        begins: (n,) the first of them.
        rows: Of each.
    """
    found: dict[str, NDArray[np.generic]] = {}
    of_sentence = np.repeat(np.arange(len(counts)), rows.counts)
    if kind.normed:  # then every step is read, the boundaries, too
        firsts = np.cumsum(counts) - counts
        found["inner"], found["steps"] = (firsts + 1)[of_sentence] + rows.tokens, counts
        of_sentence = np.repeat(np.arange(len(counts)), counts)
        at = np.arange(len(of_sentence)) + (begins - firsts)[of_sentence]
    else:
        at = (begins + 1)[of_sentence] + rows.tokens
    found["places"], found["entries"] = steps.places[at], steps.entries[at]
    if kind.layers == "mix":
        found["of_sentence"] = of_sentence
    if kind.pooling != "none":
        found["tokens"] = rows.pooled
    return found


def groups_of(
    steps: SentenceSteps, outputs: Sequence[OutputSpec], choices: Choices, n_layers: int, width: int
) -> list[ResultGroup]:
    """Return a round's sentences by kind.

    Raises:
        ValueError: If a mix has another number of weights than there are layers.
    """
    kinds: dict[ResultKind, list[tuple[Sequence[int], NDArray[np.float32] | None]]] = {}
    for output, numbers in grouped(outputs):
        kind, shares = _kind_of(output, n_layers)
        kinds.setdefault(kind, []).append((numbers, shares))
    begins = np.cumsum(steps.counts) - steps.counts
    groups: list[ResultGroup] = []
    for kind, parts in kinds.items():
        its = [number for numbers, _ in parts for number in numbers]
        counts = steps.counts[its]
        rows = _rows_of(counts - 2, [choices.get(number) for number in its] if choices else None)
        arrays = _indices(kind, steps, counts, begins[its], rows)
        if kind.layers == "mix":
            each = np.stack([shares for _, shares in parts if shares is not None], axis=1)
            arrays["shares"] = np.repeat(each, [len(numbers) for numbers, _ in parts], axis=1)
        n_kept = n_layers if kind.layers == "all" else 1
        pooled = kind.pooling != "none"
        shape = (len(rows.pooled), n_kept, width) if pooled else (n_kept, len(rows.tokens), width)
        begin = aligned(groups[-1].end) if groups else 0
        groups.append(ResultGroup(kind, its, rows, arrays, shape, begin))
    return groups
