"""One cell of the table on a trained model, as an evaluation runs it."""

import tiny

from sbml.estimators import Cell
from sbml.evaluation import cells
from sbml.experiment import build
from sbml.modes import eval as evaluate
from sbml.runtime.workdir import Workdir

ODE, BOUND = Cell("ode", "uniform"), Cell("bound", "uniform")


def cell_run(workdir, directory, cell, **fields):
    """The run of one cell on the checkpoint of ``workdir``, its rows kept in ``directory``."""
    config, directory = tiny.get_config(), Workdir(directory)
    config.eval.update(fields)
    experiment = build.Experiment(config)
    images, train = experiment.images("test"), experiment.images("train")
    wants = cell.kind.reducible
    control = evaluate.control_variate(experiment, train, directory) if wants else None
    restored = experiment.restore(workdir)
    density = evaluate.time_density(experiment, restored, train, control, directory)
    shared = cells.Evaluation(experiment, restored, images, control, density, directory)
    found = evaluate.dequantization(experiment, cell.dequantizer, workdir, train)
    return cells.CellRun(shared, cell, found)
