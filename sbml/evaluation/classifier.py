"""The Bayes classifier of a class-conditional model, and the mixture over its classes.

    p(c | k) = pi_c P(k | c) / P(k),      P(k) = sum_c pi_c P(k | c)

pi_c is the share of class c in the training images, and P(k | c) is the likelihood of the integers
by the ODE with uniform dequantization. All classes have the same random draws.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import special

from sbml.bits import LOG2
from sbml.density import Density
from sbml.evaluation.inputs import Inputs
from sbml.intervals import mean_interval
from sbml.report.result import HALF_WIDTH
from sbml.runtime.parts import compute_once

GUESS = "accuracy of guessing the most frequent class"


def why_none(inputs: Inputs) -> str:
    """Why a model with classes has no classifier; empty if there is no obstacle."""
    seen = inputs.labels(inputs.train)
    if seen is None or not inputs.experiment.config.eval.classifier_images:
        return ""
    if inputs.knows_centres:
        return (
            "no classifier: its likelihoods are of uniformly dequantized images, and the model was "
            "trained on bin centres with less noise than half a bin"
        )
    if absent := [name for c, name in enumerate(inputs.classes) if c not in seen]:
        return (
            f"no classifier: {inputs.train.name} ({inputs.train.split}) has no image of the class "
            f"{absent[0]}, which the model was trained on, so the share of the class is not known"
        )
    return ""


def classify(inputs: Inputs) -> dict[str, float]:
    """Numbers of the classifier for ``eval.classifier_images`` images, by their names in the
    report; empty for a model without classes."""
    config = inputs.experiment.config.eval
    labels, seen = inputs.labels(inputs.images), inputs.labels(inputs.train)
    if labels is None or seen is None or not config.classifier_images or why_none(inputs):
        return {}
    ids = inputs.ids(config.classifier_images)
    subset = max(4, len(ids) // 8)
    density = dataclasses.replace(inputs.density(), batch_size=config.batch_size, subset=subset)
    given = density, inputs.images.images[ids], labels[ids], seen
    stored = compute_once(inputs.workdir / "eval", "classifier", _numbers, *given)
    return {name: float(value) for name, value in stored.items()}


def cautions(found: dict[str, float]) -> list[str]:
    """Warnings about the numbers of :func:`classify`, which may be empty."""
    if found and found["accuracy"] <= found[GUESS]:
        return [
            f"the classifier has an accuracy of {found['accuracy']:.3g}, and guessing the most "
            f"frequent class has {found[GUESS]:.3g}: the model has not learned the classes, so "
            "train it longer, or classify more images (eval.classifier_images)"
        ]
    return []


def _numbers(
    density: Density, pixels: np.ndarray, truth: np.ndarray, seen: np.ndarray
) -> dict[str, float]:
    """The numbers for ``pixels (n, *s)`` of the classes ``truth (n,)``; ``seen`` are the classes of
    the training images."""
    prior = np.bincount(seen) / len(seen)
    found = density.classify(pixels, np.arange(len(prior)), prior, progress=True)
    accuracy, score = found.accuracy(truth), found.log_score(truth)
    mixture = -special.logsumexp(found.log_prob + np.log(prior), axis=1) / (density.dims * LOG2)
    given = -found.log_prob[np.arange(len(truth)), truth] / (density.dims * LOG2)
    return {
        "images": float(len(truth)),
        **_with_interval("accuracy", accuracy),
        GUESS: float(prior.max()),
        **_with_interval("-log p(c | k), nats", score),
        "calibration error": found.calibration_error(truth),
        **_with_interval("bits/dim of the mixture over classes", mean_interval(mixture)),
        **_with_interval("bits/dim given the label", mean_interval(given)),
        "share of images whose class changes with a stricter solver or new draws": found.changed,
    }


def _with_interval(name: str, number: Any) -> dict[str, float]:
    return {name: number.mean, f"{name}{HALF_WIDTH}": number.ci95}
