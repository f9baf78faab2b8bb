"""What a weighting is, how weightings are stacked, and how their sums are normalised.

B rows, T tokens. A sample is a document, by `batch["sample_ids"]`; see
`objectives.weighting.samples`. d is the weight of the data (`batch["weights"]`), l the loss of a
token (`statistics.nll`), w the weight of a token in the loss, u = w / d its multiplier.
"""

import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from objectives.weighting.samples import find_samples, sample_sums, spread

NORMALISATIONS = ("kept", "all", "sequence")

# Annotates a hyper-parameter that is a number of training documents; 0 takes all of the run's.
TRAINING_DOCUMENTS = "training documents"


class Weighting(NamedTuple):
    """How much each token counts in the loss sum(w * l) / sum(w).

    What cannot be weighted is never dropped in silence: a live token (d != 0) with a score of NaN,
    be it for its own loss, its reference or an unknown sample, gets the weight NaN. The loss is NaN
    then, and the training step is skipped and counted. Tokens with d = 0 may hold anything.

    Attributes:
      init: () -> state, a pytree that is carried in the train state and in the checkpoint.
      weigh: (statistics, batch, references, state, step) -> (weights, state, metrics). Weights are
        float32 [B, T], carry no gradient (unless `detached` is False), and are zero wherever the
        weight of the data is zero. `statistics` is None for a weighting that reads only the data;
        `references` holds float arrays by name. Metrics are float32 scalars by name. All rows are
        those of the global, accumulated batch: a statistic of the batch means all of it.
      uses_statistics: whether `weigh` reads `statistics`.
      references: names of what `references` must hold, [B, T] unless the method says otherwise.
      taps: name of a tap of the model -> (batch) -> its argument; see `objectives.Objective`. The
        result is in `references` under the same name.
      batch_keys: names of what `batch` must hold besides the keys of every batch.
      normaliser: the denominator, "kept" for sum(w) or "all" for sum(d); see `normalise`.
      detached: whether the weights carry no gradient. The denominator never does.
      signed: whether weights are negative, so that sum(w) must not be the denominator.
      report: whether the shape of the weights is worth its metrics (`weight_metrics`).
    """

    init: Callable[[], Any]
    weigh: Callable[..., tuple[Any, Any, dict[str, Any]]]
    uses_statistics: bool = False
    references: tuple[str, ...] = ()
    taps: Mapping[str, Callable[..., jax.Array]] = {}
    batch_keys: tuple[str, ...] = ()
    normaliser: str = "kept"
    detached: bool = True
    signed: bool = False
    report: bool = True


def chain(*weightings: Weighting) -> Weighting:
    """The product: w = d * u_1 * u_2 * ..., each multiplier computed from the batch as it is.

    State is the tuple of the states of those members that carry something, and () where none does,
    as for a single one: such weightings can be exchanged when a run goes on from a checkpoint.
    Metrics are united. The denominator is that of the members,
    and sum(d) where they differ.

    Raises:
      ValueError: no weighting.
    """
    if not weightings:
        raise ValueError("chain needs at least one weighting")
    if len(weightings) == 1:
        return weightings[0]

    carries = [bool(jax.tree.leaves(jax.eval_shape(member.init))) for member in weightings]

    def weigh(statistics, batch, references, state, step):
        data_BT = batch["weights"]
        live_BT = data_BT != 0
        weights_BT, states, metrics, carried = data_BT, [], {}, iter(state)
        for member, stateful in zip(weightings, carries, strict=True):
            old = next(carried) if stateful else member.init()
            one_BT, new, values = member.weigh(statistics, batch, references, old, step)
            multiplier_BT = jnp.where(live_BT, one_BT / jnp.where(live_BT, data_BT, 1.0), 0.0)
            weights_BT = jnp.where(live_BT, weights_BT * multiplier_BT, 0.0)
            if stateful:
                states.append(new)
            metrics |= values
        return weights_BT, tuple(states), metrics

    return Weighting(
        init=lambda: tuple(
            m.init() for m, stateful in zip(weightings, carries, strict=True) if stateful
        ),
        weigh=weigh,
        uses_statistics=any(m.uses_statistics for m in weightings),
        references=_union(m.references for m in weightings),
        taps={name: tap for m in weightings for name, tap in m.taps.items()},
        batch_keys=_union(m.batch_keys for m in weightings),
        normaliser="all" if any(m.normaliser == "all" for m in weightings) else "kept",
        detached=all(m.detached for m in weightings),
        signed=any(m.signed for m in weightings),
        report=any(m.report for m in weightings),
    )


