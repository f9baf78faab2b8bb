"""Input interfaces: how token ids become vectors of about unit mean square.

B batch, T length, V vocabulary, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.model.config import ModelConfig


class LearnedTable(nn.Module):
    """A trained table [V, D], one row a token; entries start as N(0, 1/D), the output is scaled
    by sqrt(D), so that the same table serves as an output head with logits of about unit variance.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        self.table = self.param(
            "table",
            nn.with_logical_partitioning(init, ("vocab", "embed")),
            (c.vocab_size, c.width),
            jnp.dtype(c.param_dtype),
        )

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors of the ids, [B, T, D] in the compute dtype."""
        # Un-sharding the width just before the lookup keeps XLA from rematerialising the table on
        # every device ("involuntary full rematerialization").
        table_VD = nn.with_logical_constraint(self.table, ("vocab", None))
        x_BTD = table_VD.astype(self.config.dtype)[ids_BT]
        return x_BTD * jnp.asarray(self.config.width**0.5, x_BTD.dtype)

    def head(self) -> jax.Array:
        """The table as an output head, [D, V]."""
        return nn.with_logical_constraint(self.table, ("vocab", None)).T
