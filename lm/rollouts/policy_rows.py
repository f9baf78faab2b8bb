"""Rows of a policy gradient: prompts, each with a sampled answer and what is known of it.

Arrays [B, T] besides those of every batch, at the targets that were drawn, elsewhere 0:

  advantages                 of the answer
  rewards                    of the answer
  behaviour_log_probability  log p under the distribution that was drawn from, nats; see
                             `lm.model.drawn`
  behaviour_entropy          of softmax(logits / rollouts.temperature), nats
  group_divergence           see `lm.model.drawn.group_divergence`
  old_log_probability        log p of the trained model before its first step on the rollout, nats;
                             only for an objective that asks for it
  temperatures               that the logits were divided by; only for an objective that asks

and at all positions of a prompt and its answer, -1 in the padding:

  group_ids                  number of the group in the global batch

A segment of a row is a prompt with one answer.

B rows, T tokens of a row, L tokens of an answer.
"""

from collections.abc import Sequence

import numpy as np

from lm.data.layout import BATCH, POLICY, POSITION, add_fields, make_row


def slots_of(length: int, longest: int, tokens: int) -> int:
    """How many answers fit into a row of `length` tokens, however long they turn out.

    A prompt with its answer of L tokens has L - 1 positions more than the prompt.

    Args:
      length: T.
      longest: tokens of the longest prompt.
      tokens: of the longest answer.
    """
    return length // (longest + tokens - 1)


def answer_positions(
    prompt: np.ndarray,
    answer_L: np.ndarray,
    *,
    weight: float,
    sample_id: int,
    group_id: int,
    **at_targets: np.ndarray | float,
) -> np.ndarray:
    """A prompt with its answer as positions of `lm.data.layout.POSITION`, with further fields.

    Bytes are not known: num_bytes is 0.

    Args:
      prompt: its ids, at least one.
      answer_L: ids that were drawn, at least one, that which ends the text included.
      weight: of each of them as a target; the prompt has 0.
      sample_id: number of the problem.
      group_id: number of the group in the global batch.
      **at_targets: others of `POLICY`, a number or one of each target [L]; 0 elsewhere.
    """
    text = np.concatenate([prompt, answer_L])
    positions = np.zeros(len(text) - 1, POSITION)
    positions["tokens"], positions["targets"] = text[:-1], text[1:]
    first = len(prompt) - 1
    positions["weights"][first:] = weight
    fields = {}
    for name, values in at_targets.items():
        fields[name] = np.zeros(len(positions), POLICY[name])
        fields[name][first:] = values
    return add_fields(
        positions,
        sample_ids=np.int32(sample_id),
        sample_positions=np.arange(len(positions), dtype=np.int32),
        group_ids=np.int32(group_id),
        **fields,
    )


def pack(answers: Sequence[np.ndarray], slots: int, length: int) -> dict[str, np.ndarray]:
    """Rows of `slots` answers each, one after the other, then padding, as arrays [B, T].

    Args:
      answers: each of `answer_positions`; B * slots of them.
      slots: answers of a row, of `slots_of`.
      length: T.
    """
    rows = [make_row(answers[i : i + slots], length) for i in range(0, len(answers), slots)]
    dtypes = BATCH | POLICY
    return {name: np.stack([row[name] for row in rows]).astype(dtypes[name]) for name in rows[0]}
