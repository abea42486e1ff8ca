"""The distribution of a score: log p, samples, paths, and their derivatives, as pure functions.

    log p(y) = log p_eps(x) + log |det df^-1/dy|,      x = f^-1(y)

Without a ``transform`` f, y is x. Each number is a function of one example; ``vectorised`` makes of
it one of all examples, which is compiled once, also for a score that is made anew for each call
(``sbml.core.arguments``).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from sbml import likelihood
from sbml.core import arguments, bits, pytrees
from sbml.core.door import checked, typed
from sbml.core.scalars import Count, Number, between
from sbml.core.streams import stream
from sbml.core.types import (
    Anything,
    Array,
    Example,
    Key,
    Real,
    Score,
    check_function,
    full_precision,
)
from sbml.density import checks, transforms
from sbml.density.estimators.base import Target, each
from sbml.density.estimators.ode import Estimator
from sbml.likelihood import ode
from sbml.likelihood.ode import Solver
from sbml.samplers import ODE, Chain, Map, Path, PathLogProb, Sampler, denoise
from sbml.samplers.density import check_folds
from sbml.score.divergence import Trace, exact_batch
from sbml.sdes import SDE

_jit = functools.cache(arguments.compiled)


class How(NamedTuple):
    """The constants of a function of one example."""

    sde: SDE
    eps: float
    shape: tuple[int, ...]
    trace: Trace
    denoise: bool = False
    ends: tuple[float, ...] = ()
    sampler: Any = None


def vectorised(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f(score, *row, solver, how)`` of one example as a compiled function of n examples,
    ``f(distribution, *rows, condition=...)``, whose other arguments are fields of ``How``.

    The ``rows`` are arrays ``(n, ...)``. The condition is one for all examples, or one for each
    along the axes of ``batch``, whose product is n; ``(n,)`` if it is None. With a ``divergence``,
    an example may need many tangents, so fewer examples are computed at once.
    """

    @functools.wraps(f)
    def of_all(
        density: "Distribution",
        *rows: Any,
        condition: Any,
        batch: tuple[int, ...] | None = None,
        divergence: bool = False,
        **constants: Any,
    ) -> Any:
        if isinstance(constants.get("sampler"), Map) and condition is not None:
            raise ValueError(
                "a condition reaches the score only, and samplers.Map does not use it: leave it "
                "out, and give Map the function under this condition"
            )
        conditions = density._conditions(condition, (len(rows[0]),) if batch is None else batch)
        how = How(density.sde, density._eps, density.shape, density._trace, **constants)
        size = density.batch_size
        if divergence and (how.trace.kind == "exact" or how.sampler):
            size = min(size, exact_batch(density.dims))
        run = density._compiled(_of_rows, conditions, "f", "how", "size")
        try:
            return run(rows, conditions, density.solver, f=f, how=how, size=size)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise ValueError(
                "this solver has derivatives by grad only: for those by jvp or jacfwd give "
                'Density a Solver(adjoint="forward")'
            ) from error

    return of_all


def _of_rows(
    score: Score,
    rows: tuple[Any, ...],
    conditions: Any,
    solver: Solver,
    *,
    f: Callable[..., Any],
    how: How,
    size: int,
) -> Any:
    return each(functools.partial(f, solver=solver, how=how), score, rows, conditions, size)


@vectorised
def _log_prob(score: Score, x: Example, key: Key | None, solver: Solver, how: How) -> Array:
    if how.sampler is not None:
        of_map: Array = how.sampler.logp(score, how.sde, x, eps=how.eps).logp
        return of_map
    estimator = Estimator(how.trace, solver=solver)
    estimator.check(score, how.sde, how.shape)
    found: Array = estimator.solved(score, None, x, key, Target(how.sde, how.eps))[1].logp
    return found


@vectorised
def _sample(score: Score, key: Key, solver: Solver, how: How) -> Example:
    z, sampler = how.sde.prior_sample(key, how.shape), how.sampler or ODE(solver)
    x: Example = sampler(score, how.sde, z, stream(key, "sampler"), eps=how.eps)[0]
    return denoise(score, how.sde, x, jnp.asarray(how.eps, x.dtype)) if how.denoise else x


