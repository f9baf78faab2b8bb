"""Text samples of a model, whole or piece by piece."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.partial_text import PartialText
from lm.data.tokenizers import Tokenizer
from lm.model import decoding
from lm.model.trained import Trained
from lm.model.transformer import Model
from lm.parallel.mesh import to_host
from objectives import losses


def make_sampler(
    model: Model, tokenizer: Tokenizer, loss: losses.Loss = losses.CROSS_ENTROPY, **options: Any
) -> Callable[..., str]:
    """Makes a function that samples a text, (trained, prompt, seed, steps) -> str.

    The text is the prompt and its continuation by at most `steps` tokens, up to the end of text.
    What is compiled is kept, and holds no parameters: make one sampler and call it often.

    Args:
      model: the model.
      tokenizer: of the model.
      loss: the loss that the model was trained with; tokens are drawn from the distribution that it
        predicts.
      options: temperature, top_k, top_p, see `decoding.sample`.
    """
    stream = make_stream(model, tokenizer, loss, **options)

    def sampler(trained: Trained, prompt: str, seed: int, steps: int) -> str:
        return prompt + "".join(stream(trained, prompt, seed, steps, steps))

    return sampler


def make_stream(
    model: Model, tokenizer: Tokenizer, loss: losses.Loss = losses.CROSS_ENTROPY, **options: Any
) -> Callable[..., Iterator[str]]:
    """Makes a function that gives the continuation of a prompt while it is computed.

    (trained, prompt, seed, steps, chunk) -> pieces of text, each of about `chunk` tokens. Joined,
    they are the same for every `chunk`. Arguments are those of `make_sampler`.
    """
    start, advance = _jitted(model, tokenizer.boundary, loss, options)

    def stream(
        trained: Trained, prompt: str, seed: int, steps: int, chunk: int = 1
    ) -> Iterator[str]:
        ids, _ = tokenizer.encode(prompt)
        prompt_BP = np.concatenate([[tokenizer.boundary], ids]).astype(np.int32)[None]
        progress = start(trained, prompt_BP, jax.random.key(seed), steps)
        text, stop, done = PartialText(tokenizer), 0, False
        while not done:
            stop = min(stop + chunk, steps)
            progress = advance(trained, progress, stop)
            ended = bool(to_host(progress.ended_B)[0])
            done = ended or stop == steps
            tokens_S = to_host(progress.tokens_BS)[0, : int(to_host(progress.count)) - ended]
            if piece := text.extend(tokens_S, done):
                yield piece

    return stream


def _jitted(
    model: Model, end: int, loss: losses.Loss, options: dict[str, Any]
) -> tuple[Callable[..., decoding.Progress], Callable[..., decoding.Progress]]:
    """`decoding.start` (trained, prompt, key, steps) and `advance` (trained, progress, stop)."""

    def logits_of(trained):
        if loss == losses.CROSS_ENTROPY:
            return None
        return functools.partial(_predicted_logits, model, loss, trained)

    @functools.partial(jax.jit, static_argnames="steps")
    def start(trained, prompt_BP, key, steps):
        mask_BP = jnp.ones_like(prompt_BP)
        logits = logits_of(trained)
        return decoding.start(
            model,
            trained.params,
            prompt_BP,
            mask_BP,
            key,
            steps=steps,
            end=end,
            logits=logits,
            **options,
        )

    @functools.partial(jax.jit, donate_argnames="progress")
    def advance(trained, progress, stop):
        logits = logits_of(trained)
        return decoding.advance(
            model, trained.params, progress, stop, end=end, logits=logits, **options
        )

    return start, advance


def _predicted_logits(model, loss, trained, hidden_B1D, head_DV):
    """Logits [B, 1, V] of the distribution that a loss predicts."""
    targets_B1 = jnp.zeros(hidden_B1D.shape[:2], jnp.int32)
    cap = model.config.logit_softcap
    return losses.logits(loss, losses.Inputs(hidden_B1D, head_DV, targets_B1, trained.loss, cap))
