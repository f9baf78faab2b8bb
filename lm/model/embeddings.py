"""Input interfaces: from token ids to vectors, and from the vectors of all ids to an output head.

B batch, T length, V vocabulary, D width, K bits of a code, R rank of a factored table.

Every interface but the plain codes starts with a mean square of about 1. `INTERFACES` maps the
names of `model.embedding` to modules; the arithmetic of codes is in `lm/model/codes.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.model.codes import (
    CODES,
    MEAN_SQUARE,
    affine_recode,
    bit_values,
    draw_affine,
    invert_affine,
    lift,
    sign_pattern,
    token_codes,
)
from lm.model.config import ModelConfig

__all__ = [
    "INTERFACES",
    "affine_recode",
    "draw_affine",
    "invert_affine",
    "lift",
    "token_codes",
]


class LearnedTable(nn.Module):
    """A trained table [V, D] with one row per token; entries start as N(0, 1/D).

    The output is multiplied by `model.embedding_scale`, by default sqrt(D), so that the same table
    serves as an output head with logits of about unit variance.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.table = _parameter(self, "table", (c.vocab_size, c.width), ("vocab", "embed"))

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors of the ids, [B, T, D] in the compute dtype."""
        return _look_up(self.table, ids_BT, self.config.dtype, self.config.embedding_scale)

    def head(self) -> jax.Array:
        """The table as an output head, [D, V]."""
        return nn.with_logical_constraint(self.table, ("vocab", None)).T


class LearnedPositions(nn.Module):
    """A trained vector for each position, added to that of the token.

    The table is [C, D], C = `model.max_positions`, and starts as N(0, 0.02^2). Later positions have
    the last vector.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        """Vectors of the positions, [B, T, D] in the compute dtype."""
        c = self.config
        shape, axes = (c.max_positions, c.width), ("position", "embed")
        table_CD = _parameter(self, "table", shape, axes, 0.02)
        table_CD = nn.with_logical_constraint(table_CD, (None, None))
        return table_CD.astype(c.dtype)[jnp.minimum(positions_BT, c.max_positions - 1)]


class LowRankTable(nn.Module):
    """A trained table in two factors, [V, R] and [R, D] (as in ALBERT, arXiv 1909.11942, section
    3.1): V R + R D parameters.

    The first factor is a `LearnedTable` of width R; the second starts as N(0, 1/R).
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.table = _parameter(self, "table", (c.vocab_size, c.embedding_rank), ("vocab", "rank"))
        self.projection = _parameter(
            self, "projection", (c.embedding_rank, c.width), ("rank", "embed")
        )

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors of the ids, [B, T, D] in the compute dtype."""
        return _look_up(self.table, ids_BT, self.config.dtype) @ _whole(self.projection, self)

    def head(self) -> jax.Array:
        """The product of the factors as an output head, [D, V], computed once a step."""
        c = self.config
        # The input is sqrt(R) table @ projection; a head of unit-variance logits is that / sqrt(D).
        scale = (c.embedding_rank / c.width) ** 0.5
        table_VR = nn.with_logical_constraint(self.table, ("vocab", None)).astype(c.dtype)
        return (table_VR @ (_whole(self.projection, self) * jnp.asarray(scale, c.dtype))).T


class TokenCodes(nn.Module):
    """Codes of the ids, lifted to the width (arXiv 2605.09751): no parameters and no table.

    The mean square of the input is 1/2 for values {0, 1} and 1 for {-1, +1}, times code_scale^2.
    """

    config: ModelConfig

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors of the ids, [B, T, D] in the compute dtype."""
        c = self.config
        codes_BTK = CODES[c.embedding](c.num_bits, c.code_seed).encode(ids_BT)
        return lift(
            codes_BTK,
            c.width,
            values=c.code_values,
            layout=c.code_layout,
            scale=c.code_scale,
            signs=sign_pattern(c.code_signs, c.code_copies, c.code_seed),
            dtype=jnp.dtype(c.dtype),
        )

    def head(self) -> jax.Array:
        """See `_head_of_all`; logits are then linear in the K bits of a token."""
        return _head_of_all(self, MEAN_SQUARE[self.config.code_values])


class ProjectedCodes(nn.Module):
    """x = c P: binary codes c times one trained matrix P, [K, D]."""

    config: ModelConfig

    def setup(self):
        c = self.config
        # Evenly used codes then start with unit mean square.
        deviation = (c.num_bits * MEAN_SQUARE[c.code_values]) ** -0.5
        self.projection = _parameter(
            self, "projection", (c.num_bits, c.width), ("code", "embed"), deviation
        )

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors of the ids, [B, T, D] in the compute dtype."""
        c = self.config
        codes_BTK = token_codes(ids_BT, c.num_bits)
        x_BTK = bit_values(codes_BTK, c.code_values, jnp.dtype(c.dtype))
        return x_BTK @ (_whole(self.projection, self) * jnp.asarray(c.code_scale, c.dtype))

    def head(self) -> jax.Array:
        """See `_head_of_all`; trained with the input. The logits have rank K."""
        return _head_of_all(self, 1.0)


