"""Only the commands that train restart themselves for huge pages."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import command

ROOT = Path(__file__).parent.parent.parent


def test_only_what_trains_asks_for_it():
    asking = [p.stem for p in (ROOT / "launch").glob("*.py") if "huge_pages=True" in p.read_text()]
    assert sorted(asking) == ["benchmark", "train"]


@pytest.mark.parametrize("asked", [False, True])
def test_a_command_restarts_only_when_asked(asked, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "use_huge_pages", lambda: calls.append("restart"))
    monkeypatch.setattr(command.app, "run", lambda *_, **__: calls.append("run"))
    monkeypatch.setattr(command.logging, "set_verbosity", lambda _: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    command.run(lambda: None, huge_pages=asked)
    assert calls == (["restart", "run"] if asked else ["run"])


def test_jax_is_not_imported_twice():
    """The process that only restarts itself needs no JAX, and --help needs none either."""
    code = "import sys, launch.benchmark, launch.train; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
