"""Data sets, how they are split over clients, and the mini-batches a client takes from them."""
