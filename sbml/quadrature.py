"""An integral along the solution of an ODE, taken step by step as it is solved.

For dy/dt = f(t, y) and l = integral h(t, y(t)) dt with a scalar h, each step [a, b] of a
Runge-Kutta method for y, its middle m by the method's own interpolant, adds Simpson's rule

    l <- l + (b - a) / 6 [h(a) + 4 h(m) + h(b)],      error (b - a)^5 / 2880 h''''.

y does not ask for l, so h is evaluated twice a step, where f is evaluated six times. The step
before has h at two points more; the divided difference of all five estimates h''''/24. So l has an
error of its own beside that of y, and the step control sees both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax.numpy as jnp

from sbml.types import Array

Integrand = Callable[[Array, Any], Array]

PER_STEP, ONCE = 2, 1  # evaluations of the integrand


class Before(NamedTuple):
    """What is known of h at the start ``t[2]`` of a step, and at two times before it.

    Before the first step there are none: ``t`` repeats the start.
    """

    t: Array  # (3,)
    h: Array  # (3,)


def fourth_difference(t: Array, h: Array) -> Array:
    """The divided difference h[t_0, ..., t_4], a scalar: h''''/24 where that is constant."""
    for order in range(1, 5):
        h = (h[1:] - h[:-1]) / (t[order:] - t[:-order])
    return h[0]


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
        before = Before(jnp.full((3,), t0, h.dtype), jnp.full((3,), h))
        return self.method.init(terms, t0, t1, y0, args), before

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: Any, made_jump: Any
    ) -> Any:
        """One step of ``method``, and its Simpson's rule added to l."""
        state, before = solver_state
        (y, integral), error, dense, state, result = self.method.step(
            terms, t0, t1, y0, args, state, made_jump
        )
        middle = t0 + 0.5 * (t1 - t0)
        y_middle, _ = self.interpolation_cls(t0=t0, t1=t1, **dense).evaluate(middle)
        t = jnp.concatenate([before.t, jnp.stack([middle, t1]).astype(before.t.dtype)])
        new = jnp.stack([self.integrand(middle, y_middle), self.integrand(t1, y)])
        h = jnp.concatenate([before.h, new])
        length = t1 - t0
        integral = integral + length / 6 * (h[2] + 4 * h[3] + h[4])
        if error is not None:
            first = before.t[0] == before.t[2]
            apart = jnp.where(first, jnp.arange(5, dtype=t.dtype), t)  # No division by zero.
            estimate = length**5 / 120 * fourth_difference(apart, h)
            error = (error[0], jnp.where(first, 0, jnp.abs(estimate)))
        return (y, integral), error, dense, (state, Before(t[2:], h[2:])), result

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return self.method.func(terms, t0, y0, args)
