"""Runs on preference data: the same numbers wherever the pairs lie, and however often a run stops.

An objective is added to all of these tests by a line of `OBJECTIVES`.
"""

import functools
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny

from lm.data import scores
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document
from lm.data.pairs import Encoder, row_of_records
from lm.data.tokenizers import Bytes
from lm.errors import InputError
from lm.model.adapters import merged_config, without
from lm.model.packed_matrix import unpack_all
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel.mesh import put_batch
from lm.references.scoring import score_documents
from lm.training import experiment
from lm.training.forward import make_prediction_statistics
from lm.training.make_objective import preference_reading
from objectives.losses import LOSSES

# Name of an objective -> keys of its config besides its name. All but their own adapters is frozen.
OBJECTIVES = {
    "dpo": {},
    "kto": {},
    "ipo": {},
    "orpo": {},
    "simpo": {},
    "cpo": {},
    "bco": {},
    "npo": {"objective__npo__retain": "kl", "objective__references__teacher": "base"},
    # At the default beta a model that knows nothing has forgotten all.
    "sim_npo": {"objective__sim_npo__beta": 0.5},
    "ches_dpo": {"objective__ches_dpo__keep": 0.5},
    "sparse_po": {
        "objective__sparse_po__mask": "activations",
        "objective__references__teacher": "base",
    },
}

LENGTH = 96
SMALL = {
    "model__layers": 1,
    "model__width": 16,
    "model__heads": 2,
    "model__mlp_width": 16,
    "model__adapter_rank": 2,
    "data__sequence_length": LENGTH,
    "data__packing": "best_fit",
    "optimizer__peak_learning_rate": 0.05,
}
BASE = {"objective__references__reference_nll": "base"}


def config(name="dpo", **changes):
    return tiny.config(**(SMALL | BASE | {"objective__name": name} | OBJECTIVES[name] | changes))


def corpus(count=16):
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdef"), int(n))) for n in rng.integers(1, 5, 2 * count)]
    documents = []
    for i, (good, bad) in enumerate(zip(words[::2], words[1::2], strict=True)):
        spans = [((f"q{i}?", 0.0), (f"{text}.", 1.0)) for text in (good, bad + bad)]
        documents.append(Document(str(i), spans[0], rejected=Document(str(i), spans[1])))
    return Corpus("pairs", documents, "pairs", 0, "pairs")


def records(name, order=range(16)):
    """The records of the corpus as positions, in this order."""
    documents, c = corpus().documents, config(name)
    run = built(name)
    reading = preference_reading(c, run.objective)
    encode = Encoder(documents, Bytes(), reading, LENGTH, 0, {})
    return [encode((i, documents[i])) for i in order]


