"""The estimators of this package for integers. Every number comes from a measurement of
``Density``, as the numbers of ``--mode=eval`` do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import Density
from sbml.audit.suite import WORLDS, Estimator, Numbers, Schedule
from sbml.audit.worlds import Denoiser, Images
from sbml.core import bits
from sbml.density.estimate import Estimate
from sbml.density.estimators import bound, ode
from sbml.density.estimators.base import Target
from sbml.dequantizers import Dequantizer, decoders, truncated_normal, uniform
from sbml.likelihood import discrete
from sbml.likelihood.bound import GaussianControl, Reduction
from sbml.likelihood.ode import Solver
from sbml.score import from_prediction
from sbml.score.divergence import Trace

EXACT, ONE_PROBE = Trace("exact"), Trace("rademacher", 1)
EPS = 1e-5
SOLVER = Solver(rtol=2e-4, atol=2e-4)
WITHIN = 0.02  # bits/dim: what noise at the smallest time costs at the edges of the bins
# All batches of an estimator have one size, so that one program serves all calls. Without a trace,
# an image costs little compared with a batch.
BATCH, BATCH_WITHOUT_TRACE = 9, 27


def _density(
    denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int, **options: Any
) -> Density:
    score, sde = from_prediction(denoiser, "x0", schedule.sde), schedule.sde
    return Density(score, sde, pixels.shape[1:], schedule.levels, seed=seed, **options)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """-log P(k) in nats by an estimator and a dequantizer.

    Attributes:
      estimator, dequantizer: of ``sbml.estimators`` and ``sbml.dequantizers``.
      sweeps: the number of sweeps, each with new draws, over which the number is a mean.
      control: whether a Gaussian control of a bound is fitted to the images.
      tau: for noise around bin centres, half a bin in standard deviations of the noise at the
        smallest time.
      batch: the number of images that are computed at once.
      without: the names of terms that are left out.
    """

    estimator: bound.Estimator | ode.Estimator
    dequantizer: Dequantizer
    sweeps: int = 1
    control: bool = False
    tau: float = discrete.TAU
    batch: int = BATCH
    without: tuple[str, ...] = ()

    def __call__(
        self, denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int
    ) -> np.ndarray:
        return np.asarray(self.with_error_bar(denoiser, schedule, pixels, seed).values)

    def with_error_bar(
        self, denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int
    ) -> Numbers:
        """The numbers, with the error bar of the draws if there are several sweeps."""
        sde, levels, estimator = schedule.sde, schedule.levels, self.estimator
        eps = EPS
        if self.dequantizer.at_noise:
            eps = float(discrete.smallest_time(sde, levels, EPS, self.tau))
        if self.control:
            assert isinstance(estimator, bound.Estimator)
            centres = np.asarray(bits.to_model(jnp.asarray(pixels), 0.5, levels))
            fitted = GaussianControl.fit(centres, noise_variance=0.02, full=False)
            control = jax.tree.map(lambda a: jnp.asarray(a, float), fitted)
            estimator = replace(estimator, reduction=Reduction(control))
        density = _density(denoiser, schedule, pixels, seed, eps=eps, batch_size=self.batch)
        target = Target(sde, eps, levels, self.dequantizer)
        run = density.measurement(estimator, target, pixels)
        found = replace(run, sweeps=self.sweeps, check=False, multiple=self.batch).estimate()
        return _in_nats(found, density.dims, self.without)


def _in_nats(found: Estimate, dims: int, without: Sequence[str] = ()) -> Numbers:
    values = found.values - sum(found.terms[name] for name in without)
    nats, of = dims * bits.LOG2, found.this_set
    return Numbers(nats * values, nats * of.stderr, nats * of.ci95)


def by_ode(trace: Trace, draws: int = 1) -> ode.Estimator:
    """The ODE with ``draws`` of the dequantizer in one logarithm."""
    return ode.Estimator(trace, draws, solver=SOLVER)


UNIFORM, NORMAL, DECODER = uniform.Model(), truncated_normal.Model(), decoders.Categorical()
BOUND = Evaluation(bound.Estimator(16), UNIFORM, sweeps=4, control=True, batch=BATCH_WITHOUT_TRACE)
ODE = Evaluation(by_ode(EXACT), UNIFORM)


def by_density(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """``Density.bits_per_dim``, with the error bar of its probes and dequantization."""
    how = {"trace": ONE_PROBE, "solver": SOLVER, "batch_size": BATCH, "subset": len(pixels)}
    density = _density(denoiser, schedule, pixels, seed, eps=EPS, **how)
    return _in_nats(density.bits_per_dim(pixels), density.dims)


def _ours(name: str, nats: Evaluation) -> Estimator:
    return Estimator(name, nats, "centre" if nats.dequantizer.at_noise else "uniform", WITHIN)


# The estimators, each with the arguments of ``audit``. These two worlds share their programs, and
# most of the time is compilation.
FEW = {"worlds": {name: WORLDS[name] for name in ("gaussian", "random")}}
ONE = {"worlds": {"gaussian": WORLDS["gaussian"]}}
# There is no control for it, so it needs more draws and more calls.
SSM = Evaluation(bound.ScoreMatching(32, trace=EXACT), UNIFORM, sweeps=4)
OURS: dict[Estimator, dict[str, Any]] = {
    _ours("ODE, exact trace", ODE): {},
    Estimator("Density.bits_per_dim, one probe", by_density, "uniform", WITHIN): ONE
    | {"calls": 16},
    _ours("ODE, one probe", Evaluation(by_ode(ONE_PROBE), UNIFORM)): FEW,
    _ours("ODE, 2 draws in one logarithm", Evaluation(by_ode(EXACT, 2), UNIFORM)): FEW,
    _ours("ODE, truncated normal", Evaluation(by_ode(EXACT), NORMAL)): FEW,
    Estimator("bound", BOUND.with_error_bar, "uniform", WITHIN): FEW,
    _ours("bound, ssm", SSM): FEW | {"calls": 64},
    _ours("bound on P(k), truncated normal", replace(BOUND, dequantizer=NORMAL)): FEW,
    _ours("bound on P(k), decoder", replace(BOUND, dequantizer=DECODER)): FEW,
}
