"""An integral along the solution of an ODE, taken step by step as it is solved.

For dy/dt = f(t, y) and l = integral h(t, y(t)) dt with a scalar h, each step [a, b] of a
Runge-Kutta method for y, its middle m by the method's own interpolant, adds Simpson's rule

    S = (b - a) / 6 [h(a) + 4 h(m) + h(b)],      S - integral = (b - a)^5 / 2880 h'''',

less that error, with h''''/24 as the divided difference of five values of h: those of the step, and
the nearest of its neighbours. Until the next step has been made, the step before stands in for it.
So the first step waits for the second, the last keeps what the one before it told, and a lone step
has plain Simpson.

y does not ask for l, so h is evaluated twice a step, where ``tsit5`` and ``dopri5`` evaluate f six
times. The step control sees the error of y and, of l, a share of the correction: a third, of which
on a Gaussian a tenth was left by it, and on a trained network half. The first step has a coarser
estimate, ``lone_step_error``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax.numpy as jnp

from sbml.types import Array

Integrand = Callable[[Array, Any], Array]

PER_STEP, ONCE = 2, 1  # evaluations of the integrand

ERROR_SHARE = 1 / 3  # of the correction, that counts as an error

# The middle of a step that is so much shorter than the one before is next to that one's end: their
# difference would bring more rounding into its correction than exactness.
SHORT = 0.1


class Past(NamedTuple):
    """The last four values of h, the newest at the start of the step to come.

    Attributes:
      t: (4,) times: a middle, and a start, middle and end of the step before.
      h: (4,) values there, made up where ``steps`` tells that there are none yet.
      correction: () what was taken off Simpson's rule of the step before.
      steps: () how many there were.
    """

    t: Array
    h: Array
    correction: Array
    steps: Array


def simpson_error(length: Array, t: Array, h: Array) -> Array:
    """(b - a)^5 / 120 h[t_0, ..., t_4] for a step of this length, exact where h is a quartic.

    h[t_0, ..., t_4], the divided difference of h (5,) at t (5,), is h''''/24.
    """
    for order in range(1, 5):
        h = (h[1:] - h[:-1]) / (t[order:] - t[:-order])
    return length**5 / 120 * h[0]


def lone_step_error(length: Array, h: Array) -> Array:
    """D^2 / (20 A), O((b - a)^5) like Simpson's, from h (3,) at a step's start, middle and end.

    D = (b - a) / 3 [h(a) - 2 h(m) + h(b)] is what the trapezoidal rule differs by, and A = (b - a)
    max |h|. The 20 brings it to a quarter of Simpson's error, about as ``ERROR_SHARE`` does, in the
    first step of a Gaussian's likelihood.
    """
    size = length * jnp.max(jnp.abs(h))
    apart = length / 3 * (h[0] - 2 * h[1] + h[2])
    return apart**2 / jnp.maximum(20 * size, jnp.finfo(h.dtype).tiny)


def beside_integral(field: Callable[..., Any]) -> Callable[..., Any]:
    """``field(t, y, args)`` for the state ``(y, l)``; of l a method sees no change."""
    return lambda t, state, args: (field(t, state[0], args), jnp.zeros_like(state[1]))


class WithIntegral(diffrax.AbstractAdaptiveSolver):
    """A solver of ``(y, l)``: ``method`` solves y, and Simpson's rule is added to l.

    Its field is ``beside_integral(f)``.

    Attributes:
      method: a Runge-Kutta solver of diffrax.
      integrand: h(t, y), a scalar.
    """

    method: Any
    integrand: Integrand

    @property
    def term_structure(self) -> Any:
        return self.method.term_structure

    @property
    def interpolation_cls(self) -> Any:  # type: ignore[override]
        return self.method.interpolation_cls

    def order(self, terms: Any) -> Any:
        return self.method.order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        h = self.integrand(t0, y0[0])
        t = t0 + (t1 - t0) * jnp.arange(-3, 1)  # But for the last made up, and distinct.
        past = Past(t.astype(h.dtype), jnp.full((4,), h), jnp.zeros_like(h), jnp.asarray(0))
        return self.method.init(terms, t0, t1, y0, args), past

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: Any, made_jump: Any
    ) -> Any:
        """One step of ``method``; Simpson's rule, corrected, is added to l."""
        state, past = solver_state
        (y, integral), error, dense, state, result = self.method.step(
            terms, t0, t1, y0, args, state, made_jump
        )
        middle = t0 + 0.5 * (t1 - t0)
        y_middle, _ = self.interpolation_cls(t0=t0, t1=t1, **dense).evaluate(middle)
        h_middle, h_end = self.integrand(middle, y_middle), self.integrand(t1, y)
        t = jnp.concatenate([past.t, jnp.stack([middle, t1]).astype(past.t.dtype)])
        h = jnp.concatenate([past.h, jnp.stack([h_middle, h_end])])

        length, before = t1 - t0, t[3] - t[1]
        simpson = length / 6 * (h[3] + 4 * h[4] + h[5])
        correction = jnp.where(past.steps == 0, 0, simpson_error(length, t[1:], h[1:]))
        # Of the step before, now with neighbours on both sides; the first has one side only.
        around = [jnp.where(past.steps == 1, values[1:], values[:5]) for values in (t, h)]
        better = simpson_error(before, *around)
        keep = (past.steps == 0) | ((past.steps > 1) & (length < SHORT * before))
        better = jnp.where(keep, past.correction, better)

        integral = integral + simpson - correction + (past.correction - better)
        if error is not None:
            lone = lone_step_error(length, h[3:])
            error = (error[0], jnp.where(past.steps == 0, lone, ERROR_SHARE * correction))
        past = Past(t[2:], h[2:], correction, past.steps + 1)
        return (y, integral), error, dense, (state, past), result

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return self.method.func(terms, t0, y0, args)
