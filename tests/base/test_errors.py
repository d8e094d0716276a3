"""Messages are one line, safe to print, and bounded."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsam.base.errors import TrainingError, UsageError, one_line, plain

NASTY = [
    "\x1b[31m",
    "\n",
    "\r",
    "\u2028",
    "\u202e",
    "\x00",
    "\x7f",
    "\x9b",
    "\udc80",
    "\t",
    "\u200b",
]


@given(st.text() | st.lists(st.sampled_from(NASTY)).map("".join), st.integers(1, 40))
def test_any_text_is_one_printable_line_of_bounded_length(text, most):
    said = plain(text, most)
    assert said.isprintable()
    assert len(said) <= most
    said.encode()
    if text.isprintable() and len(text) <= most:
        assert said == text


def test_escapes_are_what_was_there():
    assert plain("a\x1b[1mb\nc") == r"a\x1b[1mb\nc"


def test_what_is_too_long_keeps_its_beginning_and_its_end():
    assert plain("0123456789", 7) == "0123…89"
    assert plain("0123456789", 1) == "…"


@pytest.mark.parametrize("kind", [UsageError, TrainingError])
def test_errors_are_bounded(kind):
    said = str(kind("--out " + "x" * 10**7 + "\n: name a new folder"))
    assert said.startswith("--out xxx")
    assert said.endswith(r"\n: name a new folder")
    assert len(said) == 1000


def test_an_error_of_50_mb_is_cut_at_once():
    began = time.perf_counter()
    said = one_line(ValueError("a b\n" * 12_500_000))
    assert time.perf_counter() - began < 1
    assert len(said) <= 300
    assert said.startswith("a b a b")
