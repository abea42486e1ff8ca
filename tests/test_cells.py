"""The error bars of one cell: from the solver, from a second draw, and from sweeps."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from cell_runs import BOUND, ODE, cell_run, numbers
from made_up import MadeUp
from scipy import stats

from sbml import score
from sbml.core.progress import Bar
from sbml.core.scalars import notation
from sbml.density import estimate
from sbml.density.estimators import Cell
from sbml.likelihood.ode import Solver
from sbml.program.config import build
from sbml.program.evaluation import cells
from sbml.program.report import result as report
from sbml.statistics.intervals import half_width, repeated_stderr


@pytest.fixture(scope="module")
def trained(digits_model):
    """A work directory with a checkpoint."""
    return digits_model


@pytest.mark.slow
def test_a_network_in_half_precision_is_refused_before_any_row(trained, tmp_path, monkeypatch):
    """Only for the ODE, whose check of convergence does not see the rounding errors."""
    exact = score.NetworkScore.__call__

    def rounded(self, x, t, key=None):
        return exact(self, x, t, key).astype(jax.numpy.float16).astype(x.dtype)

    monkeypatch.setattr(score.NetworkScore, "__call__", rounded)
    with pytest.raises(ValueError, match="the score computes in float16, .* compute it in float32"):
        cell_run(trained, tmp_path, ODE)
    cell_run(trained, tmp_path, BOUND, bound={"proposal_bins": 0})


@pytest.mark.slow
def test_solver_guard_measures_the_solvers_error(trained, tmp_path):
    """The default is within its budget. At a loose tolerance, the reported error is the difference
    from a finer solve, and the result is marked as not converged."""

    def solved(**ode):
        few = {"max_images": 16, "batch_size": 16, "ode": {"subset": 16, **ode}}
        return cell_run(trained, tmp_path, ODE, **few)

    tight = solved().number
    assert tight.converged and abs(tight.solver_error.mean) < 3e-5
    assert 0 < tight.prior_error.mean < tight.prior_error.each < 1e-3
    run = solved(rtol=0.1, atol=0.1, solver_budget=1e-5)
    result = run.number
    finer = solved(rtol=2e-5, atol=2e-5)
    error = np.mean(result.values - numbers(finer, run.measurement.ids))
    assert result.solver_error.mean == pytest.approx(error) and abs(error) > 1e-5
    assert not result.converged
    (warning,) = (w for w in run.warnings if "NOT CONVERGED" in w)
    shown = notation(result.solver_error.mean, ".3g")
    assert f"NOT CONVERGED: the solver's error is {shown} +-" in warning
    assert warning.endswith("as in --config.eval.ode.rtol=0.01 --config.eval.ode.atol=0.01")


@pytest.mark.parametrize(("size", "converged"), [(4e-3, False), (1e-4, True)])
def test_errors_of_both_signs_do_not_cancel(size, converged):
    """Four images have errors of mean 0: ±4e-3 is not within the budget 1e-3, and ±1e-4 is."""
    signs, solver = np.asarray([1, -1, 1, -1]), Solver()
    gap = MadeUp(4, 4, lambda ids, sweep, how: size * signs * (how == solver)).solver_error()
    assert gap.mean == 0 and gap.ci95 == pytest.approx(3.182446 * size / np.sqrt(3))
    assert estimate.within(gap, 1e-3) == converged


def test_a_number_outside_the_subset_that_is_not_finite_has_not_converged():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    run = MadeUp(4, 2, lambda ids, sweep, how: values[ids], budget=1.0)
    assert run.estimate().converged
    values[3] = np.nan
    assert not run.estimate().converged


@pytest.mark.slow
def test_eight_euler_steps_are_refused(trained, tmp_path):
    ode = {"subset": 8, "method": "euler", "fixed_steps": 8}
    run = cell_run(trained, tmp_path, ODE, batch_size=16, ode=ode)
    refused = "8 euler steps are refused: the solver's error is .* above the budget 0.001 .*"
    refused += "eval.ode.fixed_steps=0 and eval.ode.method=tsit5"
    with pytest.raises(ValueError, match=refused):
        run.number  # noqa: B018


@pytest.mark.slow
def test_noise_of_an_ode_cell_is_measured_by_a_second_draw_of_a_subset(trained, tmp_path):
    run = cell_run(trained, tmp_path, ODE, max_images=40, batch_size=16, ode={"subset": 8})
    result = run.number
    one, other = (numbers(run, run.measurement.subset, draw) for draw in (0, 1))
    variance = np.mean((one - other) ** 2) / 2  # The variance of one image's noise.
    assert result.this_set.stderr == pytest.approx(np.sqrt(variance / 40), rel=1e-5)
    half = half_width(*repeated_stderr(one, other, 40))
    shown = run.row
    assert shown["this_set_ci95"] == result.this_set.ci95 == pytest.approx(half, rel=1e-5)
    expected = stats.t.interval(0.95, 39, result.mean, stats.sem(result.values))
    np.testing.assert_allclose(shown["interval"], expected, rtol=1e-6)
    assert shown["stderr"] == pytest.approx(stats.sem(result.values))
    own = result.mean - half, result.mean + half
    np.testing.assert_allclose(shown["this_set_interval"], own, rtol=1e-5)
    assert half < 0.9 * shown["ci95"]


@pytest.mark.slow
def test_times_with_heavy_weights_are_warned_of_and_the_defaults_are_not(trained, tmp_path):
    """In the line of the terminal, and in the warnings and the row of the report."""
    for fields in ({}, {"importance_sampling": False, "proposal_bins": 0}):
        few = {"max_images": 40, "batch_size": 16, "bound": {"sweeps": 3, **fields}}
        run = cell_run(trained, tmp_path, BOUND, **few)
        result, warnings = run.row, run.warnings
        warnings = [w for w in warnings if "HEAVY TAILS" in w]
        assert bool(fields) == ("HEAVY TAILS" in report.line(result)) == bool(warnings)
        assert (result["tail"] > 0.7) == bool(fields)
    assert "use the default of eval.bound.importance_sampling" in warnings[0]


@pytest.mark.slow
def test_another_seed_has_other_draws(trained, tmp_path):
    few = {"batch_size": 16, "max_images": 16}  # Other tests compile these programs too.
    for cell in (ODE, BOUND):
        one, other = (
            numbers(cell_run(trained, tmp_path, cell, seed=s, **few), np.arange(4)) for s in (0, 1)
        )
        assert np.all(one != other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "field", "value"),
    [
        (ODE, "seed", 1),
        (ODE, "smallest_time", 2e-3),
        (ODE, "ode", {"rtol": 1e-3}),
        (BOUND, "bound", {"n_times": 3}),
        (BOUND, "bound", {"times": "iid"}),
    ],
)
def test_rows_of_another_setting_are_not_taken(trained, tmp_path, cell, field, value):
    def identity(**fields):
        bound = {"proposal_bins": 0, **fields.pop("bound", {})}
        run = cell_run(trained, tmp_path, cell, bound=bound, **fields)
        return run.measurement.fingerprint()

    assert identity(**{field: value}) != identity()


def with_levels():
    config = tiny.get_config()
    config.score.parameterization = "levels"
    config.eval.bound.update(control=False, proposal_bins=0)
    return config


@pytest.mark.slow
def test_rows_of_other_images_or_parameters_are_not_taken(trained, tmp_path):
    run = cell_run(trained, tmp_path, BOUND, bound={"control": False, "proposal_bins": 0})
    shared, identity = run.evaluation, run.measurement.fingerprint()
    trained = shared.trained
    state = trained.restored.state
    moved = state.replace(ema_params=jax.tree.map(lambda a: a + 1, state.ema_params))
    levels = build.Experiment(with_levels())
    assert identity["score"]["class"] == "sbml.score.prediction:Adapter"
    for change in (
        {"trained": dataclasses.replace(trained, experiment=levels)},
        {"images": shared.experiment.images("train")},
        {"trained": dataclasses.replace(trained, restored=trained.restored._replace(state=moved))},
    ):
        other = cells.run_of(dataclasses.replace(shared, **change), BOUND, run.dequantization)
        assert other.measurement.fingerprint() != identity


@pytest.mark.slow
def test_a_network_in_bfloat16_is_evaluated_in_float32(trained, tmp_path, monkeypatch):
    config = tiny.get_config()
    config.model.dtype = "bfloat16"
    monkeypatch.setattr(tiny, "get_config", lambda: config)
    run = cell_run(trained, tmp_path, ODE)
    assert run.evaluation.experiment.adapter.model.dtype == "bfloat16"
    assert run.evaluation.trained.score.how.model.dtype == "float32"


@pytest.mark.slow
def test_the_smallest_time_of_a_number(trained, tmp_path):
    """The training's, ``eval.smallest_time``, and that of noise around bin centres."""
    for fields, cell, eps in (
        ({}, ODE, 1e-5),
        ({"smallest_time": 2e-3}, ODE, 2e-3),
        ({}, Cell("ode", "truncated_normal"), 2.968e-3),
    ):
        run = cell_run(trained, tmp_path, cell, max_images=2, batch_size=2, **fields)
        assert run.measurement.target.eps == pytest.approx(eps, rel=1e-3)
    shown = run.row
    assert shown["smallest_time"] == pytest.approx(eps, rel=1e-3)
    at = f"bits/dim at t={notation(eps, '.3g')} on digits test"
    assert at in report.line(shown).replace(" NOT CONVERGED", "")


