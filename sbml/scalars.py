"""Functions of a schedule's parameters, which are floats, or tracers under ``jit`` and ``grad``.

The result for a float is a float in Python's precision, which is a constant for the compiler. The
result for a tracer is computed by JAX.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Real

from sbml.door import condition


def at_least(least: float) -> Any:
    """The condition that a number is not below ``least``; NaN passes."""
    return condition(f"of at least {least}", lambda value: not value < least)


def between(least: float, most: float) -> Any:
    """The condition that all numbers lie in [``least``, ``most``]; NaN does not."""
    return condition(
        f"in [{least}, {most}]",
        lambda value: np.all((np.asarray(value) >= least) & (np.asarray(value) <= most)),
    )


def one_of(*names: str) -> Any:
    """The condition that a text is one of ``names``."""
    return condition(f"among {', '.join(map(repr, names))}", lambda value: value in names)


positive = condition("that is positive and finite", lambda value: 0 < value < math.inf)
nonempty = condition("that is not empty", lambda value: value.size)


def _representable(value: Any) -> bool:
    size, kind = abs(float(value)), jnp.finfo(jnp.result_type(float))
    return not 0 < size < math.inf or bool(kind.tiny <= size <= kind.max)


Count = Annotated[int, at_least(1)]
if TYPE_CHECKING:
    Number = Any
else:  # A float, or a scalar array. In float32, JAX takes numbers below 1.2e-38 for 0.
    Number = Annotated[
        float | Real[jax.Array | np.ndarray | np.number, ""],
        condition("in the range of JAX's default precision", _representable),
    ]


def is_traced(*values: Number) -> bool:
    """Whether one of ``values`` is a tracer, so that Python cannot compare it."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def _either(
    of_float: Callable[[float], float], of_tracer: Callable[..., Any]
) -> Callable[[Number], Number]:
    return lambda x: of_tracer(x) if is_traced(x) else of_float(x)


exp = _either(math.exp, jnp.exp)
log = _either(math.log, jnp.log)
sqrt = _either(math.sqrt, jnp.sqrt)
erf = _either(math.erf, jax.scipy.special.erf)
erfc = _either(math.erfc, jax.scipy.special.erfc)


def check_number(value: Number, name: str) -> None:
    """Check that ``value`` is one real number (:func:`check_range`); it may be NaN or infinite.

    Raises:
      ValueError: if it is not; the message names it.
    """
    if np.ndim(value):
        raise ValueError(f"{name} has shape {np.shape(value)}: give one number")
    check_range(value, name)


def check_range(value: Number, name: str) -> None:
    """Check that a number, or every number of an array, is real, and that its absolute value is 0,
    infinite, NaN, or within the range of JAX's default precision.

    In float32, JAX takes numbers below 1.2e-38 for 0, and those above 3.4e38 for infinity. Tracers
    are not checked.

    Raises:
      ValueError: if it is not; the message names it.
    """
    if is_traced(value):
        return
    array = np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise ValueError(f"{name}={value!r}: must be a number")
    size, kind = np.abs(array.astype(float)), jnp.finfo(jnp.result_type(float))
    if np.any(np.isfinite(size) & (size > 0) & ((size < kind.tiny) | (size > kind.max))):
        raise ValueError(
            f"{name}={value}: is outside the range of {kind.dtype}, {kind.tiny:.2g} to "
            f"{kind.max:.2g}"
        )


def check_positive(value: Number, name: str, finite: bool = False, most: float = math.inf) -> None:
    """Check that a number, or every number of an array, is positive.

    Tracers are not checked. Neither are other objects, which JAX puts in the place of the numbers
    of a pytree.

    Args:
      finite: check also that it is finite.
      most: check also that it is at most this.

    Raises:
      ValueError: as :func:`check_range`, or if it is not positive, not finite or above ``most``;
        the message names it.
    """
    if is_traced(value) or (array := np.asarray(value)).dtype == object:
        return
    check_range(value, name)
    if not np.all(array > 0) or (finite and not np.all(np.isfinite(array))):
        raise ValueError(f"{name}={value}: must be positive{' and finite' if finite else ''}")
    if np.any(array > most):
        raise ValueError(f"{name}={value}: must be at most {most:g}")


def check_count(value: Number, name: str, least: int = 1) -> None:
    """Check that a count is an integer of at least ``least``.

    Raises:
      ValueError: if it is not; the message names it.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value}: need an integer of at least {least}")


def minimum(x: Number, y: Number) -> Number:
    """The smaller of two numbers."""
    return jnp.minimum(x, y) if is_traced(x, y) else min(x, y)


def maximum(x: Number, y: Number) -> Number:
    """The larger of two numbers."""
    return jnp.maximum(x, y) if is_traced(x, y) else max(x, y)


def constant(f: Callable[[], Any]) -> Number:
    """``f()`` as a float, also inside ``jit``; a tracer if it depends on a tracer."""
    with jax.ensure_compile_time_eval():
        value = f()
    return value if is_traced(value) else float(value)
