"""The longer sections of configs/base.py: keys, their defaults and what they mean."""
