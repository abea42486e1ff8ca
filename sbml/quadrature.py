"""The integral of a scalar along the solution of an ODE, computed step by step with the solution.

For dy/dt = f(t, y) from y(t_0) = y_0 and a scalar h, we want W(y(t_1)) + integral h(t, y(t)) dt.
Let V(t, y) be this value for the solution that starts at (t, y), and w = grad_y V. Then along *any*
curve c from y_0, since dV/dt = dc/dt . w - f . w - h there,

    V(t_0, y_0) = W(c(t_1)) + integral h(t, c) dt - integral (dc/dt - f(t, c)) . w(t, c) dt.

The interpolant of the ODE method is such a curve, and its residual dc/dt - f is small. So an
approximate w is enough: its error is multiplied by the small residual. Without the second integral,
the *correction*, the whole of w would be multiplied by the residual. The correction is the
dual-weighted residual of Becker and Rannacher ("An optimal control approach to a posteriori error
estimation", Acta Numerica 2001). It costs no further evaluations, because f and h are evaluated at
the same points. Each step [a, b] of an explicit Runge-Kutta method adds Lobatto's rule of four
points,

    (b - a) / 12 [h(a) + 5 h(p) + 5 h(q) + h(b)],      p, q = (a + b) / 2 -+ (b - a) / sqrt(20),

which is exact for the first terms of the residual too. Its error is (b - a)^7 / 1,512,000 h^(6),
where h^(6) / 720 is about the divided difference of seven values of h: those of this step and of
the step before. The first step has a coarser estimate, ``lone_step_error``.

The step control limits three errors: the error of y, the error of the rule, and the correction
divided by ``SLACK``, since a part of the correction is wrong if w is approximate. So steps are also
short where the error of y is small but that of V is not. The control cannot detect changes of h
between its points while y is constant: over [0, 1] it finds a peak of standard deviation 0.05 and
misses one of 0.02.

The stages of y do not need h. So a step evaluates f with h three times, and f alone five times for
``tsit5`` and ``dopri5``. At b, one evaluation gives h(b) and also f(b), the first stage of the next
step.
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

# (t, y) -> f(t, y), h(t, y) and w(t, y). w has y's shape, or is a scalar 0 if it is not known.
Joint = Callable[[Scalar, Example], tuple[Example, Scalar, Example]]

PER_STEP, ONCE = 3, 1  # joint evaluations in a step, and at the start

INSIDE = (0.5 - 1 / math.sqrt(20), 0.5 + 1 / math.sqrt(20))  # p and q for the step [0, 1]

# The factor of the divided difference in the error estimate. The true error was mostly one to eight
# times the divided difference for trained networks, and no larger than it for a Gaussian.
SAFETY = 3

# The correction may be this many times larger than the tolerance. With strict control, the steps
# depend on where the correction changes its sign, and therefore on rounding: with 1, another batch
# size changed a tenth of a trained network's images by more than 2e-4 bits/dim; with 10, by more
# than 3e-5. Without control by the correction, far outliers of a mixture are wrong by up to 0.3.
SLACK = 10


class Past(NamedTuple):
    """The previous step.

    Attributes:
      t: (4,) its times a, p, q and b. They are distinct, also in a fictitious step.
      h: (4,) the values of h at these times.
      real: () False before the first step, where all times and values but the last are fictitious.
    """

    t: Four
    h: Four
    real: Bool[Array, ""]


def lobatto(length: Scalar, h: Four) -> Scalar:
    """Lobatto's rule for a step of this length, a scalar, from h (4,) at a, p, q and b.

    It is exact for polynomials of degree 5.
    """
    return length / 12 * (h[0] + 5 * (h[1] + h[2]) + h[3])


def lobatto_error(length: Scalar, t: Seven, h: Seven) -> Scalar:
    """The error (b - a)^7 / 2100 h[t_0, ..., t_6] of the rule, a scalar, exact for degree 6.

    h[t_0, ..., t_6], the divided difference of h (7,) at t (7,), is h^(6) / 720.
    """
    for order in range(1, 7):
        h = (h[1:] - h[:-1]) / (t[order:] - t[:-order])
    return length**7 / 2100 * h[0]


def lone_step_error(length: Scalar, h: Four) -> Scalar:
    """The error of the rule in a step without a previous one, from h (4,) at a, p, q and b.

    The estimate is (C^2 |C| / A^2 + D^2 / A) / 10 with

        C = (b - a) [h(a) - h(p) - h(q) + h(b)],
        D = (b - a) [h(b) - h(a) - sqrt(5) (h(q) - h(p))],      A = (b - a) max |h|.

    C is O((b - a)^3) and D is O((b - a)^4), so the estimate is O((b - a)^7), as the true error is.
    With the divisor 10, it equals the true error in the first step of a likelihood, or is somewhat
    larger.
    """
    size = jnp.maximum(length * jnp.max(jnp.abs(h)), jnp.finfo(h.dtype).tiny)
    even = length * (h[0] - h[1] - h[2] + h[3])
    odd = length * (h[3] - h[0] - math.sqrt(5) * (h[2] - h[1]))
    return (jnp.abs(even) * (even / size) ** 2 + odd * (odd / size)) / 10


def beside_integral(field: Callable[..., Any]) -> Callable[..., Any]:
    """The field of the state ``(y, l)``: ``field(t, y, args)`` for y, and 0 for l (2,)."""
    return lambda t, state, args: (field(t, state[0], args), jnp.zeros_like(state[1]))


def _coefficients(method: Any) -> tuple[Any, Any, Any, Any]:
    """The Butcher tableau: a, c, b, and the coefficients of the error, or None.

    a and c omit the first stage, and the last if it is the field at the end of the step.
    """
    if isinstance(method, diffrax.Euler):
        return [], [], [1.0], None
    tableau = method.tableau
    last = -1 if tableau.fsal else None
    return tableau.a_lower[:last], tableau.c[:last], tableau.b_sol, tableau.b_error


def _combined(coefficients: Array, stages: Array) -> Array:
    """The combination of a step's stages ``(k, *s)`` at full precision, as in diffrax. Accelerators
    round products otherwise."""
    return jnp.tensordot(coefficients, stages, 1, precision="highest")


class WithIntegral(diffrax.AbstractAdaptiveSolver):
    """A solver for the state ``(y, l)``: ``method`` for y, Lobatto's rule for l (2,).

    l is the integral of h and the correction, which is added to the value. The field that diffrax
    gets is ``beside_integral(f)``.

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
        """One step of ``method`` for y; Lobatto's rule adds to l."""
        (y, integrals), (slope, past), length = y0, solver_state, t1 - t0
        a, c, b, b_error = _coefficients(self.method)

        def stage(k: Array, nodes: Any) -> tuple[Array, None]:
            i, a, c = nodes
            at = y + length * _combined(a, k)
            slope, _ = terms.vf(t0 + c * length, (at, integrals), args)
            return k.at[i].set(slope), None

        # Values of f, one row for each stage, 0 until computed. The scan compiles f only once.
        k = jnp.zeros((len(a) + 1, *y.shape), y.dtype).at[0].set(slope)
        if a:
            rows = jnp.stack([jnp.pad(jnp.asarray(r, y.dtype), (0, len(k) - len(r))) for r in a])
            nodes = jnp.arange(1, len(k)), rows, jnp.asarray(c, y.dtype)
            k, _ = jax.lax.scan(stage, k, nodes)
        end = y + length * _combined(jnp.asarray(b[: len(k)], y.dtype), k)
        new = jnp.append(t0 + length * jnp.asarray(INSIDE), t1).astype(past.t.dtype)

        # If the last stage is f at the end of the step, k lacks it, and the curve has this slope.
        complete = len(k) == len(b)

        def evaluate(slope: Array, t: Array) -> tuple[Array, tuple[Array, Array]]:
            """h and the weighted residual at t. The end comes first: the curve may need f there."""
            values = length * jnp.concatenate([k, slope[None]])[: len(b)]
            dense = {} if isinstance(self.method, diffrax.Euler) else {"k": values}
            curve = self.method.interpolation_cls(t0=t0, t1=t1, y0=y, y1=end, **dense)
            last = t == new[-1]
            f, h, w = self.joint(t, jnp.where(last, end, curve.evaluate(t)))
            residual = jnp.where(last & (not complete), 0.0, curve.derivative(t) - f)
            return jnp.where(last, f, slope), (h, jnp.sum(residual * w))

        slope, results = jax.lax.scan(evaluate, jnp.zeros_like(y), jnp.roll(new, 1))
        h, weighted = (jnp.roll(values, -1) for values in results)
        k = jnp.concatenate([k, slope[None]])[: len(b)]
        t, h = jnp.append(past.t, new), jnp.append(past.h, h)
        # The residual is 0 at the start of a step, where the curve's slope is f.
        correction = -lobatto(length, jnp.append(jnp.zeros((1,), h.dtype), weighted))

        error = None
        if b_error is not None:
            rule = SAFETY * lobatto_error(length, t, h), lone_step_error(length, h[3:])
            error_y = length * _combined(jnp.asarray(b_error, y.dtype), k)
            error_l = jnp.stack([jnp.where(past.real, *rule), correction / SLACK])
            error_l *= math.sqrt(2)  # The step control takes the root mean square of the two.
            error = error_y, error_l
        state = end, integrals + jnp.stack([lobatto(length, h[3:]), correction])
        past = Past(t[3:], h[3:], jnp.asarray(True))
        return state, error, {"y0": y0, "y1": state}, (slope, past), diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return terms.vf(t0, y0, args)
