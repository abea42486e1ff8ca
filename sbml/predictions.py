"""From what a network predicts to a score, for networks that were trained elsewhere.

With x_t = alpha x_0 + sigma e, every prediction F of a network is one of the noise e:

    noise      F ~ e                        e = F
    score      F ~ -e / sigma               e = -sigma F
    x0         F ~ x_0                      e = (x_t - alpha F) / sigma
    velocity   F ~ alpha e - sigma x_0      e = (sigma x_t + alpha F) / (alpha^2 + sigma^2)
    flow       F ~ e - x_0                  e = (x_t + alpha F) / (alpha + sigma)

and the score is -e / sigma. The network of EDM sees y = x_t / alpha, whose noise is rho = sigma /
alpha, scaled, and the noise level as log(rho) / 4; with d the data's standard deviation,

    edm        x_0 ~ c_skip y + c_out F(c_in y, log(rho) / 4),      e = (y - x_0) / rho
               c_skip = d^2 / (rho^2 + d^2),  c_out = rho d c_in,  c_in = 1 / sqrt(rho^2 + d^2)

References: Salimans & Ho 2022 (velocity); Lipman et al. 2023 and Liu et al. 2023 (flow matching);
Karras et al. 2022 (EDM).
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from sbml.sdes import Kernel
from sbml.types import Array, Key, of_shape

Network = Callable[[Array, Array], Array]

# The noise, of the prediction F, x_t, alpha and sigma.
NOISES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "noise": lambda f, x, alpha, sigma: f,
    "score": lambda f, x, alpha, sigma: -sigma * f,
    "x0": lambda f, x, alpha, sigma: (x - alpha * f) / sigma,
    "velocity": lambda f, x, alpha, sigma: (sigma * x + alpha * f) / (alpha**2 + sigma**2),
    "flow": lambda f, x, alpha, sigma: (x + alpha * f) / (alpha + sigma),
}
KINDS = (*NOISES, "edm")


@dataclasses.dataclass(frozen=True)
class PredictionScore:
    """The score of a network that predicts ``kind``: see :func:`from_prediction`."""

    network: Network
    kind: str
    sde: Kernel
    data_std: float

    def __call__(self, x: Array, t: Array, key: Key | None = None) -> Array:
        """grad_x log p_t(x) of one example, shape ``(*s)``; there is no dropout, so no key."""
        alpha, sigma = self.sde.mean_coef(t), self.sde.std(t)
        if self.kind == "edm":
            noise = self._edm(x / alpha, sigma / alpha)
        else:
            noise = NOISES[self.kind](of_shape(self.network(x, t), x), x, alpha, sigma)
        return -noise / sigma

    def _edm(self, y: Array, rho: Array) -> Array:
        c_in = 1 / jnp.hypot(rho, self.data_std)
        out = of_shape(self.network(c_in * y, 0.25 * jnp.log(rho)), y)
        c_skip, c_out = (self.data_std * c_in) ** 2, rho * self.data_std * c_in
        return (y - c_skip * y - c_out * out) / rho


def from_prediction(
    network: Network, kind: str, sde: Kernel, *, data_std: float = 0.5, batched: bool = False
) -> PredictionScore:
    """A score (``sbml.types``) of a function that predicts ``kind``.

    Args:
      network: ``network(x_t, t)`` of one example ``(*s)`` and its time ``()``, shape ``(*s)``. A
        network that was trained with another label than t is wrapped: ``lambda x, t: net(x, 1000 *
        t)``. For ``edm`` it is called with what EDM's network sees, as above.
      kind: ``noise``, ``score``, ``x0``, ``velocity``, ``flow`` or ``edm``.
      sde: the forward process that the network was trained on.
      data_std: of the data, for ``edm``.
      batched: whether ``network`` takes batches, ``x_t (n, *s)`` and ``t (n,)``.

    Raises:
      ValueError: an unknown kind, or a ``data_std`` that is not positive.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown prediction {kind!r}; choose from {', '.join(KINDS)}")
    if not data_std > 0:
        raise ValueError(f"data_std={data_std}: must be positive")
    one = (lambda x, t: network(x[None], jnp.asarray(t)[None])[0]) if batched else network
    return PredictionScore(one, kind, sde, data_std)
