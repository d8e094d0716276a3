"""The command's flags are the options that measures take, with their types and defaults."""

import subprocess
import sys

import pytest

from fedsam.flatness import options
from fedsam.flatness.__main__ import flags
from fedsam.flatness.options import OPTIONS
from fedsam.flatness.registry import COMPARISONS, EVERY, MEASURES, defaults_of, options_of


def in_words(value):
    if value is None:
        return "by the ball"
    if isinstance(value, bool) or value == "":
        return "none"
    return value if isinstance(value, str) else f"{value:g}"


def told(defaults):
    """Return an option's defaults by measure in words: "5", or "5 of sharpness; 30 of density"."""
    by_value = {}
    for measure, value in defaults.items():
        by_value.setdefault(in_words(value), []).append(measure)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} of {', '.join(names)}" for value, names in by_value.items())


def test_every_measure_and_every_option_of_one_is_named():
    assert tuple(MEASURES) == options.MEASURES
    assert tuple(COMPARISONS) == options.COMPARISONS
    assert set(options.QUICK) <= set(MEASURES)
    single = set.union(*map(options_of, EVERY)) - {"p", "adaptive", "sigmas", "bits", "linf", "l2"}
    assert set(OPTIONS) == single


@pytest.mark.parametrize("name", OPTIONS)
def test_defaults_and_types_are_those_of_the_signatures(name):
    option, defaults = OPTIONS[name], defaults_of(name)
    assert told(defaults) == option.default
    assert {type(value) for value in defaults.values() if value is not None} <= {option.type}


def test_types_are_those_of_the_signatures():
    words = ["run", "--rho", "0.5", "--batch", "7", "--weights-only", "--on", "test"]
    words += ["--reach", "2", "--points", "5"]
    given = flags().read(words)
    assert (given["rho"], given["batch"], given["weights_only"]) == (0.5, 7, True)
    assert (given["on"], given["reach"], given["points"]) == ("test", 2.0, 5)
    assert type(given["reach"]) is float


def test_help_names_measures_and_defaults_and_loads_no_torch():
    code = (
        "import sys\nfrom fedsam.flatness.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    help_text = " ".join(done.stdout.split())
    assert "m of m-sharpness; 0: all (default: 128)" in help_text
    assert "30 of density; 20 of sharpness; 10 of adversarial" in help_text
    assert "adaptive-average-sharpness-inf" in help_text.replace("- ", "-")
    assert help_text.endswith("False")
