"""Answers of a batch of a policy gradient as text to read."""

from collections.abc import Mapping

import numpy as np

from lm.data.tokenizers import Tokenizer

# Answers that are shown: those of the first groups.
_MOST = 16


def shown_answers(rows: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> str:
    """The first answers of rows with their rewards and advantages, grouped by prompt.

    Args:
      rows: arrays [B, T] of `lm.rollouts.policy_rows`; none gives "".
      tokenizer: of the text.
    """
    blocks, before = [], None
    for row, segment in _segments(rows)[:_MOST]:
        inside = rows["segment_ids"][row] == segment
        live = {name: x[row][inside] for name, x in rows.items()}
        # An answer without a reward has weight 0, but its tokens have been drawn.
        drawn = (live["weights"] != 0) | (live["behaviour_log_probability"] != 0)
        first = int(np.argmax(drawn))
        group = int(live["group_ids"][0])
        if group != before:
            blocks.append("prompt: " + tokenizer.decode(live["tokens"][: first + 1]))
            before = group
        answer = tokenizer.decode(live["targets"][first:])
        reward, advantage = (float(live[name][first]) for name in ("rewards", "advantages"))
        said = f"reward {reward:.4g}, advantage {advantage:+.4f}"
        blocks.append(f"  {said if live['weights'][first] else 'no reward'}: {answer!r}")
    return "".join(block + "\n" for block in blocks)


def _segments(rows: Mapping[str, np.ndarray]) -> list[tuple[int, int]]:
    """(row, segment) of every answer, in order."""
    if not rows:
        return []
    return [
        (row, segment)
        for row, ids in enumerate(rows["segment_ids"])
        for segment in range(1, int(ids.max()) + 1)
    ]
