"""benchmarks/peers.py: who has a turn when, its table, what it refuses, and a stub of a peer."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peers

ROOT = Path(__file__).resolve().parent.parent

MODEL = """
import dataclasses
from flax import linen as nn

@dataclasses.dataclass
class DoConfig:
  D: int
  H: int
  L: int
  N: int
  V: int
  F: int

class TransformerDo(nn.Module):
  docfg: DoConfig

  @nn.compact
  def __call__(self, y_BxL):
    return nn.Dense(self.docfg.V)(nn.Embed(self.docfg.V, self.docfg.D)(y_BxL))
"""
OPTIMIZER = """
import optax

def get_optimizer(c):
  assert c.get("optimizer", "adamw") == "adamw"
  return optax.adamw(c.peak_learning_rate, weight_decay=c.weight_decay)
"""


def script(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "peers.py"), *arguments],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_code_has_a_turn_in_every_round():
    turns, speeds = [], iter([10.0, 4.0, 30.0, 5.0, 20.0, 6.0])

    def code(name):
        def run(shape, steps):
            turns.append((name, shape, steps))
            return next(speeds)

        return run

    found = peers.measure({"ours": code("ours"), "peer": code("peer")}, ["tiny"], 3, 8)
    assert turns == [("ours", "tiny", 8), ("peer", "tiny", 8)] * 3
    assert found == {"tiny": {"ours": 20.0, "peer": 5.0}}


def test_the_ratio_is_to_the_best_peer():
    lines = peers.table({"tiny": {"this code": 3000.0, "a": 1000.0, "b": 1500.0}})
    assert lines[0] == "| shape | this code | a | b | this code / best peer |"
    assert lines[2] == "| tiny | 3,000 | 1,000 | 1,500 | 2.00 |"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--nanodo"),
        (["--nanodo=nowhere"], "nanodo/model.py"),
        (["--nanogpt=nowhere"], "--nanogpt=nowhere"),
        (["--shapes=huge"], "small_50k"),
        (["--rounds=0"], "--rounds=0"),
    ],
)
def test_bad_input_is_one_line(arguments, named):
    done = script(*arguments)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_peer_is_read_from_its_clone(tmp_path):
    package = tmp_path / "nanodo"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.py").write_text(MODEL)
    (package / "optimizer.py").write_text(OPTIMIZER)
    assert peers.theirs(sys.executable, "nanodo", str(tmp_path), "tiny", 1) > 0
    (package / "optimizer.py").write_text("raise ValueError('not this one')")
    with pytest.raises(SystemExit, match="not this one"):
        peers.theirs(sys.executable, "nanodo", str(tmp_path), "tiny", 1)
