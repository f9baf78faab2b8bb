"""References from the moving average, a second model or stored scores: the same weights."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from lm.data import scores
from lm.errors import InputError
from lm.parallel.mesh import put_batch
from lm.planning import plan
from lm.planning.ahead import abstract_batch
from lm.references import scoring
from lm.references.second_models import open_references
from lm.references.sources import SOURCES
from lm.training import experiment, loop
from lm.training.forward import make_prediction_statistics
from lm.training.step import make_train_step

LENGTH = 64
SHORT = {"data__sequence_length": LENGTH, "data__packing": "best_fit", "model__layers": 1}
PRIOR = {"objective__weighting": "prior", "objective__prior__alpha": 1.5}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents that fit in a row, with prompts."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rng = np.random.default_rng(0)
    lines = [
        {"prompt": f"{a} + {b} = ", "response": f"{a + b} " + "." * int(rng.integers(0, 20))}
        for a, b in rng.integers(0, 999, (60, 2)).tolist()
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run that can be a reference."""
    folder = str(tmp_path_factory.mktemp("runs") / "reference")
    config = tiny.config(
        data__corpus=corpus,
        train__steps=3,
        optimizer__warmup_steps=1,
        optimizer__peak_learning_rate=0.05,
        **SHORT,
    )
    loop.train(config, folder, lambda line: None)
    return folder


def write_scores(folder, data, run, trained_params, name="reference_nll", **options):
    statistics = make_prediction_statistics(run.model, 64)
    compute = jax.jit(lambda batch: statistics(trained_params, batch).nll)
    values = scoring.score_documents(
        compute, data.train, data.tokenizer, batch_size=4, sequence_length=LENGTH, **options
    )
    scores.write(folder, data.train, data.tokenizer.fingerprint, [name], values, {})
    return str(folder)


@pytest.fixture(scope="module")
def stored(corpus, trained, tmp_path_factory):
    """Its scores of `corpus`, under both names."""
    config = tiny.config(data__corpus=corpus, **SHORT)
    data = experiment.load_data(config.data)
    run = experiment.build(config, data.tokenizer.vocab_size, jax.devices()[:1])
    folder = tmp_path_factory.mktemp("scores")
    frozen = params_of(trained, run)
    return {
        name: write_scores(folder / name, data, run, frozen, name)
        for name in ("reference_nll", "prior_nll")
    }


def params_of(source, run):
    """What was trained in a work directory."""
    config = tiny.config(
        **SHORT, objective__weighting="rho1", objective__references__reference_nll=source
    )
    own = experiment.build(config, run.model.config.vocab_size, jax.devices()[:1])
    frozen, _ = open_references(own, "bytes").restore(print, {})
    return frozen[source]


class Prepared:
    """A run with its data and references, opened as the loop opens them."""

    def __init__(self, corpus, name, source, devices=1, **overrides):
        self.config = tiny.config(
            data__corpus=corpus,
            **SHORT,
            **{f"objective__references__{name}": source, "mesh__data": 1} | overrides,
        )
        self.data = experiment.load_data(self.config.data)
        vocab_size = self.data.tokenizer.vocab_size
        self.run = experiment.build(self.config, vocab_size, jax.devices()[:devices])
        self.references = open_references(self.run, self.data.tokenizer.fingerprint)
        self.batch = self.batches(1)[0]
        with jax.set_mesh(self.run.mesh):
            self.frozen, self.steps = self.references.restore(lambda line: None, {})

    def batches(self, count):
        fingerprint = self.data.tokenizer.fingerprint
        stored = self.references.stored(self.data.train, fingerprint)
        iterator = iter(experiment.train_batches(self.config, self.data, stored))
        return [next(iterator) for _ in range(count)]

    def models(self):
        return {source: one.run.model for source, one in self.references.models.items()}

    def step(self, average=None):
        """Metrics of the first step, with the weights; the average can be given."""
        inner = self.run.objective

        def prepare(*arguments):
            found = inner.prepare(*arguments)
            return found._replace(metrics={**found.metrics, "weights": found.rows["weights"]})

        step = make_train_step(
            self.run.model,
            self.run.optimizer,
            self.run.schedule,
            inner._replace(prepare=prepare),
            self.config,
            second_models=self.models(),
        )
        with jax.set_mesh(self.run.mesh):
            shardings = jax.tree.map(lambda x: x.sharding, self.run.abstract_state())
            state = jax.jit(self.run.init, out_shardings=shardings)(jax.random.key(0))
            if average is not None:
                state = state._replace(ema=average)
            batch = put_batch(self.run.mesh, self.batch)
            return jax.device_get(jax.jit(step)(state, batch, self.frozen)[1])

    def compile(self):
        step = self.run.train_step(second_models=self.models())
        batch = abstract_batch(self.run, self.references.fields())
        with jax.set_mesh(self.run.mesh):
            return step.lower(self.run.abstract_state(), batch, self.frozen).compile()


