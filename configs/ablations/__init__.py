"""Ablations: controlled comparisons for launch.ablate, one file each, in the form of ablation.py."""
