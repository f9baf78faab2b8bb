"""Rewards that a judge must survive; a registry for its tests."""

import mmap
import os
import re
import signal
import subprocess
import sys
import time

HANGING = re.compile(r"(a+)+b")


class Unwritable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def take_memory(size):
    """Nothing is written there, so that a machine without the limit does not suffer."""
    with mmap.mmap(-1, size):
        return 1.0


def answer_with_noise():
    """Writes over the pipe of the judge: whatever files are open, and the standard ones."""
    for file in range(3, 20):
        try:
            os.write(file, b"x" * 2_000_000 + b"\n")
        except OSError:
            continue


def child_then_hang():
    subprocess.Popen(["sleep", "1000.125"])
    time.sleep(1000)


def print_much():
    for file in (sys.stdout, sys.stderr, sys.__stdout__):
        file.write("x" * 10_000_000)
        file.flush()
    return 0.25


def read_input():
    return float(len(sys.stdin.read()))


def ignore_signals():
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(one, signal.SIG_IGN)
    while True:
        pass


def say(value):
    return lambda: value


def fail(error):
    def raises():
        raise error

    return raises


ACTIONS = {
    "one": say(1.0),
    "integer": say(3),
    "true": say(True),
    "nan": say(float("nan")),
    "infinite": say(float("-inf")),
    "large": say(10**400),
    "text": say("1.0"),
    "none": say(None),
    "complex": say(1j),
    "array": say([1.0]),
    "raises": fail(ValueError("bad\nthing " * 1000)),
    "unwritable": fail(Unwritable()),
    "exits": fail(SystemExit(0)),
    "interrupts": fail(KeyboardInterrupt()),
    "recursion": lambda: ACTIONS["recursion"](),
    "much memory": lambda: take_memory(5 << 30),
    "some memory": lambda: take_memory(1 << 30),
    "dies": lambda: os._exit(0),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "noise": answer_with_noise,
    "loops": ignore_signals,
    "sleeps": lambda: time.sleep(1000),
    "backtracks": lambda: float(bool(HANGING.fullmatch("a" * 60))),
    "child": child_then_hang,
    "prints": print_much,
    "input": read_input,
    "process": os.getpid,
}


def act():
    """Does what the text names."""
    return lambda text, record: ACTIONS[text]()


def length(scale=1.0):
    return lambda text, record: scale * len(text)


def order():
    """Depends on the order of a set, which differs from process to process unless it is fixed."""
    return lambda text, record: float(list(set(record["words"])).index(text))


def unmade():
    raise ValueError("cannot be made")


REWARDS = {"act": act, "length": length, "order": order, "unmade": unmade}
