"""Sentences whose vectors are known before anything goes wrong, so that every later answer can be compared."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import Chosen, Client, Embedding, ScalarMix
from bilm_client.results import Vectors

Sentence = str | tuple[str, ...]
Options = dict[str, Any]

# The keywords of `Client.embed`. The last two can't be asked for on a bare stub as they are.
OPTIONS: tuple[Options, ...] = (
    {},
    {"layers": "top", "pool": "mean", "dtype": "float16"},
    {"layers": "average", "pool": "max"},
    {"layers": "all", "pool": "none", "dtype": "float16"},
    {"layers": "top", "l2_normalize": True},
    {"layers": "all", "dtype": "bfloat16"},
    {"layers": "mix", "mix": ScalarMix((0.1, -0.2, 0.7), gamma=1.5, layer_norm=True), "pool": "mean"},
)
N_BARE_OPTIONS = 5
PLAIN = 0

N_DOCUMENTS = 4
_DOCUMENT_LENGTH = 12
_LAYERS = {"all": pb.LAYERS_ALL, "top": pb.LAYERS_TOP, "average": pb.LAYERS_AVERAGE}
_POOLING = {"none": pb.POOLING_NONE, "mean": pb.POOLING_MEAN, "max": pb.POOLING_MAX}
_DATA_TYPES = {"float32": pb.DATA_TYPE_FLOAT32, "float16": pb.DATA_TYPE_FLOAT16}
# Where the server can't promise equal bits whatever the company (see the README), by the bytes of a number
_TOLERANCES = {4: 1e-5, 2: 2e-3}
_BFLOAT16_TOLERANCE = 2e-2


class WrongAnswerError(Exception):
    """An answer isn't the known one."""


def new_corpus() -> list[Sentence]:
    """Texts and tokens, short and long, with rare words and letters from anywhere; the same every time."""
    chance = random.Random(5)
    words = ["the", "of", "bank", "river", "naïve", "東京", "x" * 60, "don't", "3.14", "running", "Ωmega", "é"]
    words += ["".join(chance.choices("abcdefghij", k=chance.randint(1, 9))) for _ in range(150)]
    corpus: list[Sentence] = [("one",), "A text .", tuple(chance.choices(words, k=300))]
    for _ in range(30):
        tokens = tuple(chance.choices(words, k=chance.randint(1, 40)))
        corpus.append(" ".join(tokens) if chance.random() < 0.3 else tokens)
    return corpus


