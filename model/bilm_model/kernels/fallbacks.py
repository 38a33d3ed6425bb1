"""Which parts run on something slower than they should, because a kernel didn't compile or computed something else.

Counted for the process, as kernels are compiled and kept for the process. What a machine is known not to have (native
bfloat16 products, a cache that holds the cells) is no fallback.
"""

import logging
from collections import Counter
from collections.abc import Mapping

_log = logging.getLogger(__name__)

_counts: Counter[str] = Counter()


def note_fallback(part: str, what: str, error: Exception) -> None:
    """Count a fallback and log it as an error of the caller's line.

    Args:
        part: of the engine or of training, a label of the metric `bilm_fallbacks_total`.
        what: is missing, and what stands in for it.
        error: why.
    """
    _counts[part] += 1
    _log.error("%s: %s", what, error, stacklevel=2)


def fallback_counts() -> Mapping[str, int]:
    """Return how often each part has fallen back since the process began."""
    return dict(_counts)
