"""The base classes of SDEs: alpha and sigma, and everything that is derived from them.

    lambda = 2 (log alpha - log sigma)      f = (log alpha)'      -lambda' = g^2 / sigma^2

Derivatives are computed by forward-mode automatic differentiation, and the inverse of lambda by
bisection.

*Schedules whose signal vanishes.* If alpha(T) = 0, lambda is -infinity and f is infinite at T. So
whatever needs them, such as an integral over log-SNR, ends at ``largest_time`` < T, where alpha is
still a thousandth of sigma. The bound remains valid if its prior term is taken there instead of at
T. From there to T the signal is neglected, so that only the scale of the noise changes:

    x_T = sigma(T) / sigma(t) x_t,      t = ``largest_time``.

The neglected signal changes the KL divergence to the prior in second order of alpha only, by
d (1e-3)^2 / 2 nats or less for data of unit mean square.
"""

import abc
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sbml.core import compiler, pytrees, scalars
from sbml.core.door import checked, condition, fits, shown, typed
from sbml.core.scalars import Number
from sbml.core.types import (
    Array,
    Elementwise,
    Example,
    Key,
    Numbers,
    Scalar,
    Time,
    in_full_precision,
)
from sbml.sdes._inverse import inverse, slope

# The log-SNR at ``largest_time`` if the signal vanishes at T: alpha / sigma = 1e-3.
LEAST_LOG_SNR = 2 * math.log(1e-3)
# The signal counts as vanished below this log-SNR, where alpha / sigma is 3e-7, float32's rounding.
VANISHED = -30.0

# At alpha = 0 the slope of alpha counts as 0 below this multiple of sigma / T.
LEAST_SLOPE = 1e-3

# Methods of a time t or, for ``time``, of a log-SNR, which may be an array of any shape.
ELEMENTWISE = tuple("mean_coef std log_snr rate drift_coef diffusion slopes time".split())

_NUMBER: Any = float | Numbers  # ``Numbers`` are arrays.

Method = TypeVar("Method", bound=Callable[..., Any])


def _elementwise(method: Method) -> Method:
    """``method`` with the checks that its formula then need not make: that XLA's sums are right,
    that the times are valid, and that the result has one number for each time. A constant is
    broadcast to the times."""

    @functools.wraps(method)
    def inside(
        self: "Kernel", *positional: Elementwise, **named: Elementwise
    ) -> ArrayLike | tuple[ArrayLike, ...]:
        compiler.check()
        (t,) = (*positional, *named.values())
        if method.__name__ != "time":
            self.check_times(t)

        def each(value: ArrayLike) -> ArrayLike:
            if not fits(value, _NUMBER) or np.ndim(value) and np.shape(value) != np.shape(t):
                raise ValueError(
                    f"{type(self).__name__}.{method.__name__} returned {shown(value)} for times "
                    f"of shape {np.shape(t)}: a coefficient is one number for each time"
                )
            return value if np.shape(value) == np.shape(t) else jnp.broadcast_to(value, np.shape(t))

        values = method(self, t)
        return tuple(map(each, values)) if isinstance(values, tuple) else each(values)

    return cast(Method, inside)


