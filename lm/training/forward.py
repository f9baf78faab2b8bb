"""From parameters and a batch to the statistics of its tokens.

B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.compression.phases import Quantized
from lm.model.adapters import merged_config, without
from lm.model.interface import PLAIN, Model, Outputs, Tokens
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel import sharded_loss
from lm.parallel.mesh import RULES
from objectives import Objective, losses
from objectives.cross_entropy import TokenStatistics
from objectives.losses import CROSS_ENTROPY, Loss
from objectives.vocabulary import products

# (trained, batch) -> (outputs of the model, output matrix [D, V])
Forward = Callable[[Trained, Mapping[str, jax.Array]], tuple[Outputs, jax.Array]]


class ReferenceModel(NamedTuple):
    """A model that is compared with: its functions, and what was trained of it.

    Attributes:
      forward: of `make_forward`.
      statistics: of `make_prediction_statistics`.
      softcap: of its logits.
      trained: the first argument of both functions.
    """

    forward: Forward
    statistics: Callable[..., TokenStatistics]
    softcap: float
    trained: Trained


def make_forward(
    model: Model,
    quantized: Quantized | None = None,
    attention_blocks: Callable[..., jax.Array] | None = None,
    taps: Mapping[str, Callable[..., Any]] | None = None,
    dropout: bool = False,
) -> Forward:
    """(trained, batch) -> `Outputs` of the model and its output matrix [D, V].

    Args:
      model: the model.
      quantized: puts weights on their grids; without it they are in full precision.
      attention_blocks: (batch) -> blocks [B, T] that cut the attention; see `Loss`.
      taps: name of a tap of the model -> (batch) -> its argument.
      dropout: draw with the first of the batch's "keys", if the model has dropout.
    """
    dropout = dropout and model.config.adapter_dropout > 0

    def forward(trained, batch):
        params, layers = trained.params, PLAIN
        if quantized is not None:
            params, layers = quantized.outer(trained), quantized.layers(trained)
        blocks = attention_blocks(batch) if attention_blocks else None
        inputs = Tokens(batch["tokens"], batch["positions"], batch["segment_ids"], blocks)
        if dropout:
            inputs = inputs._replace(key=batch["keys"][0, 0])
        arguments = {name: argument(batch) for name, argument in (taps or {}).items()}
        return model.apply(params, inputs, products=layers, taps=arguments), model.head(params)

    return forward


def make_prediction_statistics(
    model: Model,
    block_size: int,
    quantized: Quantized | None = None,
    loss: Loss = CROSS_ENTROPY,
    temperature: float = 1.0,
) -> Callable[..., TokenStatistics]:
    """(trained, batch) -> statistics [B, T] of the distribution that the model predicts.

    The loss decides which distribution that is; what it minimises is not computed. Its logits are
    divided by the temperature given here, and not by that of the loss.
    """
    forward = make_forward(model, quantized, loss.attention_blocks)

    def statistics(trained, batch):
        outputs, head_DV = forward(trained, batch)
        inputs = _inputs(model, block_size, outputs.hidden, head_DV, batch["targets"])
        inputs = inputs._replace(params=trained.loss, temperature=temperature)
        return sharded_loss.prediction_statistics(loss, inputs)

    return statistics


def make_training_statistics(
    model: Model,
    block_size: int,
    objective: Objective,
    quantized: Quantized | None = None,
    *,
    dropout: bool = True,
) -> Callable[..., tuple[TokenStatistics, dict[str, Any]]]:
    """(trained, batch, teachers={}) -> (statistics [B, T] with the loss of each token, aux).

    `aux` holds the taps of the model that the objective asks for, those of a teacher behind
    "reference_", the statistics of its further heads and its measures. The batch holds "keys" for a
    random loss; `teachers` maps the names of the objective's teachers to their `ReferenceModel`. An
    evaluation is without `dropout`.
    """
    loss = objective.loss
    forward = make_forward(model, quantized, loss.attention_blocks, objective.taps, dropout)

    def statistics(trained, batch, teachers=MappingProxyType({})):
        outputs, head_DV = forward(trained, batch)
        aux = dict(outputs.aux)
        inputs = _inputs(model, block_size, outputs.hidden, head_DV, batch["targets"])
        stored = {name: batch[name] for name in loss.batch_keys}
        inputs = inputs._replace(
            params=trained.loss,
            keys=batch.get("keys"),
            stored=stored,
            temperature=loss.temperature,
        )
        of_teachers = {name: one.forward(one.trained, batch) for name, one in teachers.items()}
        inputs = inputs._replace(
            teachers={
                name: losses.Teacher(its_outputs.hidden, its_head, products(teachers[name].softcap))
                for name, (its_outputs, its_head) in of_teachers.items()
            }
        )
        for its_outputs, _ in of_teachers.values():
            aux |= {f"reference_{name}": x for name, x in its_outputs.aux.items()}
        found = sharded_loss.training_statistics(loss, inputs, batch["weights"])
        for name, head in objective.heads.items():
            states_BTD = head.states(trained.loss, outputs.hidden, outputs.aux)
            further = _inputs(model, block_size, states_BTD, head_DV, head.targets(batch))
            aux[name] = sharded_loss.prediction_statistics(CROSS_ENTROPY, further)
        for name, measure in objective.measures.items():
            aux[name] = measure(inputs, found, batch)
        return found, aux

    return statistics


def _inputs(model, block_size, hidden_BTD, head_DV, targets_BT) -> losses.Inputs:
    softcap = model.config.logit_softcap
    return losses.Inputs(hidden_BTD, head_DV, targets_BT, softcap=softcap, block_size=block_size)


def base_model(model: Model, trained: Trained) -> tuple[Model, Trained]:
    """The model below the adapters, and its parameters: the same arrays, no copy of them."""
    return make_model(merged_config(model.config), RULES), Trained(without(trained.params))


def token_keys(seed: int, step: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A random key for each token, [B, T], that depends on seed, step, row and position alone.

    So that a resumed run, and one on other devices or with other micro-batches, draws the same.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    rows_B, positions_T = (jnp.arange(size) for size in shape)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, positions_T)
