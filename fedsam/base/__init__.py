"""What everything stands on: vectors, keyed randomness, errors, and what the system offers."""
