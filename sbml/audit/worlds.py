"""Data of integers whose probabilities, entropy and denoisers are known exactly.

A world gives every image k of L levels a probability P(k). An image is observed with noise, as
y = x_t / alpha = x + rho z, where x is the centre of the bin of k, or is spread evenly over this
bin (``sbml.integers``). The noise of every entry is independent, so that p(y | k) is a product over
entries, and

    E[x_i | y] = sum_l P(k_i = l | y) m_il,    P(k_i = l | y) = sum over k with k_i = l of P(k | y),
    P(k | y) proportional to P(k) prod_i p(y_i | k_i),

with p(y_i | l) and m_il = E[x_i | y_i, k_i = l] of ``integers.bin_moments``. The worlds differ in
how they sum over the other entries:

    Chain     forwards and backwards along every row
    Listed    over all images, which must be few

The likelihoods p(y_i | l) of each entry are divided by the largest of them, so that the best level
has the likelihood 1. No probability P(k) is 0, so no sum vanishes.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from scipy import special

from sbml.core import bits, pytrees
from sbml.core.door import typed
from sbml.core.types import Array, Example, Real, Scalar
from sbml.score import integers
from sbml.sdes import SDE

Images = UInt8[np.ndarray, "n h w c"]
Nats = Float[np.ndarray, "n"]
OfLevels = Float[Array, "h w c levels"]  # a number for each level of each entry
Shape = tuple[int, int, int]

MOST = 1024  # the largest number of images that ``World.images`` lists

STATIC = {"static": True}


@dataclasses.dataclass(frozen=True, eq=False)
class World(abc.ABC):
    """A distribution of images. It is a pytree, whose leaves are its probabilities, so that all
    worlds of one kind and shape share compiled functions.

    Attributes:
      levels: the number L of levels.
      shape: (h, w, c) of one image.
    """

    levels: int = dataclasses.field(metadata=STATIC)
    shape: Shape = dataclasses.field(metadata=STATIC)

    @property
    @abc.abstractmethod
    def entropy(self) -> float:
        """-E log P(k) in nats."""

    @abc.abstractmethod
    def sample(self, seed: int, n: int) -> Images:
        """``n`` images ``(n, h, w, c)``."""

    @abc.abstractmethod
    def log_prob(self, pixels: Images) -> Nats:
        """log P(k) in nats of each image, ``(n,)``, in float64."""

    @abc.abstractmethod
    def marginals(self, likelihood: OfLevels) -> OfLevels:
        """P(k_i = l | y) of one image from its ``likelihood`` p(y_i | l), up to a factor for each
        entry: the largest over the levels is 1."""

    @property
    def dims(self) -> int:
        """The number of entries of an image."""
        return math.prod(self.shape)

    @property
    def images(self) -> Images | None:
        """All images, ``(L^d, h, w, c)``, or None if there are more than ``MOST``."""
        if self.levels**self.dims > MOST:
            return None
        every = np.indices((self.levels,) * self.dims).reshape(self.dims, -1)
        return every.T.reshape(-1, *self.shape).astype(np.uint8)

    def denoiser(self, sde: SDE, data: integers.Kind) -> "Denoiser":
        """E[x_0 | x_t] for ``data`` at bin centres or spread evenly over their bins."""
        return Denoiser(self, sde, data)

    def posterior_mean(self, y: Example, rho: Scalar, data: str) -> Example:
        """E[x | y] of one image ``y (h, w, c)``."""
        level = jnp.arange(self.levels, dtype=y.dtype)[None, None, None]
        rho = jnp.broadcast_to(rho, y.shape)[..., None]
        centre = bits.to_model(level, 0.5, self.levels)
        log_p, means = integers.bin_moments(centre, y[..., None], rho, self.levels, data)
        likelihood = jnp.exp(log_p - jax.lax.stop_gradient(log_p.max(-1, keepdims=True)))
        return jnp.sum(self.marginals(likelihood) * means, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """The exact E[x_0 | x_t] of a world, for x_t = alpha x_0 + sigma z.

    It is a function of x_t ``(*b, h, w, c)`` and t, which is a scalar or has the shape ``(*b)``, of
    JAX or NumPy; ``numpy.asarray`` turns its result into an array of NumPy. It can be
    differentiated, and it is a pytree, so it can be an argument of ``jit``.
    """

    world: World
    sde: SDE = dataclasses.field(metadata=STATIC)
    data: str = dataclasses.field(metadata=STATIC)

    def __call__(self, x_t: Real, t: Real | float) -> Array:
        return _denoised(self, jnp.asarray(x_t, float), jnp.asarray(t, float))


@jax.jit
def _denoised(denoiser: Denoiser, x_t: Array, t: Array) -> Array:
    sde = denoiser.sde

    def one(x_t: Array, t: Array) -> Array:
        alpha = sde.mean_coef(t)
        return denoiser.world.posterior_mean(x_t / alpha, sde.std(t) / alpha, denoiser.data)

    return jnp.vectorize(one, signature="(h,w,c),()->(h,w,c)")(x_t, t)


@pytrees.register
@dataclasses.dataclass(frozen=True, eq=False)
class Chain(World):
    """Independent rows of each channel; a row is a Markov chain from left to right.

    Attributes:
      first: the probabilities ``(L,)`` of the first pixel of a row.
      transition: those ``(L, L)`` of a pixel (columns) after its left neighbour (rows).
    """

    first: np.ndarray
    transition: np.ndarray

    @property
    def entropy(self) -> float:
        h, w, c = self.shape
        before, each = self.first, special.entr(self.transition).sum(1)
        nats = float(special.entr(self.first).sum())
        for _ in range(w - 1):
            nats += float(before @ each)
            before = before @ self.transition
        return h * c * nats

    def sample(self, seed: int, n: int) -> Images:
        h, w, c = self.shape
        u = _generator(seed).random((w, n, h, c, 1))
        columns = [(u[0] >= np.cumsum(self.first)[:-1]).sum(-1)]
        for each in u[1:]:
            below = np.cumsum(self.transition, 1)[columns[-1], :-1]
            columns.append((each >= below).sum(-1))
        return np.stack(columns, 2).astype(np.uint8)

    def log_prob(self, pixels: Images) -> Nats:
        first = np.log(self.first)[pixels[:, :, 0]]
        steps = np.log(self.transition)[pixels[:, :, :-1], pixels[:, :, 1:]]
        return first.sum((1, 2)) + steps.sum((1, 2, 3))

    def marginals(self, likelihood: OfLevels) -> OfLevels:
        p = jnp.moveaxis(likelihood, 1, 0)  # of the pixels of a row, each (h, c, L)
        forward = [jnp.asarray(self.first, p.dtype)[None, None] * p[0]]
        for each in p[1:]:
            forward.append(_product(_normalised(forward[-1]), self.transition) * each)
        backward = [jnp.ones_like(p[0])]
        for each in p[:0:-1]:
            backward.insert(0, _normalised(_product(each * backward[0], self.transition.T)))
        both = jnp.stack(forward) * jnp.stack(backward)
        return jnp.moveaxis(_normalised(both), 0, 1)


@pytrees.register
@dataclasses.dataclass(frozen=True, eq=False)
class Listed(World):
    """Few images, where ``probabilities (L, ..., L)`` has an axis for each entry of an image."""

    probabilities: np.ndarray

    @property
    def entropy(self) -> float:
        return float(special.entr(self.probabilities).sum())

    def sample(self, seed: int, n: int) -> Images:
        p = self.probabilities
        chosen = _generator(seed).choice(p.size, n, p=p.ravel())
        every = np.stack(np.unravel_index(chosen, p.shape), axis=-1)
        return every.reshape(n, *self.shape).astype(np.uint8)

    def log_prob(self, pixels: Images) -> Nats:
        return np.log(self.probabilities[tuple(pixels.reshape(len(pixels), -1).T)])

    def marginals(self, likelihood: OfLevels) -> OfLevels:
        d = self.dims
        joint = jnp.asarray(self.probabilities, likelihood.dtype)
        for i, each in enumerate(likelihood.reshape(d, -1)):
            joint = joint * each.reshape((1,) * i + (-1,) + (1,) * (d - 1 - i))
        sums = [joint.sum([*range(i), *range(i + 1, d)]) for i in range(d)]
        return _normalised(jnp.stack(sums)).reshape(likelihood.shape)


def _generator(seed: int) -> np.random.Generator:
    """Draws that are independent of those of an estimator which uses ``default_rng(seed)``."""
    return np.random.default_rng([seed, 0x776F726C64])


def _normalised(p: Array) -> Array:
    return p / p.sum(-1, keepdims=True)


def _product(p: Array, matrix: np.ndarray) -> Array:
    return jnp.matmul(p, jnp.asarray(matrix, p.dtype), precision="highest")


@typed
def uniform(levels: bits.Levels, shape: Shape) -> Chain:
    """Independent pixels, all levels of which have the probability 1 / L."""
    each = np.full(levels, 1 / levels)
    return Chain(levels, shape, each, np.tile(each, (levels, 1)))


@typed
def gaussian(
    mean: Float[np.ndarray, " d"],
    covariance: Float[np.ndarray, "d d"],
    levels: bits.Levels,
    shape: Shape,
) -> Listed:
    """A discretised Gaussian: P(k) proportional to N(c_k; mean, covariance) at the bin centres c_k.

    The probabilities of all L^d images are computed and divided by their sum, so that P is exactly
    normalised whatever the covariance is. ``mean`` and ``covariance`` are in the model's scale,
    where images lie in [-1, 1].
    """
    every = np.indices((levels,) * len(mean)).reshape(len(mean), -1)
    residual = (2 * every + 1) / levels - 1 - mean[:, None]
    log_p = -0.5 * np.sum(residual * np.linalg.solve(covariance, residual), axis=0)
    return _listed(levels, shape, log_p)


@typed
def random(seed: int, levels: bits.Levels, shape: Shape) -> Listed:
    """Probabilities of all images without any structure: their logarithms are normal draws."""
    log_p = np.random.default_rng(seed).normal(size=levels ** math.prod(shape))
    return _listed(levels, shape, log_p)


@typed
def chain(levels: bits.Levels, shape: Shape, step: float = 1.0) -> Chain:
    """Rows whose first level is uniform. ``step`` is about the standard deviation of the difference
    of neighbours, in levels."""
    k = np.arange(levels)
    transition = np.exp(-0.5 * ((k[:, None] - k) / step) ** 2) + 1e-3
    transition /= transition.sum(1, keepdims=True)
    return Chain(levels, shape, np.full(levels, 1 / levels), transition)


def _listed(levels: int, shape: Shape, log_p: Nats) -> Listed:
    return Listed(levels, shape, special.softmax(log_p).reshape((levels,) * math.prod(shape)))
