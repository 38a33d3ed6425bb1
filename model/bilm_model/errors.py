"""The errors that this package raises on purpose."""


class ModelError(Exception):
    """Base of all errors below."""


class ConfigError(ModelError):
    """Options that describe no biLM; the message names the key."""


class WeightsError(ModelError):
    """A weight file that is damaged or doesn't fit its options; the message names key, expected and found."""


class CharacterError(ModelError, ValueError):
    """A token or a character id that the model can't take."""


class StateError(ModelError, ValueError):
    """A state that didn't come from this model, or not whole."""


def reason(error: Exception) -> str:
    """What an error says, to stand behind a file's name: the system's without number and name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def message(error: ModelError | OSError) -> str:
    """A line for the terminal: an operating system's error after the name of the file, where it has one."""
    return f"{error.filename}: {reason(error)}" if isinstance(error, OSError) and error.filename else str(error)
