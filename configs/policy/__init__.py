"""Configs of policy gradients: one each, with what it shows.

See configs/weightings/__init__.py for how to read them. All of them begin with a model that was
pretrained on sums for a short time, and what is compared is the share of held-out sums that it
solves.
"""
