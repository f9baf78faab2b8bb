"""launch.evaluate --tasks as a user types it, on a tiny model of others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from random_weights import golden, write_folder

from launch import compare

ROOT = Path(__file__).parent.parent.parent
TASKS = Path(__file__).parent / "lm_eval_goldens" / "tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, shapes, *_ = golden("llama")
    return write_folder(tmp_path_factory.mktemp("hf") / "llama", config, shapes)


def evaluate(*arguments):
    environment = tiny.one_device()
    return subprocess.run(
        [sys.executable, "-m", "launch.evaluate", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_table_and_the_items(folder, tmp_path):
    files = f"{TASKS}/pairs.yaml,{TASKS}/several_right.yaml"
    output, page = tmp_path / "items.json", tmp_path / "page.html"
    files = [f"--tasks={files}", f"--tasks_output={output}", f"--tasks_page={page}"]
    done = evaluate(f"--model={folder}", *files, "--limit=3")
    assert done.returncode == 0, done.stderr
    head, *rows, last, of_page = done.stdout.splitlines()
    assert head.split() == ["task", "metric", "value", "standard", "error", "items"]
    assert [row.split()[:2] for row in rows] == [
        [task, metric]
        for task in ("pairs", "several_right")
        for metric in ("acc", "acc_norm", "acc_bytes", "acc_per_token")
    ]
    assert (last, of_page) == (f"items: {output}", f"page: {page}")
    assert "several_right: 3 of 3 items" in page.read_text()
    written = json.loads(output.read_text())
    # The tokenizer of others says nothing of a beginning, and the model reads as far as it can.
    assert (written["beginning"], written["length"], written["step"]) == ("empty", 256, 0)
    for row in rows:
        task, metric, value, error, count = row.split()
        kept = written["tasks"][task]
        of_items = [item[metric] for item in kept["items"]]
        assert count == "3"
        assert f"{sum(of_items) / 3:.4f}" == value
        assert f"{kept['metrics'][metric]['standard_error']:.4f}" == error
        assert len(kept["items"][0]["log_likelihoods"]) == (2 if task == "pairs" else 4)
    found, left_out = compare.compare([output], [output], field="acc_norm")
    assert (set(found), left_out) == ({"pairs", "several_right"}, [])
    assert all(one.mean == 0 and one.items == 3 for one in found.values())
    scores = compare.read(output)["pairs"].values()
    assert list(scores) == [item["acc"] for item in written["tasks"]["pairs"]["items"]]


@pytest.mark.slow
def test_answers_that_are_written(folder, tmp_path):
    output = tmp_path / "items.json"
    done = evaluate(
        f"--model={folder}",
        f"--tasks={TASKS}/written_answers.yaml,{TASKS}/long_texts.yaml",
        f"--tasks_output={output}",
    )
    assert done.returncode == 0, done.stderr
    assert "exact_match,letter" in done.stdout
    assert "token_perplexity" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks=none.yaml"], "none.yaml: no such file; valid: a task in YAML"),
        ([f"--tasks={TASKS}/pairs.yaml,{TASKS}/pairs.yaml"], "both have task=pairs"),
        ([f"--tasks={TASKS}/pairs.yaml", "--limit=0"], "--limit=0 must be at least 1"),
        ([f"--tasks={TASKS}/pairs.yaml", "--split=train"], "--tasks goes with neither"),
        ([f"--tasks={TASKS}/pairs.yaml", "--tasks_output=none/x.json"], "--tasks_output=none/x"),
        ([f"--tasks={TASKS}/pairs.yaml", "--length=-1"], "length=-1 must be from 1 to 256"),
        (["--limit=3"], "--limit is for --tasks=FILE.yaml"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, folder):
    done = evaluate(f"--model={folder}", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
