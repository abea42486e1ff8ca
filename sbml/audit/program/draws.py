"""Checks of what estimators and losses draw, and of their error bars: ``--mode=verify``.

A proposal maps u in [0, 1) to a time t and a weight, the inverse of the density of t. So the weight
is |dt/du|. Most of the other rows are sums over points that integrate exactly.

The loss of the second order is w r^2 / (2 d) with r = sigma^2 div s + d - |e|^2, e = sigma s + z.
For independent normal x_0 and a score that is linear in each entry, the entries of e are
independent and normal. With their means m_i and variances v_i, and c = sigma^2 div s + d,

    E 1/2 w |e|^2 = 1/2 w sum_i (v_i + m_i^2),
    E r^2 = (c - sum_i (v_i + m_i^2))^2 + sum_i (2 v_i^2 + 4 m_i^2 v_i).
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from sbml import intervals, second_order, times
from sbml.audit.program import oracle
from sbml.audit.program.oracle import coefficients
from sbml.audit.program.table import EPS, Row, jit, row
from sbml.dequantizers import truncated_normal
from sbml.sdes import SDE
from sbml.types import Array, Key


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


def lattice_rows(name: str) -> Iterator[Row]:
    """Each point of a lattice is uniform in its column, and each cell has one point.

    For v uniform on [0, 1), E v = 1/2 and E v^2 = 1/3.
    """
    n, draws, keys = 5, 3, jax.random.split(jax.random.key(0), 4096)
    u = np.asarray(jit(jax.vmap(lambda key: times.lattice(key, n, draws)))(keys))
    v = draws * u - np.arange(draws)
    means = np.stack([f.mean((1, 2)) for f in (v, v**2)])
    tolerance = 5 * float(means.std(1).max()) / math.sqrt(len(keys))
    yield row("points of a lattice", name, means.mean(1), [1 / 2, 1 / 3], tolerance)
    cells = np.sort(np.floor(n * draws * u).reshape(len(keys), -1))
    yield row("cells of a lattice", name, cells, np.arange(n * draws)[None], 0.0)


def warp_rows(name: str) -> Iterator[Row]:
    """E_u [v^p / q(v)] = 1 / (p + 1): the inverse of q's distribution function is linear between
    the masses of q's bins, where Gauss-Legendre nodes are exact."""
    density, powers = np.array([0.5, 2.0, 1.2, 0.3]), np.arange(4)
    masses = density / density.sum()
    nodes, weights = np.polynomial.legendre.leggauss(4)
    start = np.cumsum(masses) - masses
    u = (start[:, None] + masses[:, None] * (nodes + 1) / 2).ravel()
    v, inverse = (np.asarray(a) for a in times.warp(jnp.asarray(u), jnp.asarray(density)))
    got = (v ** powers[:, None] * inverse) @ (masses[:, None] * weights / 2).ravel()
    yield row("points with a density", name, got, 1 / (powers + 1), 1e-12)


def loss_rows(name: str, sde: SDE) -> Iterator[Row]:
    """Losses of the first and second order in a batch, for 1.3 times the true score and the
    likelihood weighting."""
    data, n, time, scale = oracle.diagonal(sde), 2**16, 0.3, 1.3
    mean, variances = np.asarray(data.mean), np.asarray(data.eigenvalues)
    x = mean + np.sqrt(variances) * np.random.default_rng(0).normal(size=(n, len(mean)))
    keys, t = jax.random.split(jax.random.key(1), n), jnp.full(n, time)

    def score(x: Array, t: Array, key: Key | None) -> Array:
        return scale * data.score(x, t)

    @jit
    def found(x: Array) -> tuple[Array, Array]:
        return second_order.dsm_batch(score, sde, x, t, keys)

    alpha, sigma = coefficients(sde, time)
    v = alpha**2 * variances + sigma**2
    of_e = (1 - scale * sigma**2 / v) ** 2 + (scale * sigma * alpha / v) ** 2 * variances
    r = -scale * sigma**2 * np.sum(1 / v) + len(v) - of_e.sum()
    expected = 0.5 * of_e.sum(), (r**2 + 2 * np.sum(of_e**2)) / (2 * len(v))
    rate = float(sde.diffusion(jnp.asarray(time))) ** 2 / sigma**2
    for order, values, truth in zip(
        ("first", "second"), found(jnp.asarray(x)), expected, strict=True
    ):
        each = np.asarray(values) / (rate * truth)
        tolerance = 5 * float(each.std()) / math.sqrt(n)
        title = f"loss of {order} order in units of its expectation"
        yield row(title, name, each.mean(), 1.0, tolerance)


def density_rows(name: str) -> Iterator[Row]:
    """log q(u) of the truncated normal dequantizer, for bins whose halves are 3 standard deviations
    and 1 standard deviation of the noise wide."""
    pixels, keys = jnp.zeros((1, 3, 1), int), jax.random.split(jax.random.key(0), 16)
    for tau in (3.0, 1.0):
        model = truncated_normal.Model(tau)
        u, log_q = jit(jax.vmap(lambda key, model=model: model.sample({}, pixels, key)))(keys)
        # u = 1/2 + e / (2 tau)
        each = stats.truncnorm(-tau, tau, 0.5, 1 / (2 * tau)).logpdf(np.asarray(u))
        yield row(f"truncated_normal, log q, tau={tau:g}", name, log_q, each.sum((1, 2, 3)), 1e-10)


def interval_rows(name: str) -> Iterator[Row]:
    """Error bars of means of normal draws, and of two draws that are each +-s with equal
    probability: all four pairs give the standard error s / sqrt(n), with 4 degrees of freedom."""
    s, n, count, size = 0.3, 20, 4000, 6
    first, second = s * np.array([[1, 1, -1, -1], [1, -1, 1, -1]])
    found = intervals.repeated_stderr(first, second, n)
    yield row("noise of two draws", name, found, [s / math.sqrt(n), 4], 1e-12)
    draws = np.random.default_rng(0).normal(size=(count, size))
    ends = np.array([intervals.mean_interval(each).bounds for each in draws])
    covered = np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0))
    tolerance = 5 * math.sqrt(0.95 * 0.05 / count)
    yield row("coverage of the 95% interval of a mean", name, covered, 0.95, tolerance)


def shared_rows(name: str, sde: SDE) -> Iterator[Row]:
    """The rows that do not depend on the SDE, and those for which one SDE is enough."""
    for rows in (lattice_rows, warp_rows, density_rows, interval_rows):
        yield from rows(name)
    yield from loss_rows(name, sde)
