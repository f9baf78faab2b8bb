"""Times train steps and their pieces, and says what they could reach on this machine.

B rows, T tokens, M = B T, D width, N heads, H head width, L layers, V vocabulary, P parameters,
S bytes of one number.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lm.data.layout import BATCH, POLICY
from lm.data.pairs import KEYS
from lm.model.attention import attend
from lm.parallel.mesh import put_batch
from lm.planning.decoding_benchmark import sampling
from lm.planning.item import Item
from lm.training import experiment
from objectives.cross_entropy import TokenStatistics, token_statistics
from objectives.quantization import QUANTIZERS
from objectives.weighting import WEIGHTINGS

# Sides of the square matrices of the peak: of those that JAX is fastest at, one fits the caches.
_SIDES = {"cpu": (768, 1536), "gpu": (4096, 8192), "tpu": (4096, 8192)}

# Numbers in the array of the bandwidth, far more than caches hold.
_STREAM = 2**26

_BATCHES = 256

# Where references come from that stand in the batch: any folder of scores would do.
_STORED = "stored"

# What is changed in a step that is compared with the plain one, and what is equal in all: one
# micro-batch, for with more of them weights that depend on losses take another forward pass; and
# quantization, where there is any, from the first step on.
_ALIKE = {"train.accumulation": 1, "quantization.fraction": "1.0"}
VARIANTS = {
    "plain": {},
    "4 bits": {"quantization.bits": 4.0},
    "2 bits": {"quantization.bits": 2.0},
    "4 bits, int8 inputs": {"quantization.bits": 4.0, "quantization.activations": "int8"},
    "dynamic": {"objective.weighting": "dynamic"},
    "rho1, stored losses": {
        "objective.weighting": "rho1",
        "objective.references.reference_nll": _STORED,
    },
    "rho1, moving average": {
        "objective.weighting": "rho1",
        "objective.references.reference_nll": "ema",
        "train.ema_decay": 0.999,
    },
    "binary codes": {"model.embedding": "binary"},
}


def inputs(run: experiment.Experiment) -> tuple[Any, Any, dict[str, jax.Array]]:
    """The jitted train step of a run, its first state and one random batch.

    With quantization it is the step of the quantized phase. Stored references are random, too.
    """
    c = run.config
    step = run.train_step(quantized=run.quantized is not None)
    shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
    state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(c.train.seed))
    if run.quantized:
        state = run.begin_quantized()(state)
    batch = random_batch(run)
    for reference in run.references():
        if c.objective.references[reference] == _STORED:
            batch[reference] = jax.random.uniform(jax.random.key(1), batch["weights"].shape)
    return step, state, batch


def train_step(name: str, run: experiment.Experiment, made: Any = None) -> Item:
    """The train step of a run, on one random batch, with its optimizer.

    `made` is what `inputs` returned, but with the step compiled; done here by default.
    """
    c = run.config
    if made is None:
        step, *given = inputs(run)
        # Compiled here, so that the item's program is the one that runs.
        made = step.lower(*given).compile(), *given
    compiled, state, batch = made

    def once():
        nonlocal state
        state, values = compiled(state, batch)
        return values

    tokens = c.train.batch_size * c.data.sequence_length
    return Item(
        name,
        once,
        flops=run.flops_per_token() * tokens,
        bytes=0,
        formula=f"(6 N + 12 L T D = {run.flops_per_token():,}) x {tokens:,} tokens",
        dtype=c.model.dtype,
        tokens=tokens,
        program=compiled.as_text,
    )


def random_batch(run: experiment.Experiment, seed: int = 0) -> dict[str, jax.Array]:
    """A batch of whole rows of random tokens, each token a target of weight 1."""
    c = run.config
    shape = c.train.batch_size, c.data.sequence_length
    rng = np.random.default_rng(seed)
    rows = {name: np.ones(shape, dtype) for name, dtype in BATCH.items()}
    for name in ("tokens", "targets"):
        rows[name] = rng.integers(0, run.model.config.vocab_size, shape, np.int32)
    for name in ("positions", "sample_positions"):
        rows[name] = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    for name in KEYS:
        if name in run.objective.batch_keys:
            # A pair a row; answers under other prompts are left out.
            halves = np.where(np.arange(shape[1]) < shape[1] // 2, 1, -1)
            values = {"pair_ids": 0, "sides": halves}.get(name, -1)
            rows[name] = np.broadcast_to(np.int32(values), shape)
    for name, dtype in POLICY.items():
        if name in run.objective.batch_keys:
            rows[name] = np.zeros(shape, dtype)
    rows["sample_ids"] = np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], 1)
    return put_batch(run.mesh, rows)


def machine(dtypes: Iterable[str]) -> list[Item]:
    """What the limits are measured by: the best product of each dtype, and passes over memory."""
    items = []
    for dtype in dict.fromkeys(dtypes):
        for n in _SIDES.get(jax.default_backend(), _SIDES["gpu"]):
            x_NN = jax.random.normal(jax.random.key(0), (n, n), dtype)
            items.append(
                Item(
                    f"matrix product {dtype} {n}",
                    _bound(jnp.matmul, x_NN, x_NN),
                    2 * n**3,
                    0,
                    f"2 x {n}^3",
                    dtype,
                )
            )
    scale = jax.jit(lambda x: x * 0.999, donate_argnums=0)
    x = jnp.ones(_STREAM)

    def in_place():
        nonlocal x
        x = scale(x)
        return x

    size = 4 * _STREAM
    total = jnp.ones(_STREAM)
    items.append(Item("memory, in place", in_place, 0, 2 * size, "read and write 2^26 numbers"))
    items.append(Item("memory, read", _bound(jnp.sum, total), 0, size, "read 2^26 numbers"))
    return items


def cross_entropy(run: experiment.Experiment) -> list[Item]:
    """Loss and gradients from hidden states and the output matrix."""
    c, v, block = run.config, run.model.config.vocab_size, run.config.objective.block_size
    (b, t), d = _rows(run), c.model.width
    hidden_BTD, head_DV = _normal(c.model.dtype, (b, t, d), (d, v))
    targets_BT = random_batch(run)["targets"]

    def blocked(hidden_BTD, head_DV, targets_BT):
        return token_statistics(hidden_BTD, head_DV, targets_BT, block_size=block).nll.mean()

    def dense(hidden_BTD, head_DV, targets_BT):
        logits_BTV = (hidden_BTD @ head_DV).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()

    s = hidden_BTD.dtype.itemsize
    # In one block of the vocabulary, blocked is dense.
    losses = {"cross-entropy": blocked} | ({"dense cross-entropy": dense} if v > block else {})
    return [
        Item(
            f"{name} {b * t} x {d} x {v}",
            _bound(jax.grad(loss, (0, 1)), hidden_BTD, head_DV, targets_BT),
            6 * b * t * d * v,
            2 * s * (b * t * d + d * v),
            "6 M D V; 2 S (M D + D V)",
            c.model.dtype,
            b * t,
        )
        for name, loss in losses.items()
    ]


def attention(run: experiment.Experiment) -> list[Item]:
    """One layer's attention between its projections, and its gradients."""
    c = run.config
    (b, t), n, h = _rows(run), c.model.heads, run.model.config.head_width
    shapes = (b, n, t, h), *2 * ((b, c.model.kv_heads, t, h),)
    heads = _normal(c.model.dtype, *shapes)
    segments_BT = jnp.ones((b, t), jnp.int32)

    def total(query, key, value, segments):
        out = attend(query, key, value, segments, segments, implementation=c.model.attention)
        return (out * query).sum()

    size = sum(x.size * x.dtype.itemsize for x in (*heads, heads[0]))
    return [
        Item(
            f"attention {b} x {t} x {n} x {h}",
            _bound(jax.grad(total, (0, 1, 2)), *heads, segments_BT),
            12 * b * t * t * n * h,
            2 * size,
            "12 B T^2 N H, the whole square; queries, keys, values, outputs and gradients once",
            c.model.dtype,
            b * t,
        )
    ]


