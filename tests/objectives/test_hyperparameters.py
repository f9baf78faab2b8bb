import pytest

from configs import base
from objectives import OBJECTIVES
from objectives.hyperparameters import hyperparameters
from objectives.losses import LOSSES
from objectives.weighting import WEIGHTINGS


@pytest.mark.parametrize("registry", [WEIGHTINGS, LOSSES, OBJECTIVES], ids=len)
def test_every_hyperparameter_has_a_default_and_a_meaning(registry):
    for name, factory in registry.items():
        if name == "weighted":  # made of keys of the section `objective`
            continue
        found = hyperparameters(factory)
        section = base.get_config().objective.get(name, {})
        assert {key: default for key, (default, _) in found.items()} == dict(section)
        for key, (_, meaning) in found.items():
            assert len(meaning) > 5, f"{name}.{key}"


def test_meanings_are_read_from_the_docstring():
    def factory(base, a: int = 1, low: float = 0.0, high: float = 1.0):
        """A sum.

        Args:
          base: given.
          a: first, and
            longer.
          low, high: a range.

        Raises:
          ValueError: b: never.
        """

    assert hyperparameters(factory) == {
        "a": (1, "first, and longer."),
        "low": (0.0, "a range."),
        "high": (1.0, "a range."),
    }


def test_an_argument_without_default_or_meaning_is_an_error():
    def no_default(a):
        """.

        Args:
          a: it.
        """

    def no_meaning(a=1):
        """."""

    for factory in (no_default, no_meaning):
        with pytest.raises(ValueError, match="argument 'a' needs a default and a line"):
            hyperparameters(factory)


def test_a_new_factory_is_a_section_and_a_listed_key(monkeypatch):
    def half(share: float = 0.5):
        """Half.

        Args:
          share: of tokens, in (0, 1].
        """

    monkeypatch.setitem(WEIGHTINGS, "half", half)
    assert base.get_config().objective.half.share == 0.5
    assert base.meanings()["objective.half.share"] == "of tokens, in (0, 1]."


def test_every_key_has_a_meaning():
    assert all(len(meaning) > 5 for meaning in base.meanings().values())
    assert len(base.meanings()) == sum(1 for _ in base.entries())
