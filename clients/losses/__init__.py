"""What a client minimises on a mini-batch, one file a loss."""
