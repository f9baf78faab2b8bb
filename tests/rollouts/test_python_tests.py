"""Programs of a model, run with the tests of their problem: what passes, and what it costs."""

import functools
import glob
import importlib
import os
import tempfile
import time

import pytest

from lm.rollouts.judge import Judge
from lm.rollouts.rewards import REWARDS

SQUARE = "def f(x):\n    return x * x\n"
TESTS = {"tests": ["assert f(3) == 9", "assert f(-1) == 1"]}


@functools.cache
def reward():
    """The reward where the network can be taken away, otherwise with what this system has."""
    made = REWARDS["python_tests"](allow=True, seconds=20.0, allow_network=not has_namespace())
    assert made(SQUARE, TESTS) == 1
    return made


@functools.cache
def has_namespace():
    try:
        return REWARDS["python_tests"](allow=True, seconds=20.0)(SQUARE, TESTS) == 1
    except RuntimeError:
        return False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"So:\n```python\nbad(\n```\nno:\n```py\n{SQUARE}```\nDone.", 1),
        ("def f(x):\n    return x", 0),
        ("def f(x:", 0),
        ("", 0),
        ("\0", 0),
        ("import os\nos._exit(0)", 0),
        ("raise SystemExit(0)", 0),
        ("import os, sys\nos.write(int(sys.argv[1]), b'x' * 100)\n" + SQUARE, 0),
        (f"print('x' * 1_000_000)\n{SQUARE}", 1),
        (f"open('note', 'w').write('x')\n{SQUARE}", 1),
        (f"open('note', 'w').write('x' * 3_000_000)\n{SQUARE}", 0),
        (f"x = bytearray(1 << 29)\n{SQUARE}", 0),
        (f"files = [open('/dev/null') for _ in range(100)]\n{SQUARE}", 0),
        (f"import os\nassert not os.environ and not os.listdir('.')\n{SQUARE}", 1),
        (f"import sys\nassert sys.flags.isolated and 'site' not in sys.modules\n{SQUARE}", 1),
        (f"import math, random, collections, re\n{SQUARE}", 1),
        (f"import jax\n{SQUARE}", 0),
        (SQUARE + "#" * 200_000, 0),
    ],
)
def test_programs(text, value):
    assert reward()(text, TESTS) == value


def test_no_process_can_be_started():
    assert reward()(f"import os\nos.fork()\n{SQUARE}", TESTS) == 0


def test_there_is_no_network_where_the_system_can_take_it_away():
    if not has_namespace():
        pytest.skip("no namespaces of the network here")
    # /proc/net/dev has a line for each interface; alone there is only the loopback.
    program = "names = [l.split(':')[0].strip() for l in open('/proc/net/dev') if ':' in l]\n"
    assert reward()(f"{program}assert names in ([], ['lo']), names\n{SQUARE}", TESTS) == 1


def test_a_program_of_root_is_run_by_nobody():
    if os.geteuid():
        pytest.skip("root only")
    assert reward()(f"import os\nassert os.getuid() == 65534 == os.geteuid()\n{SQUARE}", TESTS) == 1


def test_tests_may_be_one_text_and_must_be_there():
    assert reward()(SQUARE, {"tests": "assert f(2) == 4"}) == 1
    assert reward()(SQUARE, {"tests": "assert f(2) == 5"}) == 0
    with pytest.raises(KeyError):
        reward()(SQUARE, {"answer": "4"})


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_a_program_that_does_not_end_is_stopped(program):
    quick = REWARDS["python_tests"](allow=True, seconds=0.5, allow_network=True)
    start = time.monotonic()
    assert quick(program, TESTS) == 0
    assert time.monotonic() - start < 10


def test_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = f"import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\n{SQUARE}"
    assert reward()(made, TESTS) == 1
    assert glob.glob(f"{tmp_path}/*") == []


def test_a_system_without_namespaces_must_be_accepted(monkeypatch):
    # The package has the factory under the name of the module.
    module = importlib.import_module("lm.rollouts.rewards.python_tests")
    monkeypatch.setattr(module, "_run", lambda job, seconds: b"network")
    with pytest.raises(RuntimeError, match="allow_network=False"):
        REWARDS["python_tests"](allow=True)(SQUARE, TESTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "allow=False must be True"),
        ({"allow": True, "seconds": 0}, "seconds=0 must be above 0"),
        ({"allow": True, "megabytes": 1}, "megabytes=1 must be from 64"),
    ],
)
def test_it_is_off_unless_it_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        REWARDS["python_tests"](**arguments)


def test_a_judge_runs_programs():
    arguments = {"allow": True, "seconds": 20.0, "allow_network": True}
    with Judge([("python_tests", 1.0, arguments)], 60.0) as judge:
        judged = judge.judge([SQUARE, "def f(x): return 0", SQUARE], [TESTS, TESTS, {}])
    assert judged.total_N[:2].tolist() == [1, 0]
    assert judged.failed == {"raised": 1}