def _once(function: Method) -> Method:
    """``function``, computed once for each SDE and each precision; for an SDE that cannot be
    hashed, such as one of arrays, tracers or lists, in each call."""
    cached = functools.lru_cache(maxsize=512)(lambda dtype, *arguments: function(*arguments))

    @functools.wraps(function)
    def call(*arguments: object) -> object:
        try:
            hash(arguments)
        except TypeError:
            return function(*arguments)
        return cached(jnp.result_type(float), *arguments)

    return cast(Method, call)


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I), which is all that a denoising loss needs.

    A kernel is a frozen dataclass. If its fields are floats it is hashable, so it can be static
    under ``jit``. It is also a pytree whose numbers are leaves (``core.pytrees``), so it can be an
    argument of ``jit`` and ``grad`` too. Its methods are elementwise in the time ``t`` in
    (0, ``T``], of any shape. They raise a ValueError for times that are negative or not
    floating-point numbers, and for a result of another shape than the times; these checks are added
    to the methods of every subclass. Times above T pass, because the last level of a discrete-time
    model (``Levels``) can be noisier than x_T, and its time label is then above T. A single example
    ``x`` has any shape ``(*s)``, and its time is a scalar.
    """

    T: ClassVar[float] = 1.0
    smallest_time: ClassVar[float] = 1e-5  # The lower end of the integral over time in the paper.

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        for name in ELEMENTWISE:
            if inspect.isfunction(method := vars(cls).get(name)):
                setattr(cls, name, _elementwise(method))
        pytrees.register(cls)

    @abc.abstractmethod
    def mean_coef(self, t: Elementwise) -> Elementwise:
        """alpha(t): the mean of p(x_t | x_0) is alpha(t) x_0."""

    @abc.abstractmethod
    def std(self, t: Elementwise) -> Elementwise:
        """sigma(t), the standard deviation of p(x_t | x_0)."""

    @_elementwise
    def log_snr(self, t: Elementwise) -> Elementwise:
        """lambda(t) = 2 log(alpha(t) / sigma(t)), strictly decreasing."""
        return 2 * (jnp.log(self.mean_coef(t)) - jnp.log(self.std(t)))

    @_elementwise
    def rate(self, t: Elementwise) -> Elementwise:
        """-dlambda/dt, the rate at which log-SNR falls; for an SDE, g^2 / sigma^2."""
        return -slope(self.log_snr, t)

    @property
    def largest_time(self) -> Number:
        """The time at which integrals over time end: T."""
        return self.T

    @property
    def of_network(self) -> "Kernel":
        """The process of the data that a network sees: this one, unless the data are
        ``Rescaled``."""
        return self

    def to_network(self, x: Numbers, alpha: Numbers) -> Numbers:
        """x_t in the units of the network's data; ``alpha`` is alpha(t)."""
        return x

    def from_network(self, y: Numbers) -> Numbers:
        """Data of the network, such as its prediction of x_0, in the units of this process."""
        return y

    @checked
    def marginal(self, x: Example, t: Time) -> tuple[Example, Scalar]:
        """Mean ``(*s)`` and standard deviation ``()`` of p(x_t | x_0 = x)."""
        return self.mean_coef(t) * x, self.std(t)

    def check_times(self, t: Elementwise | float) -> None:
        """Raise a ValueError unless ``t`` are floating-point numbers of at least 0.

        Time 0 passes, because not every coefficient is singular there. Values are not checked
        inside ``jit``. A time must not be the integer 1: ``jnp.ones_like`` of it is an integer.
        """
        if not isinstance(t, float) and not jnp.issubdtype(getattr(t, "dtype", int), jnp.floating):
            raise ValueError(f"t is {shown(t)}: give floating-point numbers, such as 1.0")
        # By NumPy: JAX would trace its operations inside ``jit``.
        if not scalars.is_traced(t) and not np.all(np.asarray(t) >= 0):
            raise ValueError(f"the least time t is {np.min(t):g}: give times in (0, {self.T:g}]")

    @typed
    def check_time(self, eps: Number, name: str = "smallest time eps") -> Number:
        """Check ``eps``, the lower end of the integral over time, and return it.

        Raises:
          ValueError: it is not in (0, largest_time) (0 is allowed if it is the ``smallest_time``),
            or the log-SNR of an SDE is not finite there or does not decrease from there on.
        """
        last = self.largest_time
        known = not scalars.is_traced(eps, last)
        if known and not (0 < eps < last or eps == self.smallest_time == 0):
            start = "[" if self.smallest_time == 0 else "("
            raise ValueError(f"{name}={eps}: must lie in {start}0, {last})")
        # Of an SDE of arrays the values may be unknown.
        numbers = all(isinstance(leaf, float | int) for leaf in jax.tree.leaves((eps, self)))
        if isinstance(self, SDE) and numbers:
            _check_decrease(self, float(eps))
        return eps


