"""Log-probabilities of a rollout under the trained model before its first step on it.

B rows, T tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.parallel.mesh import row_sharding
from lm.training.experiment import Experiment
from lm.training.forward import make_prediction_statistics
from lm.training.gradients import gather

# The array that an objective asks for in its batch keys.
NAME = "old_log_probability"


def make_old_log_probability(built: Experiment, quantized: bool) -> Callable[..., jax.Array]:
    """(trained, batch) -> log p [B, T] float32 of every drawn target, 0 elsewhere; jitted.

    What a training step without dropout would compute, with as many micro-batches, where the
    sampler may compute something else.

    Args:
      built: the run.
      quantized: whether the phase is that of quantized training.
    """
    loss, config = built.objective.loss, built.config
    statistics = make_prediction_statistics(
        built.model,
        config.objective.block_size,
        built.quantized if quantized else None,
        loss,
        loss.temperature,
    )

    def log_probability(trained, batch):
        log_p_BT = gather(
            lambda trained, micro: statistics(trained, micro).log_probability,
            trained,
            batch,
            config.train.accumulation,
        )
        return jnp.where(batch["weights"] != 0, log_p_BT, 0.0)

    return jax.jit(log_probability, out_shardings=row_sharding(built.mesh))
