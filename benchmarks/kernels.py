"""What a profiler's trace of a program says of the device's time."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

# What a kernel's name tells of it; the first that fits counts.
_KINDS = {
    "attention": r"fmha|flash|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|cublas|matmul|dot",
    "copies": r"memcpy|memset|copy|transpose",
    "reductions": r"reduce",
    "other fusions": r"fusion|fused|loop|wrapped",
}


def summary(path: Path, most: int = 30) -> dict[str, Any]:
    """Kernels by device time.

    Args:
      path: the .xplane.pb of a trace.
      most: kernels to list.

    Returns:
      `device_seconds` of all kernels; `busy_share`, that over the time from the first to the last;
      `kinds`, seconds by what the names tell; `kernels`, the longest: name, count, seconds, share.
    """
    seconds, counts = defaultdict(float), defaultdict(int)
    first, last = float("inf"), 0.0
    for event in _events(ProfileData.from_file(str(path))):
        seconds[event.name] += event.duration_ns / 1e9
        counts[event.name] += 1
        first, last = min(first, event.start_ns), max(last, event.end_ns)
    total = sum(seconds.values())
    kinds = defaultdict(float)
    for name, spent in seconds.items():
        kinds[_kind(name)] += spent
    longest = sorted(seconds, key=seconds.get, reverse=True)[:most]
    return {
        "device_seconds": total,
        "busy_share": total / ((last - first) / 1e9) if total else 0.0,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [
            {"name": n, "count": counts[n], "seconds": seconds[n], "share": seconds[n] / total}
            for n in longest
        ],
    }


def _events(data: ProfileData):
    """Kernels of the streams of a GPU; without one, what XLA's threads ran on CPU."""
    planes = list(data.planes)
    on_device = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_device or planes:
        for line in plane.lines:
            if line.name.startswith("Stream" if on_device else "tf_XLA"):
                yield from line.events


def _kind(name: str) -> str:
    fits = (k for k, pattern in _KINDS.items() if re.search(pattern, name, flags=re.IGNORECASE))
    return next(fits, "other")
