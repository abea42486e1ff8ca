"""The estimators of this package for integers. Every number comes from
``sbml.estimators.base.rows``, which computes the numbers of ``Density`` and ``--mode=eval`` too,
with the same batches, or from ``Density`` itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import Density, bits, discrete, integers, pytrees, times
from sbml.audit.suite import WORLDS, Estimator, Numbers, Schedule
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
      tau: for noise around bin centres, half a bin in standard deviations of the noise at the
        smallest time.
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
        options = Reduction(control, proposal=self.proposal) if self.estimator.is_bound else SOLVER
        how = self.estimator, target, self.sweeps, self.n_times
        score = from_prediction(denoiser, "x0", sde)

        def of_batch(ids: np.ndarray) -> dict[str, Array]:
            return _terms(*how, score, pixels[ids], ids, seed, options)

        names = set(self.estimator.terms) - {"scale", *self.without}
        batches = pytrees.in_batches(of_batch, np.arange(len(pixels)), BATCH)
        sums = [sum(np.float64(found[name]) for name in names) for _, found in batches]
        return np.concatenate(sums) + self.estimator.scale_nats(target, pixels.shape[1:])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _terms(
    estimator: base.Estimator,
    target: Target,
    sweeps: int,
    n_times: int,
    score: Score,
    pixels: Array,
    ids: Array,
    seed: Array,
    options: Solver | Reduction,
) -> dict[str, Array]:
    """The terms of a batch in nats, each ``(n,)``, as means over the sweeps."""

    def sweep(i: Array) -> dict[str, Array]:
        u = None
        if estimator.is_bound:
            key = jax.random.fold_in(base.times_key(seed, i), ids[0])
            u = times.lattice(key, len(ids), n_times)
        rows = Rows(pixels, ids, jnp.full_like(ids, i), seed)
        return base.rows(estimator, target, score, {}, rows, u, options)

    nats = bits.dims(pixels.shape[1:]) * bits.LOG2
    each = jax.vmap(sweep)(jnp.arange(sweeps))
    return jax.tree.map(lambda term: nats * term.mean(0), each)


UNIFORM, NORMAL, DECODER = uniform.Model(), truncated_normal.Model(), decoders.Categorical()
SWEEPS: dict[str, Any] = {"sweeps": 4, "control": True}
BOUND = Evaluation(bound.Estimator(), UNIFORM, **SWEEPS)
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


def _ours(name: str, data: integers.Kind, *of: Any, **options: Any) -> Estimator:
    return Estimator(name, Evaluation(*of, **options), data, WITHIN)


# These two share their programs, and most of the time is compilation.
FEW = {name: WORLDS[name] for name in ("gaussian", "random")}
# The estimators, each with the arguments of ``audit``.
OURS: dict[Estimator, dict[str, Any]] = {
    Estimator("ODE, exact trace", ODE, "uniform", WITHIN): {},
    Estimator("Density.bits_per_dim, one probe", by_density, "uniform", WITHIN): {
        "worlds": {"gaussian": WORLDS["gaussian"]},
        "calls": 16,
    },
    _ours("ODE, one probe", "uniform", ode.Estimator(ONE_PROBE), UNIFORM): {"worlds": FEW},
    _ours("ODE, 2 draws in one logarithm", "uniform", ode.Estimator(EXACT, 2), UNIFORM): {
        "worlds": FEW
    },
    _ours("ODE, truncated normal", "centre", ode.Estimator(EXACT), NORMAL): {"worlds": FEW},
    Estimator("bound", BOUND, "uniform", WITHIN): {"worlds": FEW},
    # There is no control for it, so it needs more draws and more calls.
    _ours(*("bound, ssm", "uniform", bound.ScoreMatching(EXACT), UNIFORM), sweeps=4, n_times=32): {
        "worlds": FEW,
        "calls": 64,
    },
    _ours("bound on P(k), truncated normal", "centre", bound.Estimator(), NORMAL, **SWEEPS): {
        "worlds": FEW
    },
    _ours("bound on P(k), decoder", "centre", bound.Estimator(), DECODER, **SWEEPS): {
        "worlds": FEW
    },
}
