"""Low-rank adapters of the layers' matrices (LoRA, arXiv 2106.09685, section 4.1).

    y = x W + (alpha / r) dropout(x) A B,   A [in, r] of N(0, 1 / in), B [r, out] of zeros

L layers, D width in, F width out, R rank. The parameters of a matrix "layers/mlp/up" are
"layers/mlp/up_adapter_in" and "layers/mlp/up_adapter_out".
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.model.config import ModelConfig
from lm.model.packed_matrix import is_packed
from lm.model.products import project

IN, OUT = "_adapter_in", "_adapter_out"


def is_adapted(config: ModelConfig, path: str) -> bool:
    """Whether a matrix, such as "layers/mlp/up", has an adapter."""
    return bool(config.adapter_rank and re.search(config.adapter_matrices, path))


def adapter(module: nn.Module, name: str, x_BTD: jax.Array, shape: tuple, axes: tuple) -> jax.Array:
    """(alpha / r) dropout(x) A B, by two weights of `module`; without a random key no dropout."""
    c, dtype = module.config, jnp.dtype(module.config.param_dtype)
    normal = nn.initializers.normal(shape[0] ** -0.5)
    fresh = nn.with_logical_partitioning(normal, (axes[0], "rank"))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("rank", axes[1]))
    a_DR = module.param(f"{name}{IN}", fresh, (shape[0], c.adapter_rank), dtype)
    b_RF = module.param(f"{name}{OUT}", zeros, (c.adapter_rank, shape[1]), dtype)
    if c.adapter_dropout and module.has_rng("dropout"):
        keep = 1 - c.adapter_dropout
        kept_BTD = jax.random.bernoulli(module.make_rng("dropout"), keep, x_BTD.shape)
        x_BTD = jnp.where(kept_BTD, x_BTD / jnp.asarray(keep, x_BTD.dtype), 0)
    y_BTF = project(project(x_BTD, a_DR.astype(x_BTD.dtype)), b_RF.astype(x_BTD.dtype))
    return y_BTF * jnp.asarray(c.adapter_alpha / c.adapter_rank, x_BTD.dtype)


def merged_config(config: ModelConfig) -> ModelConfig:
    """The architecture after `merge`, and that below the adapters."""
    return dataclasses.replace(config, adapter_rank=0)


def without(params: Any) -> Any:
    """The parameters of the model below the adapters: the same arrays, without A and B."""
    return {
        name: without(part) if isinstance(part, dict) else part
        for name, part in params.items()
        if not name.endswith((IN, OUT))
    }


def merge(config: ModelConfig, params: Any) -> Any:
    """The parameters of a model with W + (alpha / r) A B in place of each W, A and B, unpacked.

    Computed in float32 and rounded once to the dtype of W.
    """
    merged = {}
    for name, part in params.items():
        part = part.unpack() if is_packed(part) else part
        if isinstance(part, dict):
            merged[name] = merge(config, part)
        elif not name.endswith((IN, OUT)):
            merged[name] = part
            if f"{name}{IN}" in params:
                a, b = (params[f"{name}{end}"].astype(jnp.float32) for end in (IN, OUT))
                change = jnp.matmul(a, b, precision="highest")
                change *= config.adapter_alpha / config.adapter_rank
                merged[name] = (part.astype(jnp.float32) + change).astype(part.dtype)
    return merged
