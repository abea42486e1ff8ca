"""The bound of validation images during a training, in bits/dim: ``training.validate_every``.

A point of the curve is the bound of an evaluation, with the averaged parameters in float32, on at
most ``training.validation_images`` images. All points have the same images, times and noises, so
the difference between two points has less noise than each of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from sbml import data
from sbml.data import ImageSet
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.evaluation.cells import Evaluation, run_of
from sbml.program.runtime.checkpoint import Restored
from sbml.program.runtime.state import TrainState
from sbml.program.runtime.workdir import Workdir


def validator(
    experiment: Experiment, train: ImageSet, metadata: dict[str, Any], workdir: Workdir
) -> Callable[[TrainState], dict[str, float]]:
    """A function that computes a point of the curve from the state of a training on ``train``.

    ``metadata`` is that of the checkpoints. The point is ``validation_bits_per_dim``, and
    ``validation_stderr``, its standard error as a mean over images.
    """
    cell, images = experiment.config.validation_cell(), experiment.images(data.VALIDATION)
    experiment = experiment.for_validation()

    def validate(state: TrainState) -> dict[str, float]:
        now = experiment.with_learned_schedule(state.ema_params)
        trained = Trained(now, Restored(0, state, metadata), workdir)
        evaluation = Evaluation(trained, images, train)
        with jax.default_matmul_precision(now.config.eval.precision):
            # The rows are not stored, because no other run needs them.
            of = evaluation, cell, evaluation.dequantization(cell.dequantizer)
            found = run_of(*of, stored=False, progress=False).measurement.estimate()
        point, stderr = {"validation_bits_per_dim": found.mean}, found.population.stderr
        # One image has no standard error.
        return point | ({"validation_stderr": stderr} if math.isfinite(stderr) else {})

    return validate
