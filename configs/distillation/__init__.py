"""Configs of distillation, each with the claim that it tests; see configs/weightings/__init__.py."""
