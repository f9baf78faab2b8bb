"""The reward of the right answer, word for word."""

from lm.rollouts.rewards.reward import Reward


def exact() -> Reward:
    """1 where the text is the record's `answer`, up to white space around either, 0 elsewhere."""

    def reward(text, record):
        return float(text.strip() == record["answer"].strip())

    return reward
