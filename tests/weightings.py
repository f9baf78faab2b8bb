"""Every weighting with hyper-parameters that do something, and with neutral ones, on toy inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from objectives.cross_entropy import TokenStatistics, token_statistics
from objectives.weighting import WEIGHTINGS, Weighting

SAMPLES = 20

# name -> (hyper-parameters that change the weights, hyper-parameters that do not)
METHODS = {
    "uniform": ({}, {}),
    "rho1": ({"keep": 0.5}, {"keep": 1.0}),
    "ss_token": ({"keep": 0.6}, {"keep": 1.0}),
    "prior": ({"alpha": 1.5}, {"alpha": 0.0}),
    "fait": ({"strength": 2.0}, {"strength": 0.0}),
    "sat_imp": ({"beta1": 0.5, "beta2": 0.3}, {"beta1": 0.0, "beta2": 0.0}),
    "sim_sat": ({"beta": 0.5}, {"beta": 0.0}),
    "sim_imp": ({"beta": 2.0}, {"beta": 0.0}),
    "wga": ({"beta": 1.0}, {"beta": 0.0}),
    "dft": ({}, {"exponent": 0.0}),
    "focal": ({"gamma": 2.0}, {"gamma": 0.0}),
    "block_sensitive": ({"strength": 2.0}, {"strength": 0.0}),
    "uskd": ({}, {"strength": 0.0}),
    "frequency_equity": ({}, {"gamma": 0.0}),
    "critical_token": ({}, {"strength": 0.0}),
    "dynamic": ({"temperature": 0.4}, {"temperature": np.inf}),
    "glow": ({"samples": SAMPLES}, {"samples": SAMPLES, "beta": 0.0}),
    "q_tuning": ({"keep_samples": 0.5}, {"keep_samples": 1.0, "keep_tokens": 1.0}),
}


def make(name: str, neutral: bool = False) -> Weighting:
    """The weighting; what it compares with is read from the batch, and so follows its rows."""
    weighting = WEIGHTINGS[name](**METHODS[name][neutral])

    def weigh(statistics, batch, references, state, step):
        references = {name: batch[name] for name in (*weighting.references, *weighting.taps)}
        return weighting.weigh(statistics, batch, references, state, step)

    return weighting._replace(weigh=weigh)


def batch(rows=8, length=12, seed=0) -> dict[str, jax.Array]:
    """`tiny.batch` with all references and sample ids."""
    rng = np.random.default_rng(seed + 100)

    def uniform(low, high):
        return jnp.asarray(rng.uniform(low, high, (rows, length)), jnp.float32)

    losses = ("reference_nll", "history_nll", "prior_nll", "full_nll")
    return (
        tiny.batch(rows, length, seed)
        | {name: uniform(2.0, 5.0) for name in losses}
        | {
            "attention_to": uniform(0.0, 1.0),
            "error_mask": (uniform(0.0, 1.0) > 0.6).astype(jnp.float32),
            "faulty_log_probability": jnp.full((rows, length), -3.5),
            "likelihood": uniform(0.0, 1.0),
            "contrast_probability": uniform(0.0, 1.0),
            # Two pieces a row; of some documents more than one.
            "sample_ids": jnp.asarray(
                rng.permutation(np.repeat(np.arange(SAMPLES), 2))[: 2 * rows]
                .reshape(rows, 2)
                .repeat([length // 2, length - length // 2], axis=1),
                jnp.int32,
            ),
            "sample_positions": jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length),
        }
    )


def state(weighting: Weighting):
    """A fresh state; of a table, every other entry holds the loss of an earlier visit."""
    past = np.linspace(3.0, 4.5, SAMPLES, dtype=np.float32)
    return jax.tree.map(lambda x: jnp.where(jnp.arange(SAMPLES) % 2, past, x), weighting.init())


def bigram(seed=0) -> dict[str, jax.Array]:
    """Parameters of a model of two matrices: cheap to compile."""
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.standard_normal((tiny.VOCAB, 8)), jnp.float32),
        "head": jnp.asarray(rng.standard_normal((8, tiny.VOCAB)) / 2, jnp.float32),
    }


def bigram_statistics(params, batch) -> TokenStatistics:
    """Statistics of `bigram`; where the batch has NaN in "poison", so has the hidden state."""
    hidden_BTD = (
        params["embedding"][batch["tokens"]] + batch.get("poison", jnp.zeros(()))[..., None]
    )
    return token_statistics(hidden_BTD, params["head"], batch["targets"])