@pytest.mark.slow
def test_one_image_has_a_known_error_of_the_solver(trained, tmp_path):
    """Its batch is not padded to ``eval.batch_size``, which would not fit in memory here."""
    run = cell_run(trained, tmp_path, ODE, max_images=1, batch_size=2**31 - 1)
    result = run.number
    assert run.measurement.batch_size == jax.device_count()
    assert len(result.values) == 1 and result.solver_error.ci95 == 0 and result.converged


@pytest.mark.slow
def test_the_bar_shows_the_mean_of_all_rows_so_far(trained, tmp_path, monkeypatch):
    """The mean is over all batches, also those of earlier sweeps and of an earlier command."""
    cell, sweeps, shown = BOUND, 3, []
    update = Bar.update

    def recorded(bar: Bar, n: int) -> None:
        update(bar, n)
        shown.append((bar.desc.removesuffix(": "), bar._text))

    few = {"batch_size": 16, "max_images": 40, "bound": {"sweeps": sweeps}}
    numbers(cell_run(trained, tmp_path, cell, **few | {"max_images": 10}), np.arange(10))
    run = cell_run(trained, tmp_path, cell, **few)
    known = np.intersect1d(run.measurement.ids, np.arange(10))
    values = list(numbers(run, known, 0))
    monkeypatch.setattr(Bar, "update", recorded)
    result = run.number
    expected = []
    for sweep, ids in enumerate(
        [np.setdiff1d(run.measurement.ids, known), *[run.measurement.ids] * (sweeps - 1)]
    ):
        table = run.measurement.rows(run.measurement.ids, sweep)
        of = dict(zip(table["id"], run.measurement.total(table), strict=True))
        for start in range(0, len(ids), 16):
            values += [of[i] for i in ids[start : start + 16]]
            expected.append(f"{np.mean(values):.3f} bits/dim")
    own = [text for name, text in shown if name == cell.title]
    assert own == expected and len(set(own)) > 1
    assert own[-1] == f"{result.population.mean:.3f} bits/dim"
    # The same name as in the result that is printed.
    assert report.cell(run.row).title == cell.title


