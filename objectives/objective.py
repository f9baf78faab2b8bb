"""What an objective is: pure functions from the statistics of tokens to the terms of a loss.

B batch, T length.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from objectives.cross_entropy import TokenStatistics
from objectives.losses.base import CROSS_ENTROPY, Loss
from objectives.terms import Term


class Prepared(NamedTuple):
    """What the terms need of the whole global batch besides its micro-batch.

    Attributes:
      rows: arrays [B, ...] by name, such as weights; a micro-batch gets its rows of them.
      totals: scalars by name, such as denominators; every micro-batch gets them as they are.
      state: of the objective after this step.
      metrics: float32 scalars by name.
    """

    rows: dict[str, jax.Array]
    totals: dict[str, jax.Array]
    state: Any = ()
    metrics: Mapping[str, jax.Array] = {}


class Head(NamedTuple):
    """A further prediction at every position, by the model's output matrix.

    Attributes:
      states: (parameters of the loss, hidden [B, T, D], taps of the model) -> [B, T, D].
      targets: (batch) -> int32 [B, T].
    """

    states: Callable[..., jax.Array]
    targets: Callable[..., jax.Array]


class Objective(NamedTuple):
    """What is minimised, and a declaration of all that it needs.

    A training step calls `prepare` once, with all rows of the global, accumulated batch, and
    `terms` once for each micro-batch. Between them stand the denominators: micro-batches in one
    pass need those of the whole batch before the first sum is formed. With `whole_batch`, `terms`
    is called once, too, with the statistics of all rows.

    Attributes:
      prepare: (statistics, aux, batch, references, state, step) -> `Prepared`. `statistics` is a
        `TokenStatistics` [B, T] and `aux` what was asked for by `taps` and `heads`; without
        `whole_batch` they are None and {}. `references` maps names to [B, T] float32 arrays.
      terms: (statistics, aux, batch, prepared) -> {name: `Term`}. The one named "loss" is reported
        as the training loss. Sums are over the rows at hand.
      init: () -> state, a pytree that is carried in the train state and in the checkpoint.
      loss: makes the statistics of every token from the hidden states and the head.
      whole_batch: whether `prepare` reads statistics or `aux`, or a term is no sum over rows. With
        micro-batches it costs a forward pass more.
      differentiated: fields of the statistics through which a gradient comes back where there are
        two passes. Where none comes through the entropy, to leave it out saves its sums.
      batch_keys: names of what `batch` must hold besides the keys of every batch; "keys" are random
        keys, one a token.
      references: names of the references; `prepare` gets their losses [B, T].
      teachers: names of the references that give `loss` hidden states and a head.
      taps: name of a tap of the model (`lm.model.transformer.TAPS`) -> (batch) -> its argument.
        `aux` holds the result under the same name.
      heads: name -> `Head`. `aux` holds its `TokenStatistics` under this name.
      measures: name -> (`Inputs` of the loss, statistics, batch) -> [B, T]; `aux` holds the result.
        One may compare tokens of different rows: there are no micro-batches then.
      reference_taps: taps of the teacher, as `taps`; `aux` holds "reference_" + name.
      perturb: (batch) -> batch that all models read in its place, in training.
      computed_references: those of `references` that must be models, as stored ones are of batches
        that were not perturbed.
      unpaired: of an objective that reads `sides`: whether it judges answers one by one, so that
        labelled answers are read as well as pairs.
      advantages: of an objective of answers that the model draws, a policy gradient: (rewards
        float64 [N], numbers of their groups int [N], their drawn tokens int [N]) -> float32
        advantages [N] of N answers, in NumPy, before the batch is formed. A group is the answers to
        one prompt. An answer that failed has the reward NaN: it is left out of means and
        deviations, and its advantage is 0.
      temper: (state of the objective, entropies [B] of softmax(logits / rollouts.temperature)) ->
        factors [B] of the temperature that each token is drawn with; None draws all with the same.
      must_match: what must be the same when a run goes on, by name, as text. The shapes of the
        state need not be declared.
    """

    prepare: Callable[..., Prepared]
    terms: Callable[..., dict[str, Term]]
    init: Callable[[], Any] = tuple
    loss: Loss = CROSS_ENTROPY
    whole_batch: bool = False
    differentiated: tuple[str, ...] = TokenStatistics._fields
    batch_keys: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    taps: Mapping[str, Callable[..., jax.Array]] = {}
    heads: Mapping[str, Head] = {}
    measures: Mapping[str, Callable[..., jax.Array]] = {}
    reference_taps: Mapping[str, Callable[..., jax.Array]] = {}
    perturb: Callable[..., Mapping[str, jax.Array]] | None = None
    computed_references: tuple[str, ...] = ()
    unpaired: bool = False
    advantages: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None
    temper: Callable[[Any, jax.Array], jax.Array] | None = None
    must_match: Mapping[str, str] = {}
