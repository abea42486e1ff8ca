"""From what a network predicts to a score.

With x_t = alpha x_0 + sigma e, the prediction F of any network gives a prediction of the noise e.
Here F ~ y means that the network is trained to predict y:

    noise            F ~ e                        e = F
    score            F ~ -e / sigma               e = -sigma F
    x0               F ~ x_0                      e = (x_t - alpha F) / sigma
    velocity         F ~ alpha e - sigma x_0      e = (sigma x_t + alpha F) / (alpha^2 + sigma^2)
    flow             F ~ e - x_0                  e = (x_t + alpha F) / (alpha + sigma)
    residual         F ~ e - x_t                  e = x_t + F
    scaled_score     F ~ -e                       e = -F
    preconditioned                                e = c_skip x_t + c_out F
    edm                                           e = c_skip x_t - c_out F

The score is -e / sigma. Let d be the data's standard deviation and v = alpha^2 d^2 + sigma^2. Then

    c_skip = sigma / v,    c_out = alpha d / sqrt(v),    the input of F is x_t / sqrt(v).

So F = 0 gives the best linear denoiser of white data, and the target of F has unit variance at
every noise level. EDM's network is of this kind, with the opposite sign. Its second input is
log(sigma / alpha) / 4 instead of t.

If alpha = 0, x_t is pure noise, and most predictions do not determine x_0. Three of them do. The
scores of these have a method ``predictions`` (``sbml.types``), which computes x_0 and e without a
division by alpha:

    x0         x_0 = F
    velocity   x_0 = (alpha x_t - sigma F) / (alpha^2 + sigma^2)
    flow       x_0 = (x_t - sigma F) / (alpha + sigma)

References: Salimans & Ho 2022 (velocity); Lipman et al. 2023 and Liu et al. 2023 (flow matching);
Karras et al. 2022 (EDM).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Float

from sbml import pytrees, scalars
from sbml.sdes import Kernel, check_sde
from sbml.types import Array, Example, Key, Scalar, check_example, check_function, of_shape

Network = Callable[..., Array]  # of x_t and t, of one example or of a batch

Real = Float[Array, "..."]
Prediction = Callable[[Real, Real, Real, Real, float], Real]


def _preconditioned(f: Real, x: Real, alpha: Real, sigma: Real, data_std: float) -> Real:
    v = (alpha * data_std) ** 2 + sigma**2
    return sigma / v * x + alpha * data_std / jnp.sqrt(v) * f


# The noise e of (F, x_t, alpha, sigma, d), elementwise.
NOISE: dict[str, Prediction] = {
    "noise": lambda f, x, alpha, sigma, d: f,
    "score": lambda f, x, alpha, sigma, d: -sigma * f,
    "x0": lambda f, x, alpha, sigma, d: (x - alpha * f) / sigma,
    "velocity": lambda f, x, alpha, sigma, d: (sigma * x + alpha * f) / (alpha**2 + sigma**2),
    "flow": lambda f, x, alpha, sigma, d: (x + alpha * f) / (alpha + sigma),
    "edm": lambda f, x, alpha, sigma, d: _preconditioned(-f, x, alpha, sigma, d),
    "preconditioned": _preconditioned,
    "residual": lambda f, x, alpha, sigma, d: x + f,
    "scaled_score": lambda f, x, alpha, sigma, d: -f,
}
SCALED = ("preconditioned", "edm")  # The input of these networks is x_t / sqrt(v).

# x_0 from the same arguments, for the predictions that need no division by alpha.
DENOISED: dict[str, Prediction] = {
    "x0": lambda f, x, alpha, sigma, d: f,
    "velocity": lambda f, x, alpha, sigma, d: (alpha * x - sigma * f) / (alpha**2 + sigma**2),
    "flow": lambda f, x, alpha, sigma, d: (x - sigma * f) / (alpha + sigma),
}


@pytrees.register
@dataclasses.dataclass(frozen=True)
class PredictionScore:
    """The score of a network that predicts ``kind``: see :func:`from_prediction`.

    It is a pytree. Its leaves are the numbers of the SDE, ``data_std`` and, if the network is a
    pytree, the network's parameters.
    """

    network: Network
    kind: str
    sde: Kernel
    data_std: float
    batched: bool = False

    def __call__(self, x: Example, t: Scalar, key: Key | None = None) -> Example:
        """grad_x log p_t(x) of one example, shape ``(*s)``; ``key`` is not used."""
        return -self.noise(x, t) / self.sde.std(t)

    def noise(self, x: Example, t: Scalar) -> Example:
        """E[e | x_t], shape ``(*s)``."""
        check_example(x, t)
        return self._of((NOISE,), x, t)[0]

    def _of(
        self, tables: Sequence[dict[str, Prediction]], x: Example, t: Scalar
    ) -> tuple[Example, ...]:
        """The entry ``kind`` of each table, for one call of the network, each ``(*s)``."""
        alpha, sigma = self.sde.mean_coef(t), self.sde.std(t)
        network_input, label = x, t
        if self.kind in SCALED:
            network_input = x / jnp.hypot(alpha * self.data_std, sigma)
        if self.kind == "edm":
            label = 0.25 * jnp.log(sigma / alpha)
        if self.batched:
            network_input, label = network_input[None], jnp.asarray(label)[None]
        output = self.network(network_input, label)
        output = of_shape(output[0] if self.batched else output, x)
        return tuple(table[self.kind](output, x, alpha, sigma, self.data_std) for table in tables)


@pytrees.register
@dataclasses.dataclass(frozen=True)
class PairScore(PredictionScore):
    """The score of a network whose prediction gives x_0 and the noise for every alpha, also 0."""

    def predictions(self, x: Example, t: Scalar) -> tuple[Example, Example]:
        """E[x_0 | x_t] and E[e | x_t], each ``(*s)``, by one call of the network."""
        check_example(x, t)
        x_0, noise = self._of((DENOISED, NOISE), x, t)
        return x_0, noise


def from_prediction(
    network: Network,
    kind: str,
    sde: Kernel,
    *,
    data_std: float = 0.5,
    batched: bool = False,
) -> PredictionScore:
    """The score (``sbml.types``) of a function that predicts ``kind``.

    If alpha(T) = 0, as for ``RectifiedFlow`` and ``Cosine``, the probability-flow ODE of ``x0``,
    ``velocity`` and ``flow`` runs up to T, and its prior is exact, if the slope of alpha at T is
    finite and not 0. The ODE of any other prediction or schedule ends at ``sde.largest_time``,
    where alpha / sigma = 1e-3, and the remaining signal is neglected. For data of mean m, the mean
    of log p is then too small by 1e-6 |m|^2 / 2 nats, and log p of one example has an error of
    about 1e-3 |m| nats of either sign.

    Args:
      network: ``network(x_t, t)`` of one example ``(*s)`` and its time ``()``, shape ``(*s)``. If a
        network was trained with another label than t, wrap it: ``lambda x, t: net(x, 1000 * t)``.
        For ``edm`` and ``preconditioned`` it gets the inputs that the module's docstring states.
      kind: the name of the prediction, one of those in the module's docstring.
      sde: the forward process that the network was trained on.
      data_std: the standard deviation d of the data, for ``edm`` and ``preconditioned``.
      batched: whether ``network`` takes batches, ``x_t (n, *s)`` and ``t (n,)``.

    Raises:
      ValueError: an unknown kind, a ``data_std`` that is not positive and finite, a ``network``
        that cannot be called with ``x`` and ``t``, or an ``sde`` that is no instance of an SDE.
    """
    check_function(network, "network", "x", "t")
    check_sde(sde)
    if kind not in NOISE:
        raise ValueError(f"unknown prediction {kind!r}; choose from {', '.join(NOISE)}")
    scalars.check_positive(data_std, "data_std", finite=True)
    if not scalars.is_traced(data_std):
        data_std = float(data_std)
    cls = PairScore if kind in DENOISED else PredictionScore
    return cls(network, kind, sde, data_std, bool(batched))
