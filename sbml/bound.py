"""The evidence bound: -log p(x) <= prior + diffusion + reconstruction, in nats.

With lambda = log SNR, Z = lambda(eps) - lambda(T), rho = sigma / alpha, x_t = alpha x + sigma z and
the noise prediction e(x_t, t) = -sigma s(x_t, t):

    prior           KL(p_T(.|x) || N(0, s^2 I)) = 1/2 [|alpha_T x|^2 / s^2 + d (r - 1 - log r)],
                    r = sigma_T^2 / s^2
    diffusion       dsm:  Z / 2  E |z - e(x_t, t)|^2            lambda uniform, z ~ N(0, I)
                    ssm:  Z d / 2 + Z E [1/2 sigma^2 (|s|^2 + 2 div s)]
    reconstruction  1/2 E |z - e(x_eps, eps)|^2 + d / 2 log(2 pi rho_eps^2)

T is the SDE's ``largest_time``: the bound holds at any end, for the prior's KL is taken there.
All constants of the paper's theorem 3 collapse into these: only the network's terms are sampled.
The two forms of the diffusion term have the same expectation.

*Control variate.* For N(m, C) fitted to training data the optimal denoiser is linear and its term
has a closed integral: subtracting it draw by draw and adding the integral leaves the expectation
as it is and removes nearly all variance. With c = U^T (x - m) in C's eigenbasis, v = rho^2:

    integral = 1/2 sum_i [-log1p(l_i / v) + l_i / (l_i + v) - c_i^2 / (l_i + v)]  from v_eps to v_T

*Density.* What noise is left depends on the time: draws with a density in log-SNR that follows its
standard deviation, each weighted by the density's inverse, have less of it (:func:`pilot`).

Reference: Song, Durkan, Murray, Ermon, NeurIPS 2021, theorem 3 and appendix; Kingma et al., VDM,
2021, for the uniform log-SNR form.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from sbml import compiler, divergence, moments, times
from sbml.divergence import Probes, Trace
from sbml.losses import perturb, residual
from sbml.scalars import Number
from sbml.sdes import SDE
from sbml.times import Importance
from sbml.types import (
    Array,
    Elementwise,
    Example,
    Key,
    Keys,
    Scalar,
    Score,
    check_example,
    deterministic,
)

Flat = Float[Array, "d"]

# The two forms of the diffusion term, by the ``trace`` that :func:`elbo` takes.
FORMS: dict[str, Trace | None] = {"dsm": None, "ssm": Trace("exact")}

PILOT_DRAWS = 8  # times for an example, of which the density of times is learned


class Bound(NamedTuple):
    """The terms of the bound on -log p(x) for one example, nats, scalars."""

    prior: Scalar
    diffusion: Scalar
    reconstruction: Scalar

    @property
    def total(self) -> Elementwise:
        """Their sum, an upper bound on -log p(x) in expectation."""
        return self.prior + self.diffusion + self.reconstruction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianControl:
    """The optimal denoiser of N(mean, U diag(variances) U^T), the control variate.

    Attributes:
      mean: ``(d,)``.
      variances: ``(d,)``, eigenvalues of the covariance.
      basis: ``(d, d)``, its eigenvectors in columns; None for a diagonal covariance.
    """

    # Arrays of JAX or NumPy, or the shapes of a compilation ahead of time.
    mean: Any
    variances: Any
    basis: Any

    @classmethod
    def fit(
        cls, x: Num[np.ndarray, " n *s"], *, noise_variance: float = 0.0, full: bool | None = None
    ) -> "GaussianControl":
        """Fit ``x (n, *s)``, of any size and type; full covariance up to 256 dimensions.

        ``noise_variance`` is added to every variance: that of the dequantization noise where ``x``
        are bin centres, (2 / L)^2 / 12 in the model's scale. Without it a constant pixel would have
        none, and the control would be far off at small times, where it matters most.

        Raises:
          ValueError: a ``noise_variance`` that is negative or not finite.
        """
        if not 0 <= noise_variance < math.inf:
            raise ValueError(f"noise_variance={noise_variance}: give a variance of at least 0")
        mean, basis = moments.mean(x), None
        if full if full is not None else mean.size <= 256:
            variances, vectors = np.linalg.eigh(moments.covariance(x, mean))
            basis = jnp.asarray(vectors)
        else:
            variances = moments.variances(x, mean)
        # Rounding can leave the variance of a constant pixel a hair below zero.
        variances = np.maximum(variances, 0.0) + noise_variance
        return cls(jnp.asarray(mean), jnp.asarray(variances), basis)

    def check(self, x: Example) -> None:
        """Refuse a control of data of another size than ``x (*s)``.

        Raises:
          ValueError: naming the shapes.
        """
        shapes = {name: jnp.shape(getattr(self, name)) for name in ("mean", "variances")}
        if any(shape != (x.size,) for shape in shapes.values()):
            raise ValueError(
                f"a control of {shapes} for x of shape {x.shape}: fit it to data of this shape, "
                f"({x.size},) each"
            )

    def _to_basis(self, flat: Flat) -> Flat:
        return flat if self.basis is None else self.basis.T @ flat

    def noise(self, sde: SDE, x_t: Example, t: Scalar) -> Example:
        """E[z | x_t] = rho (C + rho^2)^-1 (x_t / alpha - m), shape ``(*s)``."""
        alpha, rho = sde.mean_coef(t), sde.std(t) / sde.mean_coef(t)
        y = self._to_basis(x_t.reshape(-1) / alpha - self.mean)
        y = rho / (self.variances + rho**2) * y
        return (y if self.basis is None else self.basis @ y).reshape(x_t.shape)

    def integral(self, sde: SDE, x: Example, eps: Number) -> Scalar:
        """Z / 2 E |z - E[z | x_t]|^2 over lambda uniform and z, in closed form, nats."""
        compiler.check()
        c2 = self._to_basis(x.reshape(-1) - self.mean) ** 2

        def antiderivative(t: Number) -> Scalar:
            v = jnp.exp(-sde.log_snr(jnp.asarray(t, x.dtype)))
            ratio = (self.variances - c2) / (self.variances + v)
            return jnp.sum(ratio - jnp.log1p(self.variances / v))

        return 0.5 * (antiderivative(sde.largest_time) - antiderivative(eps))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reduction:
    """What lowers the variance of a bound without changing its expectation.

    Attributes:
      control: the Gaussian control variate of the denoising form, or None.
      density: ``(bins,)``, of the draws of u, in equal bins (``times.warp``), or None for uniform.
      proposal: of ``times.PROPOSALS``, where u lies in time: evenly in log-SNR or in t.
    """

    control: GaussianControl | None = None
    density: Any = None  # an array, or the shape of one where a program is only compiled
    proposal: str = dataclasses.field(default="importance", metadata={"static": True})


def prior_kl(sde: SDE, x: Example, variance: Number = 1.0) -> Scalar:
    """KL(N(alpha_T x, variance sigma_T^2) || prior) in nats, a scalar; 1 is that of p_T(.|x).

    Where the signal vanishes at T, it is that of x at ``sde.largest_time``, stretched to T.

    Raises:
      ValueError: ``x`` is not of floating-point numbers.
    """
    compiler.check()
    check_example(x)
    mean, std = sde.marginal(x, jnp.asarray(sde.largest_time, x.dtype))
    mean, std = sde.stretch * mean, sde.stretch * std
    r = variance * (std / sde.prior_std) ** 2
    return 0.5 * (jnp.sum((mean / sde.prior_std) ** 2) + x.size * (r - 1 - jnp.log(r)))


def noise_error(score: Score, sde: SDE, x: Example, t: Scalar, z: Example) -> Scalar:
    """1/2 |z - e(x_t, t)|^2 of one draw, in nats, a scalar."""
    return residual(sde, deterministic(score, perturb(sde, x, t, z), t), t, z, "original")


def diffusion_dsm(
    score: Score, sde: SDE, x: Example, t: Scalar, z: Example, control: GaussianControl | None
) -> Scalar:
    """1/2 |z - e|^2, less the control's 1/2 |z - E[z | x_t]|^2 where there is one."""
    error = noise_error(score, sde, x, t, z)
    if control is None:
        return error
    return error - 0.5 * jnp.sum((z - control.noise(sde, perturb(sde, x, t, z), t)) ** 2)