@pytest.mark.slow
def test_sweeps_draw_times_of_their_own(trained, tmp_path):
    run = cell_run(trained, tmp_path, BOUND).measurement
    assert not np.isin(*(run.estimator.points(0, sweep, 360) for sweep in (0, 1))).any()


@pytest.mark.slow
def test_target_se_sweeps_until_it_is_reached(trained, tmp_path):
    first = cell_run(trained, tmp_path, BOUND, bound={"sweeps": 3})
    target = first.number.this_set.stderr / 1.5
    more = cell_run(trained, tmp_path, BOUND, bound={"sweeps": 3, "target_se": target}).number
    assert more.sweeps > 3 and more.this_set.stderr <= target
    means = [numbers(first, np.arange(360), r).mean() for r in range(more.sweeps)]
    assert more.this_set.stderr == pytest.approx(stats.sem(means))
    half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
    assert more.this_set.ci95 == pytest.approx(half)
    assert more.values.mean() == pytest.approx(np.mean(means))
    bound = {"sweeps": 3, "max_sweeps": 4, "target_se": 1e-9}
    short = cell_run(trained, tmp_path, BOUND, bound=bound)
    (warning,) = short.warnings
    assert short.number.sweeps == 4 and "after 4 sweeps" in warning and "target_se=1e-9" in warning


@pytest.mark.slow
def test_a_target_is_not_judged_by_few_sweeps(trained, tmp_path):
    bound = {"sweeps": 1, "target_se": 1.0}
    run = cell_run(trained, tmp_path, BOUND, max_images=20, batch_size=16, bound=bound)
    result = run.number
    assert result.sweeps == 8 and 0 < result.this_set.stderr < 10
