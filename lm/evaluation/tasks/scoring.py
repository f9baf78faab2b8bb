"""Log-probabilities of tokens, many texts at a time on the mesh.

B rows, T tokens of a row, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.compression.phases import Quantized
from lm.evaluation.tasks.encoding import Ids
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.parallel.in_turn import in_turn
from lm.parallel.mesh import put_batch, share, to_host
from lm.parallel.sharded_loss import prediction_statistics
from lm.training.forward import make_forward
from objectives import losses

# Few lengths are compiled for: powers of two from here on.
_SHORTEST = 32

# Tokens of a batch, padding included; a longer row is a batch of its own.
_TOKENS = 4096

# Positions of which all logits are there at the same time.
_CHUNK = 128


class Scored(NamedTuple):
    """What a model gives to the tokens that were asked for.

    Attributes:
      log_probabilities: of each, in nats, [scored] float32.
      greedy: whether each of them is the most likely token in its place; False if not asked for.
    """

    log_probabilities: np.ndarray
    greedy: bool


class Scorer:
    """(trained, texts, between) -> `Scored` of each, in their order; compiled once a shape.

    Args:
      model: the model.
      mesh: that it lies on.
      loss: decides the distribution.
      quantized: puts weights and activations on their grids; None leaves them.
      block_size: columns of the head that are multiplied at a time.
      greedy: also look for the most likely token, which takes the head's product twice.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        *,
        loss: losses.Loss = losses.CROSS_ENTROPY,
        quantized: Quantized | None = None,
        block_size: int = 1024,
        greedy: bool = False,
    ):
        self._mesh, self._greedy = mesh, greedy
        self._compute = jax.jit(_make_compute(model, loss, quantized, block_size, greedy))

    def __call__(
        self,
        trained: Trained,
        texts: Sequence[Ids],
        between: Callable[[], Any] = lambda: None,
    ) -> list[Scored]:
        """All processes have to ask, with the same texts."""
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        found: list[Scored | None] = [None] * len(texts)
        for chosen, length in self._batches(texts, order):
            between()
            part = [texts[i] for i in chosen]
            batch = put_batch(self._mesh, self._rows(part, length))
            (results,) = in_turn([self._compute(trained, batch)])
            log_p_BT, best_BT = (to_host(x) for x in results)
            for row, (i, text) in enumerate(zip(chosen, part, strict=True)):
                last = len(text.tokens) - 1
                scored = slice(last - text.scored, last)
                greedy = self._greedy and bool(best_BT[row, scored].all())
                found[i] = Scored(log_p_BT[row, scored], greedy)
        return found

    def _batches(self, texts: Sequence[Ids], order: Sequence[int]):
        """Yields the texts of each batch, and its T."""
        start = 0
        while start < len(order):
            length = self._room(len(texts[order[start]].tokens) - 1)
            count = max(_TOKENS // length, 1)
            chosen = order[start : start + count]
            # A text that fits into a much shorter row waits for it.
            chosen = [i for i in chosen if self._room(len(texts[i].tokens) - 1) == length]
            yield chosen, length
            start += len(chosen)

    def _room(self, length: int) -> int:
        room = max(_SHORTEST, 1 << (length - 1).bit_length())
        parts = self._mesh.shape["sequence"]
        return -(-room // parts) * parts

    def _rows(self, texts: Sequence[Ids], length: int) -> dict[str, np.ndarray]:
        """This process's rows of a batch, of which there are a power of two or a few more."""
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        rows = -(-(1 << (len(texts) - 1).bit_length()) // shards) * shards
        tokens_BT = np.zeros((rows, length), np.int32)
        targets_BT, segments_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
        for row, text in enumerate(texts):
            count = len(text.tokens) - 1
            tokens_BT[row, :count], targets_BT[row, :count] = text.tokens[:-1], text.tokens[1:]
            segments_BT[row, :count] = 1
        positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)
        batch = {
            "tokens": tokens_BT,
            "targets": targets_BT,
            "segment_ids": segments_BT,
            "positions": positions_BT * segments_BT,
        }
        index, count = share(self._mesh)
        size = rows // count
        return {name: x[index * size : (index + 1) * size] for name, x in batch.items()}


def _make_compute(model, loss, quantized, block_size, greedy):
    """(trained, batch) -> (log p of the targets [B, T] float32, whether each is the likeliest)."""
    forward = make_forward(model, quantized, loss.attention_blocks)
    softcap = model.config.logit_softcap

    def compute(trained, batch):
        outputs, head_DV = forward(trained, batch)
        targets_BT = batch["targets"]

        def inputs(hidden_BTD, targets_BT):
            return losses.Inputs(
                hidden_BTD,
                head_DV,
                targets_BT,
                params=trained.loss,
                softcap=softcap,
                block_size=block_size,
            )

        nll_BT = prediction_statistics(loss, inputs(outputs.hidden, targets_BT)).nll
        if not greedy:
            return -nll_BT, jnp.zeros(nll_BT.shape, bool)

        def is_best(one):
            hidden_D, target = one
            logits_11V = losses.logits(loss, inputs(hidden_D[None, None], target[None, None]))
            return jnp.argmax(logits_11V[0, 0]) == target

        flat_ND = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
        best_N = jax.lax.map(is_best, (flat_ND, targets_BT.reshape(-1)), batch_size=_CHUNK)
        return -nll_BT, best_N.reshape(targets_BT.shape)

    return compute
