"""The expected results, and whether another one matches them."""

import hashlib
from dataclasses import dataclass

import numpy as np
from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.options import Options
from bilm_client._core.tensors import to_array
from bilm_client.errors import MalformedResponseError, sentence_error
from bilm_client.results import Vectors

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a result must match.

    Attributes:
        rest: Digest of everything but the vectors or, where the same bits are wanted, of the whole.
        vectors: The vectors, if they may differ a little.
    """

    rest: bytes
    vectors: Vectors | None


class ExpectedResults:
    """Results by the sentence's index: 16 bytes for each, and its vectors where they may differ a little.

    Args:
        options: Options with which the sentences are embedded.
        tolerance: Largest difference of a component; 0: the same bits.
    """

    def __init__(self, options: Options, tolerance: float) -> None:
        self._options, self._tolerance = options, tolerance
        self._kept: dict[int, _Expected] = {}

    def keep(self, index: int, result: pb.EmbedResult) -> None:
        """Take a result as the expected one.

        Raises:
            MalformedResponseError: Its vectors aren't what was asked for.
        """
        self._kept[index] = self._reduced(result)

    def matches(self, index: int, result: pb.EmbedResult) -> bool:
        """Return whether a result is as expected."""
        try:
            found = self._reduced(result)
        except MalformedResponseError:
            return False
        expected = self._kept[index]
        if found.rest != expected.rest or found.vectors is None or expected.vectors is None:
            return found.rest == expected.rest
        if found.vectors.shape != expected.vectors.shape:
            return False
        # in this form NaN is a difference
        difference = np.abs(found.vectors.astype(np.float32) - expected.vectors.astype(np.float32))
        return bool((difference <= self._tolerance).all())

    def _reduced(self, result: pb.EmbedResult) -> _Expected:
        if result.HasField("error"):  # its text is for people and may change
            return _Expected(sentence_error(result.error, 0).reason.encode(), None)
        if not self._tolerance:
            return _Expected(_digest(result), None)
        rest = pb.EmbedResult()
        rest.CopyFrom(result)
        rest.embedding.tensor.ClearField("data")
        return _Expected(_digest(rest), to_array(result.embedding.tensor, self._options))


def _digest(result: pb.EmbedResult) -> bytes:
    return hashlib.blake2b(result.SerializeToString(deterministic=True), digest_size=_DIGEST_BYTES).digest()
