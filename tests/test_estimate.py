"""The text of an estimate: why a number has not converged, and which examples are outliers.

The numbers of these tests are made up, so no ODE is solved.
"""

import dataclasses
import math

import made_up
import numpy as np
import pytest
from made_up import MadeUp, OneTerm
from scipy import stats

from sbml.density import estimate
from sbml.density.estimate import Estimate
from sbml.density.estimators.base import Target
from sbml.likelihood.ode import Solver
from sbml.program.report import result
from sbml.sdes import VP

N, DEFAULT = 1000, Solver(rtol=2e-4, atol=2e-4)


def solved(
    errors: np.ndarray,
    *,
    solver: Solver = DEFAULT,
    size: float = 2.0,
    lost: int = 0,
    nfe: int = 99,
    budget: float = 2e-3,
) -> Estimate:
    """An estimate of 1,000 numbers, whose solver has these errors on the first of them.

    Where an error is NaN, the number of the stricter solve is NaN. Besides, ``lost`` of the numbers
    themselves are NaN after ``nfe`` evaluations.
    """
    m = len(errors)
    values = size * np.linspace(0.9, 1.1, N)
    values[m : m + lost] = np.nan

    def found(ids: np.ndarray, sweep: int, how: Solver) -> np.ndarray:
        return values[ids] - (errors[ids] if how == estimate.reference(solver) else 0)

    estimator = OneTerm(solver)
    return MadeUp(N, m, found, nfe=nfe, estimator=estimator, budget=budget).estimate()


def errors_of(mean: float, half_width: float, m: int = 8) -> np.ndarray:
    """``m`` errors whose mean has a 95% interval of this half-width."""
    shape = np.linspace(-1, 1, m)
    return mean + half_width / stats.t.ppf(0.975, m - 1) * math.sqrt(m) * shape / np.std(
        shape, ddof=1
    )


LOWER, STEPS, MORE = "lower rtol and atol", "raise max_steps=1000", "raise subset=8"
NOT_FINITE, ROUNDING = "neither more steps", "compute in float64"
GAVE_UP = np.append(errors_of(0.0, 1e-5, 5), [np.nan] * 3)


@pytest.mark.parametrize(
    ("found", "known", "remedy"),
    [
        (
            solved(errors_of(9e-4, 1.2e-3)),
            "the solver's error is 0.0009 +- 0.0012 on 8 numbers, so up to 0.0021, above the "
            "budget 0.002",
            MORE,
        ),
        (solved(errors_of(-9e-4, 1.2e-3)), "is -0.0009 +- 0.0012 on 8 numbers, so up to", MORE),
        # For this interval, even a subset of all 1,000 examples would be too small.
        (solved(errors_of(9e-4, 0.1)), "so up to 0.101, above", LOWER),
        (solved(errors_of(3e-3, 1e-4)), "is 0.003 +- 0.0001 on 8 numbers, so up to", LOWER),
        (
            solved(errors_of(3e-3, 1e-4), solver=Solver(fixed_steps=9)),
            "so up to 0.0031",
            "raise fixed_steps=9",
        ),
        (
            solved(GAVE_UP),
            "a stricter solve (rtol=2e-5, atol=2e-5) gave up for 3 of 8 numbers",
            STEPS,
        ),
        (solved(errors_of(0, 0), lost=2, nfe=8001), "2 of 1000 numbers are not finite", STEPS),
        (solved(errors_of(0, 0), lost=2, nfe=161), "after up to 161 evaluations", NOT_FINITE),
        (
            solved(errors_of(0, 0), lost=2, nfe=8001, solver=Solver(rtol=1e-9, atol=1e-9)),
            "not finite",
            "raise rtol and atol",
        ),
        (solved(GAVE_UP, solver=Solver(rtol=1e-9, atol=1e-9)), "gave up", "raise rtol and atol"),
        (solved(errors_of(1, 1), size=1e6), "so up to 2", ROUNDING),
        # More steps would not help the stricter solve: rounding alone is above the budget.
        (solved(GAVE_UP, size=1e6), "gave up for 3 of 8 numbers", ROUNDING),
    ],
)
def test_the_remedy_is_the_one_that_fits(found: Estimate, known: str, remedy: str) -> None:
    said = found.unconverged()
    assert known in said and f"NOT CONVERGED: {said}" in str(found)
    remedies = (LOWER, STEPS, MORE, NOT_FINITE, ROUNDING, "raise fixed_steps", "raise rtol")
    assert [each for each in remedies if each in said] == [r for r in remedies if r in remedy]
    in_a_config = found.unconverged("eval.ode.")
    for name in ("rtol", "max_steps", "subset", "fixed_steps"):
        for verb in ("raise", "lower"):
            assert (f"{verb} {name}" in said) == (f"{verb} eval.ode.{name}" in in_a_config)
            assert f"{verb} {name}" not in in_a_config
    assert (ROUNDING in said) == in_a_config.endswith(": raise eval.ode.solver_budget")
    assert ROUNDING not in in_a_config and "scale of the score" not in in_a_config


