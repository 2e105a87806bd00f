"""The two ways moesaic fails; the command line turns them into exit codes 2 and 1."""


class InputError(ValueError):
    """What the user gave cannot work; the message names the value, what was expected and the way out."""


class WorkError(RuntimeError):
    """The work itself failed: a self-test, a collapsed model, a broken download."""


class StorageError(WorkError):
    """A file could not be written; what was finished before is kept."""
