"""How a client descends: one file a minimizer."""
