"""Correctors: a few steps of Langevin dynamics at time t after each step of a sampler from s to t.

    x <- x + e score(x, t) + sqrt(2 e) z

    langevin            e = 2 a^2 (snr |z| / |score|)^2     per image (Song et al. 2021a, alg. 4, 5)
    annealed_langevin   e = 2 a^2 (snr sigma_t)^2           (Song & Ermon 2019, 2020)

a = alpha_s / alpha_t is the decay of the predictor's step: 1 for VE, and for VP the sqrt(alpha_i)
of the discrete chain, written so that every linear SDE has one. Norms are of one image: a batch
does not couple its images. The first step depends on x through |score|, which biases its law: on
Gaussian data of variances v_j, variance i by about 2 (1/v_i) / sum_j 1/v_j of itself. Negligible
for large images, not in few dimensions or where few directions are narrow; the second has none.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sbml.sdes import SDE
from sbml.types import Example, Key, Scalar, Score, deterministic


@dataclasses.dataclass(frozen=True)
class NoCorrector:
    """Nothing."""

    nfe = 0

    def __call__(
        self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar, key: Key
    ) -> Example:
        return x


@dataclasses.dataclass(frozen=True)
class Langevin:
    """``steps`` steps whose size follows the ratio of the norms of noise and score.

    Raises:
      ValueError: for fewer than one step, or a ratio that is not positive.
    """

    steps: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.snr > 0:
            raise ValueError(f"steps={self.steps}, snr={self.snr}: need one step, a positive snr")

    @property
    def nfe(self) -> int:
        """Network evaluations after each step of the predictor."""
        return self.steps

    def size(self, sde: SDE, s: Scalar, t: Scalar, grad: Example, z: Example) -> Scalar:
        """e of one step."""
        ratio = jnp.linalg.norm(z.ravel()) / jnp.linalg.norm(grad.ravel())
        return 2 * (sde.mean_coef(s) / sde.mean_coef(t) * self.snr * ratio) ** 2

    def __call__(
        self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar, key: Key
    ) -> Example:
        def one(x: Example, key: Key) -> tuple[Example, None]:
            z, grad = jax.random.normal(key, x.shape, x.dtype), deterministic(score, x, t)
            e = self.size(sde, s, t, grad, z)
            return x + e * grad + jnp.sqrt(2 * e) * z, None

        return jax.lax.scan(one, x, jax.random.split(key, self.steps))[0]


@dataclasses.dataclass(frozen=True)
class AnnealedLangevin(Langevin):
    """``steps`` steps whose size is a share of the noise's variance at t."""

    def size(self, sde: SDE, s: Scalar, t: Scalar, grad: Example, z: Example) -> Scalar:
        return 2 * (sde.mean_coef(s) / sde.mean_coef(t) * self.snr * sde.std(t)) ** 2


CORRECTORS = {"none": NoCorrector, "langevin": Langevin, "annealed_langevin": AnnealedLangevin}
