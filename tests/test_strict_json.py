import ast
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm import strict_json

ROOT = Path(__file__).parent.parent

KEYS = st.sampled_from(["", "a", "0", "a/b", "~", "~1", "/"])
LEAVES = st.sampled_from([None, True, 3, 1.5, "x", math.nan, math.inf, -math.inf])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parse_strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_was_not_finite_is_named():
    values = {"step": 5, "loss": math.nan, "grad_norm": math.inf, "x": [1.5, {"a/b": -math.inf}]}
    assert parse_strictly(strict_json.dumps(values)) == {
        "step": 5,
        "loss": None,
        "grad_norm": None,
        "x": [1.5, {"a/b": None}],
        "not_finite": {"loss": "nan", "grad_norm": "inf", "x/1/a~1b": "-inf"},
    }


@some
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_object_is_read_as_it_was_written(value):
    text = strict_json.dumps(value)
    parse_strictly(text)
    assert repr(strict_json.loads(text)) == repr(value)  # NaN is not equal to itself.


@some
@given(VALUES)
def test_finite_content_has_the_text_of_the_standard_library(value):
    text = strict_json.dumps(value, sort_keys=True)
    try:
        assert text == json.dumps(value, sort_keys=True, allow_nan=False)
    except ValueError:
        parse_strictly(text)


def test_files_of_older_commits_are_read():
    assert math.isnan(strict_json.loads('{"loss": NaN}')["loss"])
    assert strict_json.loads('{"loss": null, "not_finite": 3}')["loss"] is None


@pytest.mark.parametrize("named", ['{"y": "nan", "x/0": "inf"}', '{"x": "word"}'])
def test_a_field_that_does_not_fit_is_an_error(named):
    with pytest.raises(ValueError, match="not_finite names"):
        strict_json.loads('{"x": null, "not_finite": ' + named + "}")


def other_writers(source: str) -> list[str]:
    """Calls that write JSON by other means than lm.strict_json."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            found.append("from json import")
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        if call in ("json.dump", "json.dumps") or call.endswith((".to_json", "JSONEncoder")):
            found.append(call)
        if call.endswith("JsonSave") and "strict_json.encode(" not in ast.unparse(node.args[0]):
            found.append(call)
    return found


def test_nothing_else_writes_json():
    assert other_writers("import json\njson.dumps(x)")
    assert other_writers("ocp.args.JsonSave(metadata)")
    paths = [p for top in ("lm", "launch", "objectives") for p in (ROOT / top).rglob("*.py")]
    assert len(paths) > 100
    for path in paths:
        if path != ROOT / "lm" / "strict_json.py":
            assert other_writers(path.read_text()) == [], path
