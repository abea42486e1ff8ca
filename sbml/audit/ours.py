"""The estimators of this package for integers. Every number comes from a measurement of
``Density``, as the numbers of ``--mode=eval`` do."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from sbml import Density, bits, discrete, integers
from sbml.audit.suite import WORLDS, Estimator, Numbers, Schedule
from sbml.audit.worlds import Denoiser, Images, World
from sbml.bound import GaussianControl, Reduction
from sbml.dequantizers import Dequantizer, decoders, truncated_normal, uniform
from sbml.divergence import Trace
from sbml.estimators import base, bound, ode
from sbml.estimators.base import Target
from sbml.ode import Solver
from sbml.score import from_prediction

EXACT, ONE_PROBE = Trace("exact"), Trace("rademacher", 1)
EPS = 1e-5
SOLVER = Solver(rtol=2e-4, atol=2e-4)
BATCH, MULTIPLE = 81, 9  # Batches have 9 or 81 images, so that two programs serve all calls.
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
      tau: for noise around bin centres, half a bin in standard deviations of the noise at the
        smallest time.
      without: the names of terms that are left out.
    """

    estimator: bound.Estimator | ode.Estimator
    dequantizer: Dequantizer
    sweeps: int = 1
    n_times: int = 16
    control: bool = False
    proposal: str = "importance"
    tau: float = discrete.TAU
    without: tuple[str, ...] = ()

    def __call__(
        self, denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int
    ) -> np.ndarray:
        sde, levels, noisy = schedule.sde, schedule.levels, self.dequantizer.at_noise
        eps = discrete.smallest_time(sde, levels, EPS, self.tau) if noisy else EPS
        target = Target(sde, eps, levels, self.dequantizer)
        control = None
        if self.control:
            centres = np.asarray(bits.to_model(jnp.asarray(pixels), 0.5, levels))
            fitted = GaussianControl.fit(centres, noise_variance=0.02, full=False)
            control = jax.tree.map(lambda a: jnp.asarray(a, float), fitted)
        estimator: base.Estimator
        if isinstance(self.estimator, bound.Estimator):
            reduction = Reduction(control, proposal=self.proposal)
            estimator = replace(self.estimator, n_times=self.n_times, reduction=reduction)
        else:
            estimator = replace(self.estimator, solver=SOLVER)
        density = Density(
            from_prediction(denoiser, "x0", sde),
            sde,
            pixels.shape[1:],
            levels=levels,
            eps=eps,
            batch_size=BATCH,
            seed=seed,
        )
        run = replace(
            density.measurement(estimator, target, pixels),
            sweeps=self.sweeps,
            check=False,
            multiple=MULTIPLE,
        )
        found = run.estimate()
        without = sum(found.terms[name] for name in self.without)
        return (found.values - without) * density.dims * bits.LOG2


UNIFORM, NORMAL, DECODER = uniform.Model(), truncated_normal.Model(), decoders.Categorical()
BOUND = Evaluation(bound.Estimator(), UNIFORM, sweeps=4, control=True)
ODE = Evaluation(ode.Estimator(EXACT), UNIFORM)


def by_density(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """``Density.bits_per_dim``, with the standard error of its probes and dequantization."""
    density = Density(
        from_prediction(denoiser, "x0", schedule.sde),
        *(schedule.sde, pixels.shape[1:], schedule.levels, EPS, ONE_PROBE, SOLVER),
        batch_size=BATCH,
        seed=seed,
        subset=len(pixels),
    )
    found, nats = density.bits_per_dim(pixels), density.dims * bits.LOG2
    return Numbers(nats * found.values, nats * found.this_set.stderr)


def _ours(name: str, data: integers.Kind, nats: Evaluation) -> Estimator:
    return Estimator(name, nats, data, WITHIN)


class Arguments(TypedDict, total=False):
    """Of ``audit``."""

    worlds: Mapping[str, World]
    calls: int


# These two share their programs, and most of the time is compilation.
FEW = {name: WORLDS[name] for name in ("gaussian", "random")}
# The estimators, each with the arguments of ``audit``.
SSM = bound.ScoreMatching(trace=EXACT)
OURS: dict[Estimator, Arguments] = {
    _ours("ODE, exact trace", "uniform", ODE): {},
    Estimator("Density.bits_per_dim, one probe", by_density, "uniform", WITHIN): {
        "worlds": {"gaussian": WORLDS["gaussian"]},
        "calls": 16,
    },
    _ours("ODE, one probe", "uniform", Evaluation(ode.Estimator(ONE_PROBE), UNIFORM)): {
        "worlds": FEW
    },
    _ours(
        "ODE, 2 draws in one logarithm", "uniform", Evaluation(ode.Estimator(EXACT, 2), UNIFORM)
    ): {"worlds": FEW},
    _ours("ODE, truncated normal", "centre", Evaluation(ode.Estimator(EXACT), NORMAL)): {
        "worlds": FEW
    },
    _ours("bound", "uniform", BOUND): {"worlds": FEW},
    # There is no control for it, so it needs more draws and more calls.
    _ours("bound, ssm", "uniform", Evaluation(SSM, UNIFORM, sweeps=4, n_times=32)): {
        "worlds": FEW,
        "calls": 64,
    },
    _ours("bound on P(k), truncated normal", "centre", replace(BOUND, dequantizer=NORMAL)): {
        "worlds": FEW
    },
    _ours("bound on P(k), decoder", "centre", replace(BOUND, dequantizer=DECODER)): {"worlds": FEW},
}