def test_the_line_of_a_number_ends_with_its_remedy() -> None:
    """It has the flags of the command line, or the arguments of ``Density``."""
    found = solved(errors_of(3e-3, 1e-4), solver=Solver(rtol=1e-3, atol=2e-3))
    names = {"estimator": "ode", "dequantizer": "uniform", "data": "digits", "split": "test"}
    others = {"num_importance": 1, "split_size": N, "trace": None, "dequantizer_step": None}
    in_bits = dataclasses.replace(found, unit="bits/dim")
    row = {**names, **others, **in_bits.row(section="eval.ode.")}
    line = result.line(row).partition("\n")[0]
    assert " NOT CONVERGED at t=" in line and line.endswith(
        f", n={N}; lower eval.ode.rtol and eval.ode.atol, as in --config.eval.ode.rtol=0.0001 "
        "--config.eval.ode.atol=0.0002"
    )
    assert "; lower rtol and atol, as in solver=Solver(rtol=0.0001, atol=0.0002)\n" in str(found)


def test_the_advised_subset_is_large_enough() -> None:
    few = errors_of(9e-4, 1.2e-3)
    said = solved(few).unconverged()
    advised = int(said.rsplit(" ", 1)[1])
    assert 8 < advised <= 12  # (1.2 / 1.1)^2 times 8 is 9.5.
    assert solved(np.resize(few, 2 * advised)).converged and not solved(few).converged


def test_a_converged_number_and_a_bound_need_no_remedy() -> None:
    assert solved(errors_of(1e-4, 1e-4)).unconverged() == ""
    bound = made_up.bound(np.ones((2, 3)))
    assert bound.unconverged() == "" and "NOT" not in str(bound)


def test_the_draws_have_at_most_the_interval_that_contains_them() -> None:
    """Student's quantile for two sweeps is 12.7. The interval still covers the draws."""
    rng, missed, wide = np.random.default_rng(0), 0, 0
    for _ in range(200):
        noise = 0.3 * rng.normal(size=(2, 30))
        draws = rng.normal(size=30) + noise
        found, own = made_up.bound(draws), 12.706 * np.std(draws.mean(axis=1), ddof=1) / 2**0.5
        assert found.this_set.ci95 == pytest.approx(min(own, found.population.ci95), rel=1e-4)
        wide += own > found.population.ci95
        missed += abs(noise.mean()) > found.this_set.ci95
    assert wide > 25 and missed < 0.1 * 200, (wide, missed)
    assert made_up.bound(draws[:1]).this_set.ci95 == math.inf  # One sweep does not show them.


def test_the_reference_may_take_as_many_steps_as_the_solver() -> None:
    """Otherwise it would still give up after a user has raised ``max_steps`` as advised."""
    assert estimate.reference(Solver(max_steps=5_000)).max_steps == 5_000
    assert estimate.reference(Solver(max_steps=5)).max_steps == Solver().max_steps


def shifted(*outliers: tuple[int, float]) -> Estimate:
    """A bound of 40 numbers around 2, some of which have other values."""
    values = np.linspace(1.5, 2.5, 40)
    for place, value in outliers:
        values[place] = value
    return made_up.bound([values, values], target=Target(VP(), 1e-5, levels=17))


@pytest.mark.parametrize("bad", [[(7, 300.0)], [(3, -90.0), (7, 300.0)], [(7, math.nan)]])
def test_outliers_are_named_by_the_same_line_in_density_and_in_an_evaluation(
    bad: list[tuple[int, float]],
) -> None:
    found = shifted(*bad)
    kept = np.delete(found.values, [place for place, _ in bad])
    low, high = stats.t.interval(0.95, len(kept) - 1, kept.mean(), stats.sem(kept))
    median = np.nanmedian(found.values)
    names = ", ".join(f"{place} ({value:.3f})" for place, value in reversed(bad))
    line = (
        f"{len(bad)} of 40 numbers are more than 6 robust standard deviations from the median "
        f"{median:.4f}: {names}. They are included in the mean; without them it is "
        f"{kept.mean():.4f} bits/dim, 95% interval [{low:.4f}, {high:.4f}]"
    )
    number, second = str(found).split("\n")
    # The number itself is that of all examples.
    assert second == line and number.startswith(f"{found.values.mean():.4f} bits/dim at t=")
    row = found.row(np.arange(100, 140))
    warned = found.warnings("eval.bound.", [f"n{i}" for i in range(40)])
    assert line.replace(names, ", ".join(f"n{name}" for name in names.split(", "))) in warned
    assert row["without_outliers"] == pytest.approx(kept.mean())
    assert row["median"] == median
    assert [each[0] for each in row["outliers"]] == [100 + place for place, _ in reversed(bad)]


def test_numbers_without_outliers_have_no_such_line() -> None:
    all_lost = shifted(*((place, math.nan) for place in range(40)))
    assert "\n" not in str(shifted()) and "\n" not in str(all_lost)


def test_a_known_term_is_part_of_the_numbers_their_mean_and_their_intervals() -> None:
    before, term = solved(errors_of(1e-4, 1e-5)), np.linspace(-1, 2, N)
    after = before.with_term("transform", term)
    np.testing.assert_array_equal(after.values, before.values + term)
    np.testing.assert_array_equal(after.terms["transform"], term)
    assert after.mean == pytest.approx(before.mean + 0.5)
    assert after.this_set.mean == pytest.approx(before.this_set.mean + 0.5)
    assert after.population.stderr == pytest.approx(stats.sem(before.values + term))