@vectorised
def _sample_and_log_prob(score: Score, key: Key, solver: Solver, how: How) -> tuple[Example, Any]:
    ode.check_precision(score, how.sde, how.shape)
    z, probes = how.sde.prior_sample(key, how.shape), stream(key, "probes")
    if how.sampler is not None:
        drawn: tuple[Example, Any] = how.sampler.sample_logp(score, how.sde, z, eps=how.eps)
        return drawn
    x, found = likelihood.sample_logp(
        score, how.sde, z, probes, eps=how.eps, trace=how.trace, solver=solver
    )
    return x, found.logp


@vectorised
def _sample_path(score: Score, key: Key, solver: Solver, how: How) -> tuple[Path, PathLogProb]:
    ode.check_precision(score, how.sde, how.shape)
    z, noise = how.sde.prior_sample(stream(key, "latent"), how.shape), stream(key, "sampler")
    found: tuple[Path, PathLogProb] = how.sampler.sample_path(score, how.sde, z, noise, eps=how.eps)
    return found


@vectorised
def _path_log_prob(score: Score, x: Array, solver: Solver, how: How) -> PathLogProb:
    ode.check_precision(score, how.sde, how.shape)
    path = Path(x, how.sampler.known_times(how.sde, how.eps), how.sampler)
    found: PathLogProb = how.sampler.path_log_prob(score, how.sde, path)
    return found


