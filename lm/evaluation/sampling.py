"""Text samples of a model, as they come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.compression.phases import Quantized
from lm.data import chats
from lm.data.documents import SpecialToken
from lm.data.layout import encode_prompt
from lm.data.partial_text import PartialText
from lm.data.tokenizers import Tokenizer
from lm.model import decoding
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.parallel.mesh import to_host
from objectives import losses

# Tokens between two visits of the host.
_CHUNK = 16

# Tokens that the prompt of a chat has room for at least.
_SHORTEST = 64


class Sampler:
    """Continues prompts, token by token up to the end of text; compiled once a length."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        loss: losses.Loss = losses.CROSS_ENTROPY,
        quantized: Quantized | None = None,
        chunk: int = _CHUNK,
        chat: bool = False,
        **options: Any,
    ):
        """Draws from the distribution that `loss` predicts.

        Args:
          model: the model.
          tokenizer: of its text.
          loss: decides the distribution.
          quantized: puts the weights on their grids, one layer at a time, activations too, and
            keeps the cache in codes, where it says so; None leaves everything.
          chunk: tokens between two visits of the host.
          chat: for `answer`: the token that ends a turn ends the text, too.
          **options: temperature, top_k and top_p of `decoding.sample`.
        """
        self._tokenizer = tokenizer
        view, logits_of = of_trained(model, quantized), predicted_logits(model, loss)
        of_cache = quantized.cache if quantized else None

        closing = chats.end_of_turn(tokenizer.chat, tokenizer.special_tokens) if chat else ""
        special = isinstance(closing, SpecialToken)
        ends = (tokenizer.special_id(closing),) if special else ()
        self._ends = {tokenizer.end_of_text, *ends}
        # A marker of the end of a turn that is ordinary text.
        self._stop = "" if special else closing

        def start(trained, prompt_BP, mask_BP, key, steps):
            more = {"logits": logits_of(trained), "quantizer": of_cache}
            return decoding.start(view, trained, prompt_BP, mask_BP, key, steps=steps, **more)

        def advance(trained, state):
            return decoding.advance(
                view,
                trained,
                state,
                chunk,
                end_of_text=tokenizer.end_of_text,
                other_ends=ends,
                logits=logits_of(trained),
                **options,
            )

        self._start = jax.jit(start, static_argnames="steps")
        self._advance = jax.jit(advance, donate_argnums=1)

    def stream(self, trained: Trained, prompt: str, seed: int, steps: int) -> Iterator[str]:
        """Yields the continuation in pieces, at most `steps` tokens in all."""
        ids, _ = self._tokenizer.encode(prompt)
        prompt_P = np.concatenate([[self._tokenizer.beginning_of_text], ids]).astype(np.int32)
        return self._continue(trained, prompt_P[None], np.ones_like(prompt_P)[None], seed, steps)

    def answer(
        self, trained: Trained, messages: Sequence[chats.Message], seed: int, steps: int
    ) -> Iterator[str]:
        """Yields the next answer of a chat in pieces, up to the end of its turn.

        Raises:
          InputError: the chat template cannot render the messages.
        """
        ids_P = encode_prompt(messages, self._tokenizer)
        # Few lengths, so that a chat that grows is compiled for few of them.
        room = max(_SHORTEST, 1 << (len(ids_P) - 1).bit_length())
        prompt_P = np.zeros(room, np.int32)
        prompt_P[room - len(ids_P) :] = ids_P
        mask_P = (np.arange(room) >= room - len(ids_P)).astype(np.int32)
        pieces = self._continue(trained, prompt_P[None], mask_P[None], seed, steps)
        return until(pieces, self._stop) if self._stop else pieces

    def _continue(self, trained, prompt_1P, mask_1P, seed, steps) -> Iterator[str]:
        state = self._start(trained, prompt_1P, mask_1P, jax.random.key(seed), steps)
        tokens: list[int] = []
        text = PartialText(self._tokenizer)
        while len(tokens) < steps:
            state, found_BC = self._advance(trained, state)
            found = to_host(found_BC)[0][: steps - len(tokens)].tolist()
            end = next((i for i, token in enumerate(found) if token in self._ends), None)
            tokens += found[:end]
            last = end is not None or len(tokens) >= steps
            if piece := text.extend(np.array(tokens, np.int32), last):
                yield piece
            if last:
                return

    def __call__(self, trained: Trained, prompt: str, seed: int, steps: int) -> str:
        """The prompt and its continuation."""
        return prompt + "".join(self.stream(trained, prompt, seed, steps))


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Yields pieces of a text up to `stop`, none of which is shown."""
    held = ""
    for piece in pieces:
        held += piece
        before, found, _ = held.partition(stop)
        if found:
            if before:
                yield before
            return
        # What may be the beginning of `stop` waits.
        keep = next(
            n
            for n in range(min(len(stop) - 1, len(held)), -1, -1)
            if stop[:n] == held[len(held) - n :]
        )
        if shown := held[: len(held) - keep]:
            yield shown
        held = held[len(held) - keep :]
    if held:
        yield held


def predicted_logits(
    model: Model, loss: losses.Loss
) -> Callable[[Trained], decoding.Logits | None]:
    """(trained) -> the logits of the distribution that the loss predicts, for `decoding`."""

    def logits_of(trained):
        def logits(hidden_B1D, head_DV):
            targets_B1 = jnp.zeros(hidden_B1D.shape[:2], jnp.int32)
            cap = model.config.logit_softcap
            return losses.logits(
                loss, losses.Inputs(hidden_B1D, head_DV, targets_B1, trained.loss, cap)
            )

        return None if loss == losses.CROSS_ENTROPY else logits

    return logits_of


def of_trained(model: Model, quantized: Quantized | None) -> Model:
    """The model as a function of everything that is trained, with weights on their grids or not."""
    if quantized is None:
        return model._replace(
            apply=lambda trained, *others: model.apply(trained.params, *others),
            head=lambda trained: model.head(trained.params),
        )

    def apply(trained, *others):
        return model.apply(quantized.outer(trained), *others, products=quantized.layers(trained))

    return model._replace(apply=apply, head=lambda trained: model.head(quantized.outer(trained)))
