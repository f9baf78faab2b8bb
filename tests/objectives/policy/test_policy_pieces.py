"""Soft tokens and the functions of reinforcement mid-training: worked numbers and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.policy import mid_training, soft_tokens


def test_density_of_gumbel_noise():
    log_p = jnp.log(jnp.array([0.6, 0.3, 0.1]))
    each = [soft_tokens.log_density(log_p[:1] + g, log_p[:1]) for g in (0.0, 1.0)]
    np.testing.assert_allclose(each, [-1, -1.367879], atol=1e-6)
    scores = soft_tokens.noisy_scores(log_p, jnp.array([0.0, 1.0, 9.0]))
    np.testing.assert_allclose(scores - log_p, [0, 1, 3], atol=1e-6)
    expected = np.mean([-g - np.exp(-g) for g in (0, 1, 3)])
    assert soft_tokens.log_density(scores, log_p) == pytest.approx(expected, abs=1e-6)
    # The slope in log p is 1 - exp(-g), over the number of entries.
    slopes = jax.grad(lambda x: soft_tokens.log_density(scores, x))(log_p)
    np.testing.assert_allclose(slopes, (1 - np.exp([0, -1, -3])) / 3, atol=1e-6)
    # What is unlikely does not count, not even where its density is infinite.
    far = jnp.append(log_p, -200.0)
    drawn = jnp.append(scores, -400.0)
    found, slopes = jax.value_and_grad(lambda x: soft_tokens.log_density(drawn, x))(far)
    assert found == pytest.approx(expected, abs=1e-6)
    assert slopes[3] == 0


def test_mixtures():
    """One-hot in the limit, where the index is a draw by Gumbel-max."""
    log_p = jnp.log(jnp.array([0.6, 0.3, 0.1]))
    noise = jax.random.gumbel(jax.random.key(0), (20_000, 3))
    scores = soft_tokens.noisy_scores(log_p, noise, -50.0, 50.0)
    weights = soft_tokens.mixture(scores, 1e-4)
    np.testing.assert_allclose(weights.max(-1).mean(), 1, atol=1e-3)
    np.testing.assert_allclose(weights.mean(0), jnp.exp(log_p), atol=0.015)
    np.testing.assert_allclose(soft_tokens.mixture(scores, 1e6), 1 / 3, atol=1e-4)


def test_mid_training():
    assert [mid_training.budget(t) for t in (0, 0.5, 1)] == [800, 357, 160]
    assert mid_training.budget(1.0, first=2, decay=0.1) == 1
    rewards = [mid_training.length_reward(n, 357, 1.0) for n in (0, 178.5, 357, 714, 900)]
    assert rewards == pytest.approx([0, 0.5, 1, 0, 0])
    assert mid_training.mixed_reward(1.0, 0.5, 0.2) == pytest.approx(0.9)
    assert mid_training.tiers(np.array([0.1, 0.5, 2.0]), (0.5, 1.0)).tolist() == [0, 1, 2]
    values = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1.0]])
    for progress, expected in ((0, values[0]), (0.3, values[1]), (0.5, [0.25, 0.5, 0.25])):
        found = mid_training.tier_probabilities(progress, values)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert found.sum() == pytest.approx(1)
