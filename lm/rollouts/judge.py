"""Judges sampled answers in a process of their own, so that none of them can stop a run.

N answers.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import strict_json
from lm.errors import InputError
from lm.rollouts.worker import NOT_FINITE, RAISED

TIMEOUT = "timeout"
REASONS = (RAISED, TIMEOUT, NOT_FINITE)

_ROOT = Path(__file__).parents[2]

# How long a process may take to start: to import rewards, on a machine that is busy.
_STARTING = 60.0

# Bytes of an answer at most; those of a worker are far shorter.
_MOST_BYTES = 1 << 20


class Named(NamedTuple):
    """A reward as a worker can make it.

    Attributes:
      name: in `lm.rollouts.rewards.REWARDS`.
      weight: in the total.
      arguments: of its factory, as JSON values.
    """

    name: str
    weight: float
    arguments: Mapping[str, Any]


class Judged(NamedTuple):
    """The rewards of N answers.

    Attributes:
      total_N: float64, the weighted sum of all rewards; NaN where one of them failed.
      by_name: name -> float64 [N], NaN where it failed.
      failed: reason -> answers that it cost their total: "raised" (or its process ended), "timeout"
        and "not_finite" (or no number). Reasons without any are missing.
    """

    total_N: np.ndarray
    by_name: dict[str, np.ndarray]
    failed: dict[str, int]


class Judge:
    """Rewards of answers, computed in a worker process that is started again when it is lost.

    The same texts have the same rewards where rewards are pure functions. What a reward raises, a
    value that is no finite number, a hang or the end of the process cost that answer alone.

    Args:
      rewards: at least one, with different names; see `lm.rollouts.make_rewards`.
      seconds: that one answer may take, all rewards together.
      registry: the module that has `REWARDS`.

    Attributes:
      message: what the reward that failed last has said, "" before the first.

    Raises:
      InputError: the worker does not start: a reward cannot be imported or made.
    """

    def __init__(
        self,
        rewards: Sequence[Named | tuple[str, float, Mapping[str, Any]]],
        seconds: float,
        registry: str = "lm.rollouts.rewards",
    ):
        self._rewards, self._seconds = [Named(*one) for one in rewards], seconds
        self._registry = registry
        self.message = ""
        self._worker = None
        self._start()

    def judge(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Judged:
        """The rewards of texts, each by the record of its problem."""
        values_NR = np.full((len(texts), len(self._rewards)), np.nan)
        failed = Counter()
        for i, (text, record) in enumerate(zip(texts, records, strict=True)):
            values, reason = self._judge_one(text, record)
            values_NR[i] = values
            if reason:
                failed[reason] += 1
        weights_R = np.array([one.weight for one in self._rewards], np.float64)
        by_name = {one.name: values_NR[:, r] for r, one in enumerate(self._rewards)}
        return Judged(_weighted(values_NR, weights_R), by_name, dict(failed))

    def close(self) -> None:
        """Ends the worker; nothing is left of it."""
        if self._worker:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _judge_one(self, text: str, record: Mapping[str, Any]) -> tuple[list[float], str]:
        """One value a reward, NaN where there is none, and the first reason; "" without one."""
        try:
            if not self._worker:
                self._start()
        except (InputError, OSError) as error:  # It did start before, so that it may again.
            return self._lost(RAISED, str(error))
        sample = strict_json.dumps({"text": text, "record": dict(record)}).encode() + b"\n"
        try:
            answer = self._worker.ask(sample, time.monotonic() + self._seconds)
            values = [
                (np.nan if value is None else float(value), why, said)
                for _, (value, why, said) in zip(self._rewards, answer["values"], strict=True)
            ]
        except TimeoutError:
            return self._lost(TIMEOUT, f"took more than {self._seconds} seconds")
        except (EOFError, OSError, ValueError, KeyError, TypeError):
            return self._lost(RAISED, "the process of the rewards has ended")
        failures = [(why, said) for _, why, said in values if why]
        if failures:
            self.message = failures[0][1]
        return [value for value, _, _ in values], failures[0][0] if failures else ""

    def _lost(self, reason: str, message: str) -> tuple[list[float], str]:
        self.close()
        self.message = message
        return [np.nan] * len(self._rewards), reason

    def _start(self) -> None:
        job = {
            "registry": self._registry,
            "rewards": [(one.name, dict(one.arguments)) for one in self._rewards],
            "seconds": self._seconds,
        }
        worker = _Worker(strict_json.dumps(job))
        try:
            answer = worker.ask(b"", time.monotonic() + _STARTING)
        except (TimeoutError, EOFError, OSError, ValueError):
            answer = {"error": "their process has ended, or does not answer"}
        if answer.get("error"):
            worker.close()
            raise InputError(f"rollouts.rewards: cannot be made: {answer['error']}")
        self._worker = worker


def _weighted(values_NR: np.ndarray, weights_R: np.ndarray) -> np.ndarray:
    # One after the other: a product of matrices may add in another order for another N.
    total_N = np.zeros(len(values_NR))
    for r, weight in enumerate(weights_R):
        total_N = total_N + weight * values_NR[:, r]
    return total_N


class _Worker:
    """A process of `lm.rollouts.worker`, with pipes that are never waited for beyond a deadline."""

    def __init__(self, job: str):
        # The paths of this process, and the same order of sets in every one.
        paths = [str(_ROOT), *(path for path in sys.path if path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lm.rollouts.worker", job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,  # A group to be killed as one, and no Ctrl-C from a terminal.
        )
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    def ask(self, line: bytes, deadline: float) -> dict[str, Any]:
        """Sends a line, or nothing, and returns the object that comes back.

        Raises:
          TimeoutError: nothing has come back at the deadline, of `time.monotonic`.
          EOFError, OSError: the process has ended.
          ValueError: what comes back is no line of JSON.
        """
        left = memoryview(line)
        while left:
            self._wait(self._to, select.POLLOUT, deadline)
            left = left[os.write(self._to, left[: 1 << 16]) :]
        found = b""
        while not found.endswith(b"\n"):
            self._wait(self._from, select.POLLIN, deadline)
            part = os.read(self._from, 1 << 16)
            if not part:
                raise EOFError("the process has ended")
            found += part
            if len(found) > _MOST_BYTES:
                raise ValueError("more than an answer")
        return strict_json.loads(found)

    def close(self) -> None:
        """Kills the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _wait(self, file: int, event: int, deadline: float) -> None:
        poll = select.poll()  # Not select.select, which has no room for files from 1024 on.
        poll.register(file, event)
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            raise TimeoutError
