"""One cell of the table on a trained model, as an evaluation runs it."""

import tiny

from sbml.density.estimators import Cell
from sbml.program.config import build
from sbml.program.config.trained import Trained
from sbml.program.evaluation import cells
from sbml.program.runtime.workdir import Workdir

ODE, BOUND = Cell("ode", "uniform"), Cell("bound", "uniform")


def cell_run(workdir, directory, cell, **fields):
    """The run of one cell on the checkpoint of ``workdir``, its rows kept in ``directory``."""
    config, directory = tiny.get_config(), Workdir(directory)
    config.eval.update(fields)
    experiment = build.Experiment(config)
    images, train = experiment.images("test"), experiment.images("train")
    trained = Trained(experiment, experiment.restore(workdir), directory)
    shared = cells.Evaluation(trained, images, train)
    return cells.run_of(shared, cell, shared.dequantization(cell.dequantizer))


def numbers(run, ids, sweep=0):
    """The bits/dim ``(n,)`` of the images ``ids`` in one sweep."""
    return run.measurement.total(run.measurement.rows(ids, sweep))
