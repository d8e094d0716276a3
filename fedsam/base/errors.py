"""The errors a user can cause: one line that names the flag and says what would be right."""

import difflib
import textwrap
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong flag, key or file. The commands print it as one line and exit with code 2."""

    def __str__(self) -> str:
        """Return the message, with what cannot be printed as its escape: it stays one line."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class TrainingError(RuntimeError):
    """A run that cannot go on. The commands print it as one line and exit with code 1."""


class StorageError(TrainingError):
    """A file that cannot be written: nothing more is."""


def flag(key: str) -> str:
    """Return the command-line flag of a config key, e.g. ``swa_start`` -> ``--swa-start``."""
    return "--" + key.replace("_", "-")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice nearest to ``word``, or nothing."""
    match = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_line(error: BaseException) -> str:
    """Return the message of somebody else's error as one line of bounded length."""
    return textwrap.shorten(str(error), width=300, placeholder=" ...")
