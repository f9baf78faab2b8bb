"""What a reward is.

A reward judges one sampled answer: it gets the text, without the token that ends it, and the record
of the problem, with at least `prompt` (a text or a list of messages) and `answer` (a text). It
returns a number. It is a pure function: what it returns depends on its two arguments alone. Where a
record does not have what it needs it raises, which costs that answer its reward and nothing else.

Rewards run in a process of their own that must start quickly: they import no JAX.
"""

from collections.abc import Callable, Mapping
from typing import Any

Reward = Callable[[str, Mapping[str, Any]], float]
