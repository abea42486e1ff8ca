"""The estimators of this package, as an evaluation computes them: every number comes from the rows
of ``sbml.estimators``, through the driver that ``Density`` and ``--mode=eval`` share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import bits, discrete, integers
from sbml.audit.suite import Estimator, Schedule
from sbml.audit.worlds import Denoiser, Images
from sbml.bound import GaussianControl, Reduction
from sbml.dequantizers import Dequantizer, decoders, truncated_normal, uniform
from sbml.divergence import Trace
from sbml.estimators import base, bound, ode
from sbml.estimators.base import Target
from sbml.estimators.driver import Driver
from sbml.ode import Solver
from sbml.score import from_prediction

EXACT, ONE_PROBE = Trace("exact"), Trace("rademacher", 1)
EPS = 1e-5
WITHIN = 0.02  # bits/dim: what noise at the smallest time costs at the edges of the bins


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """-log P(k) in nats by an estimator and a dequantizer.

    Attributes:
      estimator, dequantizer: of ``sbml.estimators`` and ``sbml.dequantizers``.
      tau: for noise around bin centres, half a bin at the smallest time in its standard deviations.
      control: whether a Gaussian control is fitted to the images.
      proposal: how a bound draws its times (``sbml.times.PROPOSALS``).
      n_times: the number of times of a bound for each image.
      without: the names of terms that are left out.
    """

    estimator: base.Estimator
    dequantizer: Dequantizer
    tau: float = discrete.TAU
    control: bool = False
    proposal: str = "importance"
    n_times: int = 64
    without: Sequence[str] = ()

    def driver(self, denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Driver:
        """The driver of an evaluation of ``pixels``."""
        sde, levels = schedule.sde, schedule.levels
        noisy = self.dequantizer.at_noise
        eps = discrete.smallest_time(sde, levels, EPS, self.tau) if noisy else EPS
        target = Target(sde, eps, levels, self.dequantizer)
        score, control = from_prediction(denoiser, "x0", sde), None
        if self.control:
            centres = np.asarray(bits.to_model(pixels, 0.5, levels))
            fitted = GaussianControl.fit(centres, noise_variance=0.02, full=False)
            control = jax.tree.map(lambda a: jnp.asarray(a, float), fitted)
        return Driver(
            estimator=self.estimator,
            target=target,
            data=pixels,
            ids=np.arange(len(pixels)),
            subset=np.arange(0),
            compute=lambda rows, u, options: jax.tree.map(
                np.asarray, base.rows(self.estimator, target, score, {}, rows, u, options)
            ),
            seed=seed,
            batch_size=9,
            solver=Solver(rtol=2e-4, atol=2e-4),
            reduction=Reduction(control, proposal=self.proposal),
            n_times=self.n_times,
        )

    def __call__(
        self, denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int
    ) -> np.ndarray:
        driver = self.driver(denoiser, schedule, pixels, seed)
        columns = driver.rows(driver.ids, 0)
        left = sum(columns[name] for name in self.without)
        return (driver.total(columns) - left) * bits.dims(pixels.shape[1:]) * bits.LOG2


UNIFORM, NORMAL, DECODER = uniform.Model(), truncated_normal.Model(), decoders.Categorical()
BOUND = Evaluation(bound.Estimator(), UNIFORM, control=True)


def _ours(name: str, data: integers.Kind, *of: Any, **options: Any) -> Estimator:
    return Estimator(name, Evaluation(*of, **options), data, WITHIN)


OURS = (
    _ours("ODE, exact trace", "uniform", ode.Estimator(EXACT), UNIFORM),
    _ours("ODE, one probe", "uniform", ode.Estimator(ONE_PROBE), UNIFORM),
    _ours("ODE, 2 draws in one logarithm", "uniform", ode.Estimator(EXACT, 2), UNIFORM),
    _ours("ODE, truncated normal", "centre", ode.Estimator(EXACT), NORMAL),
    Estimator("bound", BOUND, "uniform", WITHIN),
    # Without a control, its draws are so noisy that it needs more of them.
    _ours("bound, ssm", "uniform", bound.ScoreMatching(EXACT), UNIFORM, n_times=1024),
    _ours("bound of P(k), truncated normal", "centre", bound.Estimator(), NORMAL, control=True),
    _ours("bound of P(k), decoder", "centre", bound.Estimator(), DECODER, control=True),
)
