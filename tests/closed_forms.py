"""The parts of the estimators for continuous data in closed form, without Monte Carlo noise.

For x_0 Gaussian or a mixture of Gaussians the score and density at every time are known
(``sbml.audit.oracle``). The expectation of an estimator is computed over (x_0, z) with points whose
weighted mean is exact, and over time with Gauss-Legendre nodes in log-SNR, in which the integrands
are smooth. Let h and J be the entropy and Fisher information of x_t, and rho = sigma / alpha. With
the exact score and the prior N(0, S^2 I),

    E prior           = 1/2 E|x_T|^2 / S^2 + d/2 log(S^2 / sigma_T^2) - d/2
    E diffusion       = h_eps - h_T + d log(sigma_T / sigma_eps)
    E reconstruction  = 1/2 (d - sigma_eps^2 J_eps) + d/2 log(2 pi rho_eps^2)

If delta is added to the score, the diffusion term increases by 1/2 integral g^2 E|delta(x_t)|^2 dt.
The loss at t is then 1/2 w [d - sigma^2 J + sigma^2 E|delta(x_t)|^2], where w is 1 or g^2/sigma^2.
It has its minimum at the true score, so its slope along delta is zero there; the slope is measured
in units of the loss that delta adds. Near t = 0, p_0 follows from p_eps by the heat equation in
rho^2: with y = x_eps / alpha, whose score is s_y(y) = alpha s(alpha y, eps),

    log p_0(y) = log p_eps(alpha y) + d log alpha - 1/2 rho^2 (div s_y + |s_y|^2) + O(rho^4).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate, special, stats

from sbml import losses
from sbml.audit import oracle
from sbml.audit.oracle import coefficients
from sbml.audit.table import EPS, Row, row
from sbml.core.types import Array, Key, Score
from sbml.likelihood import Likelihood, bound, ode, ode_logp
from sbml.score import divergence
from sbml.score.divergence import Trace
from sbml.sdes import SDE, times

# Every function here runs once, so most of the time is compilation: compile without optimization.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NODES = 96  # Gauss-Legendre nodes over the range of log-SNR.


class Case(NamedTuple):
    """A distribution of x_0 with its known properties.

    Attributes:
      kind: the name of the distribution in the table.
      data: its score and density at every time (``sbml.audit.oracle``).
      points: x_0 ``(n, d)``, z ``(n, d)`` and weights ``(n,)``; sums over them with these weights
        give expectations over x_0 and z.
      mean, cov: mean ``(d,)`` and covariance ``(d, d)`` of x_0.
      information: a function of t that returns the entropy h (nats) and the Fisher information J
        of x_t.
    """

    kind: str
    data: Any
    points: tuple[Array, Array, Array]
    mean: np.ndarray
    cov: np.ndarray
    information: Callable[[float], tuple[float, float]]


# Distributions of x_0.


def sigma_points(data: oracle.Gaussian) -> tuple[Array, Array]:
    """x_0 ``(4d, d)`` and z ``(4d, d)`` whose plain average of any quadratic form in (x_0, z) is
    its expectation under x_0 ~ N(mean, cov), z ~ N(0, I). In coordinates in which both are N(0, I),
    they are the 4d points +-sqrt(2 d) e_i."""
    d = data.mean.size
    points = np.sqrt(2 * d) * np.concatenate([np.eye(2 * d), -np.eye(2 * d)])
    x = data.mean[None] + points[:, :d] * jnp.sqrt(data.eigenvalues)[None] @ data.basis.T
    return x, jnp.asarray(points[:, d:])


def gaussian_case(sde: SDE) -> Case:
    """A correlated Gaussian in three dimensions; sigma points are exact for quadratic forms."""
    data = oracle.gaussian(sde)
    x, z = sigma_points(data)

    def information(t: float) -> tuple[float, float]:
        v = np.asarray(data.variances(jnp.asarray(t, float)))
        return 0.5 * float(np.sum(np.log(2 * np.pi * np.e * v))), float(np.sum(1 / v))

    points = (x, z, jnp.full(len(x), 1 / len(x)))
    return Case("Gaussian", data, points, np.asarray(data.mean), np.asarray(data.cov), information)


LINE = np.linspace(-9, 9, 73)


def mixture_case(sde: SDE, line: np.ndarray = LINE) -> Case:
    """Three Gaussians on a line; trapezoids over the plane of (x_0, z) converge exponentially."""
    data = oracle.mixture(sde, 1)
    weights, means, variances = (
        np.asarray(a).ravel() for a in (data.weights, data.parts.mean, data.parts.eigenvalues)
    )
    a, z = (axis.ravel() for axis in np.meshgrid(line, line))
    density = np.exp(-0.5 * (a**2 + z**2))
    x = np.concatenate([m + math.sqrt(v) * a for m, v in zip(means, variances, strict=True)])
    each = np.concatenate([w * density / density.sum() for w in weights])
    points = (jnp.asarray(x[:, None]), jnp.asarray(np.tile(z, 3)[:, None]), jnp.asarray(each))

    def information(t: float) -> tuple[float, float]:
        alpha, sigma = coefficients(sde, t)
        m, v = alpha * means, alpha**2 * variances + sigma**2
        x = np.linspace((m - 12 * np.sqrt(v)).min(), (m + 12 * np.sqrt(v)).max(), 20_001)
        parts = weights * stats.norm.pdf(x[:, None], m, np.sqrt(v))
        p, slope = parts.sum(1), np.sum(-parts * (x[:, None] - m) / v, 1)
        fisher = integrate.trapezoid(slope**2 / p, x)
        return float(integrate.trapezoid(-special.xlogy(p, p), x)), float(fisher)

    mean = np.sum(weights * means)
    cov = np.sum(weights * (variances + means**2)) - mean**2
    return Case("mixture", data, points, mean[None], cov[None, None], information)


# Checks of the bound and the loss.


def expected_bound(case: Case, sde: SDE, eps: float) -> tuple[float, float]:
    """Expectations of the prior term and of the whole bound, by the formulas above.

    The diffusion ends at the SDE's largest time; from there to ``sde.T``, x is scaled by the ratio
    of the two sigmas.
    """
    d = len(case.mean)
    (alpha_0, sigma_0), (alpha_1, sigma_1), (_, sigma) = (
        coefficients(sde, t) for t in (eps, sde.largest_time, sde.T)
    )
    (h_0, fisher), (h_1, _) = (case.information(t) for t in (eps, sde.largest_time))
    s2 = (sde.prior_std * sigma_1 / sigma) ** 2
    second = alpha_1**2 * (np.trace(case.cov) + np.sum(case.mean**2)) + d * sigma_1**2
    prior = 0.5 * (second / s2 + d * math.log(s2 / sigma_1**2) - d)
    constant = 0.5 * d * math.log(2 * math.pi * (sigma_0 / alpha_0) ** 2)
    diffusion = h_0 - h_1 + d * math.log(sigma_1 / sigma_0)
    return prior, prior + diffusion + 0.5 * (d - sigma_0**2 * fisher) + constant


def bound_rows(name: str, sde: SDE, case: Case) -> Iterator[Row]:
    """The terms of the bound, the gap and the loss of a wrong score, and the loss's slope at the
    true score."""
    d, rng = len(case.mean), np.random.default_rng(0)
    a, b = 0.3 * rng.normal(size=(d, d)), 0.3 * rng.normal(size=d)
    proposal = times.Importance(sde, EPS)

    @jit
    def expectations(
        data: Any, points: tuple[Array, Array, Array], a: Array, b: Array
    ) -> dict[str, Array]:
        """Terms of the bound, its change by delta(x) = a x + b, and the loss along delta."""
        legendre = np.polynomial.legendre.leggauss(NODES)  # Nodes in [-1, 1] and weights.
        u, node_weights = jnp.asarray(0.5 * legendre[0] + 0.5), jnp.asarray(0.5 * legendre[1])
        x, z, weights = points
        t, time_weights = proposal.at(u)

        def mean(term: Callable[..., Array], score: Score, t: Array) -> Array:
            return jax.vmap(lambda x, z: term(score, sde, x, t, z), out_axes=-1)(x, z) @ weights

        def diffusion(term: Callable[..., Array], score: Score) -> Array:
            values = jax.vmap(lambda t: mean(lambda *args: term(*args, None), score, t))(t)
            return proposal.normaliser * (values @ node_weights)

        def off_by(scale: Array) -> Score:
            return lambda x, t, key: data.score(x, t) + scale * (a @ x + b)

        def losses_at(scale: Array) -> Array:
            """The loss of every weighting at every node, ``(2, NODES)``."""

            def term(score: Score, sde: SDE, x: Array, t: Array, z: Array) -> Array:
                s = score(losses.perturb(sde, x, t, z), t, None)
                return jnp.stack([losses.residual(sde, s, t, z, w) for w in losses.WEIGHTINGS])

            return jax.vmap(lambda t: mean(term, off_by(scale), t), out_axes=-1)(t)

        scales = jnp.arange(2.0)
        dsm = jax.vmap(lambda scale: diffusion(bound.diffusion_dsm, off_by(scale)))(scales)
        each = jax.vmap(lambda s: jax.jvp(losses_at, (s,), (jnp.ones(()),)))(scales)
        loss_values, slopes = (values @ (node_weights * time_weights) for values in each)
        return {
            "prior": jax.vmap(lambda x: bound.prior_kl(sde, x))(x) @ weights,
            "dsm": dsm[0],
            "ssm": diffusion(bound.diffusion_ssm, data.score),
            "decoder": mean(bound.noise_error, data.score, jnp.asarray(EPS)),
            "gap": dsm[1] - dsm[0],
            "t": t,
            "loss": each[0][1],
            "slope": slopes[0] / (loss_values[1] - loss_values[0]),
        }

    @jit
    def known(t: Array) -> tuple[Array, Array, Array]:
        """sigma^2, g^2 and E|a x_t + b|^2 at the times ``t``."""
        alpha, variance = sde.mean_coef(t), sde.std(t) ** 2
        of_x = np.trace(a @ case.cov @ a.T) + np.sum((a @ case.mean) ** 2)
        squared = alpha**2 * of_x + 2 * alpha * (b @ a @ case.mean) + np.sum(b**2)
        return variance, sde.diffusion(t) ** 2, squared + variance * np.sum(a**2)

    got = expectations(case.data, case.points, jnp.asarray(a), jnp.asarray(b))
    alpha_0, sigma_0 = coefficients(sde, EPS)
    prior, truth = expected_bound(case, sde, EPS)
    constant = 0.5 * d * math.log(2 * math.pi * (sigma_0 / alpha_0) ** 2)
    yield row(f"prior KL, {case.kind}", name, got["prior"], prior, 1e-8)
    for form in ("dsm", "ssm"):
        total = got["prior"] + got[form] + got["decoder"] + constant
        yield row(f"bound, {form}, {case.kind}", name, total, truth, 1e-8)
    # The coordinate sqrt(t) makes the integrand smooth near 0, but for ``beta_schedule`` it has a
    # thousand kinks: hence the many pieces.
    edges = np.linspace(math.sqrt(EPS), math.sqrt(sde.largest_time), 20_001)
    legendre, weights = np.polynomial.legendre.leggauss(4)
    widths = 0.5 * np.diff(edges)
    u = edges[:-1, None] + widths[:, None] * (legendre + 1)
    _, g2, squared = (np.asarray(each) for each in known(jnp.asarray(u**2)))
    gap = widths @ (u * g2 * squared) @ weights
    yield row(f"gap of a wrong score, {case.kind}", name, got["gap"], gap, 1e-9)
    variance, g2, squared = (np.asarray(each) for each in known(got["t"]))
    information = np.array([case.information(t)[1] for t in np.asarray(got["t"])])
    at_one = 0.5 * (d + variance * (squared - information))
    rates = {"likelihood": g2 / variance, "original": 1.0}
    for weighting, value in zip(losses.WEIGHTINGS, got["loss"], strict=True):
        title = f"loss of a wrong score, {weighting}, {case.kind}"
        yield row(title, name, value, rates[weighting] * at_one, 1e-8)
    for weighting, slope in zip(losses.WEIGHTINGS, got["slope"], strict=True):
        yield row(f"loss's slope, {weighting}, {case.kind}", name, slope, 0.0, 1e-9)


# Likelihood.


def likelihood_rows(name: str, sde: SDE) -> Iterator[Row]:
    """Checks of the probability-flow ODE.

    For a Gaussian, the ODE keeps each eigencoordinate at the same number of standard deviations
    from the mean. This gives the latent and then log p, with the prior in place of p_T. For a
    mixture, the check is that the density changes along the solution as the ODE says."""
    solver = ode.Solver(rtol=1e-8, atol=1e-8)

    @jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def likelihoods(data: oracle.Mixture, x: Array) -> tuple[Likelihood, Array, Array]:
        """ODE likelihoods of x, exact log p_eps of x, and exact log p_T of its latents."""
        result = ode_logp(data.score, sde, x, None, eps=EPS, trace=Trace("exact"), solver=solver)
        last = data.logp(result.z / sde.stretch, jnp.asarray(sde.largest_time, float))
        last = last - x.size * jnp.log(sde.stretch)
        return result, data.logp(x, jnp.asarray(EPS)), last

    x = np.random.default_rng(0).normal(size=(4, 3)) * 0.5
    data = oracle.gaussian(sde)
    ends = jnp.asarray(EPS), jnp.asarray(sde.largest_time, float)
    sigma_1, sigma = (coefficients(sde, t)[1] for t in (sde.largest_time, sde.T))
    z = sigma / sigma_1 * np.asarray(jax.vmap(lambda x: data.flow(x, *ends))(jnp.asarray(x)))
    v_0, v_1 = (np.asarray(data.variances(t)) for t in ends)
    log_det = np.log(sigma / sigma_1 * np.sqrt(v_1 / v_0)).sum()
    truth = stats.norm(0, sde.prior_std).logpdf(z).sum(1) + log_det
    result, _, _ = likelihoods(oracle.as_mixture(data), jnp.asarray(x))
    yield row("ODE log p, Gaussian", name, result.logp, truth, 1e-5)
    result, log_p, log_p_latent = likelihoods(oracle.mixture(sde), jnp.asarray(x))
    got = result.divergence + result.correction + log_p_latent
    yield row("ODE log p, mixture", name, got, log_p, 1e-5)


def probe_rows(name: str, sde: SDE) -> Iterator[Row]:
    """Rademacher probes of the ODE's velocity, where they give the exact divergence
    d f + 1/2 g^2 sum_i 1 / (alpha^2 l_i + sigma^2).

    For independent entries, one probe gives it. For correlated entries, the mean over n probes
    gives it, if n is a power of two and not smaller than the number of entries."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=3))
    grid = np.array([EPS, 0.01, 0.3, sde.largest_time])
    keys = jax.random.split(jax.random.key(0), len(grid))

    @functools.partial(jit, static_argnums=3)
    @functools.partial(jax.vmap, in_axes=(None, 0, 0, None))
    def probed(data: oracle.Gaussian, t: Array, key: Key, trace: Trace) -> tuple[Array, ...]:
        def field(x: Array) -> Array:
            return ode.velocity(data.score, sde, x, t)

        vs = trace.directions(key, x.shape)
        combined = trace.combined(divergence.quadratic_forms(field, x, vs)[1])
        return combined, divergence.hutchinson(field, x, vs)[1], sde.drift_coef(t), sde.diffusion(t)

    for title, data, count in (
        ("one Rademacher probe, diagonal", oracle.diagonal(sde), 1),
        ("four Rademacher probes, correlated", oracle.gaussian(sde), 4),
    ):
        *found, f, g = probed(data, jnp.asarray(grid), keys, Trace("rademacher", count))
        v = np.asarray([data.variances(jnp.asarray(t)) for t in grid])
        truth = x.size * f + 0.5 * g**2 * np.sum(1 / v, axis=1)
        yield row(title, name, np.stack(found), truth[None], 1e-10)


