"""The two ways moesaic fails, which the command line turns into exit codes 2 and 1; and how others fail, in a line."""


class InputError(ValueError):
    """What the user gave cannot work; the message names the value, what was expected and the way out."""


class WorkError(RuntimeError):
    """The work itself failed: a self-test, a collapsed model, a broken download."""


class StorageError(WorkError):
    """A file could not be written; what was finished before is kept."""


def first_line(error: object) -> str:
    """Say in a line what another library's error says, or else of which type it is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
