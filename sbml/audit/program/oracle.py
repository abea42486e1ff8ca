"""Data whose score and likelihood have a closed form at every time of every linear SDE.

    x_0 ~ N(m, C)   =>   x_t ~ N(alpha m, alpha^2 C + sigma^2 I),

and a mixture of Gaussians stays a mixture with the same weights. In the eigenbasis of C everything
is a sum over dimensions. Of the package, only ``mean_coef`` and ``std`` of the SDE are used, so
that the values are independent of the code under test.

Both kinds of data are pytrees, so one compiled function serves all data of one shape.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sbml.sdes import SDE
from sbml.types import Array, Key


def coefficients(sde: SDE, t: float) -> tuple[float, float]:
    """alpha(t) and sigma(t)."""
    time = jnp.asarray(t, float)
    return float(sde.mean_coef(time)), float(sde.std(time))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """x_0 ~ N(mean, basis diag(eigenvalues) basis^T); an example may have any shape with d
    entries."""

    sde: SDE = dataclasses.field(metadata={"static": True})
    mean: Array
    eigenvalues: Array
    basis: Array

    @property
    def cov(self) -> Array:
        """Cov x_0, ``(d, d)``."""
        return self.basis * self.eigenvalues[None] @ self.basis.T

    def variances(self, t: Array) -> Array:
        """The eigenvalues of Cov x_t, ``(d,)``."""
        return self.sde.mean_coef(t) ** 2 * self.eigenvalues + self.sde.std(t) ** 2

    def centred(self, x: Array, t: Array) -> Array:
        """x - E x_t in the eigenbasis, ``(d,)``."""
        return self.basis.T @ (x.ravel() - self.sde.mean_coef(t) * self.mean)

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
        return (self.mean + self.basis @ (gain * self.centred(x, t))).reshape(x.shape)

    def flow(self, x: Array, t0: Array, t1: Array) -> Array:
        """The solution at t1 of the probability-flow ODE that starts at x at t0: each centred
        eigencoordinate keeps its number of standard deviations."""
        ratio = jnp.sqrt(self.variances(t1) / self.variances(t0))
        mean = self.sde.mean_coef(t1) * self.mean
        return (mean + self.basis @ (ratio * self.centred(x, t0))).reshape(x.shape)

    def sigma_points(self) -> tuple[Array, Array]:
        """x_0 ``(4d, d)`` and z ``(4d, d)`` whose plain average of any quadratic form in (x_0, z)
        is its expectation under x_0 ~ N(mean, cov), z ~ N(0, I). In coordinates in which both are
        N(0, I), they are the 4d points +-sqrt(2d) e_i."""
        d = self.mean.size
        points = np.sqrt(2 * d) * np.concatenate([np.eye(2 * d), -np.eye(2 * d)])
        x = self.mean[None] + points[:, :d] * jnp.sqrt(self.eigenvalues)[None] @ self.basis.T
        return x, jnp.asarray(points[:, d:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """x_0 comes from part i with probability ``weights[i]``; the parts are stacked along the first
    axis of each array."""

    weights: Array
    parts: Gaussian

    def _joint(self, x: Array, t: Array) -> Array:
        """log (weight_i p_t(x | part i)), ``(k,)``."""
        return jnp.log(self.weights) + jax.vmap(lambda part: part.logp(x, t))(self.parts)

    def logp(self, x: Array, t: Array) -> Array:
        """log p_t(x) in nats."""
        return jax.nn.logsumexp(self._joint(x, t))

    def score(self, x: Array, t: Array, key: Key | None = None) -> Array:
        """grad_x log p_t(x): the parts' scores, weighted by their posterior probabilities."""
        scores = jax.vmap(lambda part: part.score(x, t))(self.parts)
        return jnp.tensordot(jax.nn.softmax(self._joint(x, t)), scores, 1)


def gaussian(sde: SDE, d: int = 3, seed: int = 0, scale: float = 0.5) -> Gaussian:
    """A Gaussian with correlated coordinates, whose standard deviations are about ``scale``."""
    rng = np.random.default_rng(seed)
    root = scale * (np.eye(d) + 0.5 * rng.normal(size=(d, d)))
    values, vectors = np.linalg.eigh(root @ root.T)
    return Gaussian(sde, *map(jnp.asarray, (0.3 * rng.normal(size=d), values, vectors)))


def diagonal(sde: SDE) -> Gaussian:
    """A Gaussian with independent coordinates of unequal variances."""
    values = np.array([0.05, 0.3, 1.0])
    return Gaussian(sde, *map(jnp.asarray, (np.array([0.1, -0.2, 0.0]), values, np.eye(3))))


def mixture(sde: SDE, d: int = 3) -> Mixture:
    """A mixture of three different Gaussians, which overlap."""
    return _stack([0.5, 0.3, 0.2], [gaussian(sde, d, seed, 0.2) for seed in (1, 2, 3)])


def as_mixture(data: Gaussian) -> Mixture:
    """The same distribution, written as a mixture of three identical parts, so that the functions
    compiled for mixtures serve it too."""
    return _stack([0.5, 0.3, 0.2], [data] * 3)


def _stack(weights: list[float], parts: list[Gaussian]) -> Mixture:
    return Mixture(jnp.asarray(weights), jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))