def normalise(weighting: Weighting, by: str) -> Weighting:
    """The same weights under another normalisation; papers differ there more than in the weights.

      kept      sum(w l) / sum(w): the mean over what is kept. The size of the loss, and with it the
                effective learning rate, does not depend on the size of the weights.
      all       sum(w l) / sum(d): smaller weights mean a smaller loss and a smaller gradient.
      sequence  sum(v l) / sum(v) with v = w / (sum of d over the sample): every sample counts
                equally, whatever its number of targets, times what the weighting gives it. With
                sample weights that sum to one this is the weighted mean of the samples' mean
                losses. A sample is a document (see `objectives.weighting.samples`), not a row.

    Raises:
      ValueError: an unknown name, or weights that are negative under anything but `all`: the
        quotient would turn their sign back.
    """
    if by not in NORMALISATIONS:
        raise ValueError(f"by={by!r} is not one of: {', '.join(NORMALISATIONS)}")
    if weighting.signed and by != "all":
        raise ValueError(f"by={by!r} cancels the sign of negative weights; valid: 'all'")
    if by != "sequence":
        return weighting._replace(normaliser=by)

    def weigh(statistics, batch, references, state, step):
        weights_BT, state, metrics = weighting.weigh(statistics, batch, references, state, step)
        samples = find_samples(batch)
        total_BT = spread(samples, sample_sums(samples, batch["weights"])[0])
        return weights_BT / _or_one(total_BT), state, metrics

    keys = _union([weighting.batch_keys, ("sample_ids",)])
    return weighting._replace(weigh=weigh, normaliser="kept", batch_keys=keys)


def weight_metrics(weights_BT: jax.Array, data_weights_BT: jax.Array) -> dict[str, jax.Array]:
    """What the weights look like, over the whole batch.

    kept_share: share of targets (d != 0) with w != 0. weight_entropy: -sum q log q of
    q = |w| / sum|w|, nats; log(number of targets) when uniform. effective_sample_size:
    (sum w)^2 / sum w^2, the number of tokens that equal weights would need.
    """
    targets = jnp.sum(data_weights_BT != 0, dtype=jnp.float32)
    kept = jnp.sum((weights_BT != 0) & (data_weights_BT != 0), dtype=jnp.float32)
    size_BT = jnp.abs(weights_BT)
    q_BT = size_BT / _or_one(jnp.sum(size_BT))
    log_q_BT = jnp.log(jnp.where(q_BT > 0, q_BT, 1.0))
    squares = jnp.sum(jnp.square(weights_BT))
    return {
        "kept_share": kept / jnp.maximum(targets, 1.0),
        "weight_entropy": -jnp.sum(q_BT * log_q_BT),
        "effective_sample_size": jnp.square(jnp.sum(weights_BT)) / _or_one(squares),
    }


def per_document(factory: Callable[..., Weighting]) -> list[str]:
    """The hyper-parameters of a factory that are annotated with `TRAINING_DOCUMENTS`."""
    hints = typing.get_type_hints(factory, include_extras=True)
    return [
        name
        for name, hint in hints.items()
        if TRAINING_DOCUMENTS in getattr(hint, "__metadata__", ())
    ]


def stateless() -> tuple[()]:
    """The `init` of a weighting that carries nothing."""
    return ()


def multiply(batch: dict[str, jax.Array], multiplier: jax.Array) -> jax.Array:
    """w = d * u, [B, T], and 0 where d is 0, whatever u holds there."""
    data_BT = batch["weights"]
    return jnp.where(data_BT != 0, data_BT * multiplier, 0.0)


def reference(references: dict[str, jax.Array], name: str) -> jax.Array:
    """One of the references, detached.

    Raises:
      ValueError: it is not there.
    """
    if name not in references:
        given = ", ".join(sorted(references)) or "none"
        raise ValueError(f"reference {name!r} is missing; given: {given}")
    return jax.lax.stop_gradient(references[name]).astype(jnp.float32)


def check_number(
    name: str,
    value: float,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
) -> None:
    """Raises ValueError, which starts with the hyper-parameter's name, for a bad number."""
    if least <= value <= most and value > above:
        return
    bounds = []
    if above > -math.inf:
        bounds.append(f"above {above:g}")
    elif least > -math.inf:
        bounds.append(f"at least {least:g}")
    if most < math.inf:
        bounds.append(f"at most {most:g}")
    raise ValueError(f"{name}={value} must be {' and '.join(bounds) or 'a number'}")


def check_name(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError, which starts with the hyper-parameter's name, for a bad choice."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of: {', '.join(choices)}")


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x != 0, x, 1.0)


def _union(names) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in names for name in group))
