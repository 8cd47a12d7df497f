"""The errors that carry a message for a person rather than for a programmer."""


class InputError(ValueError):
    """What was asked for cannot be done as asked: expected, got, remedy, in one line.

    The command line prints the message alone and exits with status 2.
    """


class ProcessLostError(RuntimeError):
    """Another process of the same run is gone."""


class NonFiniteLossError(RuntimeError):
    """Training met a loss or a gradient that is NaN or infinite."""
