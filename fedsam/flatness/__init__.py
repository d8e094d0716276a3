"""How flat the loss is around trained models: ``python -m fedsam.flatness``."""
