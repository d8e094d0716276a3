"""One run of federated training: ``python -m fedsam.simulate``."""
