"""The probability-flow ODE and the one place that solves it.

    dx/dt = v(x, t) = f(t) x - 1/2 g(t)^2 s(x, t)

has the marginals of the SDE. It is solved by diffrax in the coordinate u = t^(1/power), in which
the field is smooth near t = 0 where g^2 / sigma dominates. The first step is given
(``first_step``): the one that diffrax would choose is far too long, and is accepted.

Every solve is of one example. Under ``vmap`` each keeps its own step sizes, so an image's result
does not depend on its batch-mates.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from sbml import quadrature
from sbml.quadrature import Joint, WithIntegral, beside_integral
from sbml.sdes import SDE
from sbml.types import Array, Score, deterministic

# method: (solver, field evaluations a step, evaluations once); a first-same-as-last pair starts
# with one evaluation and then needs one less than its stages.
METHODS: dict[str, tuple[type[diffrax.AbstractSolver], int, int]] = {
    "dopri5": (diffrax.Dopri5, 6, 1),
    "tsit5": (diffrax.Tsit5, 6, 1),
    "heun": (diffrax.Heun, 2, 0),
    "euler": (diffrax.Euler, 1, 0),
}


class Stats(NamedTuple):
    """What a solve cost and whether it arrived: scalars.

    ``nfe`` counts evaluations of the field, alone or with an integrand. It is exact if no step is
    rejected before the first accepted one; without an integrand, each such rejection costs one
    evaluation more than is counted.
    """

    nfe: Array
    accepted: Array
    rejected: Array
    success: Array


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solver:
    """How to solve: hashable, so static under ``jit``; or an argument, with traced tolerances.

    Attributes:
      method: ``dopri5``, ``tsit5``, ``heun`` or ``euler``.
      rtol, atol: tolerances of the step control, for each entry of y, and for the integral divided
        by the number of entries (a log-determinant: nats per dimension).
      power: t = u^power; 2 solves in sqrt(t), 1 in t.
      first_step: the first step, in u.
      pcoeff, icoeff: the proportional-integral controller's coefficients.
      fixed_steps: this many equal steps in u instead of step control.
      max_steps: give up (result NaN, ``success`` False) after this many.

    Raises:
      ValueError: for an unknown method, or step control on a method without an error estimate.
    """

    method: str = _static("tsit5")
    rtol: float = 1e-4
    atol: float = 1e-4
    power: float = _static(2.0)
    first_step: float = _static(1e-2)
    pcoeff: float = _static(0.3)
    icoeff: float = _static(0.4)
    fixed_steps: int | None = _static(None)
    max_steps: int = _static(10_000)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown ODE method {self.method!r}; choose from {sorted(METHODS)}")
        if self.method == "euler" and self.fixed_steps is None:
            raise ValueError("euler has no error estimate: set fixed_steps, or choose tsit5")
        for name in ("rtol", "atol", "power", "first_step"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("fixed_steps", "max_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"{name}={steps}: need at least one")

    def tighter(self, factor: float) -> "Solver":
        """The same with both tolerances divided by ``factor``, or that many times the steps."""
        steps = self.fixed_steps and math.ceil(self.fixed_steps * factor)
        rtol, atol = self.rtol / factor, self.atol / factor
        return dataclasses.replace(self, fixed_steps=steps, rtol=rtol, atol=atol)


def rms_norm(tree: Any) -> Array:
    """The root mean square over leaves of each leaf's root mean square.

    Every leaf weighs the same: an integral beside the solution, the log-determinant, as much as the
    whole image. In one flat norm of d + 1 numbers it would hardly be controlled.
    """
    squares = [jnp.mean(leaf**2) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares) / len(squares))


def velocity(score: Score, sde: SDE, x: Array, t: Array) -> Array:
    """v(x, t) = f(t) x - 1/2 g(t)^2 s(x, t), shape ``(*s)``."""
    return sde.drift(x, t) - 0.5 * sde.diffusion(t) ** 2 * deterministic(score, x, t)


def transport(
    score: Score, sde: SDE, x: Array, t0: float | Array, t1: float | Array, solver: Solver
) -> tuple[Array, Stats]:
    """Where the ODE carries ``x (*s)`` from ``t0`` to ``t1``, in either direction, and stats."""
    return solve(lambda t, x: velocity(score, sde, x, t), x, t0, t1, solver)


def solve(
    field: Callable[[Array, Array], Array],
    y: Array,
    t0: float | Array,
    t1: float | Array,
    solver: Solver,
    joint: Joint | None = None,
) -> tuple[Any, Stats]:
    """Solve dy/dt = field(t, y) from ``t0`` to ``t1`` (either order, both positive).

    Args:
      field: of scalar ``t`` and ``y (*s)``, of the shape of ``y``.
      y: at ``t0``.
      t0, t1, solver: the ends and the solver; the ends concrete, not traced, if there is an
        integrand.
      joint: (t, y) -> (field, h, w), where the integral of a scalar h(t, y) along the solution is
        wanted (``sbml.quadrature``) and ``t0`` < ``t1``.

    Returns:
      y(t1), or (y(t1), the integral of h, its correction by w), NaN if the solver gave up (one
      image's failure must not stop the others), and stats.

    Raises:
      ValueError: an integral backwards in time.
    """
    if joint is not None and t1 < t0:  # diffrax would solve in -u, where h is not known.
        raise ValueError(f"from t={t0} to {t1}: integrals are taken forwards only, swap the ends")

    def slope(u: Array) -> Array:
        return solver.power * u ** (solver.power - 1)

    def in_u(u: Array, y: Array, args: Any) -> Array:
        return slope(u) * field(u**solver.power, y)

    u0, u1 = t0 ** (1 / solver.power), t1 ** (1 / solver.power)
    method, per_step, once = _method(solver)
    rates: Callable[..., Any] = in_u
    start: Any = y
    if joint is not None:
        both: Joint = joint

        def joint_in_u(u: Array, y: Array) -> tuple[Array, Array, Array]:
            v, h, w = both(u**solver.power, y)
            return slope(u) * v, slope(u) * h / y.size, w / y.size

        method = WithIntegral(method, joint_in_u)
        rates, start = beside_integral(in_u), (y, jnp.zeros((2,), y.dtype))
        per_step, once = per_step - 1 + quadrature.PER_STEP, quadrature.ONCE
    solution = _solution(rates, method, u0, u1, start, solver)
    success = solution.result == diffrax.RESULTS.successful
    end = jax.tree.map(lambda ys: jnp.where(success, ys[0], jnp.nan), solution.ys)
    if joint is not None:
        end = (end[0], *(y.size * end[1]))
    steps = solution.stats["num_steps"]
    return end, Stats(
        nfe=per_step * steps + once,
        accepted=solution.stats["num_accepted_steps"],
        rejected=solution.stats["num_rejected_steps"],
        success=success,
    )


def _method(solver: Solver) -> tuple[diffrax.AbstractSolver, int, int]:
    """The method, its evaluations a step and once."""
    kind, per_step, once = METHODS[solver.method]
    if not issubclass(kind, diffrax.AbstractRungeKutta):
        return kind(), per_step, once
    # What diffrax chooses by itself for these adjoints, but not inside of WithIntegral.
    return kind(scan_kind="bounded" if solver.fixed_steps else "lax"), per_step, once


def _solution(
    rates: Callable[..., Any],
    method: diffrax.AbstractSolver,
    u0: float | Array,
    u1: float | Array,
    start: Any,
    solver: Solver,
) -> Any:
    """diffrax's solution of d(state)/du = rates from ``start``, arrived or not."""
    first, controller, max_steps = _steps(solver, u1 - u0)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        method,
        t0=u0,
        t1=u1,
        dt0=first,
        y0=start,
        stepsize_controller=controller,
        max_steps=max_steps,
        adjoint=diffrax.DirectAdjoint() if solver.fixed_steps else diffrax.ForwardMode(),
        throw=False,
    )


def _steps(solver: Solver, length: float | Array) -> tuple[float | Array, Any, int]:
    """The first step in u, the step control, and the most steps."""
    if solver.fixed_steps is not None:
        return length / solver.fixed_steps, diffrax.ConstantStepSize(), solver.fixed_steps + 1
    controller = diffrax.PIDController(
        rtol=solver.rtol,
        atol=solver.atol,
        pcoeff=solver.pcoeff,
        icoeff=solver.icoeff,
        norm=rms_norm,
    )
    first = jnp.sign(length) * jnp.minimum(solver.first_step, jnp.abs(length))
    return first, controller, solver.max_steps
