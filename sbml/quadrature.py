"""An integral along the solution of an ODE, taken step by step as it is solved.

For dy/dt = f(t, y) and l = integral h(t, y(t)) dt with a scalar h, each step [a, b] of a
Runge-Kutta method for y adds Gauss-Legendre's sum over points of the method's own interpolant,

    l <- l + sum_j w_j h(t_j, y(t_j)),      t_j in (a, b).

y does not ask for l, so h is evaluated at fewer times than f, and where the step control has put
them: close together where y is rough. That l is exact enough must be seen by solving again with
smaller steps: they are not chosen for it.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np

from sbml.types import Array

Integrand = Callable[[Array, Any], Array]


def beside_integral(field: Callable[..., Any]) -> Callable[..., Any]:
    """``field(t, y, args)`` for the state ``(y, l)``; of l a method sees no change."""
    return lambda t, state, args: (field(t, state[0], args), jnp.zeros_like(state[1]))


def of_solution(norm: Callable[[Any], Array]) -> Callable[[Any], Array]:
    """``norm`` of y alone in ``(y, l)``."""
    return lambda state: norm(state[0])


class WithIntegral(diffrax.AbstractAdaptiveSolver):
    """A solver of ``(y, l)``: ``method`` solves y, and the sum over nodes is added to l.

    Give it ``beside_integral(field)``, and the step control ``of_solution(norm)``: steps are y's.

    Attributes:
      method: a Runge-Kutta solver of diffrax.
      integrand: h(t, y), a scalar.
      nodes: points a step; the sum is exact for polynomials of degree 2 nodes - 1.
    """

    method: Any
    integrand: Integrand
    nodes: int

    @property
    def term_structure(self) -> Any:
        return self.method.term_structure

    @property
    def interpolation_cls(self) -> Any:  # type: ignore[override]
        return self.method.interpolation_cls

    def order(self, terms: Any) -> Any:
        return self.method.order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        return self.method.init(terms, t0, t1, y0, args)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: Any, made_jump: Any
    ) -> Any:
        """One step of ``method``, and the sum over its nodes added to l."""
        (y, integral), error, dense, state, result = self.method.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        between = self.interpolation_cls(t0=t0, t1=t1, **dense)
        points, weights = np.polynomial.legendre.leggauss(self.nodes)
        for j in range(self.nodes):
            t = t0 + 0.5 * (t1 - t0) * (1 + float(points[j]))
            value = self.integrand(t, between.evaluate(t)[0])
            integral = integral + 0.5 * float(weights[j]) * (t1 - t0) * value
        return (y, integral), error, dense, state, result

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return self.method.func(terms, t0, y0, args)
