"""From uint8 images to itemised bits/dim: the estimators an evaluation chooses from.

    ode     -log p_eps(x) by the probability-flow ODE:  prior + divergence
    bound   the evidence bound on -log p(x):            prior + diffusion + reconstruction

Both of x = 2 (k + u) / L - 1 with u uniform, so both also hold ``dequantization`` (log q of u: 0
for uniform u) and ``scale`` (log2(L / 2), the change of variables); the terms add up to the
bits/dim of the integers k. Every draw is keyed by image id: the batch changes nothing.
"""

import functools

import jax
import jax.numpy as jnp

from sbml import bits, bound, likelihood, times
from sbml.bound import GaussianControl
from sbml.dequantizers import uniform
from sbml.likelihood import Trace
from sbml.ode import Solver
from sbml.sdes import SDE
from sbml.types import Array, Key, Score

# The terms of each estimator, in bits/dim; ``scale`` is added on the host, in float64.
TERMS = {
    "ode": ("prior", "divergence", "dequantization", "scale"),
    "bound": ("prior", "diffusion", "reconstruction", "dequantization", "scale"),
}


def _dequantized(pixels: Array, key: Key, levels: int) -> tuple[Array, Array]:
    """x in [-1, 1) and the term ``dequantization`` of one image."""
    u, log_q = uniform.Model().sample({}, pixels, key)
    return bits.to_model(pixels, u, levels), bits.nats_to_bits(log_q, pixels.shape)


@functools.partial(jax.jit, static_argnames=("sde", "levels", "eps", "trace", "solver"))
def ode(
    score: Score,
    pixels: Array,
    ids: Array,
    seed: Array,
    *,
    sde: SDE,
    levels: int,
    eps: float,
    trace: Trace,
    solver: Solver,
) -> dict[str, Array]:
    """Terms ``(n,)`` in bits/dim, and ``nfe``, of uint8 ``pixels (n, *s)`` with ``ids (n,)``."""
    base_key = jax.random.key(seed)

    def one(pixels: Array, i: Array) -> dict[str, Array]:
        u_key, trace_key = jax.random.split(jax.random.fold_in(base_key, i))
        x, dequantization = _dequantized(pixels, u_key, levels)
        result = likelihood.ode_logp(score, sde, x, trace_key, eps=eps, trace=trace, solver=solver)
        return {
            "prior": bits.nats_to_bits(-result.prior, x.shape),
            "divergence": bits.nats_to_bits(-result.divergence, x.shape),
            "dequantization": dequantization,
            "nfe": result.stats.nfe,
        }

    return jax.vmap(one)(pixels, ids)


@functools.partial(jax.jit, static_argnames=("sde", "levels", "eps", "draw", "n_times", "n_images"))
def evidence_bound(
    score: Score,
    pixels: Array,
    ids: Array,
    seed: Array,
    control: GaussianControl | None,
    *,
    sde: SDE,
    levels: int,
    eps: float,
    draw: str,
    n_times: int,
    n_images: int,
) -> dict[str, Array]:
    """Terms ``(n,)`` in bits/dim, and ``nfe``; times are drawn over all ``n_images`` at once."""
    base_key = jax.random.key(seed)
    u = times.DRAWS[draw](jax.random.fold_in(base_key, n_images), n_images, n_times)[ids]

    def one(pixels: Array, i: Array, u: Array) -> dict[str, Array]:
        u_key, key = jax.random.split(jax.random.fold_in(base_key, i))
        x, dequantization = _dequantized(pixels, u_key, levels)
        terms = bound.elbo(score, sde, x, key, eps=eps, u=u, control=control)
        named = {k: bits.nats_to_bits(v, x.shape) for k, v in terms._asdict().items()}
        nfe = jnp.asarray(n_times + 1)
        return {**named, "dequantization": dequantization, "nfe": nfe}

    return jax.vmap(one)(pixels, ids, u)
