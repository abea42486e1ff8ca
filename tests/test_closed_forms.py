"""The parts of the estimators, and the estimators for integers, against closed forms."""

import closed_forms
import closed_forms_of_integers
import pytest

from sbml.sdes import SDES

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.usefixtures("x64")]


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_continuous_data(name: str) -> None:
    rows = list(closed_forms.continuous_checks(name, SDES[name]()))
    assert len(rows) > 20 and [row for row in rows if not row.ok] == []


def test_integers() -> None:
    rows = closed_forms_of_integers.discrete_checks(["vp"])
    assert len(rows) == 20 and [row for row in rows if not row.ok] == []


@pytest.mark.parametrize(
    ("got", "looser", "error"),
    [(2.1, float("inf"), 0.0), (2.1, 2.0, 0.05), (1.5, 3.0, 0.25), (float("nan"), 3.0, None)],
)
def test_a_bound_lies_between_the_truth_and_a_looser_bound(
    got: float, looser: float, error: float | None
) -> None:
    found = closed_forms_of_integers.bounding("", "vp", got, 2.0, looser, 0.01)
    assert found.ok == (error == 0)
    assert error is None or found.error == pytest.approx(error)
