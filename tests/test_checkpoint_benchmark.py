"""benchmarks/checkpoints.py at toy size: its figures, its table and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import checkpoints
from configs.benchmark import get_config
from lm import strict_json
from lm.training import experiment

ROOT = Path(__file__).resolve().parent.parent


def script(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "checkpoints.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_parameters_alone_are_a_third_of_the_bytes_that_are_read(tmp_path):
    config = get_config("tiny")
    config.model.update(layers=1, width=64, heads=2, kv_heads=2, mlp_width=128)
    run = experiment.build(config, 256, jax.devices()[:1])
    abstract = run.abstract_state()
    with jax.set_mesh(run.mesh):
        save = checkpoints.saving(abstract, tmp_path, 1)
        whole = checkpoints.restoring(abstract, tmp_path, None)
        alone = checkpoints.restoring(abstract, tmp_path, ("trained",))
    # Weights and two moments.
    assert save["state_bytes"] == whole["state_bytes"]
    assert save["parameter_bytes"] == alone["state_bytes"]
    assert 0.33 < alone["state_bytes"] / whole["state_bytes"] < 0.34
    assert 0.85 < save["disk_bytes"] / save["state_bytes"] < 1.2
    assert alone["read_bytes"] < 0.6 * whole["read_bytes"]
    assert whole["seconds"] > 0
    assert 0 < save["call"] <= save["write"]
    record = {"shape": "tiny", "layers": 1, "save": save, "all": whole, "parameters": alone}
    head, *rows = checkpoints.lines(record)[4:]
    assert head.split()[:2] == ["GiB", "s"]
    assert [row.split("  ")[0] for row in rows] == ["save", "restore all", "restore parameters"]


@pytest.mark.slow
def test_the_script_writes_one_record_and_leaves_nothing_behind(tmp_path):
    output, folder = tmp_path / "out.json", tmp_path / "checkpoints"
    folder.mkdir()
    options = ["--shape=tiny", "--layers=1", "--saves=1", f"--folder={folder}"]
    done = script(*options, f"--output={output}", "--json")
    assert done.returncode == 0, done.stderr
    record = strict_json.loads(done.stdout)
    assert record == strict_json.loads(output.read_text())
    assert record["layers"] == 1
    assert record["all"]["peak_bytes"] > 0
    assert record["parameters"]["read_bytes"] < 0.6 * record["all"]["read_bytes"]
    assert list(folder.iterdir()) == []


BAD = {
    "shape": ("--shape=huge", "--shape=huge: argument 'huge' is not one of: tiny, small"),
    "folder": ("--folder=/no/such/folder", "--folder=/no/such/folder is no folder"),
    "layers": ("--layers=0", "--saves and --layers must be at least 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name):
    argument, expected = BAD[name]
    done = script(argument)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}")
    assert len(done.stderr.splitlines()) == 1
