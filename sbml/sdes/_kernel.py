"""The base classes of SDEs: alpha and sigma, and everything that is derived from them.

    lambda = 2 (log alpha - log sigma)      f = (log alpha)'      -lambda' = g^2 / sigma^2

Derivatives are computed by forward-mode automatic differentiation, and the inverse of lambda by
bisection.

*Schedules whose signal vanishes.* If alpha(T) = 0, lambda is -infinity and f is infinite at T. So
whatever needs them, such as an integral over log-SNR, ends at ``largest_time`` < T, where alpha is
still a thousandth of sigma. The bound remains valid if its prior term is taken there instead of at
T. From there to T the signal is neglected, so that only the scale of the noise changes:

    x_T = sigma(T) / sigma(t) x_t,      t = largest_time.

The neglected signal changes the KL divergence to the prior in second order of alpha only, by
d (1e-3)^2 / 2 nats or less for data of unit mean square.
"""

import abc
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sbml import compiler, pytrees, scalars
from sbml.door import checked, typed
from sbml.scalars import Number
from sbml.sdes._inverse import inverse, slope
from sbml.types import (
    Array,
    Elementwise,
    Example,
    Key,
    Scalar,
    check_floating,
    in_full_precision,
)

if TYPE_CHECKING:
    from sbml.sdes.levels import Levels

# The log-SNR at ``largest_time`` if the signal vanishes at T: alpha / sigma = 1e-3.
LEAST_LOG_SNR = 2 * math.log(1e-3)
# The signal counts as vanished below this log-SNR, where alpha / sigma is 3e-7, float32's rounding.
VANISHED = -30.0

# At alpha = 0 the slope of alpha counts as 0 below this multiple of sigma / T.
LEAST_SLOPE = 1e-3

# Methods of a time t, which may be an array of any shape.
OF_TIMES = ("mean_coef", "std", "log_snr", "rate", "drift_coef", "diffusion", "slopes")


