"""Models, batches and configs small enough for a test."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from lm.model.config import ModelConfig
from lm.model.interface import Model, Tokens
from lm.model.transformer import make_model
from lm.parallel.mesh import put_batch
from lm.training import experiment

VOCAB = 37


def config(**overrides) -> ConfigDict:
    """The defaults shrunk to a toy, then `overrides` with dots as double underscores."""
    c = base.get_config()
    c.model.update(layers=2, width=32, heads=4, kv_heads=2, mlp_width=64)
    c.data.update(sequence_length=32, shuffle_rows=8, validation_fraction=0.3)
    c.train.update(steps=6, batch_size=8, log_every=1, tensorboard=False)
    c.optimizer.update(warmup_steps=2)
    c.mesh.unsharded_tolerance = 1.0  # vocabularies of 37 and of 257 divide by nothing
    c.checkpoint.update(every_steps=3, every_minutes=0.0)
    c.evaluation.update(every_steps=0, batches=1, sample_tokens=0)
    c.quantization.gptq_batches = 0
    for name, value in overrides.items():
        *sections, key = name.split("__")
        section = c
        for part in sections:
            section = section[part]
        section[key] = value
    return c


def model(**overrides) -> Model:
    """A toy model with keys of the `model` section replaced."""
    c = config().model
    c.update(overrides)
    return make_model(ModelConfig(vocab_size=VOCAB, **c))


def params(model: Model, seed=0):
    """Fresh parameters."""
    return jax.jit(model.init)(jax.random.key(seed))


def inputs(b) -> Tokens:
    """The input of a model in a batch."""
    return Tokens(b["tokens"], b["positions"], b["segment_ids"])


def hidden(model: Model, params, b) -> jax.Array:
    """Hidden states of a batch."""
    return model.apply(params, inputs(b)).hidden


def batch(rows=4, length=16, seed=0, uneven=True) -> dict[str, jax.Array]:
    """Random tokens in two segments a row, with uneven float weights and a few zeros."""
    rng = np.random.default_rng(seed)
    split = rng.integers(3, length - 3, (rows, 1))
    index = np.arange(length)[None]
    weights = rng.uniform(0.1, 3.0, (rows, length)) * (rng.random((rows, length)) > 0.2)
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (rows, length)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, VOCAB, (rows, length)), jnp.int32),
        "weights": jnp.asarray(weights if uneven else np.ones_like(weights), jnp.float32),
        "segment_ids": jnp.asarray(1 + (index >= split), jnp.int32),
        "positions": jnp.asarray(np.where(index >= split, index - split, index), jnp.int32),
        "num_bytes": jnp.ones((rows, length), jnp.int32),
        "sample_positions": jnp.asarray(np.where(index >= split, index - split, index), jnp.int32),
        "sample_ids": jnp.asarray(2 * np.arange(rows)[:, None] + (index >= split), jnp.int32),
    }


def stored_teacher(rows=4, length=16, entries=5, vocabulary=VOCAB, seed=7) -> dict[str, jax.Array]:
    """What a batch has of a random teacher that is stored, `entries` at a position.

    Every third position of `teacher_sorted` aligns with nothing.
    """
    logits = 2 * np.random.default_rng(seed).standard_normal((rows, length, vocabulary))
    log_q, ids = jax.lax.top_k(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)), entries)
    aligned = (jnp.arange(length) % 3 > 0)[:, None]
    return {
        "teacher_ids": ids.astype(jnp.int32),
        "teacher_log_probabilities": log_q,
        "teacher_sorted": jnp.where(aligned, jnp.exp(log_q), jnp.nan),
    }


def one_device(**changes):
    """The environment of a command that has one device, as on a laptop.

    It compiles as tests/conftest.py says, fast and without optimization; of a flag that is given
    twice the last one counts.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    changes = {name: str(value) for name, value in changes.items()}
    return {**os.environ, "XLA_FLAGS": flags} | changes


def mostly_slow(values, quick):
    """Parameters of a test, of which all but those in `quick` are for the slow suite."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


def rows_mostly_slow(rows, quick):
    """Rows of several parameters, of which all but those at the places `quick` are slow."""
    return [
        row if i in quick else pytest.param(*row, marks=pytest.mark.slow)
        for i, row in enumerate(rows)
    ]


def write_corpus(folder, documents=24, seed=0) -> str:
    """A folder of small text files; returns its path."""
    rng = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "(x, y)", "return", "\n    ", "="]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        text = " ".join(rng.choice(words, int(rng.integers(40, 160))))
        (folder / f"doc{i:03}.txt").write_text(text)
    return str(folder)


def steps(batches, devices=1, **overrides):
    """Metrics and the last state of a run's own train step, on toy rows of 16 tokens."""
    c = config(data__sequence_length=16, **overrides)
    run = experiment.build(c, VOCAB, jax.devices()[:devices])
    with jax.set_mesh(run.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
        step, metrics = run.train_step(), []
        for batch in batches:
            state, values = step(state, put_batch(run.mesh, batch))
            metrics.append(jax.device_get(values))
    return metrics, jax.device_get(state)
