"""The pairs of benchmarks/spelling_pairs.py, through its command."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "spelling_pairs.py"


def make(output, *options):
    command = [sys.executable, str(SCRIPT), f"--output={output}", *options]
    return subprocess.run(command, cwd=SCRIPT.parent.parent, capture_output=True, text=True)


def test_answers_differ_in_one_word(tmp_path):
    assert make(tmp_path / "a.jsonl").returncode == 0
    assert make(tmp_path / "b.jsonl").returncode == 0
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "b.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines) == 300
    for line in lines:
        record = json.loads(line)
        chosen, rejected = (record[name][0]["content"].split() for name in ("chosen", "rejected"))
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1


def test_a_count_that_is_too_large_is_one_line(tmp_path):
    found = make(tmp_path / "a.jsonl", "--count=10000")
    assert found.returncode == 2
    assert "valid: 1 to" in found.stderr