def _of_times(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` with a check of XLA, of its times and of its result's shape, so that no formula
    needs one of its own."""

    @functools.wraps(method)
    def inside(self: Any, t: Elementwise) -> Any:
        compiler.check()
        self.check_times(t, math.inf)
        name, values = f"{type(self).__name__}.{method.__name__}", method(self, t)
        if isinstance(values, tuple):
            return tuple(_for_each_time(name, value, t) for value in values)
        return _for_each_time(name, values, t)

    return inside


def _for_each_time(name: str, value: Any, t: Elementwise) -> Any:
    """``value``, the result of the method ``name``, as one number for each time.

    Raises:
      ValueError: it is neither a constant nor of the shape of ``t``.
    """
    if np.shape(value) == np.shape(t):
        return value
    if not np.ndim(value):
        return jnp.broadcast_to(value, np.shape(t))
    raise ValueError(
        f"{name} returned shape {np.shape(value)} for times of shape {np.shape(t)}: a coefficient "
        "is one number for each time"
    )


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I), which is all that a denoising loss needs.

    A kernel is a frozen dataclass. If its fields are floats it is hashable, so it can be static
    under ``jit``. It is also a pytree whose numbers are leaves (``sbml.pytrees``), so it can be an
    argument of ``jit`` and ``grad`` too. Its methods are elementwise in the time ``t`` in
    (0, ``T``], of any shape. They raise a ValueError for times that are negative or not
    floating-point numbers, and for a result of another shape than the times; these checks are added
    to the methods of every subclass. Times above T pass, because the last level of a discrete-time
    model (``Levels``) can be noisier than x_T, and its time label is then above T. A single example
    ``x`` has any shape ``(*s)``, and its time is a scalar.
    """

    T: ClassVar[float] = 1.0

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        for name in OF_TIMES:
            if inspect.isfunction(method := vars(cls).get(name)):
                setattr(cls, name, _of_times(method))
        pytrees.register(cls)

    @abc.abstractmethod
    def mean_coef(self, t: Elementwise) -> Elementwise:
        """alpha(t): the mean of p(x_t | x_0) is alpha(t) x_0."""

    @abc.abstractmethod
    def std(self, t: Elementwise) -> Elementwise:
        """sigma(t), the standard deviation of p(x_t | x_0)."""

    @_of_times
    def log_snr(self, t: Elementwise) -> Elementwise:
        """lambda(t) = 2 log(alpha(t) / sigma(t)), strictly decreasing."""
        return 2 * (jnp.log(self.mean_coef(t)) - jnp.log(self.std(t)))

    @_of_times
    def rate(self, t: Elementwise) -> Elementwise:
        """-dlambda/dt, the rate at which log-SNR falls; for an SDE, g^2 / sigma^2."""
        return -slope(self.log_snr, t)

    @property
    def largest_time(self) -> Number:
        """The time at which integrals over time end: T."""
        return self.T

    @checked
    def marginal(self, x: Example, t: Scalar) -> tuple[Example, Scalar]:
        """Mean ``(*s)`` and standard deviation ``()`` of p(x_t | x_0 = x).

        Raises:
          ValueError: ``t`` is not in (0, T].
        """
        self.check_times(t)
        return self.mean_coef(t) * x, self.std(t)

    def check_times(self, t: Elementwise, last: float | None = None) -> None:
        """Check that times ``t``, of any shape, are in [0, last]; ``last`` is T if it is None.

        Time 0 passes, because not every coefficient is singular there. Values are not checked
        inside ``jit``.

        Raises:
          ValueError: if they are not floating-point numbers in this interval.
        """
        check_floating(t, "t")
        if scalars.is_traced(t):
            return
        last = self.T if last is None else last
        times = np.asarray(t)  # By NumPy: JAX would trace its operations inside ``jit``.
        if not np.all((times >= 0) & (times <= last)):
            raise ValueError(
                f"t lies in [{times.min():g}, {times.max():g}]: give times in (0, {self.T:g}]"
            )

    @typed
    def check_time(self, eps: Number, name: str = "smallest time eps") -> Number:
        """Check ``eps``, the lower end of the integral over time, and return it.

        Raises:
          ValueError: it is not in (0, largest_time).
        """
        last = self.largest_time
        if not scalars.is_traced(eps, last) and not 0 < eps < last:
            raise ValueError(f"{name}={eps}: must lie in (0, {last})")
        return eps


@dataclasses.dataclass(frozen=True)
class SDE(Kernel):
    """A linear SDE whose scalar coefficients are derived from alpha and sigma.

    A subclass needs ``mean_coef`` and ``std`` only. It may override any other method by a closed
    form that is faster, or more exact in float32, and ``smallest_time`` by a class attribute.
    """

    smallest_time: ClassVar[float] = 1e-5  # The lower end of the integral over time in the paper.

    def check_time(self, eps: Number, name: str = "smallest time eps") -> Number:
        """Check ``eps``, the lower end of the integral over time, and return it.

        Raises:
          ValueError: if it is not in (0, largest_time), or if the log-SNR is not finite there or
            does not decrease from there to ``largest_time``.
        """
        super().check_time(eps, name)
        if _are_numbers(eps, self):
            _check_decrease(self, float(eps), jnp.result_type(float))
        return eps

    def drift_coef(self, t: Elementwise) -> Elementwise:
        """f(t) = d log alpha / dt, a scalar."""
        return slope(lambda t: jnp.log(self.mean_coef(t)), t)

    def diffusion(self, t: Elementwise) -> Elementwise:
        """g(t) = sigma sqrt(-dlambda/dt), a scalar."""
        return self.std(t) * jnp.sqrt(self.rate(t))

    def time(self, log_snr: Elementwise) -> Elementwise:
        """t of a log-SNR: the inverse of ``log_snr``, elementwise."""
        return inverse(self.log_snr, log_snr, self.T)

    @property
    def largest_time(self) -> Number:
        """T, or the time at which alpha / sigma is 1e-3 if alpha(T) = 0."""
        return _once(_largest_time, self)

    @property
    def last_regular_time(self) -> Number:
        """T, or ``largest_time`` if alpha(T) = 0 and x_T and its velocity do not determine x_0.

        They do if both slopes are finite and alpha'(T) is not 0.
        """
        return _once(_last_regular_time, self)

    @property
    def stretch(self) -> Number:
        """sigma(T) / sigma(largest_time), the factor from x at ``largest_time`` to x at T."""
        last = self.largest_time
        if not scalars.is_traced(last) and last == self.T:
            return 1.0
        return scalars.constant(lambda: self._std_at(self.T) / self._std_at(last))

    @property
    def prior_std(self) -> Number:
        """The standard deviation S = sigma(T) of the prior N(0, S^2 I), which is used for p_T.

        The prior equals p_T if alpha(T) = 0; otherwise it is the usual choice for data of mean 0.
        """
        return scalars.constant(lambda: self._std_at(self.T))

    def levels(self, n: int) -> "Levels":
        """The ``n`` noise levels of the discrete-time model that this SDE is the limit of.

        Raises:
          ValueError: if there is no such model, or for fewer than two levels.
        """
        raise ValueError(
            f"{type(self).__name__} is the limit of no discrete-time model: use VP, the limit of "
            "DDPM, or VE, the limit of SMLD"
        )

    @checked
    def drift(self, x: Example, t: Scalar) -> Example:
        """f(t) x, shape ``(*s)``.

        Raises:
          ValueError: ``t`` is not in (0, T].
        """
        self.check_times(t)
        return self.drift_coef(t) * x

    def slopes(self, t: Elementwise) -> tuple[Elementwise, Elementwise]:
        """alpha'(t) and sigma'(t), finite also where alpha(t) = 0."""
        return slope(self.mean_coef, t), slope(self.std, t)

    @checked
    def prior_logp(self, z: Example) -> Scalar:
        """log N(z; 0, S^2 I) in nats, a scalar, where S is ``prior_std``."""
        z = in_full_precision(z)
        std = self.prior_std
        log_std = scalars.log(std)
        return -0.5 * jnp.sum((z / std) ** 2) - z.size * (log_std + 0.5 * math.log(2 * math.pi))

    @checked
    def prior_sample(self, key: Key, shape: tuple[int, ...]) -> Example:
        """One draw of shape ``shape`` from N(0, S^2 I), where S is ``prior_std``."""
        return self.prior_std * jax.random.normal(key, shape)

    def _std_at(self, t: Number) -> Scalar:
        return self.std(jnp.asarray(t, float))


def _are_numbers(*trees: Any) -> bool:
    """Whether all leaves are Python's numbers, so that a result can be computed once and kept."""
    return all(isinstance(leaf, float | int) for leaf in jax.tree.leaves(trees))


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, computed once for each choice of its arguments. For arguments that cannot be
    hashed, such as an SDE with a list as a field, it is computed in each call."""
    cached = functools.lru_cache(maxsize=512)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            hash(arguments)
        except TypeError:
            return function(*arguments)
        return cached(*arguments)

    return call


def _once(end: Callable[[SDE], Number], sde: SDE) -> Number:
    """``end(sde)``, computed once for each SDE of floats and each precision."""
    return _cached(end, sde, jnp.result_type(float)) if _are_numbers(sde) else end(sde)


@_remembered
def _cached(end: Callable[[SDE], Number], sde: SDE, dtype: jnp.dtype) -> Number:
    return end(sde)


def _largest_time(sde: SDE) -> Number:
    def end() -> Array:
        last, least = (jnp.asarray(a, float) for a in (sde.T, LEAST_LOG_SNR))
        return jnp.where(sde.log_snr(last) > VANISHED, last, sde.time(least))

    return scalars.constant(end)


def _last_regular_time(sde: SDE) -> Number:
    def end() -> Array:
        last = jnp.asarray(sde.T, float)
        (mean_slope, std_slope), std = sde.slopes(last), sde.std(last)
        determined = jnp.abs(mean_slope) * sde.T > LEAST_SLOPE * std
        regular = determined & jnp.isfinite(mean_slope) & jnp.isfinite(std_slope)
        visible = sde.log_snr(last) > VANISHED  # False also for NaN, if alpha is rounded below 0.
        return jnp.where(visible | regular, last, sde.largest_time)

    return scalars.constant(end)


@_remembered
def _check_decrease(sde: SDE, eps: float, dtype: jnp.dtype) -> None:
    """Check once for each precision ``dtype`` that the log-SNR decreases from ``eps`` on.

    Raises:
      ValueError: if it does not.
    """
    with jax.ensure_compile_time_eval():
        first, last = (float(sde.log_snr(jnp.asarray(t, dtype))) for t in (eps, sde.largest_time))
    if not math.isfinite(first):
        raise ValueError(
            f"{sde}: its log-SNR is {first} at t={eps}, because sigma or alpha is rounded to 0 "
            "there: choose a larger smallest time, or write them without cancellation"
        )
    if not first > last:
        raise ValueError(
            f"{sde}: its log-SNR is {first} at t={eps} and {last} at t={sde.largest_time}, but it "
            "must decrease. Data are at t=0, where alpha is large and sigma is small"
        )


@dataclasses.dataclass(frozen=True)
class ClosedForm(SDE):
    """An SDE with closed forms of f and g too, whose signal does not vanish at T."""

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
        """The standard deviation S of the prior N(0, S^2 I), which is used for p_T."""
        return 1.0
