"""Engines: what stands behind Flower's Grid and answers a strategy's messages."""