@pytest.mark.slow
def test_the_three_sources_give_the_same_weights(corpus, trained, stored):
    own = Prepared(corpus, "prior_nll", "ema", train__ema_decay=0.5, **PRIOR)
    second = Prepared(corpus, "prior_nll", trained, **PRIOR)
    third = Prepared(corpus, "prior_nll", stored["prior_nll"], **PRIOR)
    assert set(third.batch) - set(second.batch) == {"prior_nll"}
    for name in ("tokens", "sample_ids"):
        np.testing.assert_array_equal(third.batch[name], second.batch[name])
    assert set(second.steps.values()) == {3}
    by_average = own.step(average=params_of(trained, own.run))
    by_model, by_scores = second.step(), third.step()
    assert by_model["weights"].std() > 0.05
    for other in (by_average, by_scores):
        np.testing.assert_allclose(other["weights"], by_model["weights"], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(other["loss"], by_model["loss"], rtol=1e-5)
    # Negative control: other parameters are other weights.
    assert np.abs(own.step()["weights"] - by_model["weights"]).max() > 0.05


@pytest.mark.slow
def test_a_second_model_lies_on_the_mesh_and_gives_the_same_step(corpus, trained):
    options = {"objective__weighting": "rho1", "objective__rho1__keep": 0.5}
    one = Prepared(corpus, "reference_nll", trained, **options)
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__sequence": 2}
    eight = Prepared(
        corpus, "reference_nll", trained, devices=8, train__accumulation=2, **mesh, **options
    )
    (frozen,) = eight.frozen.values()
    query = frozen.params["layers"]["attention"]["query"]
    assert query.addressable_shards[0].data.size * 4 == query.size
    a, b = one.step(), eight.step()
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    assert abs(a["kept_share"] - 0.5) < 0.01
    assert abs(b["kept_share"] - 0.5) < 0.01
    assert np.mean((a["weights"] > 0) != (b["weights"] > 0)) < 0.01


def flops(compiled):
    return compiled.cost_analysis()["flops"]


@pytest.mark.slow
def test_stored_references_cost_nothing_and_a_second_model_one_forward_pass(
    corpus, trained, stored
):
    bare = {"model__unroll": 1, "objective__block_size": 1024}
    plain = Prepared(corpus, "reference_nll", "", **bare).compile()
    prior = {**PRIOR, **bare}
    by_scores = Prepared(corpus, "prior_nll", stored["prior_nll"], **prior)
    third = by_scores.compile()
    by_model = Prepared(corpus, "prior_nll", trained, **prior)
    second = by_model.compile()
    statistics = make_prediction_statistics(by_model.run.model, 1024)
    shapes = by_model.run.abstract_state().trained
    forward = (
        jax.jit(lambda t, b: statistics(t, b).nll).lower(shapes, abstract_batch(by_model.run))
    ).compile()
    tokens = by_model.batch["tokens"].size
    assert flops(third) - flops(plain) < 120 * tokens  # prior's own, and the metrics of weights
    assert flops(forward) * 0.9 < flops(second) - flops(third) < flops(forward) * 1.02
    assert flops(forward) > 1000 * tokens
    memory = [one.memory_analysis() for one in (plain, third, second)]
    # The scores, and the sample ids, which prior reads and plain cross-entropy does not.
    assert memory[1].argument_size_in_bytes - memory[0].argument_size_in_bytes == 8 * tokens
    sizes = sum(x.nbytes for x in jax.tree.leaves(by_model.frozen))
    used = memory[2].argument_size_in_bytes - memory[0].argument_size_in_bytes
    assert used == sizes + 4 * tokens  # Arguments, not constants of the program.
    assert memory[2].alias_size_in_bytes == memory[0].alias_size_in_bytes  # Not donated.
    # Two references to one model are one forward pass.
    both = Prepared(
        corpus,
        "prior_nll",
        trained,
        objective__references__full_nll=trained,
        **prior | {"objective__weighting": "prior*block_sensitive"},
    ).compile()
    assert flops(both) - flops(second) < 200 * tokens


@pytest.mark.slow
def test_a_nan_among_the_scores_is_a_skipped_step(corpus, stored):
    one = Prepared(corpus, "prior_nll", stored["prior_nll"], **PRIOR)
    live = tuple(np.argwhere(one.batch["weights"])[0])
    dead = tuple(np.argwhere(one.batch["weights"] == 0)[0])
    one.batch["prior_nll"] = one.batch["prior_nll"].copy()
    one.batch["prior_nll"][dead] = np.nan
    assert one.step()["skipped_steps"] == 0
    one.batch["prior_nll"][live] = np.nan
    assert one.step()["skipped_steps"] == 1


@pytest.mark.slow
def test_a_second_model_may_have_another_size(corpus, trained, tmp_path):
    config = tiny.config(
        data__corpus=corpus,
        model__width=16,
        train__steps=2,
        optimizer__warmup_steps=1,
        objective__weighting="rho1",
        objective__references__reference_nll=trained,
        **SHORT,
    )
    result = loop.train(config, str(tmp_path), lambda line: None)
    assert result.finished
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["references"] == {trained: 3}
    # What it leaves can be evaluated where the reference is gone.
    config.objective.references.reference_nll = "gone"
    experiment.build(config, 257, jax.devices()[:1])


@pytest.mark.slow
def test_a_resumed_run_keeps_the_checkpoint_of_its_reference(corpus, trained, tmp_path):
    source = tmp_path / "reference"
    shutil.copytree(trained, source)
    config = tiny.config(
        data__corpus=corpus,
        train__steps=2,
        optimizer__warmup_steps=1,
        objective__weighting="rho1",
        objective__references__reference_nll=str(source),
        **SHORT,
    )
    loop.train(config, str(tmp_path / "run"), lambda line: None)
    (source / "checkpoints" / "3").rename(source / "checkpoints" / "4")
    config.train.steps = 3
    with pytest.raises(InputError, match=r"has no checkpoint 3; it has \[4\]"):
        loop.train(config, str(tmp_path / "run"), lambda line: None)


def test_the_plan_counts_the_bytes_of_a_second_model(corpus, trained):
    options = {"objective__weighting": "rho1", "objective__references__reference_nll": trained}
    run = experiment.build(tiny.config(**SHORT, **options), 257, 1)
    made = plan.make_plan(run)
    assert made.bytes["references"] == made.bytes["parameters"]
    assert (
        "references"
        not in plan.make_plan(run._replace(objective=run.objective._replace(references=()))).bytes
    )


def test_the_config_has_a_key_for_each_reference():
    assert set(tiny.config().objective.references) == set(SOURCES)


def no_folder(source, folder):
    return {"reference_nll": str(folder / "nowhere")}, "reference_nll=.* is none of: 'ema' with"


def run_for_stored(source, folder):
    return (
        {"contrast_probability": source["run"]},
        "contrast_probability=.* is none of: a folder of launch.score$",
    )


def other_name(source, folder):
    return (
        {"reference_nll": source["prior_nll"]},
        "references.reference_nll: scores in .* are prior_nll, not reference_nll",
    )


def changed_record(source, folder, **changes):
    copy = folder / "copy"
    shutil.copytree(source["run"], copy)
    record = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(record | changes))
    return {"reference_nll": str(copy)}