@typed
@dataclasses.dataclass(frozen=True, repr=False)
class Distribution:
    """The distribution of a :class:`~sbml.density.density.Density`, which explains the fields."""

    score: Callable[..., Any]
    sde: SDE
    shape: tuple[int, ...]
    levels: Annotated[int, between(2, bits.MOST_LEVELS)] | None = None
    eps: Number | None = None
    trace: Trace | None = None
    solver: Solver = Solver(rtol=2e-4, atol=2e-4, adjoint="reverse")
    batch_size: Count = 32
    condition_shape: Any = ()
    transform: Any = None

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_node(cls, _flatten, functools.partial(_unflatten, cls))

    def __post_init__(self) -> None:
        check_function(self.score, "score", "x", "t", "key", optional="condition")
        bits.dims(self.shape)
        if self.eps is not None:
            object.__setattr__(self, "eps", float(self.eps))  # An array is not hashable.
        checks.check_sde(self.sde, self.score)
        self.sde.check_time(self._eps)
        checks.check_condition_shape(self.condition_shape)
        if self.transform is not None:
            transforms.check_methods(self.transform, self.shape)
            if self.levels is not None:
                raise ValueError(
                    f"levels={self.levels} with a transform: integers have none; leave one of them "
                    "out"
                )

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)[1:]
        changed = [f for f in fields if getattr(self, f.name) != f.default or f.name == "shape"]
        rest = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        name = getattr(self.score, "__name__", type(self.score).__name__)
        return f"{type(self).__name__}({name}, {rest})"

    @property
    def dims(self) -> int:
        """The number of dimensions of one example."""
        return bits.dims(self.shape)

    @checked
    def log_prob(self, x: Real, key: Key | None = None, condition: Any = None) -> Real:
        """log p_eps(x) in nats, ``(*b)``, of continuous examples ``x (*b, *shape)``.

        The prior N(0, S^2 I), where S is ``sde.prior_std``, stands for p_T. A log p is NaN if
        the solver gave up.

        Args:
          x: one example, or several along any leading axes.
          key: for the random probes; None for an exact trace. The estimate has the mean log p, and
            the same key gives the same number.
          condition: for a conditional score.

        Raises:
          ValueError: ``x`` has another shape, there is no key to draw probes, or the score computes
            in half precision.
        """
        count = x.ndim - len(self.shape)
        if count < 0 or x.shape[count:] != self.shape:
            raise ValueError(f"x has shape {x.shape}: give (..., {str(self.shape)[1:-1]})")
        return self._log_prob(x, key, condition)

    def _log_prob(
        self, x: Real, key: Key | None, condition: Any, sampler: Chain | None = None
    ) -> Real:
        """log p of the ODE or of what a ``sampler`` draws, ``(*b)``, of ``x (*b, *shape)``."""
        batch = x.shape[: x.ndim - len(self.shape)]
        x = x.reshape(-1, *self.shape)
        x, log_det = transforms.exactly(transforms.inverse, self.transform, x)
        x = jnp.asarray(x, jnp.result_type(float))
        keys = None if key is None else jax.random.split(key, len(x))
        logp = _log_prob(
            self, x, keys, condition=condition, batch=batch, divergence=True, sampler=sampler
        )
        return jnp.asarray(logp + log_det, logp.dtype).reshape(batch)

    @checked
    def sample(
        self, key: Key, n: Count, condition: Any = None, *, sampler: Sampler | None = None
    ) -> Anything:
        """``n`` samples ``(n, *shape)``: uint8 integers if there are ``levels``, else floats.

        Continuous samples are of p_eps, with a transform in float64 (NumPy). Integers are rounded
        from E[x_0 | x_eps]. A ``sampler`` is one of ``sbml.samplers``; None for the ODE by
        ``solver``.

        Raises:
          ValueError: there are more than 256 levels, or a sample of integers is not finite, because
            the solver gave up.
        """
        if self.levels is not None and self.levels > 256:
            raise ValueError(f"levels={self.levels}: give an integer of 2 to 256")
        keys, tweedie = jax.random.split(key, n), self.levels is not None
        x = _sample(self, keys, condition=condition, denoise=tweedie, sampler=sampler)
        if self.levels is None:
            return self._data(x)[0]
        # A lost sample must not pass for a black image.
        lost = jnp.sum(~jnp.isfinite(x).reshape(n, -1).all(axis=1))
        how = f"sampler={sampler}" if sampler else f"solver={self.solver}"
        pytrees.when_known(functools.partial(_check_samples, n, how), lost)
        return bits.to_pixels(x, self.levels)

    @checked
    def sample_and_log_prob(
        self,
        key: Key,
        n: Count,
        condition: Any = None,
        *,
        sampler: Chain | None = None,
        max_dims: Count = 100,
    ) -> tuple[Anything, Anything]:
        """``n`` continuous samples ``(n, *shape)`` and their log p_eps in nats ``(n,)``.

        One solve gives both. The samples are those of :meth:`sample` for the same key, in the scale
        of the score if there are ``levels``. With a random trace log p is unbiased; an importance
        weight exp(-log p) is not, and needs an exact trace.

        Args:
          key: for the samples.
          n: their number.
          condition: for a conditional score.
          sampler: a deterministic sampler with fixed steps. Then log p is the exact density of what
            it draws (``sbml.samplers.density``), whatever its number of steps; None for the ODE.
          max_dims: the largest number d of dimensions for a sampler. Each evaluation of the score
            costs as much as d + 1, and each step a determinant of a d x d matrix.

        Raises:
          ValueError: the sampler has no such density, there are more dimensions, or a step of the
            sampler folds space, so that the density is not known. If a step may fold, there is a
            warning. In your own ``jit``, the last error arrives as JAX's ``JaxRuntimeError``,
            which contains the message.
        """
        if sampler is not None and self.dims > max_dims:
            raise ValueError(
                f"{self.dims} dimensions with a sampler: each evaluation of the score would cost "
                f"as much as {self.dims + 1}; if that is meant, give max_dims={self.dims}"
            )
        keys = jax.random.split(key, n)
        x, found = _sample_and_log_prob(
            self, keys, condition=condition, divergence=True, sampler=sampler
        )
        if sampler is not None:
            check_folds(sampler, found)
            found = found.logp
        y, log_det = self._data(x)
        return y, jnp.asarray(found + log_det, found.dtype)

    @checked
    def sample_path(
        self, key: Key, n: Count, condition: Any = None, *, sampler: Chain
    ) -> tuple[Path, PathLogProb]:
        """``n`` paths of a stochastic sampler, ``path.x (n, steps + 1, *shape)``, and their log
        densities in nats, ``steps (n, steps)`` (``sbml.samplers.density``).

        The samples are ``path.x[:, -1]``, in the scale of the score. With a transform f the data
        are f of them, and the log density has the term ``transform``.

        Raises:
          ValueError: a step of the sampler has no noise, it has a corrector, or the score computes
            in half precision.
        """
        keys = jax.random.split(key, n)
        path, found = _sample_path(self, keys, condition=condition, sampler=sampler)
        return path, self._with_transform(path.x[:, -1], found)

    @checked
    def path_log_prob(self, path: Path, condition: Any = None) -> PathLogProb:
        """The log densities, under this score, of one path that :meth:`sample_path` drew, or of
        several along any leading axes.

        Policy gradients use their derivatives by the parameters of the score: for a reward r, the
        gradient of E[r(x)] is E[r(x) times the gradient of ``path_log_prob(path).total``].

        Raises:
          ValueError: the path has another shape, or its times are not those of its sampler for this
            ``sde`` and ``eps``; and those of :meth:`sample_path`.
        """
        times = path.sampler.known_times(self.sde, self._eps)
        count = path.x.ndim - 1 - len(self.shape)
        if count < 0 or path.x.shape[count:] != (len(times), *self.shape):
            raise ValueError(
                f"path.x has shape {path.x.shape}: for {len(times) - 1} steps of examples of shape "
                f"{self.shape} give (..., {len(times)}, {str(self.shape)[1:-1]})"
            )
        batch = path.x.shape[:count]
        off = path.times / jnp.broadcast_to(times, path.times.shape) - 1
        pytrees.when_known(_check_times, jnp.max(jnp.abs(off)))
        x = path.x.reshape(-1, *path.x.shape[count:])
        found = _path_log_prob(self, x, condition=condition, batch=batch, sampler=path.sampler)
        found = self._with_transform(x[:, -1], found)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), found)

    def _with_transform(self, x: Array, found: PathLogProb) -> PathLogProb:
        if self.transform is None:
            return found
        return found._replace(transform=jnp.asarray(self._data(x)[1], found.prior.dtype))

    def _data(self, x: Anything) -> tuple[Anything, Anything]:
        """The data y of ``x (n, *shape)`` in the scale of the score, and log |det df^-1/dy|."""
        y = transforms.exactly(transforms.forward, self.transform, x)
        return y, transforms.exactly(transforms.inverse, self.transform, y)[1]

    @property
    def _eps(self) -> float:
        return self.sde.smallest_time if self.eps is None else float(self.eps)

    @property
    def _trace(self) -> Trace:
        if self.trace is not None:
            return self.trace
        return Trace("exact") if self.dims <= 64 else Trace("rademacher", 2)

    def _compiled(self, f: Callable[..., Any], condition: Any, *static: str) -> Callable[..., Any]:
        """``f`` with its first argument, the score, compiled; ``static`` are names of arguments.

        Products of float32 numbers are computed in float32 (``types.full_precision``).
        The condition is a pytree of arrays with a leading axis, or None.
        """
        one = jax.tree.map(lambda c: jax.ShapeDtypeStruct(c.shape[1:], c.dtype), condition)
        argument = full_precision(arguments.as_argument)(self.score, self.shape, one)
        return functools.partial(full_precision(_jit(f, *static)), argument)

    def _conditions(self, condition: Any, batch: tuple[int, ...]) -> Any:
        """The conditions of all examples of ``batch``, a pytree of arrays ``(n, ...)``; or None."""
        return checks.conditions(condition, batch, self.condition_shape, self.score)


