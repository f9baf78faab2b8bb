"""How fast a model draws text, one sequence at a time and many at once.

B sequences, P tokens of a prompt, S tokens that are drawn.
"""

import jax
import jax.numpy as jnp

from lm.model import decoding
from lm.planning.item import Item
from lm.training import experiment

SEQUENCES, DRAWN = (1, 64), 128
_PROMPT = 16


def sampling(run: experiment.Experiment) -> list[Item]:
    """`decoding.draw` of S tokens behind a short prompt, at temperature 1; no sequence ends.

    The fraction is that of the bandwidth: every step reads all parameters once.
    """
    params = jax.jit(run.model.init)(jax.random.key(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    vocabulary = run.model.config.vocab_size

    def draw(params, prompts_BP, mask_BP, key):
        return decoding.draw(
            run.model, params, prompts_BP, mask_BP, key, steps=DRAWN, ends=(-1,), temperature=1.0
        )

    compiled = jax.jit(draw)

    def item(rows):
        prompts_BP = jax.random.randint(jax.random.key(1), (rows, _PROMPT), 0, vocabulary)
        inputs = params, prompts_BP, jnp.ones((rows, _PROMPT), bool), jax.random.key(2)
        return Item(
            f"sampling {rows} x {DRAWN}",
            lambda: compiled(*inputs),
            flops=0,
            bytes=DRAWN * size,
            formula=f"{DRAWN} reads of {size:,} bytes of parameters",
            tokens=rows * DRAWN,
        )

    return [item(rows) for rows in SEQUENCES]
