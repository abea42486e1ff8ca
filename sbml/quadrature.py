"""An integral along the solution of an ODE, taken step by step as it is solved.

For dy/dt = f(t, y) from y_0, wanted is W(y(t_1)) + integral h(t, y(t)) dt with a scalar h. Let
V(t, y) be that, of the solution that starts at (t, y), and w = grad_y V. Then along *any* curve c
from y_0, since dV/dt = dc/dt . w - f . w - h there,

    V(t_0, y_0) = W(c(t_1)) + integral h(t, c) dt - integral (dc/dt - f(t, c)) . w(t, c) dt.

The method's own interpolant is such a curve, and its residual dc/dt - f is small: so w may be
approximate, and what it gets wrong counts times the residual, where without the second integral,
the correction, all of w would. It is the dual-weighted residual of Becker and Rannacher ("An
optimal control approach to a posteriori error estimation", Acta Numerica 2001), and costs nothing:
f and h are wanted at the same points. Each step [a, b] of an explicit Runge-Kutta method adds
Lobatto's rule of four points,

    (b - a) / 12 [h(a) + 5 h(p) + 5 h(q) + h(b)],      p, q = (a + b) / 2 -+ (b - a) / sqrt(20),

exact for the residual's first terms too. Its error is (b - a)^7 / 1,512,000 h^(6), where
h^(6) / 720 is about the divided difference of seven values of h: those of the step and of the one
before. The first step has a coarser estimate, ``lone_step_error``.

The step control sees the errors of y and of the rule, and the correction, of which a part is wrong
where w is, at ``SLACK`` times the tolerance: where y's error is small but V's is not, steps are
short too. It does not see what h does between its points while y stands still: over [0, 1] a peak
of standard deviation 0.05 is found, one of 0.02 is missed.

y does not ask for h, so a step evaluates h three times, f alone five times (``tsit5``, ``dopri5``):
at b both are wanted, f for the next step's first stage, and come of one evaluation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from sbml.types import Array, Example, Scalar

Four = Float[Array, "4"]
Seven = Float[Array, "7"]

# (t, y) -> f(t, y), h(t, y) and w(t, y), of y's shape or a scalar 0 where none is known
Joint = Callable[[Scalar, Example], tuple[Example, Scalar, Example]]

PER_STEP, ONCE = 3, 1  # joint evaluations

INSIDE = (0.5 - 1 / math.sqrt(20), 0.5 + 1 / math.sqrt(20))  # p and q of [0, 1]

# What the divided difference is multiplied by: at trained networks the true error was mostly one to
# eight times as large, at a Gaussian no larger.
SAFETY = 3

# How many times larger than the tolerance the correction may be. Strict control by it makes steps
# hang on where it changes its sign, and so on rounding: at 1, another batch size moved a tenth of a
# trained network's images by more than 2e-4 bits/dim, at 10 by more than 3e-5. Without any, far
# outliers of a mixture are wrong by up to 0.3.
SLACK = 10


class Past(NamedTuple):
    """The step before.

    Attributes:
      t: (4,) its times a, p, q and b, distinct even if made up.
      h: (4,) values there.
      real: () whether there was one: before the first step all but the last of these is made up.
    """

    t: Four
    h: Four
    real: Bool[Array, ""]


def lobatto(length: Scalar, h: Four) -> Scalar:
    """The rule, of h (4,) at a, p, q and b; exact for polynomials of degree 5."""
    return length / 12 * (h[0] + 5 * (h[1] + h[2]) + h[3])


def lobatto_error(length: Scalar, t: Seven, h: Seven) -> Scalar:
    """(b - a)^7 / 2100 h[t_0, ..., t_6] for a step of this length, exact for degree 6.

    h[t_0, ..., t_6], the divided difference of h (7,) at t (7,), is h^(6) / 720.
    """
    for order in range(1, 7):
        h = (h[1:] - h[:-1]) / (t[order:] - t[:-order])
    return length**7 / 2100 * h[0]


def lone_step_error(length: Scalar, h: Four) -> Scalar:
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
    """``field(t, y, args)`` for the state ``(y, l)``; of l (2,) a method sees no change."""
    return lambda t, state, args: (field(t, state[0], args), jnp.zeros_like(state[1]))


def _coefficients(method: Any) -> tuple[Any, Any, Any, Any]:
    """Of stages but the first and, where it is the end, the last: a, c; then b and b's error."""
    if isinstance(method, diffrax.Euler):
        return [], [], [1.0], None
    tableau = method.tableau
    last = -1 if tableau.fsal else None
    return tableau.a_lower[:last], tableau.c[:last], tableau.b_sol, tableau.b_error


