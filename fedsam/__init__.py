"""Federated learning with sharpness-aware clients and weight averaging on the server.

Importing this package imports nothing heavy; ``python -m fedsam.simulate --help`` is a start.
"""

from importlib import import_module

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the commands when they are asked for: ``import fedsam`` alone is instant."""
    if name == "simulate":
        return import_module("fedsam.simulate")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
