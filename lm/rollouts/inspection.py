"""What a policy gradient makes of answers that a model draws: rewards, advantages and pulls.

B rows, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.data.problems import Problem
from lm.data.tokenizers import Tokenizer
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.parallel.mesh import to_host
from lm.references.pulls import make_look, pulls
from lm.rollouts.judge import Judge
from lm.rollouts.policy_source import PolicySource
from lm.training.experiment import Experiment
from lm.training.state import TrainState


class RolloutInspection(NamedTuple):
    """One rollout, arrays [B, T].

    Attributes:
      batch: the rows, see `lm.rollouts.policy_rows`.
      nll, entropy: of every token, nats.
      log_ratio: log p - log p_reference, or log p where nothing is compared with.
      pull: see `lm.references.pulls.pulls`: of the answers together, so that it is the advantage
        of an answer times all that weighs a token.
      compared: whether log-ratios are against a reference.
      metrics: of the rollout and of the objective, by name.
    """

    batch: dict[str, np.ndarray]
    nll: np.ndarray
    entropy: np.ndarray
    log_ratio: np.ndarray
    pull: np.ndarray
    compared: bool
    metrics: dict[str, float]


def inspect_rollout(
    run: Experiment,
    state: TrainState,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    judge: Judge,
    say: Callable[[str], None],
    second_models: Mapping[str, tuple[Model, Trained]] | None = None,
) -> RolloutInspection:
    """Draws the answers of one step to these problems, and looks at them as the step would.

    See `lm.references.pulls.make_look`. With fewer problems than a step asks, some are asked again.

    Raises:
      InputError: the problems cannot be asked, or the objective needs random keys.
    """
    look, terms = make_look(run, state, second_models)
    source = PolicySource(run, problems, tokenizer, judge, say)
    batch = source.next(int(state.step), state)
    seen = look(batch)
    answers = sum(int(ids.max()) for ids in to_host(batch["segment_ids"]))
    pull_BT, metrics = pulls(terms, seen, batch, answers)
    drawn = {name: float(x) for name, x in source.metrics.items()}
    return RolloutInspection(
        {name: to_host(x) for name, x in batch.items()},
        to_host(seen.statistics.nll),
        to_host(seen.statistics.entropy),
        to_host(seen.log_ratio),
        pull_BT,
        seen.is_compared,
        metrics | drawn,
    )
