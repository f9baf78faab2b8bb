"""benchmarks/finetuning.py: its commands name keys and methods that exist."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import small
from lm import strict_json
from lm.flat import leaves
from objectives.weighting import WEIGHTINGS

ROOT = Path(__file__).parent.parent
# In a process of its own, for its flags are not those of launch. Nothing is trained: each command
# is printed, and its folder is there afterwards.
CODE = """
import sys
from pathlib import Path
from absl import flags
from benchmarks import docstring_chats, finetuning
from lm import strict_json

flags.FLAGS(["finetuning", *sys.argv[1:]])

def run(program):
    print(strict_json.dumps(program))
    folder = Path(next(x for x in program if x.startswith("--workdir=")).partition("=")[2])
    folder.mkdir()
    (folder / "curves.png").touch()
    return type("Done", (), {"returncode": 0})

finetuning.subprocess.run = run
finetuning.data().mkdir(parents=True)
chats = [docstring_chats.messages("a", "b")] * 4
docstring_chats.write_lines(finetuning.data() / "train.jsonl", chats)
for method in finetuning._METHODS.value:
    finetuning.tune(method, "3")
    finetuning.tune(method, "3")  # has ended: is not run again
"""


@pytest.mark.slow
def test_each_method_is_a_run_that_begins_with_the_first_model(tmp_path):
    options = [f"--runs={tmp_path}", "--table=finetuning_corrupted"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    programs = [strict_json.loads(line) for line in done.stdout.splitlines()]
    names = [Path(program[4].partition("=")[2]).name for program in programs]
    methods = [name[len("corrupted_") : -len("_3")] for name in names if name.startswith("corr")]
    assert names.count("first_3") == names.count("reference_3") == 1
    assert len(names) == 2 + len(set(methods)) == 2 + len(methods) == 9
    assert set(methods) - {"cross_entropy"} <= set(WEIGHTINGS)
    known = {key for key, _ in leaves(small.get_config())}
    for name, program in zip(names, programs, strict=True):
        keys = dict(one.removeprefix("--config.").split("=", 1) for one in program[6:])
        assert set(keys) <= known
        assert not any("{" in value for value in keys.values())
        if name.startswith("corrupted"):
            assert program[3] == f"--config=configs/finetune.py:{tmp_path / 'first_3'}"
            assert keys["objective.weighting"] in {*WEIGHTINGS, "uniform"}
            assert keys["data.corpus"] == str(tmp_path / "data" / "corrupted_3.jsonl")
