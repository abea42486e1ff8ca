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

Where alpha = 0, x_t is noise alone: noise, score and EDM's network say nothing of x_0 there. The
other three do, and so offer x_0 and e as ``predictions`` (``sbml.types``), without a division by
alpha:

    velocity   x_0 = (alpha x_t - sigma F) / (alpha^2 + sigma^2)
    flow       x_0 = (x_t - sigma F) / (alpha + sigma)

References: Salimans & Ho 2022 (velocity); Lipman et al. 2023 and Liu et al. 2023 (flow matching);
Karras et al. 2022 (EDM).
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from sbml import pytrees
from sbml.sdes import Kernel
from sbml.types import Example, Key, Scalar, check_example, of_shape

Network = Callable[[Example, Scalar], Example]

# x_0 and the noise, of the prediction F, x_t, alpha and sigma.
PAIRS: dict[str, Callable[[Example, Example, Scalar, Scalar], tuple[Example, Example]]] = {
    "x0": lambda f, x, alpha, sigma: (f, (x - alpha * f) / sigma),
    "velocity": lambda f, x, alpha, sigma: (
        (alpha * x - sigma * f) / (alpha**2 + sigma**2),
        (sigma * x + alpha * f) / (alpha**2 + sigma**2),
    ),
    "flow": lambda f, x, alpha, sigma: (
        (x - sigma * f) / (alpha + sigma),
        (x + alpha * f) / (alpha + sigma),
    ),
}
KINDS = ("noise", "score", *PAIRS, "edm")


@pytrees.register
@dataclasses.dataclass(frozen=True)
class PredictionScore:
    """The score of a network that predicts ``kind``: see :func:`from_prediction`.

    A pytree: parameters of a network that is one itself, and the numbers of the SDE, are leaves.
    """

    network: Network
    kind: str
    sde: Kernel
    data_std: float

    def __call__(self, x: Example, t: Scalar, key: Key | None = None) -> Example:
        """grad_x log p_t(x) of one example, shape ``(*s)``; there is no dropout, so no key."""
        return -self.noise(x, t) / self.sde.std(t)

    def noise(self, x: Example, t: Scalar) -> Example:
        """E[e | x_t], shape ``(*s)``."""
        check_example(x, t)
        alpha, sigma = self.sde.mean_coef(t), self.sde.std(t)
        if self.kind == "edm":
            return self._edm(x / alpha, sigma / alpha)
        found = of_shape(self.network(x, t), x)
        return found if self.kind == "noise" else -sigma * found

    def _edm(self, y: Example, rho: Scalar) -> Example:
        c_in = 1 / jnp.hypot(rho, self.data_std)
        out = of_shape(self.network(c_in * y, 0.25 * jnp.log(rho)), y)
        c_skip, c_out = (self.data_std * c_in) ** 2, rho * self.data_std * c_in
        return (y - c_skip * y - c_out * out) / rho


@pytrees.register
@dataclasses.dataclass(frozen=True)
class PairScore(PredictionScore):
    """The score of a network whose prediction gives x_0 and the noise alike, whatever alpha is."""

    def predictions(self, x: Example, t: Scalar) -> tuple[Example, Example]:
        """E[x_0 | x_t] and E[e | x_t], each ``(*s)``, by one call of the network."""
        check_example(x, t)
        found = of_shape(self.network(x, t), x)
        return PAIRS[self.kind](found, x, self.sde.mean_coef(t), self.sde.std(t))

    def noise(self, x: Example, t: Scalar) -> Example:
        """E[e | x_t], shape ``(*s)``."""
        return self.predictions(x, t)[1]


def from_prediction(
    network: Network, kind: str, sde: Kernel, *, data_std: float = 0.5, batched: bool = False
) -> PredictionScore:
    """A score (``sbml.types``) of a function that predicts ``kind``.

    Where alpha(T) = 0, as for ``RectifiedFlow`` and ``Cosine``, the probability-flow ODE of ``x0``,
    ``velocity`` and ``flow`` runs up to T and its prior is exact. That of ``noise``, ``score`` and
    ``edm`` ends at ``sde.largest_time``, where alpha / sigma = 1e-3, and the signal that is left
    counts as none: with the data's mean m, the mean of log p is too small by 1e-6 |m|^2 / 2 nats,
    that of one example off by about 1e-3 |m| nats of either sign.

    Args:
      network: ``network(x_t, t)`` of one example ``(*s)`` and its time ``()``, shape ``(*s)``. A
        network that was trained with another label than t is wrapped: ``lambda x, t: net(x, 1000 *
        t)``. For ``edm`` it is called with what EDM's network sees, as above.
      kind: ``noise``, ``score``, ``x0``, ``velocity``, ``flow`` or ``edm``.
      sde: the forward process that the network was trained on.
      data_std: of the data, for ``edm``.
      batched: whether ``network`` takes batches, ``x_t (n, *s)`` and ``t (n,)``.

    Raises:
      ValueError: an unknown kind, or a ``data_std`` that is not positive and finite.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown prediction {kind!r}; choose from {', '.join(KINDS)}")
    if not 0 < data_std < math.inf:
        raise ValueError(f"data_std={data_std}: must be positive and finite")
    one = (lambda x, t: network(x[None], jnp.asarray(t)[None])[0]) if batched else network
    return (PairScore if kind in PAIRS else PredictionScore)(one, kind, sde, data_std)
