"""The evidence bound on -log p(x) of continuous data x: a sum of three terms, in nats.

    -log p(x) <= prior + diffusion + reconstruction

Let lambda = log SNR, Z = lambda(eps) - lambda(T), rho = sigma / alpha and x_t = alpha x + sigma z.
Let s(x_t, t) be the score, e(x_t, t) = -sigma s(x_t, t) the noise prediction, and N(0, S^2 I) the
prior. Then, for x of d dimensions,

    prior           KL(p_T(.|x) || N(0, S^2 I)) = 1/2 [|alpha_T x|^2 / S^2 + d (r - 1 - log r)],
                    r = sigma_T^2 / S^2
    diffusion, dsm  Z / 2 E |z - e(x_t, t)|^2 for lambda uniform and z ~ N(0, I)
    diffusion, ssm  Z d / 2 + Z E [1/2 sigma^2 (|s|^2 + 2 div s)]
    reconstruction  1/2 E |z - e(x_eps, eps)|^2 + d / 2 log(2 pi rho_eps^2)

T is the SDE's ``largest_time``. The bound holds for any end T, since the prior's KL is taken at T.
These terms contain all constants of the paper's theorem 3, so only the expectations, which need the
network, are estimated by random draws. The two forms of the diffusion term, by denoising score
matching (dsm) and by score matching with the divergence (ssm), have the same expectation.

*Control variate.* For a Gaussian N(m, C) that was fitted to training data, the optimal denoiser is
linear and the integral of its error has a closed form. Subtracting its error from every draw and
adding the integral leaves the expectation unchanged and removes nearly all of the variance. The
same is done for the error at eps in the reconstruction. Let
C = U diag(l) U^T, c = U^T (x - m) and v = rho^2. Then

    integral = 1/2 sum_i [-log1p(l_i / v) + l_i / (l_i + v) - c_i^2 / (l_i + v)]  from v_eps to v_T

A Gaussian of few data, or of other data than x, can be far from the network. So the control is
multiplied by a coefficient in [0, 1] at each noise level, the one that leaves the least variance
(:func:`pilot`). The coefficients are independent of the draws, so any of them leave the
expectation.

*Discrete time.* A chain of N steps over eps = t_0 < ... < t_N = T has the bound that DDPM calls
L_vlb, where the times are evenly spaced. Only its diffusion term differs:

    diffusion = sum_i [w_i / r_i E |z - e(x_{t_i}, t_i)|^2 + d / 2 (log r_i + 1 / r_i - 1)],
    w_i = 1/2 expm1(lambda_{i-1} - lambda_i)

where r_i is the variance of the reverse step in units of that of the true one given x. DDPM has r_i
= 1. The bound is least for r_i = 1 + 2 w_i m_i, where m_i is the mean of |z - e|^2 / d at t_i. This
diffusion term is larger than the integral, and tends to it for large N. One step i is drawn for
each point u. With W_i = w_i / r_i, its probability is the mean of 1 / N and W_i / sum W. The
control's term of step i has the expectation W_i sum_j (l_j^2 + v_i c_j^2) / (l_j + v_i)^2.

*Density of the times.* The variance that remains depends on the time. It becomes smaller if times
are drawn with a density in log-SNR that is proportional to the standard deviation of the draws at
that time, and each draw is weighted by the inverse of the density (:func:`pilot`).

Reference: Song, Durkan, Murray, Ermon, NeurIPS 2021, theorem 3 and appendix; Kingma et al., VDM,
2021, for the uniform log-SNR form; Bao et al., "Analytic-DPM", 2022, for the optimal r_i.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real

from sbml.core.door import checked
from sbml.core.scalars import Draws, Number, above_0, at_least, finite
from sbml.core.streams import stream
from sbml.core.types import (
    Array,
    Batch,
    Elementwise,
    Example,
    Key,
    Keys,
    PyTree,
    Scalar,
    Score,
    Vector,
    at_least_float32,
    conditioned,
    deterministic,
    in_full_precision,
    product,
)
from sbml.losses import perturb, residual
from sbml.score import divergence
from sbml.score.divergence import Trace
from sbml.sdes import SDE, times
from sbml.sdes.times import Importance
from sbml.statistics import intervals, moments

Flat = Float[Array, "d"]

FULL_DIMS = 256  # up to so many dimensions, a Gaussian control has a full covariance by default

PILOT_DRAWS = 8  # draws of :func:`pilot` for each example
BIN_DRAWS = 16  # the least mean number of these draws in a bin


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a chain in discrete time.

    Attributes:
      times: t_0 .. t_N.
      ratios: r_1 .. r_N, the variances of the reverse steps relative to those of DDPM.
    """

    times: tuple[float, ...]
    ratios: tuple[float, ...]


