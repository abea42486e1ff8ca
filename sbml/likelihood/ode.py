"""The probability-flow ODE and its solver.

    dx/dt = v(x, t) = f(t) x - 1/2 g(t)^2 s(x, t) = alpha'(t) E[x_0 | x] + sigma'(t) E[z | x]

has the same marginals as the SDE, if s is the exact score. The second form is regular where
alpha = 0. It is used for scores that compute both expectations (``score.predictions``, see
``sbml.types``); their ODE ends at the SDE's ``last_regular_time``, which is T unless alpha reaches
0 with an infinite slope, or with slope 0. If alpha(T) = 0, the ODE of other scores ends at the
SDE's ``largest_time``. From there to T x is scaled in proportion to sigma.

diffrax solves the ODE in the coordinate u = t^(1/power). Near t = 0 the velocity grows like
g^2 / sigma (like t^(-1/2) for ``VP``). For power 2, the factor dt/du = 2 u cancels this growth, so
the field is smooth in u. The first step is set (``first_step``), because the one that diffrax
chooses by itself is far too long, and the error estimate does not reject it.

Every solve is of one example. Under ``vmap`` each example keeps its own step sizes, so the result
for an image does not depend on the other images of its batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Integer

from sbml.core import pytrees, scalars
from sbml.core.door import checked, typed
from sbml.core.pytrees import static
from sbml.core.scalars import (
    Number,
    above_0,
    at_least,
    at_most,
    between,
    finite,
    notation,
    one_of,
    positive,
)
from sbml.core.types import (
    Array,
    Example,
    Joint,
    Key,
    PyTree,
    Scalar,
    Score,
    deterministic,
    full_precision,
    half_precision,
    in_full_precision,
    predictor,
)
from sbml.score import divergence
from sbml.score.divergence import Trace
from sbml.sdes import SDE

if TYPE_CHECKING:  # Otherwise a function imports it, because it takes half a second.
    import diffrax

# A larger tolerance than 1 would accept every step.
Tolerance = Annotated[Number, above_0, at_most(1)]
Instant = Annotated[Number, between(0, 1)]
End = Annotated[Number, finite, at_least(0)]  # of a solve of any ODE
Steps = Annotated[int, between(1, 2**31 - 2)]  # They and one more are counted by int32 numbers.
Field = Callable[[Scalar, Example], Example]  # (t, y) -> dy/dt

# method: (class of diffrax, evaluations of the field in a step, evaluations at the start). dopri5
# and tsit5 have seven stages, but the last stage of a step is the first stage of the next. So they
# evaluate the field once at the start, and six times in each step.
METHODS = {
    "dopri5": ("Dopri5", 6, 1),
    "tsit5": ("Tsit5", 6, 1),
    "heun": ("Heun", 2, 0),
    "euler": ("Euler", 1, 0),
}

# A likelihood takes 8 to 100 steps, and about 200 at a tolerance of 1e-10 in float64. More than
# 1,000 are taken where rounding in float32 looks like an error of the step: for an example far
# outside the data, or at a tolerance of 1e-8. All examples of a batch wait for such an example.
MAX_STEPS = 1_000

NO_GRADIENT = (
    'this solver has derivatives by jvp only: for those by grad give Solver(adjoint="reverse")'
)


def check_tolerances(
    solver: "Solver", dtype: DTypeLike, name: str = "", factor: float = 1.0
) -> None:
    """Check that the tolerances of ``solver``, if it has step control, are at least ``factor``
    times the rounding error of ``dtype``: 1e-7 in float32, and 1e-16 in float64.

    With smaller ones, steps would follow the rounding errors. Traced tolerances are not checked.
    ``name`` is put before their names in the message.
    """
    least = factor * 10.0 ** (-1 - jnp.finfo(dtype).precision)
    for field in ("rtol", "atol") if solver.fixed_steps is None else ():
        if not scalars.is_traced(value := getattr(solver, field)) and np.any(value < least):
            raise ValueError(
                f"{name}{field}={notation(value, 'g')}: must be at least "
                f"{notation(least, 'g')} in {jnp.dtype(dtype)}, because of its rounding errors; "
                "smaller errors need jax_enable_x64"
            )


class Stats(NamedTuple):
    """The cost of a solve and whether it reached its end: scalars.

    Attributes:
      nfe: the number of evaluations of the field, whether with an integrand or without. The count
        is exact if no step is rejected before the first accepted one. Without an integrand, each
        such rejection costs one evaluation that is not counted.
      accepted, rejected: the numbers of accepted and of rejected steps.
      success: whether the solver reached the end in at most ``max_steps`` steps.
    """

    nfe: Integer[Array, ""]
    accepted: Integer[Array, ""]
    rejected: Integer[Array, ""]
    success: Bool[Array, ""]


@pytrees.register
@typed
@dataclasses.dataclass(frozen=True)
class Solver:
    """How an ODE is solved.

    It is hashable, so it can be static under ``jit``. It can also be an argument of a compiled
    function; its tolerances are then traced.

    Attributes:
      method: ``dopri5``, ``tsit5``, ``heun`` or ``euler``.
      rtol, atol: the relative and absolute tolerance of the step control. They apply to each entry
        of y, and to the integral divided by the number of entries of y (for a log-determinant: nats
        per dimension). Each is at least 1e-7 for a solve in float32, and 1e-16 in float64.
      power: the coordinate u with t = u^power: 2 solves in sqrt(t), 1 in t. For ``RectifiedFlow``
        and a score with predictions, 1 needs fewer evaluations.
      first_step: the length of the first step, in u.
      pcoeff, icoeff: coefficients of the proportional-integral step control.
      fixed_steps: the number of equal steps in u; None for step control.
      max_steps: the number of steps after which the solver gives up, with NaN as the result and
        ``success`` False. It gives up earlier where the velocity is not finite.
      adjoint: ``forward`` for derivatives by ``jvp`` and ``jacfwd``, ``reverse`` for those by
        ``grad``. The latter are exact for the steps that the solver took. They compute each step a
        few times again from about sqrt(2 max_steps) stored ones, so their memory does not grow with
        the number of steps. Without derivatives both give the same numbers.
    """

    method: Annotated[str, one_of(*METHODS)] = "tsit5"
    rtol: Tolerance = 1e-4
    atol: Tolerance = 1e-4
    power: Annotated[Number, positive] = static(2.0)
    first_step: Annotated[Number, positive] = static(1e-2)
    pcoeff: Annotated[Number, finite, at_least(0)] = static(0.3)
    # With icoeff <= 0 a step would not become shorter after an error that is too large.
    icoeff: Annotated[Number, positive] = static(0.4)
    fixed_steps: scalars.Steps | None = static(None)
    max_steps: Steps = static(MAX_STEPS)
    adjoint: Annotated[str, one_of("forward", "reverse")] = static("forward")

    def __post_init__(self) -> None:
        if self.method == "euler" and self.fixed_steps is None:
            raise ValueError("method=euler has no error estimate: set fixed_steps, or choose tsit5")

    def tighter(self, factor: float) -> "Solver":
        """This solver with its tolerances divided by ``factor``, and ``fixed_steps`` multiplied."""
        steps = self.fixed_steps and math.ceil(self.fixed_steps * factor)
        rtol, atol = self.rtol / factor, self.atol / factor
        return dataclasses.replace(self, fixed_steps=steps, rtol=rtol, atol=atol)


def rms_norm(tree: PyTree) -> Scalar:
    """The root mean square, over the leaves, of the root mean square of each leaf; a scalar.

    All leaves have the same weight. So an integral that is solved together with an image, such as
    the log-determinant, counts as much as the whole image. In a norm over all d + 1 numbers alike,
    its error would hardly be controlled.
    """
    squares = [jnp.mean(leaf**2) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares) / len(squares))


@checked
def velocity(score: Score, sde: SDE, x: Example, t: Scalar) -> Example:
    """v(x, t), shape ``(*s)``, computed from the score's predictions if it has them."""
    both = predictor(score)
    if both is None:
        return sde.drift(x, t) - 0.5 * sde.diffusion(t) ** 2 * deterministic(score, x, t)
    (x_0, noise), (mean_slope, std_slope) = both(x, t), sde.slopes(t)
    return mean_slope * x_0 + std_slope * noise


