"""What weights cost, in FLOPs and bytes of the compiled step, at a small but proportionate size.

Of the small benchmark (6 layers, width 384, 6 heads, 256 tokens, 8 rows) a sixteenth in width and a
third in depth. All weightings at once bound each of them.
"""

import jax
import jax.numpy as jnp
import pytest
import tiny

from lm.references.sources import SOURCES
from lm.training import experiment
from lm.training.forward import make_prediction_statistics
from lm.training.step import make_train_step
from objectives.weighting import WEIGHTINGS

VOCAB, ROWS, LENGTH = 256, 4, 64
# FLOPs, and bytes, a token: a generous bound on the 32 passes of `selection.highest`, of which XLA
# counts one.
COUNTED_ONCE = 32 * 8
# All weightings from losses multiplied read and write 3.02% more bytes: they look for samples.
BOUND = 1.04


def measure(*names, stored=(), **overrides):
    """FLOPs and bytes of the train step under the product of weightings, and the run."""
    config = tiny.config(
        model__layers=2,
        model__unroll=2,
        model__width=96,
        model__heads=6,
        model__kv_heads=6,
        model__mlp_width=384,
        data__sequence_length=LENGTH,
        train__batch_size=ROWS,
        objective__weighting="*".join(names),
        objective__normalisation="all",
        objective__glow__samples=1000,
        objective__ss_token__gamma=1.0,
        mesh__data=1,
        **{f"objective__references__{name}": "stored" for name in stored},
        **overrides,
    )
    run = experiment.build(config, VOCAB, jax.devices()[:1])
    step = make_train_step(run.model, run.optimizer, run.schedule, run.objective, config)
    b = jax.tree.map(lambda x: x[:, :LENGTH], tiny.batch(ROWS, LENGTH))
    b["sample_ids"] = jnp.zeros((ROWS, LENGTH), jnp.int32)
    b |= {name: jnp.ones((ROWS, LENGTH)) for name in stored}
    state = jax.eval_shape(run.init, jax.random.key(0))
    compiled = jax.jit(step, donate_argnums=0).lower(state, b).compile()
    return costs(compiled), run, b


def costs(compiled):
    analysis = compiled.cost_analysis()
    return analysis["flops"], analysis["bytes accessed"]


@pytest.fixture(scope="module")
def plain():
    return measure("uniform")[0]


def check(found, plain, selections):
    (flops, size), (plain_flops, plain_size) = found, plain
    uncounted = selections * COUNTED_ONCE * ROWS * LENGTH
    flops, size = flops + uncounted, size + uncounted
    assert plain_flops < flops <= BOUND * plain_flops
    assert plain_size < size <= BOUND * plain_size


@pytest.mark.slow
def test_weights_from_losses_cost_next_to_nothing(plain):
    """All weightings that read nothing but the losses of the step, multiplied."""
    names = [
        name
        for name, make in WEIGHTINGS.items()
        if name not in ("uniform", "glow") and not make().references
    ]
    assert len(names) >= 8
    found, *_ = measure(*names, "glow")
    check(found, plain, selections=1)


def test_weights_from_stored_references_cost_next_to_nothing(plain):
    """All weightings with a reference, multiplied, the references in the batch."""
    names = [name for name, make in WEIGHTINGS.items() if name != "glow" and make().references]
    assert len(names) == 7
    stored = sorted({reference for name in names for reference in WEIGHTINGS[name]().references})
    assert all("scores" in SOURCES[name] for name in stored)
    found, run, _ = measure(*names, stored=stored)
    assert set(run.objective.references) == set(stored)
    check(found, plain, selections=1)


@pytest.mark.slow
def test_an_average_as_reference_costs_its_forward_pass():
    """And so this test would see what is more than 3%."""
    (before, _), *_ = measure("uniform", train__ema_decay=0.9)
    (after, _), run, b = measure(
        "rho1", train__ema_decay=0.9, objective__references__reference_nll="ema"
    )
    statistics = make_prediction_statistics(run.model, run.config.objective.block_size)
    trained = jax.eval_shape(run.init, jax.random.key(0)).trained
    forward = jax.jit(lambda t, b: statistics(t, b).nll).lower(trained, b).compile()
    assert BOUND * before < after < before + 1.03 * costs(forward)[0]
