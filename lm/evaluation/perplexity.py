"""Loss, perplexity and bits per byte over a stream of batches, and text samples."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lm.parallel.in_turn import in_turn
from lm.parallel.mesh import put_batch, to_host


class Evaluation(NamedTuple):
    """Averages over the targets of a split.

    Attributes:
      loss: sum(w * nll) / sum(w), nats per token.
      perplexity: exp(loss).
      bits_per_byte: sum(w * nll) / ln 2 / sum(w * bytes); the ends of documents are paid for but
        hold no bytes. Comparable between tokenizers.
      weight_sum: sum(w).
      full_precision_loss: with the weights as they are stored; None without quantization.
      quantized_loss: with the weights on their grids; None without quantization. `loss` is that of
        the phase.
      terms: of the objective, by name, its "loss" as "objective_loss": each the sum over the split
        divided by the denominator of the split.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    weight_sum: float
    full_precision_loss: float | None = None
    quantized_loss: float | None = None
    terms: Mapping[str, float] = {}

    def figures(self) -> dict[str, float]:
        """What there is, by name."""
        figures = self._asdict()
        terms = figures.pop("terms")
        return {name: x for name, x in figures.items() if x is not None} | dict(terms)


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    trained: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    limit: int | None = None,
    *,
    quantized: bool = False,
    terms: Callable[..., dict[str, tuple[jax.Array, jax.Array]]] | None = None,
) -> Evaluation:
    """Runs the jitted `eval_step` over at most `limit` batches.

    `quantized` says which of two losses is that of the phase. `terms` maps a batch to the sums and
    denominators of the terms of an objective.
    """
    measures = [functools.partial(eval_step, trained), *([terms] if terms else [])]
    taken = (put_batch(mesh, batch) for batch in itertools.islice(batches, limit))
    results = list(in_turn(measure(batch) for batch in taken for measure in measures))
    sums = results[:: len(measures)]
    # Each batch is summed in float32 on the device, the batches in float64 here.
    totals = (
        {name: math.fsum(float(to_host(s[name])) for s in sums) for name in sums[0]} if sums else {}
    )
    weight = totals.get("weight", 0.0)
    if not weight:
        return Evaluation(math.nan, math.nan, math.nan, 0.0)
    nll = totals["quantized_nll" if quantized else "nll"]
    both = {}
    if "quantized_nll" in totals:
        both["full_precision_loss"] = totals["nll"] / weight
        both["quantized_loss"] = totals["quantized_nll"] / weight
    loss = nll / weight
    perplexity = math.exp(loss) if loss < 700 else math.inf
    size = totals["bytes"]
    bits_per_byte = nll / math.log(2) / size if size else math.nan
    of_objective = _terms(results[1::2]) if terms else {}
    return Evaluation(loss, perplexity, bits_per_byte, weight, **both, terms=of_objective)


def _terms(parts: Sequence[dict[str, tuple[jax.Array, jax.Array]]]) -> dict[str, float]:
    """The quotients of sums over all batches."""
    found = {}
    for name in parts[0]:
        pairs = [[float(to_host(x)) for x in part[name]] for part in parts]
        total, denominator = (math.fsum(values) for values in zip(*pairs, strict=True))
        found["objective_loss" if name == "loss" else name] = total / (denominator or 1.0)
    return found
