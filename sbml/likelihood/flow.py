"""The log-likelihood of the probability-flow ODE, in nats.

Along dx/dt = v(x, t) from t = eps to T (instantaneous change of variables, Chen et al. 2018),

    log p_eps(x) = log pi(z) + integral_eps^T div v(x(t), t) dt,      z = x(T),

where v is the velocity of the ODE (``sbml.ode``) and pi = N(0, S^2 I) the prior, where S
is ``sde.prior_std``. Along any other curve c from x,
d/dt log p_t(c) = -div v + (dc/dt - v) . grad log p_t(c), so there is one more term, in which s is
the score:

    log p_eps(x) = log pi(c(T)) + integral div v(c, t) dt - integral (dc/dt - v(c, t)) . s(c, t) dt.

The path that the solver computes is such a curve. The last term, the correction, removes the error
of this path: exactly if s is the gradient of log p_t, otherwise up to the relative error of s. The
divergence, the expensive part, is evaluated three times in eight (``sbml.quadrature``). It is
exact, or Hutchinson's estimate with probes that are drawn once for each solve: with new probes at
every point, the result would depend on how rounding changes the times of the steps.

The ODE ends at T or, if alpha(T) = 0, at the time that ``sbml.ode`` states. From there x is scaled
to T.

*The error of the prior.* Even if the score is exact, the result differs from log p_eps(x) by
log pi(z) - log p_T(z), whose mean over x from p_eps is -KL(p_T || pi). For data N(m, diag(c)), with
alpha and sigma at T and the prior's standard deviation S, KL(p_T || pi) is

    1/2 sum_i [(alpha^2 (c_i + m_i^2) + sigma^2) / S^2 - 1 - log((alpha^2 c_i + sigma^2) / S^2)].

The error of one example has either sign. Its standard deviation is sqrt(2 KL), as for any two
distributions that are close to each other, and about alpha |m| / S nats: for |m| = 1 it is 0.007
with ``VP``, 0.02 with ``VE`` up to sigma = 50, and 0.08 with ``LinearGamma`` up to a log-SNR of -5.
A larger ``beta_max``, ``sigma_max`` or ``gamma_1`` makes it smaller, if the score knows this noise.
If the ODE ends before T, p_T is the distribution of the scaled x: alpha and sigma are then those of
the end, times the same factor.

In the other direction, from a latent z at T to the sample x at eps, the curve has the same two
integrals, so one solve gives a sample and its log p (:func:`sbml.likelihood.sample_logp`).

Reference: Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021, appendix D.2.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sbml.core.door import checked
from sbml.core.scalars import Number, notation
from sbml.core.types import Elementwise, Example, Key, Scalar, Score, in_full_precision
from sbml.likelihood import ode
from sbml.likelihood.ode import Solver, Stats
from sbml.score.divergence import Trace
from sbml.sdes import SDE


class Likelihood(NamedTuple):
    """log p = prior + divergence + correction in nats, the latent and the solver's stats.

    The fields before ``z`` are the terms. Estimators and ``Density`` add up all of them by their
    names, so a further term is one more field before ``z``, which ``_along_ode`` computes.

    Attributes:
      prior: log pi(z).
      divergence: the integral of div v along the solver's path.
      correction: the first-order estimate that removes the path's error.
      z: the latent ``(*s)``, the end of the path.
      stats: the cost of the solve, and whether it succeeded.
    """

    prior: Scalar
    divergence: Scalar
    correction: Scalar
    z: Example
    stats: Stats

    @property
    def terms(self) -> dict[str, Elementwise]:
        """The terms by their names."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def logp(self) -> Elementwise:
        """The sum of the terms."""
        return sum(self[1:-2], start=self[0])


TERMS = Likelihood._fields[:-2]