def diffusion_ssm(
    score: Score, sde: SDE, x: Example, t: Scalar, z: Example, vs: Probes | None
) -> Scalar:
    """d / 2 + 1/2 sigma^2 (|s|^2 + 2 div s); exact divergence without probes ``vs (k, *s)``."""
    x_t = perturb(sde, x, t, z)

    def field(x: Example) -> Example:
        return deterministic(score, x, t)

    s, div = divergence.exact(field, x_t) if vs is None else divergence.hutchinson(field, x_t, vs)
    return 0.5 * x.size + 0.5 * sde.std(t) ** 2 * (jnp.sum(s**2) + 2 * div)


def elbo(
    score: Score,
    sde: SDE,
    x: Array,
    key: Key,
    *,
    eps: float,
    u: Array,
    trace: Trace | None = None,
    reduction: Reduction = Reduction(),
) -> Bound:
    """The bound for one example ``x (*s)``; vmap over examples, keys and rows of ``u``.

    Args:
      score: a score of one example, called deterministically.
      sde: the forward process.
      x: one example of continuous data (dequantize integers first).
      key: draws z at every time, at eps, and the probes.
      eps: the smallest time.
      u: points ``(n,)`` in [0, 1), each a draw of the diffusion term; rows of ``times.lattice``
        over a data set have the least variance.
      trace: None for the denoising form (dsm); of the score-matching form (ssm), how its
        divergence is computed.
      reduction: of the variance.

    Returns:
      The three terms in nats. Their expectation bounds -log p(x).

    Raises:
      ValueError: for an unknown proposal, ``u`` of another rank, integer ``x``, eps outside (0, T),
        a control with the score-matching form, or a score whose shape is not that of ``x``.
    """
    control = reduction.control
    if trace is not None and control is not None:
        raise ValueError(
            "the Gaussian control is of the denoising form: give no trace, or no control"
        )
    check_example(x)
    if control is not None:
        control.check(x)
    t, weight = times.drawn(sde, eps, u, reduction.density, reduction.proposal)
    time_key, last_key, probe_key = jax.random.split(key, 3)
    zs = jax.random.normal(time_key, (u.size, *x.shape), x.dtype)
    if trace is None:
        draws = jax.vmap(lambda t, z: diffusion_dsm(score, sde, x, t, z, control))(t, zs)
    else:
        exact = trace.kind == "exact"
        vs = None if exact else trace.directions(probe_key, x.shape).astype(x.dtype)
        draws = jax.vmap(lambda t, z: diffusion_ssm(score, sde, x, t, z, vs))(t, zs)
    diffusion = jnp.mean(weight * draws)
    if control is not None:
        diffusion = diffusion + control.integral(sde, x, eps)
    last = jnp.asarray(eps, x.dtype)
    z = jax.random.normal(last_key, x.shape, x.dtype)
    log_rho2 = -sde.log_snr(last)
    constant = 0.5 * x.size * (math.log(2 * math.pi) + log_rho2)
    return Bound(prior_kl(sde, x), diffusion, noise_error(score, sde, x, last, z) + constant)


