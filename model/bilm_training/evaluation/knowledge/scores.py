"""What the probes found on a treebank, as data."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeScore:
    """How well a linear probe tells parts of speech.

    Attributes:
        layer: probed: 0 the token layer, then the LSTMs'; None: the word itself.
        accuracy: share of the test tokens told right.
        accuracy_with_typos: the same with typos in the test sentences.
        converged: whether the probe's optimiser came to its end.
    """

    layer: int | None
    accuracy: float
    accuracy_with_typos: float
    converged: bool

    @property
    def loss(self) -> float:
        """What the typos cost, in points of accuracy (per cent)."""
        return 100 * (self.accuracy - self.accuracy_with_typos)


@dataclass(frozen=True)
class TreebankReport:
    """Probes of a treebank's parts of speech.

    Attributes:
        name: of the treebank.
        train_tokens: that every probe was fitted to, the same ones.
        test_tokens: that every probe was measured on.
        typos: words of the test sentences that got one.
        tags: in the training part.
        seed: of the random biLM, the typos and the choice of training sentences.
        model: a score for each layer of the biLM.
        random: likewise of a biLM of the same shape with random weights.
        word_identity: without any biLM.
    """

    name: str
    train_tokens: int
    test_tokens: int
    typos: int
    tags: tuple[str, ...]
    seed: int
    model: tuple[ProbeScore, ...]
    random: tuple[ProbeScore, ...]
    word_identity: ProbeScore

    @property
    def margin(self) -> float:
        """How far the biLM's best layer is above the random one's best, in points."""
        return 100 * (best(self.model).accuracy - best(self.random).accuracy)


def best(scores: Sequence[ProbeScore]) -> ProbeScore:
    """Return the most accurate layer; of equal ones the first."""
    return max(scores, key=lambda score: score.accuracy)