class PriorError(NamedTuple):
    """The error of log p_eps because the prior pi takes the place of p_T.

    Attributes:
      mean: KL(p_T || pi), which is minus the mean error over the data.
      each: sqrt(2 KL), about the standard deviation of one example's error.
    """

    mean: float
    each: float

    def line(self, unit: str) -> str:
        """The error in ``unit``, as a line of its own below the number."""
        return (
            f"\n    error of the prior: {notation(self.mean, '.2g')} {unit} in the mean, "
            f"KL(p_T || pi), and about {notation(self.each, '.2g')} in one example"
        )


def prior_error(
    sde: SDE,
    mean: Float[np.ndarray, " d"],
    variances: Float[np.ndarray, " d"],
    last: Number | None = None,
) -> PriorError:
    """The prior's error in nats for data N(m, diag(c)), with m = ``mean`` and c = ``variances``, of
    an ODE that ends at the time ``last``, by default T.

    Only the first two moments of other data matter, up to higher orders of alpha(T) / sigma(T).
    """
    end = jnp.asarray(sde.T if last is None else last, float)
    std = float(sde.prior_std) / float(ode.growth(sde, float(end), float(sde.T), end))
    alpha, sigma = float(sde.mean_coef(end)) / std, float(sde.std(end)) / std
    excess = alpha**2 * variances + sigma**2 - 1
    divergence = 0.5 * float(np.sum((alpha * mean) ** 2 + excess - np.log1p(excess)))
    return PriorError(divergence, math.sqrt(2 * max(divergence, 0.0)))


@checked
def ode_logp(
    score: Score,
    sde: SDE,
    x: Example,
    key: Key | None,
    *,
    eps: Number,
    trace: Trace = Trace(),
    solver: Solver = Solver(),
) -> Likelihood:
    """log p_eps(x) in nats for one example ``x`` of shape ``(*s)``; vmap over examples and keys.

    The prior pi takes the place of p_T; the docstring of this module says what this changes. All
    terms are NaN if the solver gave up.

    Args:
      score: a score of one example, called deterministically (with key None).
      sde: the forward process.
      x: one example of continuous data (dequantize integers first).
      key: for the random probes; None for an exact trace.
      eps: the smallest time, where the solve starts.
      trace: how the divergence is computed.
      solver: how the ODE is solved.
    """
    _, found = _along_ode(score, sde, x, key, eps, trace, solver)
    return found


@checked
def sample_logp(
    score: Score,
    sde: SDE,
    z: Example,
    key: Key | None,
    *,
    eps: Number,
    trace: Trace = Trace(),
    solver: Solver = Solver(),
) -> tuple[Example, Likelihood]:
    """The sample x_eps of the latent ``z (*s)``, and log p_eps of it, by one solve from T to eps.

    The arguments are those of :func:`ode_logp`, which gives the same terms for the sample, up to
    the error of the solver and, for a random trace, up to the noise of other probes. Sample and
    terms are NaN if the solver gave up.

    Raises:
      ValueError: if eps is not in (0, T), or there is no key to draw the probes.
    """
    return _along_ode(score, sde, z, key, eps, trace, solver, backwards=True)


def _along_ode(
    score: Score,
    sde: SDE,
    start: Example,
    key: Key | None,
    eps: Number,
    trace: Trace,
    solver: Solver,
    backwards: bool = False,
) -> tuple[Example, Likelihood]:
    """The end of the ODE from the data ``start`` to the latent or, ``backwards``, from the latent
    ``start`` to the data, and the likelihood of the data."""
    sde.check_time(eps)
    start, sign = in_full_precision(start), -1 if backwards else 1
    t0, t1 = (sde.T, eps) if backwards else (eps, sde.T)
    found = ode.flow(score, sde, start, t0, t1, solver, trace, key, backwards=backwards)
    z = start if backwards else found.x
    return found.x, Likelihood(
        prior=sde.prior_logp(z),
        divergence=sign * found.divergence,
        correction=sign * found.correction,
        z=z,
        stats=found.stats,
    )
