"""Conditions on numbers (``sbml.core.door``), and functions of a schedule's parameters.

These parameters are floats, or tracers under ``jit`` and ``grad``. The result for a float is a
float in Python's precision, which is a constant for the compiler. The result for a tracer is
computed by JAX.
"""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Real

from sbml.core.door import condition


def at_least(least: float) -> object:
    """The condition that a number is not below ``least``; NaN passes."""
    return condition(f"of at least {least}", lambda value: not value < least)


def at_most(most: float) -> object:
    """The condition that a number is not above ``most``; NaN passes."""
    return condition(f"of at most {most}", lambda value: not value > most)


def between(least: float, most: float) -> object:
    """The condition that all numbers lie in [``least``, ``most``]; NaN does not."""
    return condition(
        f"in [{least}, {most}]",
        lambda value: np.all((np.asarray(value) >= least) & (np.asarray(value) <= most)),
    )


def one_of(*names: str) -> object:
    """The condition that a text is one of ``names``."""
    return condition(f"among {', '.join(map(repr, names))}", lambda value: value in names)


above_0 = condition("above 0", lambda value: np.all(np.asarray(value) > 0))
finite = condition("that is finite", lambda value: -math.inf < value < math.inf)
positive = condition("that is positive and finite", lambda value: 0 < value < math.inf)
nonempty = condition("that is not empty", lambda value: value.size)


def _representable(value: SupportsFloat) -> bool:
    size, kind = abs(float(value)), jnp.finfo(jnp.result_type(float))
    return not 0 < size < math.inf or float(kind.tiny) <= size <= float(kind.max)


# In float32, JAX takes numbers below 1.2e-38 for 0.
representable = condition("in the range of JAX's default precision", _representable, usual=True)
Positive = Annotated[float, positive, representable]
Count = Annotated[int, at_least(1)]
# Beyond these numbers a result takes hours and gains nothing; ``config`` has the same limits.
MOST_SWEEPS, MOST_DRAWS, MOST_STEPS = 10_000, 4_096, 10_000
Draws = Annotated[int, at_least(1), at_most(MOST_DRAWS)]  # of times, probes or bins
Steps = Annotated[int, at_least(1), at_most(MOST_STEPS)]
Sweeps = Annotated[int, at_least(2), at_most(MOST_SWEEPS)]  # One gives no error bar.
if TYPE_CHECKING:
    Number = float | jax.Array
else:  # A float, or a scalar array.
    Number = Annotated[float | Real[jax.Array | np.ndarray | np.number, ""], representable]


def notation(value: object, form: str = "") -> str:
    """``value`` as a person writes it, for example "1e-5", "8,8,1" or "None". A ``form`` such as
    ".3g" rounds a number, and what rounds to 0 has no minus sign."""
    if isinstance(value, tuple | list):
        return ",".join(notation(item, form) for item in value)
    if isinstance(value, float):
        # "z" stands after the sign.
        text = format(value, re.sub(r"^[+-]?", r"\g<0>z", form)) if form else repr(float(value))
        return re.sub(r"e\+?(-?)0*", r"e\1", text)
    return escaped(str(value))


def escaped(text: str) -> str:
    """``text`` in one line: what cannot be printed, such as a line feed, is an escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_traced(*values: object) -> bool:
    """Whether one of ``values`` is a tracer, so that Python cannot compare it."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def _either(
    of_floats: Callable[..., float], of_tracers: Callable[..., Number]
) -> Callable[..., Number]:
    return lambda *x: of_tracers(*x) if is_traced(*x) else of_floats(*x)


exp = _either(math.exp, jnp.exp)
log = _either(math.log, jnp.log)
sqrt = _either(math.sqrt, jnp.sqrt)
erf = _either(math.erf, jax.scipy.special.erf)
erfc = _either(math.erfc, jax.scipy.special.erfc)
minimum = _either(min, jnp.minimum)
maximum = _either(max, jnp.maximum)


def constant(f: Callable[[], Number]) -> Number:
    """``f()`` as a float, also inside ``jit``; a tracer if it depends on a tracer."""
    with jax.ensure_compile_time_eval():
        value = f()
    return value if is_traced(value) else float(value)
