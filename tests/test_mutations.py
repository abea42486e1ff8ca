"""The list of planted mistakes fits the code as it is: ``benchmarks/mutations.py`` plants them."""

import pytest

from benchmarks import mutations


def test_each_mistake_has_its_line_and_its_tests() -> None:
    names = [each.name for each in mutations.MISTAKES]
    assert len(names) == len(set(names)) >= 49
    mutations.check()


def test_a_line_that_has_moved_and_a_test_that_is_gone_are_named() -> None:
    mistake = mutations.MISTAKES[0]
    for change, message in (
        ({"find": "no such line"}, "'no such line' occurs 0 times in sbml/codec/chain.py"),
        ({"find": "self"}, "'self' occurs [0-9]+ times in sbml/codec/chain.py, not once"),
        ({"tests": ("test_codec.py::test_none",)}, "no test test_codec.py::test_none; name the"),
        ({"tests": ("test_codec.py::test",)}, "no test test_codec.py::test; name the"),
    ):
        with pytest.raises(ValueError, match=message):
            mutations.check((mistake._replace(**change),))
