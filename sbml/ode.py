"""The probability-flow ODE and the one place that solves it.

    dx/dt = v(x, t) = f(t) x - 1/2 g(t)^2 s(x, t)

has the marginals of the SDE. It is solved by diffrax in the coordinate u = t^(1/power), in which
the field is smooth near t = 0 where g^2 / sigma dominates; du has no adaptive step to guess there:
``first_step`` is explicit, for diffrax's own choice accepts a step far too long.

Every solve is of one example. Under ``vmap`` each keeps its own step sizes, so an image's result
does not depend on its batch-mates.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from sbml.quadrature import Integrand, WithIntegral, beside_integral, of_solution
from sbml.sdes import SDE
from sbml.types import Array, Score

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

    ``nfe``, evaluations of the field, is exact where the first step is accepted; each rejection
    before that costs one more than it counts.
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
      rtol, atol: tolerances of the adaptive step control, in units of x and nats.
      power: t = u^power; 2 solves in sqrt(t), 1 in t.
      first_step: the first step, in u.
      pcoeff, icoeff: the proportional-integral controller's coefficients.
      fixed_steps: this many equal steps in u instead of step control.
      nodes: points of each step over which an integral along the solution is summed.
      max_steps: give up (result NaN, ``success`` False) after this many.

    Raises:
      ValueError: for an unknown method, or step control on a method without an error estimate.
    """

    method: str = _static("tsit5")
    rtol: float = 1e-4
    atol: float = 1e-4
    power: float = _static(2.0)
    first_step: float = _static(1e-3)
    pcoeff: float = _static(0.3)
    icoeff: float = _static(0.4)
    fixed_steps: int | None = _static(None)
    max_steps: int = _static(10_000)
    nodes: int = _static(2)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown ODE method {self.method!r}; choose from {sorted(METHODS)}")
        if self.method == "euler" and self.fixed_steps is None:
            raise ValueError("euler has no error estimate: set fixed_steps, or choose tsit5")
        for name in ("rtol", "atol", "power", "first_step"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("fixed_steps", "max_steps", "nodes"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"{name}={steps}: need at least one")

    def tighter(self, factor: float) -> "Solver":
        """The same with both tolerances divided by ``factor``."""
        return dataclasses.replace(self, rtol=self.rtol / factor, atol=self.atol / factor)


def rms(y: Array) -> Array:
    """The root mean square of all entries: how large the error of a step is."""
    return jnp.sqrt(jnp.mean(y**2))


def velocity(score: Score, sde: SDE, x: Array, t: Array) -> Array:
    """v(x, t) = f(t) x - 1/2 g(t)^2 s(x, t), shape ``(*s)``."""
    return sde.drift(x, t) - 0.5 * sde.diffusion(t) ** 2 * score(x, t, None)


def transport(
    score: Score, sde: SDE, x: Array, t0: float, t1: float, solver: Solver
) -> tuple[Array, Stats]:
    """Where the ODE carries ``x (*s)`` from ``t0`` to ``t1``, in either direction, and stats."""
    return solve(lambda t, x: velocity(score, sde, x, t), x, t0, t1, solver)


def solve(
    field: Callable[[Array, Array], Array],
    y: Array,
    t0: float,
    t1: float,
    solver: Solver,
    integrand: Integrand | None = None,
) -> tuple[Any, Stats]:
    """Solve dy/dt = field(t, y) from ``t0`` to ``t1`` (either order, both positive).

    Args:
      field: of scalar ``t`` and ``y (*s)``, of the shape of ``y``.
      y: at ``t0``.
      t0, t1, solver: from where to where, and how.
      integrand: a scalar h(t, y) whose integral along the solution is wanted (``sbml.quadrature``).

    Returns:
      y(t1), or (y(t1), integral), NaN if the solver gave up (one image's failure must not stop the
      others), and stats.
    """

    def slope(u: Array) -> Array:
        return solver.power * u ** (solver.power - 1)

    def in_u(u: Array, y: Array, args: Any) -> Array:
        return slope(u) * field(u**solver.power, y)

    u0, u1 = t0 ** (1 / solver.power), t1 ** (1 / solver.power)
    kind, per_step, once = METHODS[solver.method]
    method: diffrax.AbstractSolver = kind()
    rates: Callable[..., Any] = in_u
    norm: Callable[[Any], Array] = rms
    start: Any = y
    if integrand is not None:
        h: Integrand = integrand
        nodes = solver.nodes
        method = WithIntegral(method, lambda u, y: slope(u) * h(u**solver.power, y), nodes)
        rates, norm = beside_integral(in_u), of_solution(rms)
        start, per_step = (y, jnp.zeros((), y.dtype)), per_step + nodes
    if solver.fixed_steps is None:
        first = min(solver.first_step, abs(u1 - u0)) * (1.0 if u1 > u0 else -1.0)
        controller: diffrax.AbstractStepSizeController = diffrax.PIDController(
            rtol=solver.rtol,
            atol=solver.atol,
            pcoeff=solver.pcoeff,
            icoeff=solver.icoeff,
            norm=norm,
        )
        max_steps = solver.max_steps
    else:
        first = (u1 - u0) / solver.fixed_steps
        controller, max_steps = diffrax.ConstantStepSize(), solver.fixed_steps + 1
    solution = diffrax.diffeqsolve(
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
    success = solution.result == diffrax.RESULTS.successful
    end = jax.tree.map(lambda ys: jnp.where(success, ys[0], jnp.nan), solution.ys)
    steps = solution.stats["num_steps"]
    return end, Stats(
        nfe=per_step * steps + once,
        accepted=solution.stats["num_accepted_steps"],
        rejected=solution.stats["num_rejected_steps"],
        success=success,
    )