def pilot(
    score: Score,
    sde: SDE,
    x: Array,
    key: Key,
    *,
    eps: float,
    control: GaussianControl | None = None,
    bins: int = 32,
    floor: float = 0.1,
) -> Array:
    """A density ``(bins,)`` of times for :func:`elbo`, from 8 draws of each of ``x (n, *s)``.

    The network sees the draws of one image at a time, whatever batches it is then evaluated in.

    It follows the standard deviation, bin by bin, of what :func:`elbo` averages, with a part
    ``floor`` left uniform. Take other draws than those it is then used for.
    """
    u_key, z_key = jax.random.split(key)
    v = times.lattice(u_key, len(x), PILOT_DRAWS)
    t, _ = Importance(sde, eps).at(v)
    keys = jax.random.split(z_key, (len(x), PILOT_DRAWS))

    def one(x: Array, t: Array, key: Key) -> Array:
        z = jax.random.normal(key, x.shape, x.dtype)
        return diffusion_dsm(score, sde, x, t, z, control)

    def image(drawn: tuple[Array, Array, Keys]) -> Array:
        x, t, keys = drawn
        return jax.vmap(lambda t, key: one(x, t, key))(t, keys)

    values = jax.lax.map(image, (x, t, keys))
    empty = jnp.zeros((2, bins), values.dtype)
    first = times.tally(empty, v.ravel(), values.ravel(), 1.0)
    mean = (first[1] / first[0])[jnp.floor(v * bins).astype(int)]
    second = times.tally(empty, v.ravel(), ((values - mean) ** 2).ravel(), 1.0)
    return times.floored(jnp.sqrt(second[1] / second[0]), floor)