class Bound(NamedTuple):
    """The terms of the bound on -log p(x) for one example: scalars, in nats."""

    prior: Scalar
    diffusion: Scalar
    reconstruction: Scalar

    @property
    def total(self) -> Elementwise:
        """The sum of the terms in nats; its expectation is an upper bound on -log p(x)."""
        return sum(self[1:], start=self[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianControl:
    """The control variate: the optimal denoiser of N(mean, U diag(variances) U^T).

    Attributes:
      mean: the mean ``(d,)``.
      variances: the eigenvalues ``(d,)`` of the covariance.
      basis: U, its eigenvectors in the columns of ``(d, d)``; None for a diagonal covariance.
      coefficients: ``(bins,)``, by which the control's error is multiplied.
      edges: the log-SNR ``(bins - 1,)`` where the coefficient changes, from large to small.
    """

    # Arrays of JAX or NumPy, or only their shapes where a program is compiled ahead of time.
    mean: Any
    variances: Any
    basis: Any
    coefficients: Any = dataclasses.field(default_factory=lambda: np.ones(1, np.float32))
    edges: Any = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

    @classmethod
    @checked
    def fit(
        cls,
        x: Real[Array | np.ndarray, " n *s"],
        *,
        noise_variance: Annotated[Number, finite, at_least(0)] = 0.0,
        full: bool | None = None,
    ) -> "GaussianControl":
        """Fit a Gaussian to ``x (n, *s)``, numbers of any type.

        Args:
          x: the training data, in the model's scale.
          noise_variance: added to every variance. If ``x`` are bin centres of L levels, give the
            variance of the dequantization noise, (2 / L)^2 / 12 in the model's scale. Without it
            the variance of a constant pixel would be 0, and the control would be far from the
            network's error at small times, where that error is largest.
          full: whether to fit the full covariance or its diagonal only; None for the full one if d
            is at most ``FULL_DIMS`` and n is larger than 2 d. The small eigenvalues of fewer
            examples are far too small.

        Raises:
          ValueError: ``x`` are not finite.
        """
        x = np.asarray(x)
        mean, basis = moments.mean(x), None
        if not np.all(np.isfinite(mean)):
            raise ValueError("x has no finite mean: fit the control to finite numbers")
        if full if full is not None else mean.size <= FULL_DIMS and len(x) > 2 * mean.size:
            variances, vectors = np.linalg.eigh(moments.covariance(x, mean))
            basis = jnp.asarray(vectors)
        else:
            variances = moments.variances(x, mean)
        # Rounding can leave the variance of a constant pixel slightly below zero.
        variances = np.maximum(variances, 0.0) + noise_variance
        return cls(jnp.asarray(mean), jnp.asarray(variances), basis)

    def _coordinates(self, x: Example) -> Flat:
        """U^T (x - m) for ``x (*s)``; a ValueError if the control was fitted to data of another
        size."""
        shapes = {name: jnp.shape(getattr(self, name)) for name in ("mean", "variances")}
        if any(shape != (x.size,) for shape in shapes.values()):
            raise ValueError(
                f"a Gaussian control with shapes {shapes} for x of shape {x.shape}: fit it to data "
                f"of this shape, so that each is ({x.size},)"
            )
        flat = x.reshape(-1) - self.mean
        return flat if self.basis is None else product(self.basis.T, flat)

    @checked
    def noise(self, sde: SDE, x_t: Example, t: Scalar) -> Example:
        """E[z | x_t] = rho (C + rho^2)^-1 (x_t / alpha - m), shape ``(*s)``."""
        alpha, rho = sde.mean_coef(t), sde.std(t) / sde.mean_coef(t)
        y = rho / (self.variances + rho**2) * self._coordinates(x_t / alpha)
        return (y if self.basis is None else product(self.basis, y)).reshape(x_t.shape)

    def coefficient(self, sde: SDE, t: Scalar) -> Scalar:
        """The coefficient at the time ``t``, a scalar."""
        return jnp.asarray(self.coefficients)[jnp.sum(sde.log_snr(t) < self.edges)]

    def error(self, sde: SDE, x_t: Example, t: Scalar, z: Example) -> Scalar:
        """1/2 |z - E[z | x_t]|^2 times the coefficient, in nats, a scalar."""
        return self.coefficient(sde, t) * 0.5 * jnp.sum((z - self.noise(sde, x_t, t)) ** 2)

    @checked
    def sum_of_steps(self, sde: SDE, x: Example, t: Vector, weights: Vector) -> Scalar:
        """sum_i c_i w_i E|z - E[z | x_{t_i}]|^2 in closed form, in nats, a scalar. The mean E is
        over z; c_i is the :meth:`coefficient` at the time t_i, and w_i is its weight."""
        c2 = self._coordinates(in_full_precision(x)) ** 2
        v = jnp.exp(-sde.log_snr(t))[:, None]
        variances = self.variances[None]
        errors = (variances**2 + v * c2[None]) / (variances + v) ** 2
        each = jax.vmap(lambda t: self.coefficient(sde, t))(t)
        return jnp.sum(each * weights * jnp.sum(errors, axis=1))

    @checked
    def integral(self, sde: SDE, x: Example, eps: Number) -> Scalar:
        """Z / 2 E[c |z - E[z | x_t]|^2] over lambda uniform and z, with the coefficient c at
        lambda, in closed form, nats."""
        sde.check_time(eps)
        x = in_full_precision(x)
        c2 = self._coordinates(x) ** 2
        first, last = (sde.log_snr(jnp.asarray(t, x.dtype)) for t in (eps, sde.largest_time))
        edges = jnp.clip(jnp.asarray(self.edges, x.dtype), last, first)

        def antiderivative(log_snr: Scalar) -> Flat:
            v = jnp.exp(-log_snr)
            return (self.variances - c2) / (self.variances + v) - jnp.log1p(self.variances / v)

        each = jax.vmap(antiderivative)(jnp.concatenate([first[None], edges, last[None]]))
        return 0.5 * jnp.sum(self.coefficients * jnp.sum(jnp.diff(each, axis=0), axis=1))


def chain(sde: SDE, eps: Number, steps: int | Steps) -> tuple[Array, Array, Scalar]:
    """The times t_1 .. t_N ``(N,)`` of a chain of N steps from eps to T, the weights w_i / r_i
    ``(N,)``, and the constant sum_i 1/2 (log r_i + 1 / r_i - 1) for one dimension.

    They are those of the module's docstring, without the factor |z - e|^2. ``steps`` is N for times
    that are evenly spaced in t and r_i = 1, or the steps themselves.
    """
    if isinstance(steps, int):
        last = jnp.asarray(sde.largest_time, float)
        t = eps + (last - eps) * jnp.arange(steps + 1) / steps
        r = jnp.ones(steps)
    else:
        t, r = jnp.asarray(steps.times, float), jnp.asarray(steps.ratios, float)
    log_snr = sde.log_snr(t)
    constant = 0.5 * jnp.sum(jnp.log(r) + 1 / r - 1)
    return t[1:], 0.5 * jnp.expm1(log_snr[:-1] - log_snr[1:]) / r, constant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reduction:
    """Choices that lower the variance of a bound without changing its expectation.

    Attributes:
      control: the Gaussian control variate, for the denoising form only, or None.
      density: ``(bins,)``, the density of the points u in equal bins of [0, 1) (``times.warp``), or
        None for uniform points.
      proposal: a name in ``times.PROPOSALS``, which maps points u to times: evenly in log-SNR or
        evenly in t.
    """

    control: GaussianControl | None = None
    density: Any = None  # an array, or its shape where a program is only compiled
    proposal: str = dataclasses.field(default="importance", metadata={"static": True})

    def tail(self, sde: SDE, eps: Number) -> float:
        """Pareto's k (``intervals.pareto_k``) of the weights of the proposal over log-SNR; nan if
        they are all equal, as for ``importance``.

        Draws with the largest weights are so rare that an evaluation may have none of them, so the
        draws cannot show this tail. A ``density`` is left out: its weights are bounded by the
        inverse of its floor (``times.with_floor``).
        """
        return intervals.pareto_k(np.asarray(_weights(sde, eps, proposal=self.proposal)))


@functools.partial(jax.jit, static_argnames=("proposal",))
def _weights(sde: SDE, eps: Number, *, proposal: str) -> Vector:
    """The weights over log-SNR of 4096 evenly spaced points of a proposal."""
    u = (jnp.arange(4096) + 0.5) / 4096
    return times.draw(sde, eps, u, None, proposal)[1]


@checked
def prior_kl(sde: SDE, x: Example, variance: Annotated[Number, above_0] = 1.0) -> Scalar:
    """KL(N(alpha_T x, variance sigma_T^2) || prior) in nats, a scalar.

    With ``variance`` 1 it is the divergence of p_T(.|x) from the prior. If the signal vanishes at
    T, it is the divergence of x_t at t = ``sde.largest_time``, scaled to T by ``sde.stretch``.
    """
    x = in_full_precision(x)
    mean, std = sde.marginal(x, jnp.asarray(sde.largest_time, x.dtype))
    mean, std = sde.stretch * mean, sde.stretch * std
    r = variance * (std / sde.prior_std) ** 2
    return 0.5 * (jnp.sum((mean / sde.prior_std) ** 2) + x.size * (r - 1 - jnp.log(r)))


@checked
def noise_error(score: Score, sde: SDE, x: Example, t: Scalar, z: Example) -> Scalar:
    """1/2 |z - e(x_t, t)|^2 for one draw, in nats, a scalar."""
    return residual(sde, deterministic(score, perturb(sde, x, t, z), t), t, z, "original")


@checked
def diffusion_dsm(
    score: Score, sde: SDE, x: Example, t: Scalar, z: Example, control: GaussianControl | None
) -> Scalar:
    """1/2 |z - e|^2, minus the error of the control if there is a control; nats."""
    error = noise_error(score, sde, x, t, z)
    return error if control is None else error - control.error(sde, perturb(sde, x, t, z), t, z)


@checked
def diffusion_ssm(
    score: Score, sde: SDE, x: Example, t: Scalar, z: Example, vs: Batch | None
) -> Scalar:
    """d / 2 + 1/2 sigma^2 (|s|^2 + 2 div s) in nats, a scalar.

    The divergence is estimated with the probes ``vs (k, *s)``, or exact if ``vs`` is None.
    """
    x_t = perturb(sde, x, t, z)

    def field(x: Example) -> Example:
        return deterministic(score, x, t)

    s, div = divergence.exact(field, x_t) if vs is None else divergence.hutchinson(field, x_t, vs)
    return 0.5 * x.size + 0.5 * sde.std(t) ** 2 * (jnp.sum(at_least_float32(s) ** 2) + 2 * div)


@checked
def elbo(
    score: Score,
    sde: SDE,
    x: Example,
    key: Key,
    *,
    eps: Number,
    u: Vector,
    trace: Trace | None = None,
    reduction: Reduction = Reduction(),
    steps: int | Steps | None = None,
) -> Bound:
    """The bound for one example ``x (*s)``; vmap over examples, keys and rows of ``u``.

    Args:
      score: a score of one example, called deterministically.
      sde: the forward process.
      x: one example of continuous data (dequantize integers first).
      key: for the random draws of z at every time and at eps, and of the probes.
      eps: the smallest time.
      u: points ``(n,)`` in [0, 1), one for each draw of the diffusion term. The rows of
        ``times.lattice`` give the least variance over a data set.
      trace: None for the denoising form (dsm). For the score-matching form (ssm), how the
        divergence is computed.
      reduction: how the variance is reduced.
      steps: the number of steps N of the bound in discrete time, or the steps (:func:`chain`), for
        which the reduction's density and proposal are not used; None for the integral.

    Raises:
      ValueError: for a control with the score-matching form, or one of data of another size.
    """
    x = in_full_precision(x)
    if (control := reduction.control) is not None and trace is not None:
        raise ValueError(
            f"trace={trace} with a Gaussian control: the control belongs to the denoising form "
            "only; give no trace, or no control"
        )
    zs = jax.random.normal(stream(key, "noise"), (u.size, *x.shape), x.dtype)
    vs = None
    if trace is not None and trace.kind != "exact":
        vs = trace.directions(stream(key, "probes"), x.shape).astype(x.dtype)

    def draw(t: Scalar, z: Example) -> Scalar:
        if trace is None:
            return diffusion_dsm(score, sde, x, t, z, control)
        return diffusion_ssm(score, sde, x, t, z, vs)

    diffusion = mean_over_times(draw, zs, sde, x, eps, u, reduction, steps)
    last = jnp.asarray(eps, x.dtype)
    z = jax.random.normal(stream(key, "reconstruction"), x.shape, x.dtype)
    log_rho2 = -sde.log_snr(last)
    reconstruction = diffusion_dsm(score, sde, x, last, z, control)
    reconstruction = reconstruction + 0.5 * x.size * (math.log(2 * math.pi) + log_rho2)
    if control is not None:
        reconstruction = reconstruction + control.sum_of_steps(
            sde, x, last[None], jnp.full((1,), 0.5, x.dtype)
        )
    return Bound(prior_kl(sde, x), diffusion, reconstruction)


def mean_over_times(
    draw: Callable[[Scalar, Array], Scalar],
    normals: Elementwise,
    sde: SDE,
    x: Example,
    eps: Number,
    u: Vector,
    reduction: Reduction,
    steps: int | Steps | None,
) -> Scalar:
    """The diffusion term in nats, a scalar: an integral over log-SNR, or a sum over ``steps``.

    Args:
      draw: 1/2 |z - e|^2 at one time with normals of this time, minus the error of the reduction's
        control if it has one.
      normals: ``(n, ...)``, for each of the points ``u (n,)``.
      sde, x, eps, u, reduction, steps: as in :func:`elbo`.
    """
    control = reduction.control
    if steps is None:
        t, weight = times.draw(sde, eps, u, reduction.density, reduction.proposal)
        diffusion = jnp.mean(weight * jax.vmap(draw)(t, normals))
        return diffusion if control is None else diffusion + control.integral(sde, x, eps)
    nodes, weights, constant = chain(sde, eps, steps)
    # The probability of a step is the mean of 1 / N and its share of the sum of the weights.
    v, inverse = times.warp(u, times.with_floor(weights, 0.5))
    i = jnp.floor(v * nodes.size).astype(int)
    errors = 2 * nodes.size * weights[i] * inverse * jax.vmap(draw)(nodes[i], normals)
    diffusion = jnp.mean(errors) + x.size * constant
    return (
        diffusion if control is None else diffusion + control.sum_of_steps(sde, x, nodes, weights)
    )


class Profile(NamedTuple):
    """The draws of the diffusion term in equal bins of log-SNR, the first at eps: each ``(bins,)``.

    Attributes:
      mean: their mean in nats; nan for a bin without a draw.
      variance: their variance; nan for fewer than two draws.
      draws: their number.
    """

    mean: Array
    variance: Array
    draws: Array


@checked
def profile(
    score: Score,
    sde: SDE,
    x: Batch,
    key: Key,
    *,
    eps: Number,
    control: GaussianControl | None = None,
    bins: Draws = 32,
    condition: PyTree = None,
) -> Profile:
    """The mean and the variance of :func:`diffusion_dsm` at each noise level, from 8 draws for each
    of the examples ``x (n, *s)``.

    ``condition`` is a pytree of arrays ``(n, ...)`` for a conditional score.
    """
    place, errors, controls = _errors(score, sde, x, key, eps, control, bins, condition)
    return _profile(place, errors - controls, bins)


def _errors(
    score: Score,
    sde: SDE,
    x: Batch,
    key: Key,
    eps: Number,
    control: GaussianControl | None,
    bins: int,
    condition: PyTree,
) -> tuple[Array, Array, Array]:
    """The bins of the times of 8 draws for each example, the errors of the score at these draws,
    and those of the control: each ``(n, 8)``.

    The network is called on the 8 draws of one example at a time, so the result does not depend on
    the batch size of the evaluation.
    """
    x = in_full_precision(x)
    v = times.lattice(stream(key, "times"), len(x), PILOT_DRAWS)
    t, _ = Importance(sde, eps).at(v)
    keys = jax.random.split(stream(key, "noise"), (len(x), PILOT_DRAWS))

    def example(row: tuple[Array, Array, Keys, PyTree]) -> tuple[Array, Array]:
        x, t, keys, c = row
        given = conditioned(score, c)

        def draw(t: Scalar, key: Key) -> tuple[Scalar, Scalar]:
            z = jax.random.normal(key, x.shape, x.dtype)
            error = noise_error(given, sde, x, t, z)
            if control is None:
                return error, jnp.zeros_like(error)
            return error, control.error(sde, perturb(sde, x, t, z), t, z)

        return jax.vmap(draw)(t, keys)

    return jnp.floor(v * bins).astype(int), *jax.lax.map(example, (x, t, keys, condition))


def _total(values: Array, place: Array, bins: int) -> Array:
    """The sum of ``values`` in each bin, ``(bins,)``."""
    return jnp.zeros(bins, values.dtype).at[place].add(values)


def _centred(values: Array, place: Array, bins: int) -> Array:
    """``values`` minus the mean of those in the same bin."""
    count = _total(jnp.ones_like(values), place, bins)
    return values - (_total(values, place, bins) / count)[place]


def _profile(place: Array, values: Array, bins: int) -> Profile:
    count = _total(jnp.ones_like(values), place, bins)
    squares = _total(_centred(values, place, bins) ** 2, place, bins)
    variance = squares / jnp.where(count > 1, count - 1, jnp.nan)
    return Profile(_total(values, place, bins) / count, variance, count)


@checked
def pilot(
    score: Score,
    sde: SDE,
    x: Batch,
    key: Key,
    *,
    eps: Number,
    control: GaussianControl | None = None,
    bins: Draws = 32,
    floor: Number = 0.1,
    condition: PyTree = None,
) -> Reduction:
    """The reduction of the variance for :func:`elbo`, from 8 draws for each example ``x (n, *s)``.

    Let D be the errors 1/2 |z - e|^2 of the score in one of equal bins of log-SNR, and G those of
    the control. The coefficient of the control there is

        c = cov(D, G) / var(G),      limited to [0, 1],

    for which D - c G has the least variance. So a control of too few or of other data does no
    harm. Let m and s^2 be the mean and the variance of D - c G in a bin with n draws. The density
    of the times is proportional to the root of s^2 + m^2 / n, mixed with a share ``floor`` of the
    uniform density. The second term is for small data sets, where a lattice has only a few points
    in a bin, and rounding their number to an integer multiplies m by an error.

    The draws must be independent of those for which the result is then used, so give :func:`elbo`
    another key. The examples may be those whose bound is then estimated. There are at most ``bins``
    bins, with at least 16 draws on average.
    """
    bins = max(1, min(bins, len(x) * PILOT_DRAWS // BIN_DRAWS))
    if control is not None:
        control = GaussianControl(control.mean, control.variances, control.basis)
    place, errors, controls = _errors(score, sde, x, key, eps, control, bins, condition)
    if control is not None:
        g = _centred(controls, place, bins)
        product = _total(g * _centred(errors, place, bins), place, bins)
        ratio = product / _total(g**2, place, bins)
        c = jnp.where(ratio > 0, jnp.minimum(ratio, 1), 0)  # 0 also for NaN
        first, last = (sde.log_snr(jnp.asarray(t, c.dtype)) for t in (eps, sde.largest_time))
        edges = jnp.linspace(first, last, bins + 1)[1:-1]
        control = dataclasses.replace(control, coefficients=c, edges=edges)
        errors = errors - c[place] * controls
    found = _profile(place, errors, bins)
    squares = found.variance + found.mean**2 / found.draws
    return Reduction(control, times.with_floor(jnp.sqrt(squares), floor))
