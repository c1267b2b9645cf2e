"""The trainer's kinds of failure. Each has a message of one line, which is shown to the user
unchanged."""


def printable(text: str) -> str:
    """The text in one line: line breaks and other characters that do not print, as from a name in
    a file, are written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Message:
    """An error whose message prints in one line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class UsageError(_Message, ValueError):
    """A wrong flag or argument: the command line ends with exit code 2."""


class TrainError(_Message, RuntimeError):
    """Data, files, devices or numbers that stop a run: the command line ends with exit code 1."""


class WriteError(TrainError):
    """A file of a run that could not be written, for want of room or of permission."""


class LostProcessError(TrainError):
    """Another process has ended or does not answer; this one says so, as that one may have been
    the one that talks."""


def first_line(error: Exception) -> str:
    """What an exception of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
