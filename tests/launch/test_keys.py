import json
from pathlib import Path

from configs import base
from launch import keys

ROOT = Path(__file__).parent.parent.parent


def test_the_committed_page_is_that_of_the_code():
    """Made by python -m launch.plan --keys --markdown > docs/configs.md."""
    assert (ROOT / "docs" / "configs.md").read_text() == keys.as_markdown(keys.listed()) + "\n"


def test_keys_are_all_keys_or_those_with_a_prefix():
    assert [f"{section}.{name}" for section, name, *_ in keys.listed()] == list(base.meanings())
    ((section, name, default, meaning),) = keys.listed("objective.rho1.")
    assert (section, name, default) == ("objective.rho1", "keep", "0.6")
    line = keys.as_text(keys.listed("objective.rho1."))
    assert line == f"objective.rho1.keep  0.6  {meaning}"
    found = json.loads(keys.as_json(keys.listed("objective.rho1.")))
    assert found == {"objective.rho1.keep": {"default": 0.6, "meaning": meaning}}
