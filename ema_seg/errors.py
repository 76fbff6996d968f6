"""The one exception family for mistakes that a user can make and correct.

Each is raised where the fact is known, with a message that is one sentence: what was found, where
(file, key, value), and what to do. The entry points print the sentence and exit with status 1, without
a traceback; a notebook sees an ordinary exception.
"""

__all__ = ["CheckpointError", "ConfigError", "DataError", "EmaSegError", "ModelError", "TrainingError"]


class EmaSegError(Exception):
    """Base of every error that states what a user can do about it."""


class ConfigError(EmaSegError, ValueError):
    """A configuration key or a constructor argument has a value that cannot work."""


class DataError(EmaSegError):
    """A data set's folder or one of its files is not what its format says."""


class CheckpointError(EmaSegError):
    """A checkpoint or weight file is missing, unreadable or does not fit the model."""


class ModelError(EmaSegError, ValueError):
    """A model cannot be built or run with the given arguments or input."""


class TrainingError(EmaSegError):
    """Training cannot go on, for example because the loss is no longer finite."""
