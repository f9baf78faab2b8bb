"""The source of on-policy batches: whose text it is, and that the same run draws the same."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs
import tiny

from lm.compression.phases import first_scales
from lm.data.layout import BATCH
from lm.errors import InputError
from lm.model import decoding
from lm.rollouts.prompts import Prompts
from lm.rollouts.sampling import ends_of, make_complete, row_keys
from lm.rollouts.source import OnPolicySource, is_on_policy, make_rollout, make_source
from lm.training import experiment
from lm.training.forward import make_forward
from lm.training.sources import GrainSource

TOKENS, LENGTH, END = 6, 32, 256


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Questions and answers; the length of a question differs from record to record."""
    path = tmp_path_factory.mktemp("corpus") / "asked.jsonl"
    records = [
        {"prompt": "what is " + "x" * (i % 9) + "? ", "response": f"it is {i}."} for i in range(120)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config(corpus, **overrides):
    given = {
        "data__corpus": corpus,
        "data__packing": "best_fit",
        "model__layers": 1,
        "objective__loss": "distillation",
        "objective__references__teacher": "ema",
        "train__ema_decay": 0.9,
        "rollouts__share": 1.0,
        "rollouts__tokens": TOKENS,
        "rollouts__temperature": 0.0,
    }
    return tiny.config(**{**given, **overrides})


class Run:
    """An experiment with its data and a train state whose texts are not all the same."""

    def __init__(self, c, devices=1):
        self.data = experiment.load_data(c.data)
        vocabulary = self.data.tokenizer.vocab_size
        self.built = experiment.build(c, vocabulary, jax.devices()[:devices])

    @functools.cached_property
    def state(self):
        shardings = jax.tree.map(lambda x: x.sharding, self.built.abstract_state())
        with jax.set_mesh(self.built.mesh):
            state = jax.jit(self.built.init, out_shardings=shardings)(jax.random.key(0))
        params = jax.tree.map(lambda x: 3 * x, state.trained.params)
        return state._replace(trained=state.trained._replace(params=params))

    def dataset(self):
        return experiment.train_batches(self.built.config, self.data, mesh=self.built.mesh)

    def source(self):
        return make_source(self.built, self.data, self.dataset(), {})

    def batch(self, step=0):
        """What a step draws under the first prompts of the data."""
        with jax.set_mesh(self.built.mesh):
            source = self.source()
            batch = jax.device_get(source.next(step, self.state))
            source.close()
        return batch


@pytest.fixture(scope="module")
def run(corpus):
    return Run(config(corpus))


@pytest.fixture(scope="module")
def warm(corpus):
    return Run(config(corpus, rollouts__temperature=1.0))


@pytest.fixture(scope="module")
def greedy(run):
    return run.batch()


def likeliest(built, trained, batch, quantized=None):
    """The likeliest target of every position, by the forward pass of training."""
    outputs, head = jax.jit(make_forward(built.model, quantized))(trained, batch)
    return np.argmax(outputs.hidden @ head, axis=-1)


def test_without_a_share_the_batches_are_those_of_the_data(corpus):
    """And with one they are, bit for bit, in every step that is not on-policy."""
    off, half = (Run(config(corpus, rollouts__share=share)) for share in (0.0, 0.5))
    assert isinstance(off.source(), GrainSource)
    plain = GrainSource(off.dataset(), off.built.mesh, ())
    sources, same = (off.source(), half.source()), []
    assert isinstance(sources[1], OnPolicySource)
    with jax.set_mesh(off.built.mesh):
        for step in range(6):
            expected, *others = (
                jax.device_get(one.next(step, half.state)) for one in (plain, *sources)
            )
            assert expected.keys() == others[0].keys() == others[1].keys() == BATCH.keys()
            jax.tree.map(np.testing.assert_array_equal, expected, others[0])
            same.append(all((expected[name] == others[1][name]).all() for name in expected))
            assert sources[1].metrics["on_policy"] == (not same[-1])
            assert ("sampled_tokens" in sources[1].metrics) == (not same[-1])
    assert same == [not is_on_policy(0, step, 0.5) for step in range(6)]
    assert len(set(same)) == 2
    assert sources[0].metrics == {}
    for one in (plain, *sources):
        one.close()


def test_the_share_is_a_probability():
    drawn = [is_on_policy(3, step, 0.3) for step in range(2000)]
    assert 0.25 < np.mean(drawn) < 0.35
    assert drawn != [is_on_policy(4, step, 0.3) for step in range(2000)]
    assert all(is_on_policy(0, step, 1.0) for step in range(50))


def test_completions_are_those_of_the_decoder_alone(run, greedy):
    """Each prompt, without padding and alone, is continued by the same tokens."""
    decode = jax.jit(
        lambda trained, prompt: decoding.generate(
            run.built.model,
            trained.params,
            prompt,
            jnp.ones_like(prompt),
            jax.random.key(0),
            steps=TOKENS,
            temperature=0,
            end_of_text=END,
        )
    )
    first_B = np.argmax(greedy["weights"] != 0, axis=1)
    rows = np.unique(first_B, return_index=True)[1][[0, -1]]  # Of the shortest and longest prompt.
    assert first_B[rows[0]] < first_B[rows[1]]
    for row in rows:
        prompt = greedy["tokens"][row : row + 1, : first_B[row] + 1]
        expected = np.asarray(decode(run.state.trained, prompt))[0].tolist()
        if END in expected:
            expected = expected[: expected.index(END) + 1]
        assert greedy["targets"][row][greedy["weights"][row] != 0].tolist() == expected


def test_the_text_is_the_students_own(run, greedy):
    """Greedy targets are the likeliest of the forward pass that the loss is of."""
    drawn = greedy["weights"] != 0
    best = likeliest(run.built, run.state.trained, greedy)
    np.testing.assert_array_equal(best[drawn], greedy["targets"][drawn])
    assert (best[~drawn] != greedy["targets"][~drawn]).mean() > 0.5  # negative control: prompts
    data = jax.device_get(GrainSource(run.dataset(), run.built.mesh, ()).next(0, run.state))
    # What stands before is the prompt of a document that the data has in the same row.
    for row in range(len(drawn)):
        of_document = data["sample_ids"][row] == greedy["sample_ids"][row, 0]
        asked = 1 + int(np.argmax(data["weights"][row][of_document] != 0))
        assert int(np.argmax(drawn[row])) == asked - 1
        text = data["tokens"][row][of_document]
        np.testing.assert_array_equal(greedy["tokens"][row, :asked], text[:asked])


@pytest.mark.slow
def test_in_the_quantized_phase_the_model_on_its_grids_writes(corpus):
    halves = {"quantization__fraction": "0.5", "quantization__fused_cooldown": False}
    halves["quantization__warmup_steps"] = 1
    run = Run(config(corpus, quantization__bits=2.0, **halves))
    scales = first_scales(run.built.quantized, run.state.trained.params)
    run.state = run.state._replace(trained=run.state.trained._replace(scales=scales))
    assert run.built.phases.switch == 3
    batch = run.batch(step=3)
    drawn = batch["weights"] != 0
    found = [
        (likeliest(run.built, run.state.trained, batch, q) == batch["targets"])[drawn]
        for q in (run.built.quantized, None)
    ]
    assert found[0].all()
    assert not found[1].all()  # negative control: full precision writes something else
    before = run.batch(step=2)
    assert (before["targets"] != batch["targets"]).any()


@pytest.mark.slow
def test_the_model_with_its_adapters_writes(corpus):
    run = Run(config(corpus, model__adapter_rank=2))
    trained = run.state.trained
    noise = jax.random.normal(jax.random.key(1), (4, 128))

    def filled(path, x):  # Fresh adapters are zero and change nothing.
        fresh = jax.tree_util.keystr(path).endswith("_adapter_out']")
        return noise.ravel()[: x.size].reshape(x.shape) if fresh else x

    params = jax.tree_util.tree_map_with_path(filled, trained.params)
    without = trained
    run.state = run.state._replace(trained=trained._replace(params=params))
    batch = run.batch()
    drawn = batch["weights"] != 0
    same, base = (
        (likeliest(run.built, one, batch) == batch["targets"])[drawn]
        for one in (run.state.trained, without)
    )
    assert same.all()
    assert not base.all()  # negative control: the model below them writes something else


def test_a_row_draws_by_seed_step_and_row_alone(run):
    """Other prompts in the other rows change nothing; another step does."""
    complete = jax.jit(
        make_complete(
            run.built.model,
            run.built.objective.loss,
            None,
            tokens=TOKENS,
            temperature=1.0,
            ends=ends_of(run.data.tokenizer),
        )
    )

    def tokens(step, others):
        prompt = jnp.array([[256, 40, 41]] + [[256, others, others]] * 3)
        zeros = jnp.zeros(4, jnp.int32)
        prompts = Prompts(prompt, jnp.ones_like(prompt), zeros == 0, zeros, zeros)
        return np.asarray(complete(run.state.trained, prompts, row_keys(0, step, 4)).tokens_BS)

    one, other, later = tokens(0, 50), tokens(0, 60), tokens(1, 50)
    np.testing.assert_array_equal(one[0], other[0])
    assert (one[1:] != other[1:]).any()
    assert (one[0] != later[0]).any()
    assert len({tuple(row) for row in one[1:]}) > 1  # The same prompt, another key.


def test_a_completion_ends_with_the_end_of_text(run, greedy):
    """What greedy decoding writes in the middle of a row is made the end of text."""
    row = int(np.argmax(greedy["weights"].sum(axis=1)))
    written = greedy["targets"][row][greedy["weights"][row] != 0]
    end = int(written[2])
    cut = written.tolist().index(end)
    rollout = make_rollout(run.built, (end,), quantized=False)
    with jax.set_mesh(run.built.mesh):
        data = GrainSource(run.dataset(), run.built.mesh, ())
        batch, length = rollout(run.state.trained, data.next(0, run.state), np.int32(0))
        data.close()
    found = np.asarray(batch["targets"])[row][np.asarray(batch["weights"])[row] != 0]
    np.testing.assert_array_equal(found, written[: cut + 1])
    assert length == np.asarray(batch["weights"]).sum() / len(batch["weights"])


def test_a_step_that_is_taken_again_draws_the_same(warm):
    run = warm
    with jax.set_mesh(run.built.mesh):
        source = run.source()
        source.next(0, run.state)
        state = json.loads(json.dumps(source.get_state()))
        first = jax.device_get(source.next(1, run.state))
        later = jax.device_get(source.next(2, run.state))
        source.set_state(state)
        again = jax.device_get(source.next(1, run.state))
        source.set_state(state)
        other = jax.device_get(source.next(2, run.state))
        source.close()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["targets"] != later["targets"]).any()
    # Negative control: of the same data, another step is another draw.
    assert (first["targets"] != other["targets"]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "sequence": 2}], ids=str
)
def test_eight_devices_write_what_one_does(corpus, warm, mesh):
    overrides = {f"mesh__{axis}": size for axis, size in mesh.items()}
    eight = Run(config(corpus, rollouts__temperature=1.0, **overrides), devices=8)
    one = warm.batch()
    jax.tree.map(np.testing.assert_array_equal, one, eight.batch())
    assert (one["targets"] != warm.batch(step=1)["targets"]).any()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(corpus, tmp_path):
    c = config(
        corpus,
        rollouts__share=0.5,
        rollouts__temperature=1.0,
        objective__distillation__share=0.5,
        optimizer__peak_learning_rate=0.02,
    )
    short_runs.train(c, tmp_path / "whole")
    stopped, _ = short_runs.train(c, tmp_path / "cut", stop_after=2)
    assert 2 <= stopped.step < 6
    resumed, _ = short_runs.train(c, tmp_path / "cut")
    assert resumed.finished
    lines = short_runs.lines(tmp_path / "whole", "train")
    assert lines == short_runs.lines(tmp_path / "cut", "train")
    drawn = [is_on_policy(0, step, 0.5) for step in range(6)]
    assert [line["on_policy"] for line in lines] == drawn
    assert any(drawn[stopped.step :])
    for line in lines:
        assert {"teacher_divergence", "teacher_agreement"} <= line.keys()
        assert ("sampled_tokens" in line) == bool(line["on_policy"])
        if line["on_policy"]:
            assert line["weight_sum"] == pytest.approx(8 * line["sampled_tokens"])
            assert 1 <= line["sampled_tokens"] <= TOKENS
    (one, place), (other, position) = (
        short_runs.final_state(c, tmp_path / name) for name in ("whole", "cut")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert place == position


BAD = {
    "room": ({"rollouts__tokens": LENGTH}, "rollouts.tokens=32 .* no room for a prompt"),
    "plain room": ({"rollouts__prompt_tokens": 27}, "rollouts.prompt_tokens=27 leave no room"),
    "share": ({"rollouts__share": 1.5}, "rollouts.share=1.5 must be at most 1"),
    "none": ({"rollouts__tokens": 0}, "rollouts.tokens=0 must be at least 1"),
    "cold": ({"rollouts__temperature": -1.0}, "rollouts.temperature=-1.0 must be at least 0"),
    "pairs": (
        {"objective__name": "orpo", "objective__loss": "cross_entropy"},
        "rollouts.share=1.0.*'orpo'.* reads .*sides.* only data has; valid: objective.loss",
    ),
    "no teacher": ({"objective__loss": "cross_entropy"}, "has no teacher"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_in_one_line(corpus, name):
    overrides, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        experiment.build(config(corpus, **overrides), 257, jax.devices()[:1])
    assert "\n" not in str(caught.value)


def test_text_without_prompts_and_stored_scores_are_refused(tmp_path, run):
    plain = config(tiny.write_corpus(tmp_path / "corpus"))
    with pytest.raises(InputError, match="no document has a prompt"):
        short_runs.train(plain, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(
        InputError, match=r"stored scores \(prior_nll\) are of the text of the data"
    ):
        make_source(run.built, run.data, None, {"prior_nll": []})
