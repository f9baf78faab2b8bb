"""What a loss is: a distribution over the vocabulary, and what is minimised of each token.

B batch, T length, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from objectives.cross_entropy import TokenStatistics, token_statistics
from objectives.vocabulary import DEFAULT_BLOCK_SIZE, Scores, products


class Teacher(NamedTuple):
    """A frozen model on the tokens of a batch: its hidden states [B, T, Dt] and head [Dt, V]."""

    hidden: jax.Array
    head: jax.Array
    scores: Scores


class Inputs(NamedTuple):
    """What a loss is computed from.

    Attributes:
      hidden: [B, T, D] float32 or bfloat16, the states in front of the head.
      head: [D, V] float32 or bfloat16.
      targets: [B, T] integers in [0, V).
      params: parameters of the loss.
      softcap: bound of the logits; 0 is none.
      temperature: that the logits of `softmax` are divided by, after the soft-cap; see `Loss`.
      block_size: columns of the head per block; 0 is plain automatic differentiation.
      keys: [B, T] random keys, one a token; None outside of training.
      teachers: those that the loss names, in its order, in training.
      axis: name of the mapped axis over whose devices the vocabulary is spread, each with its own
        columns of the heads (`objectives.vocabulary`); None is whole.
      stored: arrays [B, T, ...] of the batch by name, those that the loss declares, in training.
    """

    hidden: jax.Array
    head: jax.Array
    targets: jax.Array
    params: Any = ()
    softcap: float = 0.0
    block_size: int = DEFAULT_BLOCK_SIZE
    keys: jax.Array | None = None
    teachers: Mapping[str, Teacher] = {}
    axis: str | None = None
    stored: Mapping[str, jax.Array] = {}
    temperature: float = 1.0


class Prediction(NamedTuple):
    """A distribution over the vocabulary: softmax(scores.logits(hidden, head))."""

    hidden: jax.Array
    head: jax.Array
    scores: Scores


def no_parameters(key: jax.Array, vocab_size: int, width: int) -> tuple[()]:
    """The `init` of a loss without parameters."""
    return ()


def softmax(inputs: Inputs) -> Prediction:
    """The distribution of most losses: softmax(hidden @ head), soft-capped and tempered."""
    scores = products(inputs.softcap, inputs.temperature)
    return Prediction(inputs.hidden, inputs.head, scores)


class Loss(NamedTuple):
    """What is minimised: the weighted mean over tokens of a loss, or a function of all of them.

    Attributes:
      init: (key, vocab_size, width) -> parameters of the loss, trained with those of the model.
      predict: (inputs) -> the distribution of the next token. It is what statistics are taken of,
        what is evaluated and what is sampled from; without keys (no dropout) outside of training.
      losses: (inputs, statistics of the distribution) -> [B, T] float32, differentiable in both;
        None for the negative log-likelihood. Tokens of data weight 0 come with a hidden state of
        zeros and target 0.
      statistics: (inputs) -> the statistics with `other_loss`, for a loss that computes both in one
        pass over the vocabulary; in place of `losses`.
      reduce: None for the weighted mean, or ([B, T] of what `losses` gives, [B, T] weights whose
        sum is the number of targets) -> scalar, a function of the whole accumulated batch. Both
        are 0 where the weight is.
      random: whether `losses` or `predict` need `inputs.keys` in training.
      teachers: names of the references that `losses` or `statistics` read in `inputs.teachers`.
      same_width: whether their hidden states must be as wide as the model's.
      references: names of the references that are stored with the data, and
      batch_keys: of the arrays that the batch has of them, which the loss reads in `inputs.stored`;
        0 at tokens of data weight 0.
      attention_blocks: (batch) -> int32 [B, T], blocks that cut the model's attention: a position
        sees its own block of its segment, and with block -1 all of it. None is whole attention.
      prediction: the predicted distribution and what decides the shapes of the parameters, in
        words. Losses with equal words can be exchanged when a run goes on.
      softcapped: whether the logits may be soft-capped.
      learning_rate: peak learning rate of the parameters of the loss; 0 is that of the model's.
      temperature: that logits are divided by where the loss is trained, in the statistics of the
        model and of those that it is compared with. What is evaluated, and what a sampler starts
        from, has the temperature 1.
    """

    init: Callable[[jax.Array, int, int], Any] = no_parameters
    predict: Callable[[Inputs], Prediction] = softmax
    losses: Callable[[Inputs, TokenStatistics], jax.Array] | None = None
    statistics: Callable[[Inputs], TokenStatistics] | None = None
    reduce: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    random: bool = False
    teachers: tuple[str, ...] = ()
    same_width: bool = False
    references: tuple[str, ...] = ()
    batch_keys: tuple[str, ...] = ()
    attention_blocks: Callable[[Any], jax.Array] | None = None
    prediction: str = "softmax"
    softcapped: bool = True
    learning_rate: float = 0.0
    temperature: float = 1.0

    @property
    def is_nll(self) -> bool:
        """Whether what is minimised of a token is its negative log-likelihood."""
        return self.losses is None and self.statistics is None


CROSS_ENTROPY = Loss()


def prediction_statistics(loss: Loss, inputs: Inputs) -> TokenStatistics:
    """Statistics of the distribution that `loss` predicts; their `loss` is the nll."""
    hidden, head, scores = loss.predict(inputs)
    return token_statistics(
        hidden,
        head,
        inputs.targets,
        scores=scores,
        block_size=inputs.block_size,
        axis=inputs.axis,
    )


def training_statistics(loss: Loss, inputs: Inputs, data_weights_BT: jax.Array) -> TokenStatistics:
    """Statistics of the distribution, and as their `loss` what `loss` minimises of every token."""
    if loss == CROSS_ENTROPY:
        return prediction_statistics(loss, inputs)
    # A token of weight 0 may hold anything, and what follows is arithmetic on it, whose derivative
    # would be 0 * NaN.
    live_BT = data_weights_BT != 0

    def living(hidden_BTD):
        return jnp.where(live_BT[..., None], hidden_BTD, 0)

    inputs = inputs._replace(
        hidden=living(inputs.hidden),
        targets=jnp.where(live_BT, inputs.targets, 0),
        teachers={
            name: teacher._replace(hidden=living(teacher.hidden))
            for name, teacher in inputs.teachers.items()
        },
        stored={name: _select(live_BT, x) for name, x in inputs.stored.items()},
    )
    if loss.statistics is not None:
        return loss.statistics(inputs)
    found = prediction_statistics(loss, inputs)
    return found if loss.losses is None else found._replace(other_loss=loss.losses(inputs, found))


def _select(live_BT: jax.Array, x: jax.Array) -> jax.Array:
    """An array [B, T, ...], 0 at tokens that are not live."""
    return jnp.where(live_BT.reshape(live_BT.shape + (1,) * (x.ndim - 2)), x, 0)


def logits(loss: Loss, inputs: Inputs) -> jax.Array:
    """Logits of the distribution that `loss` predicts, [B, T, V] float32: for a few tokens.

    The vocabulary is whole.
    """
    hidden, head, scores = loss.predict(inputs)
    return scores.logits(hidden, head)
