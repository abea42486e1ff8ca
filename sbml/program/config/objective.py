"""The objective of a score's training: the draws of a batch and their losses.

    uint8 batch -> dequantize -> perturb -> score -> loss

    loss = 1/d  mean over the batch of  weight(t) 1/2 w(t) ||sigma s(x_t, t) + z||^2     nats/dim

where w(t) is the weighting of ``sbml.losses``, and weight(t) is one over the density of t
(``sbml.times``). With likelihood weighting, the expectation of the loss is a bound on
-log p(x) / d, up to terms that do not depend on the score.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbml import losses
from sbml.core import bits
from sbml.core.streams import stream
from sbml.core.types import Array, Key, conditioned
from sbml.likelihood import bound, discrete
from sbml.program.config.build import Experiment
from sbml.program.runtime.state import Loss, Observe, Prepare, Update
from sbml.sdes import SDE, times


def dequantize(pixels: Array, key: Key, kind: str, levels: int) -> Array:
    """The data x in [-1, 1] of uint8 ``pixels`` k of L = ``levels`` levels, of the same shape.

        uniform     x = 2 (k + u) / L - 1, u uniform in [0, 1): a point in the bin
        centre      x = 2 (k + 1/2) / L - 1: the centre of the bin
        none        x = 2 k / (L - 1) - 1, as in the code of Song et al. 2021

    ``kind`` is one of these names, the value of ``data.dequantization``.
    """
    if kind == "none":
        return 2.0 * pixels / (levels - 1) - 1.0
    u = jax.random.uniform(key, pixels.shape) if kind == "uniform" else 0.5
    return bits.to_model(pixels, u, levels)


class DrawnBatch(NamedTuple):
    """The random draws of a batch with n rows.

    Attributes:
      x: data ``(n, *s)`` in [-1, 1].
      t: times ``(n,)``.
      weight: the weights of the proposal, one over the density of t if v is uniform, ``(n,)``.
      keys: a key for the noise of each row, ``(n,)``.
      signs: the factors +1 and -1 of antithetic noises, ``(n,)``.
      v: the points in [0, 1) that the proposal maps to times, ``(n,)``.
      inverse: one over the density of v, ``(n,)``; it multiplies ``weight``.
      label: the number of the class, ``(n,)``, or None.
    """

    x: Array
    t: Array
    weight: Array
    keys: Key
    signs: Array
    v: Array
    inverse: Array
    label: Array | None = None


def prepare_fn(experiment: Experiment) -> Prepare:
    """A function that makes the draws of a batch of uint8 images, or of images and the numbers of
    their classes."""
    data, draws = experiment.config.data, draws_fn(experiment)

    def prepare(batch: Any, key: Key, statistics: Array) -> DrawnBatch:
        pixels, label = batch if experiment.adapter.classes else (batch, None)
        dequantization = stream(key, "dequantization")
        x = dequantize(pixels, dequantization, data.dequantization, data.levels)
        return draws(x, key, statistics, label)

    return prepare


def draws_fn(experiment: Experiment) -> Callable[..., DrawnBatch]:
    """A function that makes the draws of a batch of continuous data: one row for each example, or
    two rows with antithetic noises. Its last argument is the numbers of the classes, or None."""
    config = experiment.config
    draw, antithetic = times.DRAWS[config.training.times], config.training.antithetic

    def prepare(x: Array, key: Key, statistics: Array, label: Array | None = None) -> DrawnBatch:
        n = len(x)
        v, inverse = draw(stream(key, "times"), n)[:, 0], jnp.ones(n)
        if config.training.proposal_bins:
            scale = jnp.sqrt(statistics[1] / statistics[0])
            v, inverse = times.warp(v, times.with_floor(scale))
        t, weight = experiment.proposal.at(v)
        keys = jax.random.split(stream(key, "rows"), n)
        draws = DrawnBatch(x, t, weight, keys, jnp.ones(n), v, inverse, label)
        if not antithetic:
            return draws
        # The two rows of an image are neighbours, so that they stay on the same device.
        doubled = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), draws)
        return doubled._replace(signs=jnp.tile(jnp.array([1.0, -1.0]), n))

    return prepare


def loss_fn(experiment: Experiment) -> Loss:
    """A function that gives the loss of each row, ``(n,)``, in nats/dim. With ``sde.learned`` it
    gives two summands of the loss: that of the drawn time, and the terms at the ends."""
    training, learned = experiment.config.training, experiment.config.sde.learned
    dims = math.prod(experiment.shape)

    def loss(params: Any, draws: DrawnBatch, frozen: Any) -> Any:
        score, sde = experiment.trained_score(params)
        score = conditioned(score, draws.label)
        signs = draws.signs if training.antithetic else None
        terms = losses.dsm_batch(
            score, sde, draws.x, draws.t, draws.keys, weighting=training.weighting, signs=signs
        )
        terms = draws.weight * draws.inverse * terms / dims
        return (terms, _end_terms(experiment, sde, draws) / dims) if learned else terms

    return loss


def _end_terms(experiment: Experiment, sde: SDE, draws: DrawnBatch) -> Array:
    """The terms prior and reconstruction of the bound, in nats ``(n,)``.

    A learned SDE needs their gradients, because they depend on its smallest and its largest noise.
    """
    noise, eps = discrete.Categorical(experiment.levels), jnp.asarray(experiment.adapter.eps)

    def one(x: Array, key: Key, sign: Array) -> Array:
        z = sign * jax.random.normal(stream(key, "reconstruction"), x.shape)
        pixels = bits.to_pixels(x, experiment.levels)
        return bound.prior_kl(sde, x) + discrete.reconstruction(sde, noise, pixels, eps, z)

    return jax.vmap(one)(draws.x, draws.keys, draws.signs)


def observe_fn(experiment: Experiment) -> Observe | None:
    """A function that updates the statistics of the noise in bins of v (``times.tally``), from
    which the next steps make the density of their times; None if there is no such density.

    For antithetic noises the statistic is half of the squared difference of the two losses. The
    difference is twice the part of the loss that is odd in z. This part cancels in the mean of the
    two losses, but it is large where the gradient is noisy (docs/benchmarks/variance.md). Otherwise
    the statistic is the loss, whose square root is nearly proportional to the norm of the gradient.
    The terms at the ends of a learned SDE are left out, because they do not depend on the drawn
    time.
    """
    training = experiment.config.training
    if not training.proposal_bins:
        return None

    def observe(statistics: Array, draws: DrawnBatch, losses: Any) -> Array:
        values, v = jax.tree.leaves(losses)[0] / draws.inverse, draws.v
        if training.antithetic:
            values, v = 0.5 * (values[::2] - values[1::2]) ** 2, v[::2]
        return times.tally(statistics, v, values, decay=0.99)

    return observe


def update(experiment: Experiment, prepare: Prepare | None = None) -> Update:
    """The update of one step of the training of the score; ``prepare`` makes the draws of a batch,
    None for those of images."""
    return Update(
        prepare or prepare_fn(experiment),
        loss_fn(experiment),
        experiment.optimizer,
        ema=experiment.config.optim.ema,
        accumulate=experiment.config.training.accumulate,
        observe=observe_fn(experiment),
    )
