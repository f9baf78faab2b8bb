"""Text samples of a model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.tokenizers import Tokenizer
from lm.model import decoding
from lm.model.trained import Trained
from lm.model.transformer import Model
from lm.parallel.mesh import to_host
from objectives import losses


def make_sampler(
    model: Model, tokenizer: Tokenizer, loss: losses.Loss = losses.CROSS_ENTROPY, **options
) -> Callable[..., str]:
    """(trained, prompt, seed, steps) -> the prompt and its continuation, up to the end of text.

    Draws from the distribution that `loss` predicts. Options are those of `decoding.sample`.
    """

    def generate(trained, prompt_BP, key, steps):
        def logits(hidden_B1D, head_DV):
            targets_B1 = jnp.zeros(hidden_B1D.shape[:2], jnp.int32)
            cap = model.config.logit_softcap
            return losses.logits(
                loss, losses.Inputs(hidden_B1D, head_DV, targets_B1, trained.loss, cap)
            )

        mask_BP = jnp.ones_like(prompt_BP)
        return decoding.generate(
            model,
            trained.params,
            prompt_BP,
            mask_BP,
            key,
            steps=steps,
            logits=None if loss == losses.CROSS_ENTROPY else logits,
            **options,
        )

    generate = jax.jit(generate, static_argnames="steps")

    def sampler(trained: Trained, prompt: str, seed: int, steps: int) -> str:
        ids, _ = tokenizer.encode(prompt)
        prompt_BP = np.concatenate([[tokenizer.boundary], ids]).astype(np.int32)[None]
        tokens = to_host(generate(trained, prompt_BP, jax.random.key(seed), steps))[0]
        ends = np.flatnonzero(tokens == tokenizer.boundary)
        return prompt + tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)

    return sampler
