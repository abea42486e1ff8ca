"""Linear diffusion SDEs  dx = f(t) x dt + g(t) dw  on t in [0, 1], in closed form.

The transition kernel is p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I) with

    alpha' = f alpha,      (sigma^2)' = 2 f sigma^2 + g^2.

With the log signal-to-noise ratio lambda(t) = 2 log(alpha / sigma), g^2 / sigma^2 = -dlambda/dt
holds exactly: the maximum-likelihood importance distribution p(t) ~ g^2 / sigma^2 is *uniform in
log-SNR*, so an SDE needs only lambda(t) and its inverse to sample from it.

Every form below keeps its relative accuracy in float32 down to t = 1e-6, where the textbook ones
(1 - exp(-B), log(1 + e^l)) lose up to a third. (Of VE's ``time`` it is the absolute one, 1e-7: near
t = 0 its log-SNR is a number of 9 that hardly moves.)

Reference: Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021, appendices B-C.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sbml import compiler
from sbml.types import Array, Key


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I), all that denoising score matching asks for.

    Frozen floats, so hashable and static under ``jit``. Methods take a scalar time ``t`` in
    (0, ``T``] and, where they need one, a single example ``x`` of any shape ``(*s)``.
    """

    T: ClassVar[float] = 1.0

    @abc.abstractmethod
    def mean_coef(self, t: Array) -> Array:
        """alpha(t): the mean of p(x_t | x_0) is alpha(t) x_0."""

    @abc.abstractmethod
    def std(self, t: Array) -> Array:
        """sigma(t), the standard deviation of p(x_t | x_0)."""

    @abc.abstractmethod
    def log_snr(self, t: Array) -> Array:
        """lambda(t) = 2 log(alpha(t) / sigma(t)), strictly decreasing."""

    @abc.abstractmethod
    def rate(self, t: Array) -> Array:
        """-dlambda/dt, how fast the signal is lost: g^2 / sigma^2 of an SDE."""

    def marginal(self, x: Array, t: Array) -> tuple[Array, Array]:
        """Mean ``(*s)`` and standard deviation ``()`` of p(x_t | x_0 = x)."""
        return self.mean_coef(t) * x, self.std(t)

    def check_time(self, eps: float, name: str = "smallest time eps") -> float:
        """``eps`` itself, where the integral over time is cut.

        Raises:
          ValueError: if it is not in (0, T).
        """
        if not 0 < eps < self.T:
            raise ValueError(f"{name}={eps}: must lie in (0, {self.T})")
        return eps


@dataclasses.dataclass(frozen=True)
class SDE(Kernel):
    """A linear SDE with scalar coefficients."""

    smallest_time: ClassVar[float] = 1e-5  # Where the paper cuts the integral over time.

    @abc.abstractmethod
    def drift_coef(self, t: Array) -> Array:
        """f(t), a scalar."""

    @abc.abstractmethod
    def diffusion(self, t: Array) -> Array:
        """g(t), a scalar."""

    def rate(self, t: Array) -> Array:
        return (self.diffusion(t) / self.std(t)) ** 2

    @abc.abstractmethod
    def time(self, log_snr: Array) -> Array:
        """The inverse of :meth:`log_snr`."""

    @property
    def prior_std(self) -> float:
        """The standard deviation s of the prior N(0, s^2 I) that stands for p_T."""
        return 1.0

    def levels(self, n: int) -> "Levels":
        """The ``n`` noise levels of the discrete-time model that this SDE is the limit of.

        Raises:
          ValueError: there is no such model, or fewer than two levels.
        """
        raise ValueError(
            f"{type(self).__name__} is the limit of no discrete-time model: VP is that of DDPM, "
            "VE of SMLD"
        )

    def drift(self, x: Array, t: Array) -> Array:
        """f(t) x, shape ``(*s)``."""
        return self.drift_coef(t) * x

    def prior_logp(self, z: Array) -> Array:
        """log N(z; 0, s^2 I) in nats, a scalar."""
        compiler.check()
        s = self.prior_std
        return -0.5 * jnp.sum((z / s) ** 2) - z.size * (math.log(s) + 0.5 * math.log(2 * math.pi))

    def prior_sample(self, key: Key, shape: tuple[int, ...]) -> Array:
        """One draw of shape ``shape`` from N(0, s^2 I)."""
        return self.prior_std * jax.random.normal(key, shape)