class KnownAnswers:
    """Asks a server that is left in peace, and compares what comes later."""

    def __init__(self) -> None:
        self.corpus = new_corpus()
        self.exact = True
        """Whether answers must be the same bit by bit."""
        self.version = ""
        self._alone: list[list[Embedding]] = []
        self._documents: list[list[Embedding]] = []

    def ask(self, client: Client) -> None:
        """Learns all answers.

        Raises:
            WrongAnswerError: The server gave two different ones.
        """
        info = client.model_info()
        self.exact, self.version = "prepacked oneDNN products" in info.backend, info.version
        self._alone = [client.embed(self.corpus, **options) for options in OPTIONS]
        self._documents = [
            list(client.embed_stream(self.document(index), carry_state=True, window=1)) for index in range(N_DOCUMENTS)
        ]
        for number, options in enumerate(OPTIONS):
            for index in range(0, len(self.corpus), 5):
                (alone,) = client.embed([self.corpus[index]], **options)
                self.check(alone, number, index)

    def document(self, index: int) -> list[Sentence]:
        """The sentences of a document, for a stream that carries its state."""
        chosen = random.Random(index).choices(range(3, len(self.corpus)), k=_DOCUMENT_LENGTH)
        return [self.corpus[i] for i in chosen]

    def check(self, found: Embedding, options: int, index: int) -> None:
        """Compares an answer.

        Args:
            found: The answer.
            options: The number in `OPTIONS`.
            index: The sentence's in `corpus`.

        Raises:
            WrongAnswerError: It differs.
        """
        self._compare(found, self._alone[options][index], f"options {options}, sentence {index}", options)

    def choose(self, chance: random.Random, index: int) -> Chosen:
        """Some tokens of a sentence."""
        n_tokens = len(self._alone[PLAIN][index].tokens)
        return Chosen(self.corpus[index], rows=chance.choices(range(n_tokens), k=chance.randint(1, 2 * n_tokens)))

    def check_chosen(self, found: Embedding, chosen: Chosen, index: int) -> None:
        """Compares the answer for some tokens of a sentence, by the first of `OPTIONS`.

        Raises:
            WrongAnswerError: It differs.
        """
        known, rows = self._alone[PLAIN][index], list(chosen.rows or ())
        expected = replace(
            known,
            tokens=tuple(known.tokens[row] for row in rows),
            offsets=None if known.offsets is None else tuple(known.offsets[row] for row in rows),
            vectors=known.vectors[..., rows, :],
        )
        self._compare(found, expected, f"rows {rows} of sentence {index}", PLAIN)

    def check_in_document(self, found: Embedding, document: int, position: int) -> None:
        """Compares the answer to a document's sentence.

        Raises:
            WrongAnswerError: It differs.
        """
        expected = self._documents[document][position]
        self._compare(found, expected, f"document {document}, sentence {position}", PLAIN)

    def check_message(self, found: pb.Embedding, options: int, index: int) -> None:
        """Compares an answer as it came over the wire; `omit_tokens` was asked for.

        Raises:
            WrongAnswerError: It differs.
        """
        known = self._alone[options][index]
        shape, width = tuple(found.tensor.shape), known.vectors.dtype.itemsize
        if shape != known.vectors.shape or len(found.tensor.data) != known.vectors.nbytes:
            raise WrongAnswerError(f"options {options}, sentence {index}: shape {shape}, not {known.vectors.shape}")
        self.check_vectors(np.frombuffer(found.tensor.data, f"<f{width}").reshape(shape), options, index)

    def check_vectors(self, found: Vectors, options: int, index: int) -> None:
        """Compares the vectors of an answer.

        Raises:
            WrongAnswerError: They differ.
        """
        known = self._alone[options][index]
        self._compare_vectors(found, known.vectors, f"options {options}, sentence {index}", options)

    def request(self, options: int, indices: Sequence[int]) -> pb.EmbedRequest:
        """The bare message for some sentences; `options` below `N_BARE_OPTIONS`."""
        return pb.EmbedRequest(options=bare_options(options), sentences=[self.message(index) for index in indices])

    def message(self, index: int) -> pb.Sentence:
        """The bare message of a sentence."""
        sentence = self.corpus[index]
        if isinstance(sentence, str):
            return pb.Sentence(text=sentence)
        return pb.Sentence(tokens=pb.Tokens(tokens=sentence))

    def _compare(self, found: Embedding, known: Embedding, what: str, options: int) -> None:
        for name in ("tokens", "offsets", "truncated", "model_version"):
            if getattr(found, name) != getattr(known, name):
                raise WrongAnswerError(f"{what}: {name} differ")
        self._compare_vectors(found.vectors, known.vectors, what, options)

    def _compare_vectors(self, found: Vectors, known: Vectors, what: str, options: int) -> None:
        if found.shape != known.shape or found.dtype != known.dtype:
            raise WrongAnswerError(f"{what}: {found.dtype} {found.shape}, not {known.dtype} {known.shape}")
        if self.exact and found.tobytes() != known.tobytes():
            raise WrongAnswerError(f"{what}: other bits, apart by {np.abs(found - known).max()}")
        bfloat16 = OPTIONS[options].get("dtype") == "bfloat16"
        tolerance = _BFLOAT16_TOLERANCE if bfloat16 else _TOLERANCES[known.dtype.itemsize]
        if not np.allclose(found, known, rtol=0, atol=tolerance):
            raise WrongAnswerError(f"{what}: apart by {np.abs(found - known).max()}")


def bare_options(options: int) -> pb.EmbedOptions:
    """The message for one of the first `N_BARE_OPTIONS` of `OPTIONS`."""
    keywords = OPTIONS[options]
    return pb.EmbedOptions(
        layers=_LAYERS[keywords.get("layers", "all")],
        pooling=_POOLING[keywords.get("pool", "none")],
        data_type=_DATA_TYPES[keywords.get("dtype", "float32")],
        l2_normalize=keywords.get("l2_normalize", False),
        omit_tokens=True,
    )


def sentence(n_tokens: int) -> pb.Sentence:
    """A sentence of that many tokens, for work whose answer doesn't matter."""
    return pb.Sentence(tokens=pb.Tokens(tokens=[f"w{i % 50}" for i in range(n_tokens)]))


def endless_items(n_tokens: int = 100) -> Iterator[pb.EmbedStreamRequest]:
    """A stream's messages, as many as the server takes."""
    yield pb.EmbedStreamRequest(start=pb.StreamStart(options=bare_options(PLAIN)))
    for number in itertools.count():
        yield pb.EmbedStreamRequest(item=pb.StreamItem(id=number, sentence=sentence(n_tokens)))
