"""A client's step as compiled code, for every method at once."""