def optimizer(run: experiment.Experiment) -> list[Item]:
    """Clipping, the update and its application."""
    init = jax.jit(lambda key: (lambda s: (s.trained, s.optimizer))(run.init(key)))
    trained, moments = init(jax.random.key(0))
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), trained)

    def update(state, grads):
        trained, moments = state
        updates, moments = run.optimizer.update(grads, moments, trained)
        return jax.tree.map(lambda p, u: p + u.astype(p.dtype), trained, updates), moments

    step, state = jax.jit(update, donate_argnums=0), (trained, moments)

    def once():
        nonlocal state
        state = step(state, grads)
        return state

    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, grads)))
    written = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    count = sum(x.size for x in jax.tree.leaves(trained))
    return [
        Item(
            f"optimizer {run.config.optimizer.name} {count}",
            once,
            0,
            read + written,
            "state and gradients read, state written",
        )
    ]


def quantizers(run: experiment.Experiment) -> list[Item]:
    """Each quantizer at its default width on one matrix, with its gradients."""
    shape = run.config.model.width, run.config.model.mlp_width
    w_IO, slope_IO = _normal("float32", shape, shape)
    items = []
    for name, factory in QUANTIZERS.items():
        if name == "paretoq":  # one of the others, by width
            continue
        quantizer = factory()
        scale = quantizer.init(w_IO)

        def total(w_IO, scale, quantize=quantizer.quantize):
            return (quantize(w_IO, scale) * slope_IO).sum()

        items.append(
            Item(
                f"quantizer {name} {shape[0]} x {shape[1]}",
                _bound(jax.value_and_grad(total, (0, 1)), w_IO, scale),
                0,
                3 * 4 * math.prod(shape),
                "weights and their slopes read, gradients written",
            )
        )
    return items


