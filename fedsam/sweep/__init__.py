"""Many runs over a grid of keys: ``python -m fedsam.sweep``."""
