"""From uint8 images to itemised bits/dim: the estimators an evaluation chooses from.

    ode         -log p_eps(x) by the probability-flow ODE:  prior + divergence + correction
    bound       the evidence bound on -log p(x):            prior + diffusion + reconstruction
    bound_ssm   the same bound, its diffusion term by sliced or exact score matching (eval.trace)

All of x = 2 (k + u) / L - 1, so all also hold ``dequantization`` (log q of u) and ``scale``
(log2(L / 2), the change of variables); the terms add up to the bits/dim of the integers k. With K
draws of u, w_i = log p(x_i) - log q(u_i) and normalised weights W_i ~ exp(w_i),

    -log (1/K) sum_i exp(w_i) = sum_i W_i (-w_i) + [log K + sum_i W_i log W_i]

so every term is the W-average of the draws' terms, and the bracket is the term ``importance`` (a
divergence of W from 1/K, at least 0). It needs exact densities: with noise in w the logarithm of
the mean is too good by half the noise's variance.

The bounds of ``sbml.discrete`` hold for the integers at once: they need no further terms.
Every draw is keyed by (sweep, image id): the batch changes nothing.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sbml import bits, bound, discrete, likelihood
from sbml.bound import GaussianControl
from sbml.discrete import CATEGORICAL, TRUNCATED_NORMAL
from sbml.divergence import Trace
from sbml.ode import Solver
from sbml.sdes import SDE
from sbml.types import Array, Key, Score

# The terms of each estimator, in bits/dim; ``scale`` is added on the host, in float64.
TERMS = {
    "ode": ("prior", "divergence", "correction", "dequantization", "importance", "scale"),
    "bound": ("prior", "diffusion", "reconstruction", "dequantization", "scale"),
    "bound_ssm": ("prior", "diffusion", "reconstruction", "dequantization", "scale"),
}
FORMS = {"bound": "dsm", "bound_ssm": "ssm"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the table: an estimator, a dequantizer and K draws of it."""

    estimator: str
    dequantizer: str
    num_importance: int = 1

    @property
    def name(self) -> str:
        """As columns and progress bars call it."""
        draws = f"_k{self.num_importance}" if self.num_importance > 1 else ""
        return f"{self.estimator}_{self.dequantizer}{draws}"

    @property
    def terms(self) -> tuple[str, ...]:
        """What its bits/dim is the sum of."""
        return TERMS[self.estimator]

    @property
    def is_bound(self) -> bool:
        """Whether it is an expectation over times, to be swept."""
        return self.estimator in FORMS

    @property
    def undefined(self) -> str:
        """Why there is no such number; empty if there is."""
        if self.estimator == "ode" and self.dequantizer == CATEGORICAL:
            return "the categorical decoder is part of a bound: there is no density to solve for"
        if self.estimator == "bound_ssm" and self.dequantizer in (CATEGORICAL, TRUNCATED_NORMAL):
            return "the bounds on integers themselves are in the dsm form only"
        if self.is_bound and self.num_importance > 1:
            return (
                "a bound is itself an expectation: the logarithm of a mean of K noisy draws of it "
                "bounds nothing (use the ode estimator with the exact trace)"
            )
        return ""


def _averaged(each: dict[str, Array]) -> dict[str, Array]:
    """The W-average of K draws' terms ``(K,)`` and ``importance``, log K + sum W log W; nats.

    A draw of no weight, as one of density 0, adds nothing, though a term of it is infinite.
    """
    log_weights = jax.nn.log_softmax(-sum(each.values()))
    weights = jnp.exp(log_weights)

    def average(term: Array) -> Array:
        return jnp.sum(jnp.where(weights == 0, 0, weights * term))

    terms = {name: average(term) for name, term in each.items()}
    return {**terms, "importance": average(log_weights) + math.log(len(weights))}


