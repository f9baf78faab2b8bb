"""Text samples of a model, as they come."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.compression.phases import Quantized
from lm.data.partial_text import PartialText
from lm.data.tokenizers import Tokenizer
from lm.model import decoding
from lm.model.interface import LayerProducts, Model
from lm.model.trained import Trained
from lm.parallel.mesh import to_host
from objectives import losses

# Tokens between two visits of the host.
_CHUNK = 16


class Sampler:
    """Continues prompts, token by token up to the end of text; compiled once a length."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        loss: losses.Loss = losses.CROSS_ENTROPY,
        quantized: Quantized | None = None,
        chunk: int = _CHUNK,
        **options: Any,
    ):
        """Draws from the distribution that `loss` predicts.

        Args:
          model: the model.
          tokenizer: of its text.
          loss: decides the distribution.
          quantized: puts the weights on their grids, one layer at a time; None leaves them.
          chunk: tokens between two visits of the host.
          **options: temperature, top_k and top_p of `decoding.sample`.
        """
        self._tokenizer = tokenizer
        view = _view(model, quantized)

        def logits_of(trained):
            def logits(hidden_B1D, head_DV):
                targets_B1 = jnp.zeros(hidden_B1D.shape[:2], jnp.int32)
                cap = model.config.logit_softcap
                return losses.logits(
                    loss, losses.Inputs(hidden_B1D, head_DV, targets_B1, trained.loss, cap)
                )

            return None if loss == losses.CROSS_ENTROPY else logits

        def start(trained, prompt_BP, key, steps):
            mask_BP = jnp.ones_like(prompt_BP)
            return decoding.start(
                view, trained, prompt_BP, mask_BP, key, steps=steps, logits=logits_of(trained)
            )

        def advance(trained, state):
            return decoding.advance(
                view,
                trained,
                state,
                chunk,
                end_of_text=tokenizer.end_of_text,
                logits=logits_of(trained),
                **options,
            )

        self._start = jax.jit(start, static_argnames="steps")
        self._advance = jax.jit(advance, donate_argnums=1)

    def stream(self, trained: Trained, prompt: str, seed: int, steps: int) -> Iterator[str]:
        """Yields the continuation in pieces, at most `steps` tokens in all."""
        ids, _ = self._tokenizer.encode(prompt)
        end = self._tokenizer.end_of_text
        prompt_BP = np.concatenate([[self._tokenizer.beginning_of_text], ids]).astype(np.int32)[
            None
        ]
        state = self._start(trained, prompt_BP, jax.random.key(seed), steps)
        tokens: list[int] = []
        text = PartialText(self._tokenizer)
        while len(tokens) < steps:
            state, found_BC = self._advance(trained, state)
            found = to_host(found_BC)[0][: steps - len(tokens)].tolist()
            ended = end in found
            tokens += found[: found.index(end)] if ended else found
            last = ended or len(tokens) >= steps
            if piece := text.extend(np.array(tokens, np.int32), last):
                yield piece
            if last:
                return

    def __call__(self, trained: Trained, prompt: str, seed: int, steps: int) -> str:
        """The prompt and its continuation."""
        return prompt + "".join(self.stream(trained, prompt, seed, steps))


def _view(model: Model, quantized: Quantized | None) -> Model:
    """The model as a function of everything that is trained, with weights on their grids or not."""
    if quantized is None:
        return model._replace(
            apply=lambda trained, *others: model.apply(trained.params, *others),
            head=lambda trained: model.head(trained.params),
        )

    def apply(trained, *others):
        layers = LayerProducts(quantized.product, trained.scales["layers"])
        return model.apply(quantized.outer(trained), *others, products=layers)

    return model._replace(apply=apply, head=lambda trained: model.head(quantized.outer(trained)))
