"""From the `rollouts` section of a config to what a judge takes."""

import math

from ml_collections import ConfigDict

from lm.errors import InputError
from lm.model.config import check_choice
from lm.rollouts.judge import Named
from lm.rollouts.rewards import REWARDS


def make_rewards(rollouts: ConfigDict) -> tuple[Named, ...]:
    """The rewards that `rollouts.rewards` names, with their weights and hyper-parameters.

    Raises:
      InputError: an unknown name, a name that stands twice, other numbers of names and weights, a
        bad hyper-parameter, or a reward that may take longer than an answer.
    """
    names = [name.strip() for name in rollouts.rewards.split(",")]
    for name in names:
        check_choice("rollouts.rewards", name, tuple(REWARDS))
        if names.count(name) > 1:
            raise InputError(f"rollouts.rewards={rollouts.rewards!r} names {name!r} twice")
    weights = tuple(rollouts.reward_weights) or (1.0,) * len(names)
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in weights)
    if len(weights) != len(names) or not numbers:
        raise InputError(
            f"rollouts.reward_weights={weights} must be {len(names)} numbers, one for each of "
            f"rollouts.rewards={rollouts.rewards!r}, or ()"
        )
    if not 0 < rollouts.reward_seconds < math.inf:
        raise InputError(f"rollouts.reward_seconds={rollouts.reward_seconds} must be above 0")
    made = []
    for name, weight in zip(names, weights, strict=True):
        arguments = rollouts[name].to_dict() if name in rollouts else {}
        try:
            REWARDS[name](**arguments)
        except ValueError as error:
            raise InputError(f"rollouts.{name}.{error}") from None
        if arguments.get("seconds", 0) >= rollouts.reward_seconds:
            raise InputError(
                f"rollouts.reward_seconds={rollouts.reward_seconds} must be above "
                f"rollouts.{name}.seconds={arguments['seconds']}, which is a part of it"
            )
        made.append(Named(name, float(weight), arguments))
    return tuple(made)
