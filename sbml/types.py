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

Signatures name the shapes of their arrays (by jaxtyping):

    Scalar        ()          a time, a loss, a term in nats
    Example       (*s)        one example of any shape s, or its score
    Vector        (n,)        one number for each of n examples, such as their times
    Batch         (n, *s)     n examples
    Elementwise   any         a function of each number by itself: the result has the same shape
    Pixels        (*s)        one example of integers
    Numbers       any         integers or real numbers

In one signature a letter stands for one size, or for one shape s, wherever it occurs. A ``Key`` is
one typed random key, ``jax.random.key(seed)``, and ``Keys`` are ``(n,)`` of them; arrays of
numbers, such as the older ``jax.random.PRNGKey(seed)``, are no keys. NumPy's arrays pass for JAX's.
Shapes and types are checked in the tests only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Float, Integer, Num, Shaped

from sbml import compiler

Array = jax.Array
if TYPE_CHECKING:
    _Array = Array
else:
    _Array = Array | np.ndarray | np.number  # NumPy's arrays pass for JAX's, as they do in JAX.

Key = jaxtyping.Key[Array, ""]
Keys = jaxtyping.Key[Array, "n"]

Scalar = Float[_Array, ""]
Example = Float[_Array, "*s"]
Vector = Float[_Array, "n"]
Batch = Float[_Array, "n *s"]
Elementwise = Float[_Array, "*any"]
Pixels = Integer[_Array, "*s"]
PixelBatch = Integer[_Array, "n *s"]

Numbers = Num[_Array, "..."]
Anything = Shaped[_Array, "..."]  # numbers or keys: the function itself checks them

Score = Callable[[Example, Scalar, Key | None], Example]
BatchScore = Callable[[Batch, Vector, Key | None], Batch]


def check_example(x: Anything, t: Anything | None = None, **same: Anything) -> None:
    """Refuse what broadcasting or a conversion would make a wrong number of.

    Args:
      x: one example of floating-point numbers, any shape.
      t: its scalar time, of floating-point numbers, or None.
      same: by their names, further arrays of the shape of ``x``.

    Raises:
      ValueError: naming the argument, its shape or type, and what it must be.
    """
    time = {} if t is None or isinstance(t, float) else {"t": t}
    for name, value in {"x": x, **time, **same}.items():
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(
                f"{name} is {kind}: give an array of floating-point numbers; integer data are "
                "dequantized first (sbml.bits.to_model)"
            )
    if t is not None and jnp.ndim(t):
        raise ValueError(f"t has shape {t.shape}: give one example's scalar time, vmap over more")
    for name, value in same.items():
        if value.shape != x.shape:
            raise ValueError(f"{name} has shape {value.shape}, x {x.shape}: give both the same")


def of_shape(found: Anything, x: Example) -> Example:
    """``found``, what a score returned for ``x``.

    Raises:
      ValueError: its shape is not that of ``x``, where broadcasting would hide it, or it is not of
        floating-point numbers.
      MiscompilationError: XLA for CPU computes sums wrongly (``sbml.compiler``).
    """
    compiler.check()
    if found.shape != x.shape:
        raise ValueError(
            f"the score returned shape {found.shape} for an input of {x.shape}: a score of one "
            "example has the example's shape"
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"the score returned {found.dtype} for an input of {x.dtype}: return floating-point "
            "numbers, as by score.astype(x.dtype)"
        )
    return found


def deterministic(score: Score, x: Example, t: Scalar) -> Example:
    """``score(x, t, None)``, shape ``(*s)``.

    Raises:
      ValueError: the score's shape is not that of ``x``.
    """
    return of_shape(score(x, t, None), x)


def predictor(score: Score) -> Callable[[Example, Scalar], tuple[Example, Example]] | None:
    """``score.predictions``, with shapes checked, or None where the score does not offer it."""
    inner: Any = score
    if isinstance(score, jax.tree_util.Partial) and not (score.args or score.keywords):
        inner = score.func  # A score that was wrapped only to be an argument of ``jit``.
    predictions = getattr(inner, "predictions", None)
    if predictions is None:
        return None

    def both(x: Example, t: Scalar) -> tuple[Example, Example]:
        x_0, noise = predictions(x, t)
        return of_shape(x_0, x), of_shape(noise, x)

    return both


def batched(score: Score) -> BatchScore:
    """``score`` for a batch: its own ``batch`` form, or ``vmap`` where it has none.

    Returns:
      A function of ``x (n, *s)``, ``t (n,)`` and a key or ``None``, with result ``(n, *s)``.
    """
    compiler.check()
    if hasattr(score, "batch"):
        return score.batch

    def by_vmap(x: Batch, t: Vector, key: Key | None) -> Anything:
        if key is None:
            return jax.vmap(lambda x, t: score(x, t, None))(x, t)
        return jax.vmap(score)(x, t, jax.random.split(key, len(x)))

    return by_vmap