def other_tokenizer(source, folder):
    return (
        changed_record(source, folder, tokenizer="abc"),
        "reference_nll=.* has the tokenizer abc, not bytes",
    )


def other_vocabulary(source, folder):
    return changed_record(source, folder, vocab_size=300), "has the vocabulary 300, not 257"


def no_checkpoint(source, folder):
    copy = folder / "copy"
    copy.mkdir()
    shutil.copy(Path(source["run"]) / "config.json", copy)
    return {"reference_nll": str(copy)}, "reference_nll=.*copy holds no checkpoint yet"


def other_scores_tokenizer(source, folder):
    copy = folder / "copy"
    shutil.copytree(source["reference_nll"], copy)
    header = json.loads((copy / scores.HEADER).read_text())
    (copy / scores.HEADER).write_text(json.dumps(header | {"tokenizer": "abc"}))
    return {"reference_nll": str(copy)}, "made with the tokenizer abc, not bytes"


def lost_records(source, folder):
    copy = folder / "copy"
    shutil.copytree(source["reference_nll"], copy)
    (copy / "0.array_record").write_bytes((copy / "0.array_record").read_bytes()[:1000])
    return {"reference_nll": str(copy)}, "reference_nll: .*copy (is damaged|holds no scores)"


def other_corpus(source, folder):
    file = folder / "other.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"text {i} " * 9}) for i in range(60)))
    return (
        {"reference_nll": source["reference_nll"], "corpus": str(file)},
        "reference_nll: scores in .* not those of the training documents of data.corpus .*other",
    )


def average_that_is_not_kept(source, folder):
    return {"reference_nll": "ema"}, "reference_nll='ema' is not possible"


@pytest.mark.parametrize(
    "case",
    [
        no_folder,
        run_for_stored,
        other_name,
        other_tokenizer,
        other_vocabulary,
        no_checkpoint,
        other_scores_tokenizer,
        lost_records,
        other_corpus,
        average_that_is_not_kept,
    ],
)
def test_what_cannot_be_a_source_is_refused_before_anything_is_written(
    case, corpus, trained, stored, tmp_path
):
    keys, message = case({"run": trained, **stored}, tmp_path)
    text = keys.pop("corpus", corpus)
    weighting = "rho1" if "reference_nll" in keys else "critical_token"
    config = tiny.config(
        data__corpus=text,
        objective__weighting=weighting,
        **{f"objective__references__{name}": source for name, source in keys.items()},
        **SHORT,
    )
    with pytest.raises(InputError, match=message) as caught:
        loop.train(config, str(tmp_path / "run"), lambda line: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
