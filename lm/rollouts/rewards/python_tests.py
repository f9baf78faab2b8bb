"""The reward of a Python program that passes the tests of its problem."""

import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
from pathlib import Path

from lm import strict_json
from lm.rollouts.rewards.reward import Reward

_CHILD = Path(__file__).with_name("python_child.py")
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", flags=re.DOTALL)
_MOST = 100_000
_NO_NAMESPACE = b"network"


def python_tests(
    allow: bool = False,
    seconds: float = 1.0,
    megabytes: int = 256,
    allow_network: bool = False,
) -> Reward:
    """1 where the program runs and then all of the record's `tests` do without an error, else 0.

    The program is the last block between ``` in the text, or the text where it has none; the tests
    are Python, a text or a list of texts, that read what the program has defined. Both run in an
    interpreter of their own without site packages (-I -S), with no environment and an empty folder
    that is removed at the end, and with limits on time, memory, files and processes. Their output
    is thrown away. On Linux they have no network, and of root they run as nobody, who can import
    little more than common modules where others may not read Python's own folder.

    This is not a security boundary: a program may read and delete what the user who runs it may,
    and one that inspects the interpreter can pretend to have passed. Run models that you do not
    trust in a container or a virtual machine.

    Args:
      allow: must be true: a model's programs are run on this machine.
      seconds: of a program with its tests; `rollouts.reward_seconds` must be more.
      megabytes: of memory, 64 or more.
      allow_network: run where the system has no way to take the network away (Linux takes it with
        a namespace, which some containers forbid); otherwise every answer fails there.

    Raises:
      ValueError: `allow` is false, or a limit is impossible.
      RuntimeError: (when called) the network cannot be taken away.
      KeyError: (when called) the record has no `tests`.
    """
    if not allow:
        raise ValueError("allow=False must be True: the model's programs are run on this machine")
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds={seconds} must be above 0 and at most 3600")
    if not 64 <= megabytes <= 1_000_000:
        raise ValueError(f"megabytes={megabytes} must be from 64 to 1000000")

    def reward(text, record):
        tests = record["tests"]
        blocks = _BLOCK.findall(text)
        job = {
            "program": blocks[-1] if blocks else text,
            "tests": [tests] if isinstance(tests, str) else list(tests),
            "token": secrets.token_hex(16),
            "seconds": seconds,
            "bytes": megabytes << 20,
            "allow_network": allow_network,
        }
        if len(job["program"]) > _MOST:
            return 0.0
        told = _run(strict_json.dumps(job).encode(), seconds)
        if told == _NO_NAMESPACE:
            raise RuntimeError("the network cannot be taken away here: allow_network=False")
        return float(told == job["token"].encode())

    return reward


def _run(job: bytes, seconds: float) -> bytes:
    """What the child says of a job; b"" where it says nothing in time."""
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(
        prefix="nibble_program_", ignore_cleanup_errors=True
    ) as folder:
        if os.geteuid() == 0:
            os.chmod(folder, 0o777)  # The child becomes nobody.
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD), str(writing)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
        )
        os.close(writing)
        try:
            with child.stdin as file:
                file.write(job)
            ready, _, _ = select.select([reading], [], [], seconds)
            return os.read(reading, 100) if ready else b""
        except BrokenPipeError:
            return b""
        finally:
            child.kill()
            child.wait()
            os.close(reading)
