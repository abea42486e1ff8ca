"""Continuous data whose score and density have a closed form at every time of every linear SDE.

    x_0 ~ N(m, C)   =>   x_t ~ N(alpha m, alpha^2 C + sigma^2 I),

and a mixture of Gaussians stays a mixture with the same weights. In the eigenbasis of C everything
is a sum over dimensions. Of the package, only ``mean_coef`` and ``std`` of the SDE are used, so
that the values are independent of the code under test.

All kinds of data are pytrees, so one compiled function serves all data of one shape. With enough
parts that differ in their variance only, a mixture has tails as heavy as Student's t.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import stats

from sbml.core.scalars import Number
from sbml.core.types import Array, Key
from sbml.sdes import SDE


def coefficients(sde: SDE, t: Number) -> tuple[float, float]:
    """alpha(t) and sigma(t)."""
    time = jnp.asarray(t, float)
    return float(sde.mean_coef(time)), float(sde.std(time))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Normal data, whose score and density are known: x_0 ~ N(mean, C) with C = basis
    diag(eigenvalues) basis^T, ``(d, d)``. An example may have any shape with d entries."""

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

    def log_prob(self, x: ArrayLike, t: Number = 0.0) -> np.ndarray:
        """log p_t of the examples ``x (n, d)``, ``(n,)``."""
        return np.asarray(_log_prob(self, jnp.asarray(x), jnp.asarray(t, float)))

    def sample(self, seed: int, n: int) -> np.ndarray:
        """``n`` examples x_0 ``(n, d)``."""
        rng, parts = np.random.default_rng(seed), jax.tree.map(np.asarray, self.parts)
        which = rng.choice(len(self.weights), n, p=np.asarray(self.weights))
        z = np.sqrt(parts.eigenvalues[which]) * rng.normal(size=(n, parts.mean.shape[1]))
        return parts.mean[which] + np.einsum("nij,nj->ni", parts.basis[which], z)

    def affine(self, matrix: np.ndarray, shift: np.ndarray) -> "Mixture":
        """The distribution of ``matrix`` x + ``shift``."""

        def of(part: Gaussian) -> Gaussian:
            values, vectors = jnp.linalg.eigh(matrix @ part.cov @ matrix.T)
            return Gaussian(part.sde, matrix @ part.mean + shift, values, vectors)

        return Mixture(self.weights, jax.vmap(of)(self.parts))


@jax.jit
def _log_prob(data: Mixture, x: Array, t: Array) -> Array:
    return jax.vmap(lambda x: data.logp(x, t))(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classes:
    """A distribution for each class; those of all classes are stacked along the first axis."""

    each: Mixture

    def of(self, c: Array | int) -> Mixture:
        """The distribution of the class ``c``."""
        found: Mixture = jax.tree.map(lambda leaf: leaf[c], self.each)
        return found

    def score(self, x: Array, t: Array, key: Key | None, condition: Array) -> Array:
        """The score of x_t, given the class."""
        return self.of(condition).score(x, t)


def gaussian(sde: SDE, d: int = 3, seed: int = 0, scale: float = 0.5) -> Gaussian:
    """A Gaussian with correlated coordinates, whose standard deviations are about ``scale``."""
    rng = np.random.default_rng(seed)
    root = scale * (np.eye(d) + 0.5 * rng.normal(size=(d, d)))
    values, vectors = np.linalg.eigh(root @ root.T)
    return Gaussian(sde, *map(jnp.asarray, (0.3 * rng.normal(size=d), values, vectors)))


def diagonal(sde: SDE, copies: int = 1) -> Gaussian:
    """A Gaussian with independent coordinates of three variances, ``copies`` times."""
    mean, values = np.tile([[0.1, -0.2, 0.0], [0.05, 0.3, 1.0]], copies)
    return Gaussian(sde, *map(jnp.asarray, (mean, values, np.eye(3 * copies))))


def mixture(sde: SDE, d: int = 3) -> Mixture:
    """A mixture of three different Gaussians, which overlap."""
    return _stack([0.5, 0.3, 0.2], [gaussian(sde, d, seed, 0.2) for seed in (1, 2, 3)])


def _stack(weights: list[float], parts: list[Gaussian]) -> Mixture:
    return Mixture(jnp.asarray(weights), jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


def heavy_tails(sde: SDE, d: int = 2, freedom: float = 3.0, parts: int = 12) -> Mixture:
    """Nearly Student's t: x = sqrt(freedom / chi^2) z, with ``parts`` values of chi^2."""
    chi2 = stats.chi2(freedom).ppf((np.arange(parts) + 0.5) / parts)
    each = [
        Gaussian(sde, jnp.zeros(d), jnp.full(d, 0.1 * freedom / value), jnp.eye(d))
        for value in chi2
    ]
    return _stack([1 / parts] * parts, each)


def classes(sde: SDE, d: int = 2, parts: int = 12) -> Classes:
    """A class that is a mixture of Gaussians, and one with heavy tails."""
    gaussians = _stack([1 / parts] * parts, [gaussian(sde, d, i, 0.3) for i in range(parts)])
    both = gaussians, heavy_tails(sde, d, parts=parts)
    return Classes(jax.tree.map(lambda *leaves: jnp.stack(leaves), *both))