def weightings(run: experiment.Experiment) -> list[Item]:
    """Each weighting on one batch, with the hyper-parameters of the config."""
    c = run.config.objective
    shape = _rows(run)
    nll_BT, score_BT = (
        jax.random.uniform(jax.random.key(i), shape, minval=0.1, maxval=5.0) for i in range(2)
    )
    statistics = TokenStatistics(nll_BT, nll_BT, nll_BT, -nll_BT)
    batch = random_batch(run)
    items = []
    for name, factory in WEIGHTINGS.items():
        hyper = c[name].to_dict() if name in c else {}
        if name == "glow":
            hyper["samples"] = shape[0]
        weighting = factory(**hyper)
        references = dict.fromkeys((*weighting.references, *weighting.taps), score_BT / 5)
        given = {key: batch.get(key, score_BT) for key in (*batch, *weighting.batch_keys)}
        weigh = _bound(
            lambda *arrays, weighting=weighting: weighting.weigh(*arrays)[0],
            statistics,
            given,
            references,
            weighting.init(),
            jnp.zeros((), jnp.int32),
        )
        arrays = 3 + len(references)
        items.append(
            Item(
                f"weighting {name} {shape[0]} x {shape[1]}",
                weigh,
                0,
                4 * arrays * math.prod(shape),
                f"4 x {arrays} arrays [B, T]: losses, weights and references in, weights out",
                tokens=math.prod(shape),
            )
        )
    return items


def variant(config: ConfigDict, name: str) -> ConfigDict:
    """The config with the change of `VARIANTS` of that name, and with what is equal in all."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({**_ALIKE, **VARIANTS[name]})
    return config


def variants(run: experiment.Experiment) -> list[Item]:
    """The train step with one thing changed, for every entry of `VARIANTS`."""
    items = []
    for name in VARIANTS:
        changed = experiment.build(variant(run.config, name), run.model.config.vocab_size)
        items.append(train_step(f"variant {name}", changed))
    return items


def data_pipeline(run: experiment.Experiment) -> list[Item]:
    """Batches of bytes of the config's corpus, from reading its documents to arrays on the host."""
    config = run.config.copy_and_resolve_references()
    config.data.update(tokenizer="bytes", vocab_size=0)
    stream = iter(experiment.train_batches(config, experiment.load_data(config.data)))
    tokens = _BATCHES * math.prod(_rows(run))

    def once():
        for _ in range(_BATCHES):
            next(stream)
        return ()

    return [
        Item(
            f"data pipeline {_rows(run)[0]} x {_rows(run)[1]}",
            once,
            0,
            4 * len(BATCH) * tokens,
            f"{4 * len(BATCH)} bytes a token, written once",
            tokens=tokens,
            reads_ahead=True,
        )
    ]


# Name on the command line -> items of a run. Items of equal name are one.
PIECES = {
    "cross_entropy": cross_entropy,
    "attention": attention,
    "optimizer": optimizer,
    "quantizers": quantizers,
    "weightings": weightings,
    "variants": variants,
    "sampling": sampling,
    "data": data_pipeline,
}

# Those that are many, and of one shape tell enough.
_OF_ONE_SHAPE = ("quantizers", "weightings", "variants", "sampling", "data")


def collect(runs: Mapping[str, experiment.Experiment], pieces: Iterable[str]) -> list[Item]:
    """The train steps of all runs, then the pieces of `PIECES` that are named."""
    items = {}
    for name, run in runs.items():
        items[name] = train_step(f"step {name}", run)
    for piece in pieces:
        for run in list(runs.values())[: 1 if piece in _OF_ONE_SHAPE else None]:
            items |= {item.name: item for item in PIECES[piece](run)}
    return list(items.values())


def _rows(run: experiment.Experiment) -> tuple[int, int]:
    return run.config.train.batch_size, run.config.data.sequence_length


def _normal(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def _bound(function: Callable[..., Any], *arguments: Any) -> functools.partial:
    return functools.partial(jax.jit(function), *arguments)
