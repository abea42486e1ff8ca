"""The chain of Gaussian steps in which an image is coded: float64, NumPy.

The times eps = t_0 < ... < t_N = T have alpha_i, sigma_i and the log-SNR lambda_i. Let z_i be the
image x with the noise of t_i, e(z, t) the noise prediction, S the standard deviation of the prior,
and b_i = 1 - exp(lambda_i - lambda_{i-1}). Then

    q(z_0 | x)       = N(alpha_0 x, sigma_0^2)
    q(z_i | z_{i-1}) = N(alpha_i / alpha_{i-1} z_{i-1}, sigma_i^2 b_i)
    p(z_{i-1} | z_i) = N(alpha_{i-1} / alpha_i (z_i - sigma_i b_i e(z_i, t_i)),
                         sigma_{i-1}^2 b_i r_i)
    p(z_N)           = N(0, S^2)

and E[-log p(x | z_0) + log q(z_0 | x) + sum_i log q(z_i | z_{i-1}) - log p(z_{i-1} | z_i) - log
p(z_N)] is the bound of ``sbml.bound`` in N steps of discrete time.

*Variances.* Let m(lambda) be the mean of |n - e|^2 / d, where z = alpha x + sigma n. It is
estimated on training images. The least bound has r_i = 1 + expm1(lambda_{i-1} - lambda_i)
m(lambda_i). It is larger than the integral over lambda by 1/4 [m (1 - m) - dm / dlambda]
(lambda_{i-1} - lambda_i)^2 d for a step. So the times have a density proportional to
sqrt(m (1 - m)). On the digits, 100 steps with these variances were .08 bits/dim above the integral;
100 steps with r_i = 1, evenly spaced in lambda, were .75 above it.

References: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020; Kingma et al.,
"Variational Diffusion Models", 2021; Bao et al., "Analytic-DPM", 2022.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core.door import checked, condition, typed
from sbml.core.scalars import Count, Number
from sbml.core.types import Array, Batch, Key, Score
from sbml.likelihood import bound
from sbml.likelihood.bound import Steps
from sbml.sdes import SDE, times

Share = Annotated[float, condition("above 0 and below 1", lambda m: 0 < m < 1)]


@typed
@dataclasses.dataclass(frozen=True)
class Chain:
    """A chain of ``steps`` steps from ``eps`` to the SDE's ``largest_time``.

    Attributes:
      sde: the forward process.
      eps: the smallest time.
      steps: N, the number of steps.
      errors: m in equal bins of log-SNR from eps on, each in (0, 1), as ``pilot`` returns them;
        () for r_i = 1 and times that are evenly spaced in log-SNR.
    """

    sde: SDE
    eps: Number
    steps: Count
    errors: tuple[Share, ...] = ()

    @cached_property
    def times(self) -> np.ndarray:
        """t_0 .. t_N ``(N + 1,)``."""

        def nodes() -> Array:
            u = jnp.arange(self.steps + 1) / self.steps
            m = jnp.asarray(self.errors or (0.5,))
            density = times.with_floor(jnp.sqrt(m * (1 - m)))
            v, _ = times.warp(jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg), density)
            t = times.Importance(self.sde, self.eps).at(v)[0]
            return t.at[0].set(self.eps).at[-1].set(self.sde.largest_time)

        return _in_float64(nodes)

    @cached_property
    def alpha(self) -> np.ndarray:
        """alpha_i ``(N + 1,)``."""
        return _in_float64(lambda: self.sde.mean_coef(jnp.asarray(self.times)))

    @cached_property
    def sigma(self) -> np.ndarray:
        """sigma_i ``(N + 1,)``."""
        return _in_float64(lambda: self.sde.std(jnp.asarray(self.times)))

    @cached_property
    def log_snr(self) -> np.ndarray:
        """lambda_i ``(N + 1,)``."""
        return _in_float64(lambda: self.sde.log_snr(jnp.asarray(self.times)))

    @cached_property
    def drops(self) -> np.ndarray:
        """b_i at the index i - 1, ``(N,)``."""
        return -np.expm1(np.diff(self.log_snr))

    @cached_property
    def ratios(self) -> np.ndarray:
        """r_i at the index i - 1, ``(N,)``."""
        if not self.errors:
            return np.ones(self.steps)
        place = (self.log_snr[0] - self.log_snr[1:]) / (self.log_snr[0] - self.log_snr[-1])
        middles = (np.arange(len(self.errors)) + 0.5) / len(self.errors)
        return 1 + np.expm1(-np.diff(self.log_snr)) * np.interp(place, middles, self.errors)

    @property
    def as_steps(self) -> Steps:
        """The steps for ``bound.elbo``."""
        return Steps(tuple(self.times.tolist()), tuple(self.ratios.tolist()))

    @cached_property
    def prior_std(self) -> float:
        """S, scaled from the time T of the SDE to its ``largest_time``."""
        return float(_in_float64(lambda: jnp.asarray(self.sde.prior_std / self.sde.stretch)))

    @cached_property
    def forward_std(self) -> np.ndarray:
        """Standard deviations of q(z_i | z_{i-1}), first that of q(z_0 | x): ``(N + 1,)``."""
        return self.sigma * np.sqrt(np.concatenate([[1.0], self.drops]))

    @cached_property
    def reverse_std(self) -> np.ndarray:
        """The standard deviations of p(z_i | z_{i+1}), and last that of p(z_N): ``(N + 1,)``."""
        inner = self.sigma[:-1] * np.sqrt(self.drops * self.ratios)
        return np.concatenate([inner, [self.prior_std]])

    def forward_mean(self, i: int, z: np.ndarray) -> np.ndarray:
        """The mean of q(z_i | z_{i-1} = z), or of q(z_0 | x = z)."""
        return self.alpha[i] / (self.alpha[i - 1] if i else 1.0) * z

    def reverse_mean(self, i: int, z: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The mean of p(z_{i-1} | z_i = z), where ``noise`` is e(z_i, t_i)."""
        ratio = self.alpha[i - 1] / self.alpha[i]
        return ratio * (z - self.sigma[i] * self.drops[i - 1] * noise)


@checked
def pilot(score: Score, sde: SDE, x: Batch, key: Key, *, eps: Number, bins: Count = 32) -> Array:
    """m in ``bins`` equal bins of log-SNR, ``(bins,)``, from 8 draws for each of ``x (n, *s)``.

    It is clipped to [1 / 512, 511 / 512], because its estimate can be above 1, although m itself is
    below 1 for a good score.
    """
    errors = bound.profile(score, sde, x, key, eps=eps, bins=bins).mean
    return jnp.clip(2 * errors / x[0].size, 1 / 512, 511 / 512)


def _in_float64(compute: Callable[[], Array]) -> np.ndarray:
    """The result of ``compute`` in float64 on the CPU, as NumPy arrays: a decoder must find the
    same numbers, and a difference of log-SNRs loses its digits in float32."""
    cpu = jax.default_device(jax.local_devices(backend="cpu")[0])
    with cpu, jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(compute(), np.float64)
