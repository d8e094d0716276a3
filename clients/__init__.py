"""What a client does in a round: minimizers, corrections and losses, one file a method."""
