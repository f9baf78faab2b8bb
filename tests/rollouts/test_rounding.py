"""Answers that are drawn with rounded weights, and what the trained model makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy

from lm.errors import InputError
from lm.model.adapters import OUT, merge, merged_config, without
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel.mesh import RULES
from lm.rollouts.rounding import make_rounding
from lm.training import experiment
from lm.training.forward import make_prediction_statistics

ICEPOP = {"objective__name": "icepop", "objective__icepop__old": "stored"}


@pytest.fixture(scope="module")
def run():
    return tiny_policy.Run(tiny_policy.config(rollouts__bits=3.0, **ICEPOP))


def log_probabilities(run, params, batch):
    """Under a training pass with these parameters."""
    loss = run.built.objective.loss
    found = make_prediction_statistics(run.built.model, 1024, None, loss, loss.temperature)
    with jax.set_mesh(run.built.mesh):
        log_p_BT = jax.jit(found)(run.state.trained._replace(params=params), batch).log_probability
    return np.where(batch["weights"] != 0, log_p_BT, 0)


def test_the_rounded_model_draws_and_the_trained_one_is_the_old_policy(run):
    """The reference is what a run that is quantized all the time would compute with."""
    batch, params = run.batch(run.source()), run.state.trained.params
    rounded = {}
    for bits in (3.0, 4.0):
        section = {"quantizer": "absmax", "bits": bits, "outer_bits": 16.0, "fraction": "1.0"}
        c = tiny_policy.config(**{f"quantization__{key}": x for key, x in section.items()})
        built = experiment.build(c, run.data.tokenizer.vocab_size, jax.devices()[:1])
        scales = built.quantized.first_scales(params)
        rounded[bits] = built.quantized.on_grid(Trained(params, scales))
    drawn = batch["behaviour_log_probability"]
    np.testing.assert_allclose(drawn, log_probabilities(run, rounded[3.0], batch), atol=1e-5)
    np.testing.assert_allclose(
        batch["old_log_probability"], log_probabilities(run, params, batch), atol=1e-5
    )
    for other in (rounded[4.0], params):  # negative control
        assert np.abs(drawn - log_probabilities(run, other, batch)).max() > 1e-2


@pytest.mark.slow
def test_adapters_are_drawn_with_as_they_are():
    """The matrices below them are rounded, by the same grids as without adapters."""
    c = tiny_policy.config(rollouts__bits=3.0, model__adapter_rank=2, **ICEPOP)
    own = tiny_policy.Run(c)
    params = own.state.trained.params
    # B of a fresh adapter is 0.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 if path[-1].key.endswith(OUT) else x, params
    )
    own.state = own.state._replace(trained=own.state.trained._replace(params=params))
    batch = own.batch(own.source())

    def rounded(params):
        """Those of a run without adapters, on the grids of `rollouts.bits`."""
        below = make_model(merged_config(own.built.model.config), RULES)
        rounding = make_rounding(c, below)
        return rounding.on_grid(Trained(params, rounding.first_scales(params)))

    def joined(below, params):
        """The adapters of the second on the matrices of the first."""
        return {
            name: joined(below[name], part) if isinstance(part, dict) else below.get(name, part)
            for name, part in params.items()
        }

    nothing = jax.tree.map(jnp.zeros_like, params)
    merged = merge(own.built.model.config, params)
    drawn = batch["behaviour_log_probability"]
    as_they_are = joined(rounded(without(params)), params)
    np.testing.assert_allclose(drawn, log_probabilities(own, as_they_are, batch), atol=1e-5)
    np.testing.assert_allclose(
        batch["old_log_probability"], log_probabilities(own, params, batch), atol=1e-5
    )
    # Negative controls: nothing rounded, no adapters, and adapters that are rounded along.
    below = [joined(rounded(one), nothing) for one in (without(params), merged)]
    for other in (params, *below):
        assert np.abs(drawn - log_probabilities(own, other, batch)).max() > 1e-2


def test_a_width_that_cannot_be_is_refused(run):
    for bits in (1.58, 9.0):
        c = tiny_policy.config(rollouts__bits=bits)
        with pytest.raises(InputError, match=rf"^rollouts\.bits={bits:g}: .*absmax has 2, 3, 4"):
            make_rounding(c, run.built.model)
    assert make_rounding(tiny_policy.config(), run.built.model) is None
