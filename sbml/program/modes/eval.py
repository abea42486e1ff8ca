"""Evaluates a checkpoint on the images of a split, and writes a report: ``--mode=eval``.

The results are a table of cells. A cell is one estimator with one dequantizer and K draws of it
(``sbml.estimators``).
"""

from collections.abc import Sequence

from absl import logging

from sbml import dequantizers
from sbml.dequantizers import DEQUANTIZERS
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.evaluation import classifier, levels, table
from sbml.program.evaluation.cells import Evaluation, check_first_batch, run_of
from sbml.program.report import result
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import EVALUATION, Workdir
from sbml.statistics import intervals


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the dequantizers with parameters are trained, or will be."""
    config = experiment.config
    missing = [
        name for name in config.eval.dequantizers if dequantizers.is_trained(DEQUANTIZERS[name])
    ]
    made = {"train_dequantizer", "convert"}.intersection(before)
    if missing and not made and not config.dequantizer.training.checkpoints(workdir).steps():
        raise ValueError(
            f"eval.dequantizers={missing[0]}: no dequantizer in {workdir}: train it first "
            "(--mode=train_dequantizer,eval)"
        )


def run(trained: Trained, preemption: Preemption) -> Workdir:
    """Evaluate the model on ``eval.split``.

    Writes ``evaluation.json`` and ``per_image.npz``, which has the columns of the cells with the
    most images. A cell with fewer images, such as one with K > 1, has a file of its own. A killed
    evaluation resumes where it stopped.

    The files of an evaluation of training images are in the folder ``train`` of the work directory,
    and the report on held-out images then also has the difference between the two.
    """
    config = trained.experiment.config.eval
    evaluation = Evaluation.of_split(trained, config.split, preemption)
    undefined = {c.name: c.reason_undefined for c in config.cells() if c.reason_undefined}
    cells = [cell for cell in config.cells() if not cell.reason_undefined]
    names = dict.fromkeys(cell.dequantizer for cell in cells)
    dequantizations = {name: evaluation.dequantization(name) for name in names}
    for dequantization in dequantizations.values():
        check_first_batch(evaluation, dequantization)
    if remark := table.remark(evaluation):
        print(remark)
    warnings = table.cautions(evaluation, dequantizations)
    for warning in warnings:  # These come before the work, so that the user can stop it.
        logging.warning(warning)
    # All cells are set up before the first is computed, so that errors appear at once.
    runs = [run_of(evaluation, cell, dequantizations[cell.dequantizer]) for cell in cells]
    for run in runs:
        print(result.line(run.row))
    profiled = next((run for run in runs if run.cell.kind.reducible), None)
    loss = levels.measure(profiled) if profiled and config.bound.level_images else None
    classified = classifier.classify(evaluation)
    for name, value in classified.items():
        print(f"classifier: {name} {intervals.cell(value)}")
    found = [warning for run in runs for warning in run.warnings]
    found += table.contradictions(runs)
    found += classifier.cautions(classified, config.ode.solver_budget)
    for warning in found:
        logging.warning(warning)
    tables = table.columns(evaluation, runs)
    content = table.evaluation(evaluation, runs, tables, [*warnings, *found])
    more = {"undefined": undefined, "classifier": classified, "noise_levels": loss}
    content |= {name: value for name, value in more.items() if value}
    out = Workdir(trained.workdir / "train") if config.split == "train" else trained.workdir
    # First the columns, and then the evaluation that names them.
    for name, columns in tables.items():
        out.write(name, columns)
    out.write(EVALUATION, content)
    out.keep("per_image*.npz", tables)  # Others are of an earlier evaluation.
    return out
