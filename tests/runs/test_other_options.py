"""A run goes on with other options of the compiler, which change no mathematics."""

import json

import pytest
import tiny
from etils import epath

from lm.errors import InputError
from lm.training import resume


def test_other_options_of_the_compiler_are_no_reason_to_refuse_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()

    def record(**changes):
        config = tiny.config(**changes).to_dict()
        return {"config": config, "vocab_size": 257, "tokenizer": "bytes", "must_match": {}}

    (tmp_path / "config.json").write_text(json.dumps({"format": 2, **record()}))
    other = record(train__compiler_options="xla_a=true")
    assert resume.check_workdir(epath.Path(tmp_path), other)
    with pytest.raises(InputError, match=r"train\.seed=0, not 1"):  # negative control
        resume.check_workdir(epath.Path(tmp_path), record(train__seed=1))
