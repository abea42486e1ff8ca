"""The integral of a scalar along the solution of an ODE, computed step by step with the solution.

For dy/dt = f(t, y) from y(t_0) = y_0 and a scalar h, we want W(y(t_1)) + integral h(t, y(t)) dt.
Let V(t, y) be this value for the solution that starts at (t, y), and w = grad_y V. Then along *any*
curve c from y_0, since dV/dt = dc/dt . w - f . w - h there,

    V(t_0, y_0) = W(c(t_1)) + integral h(t, c) dt - integral (dc/dt - f(t, c)) . w(t, c) dt.

The interpolant of the ODE method is such a curve, and its residual dc/dt - f is small. So an
approximate w is enough: its error is multiplied by the small residual. The second integral is the
*correction*, the dual-weighted residual of Becker and Rannacher ("An optimal control approach to a
posteriori error estimation", Acta Numerica 2001). It costs no further evaluations, because f and h
are evaluated at the same points. Each step [a, b] of an explicit Runge-Kutta method adds Lobatto's
rule of four points,

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
from functools import partial
from typing import Any, ClassVar, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from sbml.core.types import Array, Joint, Scalar

Four = Float[Array, "4"]
Seven = Float[Array, "7"]

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
    """The previous step; before the first one it is fictitious, with distinct times."""

    t: Four  # a, p, q and b
    h: Four  # the values of h at these times
    real: Bool[Array, ""]


def lobatto(length: Scalar, h: Four) -> Scalar:
    """Lobatto's rule for a step of this length, h (4,) at a, p, q, b; exact for degree 5."""
    return length / 12 * (h[0] + 5 * (h[1] + h[2]) + h[3])


def lobatto_error(length: Scalar, t: Seven, h: Seven) -> Scalar:
    """The error (b - a)^7 / 2100 h[t_0, ..., t_6] of the rule, a scalar, exact for degree 6.

    h[t_0, ..., t_6], the divided difference of h (7,) at t (7,), is h^(6) / 720.
    """
    for order in range(1, 7):
        h = (h[1:] - h[:-1]) / (t[order:] - t[:-order])
    return length**7 / 2100 * h[0]


def lone_step_error(length: Scalar, h: Four) -> Scalar:
    """The error of the rule in a step without a previous one, from h (4,) at a, p, q and b:

    (C^2 |C| / A^2 + D^2 / A) / 10 with

        C = (b - a) [h(a) - h(p) - h(q) + h(b)],
        D = (b - a) [h(b) - h(a) - sqrt(5) (h(q) - h(p))],      A = (b - a) max |h|.

    C is O((b - a)^3) and D is O((b - a)^4), so the estimate is O((b - a)^7), as the true error is.
    The divisor 10 fits the first step of a likelihood.
    """
    size = jnp.maximum(length * jnp.max(jnp.abs(h)), jnp.finfo(h.dtype).tiny)
    even = length * (h[0] - h[1] - h[2] + h[3])
    odd = length * (h[3] - h[0] - math.sqrt(5) * (h[2] - h[1]))
    return (jnp.abs(even) * (even / size) ** 2 + odd * (odd / size)) / 10


Tableau = tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray, np.ndarray | None]


def _coefficients(method: Any) -> Tableau:
    """The Butcher tableau: a, c, b, and the coefficients of the error, or None. a and c omit the
    first stage, and the last if it is the field at the end of the step."""
    if isinstance(method, diffrax.Euler):
        return (), np.zeros(0), np.ones(1), None
    tableau = method.tableau
    last = -1 if tableau.fsal else None
    return tableau.a_lower[:last], tableau.c[:last], tableau.b_sol, tableau.b_error


def _combined(coefficients: Array | np.ndarray, stages: Array) -> Array:
    """The combination of a step's stages ``(k, *s)`` at full precision, as in diffrax. Accelerators
    round products otherwise."""
    weights = jnp.asarray(coefficients, stages.dtype)
    return jnp.tensordot(weights, stages, 1, precision="highest")


def _stages(
    method: diffrax.AbstractSolver,
    f: Callable[[Scalar, Array], Array],
    t: Scalar,
    length: Scalar,
    y: Array,
    k0: Array,
) -> Array:
    """The values of f at the stages of a step from (t, y), ``(k, *s)``; ``k0`` is the first.

    If the last stage of the method is f at the end of the step, it is not among them.
    """
    a, c, _, _ = _coefficients(method)
    k = jnp.zeros((len(a) + 1, *y.shape), y.dtype).at[0].set(k0)  # 0 until computed
    if not a:
        return k

    def stage(k: Array, nodes: tuple[Array, Array, Array]) -> tuple[Array, None]:
        i, a, c = nodes
        return k.at[i].set(f(t + c * length, y + length * _combined(a, k))), None

    rows = jnp.stack([jnp.pad(jnp.asarray(r, y.dtype), (0, len(k) - len(r))) for r in a])
    # The scan compiles f only once.
    return jax.lax.scan(stage, k, (jnp.arange(1, len(k)), rows, jnp.asarray(c, y.dtype)))[0]


