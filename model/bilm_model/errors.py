"""The errors that this package raises on purpose."""


class ModelError(Exception):
    """Base of all errors below."""


class ConfigError(ModelError):
    """Options that describe no biLM; the message names the key."""


class WeightsError(ModelError):
    """A weight file that is damaged or doesn't fit its options; the message names key, expected and found."""


class CharacterError(ModelError, ValueError):
    """A token or a character id that the model can't take."""


class LanguageError(ModelError, ValueError):
    """A language that a tokenizer has no rules for; the message lists those that it has."""


class AlignmentError(ModelError, ValueError):
    """Text that a tokenizer has changed so far that its tokens can't be found in it."""


class StateError(ModelError, ValueError):
    """A state that didn't come from this model, or not whole."""


class ChoiceError(ModelError, ValueError):
    """Rows or spans that can't be chosen of a sentence; the message names the field."""