class Gaussian(nn.Module):
    """Frozen vectors N(0, 1), one per token: neither parameters nor a stored table.

    Each is drawn again wherever its id occurs, by a counter-based generator (threefry) from
    `code_seed` and the id. That costs D draws per token and no memory: little beside a layer of a
    large model, visible in the step time of a small one.
    """

    config: ModelConfig

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Vectors of the ids, [B, T, D] in the compute dtype."""
        c = self.config
        key = jax.random.key(c.code_seed)

        def draw(token):
            return jax.random.normal(jax.random.fold_in(key, token), (c.width,))

        x_BTD = jax.vmap(draw)(ids_BT.reshape(-1)).reshape(*ids_BT.shape, c.width)
        return (x_BTD * c.code_scale).astype(c.dtype)

    def head(self) -> jax.Array:
        """See `_head_of_all`; V D draws per step."""
        return _head_of_all(self, 1.0)


INTERFACES = {
    "learned": LearnedTable,
    "binary": TokenCodes,
    "affine": TokenCodes,
    "random_codes": TokenCodes,
    "gaussian": Gaussian,
    "projected": ProjectedCodes,
    "learned_low_rank": LowRankTable,
}


def _parameter(module, name, shape, axes, deviation=None):
    """A parameter [rows, columns] that starts as N(0, deviation^2).

    By default the variance is 1 / columns for a table and 1 / rows for a projection: one over the
    number of summands of a product with it.
    """
    if deviation is None:
        deviation = shape[axes[0] == "vocab"] ** -0.5
    init = nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)
    return module.param(name, init, shape, jnp.dtype(module.config.param_dtype))


def _look_up(table_VD, ids_BT, dtype, scale=0.0):
    """Rows of a table times the scale; 0 is that of unit mean square at the start, sqrt(D)."""
    # Un-sharding the width just before the lookup keeps XLA from rematerialising the table on
    # every device ("involuntary full rematerialization").
    table_VD = nn.with_logical_constraint(table_VD, ("vocab", None))
    x_BTD = table_VD.astype(dtype)[ids_BT]
    return x_BTD * jnp.asarray(scale or table_VD.shape[1] ** 0.5, x_BTD.dtype)


def _whole(projection_KD, module):
    """A small matrix in the compute dtype, un-sharded: activations keep their rows."""
    projection_KD = nn.with_logical_constraint(projection_KD, (None, None))
    return projection_KD.astype(module.config.dtype)


def _head_of_all(interface, mean_square):
    """The vectors of all V ids as an output head [D, V]: `model.code_head`.

    A head without parameters of its own, computed in every step and divided by sqrt(D mean_square)
    so that logits start with about unit variance. It is ours; the head of the paper is trained and
    untied. Its limits: the whole [D, V] array is a temporary of the step, and with codes (projected
    ones included) a token's logit is linear in its K bits. The logits then have rank K, and at
    V = 2^K the prediction is a product of K independent bits. Gaussian vectors have rank D.
    """
    c = interface.config
    x_VD = interface(jnp.arange(c.vocab_size, dtype=jnp.int32))
    x_VD = nn.with_logical_constraint(x_VD, ("vocab", None))
    return x_VD.T * jnp.asarray((c.width * mean_square * c.code_scale**2) ** -0.5, x_VD.dtype)
