"""Losses of a model on text, and samples of it."""
