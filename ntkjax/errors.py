"""Errors that a user can cause and mend. The command line prints them without a traceback and exits with 2."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message names the file and line (or the tensor, key or option), says what was expected, what was
    received, and what to do about it.
    """


class DataError(UserError):
    """A record, file or field of the data is wrong: the message starts with ``FILE:LINE:`` where there is one."""


class CheckpointError(UserError):
    """A model directory, tensor, adapter or training checkpoint is missing, unused, misshapen or unreadable."""


class ConfigError(UserError):
    """An option, configuration key or combination of them is not valid."""
