"""The schedule of a discrete-time model, from its table of alpha-bars.

DDPM and its descendants have n noise levels, x_i = sqrt(a_i) x_0 + sqrt(1 - a_i) z with decreasing
a_i ("alpha bar"). Level i has the time t = i / (n - 1), and between the levels

    alpha^2 = sigmoid(lambda(t)),      sigma^2 = sigmoid(-lambda(t)),

where lambda is the monotone cubic that interpolates logit a_i. An ODE solver evaluates the network
between the levels that it was trained at.

Reference: Fritsch & Butland 1984 (for the slopes, which are those of scipy's
``PchipInterpolator``, except at a flat end).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core.door import typed
from sbml.core.pytrees import static
from sbml.core.scalars import Number, between, one_of
from sbml.core.types import Elementwise
from sbml.sdes.base import SDE


@dataclasses.dataclass(frozen=True)
class _Interpolated(SDE):
    """The process through the noise levels ``alpha_bars``, a field or a property of a subclass."""

    alpha_bars: ClassVar[Any]  # a_0 > a_1 > ... > a_{n-1}, a tuple

    def step(self, t: Elementwise) -> Elementwise:
        """(n - 1) t, the index of the level at ``t``; the model's network takes it as its time."""
        return (len(self.alpha_bars) - 1) * t

    def log_snr(self, t: Elementwise) -> Elementwise:
        cubics = _cubics(self.alpha_bars)
        t = jnp.asarray(t)
        step = self.step(t)
        i = jnp.clip(jnp.floor(step).astype(int), 0, cubics.shape[1] - 1)
        third, second, first, value = (jnp.asarray(c, t.dtype)[i] for c in cubics)
        s = step - i.astype(t.dtype)
        return value + s * (first + s * (second + s * third))

    def time(self, log_snr: Elementwise) -> Elementwise:
        """t of a log-SNR: 0 if it is above that of level 0."""
        t = super().time(log_snr)
        return jnp.where(log_snr > self.log_snr(jnp.zeros_like(t)), 0, t)

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(self.log_snr(t)))

    def std(self, t: Elementwise) -> Elementwise:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-self.log_snr(t)))

    @property
    def prior_std(self) -> float:
        """1: such models start sampling from N(0, I)."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class AlphaBarTable(_Interpolated):
    """A variance-preserving SDE through the noise levels of a discrete-time model.

        table = AlphaBarTable(np.cumprod(1 - betas))
        score = from_prediction(lambda x, t: net(x, table.step(t)), "noise", table)

    Attributes:
      alpha_bars: a_0 > a_1 > ... > a_{n-1} in (0, 1), the last at most 1/2: any sequence of two or
        more float64, stored as a tuple.
    """

    alpha_bars: Sequence[float] | np.ndarray = dataclasses.field(  # type: ignore[misc]
        metadata={"static": True}
    )

    def __post_init__(self) -> None:
        values = np.asarray(self.alpha_bars, np.float64)
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"alpha_bars of shape {values.shape}: give a list of two or more")
        if not (np.all(values > 0) and np.all(values < 1)):
            raise ValueError(
                f"alpha_bars lie in [{values.min()}, {values.max()}]: give numbers in (0, 1). A "
                "last level without signal, alpha bar 0, has no log-SNR: leave it out"
            )
        if not np.all(np.diff(values) < 0):
            i = int(np.argmax(np.diff(values) >= 0))
            raise ValueError(
                f"alpha_bars[{i}]={values[i]}, alpha_bars[{i + 1}]={values[i + 1]}: give "
                "decreasing numbers, where level 0 has the least noise"
            )
        if values[-1] > 0.5:
            raise ValueError(
                f"the last of alpha_bars is {values[-1]}, with more signal than noise: give the "
                "cumulative product of the alphas, sqrt(alpha_bar) being the factor of the data"
            )
        object.__setattr__(self, "alpha_bars", tuple(map(float, values)))

    def __repr__(self) -> str:
        first, last, n = self.alpha_bars[0], self.alpha_bars[-1], len(self.alpha_bars)
        return f"AlphaBarTable({n} levels, alpha_bars {first} .. {last})"


SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


@typed
@dataclasses.dataclass(frozen=True)
class BetaSchedule(_Interpolated):
    """The levels i = 0 .. n - 1 of diffusers' DDPM and DDIM: alpha_i^2 = prod_{j <= i} (1 - beta_j)

        linear             beta_i from beta_start to beta_end (DDPM)
        scaled_linear      sqrt(beta_i) from sqrt(beta_start) to sqrt(beta_end)
        sigmoid            beta_start + (beta_end - beta_start) sigmoid(l_i), l_i from -6 to 6
        squaredcos_cap_v2  1 - beta_i = f(i + 1) / f(i), but beta_i is at most 0.999;
                           f(i) = cos^2(pi / 2 (i / n + 0.008) / 1.008)

    Their number n is ``steps``. Time 0 is level 0, which has the least noise.

    References: Ho et al. 2020; Nichol & Dhariwal 2021.
    """

    smallest_time: ClassVar[float] = 0.0

    schedule: Annotated[str, one_of(*SCHEDULES)] = "linear"
    beta_start: Annotated[Number, between(0, 1)] = static(1e-4)
    beta_end: Annotated[Number, between(0, 1)] = static(0.02)
    steps: Annotated[int, between(2, 2**16)] = static(1000)

    def __post_init__(self) -> None:
        AlphaBarTable(self.alpha_bars)  # which refuses numbers that do not decrease to noise

    @property
    def alpha_bars(self) -> tuple[float, ...]:
        """a_0 > ... > a_{n-1}."""
        return _of_betas(self.schedule, self.beta_start, self.beta_end, self.steps)


@functools.lru_cache(maxsize=8)
def _of_betas(schedule: str, start: float, end: float, n: int) -> tuple[float, ...]:
    if schedule == "linear":
        betas = np.linspace(start, end, n)
    elif schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, n) ** 2
    elif schedule == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, n)))
    else:
        f = np.cos(0.5 * np.pi * (np.arange(n + 1) / n + 0.008) / 1.008) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return tuple(np.cumprod(1 - betas).tolist())


@functools.lru_cache(maxsize=8)
def _cubics(alpha_bars: tuple[float, ...]) -> np.ndarray:
    """Coefficients ``(4, n - 1)`` of the powers 3 to 0 of the distance to level i, in float64.

    They are those of SciPy's monotone cubic, except where it is flat at the first or the last
    level: with a log-SNR that does not fall, the noise would stop there. A tenth of the slope of
    the neighbouring chord keeps the cubic monotone.
    """
    from scipy import interpolate, special  # They would be a third of the import of sbml.sdes.

    log_snr = special.logit(np.asarray(alpha_bars))
    levels = np.arange(len(log_snr))
    slopes = interpolate.PchipInterpolator(levels, log_snr).derivative()(levels)
    chords = np.diff(log_snr)
    for end in (0, -1):
        if abs(slopes[end]) <= 1e-9 * abs(chords[end]):
            slopes[end] = chords[end] / 10
    return interpolate.CubicHermiteSpline(levels, log_snr, slopes).c
