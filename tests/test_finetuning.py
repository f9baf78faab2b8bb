"""benchmarks/finetuning.py: all of it at toy size, through its command."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import finetuning
from configs import small
from launch import result_tables, results
from lm.data.templates import CHATML_MARKERS
from lm.data.tokenizers import Subwords

import short_runs

ROOT = Path(__file__).resolve().parent.parent


def test_markers_of_turns_become_special_tokens(tmp_path):
    base = Subwords
    definition = finetuning.with_markers(WHOLE)
    found = base(definition, str(tmp_path / "tokenizer.json"))
    assert found.special_tokens == {"<|endoftext|>", *CHATML_MARKERS}
    assert [found.special_id(one) for one in CHATML_MARKERS] == [2, 3]
    assert found.vocab_size == 4
