"""Controlled comparisons for launch.ablate, one file each, in the form of configs/ablation.py."""
