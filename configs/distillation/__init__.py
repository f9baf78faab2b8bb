"""Configs of distillation, each with the claim of its paper that it tests.

See configs/weightings/__init__.py for how to read them.
"""
