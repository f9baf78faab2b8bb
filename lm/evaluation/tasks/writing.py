"""Answers that a model writes greedily, many at a time on the mesh.

B rows, P tokens of the longest prompt, C tokens between two visits of the host.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lm.compression.phases import Quantized
from lm.data.tokenizers import Tokenizer
from lm.evaluation.sampling import of_trained, predicted_logits
from lm.evaluation.tasks.answers import cut
from lm.model import decoding
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.parallel.mesh import put_batch, row_sharding, share, to_host
from objectives import losses

_CHUNK = 16

# Prompts have few lengths: powers of two from here on.
_SHORTEST = 32

# Rows of a batch.
_ROWS = 32


class Asked(NamedTuple):
    """A prompt [P] int32, the texts that end its answer, and the tokens of that at most."""

    ids: np.ndarray
    until: tuple[str, ...]
    tokens: int


class Writer:
    """(trained, asked, between) -> the answer to each; compiled once a shape.

    Args:
      model: the model.
      mesh: that it lies on.
      tokenizer: of its text; its end of text ends an answer, too.
      loss: decides the distribution.
      quantized: puts weights, activations and the cache on their grids; None leaves them.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        tokenizer: Tokenizer,
        *,
        loss: losses.Loss = losses.CROSS_ENTROPY,
        quantized: Quantized | None = None,
    ):
        self._mesh, self._tokenizer = mesh, tokenizer
        view, logits_of = of_trained(model, quantized), predicted_logits(model, loss)
        of_cache = quantized.cache if quantized else None

        def start(trained, prompt_BP, mask_BP, steps):
            more = {"logits": logits_of(trained), "quantizer": of_cache}
            key = jax.random.key(0)  # The likeliest token depends on no draw.
            return decoding.start(view, trained, prompt_BP, mask_BP, key, steps=steps, **more)

        def advance(trained, state):
            return decoding.advance(
                view,
                trained,
                state,
                _CHUNK,
                end_of_text=tokenizer.end_of_text,
                temperature=0.0,
                logits=logits_of(trained),
            )

        self._start = jax.jit(start, static_argnames="steps")
        self._advance = jax.jit(advance, donate_argnums=1)

    def __call__(
        self,
        trained: Trained,
        asked: Sequence[Asked],
        between: Callable[[], Any] = lambda: None,
    ) -> list[str]:
        """All processes have to ask, with the same prompts."""
        order = sorted(range(len(asked)), key=lambda i: (-asked[i].tokens, -len(asked[i].ids)))
        found = [""] * len(asked)
        for start in range(0, len(order), _ROWS):
            between()
            chosen = order[start : start + _ROWS]
            answers = self._write(trained, [asked[i] for i in chosen])
            for i, answer in zip(chosen, answers, strict=True):
                found[i] = answer
        return found

    def _write(self, trained: Trained, asked: Sequence[Asked]) -> list[str]:
        """The answers of one batch."""
        batch = put_batch(self._mesh, self._rows(asked), row_sharding(self._mesh))
        most = -(-max(one.tokens for one in asked) // _CHUNK) * _CHUNK
        state = self._start(trained, batch["tokens"], batch["mask"], most)
        written: list[list[int]] = [[] for _ in asked]
        answers, open_rows = [""] * len(asked), set(range(len(asked)))
        while open_rows:
            state, tokens_BC = self._advance(trained, state)
            tokens_BC = to_host(tokens_BC)
            for row in list(open_rows):
                written[row] += tokens_BC[row].tolist()
                answers[row], ended = self._answer(written[row], asked[row])
                if ended:
                    open_rows.discard(row)
        return answers

    def _answer(self, tokens: list[int], asked: Asked) -> tuple[str, bool]:
        """The answer so far, and whether it has ended."""
        end = self._tokenizer.end_of_text
        kept = tokens[: asked.tokens]
        if end in kept:
            kept = kept[: kept.index(end)]
        text = self._tokenizer.decode(np.array(kept, np.int32))
        ended = len(kept) < len(tokens) or len(kept) >= asked.tokens
        answer = cut(text, asked.until)
        return answer, ended or len(answer) < len(text)

    def _rows(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """This process's prompts, padded on the left; rows without one repeat the last."""
        longest = max(len(one.ids) for one in asked)
        room = max(_SHORTEST, 1 << (longest - 1).bit_length())
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        rows = -(-(1 << (len(asked) - 1).bit_length()) // shards) * shards
        filled = [*asked, *[asked[-1]] * (rows - len(asked))]
        tokens_BP, mask_BP = np.zeros((rows, room), np.int32), np.zeros((rows, room), np.int32)
        for row, one in enumerate(filled):
            tokens_BP[row, room - len(one.ids) :] = one.ids
            mask_BP[row, room - len(one.ids) :] = 1
        index, count = share(self._mesh)
        size = rows // count
        own = slice(index * size, (index + 1) * size)
        return {"tokens": tokens_BP[own], "mask": mask_BP[own]}
