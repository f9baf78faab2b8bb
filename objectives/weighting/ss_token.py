"""Self-modulated token selection: progress since a history model, and attention to the prompt."""

import jax
import jax.numpy as jnp

from objectives.weighting import selection
from objectives.weighting.base import (
    Weighting,
    check_name,
    check_number,
    multiply,
    reference,
    stateless,
)
from objectives.weighting.samples import find_samples, highest_of_samples, scale_samples_to_unit


def ss_token(
    keep: float = 0.6,
    gamma: float = 0.5,
    attention_row: str = "label",
) -> Weighting:
    """w = d * [s is among the highest ceil(keep * n) of the n targets of the sample].

      s = gamma * norm(l_history - l) + (1 - gamma) * attention

    with norm(x) = (x - min) / (max - min + 1e-8) over the targets of the sample, which is a
    document, by `batch["sample_ids"]`. ssToken (arXiv 2510.18250, and its released code). The
    paper's loss is the mean over kept tokens, normalisation `kept`; its keep is 0.6, and 0.8 at 14
    billion parameters. keep = 1 is cross-entropy; gamma = 1 needs no attention, gamma = 0 no
    history. The released code's gamma of 0 over the first 10,000 samples is not here.

    Needs the reference "history_nll" (unless gamma is 0), the history model's losses, [B, T]; and
    the tap "attention_to" (unless gamma is 1), [B, T]: at every position, the attention of the last
    layer that goes to the prompt, summed over the prompt's positions and averaged over heads. In
    text without a prompt the first token of a segment stands for it.

    Args:
      keep: share of the targets of a sample that count, in (0, 1].
      gamma: weight of the progress against the attention, in [0, 1].
      attention_row: the row of the attention matrix that scores a target: that of the
        "label" itself, one position later, as the released code reads it (where that position is
        in another segment or past the end, the predictor's), or that of its "predictor".

    Raises:
      ValueError: a hyper-parameter outside of its range.
    """
    selection.check_share("keep", keep)
    check_number("gamma", gamma, least=0, most=1)
    check_name("attention_row", attention_row, ("label", "predictor"))

    def attention_of_targets(batch, references):
        own_BT = reference(references, "attention_to")
        if attention_row == "predictor":
            return own_BT
        segments_BT = batch["segment_ids"]
        same_BT = segments_BT == jnp.roll(segments_BT, -1, axis=1)
        same_BT = same_BT.at[:, -1].set(False)
        return jnp.where(same_BT, jnp.roll(own_BT, -1, axis=1), own_BT)

    def weigh(statistics, batch, references, state, step):
        samples = find_samples(batch)
        score_BT = jnp.zeros_like(batch["weights"])
        if gamma > 0:
            history_BT = reference(references, "history_nll")
            progress_BT = history_BT - jax.lax.stop_gradient(statistics.nll)
            score_BT += gamma * scale_samples_to_unit(samples, progress_BT)
        if gamma < 1:
            score_BT += (1 - gamma) * attention_of_targets(batch, references)
        chosen_BT = highest_of_samples(samples, score_BT, keep)
        unknown_BT = jnp.isnan(score_BT) | samples.unknown_BT
        return multiply(batch, jnp.where(unknown_BT, jnp.nan, chosen_BT)), state, {}

    return Weighting(
        stateless,
        weigh,
        uses_statistics=gamma > 0,
        references=("history_nll",) * (gamma > 0),
        taps={"attention_to": prompt_tokens} if gamma < 1 else {},
        batch_keys=("sample_ids",),
    )


def prompt_tokens(batch: dict[str, jax.Array]) -> jax.Array:
    """Which tokens are the prompt of their segment, [B, T] bool.

    The first of a segment, which nothing predicts, and every token that is no target: the slot
    before it, of the same segment, has weight 0. In raw text that is the end-of-text token alone,
    or the first token of a segment that continues a document cut by the end of a row.
    """
    segments_BT = batch["segment_ids"]
    first_BT = (segments_BT != jnp.roll(segments_BT, 1, axis=1)).at[:, 0].set(True)
    return first_BT | (jnp.roll(batch["weights"], 1, axis=1) == 0)
