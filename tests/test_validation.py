"""The curve of bits/dim on validation images during a training: ``training.validate_every``."""

import itertools
import os
import signal

import cell_runs
import jax
import numpy as np
import pytest
import runs
import tiny

from sbml.density.estimators import Cell
from sbml.program.config import build
from sbml.program.config.trained import Trained
from sbml.program.evaluation import cells, validation
from sbml.program.modes import eval as evaluation
from sbml.program.modes import train
from sbml.program.report import page
from sbml.program.runtime import metrics, preemption
from sbml.program.runtime.workdir import EVALUATION, Workdir

STEPS = 10
COLUMN = "validation_bits_per_dim"


def config_of(**training):
    config = tiny.get_config()
    config.data.validation = 41  # not a multiple of two devices
    settings = {"num_steps": STEPS, "log_every": 2, "validate_every": 4, **training}
    config.training.update(settings)
    return config


def curve(workdir):
    return {row["step"]: row[COLUMN] for row in metrics.read(workdir) if COLUMN in row}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("validation")
    runs.mode(train.run, config_of(), workdir)
    return workdir


@pytest.mark.slow
def test_a_point_is_the_number_of_an_evaluation(trained):
    """The images, the draws and the averaged parameters are those of ``--mode=eval`` at this
    step."""
    found = curve(trained)
    assert [*found] == [4, 8, STEPS]
    config = config_of()
    config.eval.update(split="validation", estimators=("bound",))
    config.eval.bound.proposal_bins = 0
    runs.mode(evaluation.run, config, trained)
    (result,) = Workdir(trained).read(EVALUATION)["results"]
    last = metrics.read(trained)[-1]
    assert (result["n"], last["step"]) == (41, STEPS)
    np.testing.assert_allclose(last[COLUMN], result["bits_per_dim"], rtol=1e-6)


def test_a_point_is_the_mean_over_images_and_sweeps(digits_model, tmp_path):
    """Its standard error is that of the mean over the images."""
    config = config_of(validation_images=6)
    config.eval.bound.update(sweeps=2, control=False)
    experiment = build.Experiment(config)
    restored, train_images = experiment.restore(digits_model), experiment.images("train")
    validate = validation.validator(experiment, train_images, restored.metadata, Workdir(tmp_path))
    point = validate(restored.state)
    cell, shown = Cell("bound", "uniform"), experiment.for_validation()
    images = experiment.images("validation")
    trained = Trained(shown, restored, Workdir(tmp_path))
    shared = cells.Evaluation(trained, images, train_images)
    run = cells.run_of(shared, cell, shared.dequantization("uniform"), stored=False)
    each = np.mean([cell_runs.numbers(run, run.measurement.ids, i) for i in (0, 1)], axis=0)
    stderr = each.std(ddof=1) / np.sqrt(6)
    assert point == pytest.approx({COLUMN: each.mean(), "validation_stderr": stderr})
    assert len(each) == 6 and each.std() > 0


@pytest.mark.slow
def test_the_validation_changes_no_step(trained, tmp_path):
    runs.mode(train.run, config_of(validate_every=0), tmp_path)
    assert not curve(tmp_path)
    states = (runs.state(config_of(), path).state for path in (trained, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_a_run_that_was_stopped_has_the_same_curve(trained, tmp_path, monkeypatch):
    """The step 4 has a point. A run that stops there saves at once; it has the point later."""
    requested, calls = preemption.Preemption.requested, itertools.count(1)

    def stopped(self):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(self)

    monkeypatch.setattr(preemption.Preemption, "requested", stopped)
    with pytest.raises(SystemExit):
        runs.mode(train.run, config_of(), tmp_path)
    monkeypatch.undo()
    assert not curve(tmp_path)
    runs.mode(train.run, config_of(), tmp_path)
    assert curve(tmp_path) == curve(trained)


@pytest.mark.slow
def test_one_image_has_no_standard_error(trained, tmp_path):
    """``validation_images`` limits their number, which changes the mean."""
    runs.mode(train.run, config_of(validation_images=1, num_steps=8), tmp_path)
    rows, all_images = metrics.read(tmp_path), curve(trained)
    assert [*curve(tmp_path)] == [4, 8] and not any("validation_stderr" in row for row in rows)
    assert all(abs(value - all_images[step]) > 1e-3 for step, value in curve(tmp_path).items())
    assert page.validation(rows)


@pytest.mark.slow
def test_the_report_draws_the_curve_and_names_its_least_point(trained):
    figure = page.validation(metrics.read(trained))
    found = curve(trained)
    least = min(found, key=found.get)
    assert figure and f"The least is {found[least]:.4f} bits/dim, at step {least}" in str(figure)
    assert page.validation(metrics.read(trained)[:2]) is None