def batch(name, order=range(16), per_row=2, rows=8):
    """The records in rows of `per_row`, and rows of padding."""
    found = records(name, order)
    made = [row_of_records(found[i : i + per_row], LENGTH) for i in range(0, len(found), per_row)]
    made += [row_of_records((found[0],), LENGTH)] * (rows - len(made))
    stacked = {key: np.stack([row[key] for row in made]) for key in made[0]}
    for key, x_BT in stacked.items():
        x_BT[-(-len(found) // per_row) :] = -1 if key.endswith("_ids") else 0
    stacked["segment_ids"][-(-len(found) // per_row) :] = 0
    return stacked


@functools.cache
def built(name, devices=1, **changes):
    return experiment.build(config(name, **changes), 257, jax.devices()[:devices])


def steps(run, rows, count=3, further=None, frozen=None):
    """Metrics of some steps on one batch, without those that depend on the shape of the batch."""
    with jax.set_mesh(run.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
        if frozen is not None:
            frozen = frozen(jax.tree.map(lambda x: x.copy(), state))
        step, metrics = run.train_step(second_models=further), []
        for _ in range(count):
            state, values = step(state, put_batch(run.mesh, rows), frozen)
            values = {key: float(value) for key, value in values.items()}
            padding = values.pop("padding")
            assert padding == pytest.approx(np.mean(rows["segment_ids"] == 0))
            metrics.append(values)
    return metrics, state


@functools.cache
def expected(name):
    metrics, _ = steps(built(name), batch(name))
    # Something is learned: steps that change nothing would agree in any layout.
    assert metrics[0]["grad_norm"] > 1e-3
    assert abs(metrics[-1]["loss"] - metrics[0]["loss"]) > 1e-3
    return metrics


def check(found, wanted, tolerance=2e-5):
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.keys() == other.keys()
        # In the first step the policy is the reference: rounding decides which answer is better.
        for key in one.keys() - ({"accuracy"} if number == 0 else set()):
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


class Layout(NamedTuple):
    """Where the same pairs lie: what `batch` is given, devices and keys of the config."""

    rows: Mapping[str, Any] = MappingProxyType({})
    devices: int = 1
    changes: Mapping[str, Any] = MappingProxyType({})


LAYOUTS = {
    "permuted": Layout({"order": tuple(np.random.default_rng(1).permutation(16).tolist())}),
    "alone": Layout({"per_row": 1, "rows": 16}, changes={"train__batch_size": 16}),
    "8 devices": Layout(devices=8),
    "4 micro-batches": Layout(changes={"train__accumulation": 4}),
    "all of these": Layout(
        {
            "order": tuple(np.random.default_rng(1).permutation(16).tolist()),
            "per_row": 1,
            "rows": 16,
        },
        8,
        {"train__batch_size": 16, "train__accumulation": 2},
    ),
}
# One layout at a time for the plainest objective, all of them together for every one.
QUICK = [("dpo", "4 micro-batches")]
CASES = [
    pytest.param(name, layout, marks=() if (name, layout) in QUICK else pytest.mark.slow)
    for name, layout in itertools.product(OBJECTIVES, LAYOUTS)
    if layout == "all of these" or name == "dpo"
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_same_pairs_are_the_same_steps(name, layout):
    rows, devices, changes = LAYOUTS[layout]
    found, _ = steps(built(name, devices, **changes), batch(name, **rows))
    check(found, expected(name))


@pytest.mark.slow
def test_other_pairs_are_other_steps():
    swapped = batch("dpo")
    swapped["sides"] = -swapped["sides"]
    found, _ = steps(built("dpo"), swapped)
    with pytest.raises(AssertionError):
        check(found, expected("dpo"))


def second(run, dense=False):
    """The model below the adapters as a second model, with parameters of its own."""
    model = make_model(merged_config(run.model.config))

    def frozen(state):
        params = without(state.trained.params)
        return {"elsewhere": Trained(unpack_all(params) if dense else params)}

    return {"elsewhere": model}, frozen


ELSEWHERE = {"objective__references__reference_nll": "elsewhere"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["as_is", "int8", "nf4"])
def test_the_base_is_what_a_second_model_of_its_weights_is(kind):
    changes = {"train__frozen": kind, "model__width": 64, "model__mlp_width": 64}
    run = experiment.build(config(**changes), 257, jax.devices()[:1])
    other = experiment.build(config(**changes, **ELSEWHERE), 257, jax.devices()[:1])
    found, _ = steps(run, batch("dpo"))
    check(found, steps(other, batch("dpo"), 3, *second(other, kind != "as_is"))[0], 1e-6)
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert found[-1]["margin"] > 1e-3
    # It is no reference to the policy itself: that would stay at log 2.
    assert found[-1]["loss"] < np.log(2) - 1e-4


@pytest.mark.slow
def test_a_step_with_the_base_has_no_second_copy_of_the_weights():
    sizes = {}
    for source in ("base", "elsewhere", ""):
        name = "dpo" if source else "simpo"
        key = {"objective__references__reference_nll": source}
        run = experiment.build(config(name, **key), 257, jax.devices()[:1])
        further, abstract = None, {}
        if source == "elsewhere":
            further, frozen = second(run)
            abstract = frozen(run.abstract_state())
        with jax.set_mesh(run.mesh):
            rows = batch(name)
            lowered = run.train_step(second_models=further).lower(
                run.abstract_state(), rows, abstract
            )
            sizes[source] = lowered.compile().memory_analysis().argument_size_in_bytes
    shapes = without(run.abstract_state().trained.params)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert sizes["base"] == sizes[""]
    assert sizes["elsewhere"] == sizes["base"] + whole


@pytest.mark.slow
def test_the_base_can_be_a_teacher():
    loss = next(name for name, make in LOSSES.items() if make().teachers == ("teacher",))
    rows = {key: x for key, x in batch("dpo").items() if key not in ("pair_ids", "sides")}

    def run(teacher):
        c = tiny.config(**SMALL, objective__loss=loss, objective__references__teacher=teacher)
        return experiment.build(c, 257, jax.devices()[:1])

    def measured(run, *more):
        with jax.set_mesh(run.mesh):
            state = jax.jit(run.init)(jax.random.key(0))
            further, frozen = more or (None, lambda state: None)
            frozen = frozen(jax.tree.map(lambda x: x.copy(), state))
            step, losses = run.train_step(second_models=further), []
            for _ in range(3):
                state, metrics = step(state, rows, frozen)
                losses.append(float(metrics["loss"]))
        return losses

    other = run("elsewhere")
    found = measured(run("base"))
    np.testing.assert_allclose(found, measured(other, *second(other)), rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", pytest.param("bco", marks=pytest.mark.slow)])
def test_stored_scores_of_the_base_give_the_same_loss(name, tmp_path):
    texts = (corpus(60),)
    run = built(name)
    with jax.set_mesh(run.mesh):
        state = jax.jit(run.init)(jax.random.key(0))
        (model,), frozen = second(run)[0].values(), second(run)[1]
        nll = jax.jit(
            lambda rows: make_prediction_statistics(model, 64)(frozen(state)["elsewhere"], rows).nll
        )
        found = score_documents(nll, texts, Bytes(), batch_size=4, sequence_length=LENGTH)
        scores.write(tmp_path / "s", texts, "bytes", ["reference_nll"], found, {})
    key = {"objective__references__reference_nll": str(tmp_path / "s")}
    c = config(name, **key)
    other = experiment.build(c, 257, jax.devices()[:1])
    stored = {
        "reference_nll": scores.stored(scores.load(tmp_path / "s"), "reference_nll", texts, "bytes")
    }
    data = experiment.Data(texts, texts, Bytes())
    rows = next(iter(experiment.train_batches(c, data, stored)))
    plain = {key: x for key, x in rows.items() if key != "reference_nll"}
    check(steps(other, rows)[0], steps(run, plain)[0])


def test_scores_are_refused_where_answers_are_put_under_other_prompts(tmp_path):
    from lm.references.second_models import open_references

    texts = (corpus(4),)
    values = [
        np.zeros(sum(len(encode_document(a, Bytes())) for a in d.answers)) for d in texts[0][1]
    ]
    scores.write(tmp_path / "s", texts, "bytes", ["reference_nll"], values, {})
    key = {"objective__references__reference_nll": str(tmp_path / "s")}
    with pytest.raises(InputError, match="no losses of answers under other prompts"):
        open_references(experiment.build(config("kto", **key), 257, 1))
    assert open_references(experiment.build(config("dpo", **key), 257, 1)).scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__packing": "concat"}, "data.packing='best_fit', not 'concat'"),
        ({"data__corrupted": 0.1}, "needs answers as they are: data.corrupted=0"),
        ({"model__adapter_rank": 0}, "reference_nll='base' is not possible; valid: .*adapter_rank"),
        ({"train__trainable": "norm"}, "reference_nll='base' is not possible"),
    ],
)
def test_what_preferences_do_not_go_with_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        experiment.build(
            tiny.config(**(SMALL | BASE | {"objective__name": "dpo"} | changes)), 257, 1
        )
