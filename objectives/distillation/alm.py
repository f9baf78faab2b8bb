"""Distillation across tokenizers by the likelihood of pieces of text.

B batch, T length. A chunk is the text between two byte boundaries that both tokenizations have.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from objectives.losses.base import CROSS_ENTROPY
from objectives.objective import Objective, Prepared
from objectives.terms import Term, masked_sum
from objectives.weighting.base import check_name, check_number

REFERENCE = "chunk_log_probability"

# Keeps scaled log-probabilities below 0, where log(1 - e^x) is finite; of the authors' code.
_EPSILON = 1e-6


def alm(
    temperature: float = 100.0, difference: str = "binary_kl", cross_entropy: float = 0.0
) -> Objective:
    """Approximate likelihood matching: the mean over chunks of f(a, b) (arXiv 2503.20083).

    A is the log-probability that the teacher gives to a chunk, B the student's: the sum of those of
    its tokens. With a = A / temperature - 1e-6 and b alike, `difference` names f:

      binary_kl          -(e^a b + (1 - e^a) log(1 - e^b)), cross-entropy of "this chunk or not":
                         the divergence and the teacher's entropy, which has no gradient
      reverse_binary_kl  e^b (b - a) + (1 - e^b) (log(1 - e^b) - log(1 - e^a))
      temp_limit         (A - B) + A log(B / A), both less 1e-6: temperature times the divergence as
                         the temperature grows
      abs                |A - B|, without a temperature
      k2, k3             r^2 / 2 and e^r - 1 - r, r = (A - B) / temperature

    Each has its least value at A = B. As in bminixhofer/tokenkit, where sums are clipped to 0 as
    here; binary_kl is "binary_ce" there.

    A chunk counts with the mean weight of its tokens in the data, and not at all where one of them
    has weight 0, or where its first token may be in another row: of a document that goes on in a
    row, the first chunk. The end of text is a chunk of its own.

    There, chunks go on where the teacher gives at most 0.1 to a token that begins with a space
    ("merge_by_space_prob"): `launch.score --merge=0.1`, off by default. Not here: "append_space"
    (the probability that a space follows a chunk is added to it), as the student's needs more than
    the losses of its tokens.

    Needs the reference "chunk_log_probability" (`launch.score --name=chunk_log_probability`),
    float32 [B, T]: A where a chunk ends, elsewhere NaN. Terms: "loss"; "nll", the weighted mean
    of the student's losses. Metrics: "chunks", how many count, "chunk_tokens", their mean length.

    Args:
      temperature: divides log-probabilities, above 0; not of abs and temp_limit.
      difference: binary_kl | reverse_binary_kl | temp_limit | abs | k2 | k3.
      cross_entropy: coefficient of "nll", at least 0; 0 reports it alone.

    Raises:
      ValueError: a number out of its range, or an unknown difference.
    """
    check_number("temperature", temperature, above=0)
    check_name("difference", difference, tuple(DIFFERENCES))
    check_number("cross_entropy", cross_entropy, least=0)
    compare = DIFFERENCES[difference]

    def prepare(statistics, aux, batch, references, state, step):
        teacher_BT, data_BT = references[REFERENCE], batch["weights"]
        begins_BT, weights_BT, tokens_BT = chunks(batch, teacher_BT)
        counted_BT = (weights_BT != 0).astype(jnp.float32)
        count = jnp.sum(counted_BT)
        totals = {"chunk_weight": jnp.sum(weights_BT), "weight": jnp.sum(data_BT)}
        rows = {"weights": weights_BT, "begins": begins_BT, "teacher": teacher_BT}
        length = jnp.sum(counted_BT * tokens_BT) / jnp.maximum(count, 1.0)
        metrics = {"chunks": count, "chunk_tokens": length}
        if not cross_entropy:
            metrics["weight_sum"] = totals["chunk_weight"]
        return Prepared(rows, totals, state, metrics)

    def terms(statistics, aux, batch, prepared):
        rows, totals, data_BT = prepared.rows, prepared.totals, batch["weights"]
        live_BT = rows["weights"] != 0
        log_p_BT = jnp.where(data_BT != 0, -statistics.nll, 0.0)
        student_BT = sums_since(rows["begins"], log_p_BT)
        # Before any arithmetic: elsewhere the teacher's are NaN.
        pair = (jnp.where(live_BT, x_BT, -1.0) for x_BT in (rows["teacher"], student_BT))
        of_chunks_BT = compare(*(jnp.minimum(x_BT, 0.0) for x_BT in pair), temperature)
        return {
            "loss": Term(masked_sum(rows["weights"], of_chunks_BT), totals["chunk_weight"]),
            "nll": Term(masked_sum(data_BT, statistics.nll), totals["weight"], cross_entropy),
        }

    return Objective(
        prepare,
        terms,
        differentiated=("nll",),
        references=(REFERENCE,),
        must_match={"prediction": CROSS_ENTROPY.prediction},
    )


def chunks(
    batch: Mapping[str, jax.Array], teacher_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where chunks begin, their weights at their last tokens, else 0, and tokens so far of each.

    Args:
      batch: of training.
      teacher_BT: NaN but at the last token of a chunk.

    Returns:
      bool, float32 and float32 [B, T]; the weights that `alm` counts chunks with.
    """
    segments_BT, data_BT = batch["segment_ids"], batch["weights"]
    edge = ((0, 0), (1, 0))
    first_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], edge, constant_values=True)
    ends_BT = ~jnp.isnan(teacher_BT)
    begins_BT = first_BT | jnp.pad(ends_BT[:, :-1], edge)
    cut_BT = first_BT & (batch["sample_positions"] != 0)
    bad_BT = sums_since(begins_BT, ((data_BT == 0) | cut_BT).astype(jnp.float32))
    tokens_BT = sums_since(begins_BT, jnp.ones_like(data_BT))
    mean_BT = sums_since(begins_BT, data_BT) / tokens_BT
    return begins_BT, jnp.where(ends_BT & (bad_BT == 0), mean_BT, 0.0), tokens_BT


