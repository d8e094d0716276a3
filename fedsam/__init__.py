"""Federated learning with sharpness-aware clients and weight averaging on the server.

Importing this package imports nothing heavy; ``python -m fedsam.simulate --help`` is a start.
"""

__version__ = "0.1.0"
