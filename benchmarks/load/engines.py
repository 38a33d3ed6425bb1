"""Engines of this tree for measurements: on random weights or on a model, with caches that know the words."""

from collections.abc import Sequence
from typing import Literal

from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES, BilmConfig
from bilm_model.engine.backends import NewBackend, new_backend
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import PlainSentence
from bilm_model.engine.state import LstmStateCodec
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import Pooling, Selection
from bilm_model.weights.loading import load as load_model

from benchmarks.load.sentences import distinct_words
from benchmarks.load.steady import LoadSentence

POOLED_TOP = OutputSpec(Selection("top", "mean"))

_BYTES_OF_A_FLOAT = 4
_FLOATS_OF_A_NAME = 48  # what a token's name takes beside its vector
_ROOM = 1.5  # what a cache's bookkeeping may take, and more
_LEAST_INPUT_CACHE_MIB = 64  # the engine takes none that doesn't hold a round's tokens
_WARM_UP_WORDS = 32  # of a warm-up sentence


def new_batch(size: str, options: EngineOptions) -> CellularBatch:
    """Return a warm batch on random weights, the same for each size."""
    return batch_of(random_bilm(SIZES[size]), options)


def batch_of(bilm: Bilm, options: EngineOptions, backend: NewBackend = new_backend) -> CellularBatch:
    """Return a warm batch, which takes the network over."""
    batch = CellularBatch(bilm, bilm.zero_state(0).h.device, options, backend)
    batch.warm_up()
    return batch


def engine_of(batch: CellularBatch, config: BilmConfig) -> RecurrentEngine[LoadSentence]:
    """Return the engine on a batch."""
    return RecurrentEngine(batch, LstmStateCodec(config, "benchmark"))


def load_bilm(model: str) -> Bilm:
    """Return a model's network; `model` as bilm-serve's --model, "" for the model that ships."""
    return load_model(model).bilm


def output_of(layers: Literal["all", "top", "average"], pool: Pooling, data_type: DataType = "float32") -> OutputSpec:
    """Return what a caller asks for by these words."""
    return OutputSpec(Selection(layers, pool), data_type)


def as_engine_sentences(sentences: Sequence[Sequence[str]]) -> list[PlainSentence]:
    """Return sentences as the engine takes them."""
    return [PlainSentence(tuple(tokens)) for tokens in sentences]


def show_all_words(batch: CellularBatch, sentences: Sequence[Sequence[str]]) -> None:
    """Let an engine's caches see every word."""
    words = distinct_words(sentences)
    parts = [words[first : first + _WARM_UP_WORDS] for first in range(0, len(words), _WARM_UP_WORDS)]
    batch.run(as_engine_sentences(parts))


def token_cache_mib(config: BilmConfig, n_words: int) -> int:
    """Return the size of a cache for the vectors (P) of so many words."""
    return _mib(n_words * (config.projection_dim + _FLOATS_OF_A_NAME))


def input_cache_mib(config: BilmConfig, n_words: int) -> int:
    """Return the size of a cache for layer 1's input projections (2 directions, 4·C) of so many words."""
    return max(_LEAST_INPUT_CACHE_MIB, _mib(n_words * 2 * 4 * config.cell_dim))


def _mib(n_floats: int) -> int:
    return int(_ROOM * n_floats * _BYTES_OF_A_FLOAT / 2**20) + 1
