"""The command line."""

import pytest

from sbml import main


def test_of_a_field_given_twice_the_last_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """absl makes one tuple of two: estimators of both, a shape of six numbers."""
    monkeypatch.setattr(main.app, "parse_flags_with_usage", lambda arguments: arguments)
    given = ["main", "--config=a.py", "--config.data.shape=8,8,1", "--mode=eval"]
    again = [*given, "--config.eval.seed=3", "--config.data.shape=32,32,3", "--noconfig.data.flip"]
    assert main.parse(again) == [a for a in again if a != "--config.data.shape=8,8,1"]
    assert main.parse(given) == given
    apart = ["main", "--config.data.source", "digits", "--config.data.source", "photos"]
    assert main.parse(apart) == apart  # A name without its value would be left.
