"""Other programs, run or only shown: retries, one-line errors, and their output as it comes."""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

from lm.errors import InputError

# What a service says when the same call may succeed a moment later. A quota is not of these.
_TRANSIENT = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL\b|temporar|try again|timed out|"
    r"[Cc]onnection (reset|closed|refused)|HTTP(Error)? ?50[0234]|\[255\]"
)
_ATTEMPTS = 4


class Failed(RuntimeError):
    """A program ended with an error; the message is its own, in one line."""


class Programs:
    """Runs programs, or with `dry_run` shows what it would run.

    Args:
      dry_run: print each command instead of running it.
      show: prints a line of output.
      say: shows a line of progress.
      pause: waits that many seconds; the first pause before a retry is `first_pause`, and each
        following one is twice as long.
    """

    def __init__(
        self,
        dry_run: bool,
        show: Callable[[str], None],
        say: Callable[[str], None],
        pause: Callable[[float], None] = time.sleep,
        first_pause: float = 5.0,
    ):
        self.dry_run = dry_run
        self.show = show
        self.say = say
        self.pause = pause
        self._first_pause = first_pause

    def note(self, text: str) -> None:
        """Says what happens next: a comment among the commands of a dry run."""
        if self.dry_run:
            self.show(f"# {text}")
        else:
            self.say(text)

    def run(self, words: Sequence[str], accept: str | None = None) -> str:
        """The standard output of a program; tried again after an error that may pass.

        Args:
          words: the program and its arguments.
          accept: where an error's message contains this, it counts as success.

        Raises:
          Failed: the program's own message.
          InputError: there is no such program.
        """
        if self.dry_run:
            self.show(shlex.join(words))
            return ""
        wait = self._first_pause
        for attempt in range(1, _ATTEMPTS + 1):
            process = self._start(words, stderr=subprocess.PIPE)
            out, err = process.communicate()
            if not process.returncode:
                return out.strip()
            if accept and accept in err:
                return ""
            message = _one_line(words[0], err or out, process.returncode)
            if attempt == _ATTEMPTS or not _TRANSIENT.search(message):
                raise Failed(message)
            self.say(f"{message}; again in {wait:g} s")
            self.pause(wait)
            wait *= 2
        raise AssertionError("unreachable")

    def stream(self, words: Sequence[str]) -> int:
        """Shows the output of a program line by line and returns how many lines there were.

        Its exit status is not looked at: a connection that breaks ends a stream as well.
        """
        if self.dry_run:
            self.show(shlex.join(words))
            return 0
        process, lines = self._start(words, stderr=None), 0
        try:
            for line in process.stdout:
                self.show(line.rstrip("\n"))
                lines += 1
        finally:
            process.terminate()
            process.wait()
        return lines

    def _start(self, words: Sequence[str], stderr: int | None) -> subprocess.Popen:
        if not shutil.which(words[0]):
            raise InputError(
                f"there is no program {words[0]} on PATH: install it, or see what it would be "
                "asked with --dry_run"
            )
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True
        )


def _one_line(program: str, text: str, code: int) -> str:
    """The error in a program's output: from the line that begins with ERROR on, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), -1)
    said = " ".join(lines[first:]) if lines else f"ended with exit code {code}"
    return f"{program}: {said}"
