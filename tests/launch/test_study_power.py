"""What launch.ablate --power says of a study, from a given deviation and from a pilot."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import ablation as form
from configs import small
from launch import study_power
from lm.errors import InputError
from lm.studies import ablation, power

ROOT = Path(__file__).parent.parent.parent
LOSSES = {
    "a": {0: 3.0, 1: 3.2, 2: 3.1, 7: 3.3},
    "b": {0: 3.02, 1: 3.25, 2: 3.11, 7: 3.34},
    "c": {0: 3.0, 1: 3.2},
    "d": {0: 3.0},
}


@pytest.fixture
def asked():
    variants = {name: {} for name in LOSSES}
    shared = {"unseen": {}}
    return ablation.read(
        form.make(small.get_config(), variants, seeds=(0, 1, 2), baseline="a", shared=shared)
    )


def write(folder, losses, steps=6):
    for name, by_seed in losses.items():
        for seed, loss in by_seed.items():
            place = folder / name / f"seed_{seed}"
            place.mkdir(parents=True)
            record = {"seed": seed, "config": {"train": {"steps": steps}}}
            (place / "run.json").write_text(json.dumps(record))
            line = {"step": 6, "kind": "validation", "loss": loss, "bits_per_byte": loss / 2}
            (place / "metrics.jsonl").write_text(json.dumps(line | {"whole": True}) + "\n")


def cells(lines):
    return [re.split(r"\s{2,}", line) for line in lines]


def test_a_given_deviation(asked):
    head, *rows = cells(study_power.lines(asked, None, 0.05, 0.035))
    assert head == [
        "comparison",
        "deviation",
        "resolved by 3 seeds",
        "power of 3 seeds",
        "seeds needed",
    ]
    least = power.smallest_difference(0.035, 3, 3)
    has, needed = power.power(0.05, 0.035, 3, 3), power.seeds_to_resolve(0.05, 0.035, 3)
    expected = ["0.0350", f"{least:.4f}", f"{has:.2f}", str(needed)]
    assert rows[:3] == [[name, *expected] for name in "bcd"]
    assert "intervals at 98.33% (3 comparisons)" in rows[3][0]
    assert "for a difference of 0.05" in rows[4][0]


def test_a_pilot_has_the_deviation_of_its_paired_differences(asked, tmp_path):
    write(tmp_path, LOSSES)
    # A run that has not ended says nothing.
    write(tmp_path, {"b": {9: 9.0}}, steps=7)
    found = study_power.pilot(asked, tmp_path)
    paired = [(LOSSES["b"][s] - LOSSES["a"][s]) / 2 for s in (0, 1, 2, 7)]
    assert found["b"].value == pytest.approx(np.std(paired, ddof=1))
    assert found["b"].upper == power.deviation_limit(found["b"].value, 4)
    assert {name: one.seeds for name, one in found.items()} == {"b": 4, "c": 2}
    head, b, c, d, *_ = cells(study_power.lines(asked, tmp_path, 0.01, None))
    assert head[-1] == "for the upper limit"
    assert int(b[-1]) > int(b[-2]) == power.seeds_to_resolve(0.01, found["b"].value, 3)
    assert c[1:] == ["0.0000", "2", "0.0000", "0.0000", "1.00", "2", "2"]
    assert d == ["d", *["unknown"] * 7]


def test_what_cannot_be_planned_is_one_line(asked, tmp_path):
    for given in (
        (None, 0.1, None, "--power needs --deviation=BITS_PER_BYTE, or --workdir=FOLDER"),
        (None, 0.0, 0.1, "--difference=0.0 must be a positive number"),
        (None, 0.1, float("nan"), "--deviation=nan must be a positive number"),
        (tmp_path, 0.1, None, "has no variant of which two seeds have ended, and of a, too"),
    ):
        *options, message = given
        with pytest.raises(InputError, match=message):
            study_power.lines(asked, *options)
    write(tmp_path, {"a": {0: 1.0}})
    (tmp_path / "a" / "seed_0" / "run.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match=r"run\.json: no record of a run"):
        study_power.lines(asked, tmp_path, 0.1, None)


def test_the_output_in_the_docs_is_that_of_its_command():
    text = (ROOT / "docs" / "ablations.md").read_text()
    (block,) = re.findall(r"```\n\$ python -m (launch\.ablate .*)\n((?:.|\n)*?)```", text)
    command = [sys.executable, "-m", *block[0].split()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=True, **options)
    assert done.stdout == block[1]
    done = subprocess.run([*command, "--deviation=-1"], check=False, **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --deviation=-1.0 must be a positive number")
    assert done.stderr.count("\n") == 1
