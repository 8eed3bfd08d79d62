"""Defines the errors that reach the user as one clear line.

Every `AwqdistError` says what failed, where, what was expected and found, and what to do next. The command line prints it and exits with
status 2. Any other exception is a bug and keeps its traceback.
"""


class AwqdistError(Exception):
    """The base of all errors that input, environment or settings cause."""


class RecipeError(AwqdistError):
    """The recipe cannot be read, contradicts itself, or does not fit the model."""


class CheckpointError(AwqdistError):
    """A checkpoint is missing, truncated, incomplete or not finite."""


class CalibrationError(AwqdistError):
    """The calibration text is missing, empty or too short."""


class OutputError(AwqdistError):
    """The output folder cannot be written, or belongs to something else."""


class ModelError(AwqdistError):
    """The structure of the model cannot be quantized as asked."""


class NumericalError(AwqdistError):
    """Numbers are not finite, or smoothing changed the output of a layer."""


class OffloadError(AwqdistError):
    """Offloaded data does not fit, is damaged, or is gone."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type's name where it has none: a reason within our own message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
