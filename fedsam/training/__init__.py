"""How a client trains: the methods' contracts, the loop, gradients; one client or K at a time."""
