"""Tables, figures and a page of finished runs: ``python -m fedsam.report``."""
