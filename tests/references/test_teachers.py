"""Teachers are opened by the names that a loss gives them, and refused where they do not fit."""

import jax
import pytest
import tiny

from lm import strict_json
from lm.errors import InputError
from lm.references.second_models import open_references
from lm.training import experiment


@pytest.fixture
def record(tmp_path):
    """(vocab_size, tokenizer, keys of the config) -> a work directory with a record."""

    def write(name="teacher", vocab_size=tiny.VOCAB, tokenizer="bytes", **keys):
        content = {"format": 2, "config": tiny.config(**keys).to_dict(), "must_match": {}}
        folder = tmp_path / name
        folder.mkdir()
        text = strict_json.dumps(content | {"vocab_size": vocab_size, "tokenizer": tokenizer})
        (folder / "config.json").write_text(text)
        return str(folder)

    return write


def open_for(loss, **teachers):
    references = {f"objective__references__{name}": source for name, source in teachers.items()}
    config = tiny.config(objective__loss=loss, **references)
    run = experiment.build(config, tiny.VOCAB, jax.devices()[:1])
    return open_references(run, "bytes").models


def test_a_loss_with_two_teachers_opens_both(record):
    one, two = record("one"), record("two", model__width=64)
    assert set(open_for("align_distil", teacher=one, contrast_teacher=two)) == {one, two}
    with pytest.raises(InputError, match=r"needs objective\.references\.contrast_teacher"):
        open_for("align_distil", teacher=one)


def test_a_teacher_of_other_tokens_is_refused_with_the_losses_that_can_have_one(record):
    for changes, message in (
        ({"vocab_size": 99}, "has the vocabulary 99, not 37"),
        ({"tokenizer": "abc"}, "has the tokenizer abc, not bytes"),
    ):
        with pytest.raises(InputError, match=f"{message}.*name='alm' or .*loss='uld'") as caught:
            open_for("distillation", teacher=record(str(changes), **changes))
        assert "\n" not in str(caught.value)


def test_hidden_states_are_compared_with_a_teacher_of_the_same_width_alone(record):
    wide = record("wide", model__width=64)
    assert set(open_for("distillation", teacher=wide)) == {wide}
    assert open_for("nd", teacher=record("same"))
    with pytest.raises(InputError, match=r"wide has model.width=64; valid: a teacher of width 32"):
        open_for("nd", teacher=wide)
