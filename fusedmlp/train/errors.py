"""The trainer's kinds of failure. Each carries one message that is meant to be shown as it is."""


class UsageError(ValueError):
    """A flag or argument that cannot be: the command line ends with exit code 2."""


class TrainError(RuntimeError):
    """Data, files, devices or numbers that stop a run: the command line ends with exit code 1."""


class WriteError(TrainError):
    """A file of a run that could not be written, for want of room or of permission."""
