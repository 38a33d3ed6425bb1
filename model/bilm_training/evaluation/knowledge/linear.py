"""Linear probes: multinomial logistic regression on vectors, or on the words themselves.

A probe finds what a linear reader can tell from a vector, no more (Alain and Bengio 2016). Its penalty C was chosen
once, on the development part of UD English EWT, and is the same for every layer and every biLM.

Legend: N tokens, D width, K tags.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits  # scikit-learn needs it, too

from bilm_training.evaluation.knowledge.vectors import Vectors

Tags = NDArray[np.str_]
"""(N,) UPOS tags."""

Probed = Vectors | Sequence[str]
"""(N, D), or N words."""

MAX_ITERATIONS, TOLERANCE = 2000, 3e-4
"""scikit-learn's own tolerance of 1e-4 took 1.7 times the iterations, for 0.06 points of accuracy."""
VECTORS_C, WORDS_C = 0.1, 10.0
"""Accuracy on EWT's dev part, layer 1 of wikitext2-mini after 100,000 tokens: 89.9 % with 0.01, 90.2 % with 0.1, 90.2 %
with 1; word identity 83.7 % with 1, 84.8 % with 10 (all at a tolerance of 1e-4)."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe; build with `on_vectors` or `on_words`.

    Attributes:
        features: turns what is probed into the regression's input.
        regression: the classifier.
        converged: whether the optimiser came to its end, rather than to the last iteration or a step it couldn't take.
    """

    features: Any
    regression: Any
    converged: bool

    @classmethod
    def on_vectors(cls, vectors: Vectors, tags: Tags) -> "LinearProbe":
        """Fit tags (N,) of at least two kinds to vectors (N, D), standardised."""
        features = StandardScaler().fit(vectors)
        return cls(features, *fit(VECTORS_C, features.transform(vectors), tags))

    @classmethod
    def on_words(cls, words: Sequence[str], tags: Tags, **bounds: Any) -> "LinearProbe":
        """Fit tags (N,) of at least two kinds to one-hot words: all that can be known without context or spelling.

        An unknown word has no feature: it gets the tag that the bias prefers.

        Args:
            words: N of them.
            tags: theirs.
            bounds: of the optimiser, see `fit`.
        """
        # Equal pairs of word and tag are one row with a weight: the same optimum, in a tenth of the rows
        pairs = Counter(zip(words, tags.tolist(), strict=True))
        features = OneHotEncoder(handle_unknown="ignore", dtype=np.float32)
        x = features.fit_transform(_column([word for word, _ in pairs]))
        counts = np.array(list(pairs.values()))
        return cls(features, *fit(WORDS_C, x, np.array([tag for _, tag in pairs]), counts, **bounds))

    def accuracy(self, probed: Probed, tags: Tags) -> float:
        """Share of vectors (N, D), or of N words, whose tag (N,) is told right."""
        x = probed if isinstance(probed, np.ndarray) else _column(probed)
        return float(np.mean(self.regression.predict(self.features.transform(x)) == tags))


def fit(
    c: float,
    x: Any,
    tags: Tags,
    weights: NDArray[np.int64] | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> tuple[Any, bool]:
    """Return the regression, and whether it converged: that goes into the report instead of a warning.

    Args:
        c: inverse strength of the penalty.
        x: (N, D) features.
        tags: (N,).
        weights: (N,) of the rows; None: all the same.
        tolerance: of the optimiser.
        max_iterations: of the optimiser.
    """
    regression = LogisticRegression(C=c, tol=tolerance, max_iter=max_iterations)
    # Two threads that wait for one another at every step can at best halve the time, and lose a lot when something else
    # runs on one of their cores: 4 iterations on 100,000 × 256 took 3 to 5 s on one thread, 34 to 115 s on two.
    with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(x, tags, sample_weight=weights)
    failed = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in failed:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return regression, not failed


def _column(words: Sequence[str]) -> NDArray[np.object_]:
    """As scikit-learn wants a single feature: (N, 1)."""
    return np.array(words, dtype=object).reshape(-1, 1)
