"""Data whose score and likelihood are closed form at every time of every linear SDE.

If x_0 ~ N(m, C), then x_t ~ N(alpha m, alpha^2 C + sigma^2 I); a mixture stays a mixture of the
same weights. In the eigenbasis of C everything is a sum over dimensions. Only ``mean_coef`` and
``std`` of the SDE are used, nothing else of the package, so that agreement means something.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sbml.sdes import SDE
from sbml.types import Array, Key


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """x_0 ~ N(mean (d,), cov (d, d)); examples may have any shape of d entries."""

    sde: SDE
    mean: np.ndarray
    cov: np.ndarray

    @functools.cached_property
    def _eigh(self) -> tuple[np.ndarray, np.ndarray]:
        return np.linalg.eigh(self.cov)

    @property
    def eigenvalues(self) -> Array:
        return jnp.asarray(self._eigh[0])

    @property
    def basis(self) -> Array:
        """The eigenvectors, columns of ``(d, d)``."""
        return jnp.asarray(self._eigh[1])

    def mean_at(self, t: Array) -> Array:
        return self.sde.mean_coef(t) * jnp.asarray(self.mean)

    def variances(self, t: Array) -> Array:
        """The eigenvalues of Cov x_t, ``(d,)``."""
        return self.sde.mean_coef(t) ** 2 * self.eigenvalues + self.sde.std(t) ** 2

    def centred(self, x: Array, t: Array) -> Array:
        """x - E x_t in the eigenbasis, ``(d,)``."""
        return self.basis.T @ (x.ravel() - self.mean_at(t))

    def logp(self, x: Array, t: Array) -> Array:
        """log p_t(x) in nats."""
        v = self.variances(t)
        return -0.5 * jnp.sum(self.centred(x, t) ** 2 / v + jnp.log(2 * jnp.pi * v))

    def score(self, x: Array, t: Array, key: Key | None = None) -> Array:
        """grad_x log p_t(x)."""
        return -(self.basis @ (self.centred(x, t) / self.variances(t))).reshape(x.shape)

    def posterior_mean(self, x: Array, t: Array) -> Array:
        """E[x_0 | x_t = x] by conditioning the joint Gaussian of (x_0, x_t)."""
        gain = self.sde.mean_coef(t) * self.eigenvalues / self.variances(t)
        mean = jnp.asarray(self.mean)
        return (mean + self.basis @ (gain * self.centred(x, t))).reshape(x.shape)

    def flow(self, x: Array, t0: Array, t1: Array) -> Array:
        """Where the probability-flow ODE carries x from t0 to t1: each centred eigencoordinate
        keeps its number of standard deviations."""
        ratio = jnp.sqrt(self.variances(t1) / self.variances(t0))
        return (self.mean_at(t1) + self.basis @ (ratio * self.centred(x, t0))).reshape(x.shape)

    def sigma_points(self) -> tuple[np.ndarray, np.ndarray]:
        """x_0 ``(4d, d)`` and z ``(4d, d)`` whose plain average of any quadratic form in (x_0, z)
        is its expectation under x_0 ~ N(mean, cov), z ~ N(0, I): +-sqrt(2d) e_i, whitened."""
        d = len(self.mean)
        points = np.sqrt(2 * d) * np.concatenate([np.eye(2 * d), -np.eye(2 * d)])
        values, vectors = self._eigh
        return self.mean + points[:, :d] * np.sqrt(values) @ vectors.T, points[:, d:]


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """x_0 from ``parts[i]`` with probability ``weights[i]``."""

    weights: np.ndarray
    parts: tuple[Gaussian, ...]

    def _joint(self, x: Array, t: Array) -> Array:
        return jnp.log(jnp.asarray(self.weights)) + jnp.stack([part.logp(x, t) for part in self.parts])

    def logp(self, x: Array, t: Array) -> Array:
        """log p_t(x) in nats."""
        return jax.nn.logsumexp(self._joint(x, t))

    def score(self, x: Array, t: Array, key: Key | None = None) -> Array:
        """grad_x log p_t(x): the parts' scores, weighted by their posterior probabilities."""
        scores = jnp.stack([part.score(x, t) for part in self.parts])
        return jnp.tensordot(jax.nn.softmax(self._joint(x, t)), scores, 1)


def gaussian(sde: SDE, d: int = 3, seed: int = 0, scale: float = 0.5) -> Gaussian:
    """Some Gaussian with correlations, about ``scale`` wide."""
    rng = np.random.default_rng(seed)
    root = scale * (np.eye(d) + 0.5 * rng.normal(size=(d, d)))
    return Gaussian(sde, 0.3 * rng.normal(size=d), root @ root.T)


def mixture(sde: SDE, d: int = 3) -> Mixture:
    """Some mixture of three separated Gaussians."""
    parts = tuple(gaussian(sde, d, seed, 0.2) for seed in (1, 2, 3))
    return Mixture(np.array([0.5, 0.3, 0.2]), parts)
