"""Plain cross-entropy: every token counts as much as the data says."""

from objectives.weighting.base import Weighting


def uniform() -> Weighting:
    """w = the weight of the data (1 for text, 0 for prompts and padding, any float in between)."""

    def init():
        return ()

    def weigh(statistics, batch, references, state, step):
        del statistics, references, step
        return batch["weights"], state, {}

    return Weighting(init, weigh)