def draw_key(seed: Array, sweep: Array, i: Array) -> Key:
    """The key of all draws of example ``i`` in one sweep."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sweep), i)


@functools.partial(
    jax.jit, static_argnames=("dequantizer", "sde", "levels", "eps", "trace", "num_importance")
)
def ode(
    score: Score,
    params: Any,
    pixels: Array,
    ids: Array,
    sweeps: Array,
    seed: Array,
    solver: Solver,
    *,
    dequantizer: Any,
    sde: SDE,
    levels: int,
    eps: float,
    trace: Trace,
    num_importance: int = 1,
) -> dict[str, Array]:
    """Terms ``(n,)`` in bits/dim, and ``nfe``, of uint8 ``pixels (n, *s)``.

    Args:
      score: a score of one example.
      params: the dequantizer's.
      pixels, ids, sweeps: a row each; (sweep, id) keys its draws.
      seed: of all draws.
      solver: of the ODE; its tolerances may change without another compilation.
      dequantizer: a ``Model`` of ``sbml.dequantizers``.
      sde, levels, eps, trace: as for ``likelihood.ode_logp``.
      num_importance: K.

    Raises:
      ValueError: for K > 1 without the exact trace.
    """
    if num_importance > 1 and trace.kind != "exact":
        raise ValueError(
            f"num_importance={num_importance} with a {trace.kind} trace: the noise of the probes "
            "makes the logarithm of the mean too good; use the exact trace"
        )

    def draw(pixels: Array, key: Key) -> tuple[dict[str, Array], Array]:
        u_key, trace_key = jax.random.split(key)
        u, log_q = dequantizer.sample(params, pixels, u_key)
        x = bits.to_model(pixels, u, levels)
        if dequantizer.at_noise:
            x = sde.mean_coef(jnp.asarray(eps)) * x
        found = likelihood.ode_logp(score, sde, x, trace_key, eps=eps, trace=trace, solver=solver)
        terms = {name: -getattr(found, name) for name in ("prior", "divergence", "correction")}
        terms["dequantization"] = log_q
        return terms, found.stats.nfe

    def one(pixels: Array, i: Array, sweep: Array) -> dict[str, Array]:
        key = draw_key(seed, sweep, i)
        if num_importance == 1:
            terms, nfe = draw(pixels, key)
            terms["importance"] = jnp.zeros(())
        else:
            keys = jax.random.split(key, num_importance)
            each, evaluations = jax.lax.map(lambda k: draw(pixels, k), keys)
            terms, nfe = _averaged(each), jnp.sum(evaluations)
        return {**_in_bits(terms, pixels), "nfe": nfe}

    return jax.vmap(one)(pixels, ids, sweeps)


@functools.partial(
    jax.jit, static_argnames=("dequantizer", "sde", "levels", "eps", "form", "proposal", "trace")
)
def evidence_bound(
    score: Score,
    params: Any,
    pixels: Array,
    ids: Array,
    sweeps: Array,
    seed: Array,
    u: Array,
    control: GaussianControl | None,
    density: Array | None,
    *,
    dequantizer: Any,
    sde: SDE,
    levels: int,
    eps: float,
    form: str = "dsm",
    proposal: str = "importance",
    trace: Trace = Trace(),
) -> dict[str, Array]:
    """Terms ``(n,)`` in bits/dim, and ``nfe``; times are at ``u (n, draws)`` in [0, 1).

    ``dequantizer`` is a ``Model`` of ``sbml.dequantizers`` or None for the categorical decoder;
    ``control``, ``density``, ``form``, ``proposal`` and ``trace`` are those of ``bound.elbo``, the
    others those of :func:`ode`.
    """

    def one(pixels: Array, i: Array, sweep: Array, u: Array) -> dict[str, Array]:
        u_key, key = jax.random.split(draw_key(seed, sweep, i))
        drawn = {"control": control, "density": density, "proposal": proposal}
        sampled: dict[str, Any] = {"eps": eps, "u": u, **drawn}
        if dequantizer is None or dequantizer.at_noise:
            kind = CATEGORICAL if dequantizer is None else TRUNCATED_NORMAL
            terms = discrete.elbo(score, sde, pixels, key, kind=kind, levels=levels, **sampled)
            log_q, nfe = jnp.zeros(()), u.size
        else:
            v, log_q = dequantizer.sample(params, pixels, u_key)
            x = bits.to_model(pixels, v, levels)
            terms = bound.elbo(score, sde, x, key, form=form, trace=trace, **sampled)
            nfe = u.size + 1
        named = {**terms._asdict(), "dequantization": log_q}
        return {**_in_bits(named, pixels), "nfe": jnp.asarray(nfe)}

    return jax.vmap(one)(pixels, ids, sweeps, u)


def _in_bits(terms: dict[str, Array], pixels: Array) -> dict[str, Array]:
    return {name: bits.nats_to_bits(term, pixels.shape) for name, term in terms.items()}


def scale(
    cell: Cell, sde: SDE, eps: float, at_noise: bool, shape: tuple[int, ...], levels: int
) -> float:
    """The term ``scale`` in bits/dim: log2(L / 2), less log2 alpha(eps) where x is scaled by it."""
    if cell.is_bound and at_noise:
        return 0.0
    nats = bits.scale_nats(shape, levels)
    if at_noise:
        nats -= math.prod(shape) * math.log(float(sde.mean_coef(jnp.asarray(eps))))
    return bits.nats_to_bits(nats, shape)
