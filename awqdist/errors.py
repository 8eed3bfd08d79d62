"""Errors that reach the user as one clear line.

Every `AwqdistError` says what failed, where, what was expected and found, and what to do next. The command line prints it
and exits with status 2; anything else that escapes is a bug and keeps its traceback.
"""


class AwqdistError(Exception):
    """Base of all errors caused by input, environment or settings, never by a bug."""


class RecipeError(AwqdistError):
    """A recipe that cannot be read, contradicts itself, or does not fit the model."""


class CheckpointError(AwqdistError):
    """A source checkpoint that is missing, truncated, incomplete or not finite."""


class CalibrationError(AwqdistError):
    """Calibration text that is missing, empty or too short."""


class OutputError(AwqdistError):
    """An output folder that cannot be written, or belongs to something else."""


class ModelError(AwqdistError):
    """A model whose structure cannot be quantized as asked."""


class NumericalError(AwqdistError):
    """Numbers that are not finite, or a smoothing that changed the function of a layer."""


class OffloadError(AwqdistError):
    """Something that was kept beside a layer, in memory or on a disk, does not fit, is damaged, or is gone."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type's name where it has none: a reason within our own message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
