"""The Bayes classifier of a class-conditional model, and the mixture over its classes.

    p(c | k) = pi_c P(k | c) / P(k),      P(k) = sum_c pi_c P(k | c)

pi_c is the share of class c in the training images, and P(k | c) is the likelihood of the integers
by the ODE with uniform dequantization. All classes have the same random draws.
"""

from typing import Any

import numpy as np
from scipy import special

from sbml.bits import LOG2
from sbml.density import Density
from sbml.evaluation.inputs import Inputs
from sbml.intervals import mean_interval


def classify(inputs: Inputs) -> dict[str, float]:
    """Numbers of the classifier for ``eval.classifier_images`` images, by their names in the
    report; empty for a model without classes."""
    experiment, config = inputs.experiment, inputs.experiment.config.eval
    labels, seen = inputs.labels(inputs.images), inputs.labels(inputs.train)
    if labels is None or seen is None or not config.classifier_images:
        return {}
    ids = inputs.ids(config.classifier_images)
    density = Density(
        experiment.exact_adapter(inputs.restored.state.ema_params),
        experiment.sde,
        experiment.shape,
        levels=experiment.levels,
        eps=experiment.eval_eps,
        trace=config.divergence(),
        solver=config.solver(),
        batch_size=config.batch_size,
        seed=config.seed,
        subset=max(4, len(ids) // 8),
    )
    prior = np.bincount(seen, minlength=experiment.adapter.classes) / len(seen)
    pixels, classes = inputs.images.images[ids], np.arange(len(prior))
    found = density.classify(pixels, classes, prior, progress=True)
    truth = labels[ids]
    accuracy, score = found.accuracy(truth), found.log_score(truth)
    mixture = -special.logsumexp(found.log_prob + np.log(prior), axis=1) / (density.dims * LOG2)
    given = -found.log_prob[np.arange(len(ids)), truth] / (density.dims * LOG2)
    return {
        "images": float(len(ids)),
        **_with_interval("accuracy", accuracy),
        **_with_interval("-log p(c | k), nats", score),
        "calibration error": found.calibration_error(truth),
        **_with_interval("bits/dim of the mixture over classes", mean_interval(mixture)),
        **_with_interval("bits/dim given the label", mean_interval(given)),
        "share of decisions that the errors change": found.changed,
    }


def _with_interval(name: str, number: Any) -> dict[str, float]:
    return {name: number.mean, f"{name}, 95% interval +-": number.ci95}
