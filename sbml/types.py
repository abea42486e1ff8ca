"""The vocabulary every module shares.

A *score* is any callable s(x, t, key) ~ grad_x log p_t(x) for **one** example: ``x`` of shape
``(*s)``, scalar ``t``, a key for stochastic layers (``None`` means deterministic), result of shape
``(*s)``. The mathematics asks for nothing else, so a Linen, NNX or Equinox module or a plain
function serves equally.

A score may also offer ``score.batch(x, t, key)`` for ``x`` of shape ``(n, *s)`` and ``t`` of shape
``(n,)``: the same function, evaluated on a batch at once. Reverse mode through a network called one
example at a time under ``vmap`` costs 1.2 to 1.3 times the batched call on CPU: training uses it.

A score may also offer ``score.predictions(x, t)``, the pair E[x_0 | x_t] and E[z | x_t] of x_t =
alpha x_0 + sigma z, each of shape ``(*s)``, if it knows both without dividing by alpha. The
probability-flow ODE of such a score is regular where alpha = 0.
"""

from collections.abc import Callable
from typing import Any

import jax

from sbml import compiler

Array = jax.Array
Key = jax.Array
Score = Callable[[Array, Array, Key | None], Array]


def of_shape(found: Array, x: Array) -> Array:
    """``found``, what a score returned for ``x``.

    Raises:
      ValueError: its shape is not that of ``x``; broadcasting would hide it.
      MiscompilationError: XLA for CPU computes sums wrongly (``sbml.compiler``).
    """
    compiler.check()
    if found.shape != x.shape:
        raise ValueError(f"the score returned shape {found.shape} for an input of {x.shape}")
    return found


def deterministic(score: Score, x: Array, t: Array) -> Array:
    """``score(x, t, None)``, shape ``(*s)``.

    Raises:
      ValueError: the score's shape is not that of ``x``.
    """
    return of_shape(score(x, t, None), x)


def predictor(score: Score) -> Callable[[Array, Array], tuple[Array, Array]] | None:
    """``score.predictions``, with shapes checked, or None where the score does not offer it."""
    inner: Any = score
    if isinstance(score, jax.tree_util.Partial) and not (score.args or score.keywords):
        inner = score.func  # A score that was wrapped only to be an argument of ``jit``.
    predictions = getattr(inner, "predictions", None)
    if predictions is None:
        return None

    def both(x: Array, t: Array) -> tuple[Array, Array]:
        x_0, noise = predictions(x, t)
        return of_shape(x_0, x), of_shape(noise, x)

    return both


def batched(score: Score) -> Score:
    """``score`` for a batch: its own ``batch`` form, or ``vmap`` where it has none.

    Returns:
      A function of ``x (n, *s)``, ``t (n,)`` and a key or ``None``, with result ``(n, *s)``.
    """
    compiler.check()
    if hasattr(score, "batch"):
        return score.batch

    def by_vmap(x: Array, t: Array, key: Key | None) -> Array:
        if key is None:
            return jax.vmap(lambda x, t: score(x, t, None))(x, t)
        return jax.vmap(score)(x, t, jax.random.split(key, len(x)))

    return by_vmap
