"""YAML as text: the one way in which configs, options and sweeps are read and written."""

import re
from typing import Any

import yaml

# YAML 1.1 wants a dot and a signed exponent: 1e-3 and -.5 are texts to it, and numbers to all else
FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)$"
    r"|^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that knows numbers as Python writes them."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart: quotes the texts that the loader would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def parse(text: str) -> Any:
    """Return what a YAML or JSON text says.

    Raises
    ------
    yaml.YAMLError
        If it is none.
    """
    return yaml.load(text, _Loader)


def write(value: Any) -> str:
    """Return the YAML from which ``parse`` makes the same value, mappings in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