class WithIntegral(diffrax.AbstractAdaptiveSolver):
    """A solver of ``(y, l)``: ``method``'s stages for y, Lobatto's rule for l (2,).

    l is the integral of h and the correction, with its sign. The field is ``beside_integral(f)``.

    Attributes:
      method: an explicit Runge-Kutta solver of diffrax.
      joint: (t, y) -> f, h, w.
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
        slope, h, _ = self.joint(t0, y0[0])
        t = t0 + (t1 - t0) * jnp.arange(-3, 1)
        return slope, Past(t.astype(h.dtype), jnp.full((4,), h), jnp.asarray(False))

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: Any, made_jump: Any
    ) -> Any:
        """One step of ``method``; Lobatto's rule is added to l."""
        (y, integrals), (slope, past), length = y0, solver_state, t1 - t0
        a, c, b, b_error = _coefficients(self.method)

        def stage(k: Array, nodes: Any) -> tuple[Array, None]:
            i, a, c = nodes
            at = y + length * jnp.tensordot(a, k, 1)
            slope, _ = terms.vf(t0 + c * length, (at, integrals), args)
            return k.at[i].set(slope), None

        # Values of f, one row a stage, zero until it is known: one compiled f serves all.
        k = jnp.zeros((len(a) + 1, *y.shape), y.dtype).at[0].set(slope)
        if a:
            rows = jnp.stack([jnp.pad(jnp.asarray(r, y.dtype), (0, len(k) - len(r))) for r in a])
            nodes = jnp.arange(1, len(k)), rows, jnp.asarray(c, y.dtype)
            k, _ = jax.lax.scan(stage, k, nodes)
        end = y + length * jnp.tensordot(jnp.asarray(b[: len(k)], y.dtype), k, 1)
        new = jnp.append(t0 + length * jnp.asarray(INSIDE), t1).astype(past.t.dtype)

        known = len(k) == len(b)  # or f at the end is the last stage, and the curve's slope there

        def look(slope: Array, t: Array) -> tuple[Array, tuple[Array, Array]]:
            """h and the weighted residual on the curve, which wants f at its end: that is first."""
            values = length * jnp.concatenate([k, slope[None]])[: len(b)]
            dense = {} if isinstance(self.method, diffrax.Euler) else {"k": values}
            curve = self.method.interpolation_cls(t0=t0, t1=t1, y0=y, y1=end, **dense)
            last = t == new[-1]
            f, h, w = self.joint(t, jnp.where(last, end, curve.evaluate(t)))
            residual = jnp.where(last & (not known), 0.0, curve.derivative(t) - f)
            return jnp.where(last, f, slope), (h, jnp.sum(residual * w))

        slope, looks = jax.lax.scan(look, jnp.zeros_like(y), jnp.roll(new, 1))
        h, weighted = (jnp.roll(values, -1) for values in looks)
        k = jnp.concatenate([k, slope[None]])[: len(b)]
        t, h = jnp.append(past.t, new), jnp.append(past.h, h)
        # The curve leaves its start as f tells it to.
        correction = -lobatto(length, jnp.append(jnp.zeros((1,), h.dtype), weighted))

        error = None
        if b_error is not None:
            rule = SAFETY * lobatto_error(length, t, h), lone_step_error(length, h[3:])
            error_y = length * jnp.tensordot(jnp.asarray(b_error, y.dtype), k, 1)
            beside = jnp.stack([jnp.where(past.real, *rule), correction / SLACK])
            beside *= math.sqrt(2)  # The control takes the root mean square of the two.
            error = error_y, beside
        state = end, integrals + jnp.stack([lobatto(length, h[3:]), correction])
        past = Past(t[3:], h[3:], jnp.asarray(True))
        return state, error, {"y0": y0, "y1": state}, (slope, past), diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return terms.vf(t0, y0, args)