@dataclasses.dataclass(frozen=True)
class Levels(Kernel):
    """Finitely many noise levels: level i of n has the time t_i = i / (n - 1) in [0, T].

        x_i = alpha_i x_0 + sigma_i z,      i = 0, ..., n - 1

    At any other time, which the discrete-time losses do not use, the nearest level applies. With
    ``losses.dsm`` in its original weighting and uniform i, the losses are those of DDPM and SMLD.

    Attributes:
      mean_coefs: alpha_i of the n levels, at least 0.
      stds: sigma_i of the n levels, positive.
    """

    mean_coefs: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    stds: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        n, precision = len(self.stds), jnp.finfo(jnp.result_type(float))
        least, most = float(precision.tiny), float(precision.max)
        positive = all(least <= std <= most for std in self.stds)
        finite = all(0 <= mean < math.inf for mean in self.mean_coefs)
        if not (len(self.mean_coefs) == n >= 2 and positive and finite):
            raise ValueError(
                f"mean_coefs={self.mean_coefs}, stds={self.stds}: give two or more finite numbers "
                f"in each, mean_coefs of at least 0 and as many stds of at least {least:.2g}"
            )

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return self._at(self.mean_coefs, t)

    def std(self, t: Elementwise) -> Elementwise:
        return self._at(self.stds, t)

    def rate(self, t: Elementwise) -> Elementwise:
        raise ValueError("discrete levels have no likelihood weighting: choose the original one")

    def _at(self, values: tuple[float, ...], t: Elementwise) -> Elementwise:
        t, last = jnp.asarray(t), len(values) - 1
        return jnp.asarray(values, t.dtype)[jnp.round(t * last).astype(jnp.int32)]


@dataclasses.dataclass(frozen=True)
class SDE(Kernel):
    """A linear SDE whose scalar coefficients are derived from alpha and sigma.

    A subclass needs ``mean_coef`` and ``std`` only. It may override any other method by a closed
    form that is faster, or more exact in float32, and ``smallest_time`` by a class attribute.
    """

    def drift_coef(self, t: Elementwise) -> Elementwise:
        """f(t) = d/dt log alpha, a scalar."""
        return slope(lambda t: jnp.log(self.mean_coef(t)), t)

    def diffusion(self, t: Elementwise) -> Elementwise:
        """g(t) = sigma sqrt(-dlambda/dt), a scalar."""
        return self.std(t) * jnp.sqrt(self.rate(t))

    def time(self, log_snr: Elementwise) -> Elementwise:
        """The time t at which the log-SNR is ``log_snr``, elementwise; the inverse function."""
        return inverse(self.log_snr, log_snr, self.T)

    @property
    @_once
    def largest_time(self) -> Number:
        """T, or the time at which alpha / sigma is 1e-3 if alpha(T) = 0."""

        def end() -> Array:
            last, least = (jnp.asarray(a, float) for a in (self.T, LEAST_LOG_SNR))
            return jnp.where(self.log_snr(last) > VANISHED, last, self.time(least))

        return scalars.constant(end)

    @property
    @_once
    def last_regular_time(self) -> Number:
        """T, or ``largest_time`` if alpha(T) = 0 and x_T and its velocity do not determine x_0.

        They do if both slopes are finite and alpha'(T) is not 0.
        """

        def end() -> Array:
            last = jnp.asarray(self.T, float)
            (mean_slope, std_slope), std = self.slopes(last), self.std(last)
            determined = jnp.abs(mean_slope) * self.T > LEAST_SLOPE * std
            regular = determined & jnp.isfinite(mean_slope) & jnp.isfinite(std_slope)
            visible = self.log_snr(last) > VANISHED  # Also False for NaN: alpha rounded below 0.
            return jnp.where(visible | regular, last, self.largest_time)

        return scalars.constant(end)

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

    def levels(self, n: int) -> Levels:
        """The ``n`` noise levels of the discrete-time model that this SDE is the limit of."""
        raise ValueError(
            f"{type(self).__name__} is the limit of no discrete-time model: use VP, the limit of "
            "DDPM, or VE, the limit of SMLD"
        )

    @checked
    def drift(self, x: Example, t: Time) -> Example:
        """f(t) x, shape ``(*s)``."""
        return self.drift_coef(t) * x

    def slopes(self, t: Elementwise) -> tuple[Elementwise, Elementwise]:
        """alpha'(t) and sigma'(t), finite also where alpha(t) = 0."""
        return slope(self.mean_coef, t), slope(self.std, t)

    @checked
    def prior_logp(self, z: Example) -> Scalar:
        """log N(z; 0, S^2 I) in nats, a scalar, where S is ``prior_std``."""
        z, std = in_full_precision(z), self.prior_std
        log_std = scalars.log(std)
        return -0.5 * jnp.sum((z / std) ** 2) - z.size * (log_std + 0.5 * math.log(2 * math.pi))

    @checked
    def prior_sample(self, key: Key, shape: tuple[int, ...]) -> Example:
        """One draw of shape ``shape`` from N(0, S^2 I), where S is ``prior_std``."""
        return self.prior_std * jax.random.normal(key, shape)

    def _std_at(self, t: Number) -> Scalar:
        return self.std(jnp.asarray(t, float))