def _flatten(density: Distribution) -> tuple[tuple[Any, ...], Any]:
    """The arrays of the score and of the transform, and everything else."""
    if (flat := vars(density).get("_flat")) is not None:
        return flat
    arrays, rest = arguments.split((density.score, density.transform))
    shapes = jax.tree.flatten(density.condition_shape, is_leaf=checks.is_shape)
    apart = "score", "transform", "condition_shape"
    names = [f.name for f in dataclasses.fields(density) if f.name not in apart]
    fields = tuple((name, getattr(density, name)) for name in names)
    return arrays, (rest, (tuple(shapes[0]), shapes[1]), fields)


def _unflatten(cls: type[Distribution], static: Any, arrays: Any) -> Distribution:
    rest, (shapes, tree), fields = static
    score, transform = arguments.joined(arrays, rest)
    density: Distribution = object.__new__(cls)
    whole = {"score": score, "transform": transform}
    whole["condition_shape"] = jax.tree.unflatten(tree, shapes)
    # JAX also puts other objects in the place of the arrays, such as None: a copy keeps them apart.
    for name, value in (*whole.items(), *fields, ("_flat", (tuple(arrays), static))):
        object.__setattr__(density, name, value)
    return density


def _check_times(off: Any) -> None:
    if not off <= 1e-4:  # This is more than their rounding.
        raise ValueError(
            "path.times are not those of its sampler for this density's sde and eps: give the path "
            "to the density that drew it, or to one with the same sde and eps"
        )


def _check_samples(n: int, how: str, lost: Any) -> None:
    if lost:
        raise ValueError(
            f"{int(lost)} of {n} samples are not finite, with {how}: give a solver "
            "with larger max_steps, or with another tolerance"
        )
