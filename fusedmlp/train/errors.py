"""The trainer's two kinds of failure. Both carry one message that is meant to be shown as it is."""


class UsageError(ValueError):
    """A flag or argument that cannot be: the command line ends with exit code 2."""


class TrainError(RuntimeError):
    """Data, files, devices or numbers that stop a run: the command line ends with exit code 1."""
