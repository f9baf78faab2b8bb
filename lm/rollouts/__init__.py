"""Batches of text that the model writes itself, on-policy, and what judges them."""
