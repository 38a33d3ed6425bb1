"""The errors that training raises on purpose."""

from bilm_model.errors import ModelError


class CorpusError(ModelError):
    """Text that can't be trained on or evaluated."""


class TargetError(ModelError):
    """A target that the softmax has no class for."""


class DivergedError(ModelError):
    """A loss or a gradient that is no number any more."""


class RunError(ModelError):
    """A run's folder that is missing, damaged, or none; the message names it, or file and line."""
