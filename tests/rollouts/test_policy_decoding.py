"""What the decoder says of the tokens that it draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import special

from lm.model import decoding
from lm.model.drawn import group_divergence, measure
from lm.model.interface import Tokens

STEPS, TEMPERATURE, END, OTHERS = 7, 0.7, 5, (20, 21, 22)
# Prompts of 2, 5, 3 and 5 tokens, padded on the left.
MASK = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def factor(entropy):
    """Of the temperature of a token."""
    return 0.3 + 0.4 * entropy


@pytest.fixture(scope="module")
def drawn():
    """(what was drawn, what `generate` draws, (temperature) -> log-probabilities [B, S, V]).

    The last are of a pass over prompts and answers, in float64 from the hidden states on.
    """
    return draw()


@pytest.fixture(scope="module")
def tempered():
    """As `drawn`, with a temperature for each token."""
    found, _, log_probabilities = draw(temper=factor)
    return found, log_probabilities


def draw(**further):
    model = tiny.model(layers=1, logit_softcap=5.0)
    params = jax.tree.map(lambda x: 2 * x, tiny.params(model))
    prompts = jax.random.randint(jax.random.key(1), MASK.shape, 6, tiny.VOCAB)
    options = {"steps": STEPS, "temperature": TEMPERATURE, "top_p": 0.95}
    ends = {"end_of_text": END, "other_ends": OTHERS}

    @jax.jit
    def everything(params):
        given = (model, params, prompts, jnp.asarray(MASK), jax.random.split(jax.random.key(2), 4))
        found = decoding.draw(*given, **options, ends=(END, *OTHERS), group=2, **further)
        text = jnp.concatenate([prompts, found.tokens_BS], axis=1)
        segments = jnp.pad(jnp.asarray(MASK), ((0, 0), (0, STEPS)), constant_values=1)
        inputs = Tokens(text, jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0), segments)
        hidden = model.apply(params, inputs).hidden[:, MASK.shape[1] - 1 : -1]
        return found, decoding.generate(*given, **options, **ends), hidden, model.head(params)

    found, tokens, hidden, head = jax.device_get(everything(params))
    logits = 5.0 * np.tanh(np.float64(hidden) @ np.float64(head) / 5.0)
    return found, tokens, lambda temperature: special.log_softmax(logits / temperature, axis=-1)


def lengths(found):
    ended = np.isin(found.tokens_BS, (END, *OTHERS))
    return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, STEPS)


def test_the_same_tokens_are_drawn_as_without(drawn):
    found, tokens, _ = drawn
    np.testing.assert_array_equal(found.tokens_BS, tokens)
    assert len(set(lengths(found))) > 1


def test_log_probabilities_and_entropies_are_those_of_a_pass_over_the_text(drawn):
    """For prompts and answers of unequal length, at the temperature, whatever top-p leaves out."""
    found, _, log_probabilities = drawn
    off = []
    for row, length in enumerate(lengths(found)):
        for temperature in (TEMPERATURE, 1.0):
            log_p = log_probabilities(temperature)[row, :length]
            of_token = log_p[np.arange(length), found.tokens_BS[row, :length]]
            error = np.abs(found.measured.log_probability_B[row, :length] - of_token)
            entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
            other = np.abs(found.measured.entropy_B[row, :length] - entropy)
            if temperature == TEMPERATURE:
                assert error.max() < 1e-5
                assert other.max() < 1e-5
            else:
                off += [error.max(), other.max()]
        for values in found.measured:
            assert (np.asarray(values)[row, length:] == 0).all()
    assert min(off) > 1e-3  # negative control: the temperature matters


def test_what_is_measured_at_a_temperature_of_the_token():
    logits, token, ended = jnp.array([[1.0, 3.0, 0.5]]), jnp.array([0]), jnp.array([False])
    plain, tempered = (measure(logits, token, ended, 2.0, 0, temper) for temper in (None, factor))
    log_p = special.log_softmax(np.array([0.5, 1.5, 0.25]))
    entropy = -np.exp(log_p) @ log_p
    own = 2 * factor(entropy)
    of_token = special.log_softmax(np.array([1.0, 3.0, 0.5]) / own)[0]
    np.testing.assert_allclose(np.ravel(plain), [log_p[0], entropy, 0, 2], rtol=1e-5)
    np.testing.assert_allclose(np.ravel(tempered), [of_token, entropy, 0, own], rtol=1e-5)


@pytest.mark.slow
def test_a_token_can_have_a_temperature_of_its_own(tempered):
    """Its log-probability is at that temperature, its entropy at the common one."""
    found, log_probabilities = tempered
    off = []
    for row, length in enumerate(lengths(found)):
        tokens = found.tokens_BS[row, :length]
        measured = [np.asarray(x)[row, :length] for x in found.measured]
        of_token, entropy, _, temperatures = measured
        log_p = log_probabilities(TEMPERATURE)[row, :length]
        expected = -np.sum(np.exp(log_p) * log_p, axis=-1)
        np.testing.assert_allclose(entropy, expected, atol=1e-5)
        np.testing.assert_allclose(temperatures, TEMPERATURE * factor(expected), rtol=1e-5)
        for place, (token, temperature) in enumerate(zip(tokens, temperatures, strict=True)):
            own = log_probabilities(temperature)[row, place, token]
            assert of_token[place] == pytest.approx(own, abs=2e-5)
            off.append(abs(log_p[place, token] - own))
    assert max(off) > 0.1  # negative control: the common temperature


def test_the_temperature_of_a_token_is_what_it_is_drawn_at():
    """Rows of one distribution and two entropies: the cold one is drawn greedily."""
    logits = jnp.tile(jnp.array([[1.0, 1.5, 1.2]]), (400, 1))
    keys = jax.random.split(jax.random.key(0), 400)
    cold, warm = (decoding.sample(keys, logits, temperature=jnp.full(400, t)) for t in (1e-3, 1.0))
    assert set(cold.tolist()) == {1}
    assert set(warm.tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(warm, decoding.sample(keys, logits, temperature=1.0))


def test_the_divergence_of_a_group_is_that_of_its_members(drawn):
    """A member that has ended counts as uniform; against NumPy."""
    found, _, log_probabilities = drawn
    ends = lengths(found)
    for first in (0, 2):
        for place in range(STEPS):
            log_p = log_probabilities(TEMPERATURE)[first : first + 2, place]
            for member in (0, 1):
                if place >= ends[first + member]:
                    log_p[member] = -np.log(tiny.VOCAB)
            apart = np.clip(log_p.mean(axis=0) - log_p, -11, 11)
            expected = np.mean(np.sum(np.exp(apart) - apart - 1, axis=-1))
            for member in (0, 1):
                value = float(found.measured.divergence_B[first + member, place])
                live = place < ends[first + member]
                assert value == pytest.approx(expected if live else 0, rel=1e-3, abs=1e-5)


def test_the_divergence_by_hand():
    """The sheet's numbers; equal members have none."""
    first, second = ([[0.7, 0.3], [0.3, 0.7]], [[0.5, 0.5], [0.5, 0.5]])
    log_p = jnp.log(jnp.array(first + second))
    found = group_divergence(log_p, jnp.zeros(4, bool), 2)
    np.testing.assert_allclose(found, [0.182179, 0.0], atol=1e-5)
    ended = jnp.array([False, True, False, False])
    assert group_divergence(log_p, ended, 2)[0] != pytest.approx(0.182179, abs=1e-3)


def test_greedy_decoding_reports_the_softmax_of_the_logits():
    logits = jnp.array([[1.0, 3.0, 0.5]])
    token, ended = jnp.array([1]), jnp.array([False])
    greedy, warm, cold = (
        functools.partial(measure, logits, token, ended, group=0)(temperature=t)
        for t in (0.0, 1.0, 0.5)
    )
    jax.tree.map(np.testing.assert_array_equal, greedy, warm)
    assert cold.log_probability_B[0] > warm.log_probability_B[0]
