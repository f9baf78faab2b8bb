"""The benchmark as a user runs it, and its comparison of two records."""

import json

import pytest
import tiny
from test_commands import command

from launch.benchmark import _first_step, _tokenizer_options, _twin, compare
from lm.data import tokenizers
from lm.errors import InputError
from lm.planning import profile


def record(**items):
    """Figures with the limit at 1 s, from (lower, median, upper) seconds."""
    return {
        "items": {
            name: {"limit": 1.0, "lower": low, "upper": high, "fraction": 1 / median}
            for name, (low, median, high) in items.items()
        },
        "start_up": {},
    }


def test_what_quartiles_share_is_noise():
    a = record(same=(2.0, 2.2, 2.4), faster=(2.0, 2.2, 2.4), slower=(2.0, 2.1, 2.2), gone=(1, 1, 1))
    b = record(same=(2.3, 2.6, 2.9), faster=(1.0, 1.1, 1.2), slower=(4.0, 4.2, 4.4))
    lines = compare(a, b)
    assert [line.split()[0] for line in lines[1:3]] == ["faster", "slower"]
    assert lines[1].endswith("+100%")
    assert lines[2].endswith("-50%")
    assert lines[3:] == ["1 figures are within noise", "in one of the two only: gone"]
    assert compare(a, a)[0] == "no change beyond noise"


def test_a_slower_machine_is_no_change():
    a = record(step=(2.0, 2.2, 2.4))
    b = record(step=(4.0, 4.4, 4.8))
    b["items"]["step"] |= {"limit": 2.0, "fraction": 1 / 2.2}
    assert compare(a, b)[0] == "no change beyond noise"
    b["items"]["step"]["limit"] = 1.0
    assert "step" in compare(a, b)[1]


def test_start_up_changes_by_more_than_a_fifth():
    a, b = (
        record()
        | {"start_up": {"tiny": {"cold_seconds": 10, "warm_seconds": 4, "peak_bytes": size}}}
        for size in (1e9, 1.2e9)
    )
    b["start_up"]["tiny"]["warm_seconds"] = 4.5
    b["start_up"]["tiny"]["cold_seconds"] = 5
    lines = compare(a, b)
    assert [line.split()[2] for line in lines[1:3]] == ["GB", "cold_seconds"]
    assert lines[3] == "1 figures are within noise"


def test_what_a_ratio_is_to():
    assert _twin("variant 4 bits") == "variant plain"
    assert _twin("cross-entropy 16 x 8 x 4096") == "dense cross-entropy 16 x 8 x 4096"
    assert not any(_twin(name) for name in ("variant plain", "dense cross-entropy 1", "step tiny"))


@pytest.mark.slow
def test_json_is_one_object_and_nothing_else(tmp_path):
    out, _ = command(
        "benchmark",
        "--json",
        "--shapes=tiny",
        "--pieces=weightings",
        "--repeats=1",
        "--nostart_up",
        f"--profile={tmp_path}",
    )
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    assert found["machine"]["peak_flops"]["float32"] > 0
    assert found["machine"]["bandwidth"] > 0
    step = found["items"]["step tiny"]
    assert step["flops"] == 6_488_064 * 4096
    assert step["fraction"] == pytest.approx(step["limit"] / step["seconds"])
    assert "weighting rho1 16 x 256" in found["items"]
    # Of the trace beside it, whose instructions its program has.
    measured = profile.measure(str(tmp_path))
    assert measured.program == str(tmp_path / "programs" / "step_tiny.hlo.txt")
    assert all(work.instruction for work in measured.work)
    assert profile.machine_limits(str(tmp_path), "float32").flops > 0


BAD = {
    "shape": (["--shapes=tinny"], "argument 'tinny' is not one of: tiny"),
    "piece": (["--pieces=atention"], "--pieces=atention is unknown (did you mean attention?)"),
    "repeats": (["--repeats=0"], "--repeats=0 must be at least 1"),
    "one file": (["--compare", "a.json"], "--compare takes two files"),
    "no file": (["--compare", "a.json", "b.json"], "--compare: a.json:"),
    "argument": (["tiny"], "unknown argument 'tiny'"),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(BAD, [name for name in BAD if name != "shape"]))
def test_bad_input_is_one_line_and_exit_code_2(name):
    arguments, expected = BAD[name]
    process = command("benchmark", *arguments, check=False)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.splitlines()) == 1


def test_the_tokenizer_of_a_start_up_has_as_many_entries_as_asked(tmp_path):
    (option,) = _tokenizer_options(50_304, tmp_path / "tokenizer.json")
    made = tokenizers.load(option.partition("=")[2], 0, (), directory="")
    assert made.vocab_size == 50_304
    ids, num_bytes = made.encode("a start-up")
    assert num_bytes.sum() == 10
    assert made.decode(ids) == "a start-up"
    assert _tokenizer_options(256, tmp_path / "none") == ["--config.data.vocab_size=0"]


def test_a_child_that_ends_before_its_first_step_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"before its first step: .*data.vocab_size 256"):
        _first_step("tiny", [], tmp_path)
