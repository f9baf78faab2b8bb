"""The judge: no answer costs more than its own reward, and nothing is left of it."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from lm.errors import InputError
from lm.rollouts.judge import REASONS, Judge

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
HELPER = "judge_rewards"


def make(*rewards, seconds=20.0):
    given = rewards or (("act", 1.0, {}),)
    return Judge(given, seconds, registry=HELPER)


@pytest.fixture(scope="module")
def judge():
    """Patient, as the machine may be busy."""
    with make(("act", 2.0, {}), ("length", 0.5, {"scale": 10.0})) as made:
        yield made


@pytest.fixture(scope="module")
def hasty():
    with make(seconds=0.5) as made:
        yield made


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(process, seconds=20.0):
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(process)


def pid(judge):
    return int(judge.judge(["process"], [{}]).by_name["act"][0])


def test_the_total_is_the_weighted_sum(judge):
    judged = judge.judge(["one", "integer", "true"], [{}] * 3)
    assert judged.total_N.dtype == np.float64
    np.testing.assert_array_equal(judged.by_name["act"], [1, 3, 1])
    np.testing.assert_array_equal(judged.by_name["length"], [30, 70, 40])
    np.testing.assert_array_equal(judged.total_N, [2 + 15, 6 + 35, 2 + 20])
    assert judged.failed == {}


def test_no_answers_have_no_rewards(judge):
    judged = judge.judge([], [])
    assert judged.total_N.shape == judged.by_name["act"].shape == (0,)


NOT_FINITE = ["nan", "infinite", "large", "text", "none", "complex", "array"]
RAISED = ["raises", "unwritable", "exits", "interrupts", "recursion"]


@pytest.mark.parametrize(
    ("text", "reason"), [(t, "not_finite") for t in NOT_FINITE] + [(t, "raised") for t in RAISED]
)
def test_a_failure_costs_its_own_answer_only(judge, text, reason):
    before = pid(judge)
    judged = judge.judge(["one", text, "one"], [{}] * 3)
    np.testing.assert_array_equal(np.isnan(judged.total_N), [False, True, False])
    np.testing.assert_array_equal(judged.by_name["act"], [1, np.nan, 1])
    np.testing.assert_array_equal(judged.by_name["length"], [30, 10 * len(text), 30])
    assert judged.failed == {reason: 1}
    assert reason in REASONS
    assert 0 < len(judge.message) <= 300
    assert pid(judge) == before


@pytest.mark.parametrize("text", ["dies", "killed", "noise"])
def test_the_end_of_the_process_costs_its_own_answer_only(judge, text):
    before = pid(judge)
    judged = judge.judge(["one", text, "one"], [{}] * 3)
    np.testing.assert_array_equal(judged.by_name["act"], [1, np.nan, 1])
    np.testing.assert_array_equal(judged.by_name["length"], [30, np.nan, 30])
    assert judged.failed == {"raised": 1}
    assert judge.message == "the process of the rewards has ended"
    assert gone(before)
    assert pid(judge) != before


@pytest.mark.parametrize("text", tiny.mostly_slow(["loops", "sleeps", "backtracks"], ("sleeps",)))
def test_a_hang_costs_its_own_answer_and_a_second(hasty, text):
    before, start = pid(hasty), time.monotonic()
    judged = hasty.judge([text, "one"], [{}] * 2)
    assert 0.5 <= time.monotonic() - start < 15
    np.testing.assert_array_equal(judged.total_N, [np.nan, 1])
    assert judged.failed == {"timeout": 1}
    assert hasty.message == "took more than 0.5 seconds"
    assert gone(before)


def test_what_a_reward_has_started_ends_with_it(hasty):
    def sleeping():
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes() == b"sleep\x001000.125\x00":
                    found.append(int(path.parent.name))
        return [one for one in found if alive(one)]

    assert hasty.judge(["child"], [{}]).failed == {"timeout": 1}
    end = time.monotonic() + 10
    while sleeping() and time.monotonic() < end:
        time.sleep(0.05)
    assert not sleeping()


def test_memory_that_is_not_there_costs_its_own_answer(judge):
    judged = judge.judge(["much memory", "some memory"], [{}] * 2)
    assert judged.failed == {"raised": 1}
    assert judged.by_name["act"][1] == 1
    assert "Cannot allocate memory" in judge.message


def test_output_and_input_are_nothings(judge, capfd):
    judged = judge.judge(["prints", "input"], [{}] * 2)
    np.testing.assert_array_equal(judged.by_name["act"], [0.25, 0])
    assert capfd.readouterr() == ("", "")


def test_long_texts_and_any_characters_arrive(judge):
    texts = ["x" * 3_000_000, "line\nbreak\r\n\0", "\ud800 half", "€" * 5, '"}\n']
    judged = judge.judge(texts, [{"long": "y" * 500_000, "n": float("nan")}] * len(texts))
    np.testing.assert_array_equal(judged.by_name["length"], [10 * len(text) for text in texts])
    assert judged.failed == {"raised": len(texts)}  # No action has such a name.


def test_the_same_texts_have_the_same_rewards_in_every_process():
    words = [f"word {i}" for i in range(50)]
    found = []
    for _ in range(2):
        with make(("order", 0.1, {}), ("length", 0.3, {})) as judge:
            judged = judge.judge(words, [{"words": words}] * len(words))
            alone = [judge.judge([word], [{"words": words}]).total_N[0] for word in words]
            np.testing.assert_array_equal(judged.total_N, alone)
            found.append(judged.total_N)
    np.testing.assert_array_equal(*found)
    assert len(set(found[0])) > 10


def test_closing_leaves_no_process():
    judge = make()
    process = pid(judge)
    assert alive(process)
    judge.close()
    judge.close()
    assert not alive(process)
    assert pid(judge) != process  # It starts again when it is asked.
    judge.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("unmade", "ValueError: cannot be made"), ("missing", "KeyError: 'missing'")],
)
def test_a_reward_that_cannot_be_made_is_refused(name, message):
    with pytest.raises(InputError, match=f"rollouts.rewards: cannot be made: {message}"):
        make((name, 1.0, {}))


def test_a_registry_that_cannot_be_imported_is_refused():
    with pytest.raises(InputError, match="ModuleNotFoundError"):
        Judge([("exact", 1.0, {})], 1.0, registry="no_such_module")


def test_a_worker_that_hangs_ends_though_its_judge_was_killed():
    code = (
        "from lm.rollouts.judge import Judge\n"
        "judge = Judge([('act', 1, {})], 0.2, registry='judge_rewards')\n"
        "print(judge._worker._process.pid, flush=True)\n"
        "judge._seconds = 1000\n"
        "judge.judge(['backtracks'], [{}])\n"
    )
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    worker = int(process.stdout.readline())
    time.sleep(0.3)
    assert alive(worker)
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(worker)


def test_a_process_with_many_open_files_can_judge():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1300:
        pytest.skip("no more than 1024 files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
    files = []
    try:
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        with make() as judge:
            assert judge.judge(["one"], [{}]).total_N[0] == 1
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_worker_imports_neither_jax_nor_numpy():
    """So that it starts in a fraction of a second. The parent's own imports do not matter."""
    code = (
        "import sys, lm.rollouts.worker, lm.rollouts.rewards\n"
        "heavy = {'jax', 'jaxlib', 'numpy', 'flax', 'ml_collections'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0


def test_a_signal_from_the_terminal_does_not_reach_the_worker(judge):
    """It is in a session of its own, so that a run that is interrupted can still judge and save."""
    process = pid(judge)
    assert os.getsid(process) == process
    os.kill(process, signal.SIGSTOP)  # Nor does one that is stopped block: it is a hang.
    judge._seconds, before = 0.5, judge._seconds
    try:
        assert judge.judge(["one"], [{}]).failed == {"timeout": 1}
    finally:
        judge._seconds = before
    assert judge.judge(["one"], [{}]).failed == {}