@dataclasses.dataclass(frozen=True)
class _LinearBeta(SDE):
    """VP and subVP share beta(t) = beta_min + (beta_max - beta_min) t and its integral B(t)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"beta_min={self.beta_min}, beta_max={self.beta_max}: need 0 < beta_min <= beta_max"
            )

    def _beta(self, t: Array) -> Array:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Array) -> Array:
        """B(t), the integral of beta over [0, t]."""
        compiler.check()
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time(self, integral: Array) -> Array:
        """The inverse of B; this root of the quadratic has no cancellation."""
        compiler.check()
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def drift_coef(self, t: Array) -> Array:
        return -0.5 * self._beta(t)

    def mean_coef(self, t: Array) -> Array:
        return jnp.exp(-0.5 * self._integral(t))


@dataclasses.dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving: alpha^2 + sigma^2 = 1, the continuous limit of DDPM."""

    def diffusion(self, t: Array) -> Array:
        return jnp.sqrt(self._beta(t))

    def std(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def log_snr(self, t: Array) -> Array:
        integral = self._integral(t)
        return -(integral + jnp.log(-jnp.expm1(-integral)))

    def time(self, log_snr: Array) -> Array:
        return self._time(jax.nn.softplus(-log_snr))

    def levels(self, n: int) -> "Levels":
        """DDPM's (Ho et al. 2020): alpha_i^2 = prod_{j <= i} (1 - beta_j), beta_j linear in j."""
        if 2 <= n <= self.beta_max:
            raise ValueError(
                f"{n} noise levels with beta_max={self.beta_max}: the last beta is "
                f"{self.beta_max / n:g}, need more than {self.beta_max:g} levels"
            )
        betas = np.linspace(self.beta_min / n, self.beta_max / n, n)
        log_mean = 0.5 * np.cumsum(np.log1p(-betas))
        return Levels(tuple(np.exp(log_mean)), tuple(np.sqrt(-np.expm1(2 * log_mean))))


@dataclasses.dataclass(frozen=True)
class SubVP(_LinearBeta):
    """sub-VP: the mean of VP with sigma = 1 - alpha^2, never more noise than VP."""

    smallest_time: ClassVar[float] = 1e-2  # Below, sigma is so small that training is unstable.

    def diffusion(self, t: Array) -> Array:
        return jnp.sqrt(-self._beta(t) * jnp.expm1(-2 * self._integral(t)))

    def std(self, t: Array) -> Array:
        return -jnp.expm1(-self._integral(t))

    def log_snr(self, t: Array) -> Array:
        integral = self._integral(t)
        return -(integral + 2 * jnp.log(-jnp.expm1(-integral)))

    def time(self, log_snr: Array) -> Array:
        return self._time(2 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * log_snr)))


@dataclasses.dataclass(frozen=True)
class _Exploding(SDE):
    """What the variance-exploding SDEs share: no drift, a prior as wide as sigma_max."""

    sigma_max: float = 50.0

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def drift_coef(self, t: Array) -> Array:
        return jnp.zeros_like(t)

    def mean_coef(self, t: Array) -> Array:
        return jnp.ones_like(t)

    def log_snr(self, t: Array) -> Array:
        compiler.check()
        return -2 * jnp.log(self.std(t))


@dataclasses.dataclass(frozen=True)
class VE(_Exploding):
    """Variance exploding, geometric: sigma(t) = sigma_min (sigma_max / sigma_min)^t (SMLD)."""

    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: "
                "need 0 < sigma_min < sigma_max"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def diffusion(self, t: Array) -> Array:
        return math.sqrt(2 * self._log_ratio) * self.std(t)

    def std(self, t: Array) -> Array:
        return self.sigma_min * jnp.exp(self._log_ratio * t)

    def log_snr(self, t: Array) -> Array:
        return -2 * (math.log(self.sigma_min) + self._log_ratio * t)

    def time(self, log_snr: Array) -> Array:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / self._log_ratio

    def levels(self, n: int) -> "Levels":
        """SMLD's (Song & Ermon 2019): alpha_i = 1, sigma_i geometric from sigma_min to sigma_max.

        Their index runs from the largest sigma down, this one up.
        """
        stds = np.geomspace(self.sigma_min, self.sigma_max, n)
        return Levels((1.0,) * n, tuple(stds))


@dataclasses.dataclass(frozen=True)
class LinearVE(_Exploding):
    """Variance exploding, linear: sigma(t) = sigma_max t (the schedule of EDM and DDIM's sigma)."""

    def __post_init__(self) -> None:
        if not self.sigma_max > 0:
            raise ValueError(f"sigma_max={self.sigma_max}: need sigma_max > 0")

    def diffusion(self, t: Array) -> Array:
        return self.sigma_max * jnp.sqrt(2 * t)

    def std(self, t: Array) -> Array:
        return self.sigma_max * t

    def time(self, log_snr: Array) -> Array:
        return jnp.exp(-0.5 * log_snr) / self.sigma_max


@dataclasses.dataclass(frozen=True)
class Levels(Kernel):
    """Finitely many noise levels: level i of n stands at time t_i = i / (n - 1) in [0, T].

    Between the t_i, which the discrete-time losses never ask for, the nearest level counts. With
    ``losses.dsm`` in its original weighting and i uniform these are the losses of DDPM and SMLD.
    """

    mean_coefs: tuple[float, ...]
    stds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.stds) < 2:
            raise ValueError(f"{len(self.stds)} noise levels: need at least two")

    def mean_coef(self, t: Array) -> Array:
        return self._at(self.mean_coefs, t)

    def std(self, t: Array) -> Array:
        return self._at(self.stds, t)

    def log_snr(self, t: Array) -> Array:
        compiler.check()
        return 2 * (jnp.log(self.mean_coef(t)) - jnp.log(self.std(t)))

    def rate(self, t: Array) -> Array:
        raise ValueError("noise levels in discrete time have the original weighting only")

    def _at(self, values: tuple[float, ...], t: Array) -> Array:
        last = len(values) - 1
        return jnp.asarray(values, t.dtype)[jnp.round(t * last).astype(jnp.int32)]


SDES: dict[str, type[SDE]] = {"vp": VP, "subvp": SubVP, "ve": VE, "linear_ve": LinearVE}
