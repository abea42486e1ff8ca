"""An integral along the solution of an ODE, taken step by step as it is solved.

For dy/dt = f(t, y) and l = integral h(t, y(t)) dt with a scalar h, each step [a, b] of an explicit
Runge-Kutta method for y adds Lobatto's rule of four points,

    (b - a) / 12 [h(a) + 5 h(p) + 5 h(q) + h(b)],      p, q = (a + b) / 2 -+ (b - a) / sqrt(20),

with y(p) and y(q) by the method's own interpolant. Its error is (b - a)^7 / 1,512,000 h^(6), where
h^(6) / 720 is about the divided difference of seven values of h: those of the step and of the one
before. The first step has a coarser estimate, ``lone_step_error``. The step control sees the error
of y and that of l; not what h does between its points while y stands still: over [0, 1] a peak of
standard deviation 0.05 is found, one of 0.02 is missed.

y does not ask for l, so a step evaluates h three times, f alone five times (``tsit5``, ``dopri5``):
at b both are wanted, f for the next step's first stage, and come of one evaluation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from sbml.types import Array

# (t, y) -> f(t, y), h(t, y)
Joint = Callable[[Array, Array], tuple[Array, Array]]

PER_STEP, ONCE = 3, 1  # joint evaluations

INSIDE = (0.5 - 1 / math.sqrt(20), 0.5 + 1 / math.sqrt(20))  # p and q of [0, 1]

# What the divided difference is multiplied by: at trained networks the true error was mostly one to
# eight times as large, at a Gaussian no larger.
SAFETY = 3


class Past(NamedTuple):
    """The step before.

    Attributes:
      t: (4,) its times a, p, q and b, distinct even if made up.
      h: (4,) values there.
      real: () whether there was one: before the first step all but the last of these is made up.
    """

    t: Array
    h: Array
    real: Array


def lobatto(length: Array, h: Array) -> Array:
    """The rule, of h (4,) at a, p, q and b; exact for polynomials of degree 5."""
    return length / 12 * (h[0] + 5 * (h[1] + h[2]) + h[3])


def lobatto_error(length: Array, t: Array, h: Array) -> Array:
    """(b - a)^7 / 2100 h[t_0, ..., t_6] for a step of this length, exact for degree 6.

    h[t_0, ..., t_6], the divided difference of h (7,) at t (7,), is h^(6) / 720.
    """
    for order in range(1, 7):
        h = (h[1:] - h[:-1]) / (t[order:] - t[:-order])
    return length**7 / 2100 * h[0]


def lone_step_error(length: Array, h: Array) -> Array:
    """(C^2 |C| / A^2 + D^2 / A) / 10, O((b - a)^7) like Lobatto's, from h (4,) at a, p, q and b.

    C = (b - a) [h(a) - h(p) - h(q) + h(b)], D = (b - a) [h(b) - h(a) - sqrt(5) (h(q) - h(p))] and
    A = (b - a) max |h|: C is O((b - a)^3), D is O((b - a)^4). The 10 brings it to the true error in
    the first step of a likelihood, or somewhat above.
    """
    size = jnp.maximum(length * jnp.max(jnp.abs(h)), jnp.finfo(h.dtype).tiny)
    even = length * (h[0] - h[1] - h[2] + h[3])
    odd = length * (h[3] - h[0] - math.sqrt(5) * (h[2] - h[1]))
    return (jnp.abs(even) * (even / size) ** 2 + odd * (odd / size)) / 10


def beside_integral(field: Callable[..., Any]) -> Callable[..., Any]:
    """``field(t, y, args)`` for the state ``(y, l)``; of l a method sees no change."""
    return lambda t, state, args: (field(t, state[0], args), jnp.zeros_like(state[1]))


def _coefficients(method: Any) -> tuple[list[Any], Any, Any, Any]:
    """Of stages but the first and, where it is the end, the last: a, c; then b and b's error."""
    if isinstance(method, diffrax.Euler):
        return [], [], [1.0], None
    tableau = method.tableau
    last = -1 if tableau.fsal else None
    return tableau.a_lower[:last], tableau.c[:last], tableau.b_sol, tableau.b_error


class WithIntegral(diffrax.AbstractAdaptiveSolver):
    """A solver of ``(y, l)``: ``method``'s stages for y, Lobatto's rule for l.

    Its field is ``beside_integral(f)``.

    Attributes:
      method: an explicit Runge-Kutta solver of diffrax.
      joint: (t, y) -> f, h.
    """

    method: Any
    joint: Joint

    @property
    def term_structure(self) -> Any:
        return self.method.term_structure

    @property
    def interpolation_cls(self) -> Any:  # type: ignore[override]
        return diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> Any:
        return self.method.order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        slope, h = self.joint(t0, y0[0])
        t = t0 + (t1 - t0) * jnp.arange(-3, 1)
        return slope, Past(t.astype(h.dtype), jnp.full((4,), h), jnp.asarray(False))

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: Any, made_jump: Any
    ) -> Any:
        """One step of ``method``; Lobatto's rule is added to l."""
        (y, integral), (slope, past), length = y0, solver_state, t1 - t0
        a, c, b, b_error = _coefficients(self.method)

        def stage(k: Array, nodes: Any) -> tuple[Array, None]:
            i, a, c = nodes
            at = y + length * jnp.tensordot(a, k, 1)
            slope, _ = terms.vf(t0 + c * length, (at, integral), args)
            return k.at[i].set(slope), None

        # Values of f, one row a stage, zero until it is known: one compiled f serves all.
        k = jnp.zeros((len(a) + 1, *y.shape), y.dtype).at[0].set(slope)
        if a:
            rows = jnp.stack([jnp.pad(jnp.asarray(r, y.dtype), (0, len(k) - len(r))) for r in a])
            nodes = jnp.arange(1, len(k)), rows, jnp.asarray(c, y.dtype)
            k, _ = jax.lax.scan(stage, k, nodes)
        end = y + length * jnp.tensordot(jnp.asarray(b[: len(k)], y.dtype), k, 1)
        new = jnp.append(t0 + length * jnp.asarray(INSIDE), t1).astype(past.t.dtype)

        def look(slope: Array, t: Array) -> tuple[Array, Array]:
            """h on the path, which wants f at its end: there, f is looked up too."""
            values = length * jnp.concatenate([k, slope[None]])[: len(b)]
            dense = {} if isinstance(self.method, diffrax.Euler) else {"k": values}
            path = self.method.interpolation_cls(t0=t0, t1=t1, y0=y, y1=end, **dense)
            f, h = self.joint(t, jnp.where(t == new[-1], end, path.evaluate(t)))
            return jnp.where(t == new[-1], f, slope), h

        slope, h = jax.lax.scan(look, jnp.zeros_like(y), jnp.roll(new, 1))
        k = jnp.concatenate([k, slope[None]])[: len(b)]
        t, h = jnp.append(past.t, new), jnp.append(past.h, jnp.roll(h, -1))

        error = None
        if b_error is not None:
            beside = SAFETY * lobatto_error(length, t, h), lone_step_error(length, h[3:])
            error_y = length * jnp.tensordot(jnp.asarray(b_error, y.dtype), k, 1)
            error = error_y, jnp.where(past.real, *beside)
        state = end, integral + lobatto(length, h[3:])
        past = Past(t[3:], h[3:], jnp.asarray(True))
        return state, error, {"y0": y0, "y1": state}, (slope, past), diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return terms.vf(t0, y0, args)
