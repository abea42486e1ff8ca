"""What every SDE is: alpha and sigma, and all that follows from them.

    lambda = 2 (log alpha - log sigma)      f = (log alpha)'      -lambda' = g^2 / sigma^2

Derivatives are by forward-mode automatic differentiation, the inverse of lambda by bisection.

*Where the signal vanishes.* If alpha(T) = 0, lambda is -infinity and f infinite at T. What needs
them, such as an integral over log-SNR, ends at ``largest_time`` < T instead, where alpha is still
a thousandth of sigma. A bound with its prior there is as valid as one at T. From there to T the
signal is left out, so that only the scale of the noise changes:

    x_T = sigma(T) / sigma(t) x_t,      t = largest_time,

which the KL divergence to the prior feels in second order of alpha, by d (1e-3)^2 / 2 nats or less
for data of unit mean square.
"""

import abc
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from sbml import compiler, pytrees, scalars
from sbml.scalars import Number
from sbml.sdes._inverse import inverse, slope
from sbml.types import Array, Elementwise, Example, Key, Scalar

if TYPE_CHECKING:
    from sbml.sdes.levels import Levels

# The log-SNR at ``largest_time`` where the signal vanishes at T: alpha / sigma = 1e-3.
LEAST_LOG_SNR = 2 * math.log(1e-3)
# The signal vanishes where the log-SNR is lower: alpha / sigma is float32's rounding, 3e-7.
VANISHED = -30.0


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I), all that denoising score matching asks for.

    A frozen dataclass. With floats it is hashable, so static under ``jit``. It is also a pytree,
    whose numbers are leaves (``sbml.pytrees``), so an argument of ``jit`` and ``grad`` too. Methods
    are elementwise in the time ``t`` in (0, ``T``], of any shape; a single example ``x`` has any
    shape ``(*s)``, and its time is a scalar.
    """

    T: ClassVar[float] = 1.0

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        pytrees.register(cls)

    @abc.abstractmethod
    def mean_coef(self, t: Elementwise) -> Elementwise:
        """alpha(t): the mean of p(x_t | x_0) is alpha(t) x_0."""

    @abc.abstractmethod
    def std(self, t: Elementwise) -> Elementwise:
        """sigma(t), the standard deviation of p(x_t | x_0)."""

    def log_snr(self, t: Elementwise) -> Elementwise:
        """lambda(t) = 2 log(alpha(t) / sigma(t)), strictly decreasing."""
        compiler.check()
        return 2 * (jnp.log(self.mean_coef(t)) - jnp.log(self.std(t)))

    def rate(self, t: Elementwise) -> Elementwise:
        """-dlambda/dt, how fast the signal is lost: g^2 / sigma^2 of an SDE."""
        return -slope(self.log_snr, t)

    @property
    def largest_time(self) -> Number:
        """Where integrals over time end: T, if the log-SNR is finite there."""
        return self.T

    def marginal(self, x: Example, t: Scalar) -> tuple[Example, Scalar]:
        """Mean ``(*s)`` and standard deviation ``()`` of p(x_t | x_0 = x)."""
        return self.mean_coef(t) * x, self.std(t)

    def check_time(self, eps: Number, name: str = "smallest time eps") -> Number:
        """``eps`` itself, where the integral over time is cut.

        Raises:
          ValueError: if it is not in (0, largest_time).
        """
        last = self.largest_time
        if not scalars.traced(eps, last) and not 0 < eps < last:
            raise ValueError(f"{name}={eps}: must lie in (0, {last})")
        return eps


@dataclasses.dataclass(frozen=True)
class SDE(Kernel):
    """A linear SDE with scalar coefficients, derived from alpha and sigma.

    A subclass with ``mean_coef`` and ``std`` is complete. It may override anything else by a closed
    form that is faster, or more exact in float32, and ``smallest_time`` by a class attribute.
    """

    smallest_time: ClassVar[float] = 1e-5  # Where the paper cuts the integral over time.

    def drift_coef(self, t: Elementwise) -> Elementwise:
        """f(t) = d log alpha / dt, a scalar."""
        compiler.check()
        return slope(lambda t: jnp.log(self.mean_coef(t)), t)

    def diffusion(self, t: Elementwise) -> Elementwise:
        """g(t) = sigma sqrt(-dlambda/dt), a scalar."""
        return self.std(t) * jnp.sqrt(self.rate(t))

    def time(self, log_snr: Elementwise) -> Elementwise:
        """The inverse of ``log_snr``, elementwise."""
        return inverse(self.log_snr, log_snr, self.T)

    @property
    def largest_time(self) -> Number:
        """T, or, where alpha(T) = 0, the time at which alpha / sigma is 1e-3."""
        if all(isinstance(leaf, float | int) for leaf in jax.tree.leaves(self)):
            return _known_largest_time(self, jnp.dtype(float))
        return _largest_time(self)

    @property
    def stretch(self) -> Number:
        """sigma(T) / sigma(largest_time), what noise grows by after ``largest_time``."""
        last = self.largest_time
        if not scalars.traced(last) and last == self.T:
            return 1.0
        return scalars.evaluated(lambda: self._std_at(self.T) / self._std_at(last))

    @property
    def prior_std(self) -> Number:
        """The standard deviation s of the prior N(0, s^2 I) that stands for p_T: sigma(T).

        It is exact where alpha(T) = 0, and what is usual for data of mean 0 otherwise.
        """
        return scalars.evaluated(lambda: self._std_at(self.T))

    def levels(self, n: int) -> "Levels":
        """The ``n`` noise levels of the discrete-time model that this SDE is the limit of.

        Raises:
          ValueError: there is no such model, or fewer than two levels.
        """
        raise ValueError(
            f"{type(self).__name__} is the limit of no discrete-time model: VP is that of DDPM, "
            "VE of SMLD"
        )

    def drift(self, x: Example, t: Scalar) -> Example:
        """f(t) x, shape ``(*s)``."""
        return self.drift_coef(t) * x

    def slopes(self, t: Elementwise) -> tuple[Elementwise, Elementwise]:
        """alpha'(t) and sigma'(t), finite also where alpha(t) = 0."""
        return slope(self.mean_coef, t), slope(self.std, t)

    def prior_logp(self, z: Example) -> Scalar:
        """log N(z; 0, s^2 I) in nats, a scalar."""
        compiler.check()
        s = self.prior_std
        log_s = scalars.log(s)
        return -0.5 * jnp.sum((z / s) ** 2) - z.size * (log_s + 0.5 * math.log(2 * math.pi))

    def prior_sample(self, key: Key, shape: tuple[int, ...]) -> Example:
        """One draw of shape ``shape`` from N(0, s^2 I)."""
        return self.prior_std * jax.random.normal(key, shape)

    def _std_at(self, t: Number) -> Scalar:
        return self.std(jnp.asarray(t, float))


def _largest_time(sde: SDE) -> Number:
    def end() -> Array:
        last, least = (jnp.asarray(a, float) for a in (sde.T, LEAST_LOG_SNR))
        return jnp.where(sde.log_snr(last) > VANISHED, last, sde.time(least))

    return scalars.evaluated(end)


@functools.lru_cache(maxsize=256)
def _known_largest_time(sde: SDE, dtype: jnp.dtype) -> float:
    """:func:`_largest_time` of floats, once for each precision ``dtype``."""
    return _largest_time(sde)


@dataclasses.dataclass(frozen=True)
class ClosedForm(SDE):
    """An SDE that is given by f and g too, and still has a signal at T."""

    @abc.abstractmethod
    def drift_coef(self, t: Elementwise) -> Elementwise:
        """f(t), a scalar."""

    @abc.abstractmethod
    def diffusion(self, t: Elementwise) -> Elementwise:
        """g(t), a scalar."""

    def rate(self, t: Elementwise) -> Elementwise:
        return (self.diffusion(t) / self.std(t)) ** 2

    @property
    def largest_time(self) -> float:
        return self.T

    @property
    def prior_std(self) -> Number:
        """The standard deviation s of the prior N(0, s^2 I) that stands for p_T."""
        return 1.0
