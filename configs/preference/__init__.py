"""Configs of the objectives of preferences: one each, with the claim of its paper.

See configs/weightings/__init__.py for how to read them. All of them begin with a model of right and
wrong answers, and what is compared is its loss on answers that are right.
"""
