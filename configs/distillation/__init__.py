"""Configs of the losses: one a loss, each with the claim of its paper that it tests.

See configs/weightings/__init__.py for how to read them. Validation is always the negative
log-likelihood of what a loss predicts, which cross-entropy minimises and others do not.
"""
