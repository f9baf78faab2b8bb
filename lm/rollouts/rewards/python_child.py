"""The program that runs a model's program with its tests, for `python_tests`; not to be imported.

It reads a job, one JSON object, from standard input, limits itself, and writes to the pipe that is
its argument: the token of the job where all tests have passed, "network" where the network cannot
be taken away, else nothing. It has the standard library only.
"""

import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
import sysconfig

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # CLONE_NEWNET, CLONE_NEWUSER
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_NOBODY = 65534

_FILE_BYTES = 1 << 20
_FILES = 32

# What a program may import as nobody where Python's folder is closed to others.
_COMMON = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions"),
    *("functools", "heapq", "itertools", "operator", "random", "re", "statistics", "string"),
    "typing",
)


def main() -> None:
    """Runs the job."""
    result = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    if not isolate() and not job["allow_network"]:
        os.write(result, b"network")
        return
    limit(math.ceil(job["seconds"]), job["bytes"])
    os.environ.clear()  # Python itself has set the locale there.
    names = {"__name__": "__main__"}
    try:
        for source in (job["program"], *job["tests"]):
            exec(compile(source, "program", "exec"), names)
    except BaseException:  # A program that ends itself has not passed either.
        os._exit(1)
    os.write(result, job["token"].encode())
    os._exit(0)


def isolate() -> bool:
    """Takes the network and, of root, its rights away; returns whether the network is gone."""
    if not sys.platform.startswith("linux"):
        return False
    system = ctypes.CDLL(None)
    root = os.geteuid() == 0
    alone = root and system.unshare(_NEW_NETWORK) == 0
    if root:
        if not _readable_by_others(sysconfig.get_path("stdlib")):
            for name in _COMMON:
                importlib.import_module(name)
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    alone = alone or system.unshare(_NEW_USER | _NEW_NETWORK) == 0
    system.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    return alone


def limit(seconds: int, size: int) -> None:
    """Sets the limits that the system enforces."""
    for name, most in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", size),
        ("RLIMIT_FSIZE", _FILE_BYTES),
        ("RLIMIT_NOFILE", _FILES),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),
    ):
        # Where a system has no such limit, or a lower one already, the others still hold.
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (AttributeError, ValueError, OSError):
            continue


def _readable_by_others(folder: str) -> bool:
    while True:
        if not os.stat(folder).st_mode & 0o001:
            return False
        if folder == (folder := os.path.dirname(folder)):
            return True


if __name__ == "__main__":
    main()
