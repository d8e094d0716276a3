"""What a client corrects about its gradient, one file a correction."""
