"""What a client does in a round: corrections here, one file each; minimisers in ``minimizers``."""