def sums_since(begins_BT: jax.Array, x_BT: jax.Array) -> jax.Array:
    """Sums from the last place that begins something, up to and with each place: [B, T].

    No difference of sums over the whole row, whose digits a long row would take away.
    """

    def add(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

    return jax.lax.associative_scan(add, (begins_BT, x_BT), axis=1)[1]


def _scaled(compare: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda a, b, temperature: compare(a / temperature - _EPSILON, b / temperature - _EPSILON)


def _binary_kl(a: jax.Array, b: jax.Array) -> jax.Array:
    return -(jnp.exp(a) * b - jnp.expm1(a) * log1mexp(b))


def _reverse_binary_kl(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.exp(b) * (b - a) - jnp.expm1(b) * (log1mexp(b) - log1mexp(a))


def _temp_limit(a: jax.Array, b: jax.Array, temperature: float) -> jax.Array:
    a, b = a - _EPSILON, b - _EPSILON
    return (a - b) + a * (jnp.log(-b) - jnp.log(-a))


def _k2(a: jax.Array, b: jax.Array, temperature: float) -> jax.Array:
    return jnp.square((a - b) / temperature) / 2


def _k3(a: jax.Array, b: jax.Array, temperature: float) -> jax.Array:
    ratio = (a - b) / temperature
    return jnp.expm1(ratio) - ratio


# Name -> (log-probability of the teacher, of the student, temperature) -> what is minimised.
DIFFERENCES = {
    "binary_kl": _scaled(_binary_kl),
    "reverse_binary_kl": _scaled(_reverse_binary_kl),
    "temp_limit": _temp_limit,
    "abs": lambda a, b, temperature: jnp.abs(a - b),
    "k2": _k2,
    "k3": _k3,
}


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, exact near 0 and far below."""
    near = x > -np.log(2.0)
    # Each branch gets what it can take, as a select passes 0 * NaN back.
    close, far = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(close)), jnp.log1p(-jnp.exp(far)))
