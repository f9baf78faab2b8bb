"""benchmarks/finetuning.py: all of it at toy size, through its command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import short_runs
import tiny

from launch import result_tables, results

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_methods_go_on_from_a_model_and_are_measured(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "def f{i}(): return {i}"}}\n' for i in range(99)))
    short_runs.train(tiny.config(data__corpus=str(text)), tmp_path / "model")
    program = [sys.executable, "-m", "benchmarks.finetuning", f"--model={tmp_path / 'model'}"]
    program += [f"--runs={tmp_path / 'runs'}", f"--collect={tmp_path}", "--seeds=3"]
    program += ["--table=finetuning_corrupted", "--methods=cross_entropy,rho1"]
    program += ["--config.train.steps=11", "--config.data.sequence_length=64"]
    for _ in range(2):  # The second time all has been done.
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "step 11/11" not in done.stderr
    table = result_tables.read_printed(tmp_path / "finetuning_corrupted.printed.csv")
    assert [row[0] for row in table.rows] == ["before", "cross_entropy", "rho1"]
    assert results.trace_printed(table) == []
    before, ours, theirs = (float(table.cell(row[0], "answers")) for row in table.rows)
    assert max(ours, theirs) < before
    assert theirs != ours
    config = json.loads((tmp_path / "runs/corrupted_rho1_3/config.json").read_text())["config"]
    objective = config["objective"]
    assert objective["weighting"] == "rho1"
    assert objective["references"]["reference_nll"] == str(tmp_path / "runs/reference_3")
    assert config["data"]["corpus"] == str(tmp_path / "runs/data/corrupted_3.jsonl")
