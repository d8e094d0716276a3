"""One file a measure of flatness or robustness; those of made and published corruptions beside."""
