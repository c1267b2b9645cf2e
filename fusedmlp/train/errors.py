"""The trainer's kinds of failure. Each has one message that is shown to the user unchanged."""


class UsageError(ValueError):
    """A wrong flag or argument: the command line ends with exit code 2."""


class TrainError(RuntimeError):
    """Data, files, devices or numbers that stop a run: the command line ends with exit code 1."""


class WriteError(TrainError):
    """A file of a run that could not be written, for want of room or of permission."""


class LostProcessError(TrainError):
    """Another process has ended or does not answer; this one says so, as that one may have been
    the one that talks."""


def first_line(error: Exception) -> str:
    """What an exception of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
