"""Correctors: steps of Langevin dynamics at time t, after each step of a sampler from s to t.

    x <- x + e score(x, t) + sqrt(2 e) z

    langevin            e = 2 a^2 (snr |z| / |score|)^2     per image (Song et al., alg. 4, 5)
    annealed_langevin   e = 2 a^2 (snr sigma_t)^2           (Song & Ermon 2019, 2020)

a = alpha_s / alpha_t is the decay of the signal in the sampler's step: 1 for VE, and sqrt(alpha_i)
of the discrete chain for VP. In this form it is defined for every linear SDE. Norms are those of
one image, so the images of a batch do not influence each other.

The step size of ``langevin`` depends on x through |score|, which biases the distribution. For
Gaussian data with variances v_j, the relative bias of variance i is about
2 / (v_i sum_j 1 / v_j). It is negligible for large images, but not in few dimensions or if few
directions are narrow. ``annealed_langevin`` does not have this bias.

Reference: Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021, appendix G.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Protocol

import jax
import jax.numpy as jnp

from sbml.core.door import condition, typed
from sbml.core.scalars import Number, Steps, positive
from sbml.core.types import Example, Key, Scalar, Score, deterministic
from sbml.sdes import SDE


@dataclasses.dataclass(frozen=True)
class NoCorrector:
    """The corrector that returns x unchanged."""

    nfe = 0

    def __call__(
        self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar, key: Key
    ) -> Example:
        return x


@typed
@dataclasses.dataclass(frozen=True)
class Langevin:
    """``steps`` steps of size e = 2 a^2 (snr |z| / |score|)^2.

    Attributes:
      steps: the number of steps after each step of the sampler.
      snr: the signal-to-noise ratio that sets the size, positive.
    """

    steps: Steps = 1
    snr: Annotated[Number, positive] = 0.16

    @property
    def nfe(self) -> int:
        """The number of network evaluations after each step of the sampler."""
        return self.steps

    def size(self, sde: SDE, s: Scalar, t: Scalar, grad: Example, z: Example) -> Scalar:
        """The size e of one step, a scalar; 0 where the score is 0, which gives no direction."""
        norm = jnp.linalg.norm(grad.ravel())
        ratio = jnp.where(norm > 0, jnp.linalg.norm(z.ravel()) / jnp.where(norm > 0, norm, 1), 0)
        return 2 * (sde.mean_coef(s) / sde.mean_coef(t) * self.snr * ratio) ** 2

    def __call__(
        self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar, key: Key
    ) -> Example:
        def one(x: Example, key: Key) -> tuple[Example, None]:
            z, grad = jax.random.normal(key, x.shape, x.dtype), deterministic(score, x, t)
            e = self.size(sde, s, t, grad, z)
            return x + e * grad + jnp.sqrt(2 * e) * z, None

        return jax.lax.scan(one, x, jax.random.split(key, self.steps))[0]


class AnnealedLangevin(Langevin):
    """``steps`` steps of size e = 2 a^2 (snr sigma_t)^2."""

    def size(self, sde: SDE, s: Scalar, t: Scalar, grad: Example, z: Example) -> Scalar:
        return 2 * (sde.mean_coef(s) / sde.mean_coef(t) * self.snr * sde.std(t)) ** 2


def _counts_evaluations(corrector: object) -> bool:
    """Whether it is an instance with an integer ``nfe``, and not a class."""
    return isinstance(getattr(corrector, "nfe", None), int) and not isinstance(corrector, type)


if TYPE_CHECKING:

    class Corrector(Protocol):
        """The interface of every corrector."""

        @property
        def nfe(self) -> int: ...

        def __call__(
            self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar, key: Key
        ) -> Example: ...

else:
    Corrector = Annotated[
        Callable[..., Example],
        condition("with an integer nfe, such as samplers.Langevin(steps=1)", _counts_evaluations),
    ]

CORRECTORS = {"none": NoCorrector, "langevin": Langevin, "annealed_langevin": AnnealedLangevin}
