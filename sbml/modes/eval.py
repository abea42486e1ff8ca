"""Evaluates a checkpoint on the images of a split, and writes a report: ``--mode=eval``.

The results are a table of cells (``evaluation.table``). A cell is one estimator with one
dequantizer and K draws of it (``sbml.estimators``).
"""

import time
from collections.abc import Sequence

import jax

from sbml import dequantizers
from sbml.dequantizers import DEQUANTIZERS
from sbml.evaluation.inputs import Inputs
from sbml.evaluation.table import Table
from sbml.experiment.build import Experiment
from sbml.report import summary
from sbml.runtime.workdir import Workdir


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


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Evaluate the newest undamaged checkpoint of ``workdir`` on ``eval.split``, with averaged
    parameters.

    Writes ``per_image.npz``, ``evaluation.json``, ``report.json`` and ``report.html``. A killed
    evaluation resumes where it stopped.
    """
    config = experiment.config.eval
    with workdir.lock("eval"), jax.default_matmul_precision(config.precision):
        inputs, start = Inputs.of(experiment, workdir, config.split), time.perf_counter()
        table = Table(inputs)
        with inputs.preemption:
            table.fill()
        evaluation = table.plain()
        if jax.process_index() == 0:
            table.write(workdir, evaluation)
            summary.write(workdir, lambda _: inputs.images)
        # The time is only printed, so that a resumed evaluation writes the same files as one
        # without interruption.
        print(f"report: {workdir / 'report.html'}, in {time.perf_counter() - start:.0f} s")
        # A signal during the last batch also ends the process, before its next mode begins.
        inputs.preemption.leave_if_requested("the evaluation is written")
