"""The command's flags are the options that measures take, with their types and defaults."""

from fedsam.flatness.__main__ import OPTIONS, flags
from fedsam.flatness.registry import EVERY, defaults_of, options_of


def test_every_option_is_one_of_a_measure():
    taken = set.union(*map(options_of, EVERY))
    assert set(OPTIONS) <= taken
    assert all(defaults_of(option) for option in OPTIONS)


def test_types_are_those_of_the_signatures():
    words = ["run", "--rho", "0.5", "--batch", "7", "--weights-only", "--on", "test"]
    words += ["--reach", "2", "--points", "5"]
    options = flags().read(words)
    assert (options["rho"], options["batch"], options["weights_only"]) == (0.5, 7, True)
    assert (options["on"], options["reach"], options["points"]) == ("test", 2.0, 5)
    assert type(options["reach"]) is float


def test_defaults_are_told_from_the_signatures():
    help_text = " ".join(flags().format_help().split())
    assert "m of m-sharpness; 0: all (default: 128)" in help_text
    assert "of adaptive sharpness (default: 0.0)" in help_text
    assert "30 of density" in help_text
    assert "10 of adversarial" in help_text
