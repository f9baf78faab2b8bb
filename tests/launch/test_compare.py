"""launch.compare on files as launch.evaluate --tasks writes them, and on hostile ones."""

import json
import sys

import numpy as np
import pytest
from absl import flags

from launch import compare
from lm.errors import InputError
from lm.studies import items


def write(path, tasks):
    content = {
        name: {"items": [{"id": i, "score": s, "more": "x"} for i, s in scores.items()]}
        for name, scores in tasks.items()
    }
    path.write_text(json.dumps({"model": "m", "tasks": content}))
    return path


@pytest.fixture
def files(tmp_path):
    """Two models with two seeds each; the items of the second are in another order."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 2, 30)) + np.array([0.0, 1.0])[:, None, None]
    paths = []
    for model in (0, 1):
        for seed in (0, 1):
            order = range(30) if not model else range(29, -1, -1)
            tasks = {"arc": {f"q{i}": table[model, seed, i] for i in order}, "boolq": {1: 0, 2: 1}}
            if model:
                tasks["other"] = {1: 0, 2: 1}
            paths.append(write(tmp_path / f"{model}{seed}.json", tasks))
    return table, paths


def test_items_are_matched_by_their_ids_and_runs_by_their_order(files):
    table, paths = files
    found, left_out = compare.compare(paths[:2], paths[2:])
    assert found["arc"] == items.compare(*table, comparisons=2)
    assert found["boolq"].verdict == "not resolved"
    assert left_out == ["other"]
    # The control: without the ids the pairs would be others.
    assert found["arc"] != items.compare(table[0], table[1][:, ::-1], comparisons=2)


def found_verdict(paths):
    return compare.compare(paths[:2], paths[2:])[0]["arc"].verdict


def test_what_is_printed(files, capsys):
    _, paths = files
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    names = [",".join(map(str, paths[:2])), ",".join(map(str, paths[2:]))]
    compare.main(*names)
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:3] == ["arc", "30", "2"]
    assert out[1].endswith(found_verdict(paths))
    assert out[-2].endswith("97.50% (2 tasks), for other seeds and other items")
    assert out[-1] == "not in all files: other"


BAD = {
    "words": ("words", "not JSON"),
    "nan": ('{"tasks": {"a": {"items": [{"id": 1, "score": NaN}]}}}', "NaN is no number of JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "list": ("[]", "it has no tasks"),
    "empty": ('{"tasks": {}}', "it has no tasks"),
    "one": ('{"tasks": {"a": {"items": [{"id": 1, "score": 0}]}}}', "at least two items"),
    "string": ('{"tasks": {"a": {"items": "ab"}}}', "task a: needs a list"),
    "id": ('{"tasks": {"a": {"items": [{"score": 0}, {}]}}}', r"items\[0\] needs an id"),
    "twice": (
        '{"tasks": {"a": {"items": [{"id": 1, "score": 0}, {"id": 1, "score": 0}]}}}',
        r"items\[1\] has the id 1 of an item before it",
    ),
    "score": (
        '{"tasks": {"a": {"items": [{"id": 1, "score": true}, {"id": 2, "score": 0}]}}}',
        r"items\[0\] needs score, a finite number, and has True",
    ),
    "null": (
        '{"tasks": {"a": {"items": [{"id": 1, "score": null}, {"id": 2, "score": 0}]}}}',
        "and has None",
    ),
    "large": (
        '{"tasks": {"a": {"items": [{"id": 1, "score": 1' + "0" * 400 + '}, {"id": 2}]}}}',
        "needs score, a finite",
    ),
    "infinite": (
        '{"tasks": {"a": {"items": [{"id": 1, "score": 1e999}, {"id": 2}]}}}',
        "needs score, a finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        compare.read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_files_that_do_not_belong_together(files, tmp_path, monkeypatch):
    _, paths = files
    with pytest.raises(InputError, match="1 and 2 files: runs are compared seed by seed"):
        compare.compare(paths[:1], paths[2:])
    other = write(tmp_path / "other.json", {"arc": {"q0": 1, "q1": 2}})
    with pytest.raises(InputError, match=r"other\.json: task arc has other items than .*00\.json"):
        compare.compare(paths[:1], [other])
    with pytest.raises(InputError, match="no task is in all files"):
        compare.compare(paths[:1], [write(tmp_path / "no.json", {"no": {1: 1, 2: 2}})])
    with pytest.raises(InputError, match="cannot be read: No such file"):
        compare.read(tmp_path / "nothing.json")
    monkeypatch.setattr(compare, "_MOST_BYTES", 100)
    with pytest.raises(InputError, match="bytes are too many; valid: up to 100"):
        compare.read(paths[0])
