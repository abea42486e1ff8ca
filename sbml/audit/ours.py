"""The estimators of this package: every number comes from ``sbml.estimators.base.rows``, which
computes the numbers of ``Density`` and ``--mode=eval`` too, with the same batches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import bits, discrete, integers, pytrees, times
from sbml.audit.suite import Estimator, Schedule
from sbml.audit.worlds import Denoiser, Images
from sbml.bound import GaussianControl, Reduction
from sbml.dequantizers import Dequantizer, decoders, truncated_normal, uniform
from sbml.divergence import Trace
from sbml.estimators import base, bound, ode
from sbml.estimators.base import Rows, Target
from sbml.ode import Solver
from sbml.score import from_prediction
from sbml.types import Array, Score

EXACT, ONE_PROBE = Trace("exact"), Trace("rademacher", 1)
EPS = 1e-5
SOLVER = Solver(rtol=2e-4, atol=2e-4)
BATCH = 9  # the number of images that are computed at once
WITHIN = 0.02  # bits/dim: what noise at the smallest time costs at the edges of the bins


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """-log P(k) in nats by an estimator and a dequantizer.

    Attributes:
      estimator, dequantizer: of ``sbml.estimators`` and ``sbml.dequantizers``.
      sweeps: the number of sweeps, each with new draws, over which the number is a mean.
      n_times: the number of times of a bound for each image in a sweep.
      control: whether a Gaussian control is fitted to the images.
      proposal: how a bound draws its times (``sbml.times.PROPOSALS``).
      tau: for noise around bin centres, half a bin at the smallest time in its standard deviations.
      without: the names of terms that are left out.
    """

    estimator: base.Estimator
    dequantizer: Dequantizer
    sweeps: int = 1
    n_times: int = 16
    control: bool = False
    proposal: str = "importance"
    tau: float = discrete.TAU
    without: tuple[str, ...] = ()

    def draws(
        self, denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int
    ) -> np.ndarray:
        """The numbers of each sweep, ``(sweeps, n)``."""
        sde, levels = schedule.sde, schedule.levels
        noisy = self.dequantizer.at_noise
        eps = discrete.smallest_time(sde, levels, EPS, self.tau) if noisy else EPS
        target, score = (
            Target(sde, eps, levels, self.dequantizer),
            from_prediction(denoiser, "x0", sde),
        )
        control = None
        if self.control:
            centres = np.asarray(bits.to_model(pixels, 0.5, levels))
            fitted = GaussianControl.fit(centres, noise_variance=0.02, full=False)
            control = jax.tree.map(lambda a: jnp.asarray(a, float), fitted)
        options = Reduction(control, proposal=self.proposal) if self.estimator.is_bound else SOLVER

        def of_batch(ids: np.ndarray) -> Array:
            return _draws(self, target, score, pixels[ids], ids, seed, options)

        batches = pytrees.in_batches(of_batch, np.arange(len(pixels)), BATCH)
        return np.concatenate([numbers for _, numbers in batches]).T

    def __call__(
        self, denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int
    ) -> np.ndarray:
        return self.draws(denoiser, schedule, pixels, seed).mean(0)


@functools.partial(jax.jit, static_argnames=("of", "target"))
def _draws(
    of: Evaluation,
    target: Target,
    score: Score,
    pixels: Array,
    ids: Array,
    seed: Array,
    options: Solver | Reduction,
) -> Array:
    """The sums of the terms of a batch in nats, ``(n, sweeps)``."""
    names = set(of.estimator.terms) - {"scale", *of.without}

    def sweep(i: Array) -> Array:
        u = None
        if of.estimator.is_bound:
            key = jax.random.fold_in(base.times_key(seed, i), ids[0])
            u = times.lattice(key, len(ids), of.n_times)
        rows = Rows(pixels, ids, jnp.full_like(ids, i), seed)
        terms = base.rows(of.estimator, target, score, {}, rows, u, options)
        return sum(terms[name] for name in names)

    nats = bits.dims(pixels.shape[1:]) * bits.LOG2
    scale = of.estimator.scale_nats(target, pixels.shape[1:])
    return nats * jax.vmap(sweep, out_axes=1)(jnp.arange(of.sweeps)) + scale


UNIFORM, NORMAL, DECODER = uniform.Model(), truncated_normal.Model(), decoders.Categorical()
SWEEPS: dict[str, Any] = {"sweeps": 4, "control": True}
BOUND = Evaluation(bound.Estimator(), UNIFORM, **SWEEPS)


def _ours(name: str, data: integers.Kind, *of: Any, **options: Any) -> Estimator:
    return Estimator(name, Evaluation(*of, **options), data, WITHIN)


OURS = (
    _ours("ODE, exact trace", "uniform", ode.Estimator(EXACT), UNIFORM),
    _ours("ODE, one probe", "uniform", ode.Estimator(ONE_PROBE), UNIFORM),
    _ours("ODE, 2 draws in one logarithm", "uniform", ode.Estimator(EXACT, 2), UNIFORM),
    _ours("ODE, truncated normal", "centre", ode.Estimator(EXACT), NORMAL),
    Estimator("bound", BOUND, "uniform", WITHIN),
    # There is no control for it, so it needs more draws.
    _ours("bound, ssm", "uniform", bound.ScoreMatching(EXACT), UNIFORM, sweeps=4, n_times=32),
    _ours("bound on P(k), truncated normal", "centre", bound.Estimator(), NORMAL, **SWEEPS),
    _ours("bound on P(k), decoder", "centre", bound.Estimator(), DECODER, **SWEEPS),
)
