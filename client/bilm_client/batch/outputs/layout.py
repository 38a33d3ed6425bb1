"""Names that both formats of output share."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RUN_KEY = "bilm_serve"
"""What the run was: input, options, model."""
SENTENCES_KEY = "sentence_to_index"
"""A JSON object from sentence to the key of its dataset."""

Write = Callable[[str, NDArray[np.generic]], None]
WriteSentences = Callable[[dict[str, str]], None]