def correction_rows(name: str, sde: SDE, case: Case) -> Iterator[Row]:
    """log p_0 from p_eps at rho = 1e-3; no row for an SDE whose noise is never that small."""
    t = sde.time(-2 * jnp.log(jnp.asarray(1e-3)))
    if not t > 0:
        return
    alpha, sigma = coefficients(sde, float(t))

    @jit
    @jax.vmap
    def both(y: Array) -> tuple[Array, Array]:
        s, div = divergence.exact(lambda y: alpha * case.data.score(alpha * y, t), y)
        log_p = case.data.logp(alpha * y, t) + y.size * math.log(alpha)
        correction = 0.5 * (sigma / alpha) ** 2 * (div + jnp.sum(s**2))
        return log_p - correction, case.data.logp(y, jnp.zeros(()))

    y = np.random.default_rng(2).normal(size=(5, len(case.mean)))
    got, truth = both(jnp.asarray(case.mean + y * np.sqrt(np.diag(case.cov))))
    yield row(f"epsilon-correction, {case.kind}", name, got, truth, 1e-7)


def proposal_rows(name: str, sde: SDE) -> Iterator[Row]:
    """The weight of every proposal in units of |dt/du|, and the first and the last time."""
    u, ends = (jnp.arange(16) + 0.5) / 16, [EPS, sde.largest_time]

    for label, kind in times.PROPOSALS.items():
        proposal = kind(sde, EPS)

        slope = jit(jax.vmap(jax.jacfwd(lambda u, at=proposal.at: at(u)[0])))(u)
        first_and_last, _ = proposal.at(jnp.array([0.0, 1.0]))
        ratio = proposal.at(u)[1] / jnp.abs(slope)
        got = np.append(ratio, np.sort(first_and_last))
        truth = np.append(np.ones(len(u)), ends)
        yield row(f"weights of the proposal {label}", name, got, truth, 1e-8)


def continuous_checks(name: str, sde: SDE) -> Iterator[Row]:
    """All rows of one SDE."""
    for case in (gaussian_case(sde), mixture_case(sde)):
        yield from bound_rows(name, sde, case)
        yield from correction_rows(name, sde, case)
    yield from likelihood_rows(name, sde)
    yield from probe_rows(name, sde)
    yield from proposal_rows(name, sde)
