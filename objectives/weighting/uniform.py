"""Plain cross-entropy: every token counts as much as the data says."""

from objectives.weighting.base import Weighting, stateless


def uniform() -> Weighting:
    """w = the weight of the data (1 for text, 0 for prompts and padding, any float in between)."""

    def weigh(statistics, batch, references, state, step):
        return batch["weights"], state, {}

    return Weighting(stateless, weigh, report=False)