State = tuple[Array, Array]  # (y, l)
Carried = tuple[Array, Past]  # f and h at the end of the last step, for the next one


class WithIntegral(diffrax.AbstractAdaptiveSolver):
    """A solver for the state ``(y, l)``: ``method`` for y, Lobatto's rule for l (2,).

    l is the integral of h and the correction, which is added to the value. The field that diffrax
    gets is f for y, and 0 for l.

    Attributes:
      method: an explicit Runge-Kutta solver of diffrax.
      joint: (t, y) -> f, h, w.
    """

    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Any] = diffrax.LocalLinearInterpolation

    method: diffrax.AbstractSolver
    joint: Joint

    def order(self, terms: diffrax.AbstractTerm) -> int | None:
        return self.method.order(terms)

    def init(
        self, terms: diffrax.AbstractTerm, t0: Any, t1: Any, y0: State, args: object
    ) -> Carried:
        slope, h, _ = self.joint(t0, y0[0])
        t = t0 + (t1 - t0) * jnp.arange(-3, 1)
        return slope, Past(t.astype(h.dtype), jnp.full((4,), h), jnp.asarray(False))

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: Any,
        t1: Any,
        y0: State,
        args: object,
        solver_state: Carried,
        made_jump: object,
    ) -> tuple[State, State | None, dict[str, State], Carried, Any]:
        """One step of ``method`` for y; Lobatto's rule adds to l."""
        (y, integrals), (slope, past), length = y0, solver_state, t1 - t0
        _, _, b, b_error = _coefficients(self.method)
        k = _stages(
            self.method, lambda t, y: terms.vf(t, (y, integrals), args)[0], t0, length, y, slope
        )
        end = y + length * _combined(b[: len(k)], k)

        def all_stages(slope: Array) -> Array:
            """k with ``slope``, f at the end of the step, if the method has that stage."""
            return jnp.concatenate([k, slope[None]])[: len(b)]

        # b, p and q: the curve at p and q may need f at b.
        points = jnp.append(t1, t0 + length * jnp.asarray(INSIDE)).astype(past.t.dtype)

        def evaluate(slope: Array, t: Array) -> tuple[Array, tuple[Array, Array]]:
            """f at b, and h and the weighted residual at t."""
            linear = isinstance(self.method, diffrax.Euler)
            through = partial(self.method.interpolation_cls, t0=t0, t1=t1, y0=y, y1=end)
            curve = through() if linear else through(k=length * all_stages(slope))
            last = t == points[0]
            f, h, w = self.joint(t, jnp.where(last, end, curve.evaluate(t)))
            exact = last & (len(k) < len(b))  # The last stage, the curve's slope there, is f.
            residual = jnp.where(exact, 0.0, curve.derivative(t) - f)
            return jnp.where(last, f, slope), (h, jnp.sum(residual * w))

        slope, (h, weighted) = jax.lax.scan(evaluate, jnp.zeros_like(y), points)
        t, h, weighted = (jnp.append(v[1:], v[0]) for v in (points, h, weighted))  # p, q and b
        t, h = jnp.append(past.t, t), jnp.append(past.h, h)
        # The residual is 0 at the start of a step, where the curve's slope is f.
        correction = -lobatto(length, jnp.append(jnp.zeros((1,), h.dtype), weighted))

        error = None
        if b_error is not None:
            rule = SAFETY * lobatto_error(length, t, h), lone_step_error(length, h[3:])
            error_l = jnp.stack([jnp.where(past.real, *rule), correction / SLACK])
            # The step control takes the root mean square of the two.
            error = length * _combined(b_error, all_stages(slope)), math.sqrt(2) * error_l
        state = end, integrals + jnp.stack([lobatto(length, h[3:]), correction])
        past = Past(t[3:], h[3:], jnp.asarray(True))
        return state, error, {"y0": y0, "y1": state}, (slope, past), diffrax.RESULTS.successful

    def func(self, terms: diffrax.AbstractTerm, t0: Any, y0: State, args: object) -> State:
        slope: State = terms.vf(t0, y0, args)
        return slope


class Control(diffrax.PIDController):
    """Step control that gives up after a rejected step if the next one would not change the time.

    Otherwise every step up to ``max_steps`` would be rejected, as where the velocity is not finite.
    """

    def adapt_step_size(self, *args: Any) -> Any:
        adapted: Any = super().adapt_step_size(*args)
        accepted, start, end, *rest, result = adapted
        gave_up = diffrax.RESULTS.dt_min_reached
        result = diffrax.RESULTS.where(accepted | (end > start), result, gave_up)
        return accepted, start, end, *rest, result
