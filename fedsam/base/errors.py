"""The errors a user can cause: one line that names the flag and says what would be right."""

import difflib
from collections.abc import Iterable, Sequence

LONGEST_MESSAGE = 1000  # characters; of what somebody else says
LONGEST_REASON = 300


class UsageError(ValueError):
    """A wrong flag, key or file. The commands print it as one line and exit with code 2."""

    def __str__(self) -> str:
        """Return the message as one line that can be printed, of bounded length."""
        return plain(super().__str__())


class TrainingError(RuntimeError):
    """A run that cannot go on. The commands print it as one line and exit with code 1."""

    def __str__(self) -> str:
        """Return the message as one line that can be printed, of bounded length."""
        return plain(super().__str__())


class StorageError(TrainingError):
    """A file that cannot be written: nothing more is."""


def flag(key: str) -> str:
    """Return the command-line flag of a config key, e.g. ``swa_start`` -> ``--swa-start``."""
    return "--" + key.replace("_", "-")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice nearest to ``word``, or nothing."""
    by_lower = {choice.lower(): choice for choice in choices}
    word = word.lower()
    matches = difflib.get_close_matches(word, list(by_lower))
    # of matches as near, one of the same letters: two of them were swapped
    matches.sort(key=lambda match: sorted(match) != sorted(word))
    return f" (did you mean {by_lower[matches[0]]!r}?)" if matches else ""


def some(words: Sequence[str], most: int = 5) -> str:
    """Return the first words between commas, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def plain(text: str, most: int = LONGEST_MESSAGE) -> str:
    r"""Return a text as one line that is safe to print, of at most ``most`` characters.

    Characters that do not print (line ends, terminals' control codes, surrogates, marks that turn
    the direction of writing) are written as their escapes, such as ``\x1b``. What is too long is
    cut in its middle: the end often says what would be right.
    """
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in _cut(text, most))
    return _cut(escaped, most)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def one_line(error: object, most: int = LONGEST_REASON) -> str:
    """Return the message of somebody else's error as one line, safe to print, of bounded length."""
    return plain(" ".join(_cut(str(error), 4 * most).split()), most)
