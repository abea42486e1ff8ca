"""The Bayes classifier of a class-conditional model, and the mixture over its classes.

    p(c | k) = pi_c P(k | c) / P(k),      P(k) = sum_c pi_c P(k | c)

pi_c is the share of class c in the training images, and P(k | c) is the likelihood of the integers
by the ODE with uniform dequantization. All classes have the same random draws.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import special

from sbml.core.bits import LOG2
from sbml.core.scalars import notation
from sbml.density import Density
from sbml.program.evaluation.cells import Evaluation
from sbml.statistics.intervals import Interval, mean_interval

Numbers = dict[str, Any]  # a float or an ``Interval``, by its name in the report
GUESS = "accuracy of guessing the most frequent class"
LOST = "images whose class is not known"
SOLVER_ERROR = "solver's error of the bits/dim"


def why_none(evaluation: Evaluation) -> str:
    """Why a model with classes has no classifier; empty if there is no obstacle."""
    trained, train = evaluation.trained, evaluation.train
    seen = trained.labels(train)
    if seen is None or not trained.experiment.config.eval.classifier_images:
        return ""
    if absent := [name for c, name in enumerate(trained.classes) if c not in seen]:
        return (
            f"no classifier: {train.name} ({train.split}) has no image of the class "
            f"{absent[0]}, which the model was trained on, so the share of the class is not known"
        )
    return ""


def classify(evaluation: Evaluation) -> Numbers:
    """Numbers of the classifier for ``eval.classifier_images`` images, by their names in the
    report; empty for a model without classes."""
    trained, config = evaluation.trained, evaluation.experiment.config.eval
    labels, seen = trained.labels(evaluation.images), trained.labels(evaluation.train)
    if labels is None or seen is None or not config.classifier_images or why_none(evaluation):
        return {}
    ids = evaluation.ids(config.classifier_images)
    subset = max(4, len(ids) // 8)
    density = dataclasses.replace(trained.density(), batch_size=config.batch_size, subset=subset)
    given = density, evaluation.images.images[ids], labels[ids], seen
    stored = evaluation.once("posterior", _numbers, *given)
    return {
        name: Interval(*value[:3].tolist(), *map(int, value[3:])) if value.ndim else float(value)
        for name, value in stored.items()
    }


def cautions(found: Numbers, budget: float) -> list[str]:
    """Warnings about the numbers of :func:`classify`, which may be empty; ``budget`` is the largest
    error of the solver in bits/dim that counts as converged."""
    if lost := found.get(LOST):
        return [
            f"the classifier's log p is not finite for {lost:.0f} of {found['images']:.0f} images, "
            "whose class is not known: raise eval.ode.max_steps, or train the model longer"
        ]
    errors = [
        abs(value.mean) + value.ci95
        for name, value in found.items()
        if name.startswith(SOLVER_ERROR)
    ]
    warnings = []
    if not all(error <= budget for error in errors):  # NaN, of a solve that gave up, is no success.
        warnings.append(
            f"NOT CONVERGED: the solver's error of the classifier's bits/dim is up to "
            f"{notation(np.max(errors), '.2g')}, not within eval.ode.solver_budget="
            f"{notation(budget)}: lower eval.ode.rtol and eval.ode.atol"
        )
    if found and (accuracy := found["accuracy"].mean) <= found[GUESS]:
        warnings.append(
            f"the classifier has an accuracy of {accuracy:.3g}, and guessing the most frequent "
            f"class has {found[GUESS]:.3g}: the model has not learned the classes, so "
            "train it longer, or classify more images (eval.classifier_images)"
        )
    return warnings


def _numbers(density: Density, pixels: np.ndarray, truth: np.ndarray, seen: np.ndarray) -> Numbers:
    """The numbers for ``pixels (n, *s)`` of the classes ``truth (n,)``; ``seen`` are the classes of
    the training images."""
    prior = np.bincount(seen) / len(seen)
    found = density.classify(pixels, np.arange(len(prior)), prior, progress=True)
    accuracy, score = found.accuracy(truth), found.log_score(truth)
    numbers: Numbers = {
        "images": float(len(truth)),
        "accuracy": accuracy,
        GUESS: float(prior.max()),
        "-log p(c | k), nats": score,
        "calibration error": found.calibration_error(truth),
    }

    def mixture(log_p: np.ndarray, truth: np.ndarray) -> Any:
        return -special.logsumexp(log_p + np.log(prior), axis=1)

    def given(log_p: np.ndarray, truth: np.ndarray) -> Any:
        return -log_p[np.arange(len(truth)), truth]

    nats, subset = density.dims * LOG2, found.subset
    for name, of in (("of the mixture over classes", mixture), ("given the label", given)):
        values = of(found.log_prob, truth) / nats
        error = values[subset] - of(found.strict, truth[subset]) / nats
        numbers[f"bits/dim {name}"] = mean_interval(values)
        numbers[f"{SOLVER_ERROR} {name}"] = mean_interval(error)
    return {
        **numbers,
        "error of the prior for one image, bits/dim": found.log_prob_prior / nats,
        "share of images whose class changes with a stricter solver or new draws": found.changed,
        LOST: float(len(found.lost)),
    }
