"""The errors a user can meet. Each says what is wrong, where, and what would be right.

`assert` is for our own mistakes; these are for everybody else's.
"""

import difflib
from collections.abc import Iterable

HUNG = 69
"""Exit status of a rank that the watch has ended, for one of the job hung (EX_UNAVAILABLE of sysexits.h)."""
REQUEUE = 75
"""Exit status of a run that a signal stopped and that should be started again (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end. Not an error: what handles a Ctrl-C handles this too."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NemohybridError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""


class ConfigError(NemohybridError):
    """A configuration that cannot run: unknown key, wrong type, violated rule."""


class DataError(NemohybridError):
    """Text, corpus or tokenizer that cannot be read or does not fit the run."""


class CheckpointError(NemohybridError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class TrainingError(NemohybridError):
    """A run that must not go on, such as one whose gradient is no longer finite."""


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices that a typo of `word` most likely meant, best first."""
    return difflib.get_close_matches(word, list(choices), n=count, cutoff=0.6)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`". Did you mean 'x' or 'y'?"`, or an empty string when nothing is close."""
    close = nearest(word, choices)
    return f". Did you mean {' or '.join(map(repr, close))}?" if close else ""
