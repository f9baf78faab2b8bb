"""Plans within a budget of bytes: what they weigh in a file, and that they are worth it."""

import numpy as np
import pytest
import tiny
from safetensors import safe_open
from test_after_training import CALIBRATION, trained
from test_sensitivity import increases, mean_loss

from lm.compression.after_training import round_to_nearest_model
from lm.compression.packed import stored_bytes, write_packed
from lm.compression.phases import default_rules
from lm.compression.plan_widths import SENSITIVITIES, make_sensitivity, plan_widths
from lm.compression.sensitivity import leaves
from lm.compression.snip import snip
from lm.compression.widths import of_width, with_widths
from lm.errors import InputError
from objectives.quantization import absmax

RULES = default_rules(4, absmax)
OF_WIDTH = of_width(absmax)
CHOICES = (2, 3, 4, 8)


def plan(budget, sensitivity=None, choices=CHOICES):
    model, params, _ = trained()
    sensitivity = sensitivity or SENSITIVITIES["measured"]()
    options = {"rules": RULES, "choices": choices, "quantizer_of": OF_WIDTH}
    return plan_widths(model, params, CALIBRATION, budget, sensitivity, **options)


def rules_of(widths):
    return with_widths(RULES, widths, OF_WIDTH)


def uniform(bits):
    shapes = trained()[1]["layers"]
    paths = [f"layers/{part}/{n}" for part in ("attention", "mlp") for n in shapes[part]]
    return {path: (bits, bits) for path in paths if not path.endswith("bias")}


def tensor_size(widths):
    _, params, _ = trained()
    rules = rules_of(widths)
    return sum(stored_bytes(rules(path), leaf) for path, leaf in leaves(params).items())


def tensor_bytes(widths, path):
    """Of a file of the model with these widths."""
    result = round_to_nearest_model(trained()[1], rules_of(widths))
    about = {"config": {}, "vocab_size": 37, "tokenizer": "", "step": 0}
    write_packed(path, result.leaves(), **about)
    with safe_open(path, "np") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_a_plan_fits_its_budget_to_the_byte(tmp_path):
    file = tmp_path / "model.safetensors"
    budget = tensor_bytes(uniform(3), file)
    found = plan(budget)
    assert set(found) == set(uniform(3))
    assert {bits for path in found for bits in found[path]} > {2, 4}
    assert 0.95 * budget < tensor_bytes(found, file) <= budget
    # Without the room, so that it is the least.
    least = tensor_bytes(uniform(2), file)
    assert plan(least) == uniform(2)
    with pytest.raises(InputError, match=f"the least is {least:,} bytes"):
        plan(least - 1)
    assert plan(tensor_bytes(uniform(8), file), snip(0)) == uniform(8)
    assert min(found.values()) != max(found.values())


@pytest.mark.slow
def test_a_plan_is_better_than_one_of_other_layers():
    """Than those with the same costs for other layers and matrices, on average: losses of single
    layers do not add up exactly.
    """
    _, params, _ = trained()
    narrow, wide = (tensor_size(uniform(bits)) for bits in (2, 3))
    budget = (narrow + wide) / 2

    def shuffled(seed):
        rng = np.random.default_rng(seed)
        return lambda s: rng.permutation(increases())

    def loss(widths):
        return mean_loss()(round_to_nearest_model(params, rules_of(widths)).params)

    best = loss(plan(budget, lambda s: increases()))
    others = [loss(plan(budget, shuffled(seed))) for seed in range(6)]
    assert best < np.mean(others)
    assert loss(uniform(3)) < best < loss(uniform(2))


def test_what_cannot_be_planned_is_said():
    model = tiny.model()
    params, batches = tiny.params(model), [tiny.batch()]

    def plan(budget, sensitivity=None, choices=(2, 4)):
        sensitivity = sensitivity or snip(0)
        options = {"rules": RULES, "choices": choices, "quantizer_of": OF_WIDTH}
        return plan_widths(model, params, batches, budget, sensitivity, **options)

    found = plan(8500)
    assert found != plan(8500, lambda s: snip(0)(s)[::-1])
    assert {bits for path in found for bits in found[path]} == {2, 4}
    with pytest.raises(InputError, match=r"widths 1, 4: absmax has 2"):
        plan(8500, choices=(1, 4))
    with pytest.raises(InputError, match=r"widths 4, 16: must be at least one, and below 16"):
        plan(8500, choices=(4, 16))
    with pytest.raises(InputError, match=r"a budget of 100 bytes is too small .* the least is"):
        plan(100)

    with pytest.raises(InputError, match=r"sensitivity.*snipp.*snip, measured, qig"):
        make_sensitivity("snipp", tiny.config().optimizer)

    def broken(s):
        costs = np.zeros((len(s.items()), len(s.choices)))
        costs[3, 1] = np.nan
        return costs

    with pytest.raises(InputError, match=r"the sensitivity of layers/.*, layer 1, is not finite"):
        plan(8500, broken)
