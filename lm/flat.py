"""Nested mappings as flat ones, with the names of the sections before dots."""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs such as ("model.width", 64) of a dictionary or ConfigDict, in its order.

    An empty section has no pairs.
    """
    for name, value in tree.items():
        # A ConfigDict is no Mapping.
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