def check_precision(score: Score, sde: SDE, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if the velocity of an example of this ``shape`` is of half precision.

    Rounding errors are the same in both of the solves whose difference measures the solver's error.
    In half precision they change log p by more than the budget, and it would be called converged.
    """
    x, t = (jax.ShapeDtypeStruct(s, jnp.result_type(float)) for s in (shape, ()))
    if kind := half_precision(functools.partial(velocity, score, sde), x, t):
        raise ValueError(
            f"the score computes in {kind}, whose rounding errors the check of convergence does "
            "not see: compute it in float32"
        )


@checked
def score_of(v: Example, score: Score, sde: SDE, x: Example, t: Scalar) -> Example:
    """s(x, t), shape ``(*s)``, recovered from its velocity ``v`` without a call of ``score``.

    For a score with predictions it is -E[z | x] / sigma, which solves x = alpha E[x_0 | x] +
    sigma E[z | x] and the equation of v.
    """
    if predictor(score) is None:
        return 2 * (sde.drift(x, t) - v) / sde.diffusion(t) ** 2
    (alpha, sigma), (mean_slope, std_slope) = (sde.mean_coef(t), sde.std(t)), sde.slopes(t)
    noise = (alpha * v - mean_slope * x) / (alpha * std_slope - mean_slope * sigma)
    return -noise / sigma


def last_time(score: Score, sde: SDE) -> Number:
    """The time at which the ODE of ``score`` ends: T, or the SDE's ``largest_time``."""
    return sde.largest_time if predictor(score) is None else sde.last_regular_time


class Flow(NamedTuple):
    """The solution x(t) of the ODE from ``t0`` to ``t1``.

    Attributes:
      x: x(t1), ``(*s)``.
      divergence: the integral of div v(x(t), t) dt from t0 to t1, a scalar; 0 without a trace.
      correction: its first-order correction for the error of the solver's path, a scalar
        (``sbml.likelihood``); 0 without a trace.
      stats: the cost of the solve, and whether it succeeded.
    """

    x: Example
    divergence: Scalar
    correction: Scalar
    stats: Stats


@checked
def flow(
    score: Score,
    sde: SDE,
    x: Example,
    t0: Instant,
    t1: Instant,
    solver: Solver,
    trace: Trace | None = None,
    key: Key | None = None,
    *,
    backwards: bool = False,
) -> Flow:
    """Solve the ODE from ``x`` at ``t0`` to ``t1``, in either direction of time.

    Args:
      score, sde: the score of one example, and its forward process.
      x: the value at ``t0``, shape ``(*s)``.
      t0, t1: the two ends.
      solver: how the ODE is solved.
      trace: how the divergence is computed; None to leave it out, which costs less.
      key: for the random probes of the trace.
      backwards: with a trace, whether ``t1`` < ``t0``.
    """
    x, last = in_full_precision(x), last_time(score, sde)
    whole = not scalars.is_traced(last) and last == sde.T
    start, end = (t0, t1) if whole else (scalars.minimum(t0, last), scalars.minimum(t1, last))
    # From ``last`` to T the ODE is x' = x (log sigma)', of divergence d (log sigma)'.
    before, after = growth(sde, t0, start, x), growth(sde, end, t1, x)
    y = before * x

    def field(t: Scalar, x: Example) -> Example:
        return velocity(score, sde, x, t)

    if trace is None:
        y, stats = solve(field, y, start, end, solver)
        integral = correction = jnp.zeros((), x.dtype)
    else:
        vs, exact = trace.directions(key, x.shape).astype(x.dtype), full_precision(field)

        @full_precision
        def with_divergence(t: Scalar, x: Example) -> tuple[Example, Scalar, Example]:
            v, forms = divergence.quadratic_forms(lambda x: exact(t, x), x, vs)
            return v, trace.combined(forms), score_of(v, score, sde, x, t)

        (y, integral, correction), stats = solve_with_integral(
            exact, with_divergence, y, start, end, solver, backwards=backwards
        )
    return Flow(after * y, integral + x.size * jnp.log(before * after), correction, stats)


def growth(sde: SDE, t0: Number, t1: Number, x: Example) -> Scalar:
    """sigma(t1) / sigma(t0), a scalar, in the precision of ``x``; 1 for equal times, also at 0."""
    if t0 is t1 or (not scalars.is_traced(t0, t1) and t0 == t1):
        return jnp.ones((), x.dtype)
    return sde.std(jnp.asarray(t1, x.dtype)) / sde.std(jnp.asarray(t0, x.dtype))


@checked
def solve(field: Field, y: Example, t0: End, t1: End, solver: Solver) -> tuple[Example, Stats]:
    """Solve dy/dt = field(t, y) from ``t0`` to ``t1`` (in either order, both at least 0).

    Args:
      field: a function of scalar ``t`` and ``y (*s)`` with a result of the shape of ``y``.
      y: the value at ``t0``.
      t0, t1: the two ends.
      solver: how to solve.

    Returns:
      y(t1) and stats. y(t1) is NaN if the solver gave up; an error would stop the other images of
      the batch.
    """
    start, evaluations = in_full_precision(y), METHODS[solver.method][1:]
    return _integrate(_in_u(field, solver), _method(solver), t0, t1, start, solver, evaluations)


@checked
def solve_with_integral(
    field: Field,
    joint: Joint,
    y: Example,
    t0: End,
    t1: End,
    solver: Solver,
    *,
    backwards: bool = False,
) -> tuple[tuple[Example, Scalar, Scalar], Stats]:
    """Solve an ODE as :func:`solve` does, and integrate a scalar h(t, y) along the solution.

    Args:
      field, y, solver: as in :func:`solve`.
      joint: the function (t, y) -> (field, h, w), where w approximates the gradient with respect to
        y of the result (see ``sbml.quadrature``).
      t0, t1: the ends, ``t0`` < ``t1`` unless ``backwards``.
      backwards: whether ``t1`` < ``t0``.

    Returns:
      (y(t1), the integral of h dt from t0 to t1, its correction by w) and stats. The three are NaN
      if the solver gave up.
    """
    from sbml.likelihood.quadrature import WithIntegral

    y = in_full_precision(y)
    # WithIntegral goes forwards only: backwards in time the coordinate is -u.
    sign = -1 if backwards else 1

    def joint_in_u(u: Array, y: Array) -> tuple[Array, Array, Array]:
        v, h, w = joint((sign * u) ** solver.power, y)
        slope = sign * _slope(sign * u, solver)
        return slope * v, slope * h / y.size, w / y.size

    in_u = _in_u(field, solver, sign)

    def rates(u: Array, state: tuple[Array, Array], args: None) -> tuple[Array, Array]:
        return in_u(u, state[0], args), jnp.zeros_like(state[1])

    method, start = WithIntegral(_method(solver), joint_in_u), (y, jnp.zeros((2,), y.dtype))
    (end, integrals), stats = _integrate(
        rates, method, t0, t1, start, solver, _evaluations_with_integral(solver), sign
    )
    integral, correction = y.size * integrals
    return (end, integral, correction), stats


def most_evaluations(solver: Solver) -> int:
    """The evaluations of the field by :func:`solve_with_integral` in ``max_steps`` steps."""
    per_step, once = _evaluations_with_integral(solver)
    return solver.max_steps * per_step + once


def _evaluations_with_integral(solver: Solver) -> tuple[int, int]:
    """The numbers of evaluations in a step and at the start."""
    from sbml.likelihood import quadrature

    return METHODS[solver.method][1] - 1 + quadrature.PER_STEP, quadrature.ONCE


def _slope(u: Array, solver: Solver) -> Array:
    """dt/du."""
    return solver.power * u ** (solver.power - 1)


def _in_u(field: Field, solver: Solver, sign: int = 1) -> Callable[..., Array]:
    """dy/du, or for ``sign`` -1 dy/d(-u), with the arguments that diffrax passes."""

    def rate(u: Array, y: Array, args: None) -> Array:
        u = sign * u
        slope = field(u**solver.power, y)
        if jnp.shape(slope) != y.shape:
            raise ValueError(
                f"the field returned shape {jnp.shape(slope)} for y of shape "
                f"{y.shape}: return dy/dt, of the shape of y"
            )
        return sign * _slope(u, solver) * slope

    return rate


def _method(solver: Solver) -> "diffrax.AbstractSolver":
    import diffrax

    kind = getattr(diffrax, METHODS[solver.method][0])
    if not issubclass(kind, diffrax.AbstractRungeKutta):
        return kind()
    # These are diffrax's own choices for the adjoints of ``_integrate``, but it does not make them
    # for a method inside WithIntegral.
    if solver.adjoint == "reverse":
        return kind(scan_kind="checkpointed")
    return kind(scan_kind="bounded" if solver.fixed_steps else "lax")


def _integrate(
    rates: Callable[..., PyTree],
    method: "diffrax.AbstractSolver",
    t0: Number,
    t1: Number,
    start: PyTree,
    solver: Solver,
    evaluations: tuple[int, int],
    sign: int = 1,
) -> tuple[PyTree, Stats]:
    """The solution of d(state)/d(sign u) = rates at ``t1`` from ``start`` at ``t0``, and the stats;
    ``evaluations`` are the numbers of evaluations of the field in a step and at the start."""
    import diffrax
    from equinox.internal import nondifferentiable_backward

    from sbml.likelihood.quadrature import Control

    check_tolerances(solver, jax.tree.leaves(start)[0].dtype)
    u0, u1 = sign * t0 ** (1 / solver.power), sign * t1 ** (1 / solver.power)
    length, max_steps = u1 - u0, solver.max_steps
    controller: diffrax.AbstractStepSizeController
    adjoint: diffrax.AbstractAdjoint
    if solver.fixed_steps is not None:
        first, controller = length / solver.fixed_steps, diffrax.ConstantStepSize()
        max_steps, adjoint = solver.fixed_steps + 1, diffrax.DirectAdjoint()
    else:
        first = jnp.sign(length) * jnp.minimum(solver.first_step, jnp.abs(length))
        controller = Control(
            rtol=solver.rtol,
            atol=solver.atol,
            pcoeff=solver.pcoeff,
            icoeff=solver.icoeff,
            norm=rms_norm,
        )
        adjoint = diffrax.ForwardMode()
    if solver.adjoint == "reverse":
        adjoint = diffrax.RecursiveCheckpointAdjoint()
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        method,
        t0=u0,
        t1=u1,
        dt0=first,
        y0=start,
        stepsize_controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
        throw=False,
    )
    success, counts = solution.result == diffrax.RESULTS.successful, solution.stats
    end = jax.tree.map(lambda ys: jnp.where(success, ys[0], jnp.nan), solution.ys)
    if solver.adjoint == "forward" and solver.fixed_steps is None:
        end = nondifferentiable_backward(end, msg=NO_GRADIENT, symbolic=True)
    nfe = evaluations[0] * counts["num_steps"] + evaluations[1]
    return end, Stats(nfe, counts["num_accepted_steps"], counts["num_rejected_steps"], success)