@_once
def _check_decrease(sde: SDE, eps: float) -> None:
    """Raise a ValueError if the log-SNR does not decrease from ``eps`` to ``largest_time``."""
    with jax.ensure_compile_time_eval():
        first, last = (float(sde.log_snr(jnp.asarray(t, float))) for t in (eps, sde.largest_time))
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

    def rate(self, t: Elementwise) -> Elementwise:
        return (self.diffusion(t) / self.std(t)) ** 2

    @property
    def largest_time(self) -> float:
        return self.T

    @property
    def prior_std(self) -> Number:
        """The standard deviation S of the prior N(0, S^2 I), which is used for p_T."""
        return 1.0


@typed
@dataclasses.dataclass(frozen=True)
class Schedule(SDE):
    """The SDE with x_t = alpha(t) x_0 + sigma(t) z; alpha and sigma determine everything else.

        sde = Schedule(lambda t: 1 - t**2, lambda t: t)

    Two schedules are equal, and share compiled functions, only if they have the same function
    objects. So make a schedule once and keep it. The parameters of a function, such as
    ``jax.tree_util.Partial(f, params)``, are leaves of the schedule.

    Attributes:
      alpha: an elementwise function, positive and not increasing on (0, 1); alpha(1) = 0 is
        allowed.
      sigma: an elementwise function, positive on (0, 1]; alpha / sigma must decrease.
      smallest_time: the time at which integrals over time and the ODE start, in (0, 1).
    """

    alpha: Callable[[Elementwise], Elementwise]
    sigma: Callable[[Elementwise], Elementwise]
    smallest_time: Annotated[  # type: ignore[misc]
        Number, condition("in (0, 1)", lambda t: 0 < t < 1)
    ] = dataclasses.field(  # type: ignore[assignment]
        default=1e-5, kw_only=True, metadata={"static": True}
    )

    def mean_coef(self, t: Elementwise) -> Numbers:
        return _floating(self.alpha(t), t)

    def std(self, t: Elementwise) -> Numbers:
        return _floating(self.sigma(t), t)


def _floating(value: Numbers | float, t: Elementwise) -> Numbers:
    """``value``, which may be a constant; an integer in the precision of ``t``."""
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.result_type(t))
