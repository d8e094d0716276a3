"""What the server does with the clients' replies: one file a strategy."""
