"""Configs of the weightings: one a method, each with the claim of its paper that it tests.

A docstring has `Before`, what must have run, `Command`, and `Against`, the same with plain
cross-entropy. All are small: they show that a method does what it says, and are no verdict on it.
For that, vary train.seed; what differs by less than the seeds do is no difference. `Claim` has the
paper's own numbers, where they have been seen.
"""
