"""AllenNLP's `Elmo` module and `batch_to_ids`, on today's Python and torch."""

from bilm_model.elmo.batches import batch_to_ids
from bilm_model.elmo.module import Elmo

__all__ = ["Elmo", "batch_to_ids"]
