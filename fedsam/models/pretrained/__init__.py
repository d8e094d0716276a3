"""Networks that begin with the weights of a file, and of which a part trains."""
