"""The density of data under a score: log p, samples, gradients, and measurements with error bars.

    density = Density(score, sde, shape=(32, 32, 3))

*A distribution.* These are pure functions of JAX arrays, for ``jit``, ``vmap``, ``scan`` and
``grad``, with respect to x, to the condition and to the arrays in the score:

    density.log_prob(x)                     log p_eps(x) in nats, by the probability-flow ODE
    density.sample(key, n)                  n samples by the ODE
    density.sample_and_log_prob(key, n)     samples and their log p_eps, by the same solve
    density.sample_path(key, n, sampler=s)  paths of a stochastic sampler, and their log density
    density.path_log_prob(path)             the log density of paths

*Measurements.* These take and return NumPy arrays, and work in batches. The first four return a
number for each example and its mean with error bars (:class:`~sbml.density.estimate.Estimate`):

    density.logp(x)                 log p_eps(x) of continuous data in nats, by the ODE
    density.bits_per_dim(pixels)    of integers, by the ODE with uniform dequantization
    density.evaluate(data)          the one of these two that fits the type of the data
    density.bound(x)                the evidence bound on -log p(x) in nats
    density.classify(x, c)          log p(x | c) for several conditions c, and their posterior
    density.importance(key, n, u)   weights of samples for a density exp(u), and its normaliser
    density.gap(key, n, sampler=s)  KL of a sampler's density from that of the ODE
    density.latent(x)               the ODE's solution at T from x; ``decode`` is the inverse

The random draws of a measurement for an example depend only on ``seed``, on the example's place in
the data and, for ``bound``, on the data as a whole. So a result depends neither on the batch size
nor on earlier calls.

*Conditions.* A conditional score is called as ``score(x, t, key, condition)``. A condition is a
pytree of arrays: a class label is a scalar, and other conditions have the shape that
``condition_shape`` says. Every method takes one condition for all examples, or one for each along a
leading axis. A list of numbers is an array.

*Changes of variables.* With ``transform``, the score belongs to x and the data are y = f(x):

    log p(y) = log p(x) + log |det df^-1/dy|,      x = f^-1(y)

It is computed in float64, except inside ``jit``, ``grad`` or ``vmap``, which refuse a transform for
which float32 is too coarse (``sbml.transforms``).

*Compilation.* A program is compiled once, also for a function that is made anew for each call
(``sbml.core.arguments``).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from sbml import likelihood, samplers
from sbml.core import arguments, bits, pytrees
from sbml.core.door import checked, shown, typed
from sbml.core.progress import over
from sbml.core.scalars import MOST_SWEEPS, Count, Number, at_least, at_most, between, is_traced
from sbml.core.streams import stream
from sbml.core.types import (
    Anything,
    Array,
    Example,
    Key,
    Real,
    Score,
    check_function,
    conditioned,
    full_precision,
    optional,
)
from sbml.density import transforms
from sbml.density.estimate import Estimate, reference
from sbml.density.estimators import bound
from sbml.density.estimators import ode as ode_estimator
from sbml.density.estimators.base import Estimator, Rows, Target, rows
from sbml.density.measurement import Measurement
from sbml.density.posterior import Importance, Posterior
from sbml.dequantizers import uniform
from sbml.likelihood import ode
from sbml.likelihood.bound import GaussianControl, Reduction, pilot
from sbml.likelihood.ode import Solver
from sbml.samplers import Chain, Path, PathLogProb
from sbml.samplers.density import check_folds
from sbml.score import Foreign, NetworkScore
from sbml.score.divergence import Trace, exact_batch
from sbml.sdes import SDE

Sweeps = Annotated[int, at_least(2), at_most(MOST_SWEEPS)]  # One gives no error bar.
Examples = Num[np.ndarray, "n *s"]

PILOT = 256  # examples from which the density of a bound's times is estimated
WALK = 100  # Metropolis steps from a sample to a draw of the target of ``importance``


@typed
@dataclasses.dataclass(frozen=True, repr=False)
class Density:
    """The density whose score at time t is ``score(x, t, key)``.

    It is a pytree, whose leaves are the arrays of the score and of the transform.

    Attributes:
      score: a score of one example (``sbml.types``); it is called without a key.
      sde: the forward process that the score belongs to.
      shape: the shape of one example.
      levels: the number of levels of integer data, for ``bits_per_dim`` and ``sample``; None for
        continuous data.
      eps: the smallest time; None for the SDE's ``smallest_time``.
      trace: how the divergence is computed; None for the exact trace up to 64 dimensions, and two
        Rademacher probes above.
      solver: how the ODE is solved. For ``logp``, ``bits_per_dim`` and ``classify`` the tolerances
        must be at least 1e-6 in float32, because a solve with a tenth of them measures the solver's
        error. A solver of your own needs ``adjoint="reverse"`` for derivatives by ``grad``; their
        memory is that of about sqrt(2 max_steps) steps.
      batch_size: the number of examples that are computed at once.
      seed: the seed of the random draws of measurements.
      budget: the largest solver error that counts as converged, in bits/dim or in nats per
        dimension; at most 1.
      subset: the number of examples for which the ODE is solved again: once with a stricter solver,
        to measure the solver's error, and once with new random draws, to measure their noise.
      condition_shape: the shape of each array of one condition, or a pytree of their shapes; ()
        for a class.
      classes: the names of the classes of a class-conditional score; the condition is a number of
        these.
      transform: a bijection f of one example with the methods ``forward`` (or ``transform``) and
        ``inverse_and_log_det``, as in distrax and flowjax, or None.

    Raises:
      ValueError: for an impossible shape or smallest time, an SDE of arrays, a transform without
        its methods, a score that cannot be called with ``x``, ``t`` and ``key``, or one that
        :func:`~sbml.score.from_prediction` made for another SDE.
    """

    score: Callable[..., Any]
    sde: SDE
    shape: tuple[int, ...]
    levels: Annotated[int, between(2, bits.MOST_LEVELS)] | None = None
    eps: Number | None = None
    trace: Trace | None = None
    solver: Solver = Solver(rtol=2e-4, atol=2e-4, adjoint="reverse")
    batch_size: Count = 32  # as ``subset``, so that both are computed by one program
    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    budget: Annotated[float, between(0, 1)] = 1e-3  # With infinity, any error would pass.
    subset: Count = 32
    condition_shape: Any = ()
    transform: Any = None
    classes: tuple[str, ...] = ()

    without_effect: ClassVar = ("batch_size", "budget")  # on any number (``sbml.fingerprint``)

    def __post_init__(self) -> None:
        check_function(self.score, "score", "x", "t", "key", optional="condition")
        bits.dims(self.shape)
        if self.eps is not None:
            object.__setattr__(self, "eps", float(self.eps))  # An array is not hashable.
        try:
            hash(self.sde)
        except TypeError:
            raise ValueError(
                f"sde={self.sde} contains arrays or lists, so it cannot be a constant of compiled "
                "functions: give floats, as by jax.tree.map(float, sde), or tuples of floats"
            ) from None
        self.sde.check_time(self._eps)
        if twice := [c for i, c in enumerate(self.classes) if c in self.classes[:i]]:
            raise ValueError(f"classes has {twice[0]!r} twice: give each class a name of its own")
        for shape in jax.tree.leaves(self.condition_shape, is_leaf=_is_shape):
            if not _is_shape(shape):
                raise ValueError(
                    f"condition_shape is {shown(self.condition_shape)}: give a shape such as (3,), "
                    "or a pytree of shapes, with sizes of at least 1"
                )
        if self.transform is not None:
            transforms.check_methods(self.transform, self.shape)
        if self.transform is not None and self.levels is not None:
            raise ValueError(
                f"levels={self.levels} with a transform: integers have none; leave one of them out"
            )
        other = optional(self.score, "sde")
        if hasattr(other, "log_snr"):  # A score of other code may have another attribute "sde".
            self._check_sde_of_score(other)

    def _check_sde_of_score(self, other: SDE) -> None:
        """Raise a ValueError if ``other``, the SDE that the score was made for, is not ``sde``."""
        try:
            differs = other != self.sde
        except (TypeError, ValueError):  # For example, an array and a tuple were compared.
            raise ValueError(
                f"the sde={other} of the score contains arrays, which cannot be compared with the "
                "numbers of Density's sde: give the score an SDE of floats or tuples of floats"
            ) from None
        if differs:
            raise ValueError(
                f"the score was made for sde={other}, and Density has sde={self.sde}: give both "
                "the same SDE"
            )

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)[1:]
        changed = [f for f in fields if getattr(self, f.name) != f.default or f.name == "shape"]
        rest = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        name = getattr(self.score, "__name__", type(self.score).__name__)
        return f"Density({name}, {rest})"

    @property
    def dims(self) -> int:
        """The number of dimensions of one example."""
        return bits.dims(self.shape)

    # The distribution.

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
        y = x.reshape(-1, *self.shape)
        z, log_det = transforms.exactly(transforms.inverse, self.transform, y)
        conditions = self._conditions(condition, batch)
        keys = None if key is None else jax.random.split(key, len(y))
        rows = jnp.asarray(z, jnp.result_type(float)), keys
        logp = self._each(_log_prob, rows, conditions, sampler=sampler)
        return jnp.asarray(logp + log_det, logp.dtype).reshape(batch)

    @checked
    def sample(self, key: Key, n: Count, condition: Any = None) -> Anything:
        """``n`` samples ``(n, *shape)``: uint8 integers if there are ``levels``, else floats.

        Continuous samples are of p_eps, with a transform in float64 (NumPy). Integers are rounded
        from E[x_0 | x_eps].

        Raises:
          ValueError: there are more than 256 levels, or a sample of integers is not finite, because
            the solver gave up.
        """
        if self.levels is not None:
            bits.check_levels(self.levels, 256)
        conditions, keys = self._conditions(condition, (n,)), jax.random.split(key, n)
        x = self._each(_sample, (keys,), conditions, denoise=self.levels is not None)
        if self.levels is None:
            return self._data(x)[0]
        # A lost sample must not pass for a black image.
        lost = jnp.sum(~jnp.isfinite(x).reshape(n, -1).all(axis=1))
        pytrees.when_known(functools.partial(_check_samples, n, self.solver), lost)
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
        conditions, keys = self._conditions(condition, (n,)), jax.random.split(key, n)
        if sampler is not None and self.dims > max_dims:
            raise ValueError(
                f"{self.dims} dimensions with a sampler: each evaluation of the score would cost "
                f"as much as {self.dims + 1}; if that is meant, give max_dims={self.dims}"
            )
        x, found = self._each(_sample_and_log_prob, (keys,), conditions, sampler=sampler)
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
        conditions, keys = self._conditions(condition, (n,)), jax.random.split(key, n)
        path, found = self._each(_sample_path, (keys,), conditions, sampler=sampler)
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
        conditions = self._conditions(condition, batch)
        found = self._each(_path_log_prob, (x,), conditions, sampler=path.sampler)
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

    def _each(
        self, f: Callable[..., Any], rows: tuple[Any, ...], conditions: Any, **constants: Any
    ) -> Any:
        """``f`` of every row of the arrays ``rows``, compiled; ``constants`` are fields of
        ``_How``."""
        how = _How(self.sde, self._eps, self.shape, self._trace, **constants)
        sampler = constants.get("sampler")
        if isinstance(sampler, samplers.Map) and conditions is not None:
            raise ValueError(
                "a condition reaches the score only, and samplers.Map does not use it: leave it "
                "out, and give Map the function under this condition"
            )
        exact = (self._trace.kind == "exact" or sampler) and f in (_log_prob, _sample_and_log_prob)
        size = min(self.batch_size, exact_batch(self.dims)) if exact else self.batch_size
        run = self._compiled(_of_rows, conditions, "f", "how", "size")
        try:
            return run(rows, conditions, self.solver, f=f, how=how, size=size)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise ValueError(
                "this solver has derivatives by grad only: for those by jvp or jacfwd give "
                'Density a Solver(adjoint="forward")'
            ) from error

    # Measurements.

    def evaluate(self, data: Any, condition: Any = None, **options: Any) -> Estimate:
        """:meth:`bits_per_dim` of integers, and :meth:`logp` of continuous data, by their type.

        ``options`` are those of the two methods.
        """
        integers = jnp.issubdtype(np.asarray(data).dtype, jnp.integer)
        return (self.bits_per_dim if integers else self.logp)(data, condition, **options)

    @checked
    def logp(
        self, x: Any, condition: Any = None, *, check: bool = True, progress: bool | str = False
    ) -> Estimate:
        """log p_eps(x) in nats of each of ``x (n, *shape)``, by the probability-flow ODE.

        It is the sum of the terms ``prior``, ``divergence`` and ``correction``, see
        ``likelihood.Likelihood``, and of ``transform`` for a change of variables. The prior
        N(0, S^2 I), where S is ``sde.prior_std``, stands for p_T.

        Args:
          x: continuous data.
          condition: for a conditional score.
          check: whether to solve ``subset`` examples again, which measures the solver's error and
            the noise of the random probes.
          progress: whether to show a progress bar, or the name of one to show.

        Raises:
          ValueError: if ``x`` are not floating-point numbers of that shape, or the score computes
            in half precision, whose rounding errors the check of convergence does not see.
        """
        data, log_det = self._model_data(x)
        target = Target(self.sde, self._eps)
        run = dataclasses.replace(
            self._by_ode(data, target, condition),
            check=check,
            progress="log p" if progress is True else progress or "",
            shown=lambda ids, values: log_det[ids] - values,
        )
        found = -run.estimate()
        return found if self.transform is None else found.with_term("transform", log_det)

    @checked
    def bits_per_dim(
        self, pixels: Any, condition: Any = None, *, check: bool = True, progress: bool = False
    ) -> Estimate:
        """Bits/dim of integers ``pixels (n, *shape)``, by the ODE and uniform dequantization.

        The score must belong to data x = 2 (k + u) / L - 1, where k is a pixel, L = ``levels`` and
        u is uniform in [0, 1). For an example of d dimensions

            bits/dim = (-log p_eps(x) + d log(L / 2)) / (d log 2),

        see ``sbml.bits``. The terms are those of the estimator ``ode``, see ``sbml.estimators``.
        The other arguments are those of :meth:`logp`.

        Raises:
          ValueError: if ``pixels`` are not integers 0 .. levels - 1 of that shape, ``levels`` is
            None, or the score computes in half precision, as for ``logp``.
        """
        k, levels = self._integers(pixels)
        target = Target(self.sde, self._eps, levels, uniform.Model())
        run, title = self._by_ode(k, target, condition), "bits/dim" if progress else ""
        return dataclasses.replace(run, check=check, progress=title).estimate()

    @checked
    def bound(
        self,
        x: Any,
        condition: Any = None,
        *,
        sweeps: Sweeps = 8,
        times_each: Count = 2,
        steps: Count | None = None,
        reduce: bool = True,
        fit: Any = None,
        progress: bool = False,
    ) -> Estimate:
        """The evidence bound on -log p(x), in nats, of ``x (n, *shape)``.

        The terms are ``prior``, ``diffusion`` and ``reconstruction``, see ``sbml.bound``, and
        ``transform`` with a change of variables.

        Args:
          x: continuous data.
          condition: for a conditional score.
          sweeps: the number of independent passes over the data. The error bar of the random draws
            is estimated from the spread of their means.
          times_each: the number of draws of the diffusion term for one example in one sweep.
          steps: the number of steps of the bound in discrete time, which DDPM calls L_vlb; None for
            the bound in continuous time, which is lower.
          reduce: whether a Gaussian control variate and a density of the times reduce the noise.
            The density, and the share of the control at each noise level, are estimated from 8
            further evaluations for up to 256 examples, which ``nfe`` leaves out. They do not change
            the expectation, which is over noise and times only.
          fit: the examples ``(m, *shape)`` to which the control is fitted, such as training data;
            None for ``x``.
          progress: whether to show a progress bar.

        Raises:
          ValueError: if ``x`` are not floating-point numbers of that shape.
        """
        data, log_det = self._model_data(x)
        reduction = Reduction()
        if reduce:
            fitted = data if fit is None else self._model_data(fit)[0]
            # This added variance does not change the expectation. Without it, the control would be
            # far off in directions without variance, such as those of constant pixels.
            noise = 0.02 * float(np.var(fitted))
            control = GaussianControl.fit(fitted, noise_variance=noise)
            reduction = self.reduction(data, condition, control)
        estimator = bound.Estimator(times_each, reduction=reduction)
        if steps is not None:
            estimator = bound.InSteps(times_each, reduction=reduction, steps=steps)
        run = dataclasses.replace(
            self.measurement(estimator, Target(self.sde, self._eps), data, condition),
            sweeps=sweeps,
            progress="bound" if progress else "",
            shown=lambda ids, values: values - log_det[ids],
        )
        found = run.estimate()
        return found if self.transform is None else found.with_term("transform", -log_det)

    @checked
    def classify(
        self, x: Any, conditions: Any = None, prior: Any = None, *, progress: bool = False
    ) -> Posterior:
        """log p(x | c) of ``x (n, *shape)`` for every c of ``conditions``, and the posterior of c.

        All conditions have the same random draws, so the noise of the differences is much smaller
        than that of each number. The errors are measured as in :meth:`logp`, on ``subset``
        examples.

        Args:
          x: continuous data, or integers if there are ``levels``.
          conditions: a pytree of arrays ``(C, ...)``, such as ``jnp.arange(10)`` for ten classes;
            None for all ``classes``.
          prior: the probabilities ``(C,)`` of the conditions; None for equal ones.
          progress: whether to show a progress bar.

        Raises:
          ValueError: the score ignores its condition, or ``prior`` are not probabilities of them.
        """
        if conditions is None:
            if not self.classes:
                raise ValueError("conditions=None: this density has no classes, so give conditions")
            conditions = np.arange(len(self.classes))
        if self.levels is None:
            (data, log_det), target = self._model_data(x), Target(self.sde, self._eps)
            nats: float = 1.0
        else:
            data, levels = self._integers(x)
            target = Target(self.sde, self._eps, levels, uniform.Model())
            log_det, nats = np.zeros(len(data)), self.dims * math.log(2)
        conditions = _array(conditions)
        count = _count(conditions)
        log_prior = np.log(_prior(prior, count))

        def one(c: int) -> Any:
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[c], conditions)

        tables: list[tuple[np.ndarray, ...]] = []
        name = f"log p of {len(data)} examples" if progress else ""
        for c in over(range(count), name, "condition", count):
            run = self._by_ode(data, target, one(c))
            found, subset = run.solves(), run.subset
            assert found.strict is not None
            again = found.values[subset] if found.again is None else found.again
            tables.append((-nats * found.values, -nats * found.strict, -nats * again))
            alike = c == 1 and np.array_equal(tables[0][0], tables[1][0])
            if alike and _differ(one(0), one(1)):
                raise ValueError(
                    "log p is the same for the first two conditions: the score ignores its "
                    "condition; give a score that reads its fourth argument"
                )

        def prior_error(weights: np.ndarray) -> float:
            return nats * target.prior_error(data, run.last, weights).each

        logp, strict, again = (np.stack(each, axis=1) for each in zip(*tables, strict=True))
        return Posterior.of(
            logp, log_det, log_prior, subset, strict, again, prior_error=prior_error
        )

    @checked
    def importance(
        self,
        key: Key,
        n: Count,
        log_target: Callable[..., Any],
        condition: Any = None,
        *,
        sampler: Chain | None = None,
        max_dims: Count = 100,
    ) -> Importance:
        """Samples with weights exp(u(x)) / p(x) for the density exp(u(x)) / Z, and log Z.

        Draws of the target show what the samples miss (``sbml.posterior``). There are up to four
        times ``subset`` of them, and each takes 100 evaluations of u and one of log p. For a
        ``sampler`` this log p takes the inverse of its steps; a draw without an inverse counts as
        missed.

        Args:
          key: for the samples.
          n: their number.
          log_target: u, a function of one example, in nats.
          condition: for a conditional score.
          sampler, max_dims: as in :meth:`sample_and_log_prob`. With a sampler, p is its density,
            so there is no solver's error.

        Raises:
          ValueError: the trace is not exact: the weights would be biased.
        """
        if self._trace.kind != "exact":
            raise ValueError(
                f"trace={self._trace}: the noise of probes biases importance weights; give "
                "Density(trace=Trace('exact'))"
            )
        transforms.check_spacing(self.transform, self.shape)
        conditions = self._conditions(condition, (n,))
        x, logp = self.sample_and_log_prob(key, n, condition, sampler=sampler, max_dims=max_dims)
        u = np.asarray(_each(log_target, x, self.batch_size), float)
        if u.shape != (n,):
            raise ValueError(
                f"log_target returned shape {u.shape[1:]} for one example: return a scalar"
            )
        few = min(n, self.subset)
        strict = dataclasses.replace(self, solver=reference(self.solver))

        def log_prob(density: Density, x: Any, count: int) -> np.ndarray:
            def batch(ids: np.ndarray) -> Array:
                given = jax.tree.map(lambda leaf: leaf[ids], conditions)
                return density._log_prob(x[ids], None, given, sampler)

            batches = pytrees.in_batches(batch, np.arange(count), few)
            return np.concatenate([rows for _, rows in batches]).astype(float)

        # The density of a sampler is exact.
        error = np.zeros(few)
        if sampler is None:
            error = log_prob(strict, x, few) - np.asarray(logp[:few], float)
        count = min(n, 4 * few)
        keys = jax.random.split(stream(key, "target"), count)
        # This step is best for a normal target of the samples' scale (Roberts & Rosenthal 2001).
        step = 2.4 / math.sqrt(self.dims) * jnp.std(x, axis=0)
        walk = functools.partial(_walk, log_target, step)
        y, u_y = _each(walk, (x[:count], keys), self.batch_size)
        of_target = np.asarray(u_y, float) - log_prob(self, y, count)
        weights, evaluations = u - np.asarray(logp, float), None if sampler is None else sampler.nfe
        return Importance.of(np.asarray(x), weights, error, of_target, evaluations)

    @checked
    def gap(
        self,
        key: Key,
        n: Count,
        condition: Any = None,
        *,
        sampler: Chain,
        max_dims: Count = 100,
    ) -> Estimate:
        """KL(p_N || p) in nats: how far the density p_N of a ``sampler`` with few steps is from
        that of the ODE.

            KL = E[log p_N(x) - log p(x)],      x from p_N

        The terms are the negative ones of :meth:`logp` of the ``n`` samples, and ``sampler``, which
        is log p_N. Both densities begin with the prior, so its error is not in the difference. Both
        have the exact trace, because the noise of random probes would be larger than the gap. The
        arguments and errors are those of :meth:`sample_and_log_prob`.
        """
        x, logp = self.sample_and_log_prob(key, n, condition, sampler=sampler, max_dims=max_dims)
        exact = dataclasses.replace(self, trace=Trace("exact"))
        of_ode = dataclasses.replace(-exact.logp(np.asarray(x), condition), prior_error=None)
        return of_ode.with_term("sampler", np.asarray(logp))

    def latent(self, x: Any, condition: Any = None) -> Examples:
        """The latents ``(n, *shape)``: the ODE's solutions at T from ``x`` at t = eps."""
        return self._solved(self._model_data(x)[0], condition, self._eps, self.sde.T)

    def decode(self, z: Any, condition: Any = None) -> Examples:
        """The data ``(n, *shape)`` at t = eps of latents ``z`` at T: the inverse of ``latent``."""
        x = self._solved(self._continuous(z), condition, self.sde.T, self._eps)
        return transforms.in_float64(transforms.forward, self.transform, x)

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
        if condition is None and self.condition_shape != ():
            raise ValueError(
                f"condition=None, but condition_shape={self.condition_shape}: give one condition "
                "of this shape for all examples, or one for each"
            )
        more = () if condition is None else ("condition",)
        if isinstance(self.score, NetworkScore) and isinstance(self.score.how, Foreign):
            check_function(self.score.how.network, "network", "x", "t", *more)
        elif condition is None or not optional(self.score, "given"):
            check_function(self.score, "score", "x", "t", "key", *more)
        if condition is None:
            return None
        shapes: Any = self.condition_shape
        if _is_shape(shapes):
            condition = _array(condition)
            shapes = jax.tree.map(lambda _: self.condition_shape, condition)

        def each(leaf: Any, shape: tuple[int, ...]) -> Array:
            leaf = _array(leaf)
            try:
                array = jnp.asarray(leaf)
            except (TypeError, ValueError):  # JAX raises either, by the type of the leaf.
                raise ValueError(f"condition is {shown(leaf)}: give arrays of numbers") from None
            if array.shape not in (shape, (*batch, *shape)):
                raise ValueError(
                    f"condition of shape {array.shape}: give one for all examples, {shape}, or one "
                    f"for each, {(*batch, *shape)}; condition_shape is the shape of one"
                )
            known = jnp.issubdtype(array.dtype, jnp.floating) and not is_traced(leaf)
            if known and np.isnan(np.asarray(leaf)).any():
                raise ValueError("condition has a NaN: give numbers")
            array = jnp.broadcast_to(array, (*batch, *shape))
            return array.reshape(-1, *shape)

        structure: Any
        flat, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
        try:
            leaves = structure.flatten_up_to(condition)
        except ValueError:
            found = jax.tree.structure(condition)
            raise ValueError(
                f"condition is the pytree {found}: give one like condition_shape={shapes}"
            ) from None
        return jax.tree.unflatten(structure, map(each, leaves, flat))

    def _model_data(self, x: Any) -> tuple[Examples, np.ndarray]:
        """The data in the scale of the score, and log |det df^-1/dy| ``(n,)``."""
        if self.transform is None:
            y = self._continuous(x)
            return y, np.zeros(len(y))
        y = self._continuous(x, np.float64)
        found, log_det = transforms.in_float64(transforms.inverse, self.transform, y)
        if len(lost := np.flatnonzero(~np.isfinite(log_det))):
            raise ValueError(
                f"transform={type(self.transform).__name__}: log |det df^-1/dy| is not finite for "
                f"the examples {_some(lost)}, but {log_det[lost[0]]}. Where it is -inf, the "
                "density is 0 and log p is -inf, so the mean would be -inf; without these examples "
                "it would be too good: give a transform whose range contains all data"
            )
        return self._continuous(found), log_det

    def _continuous(self, x: Any, dtype: Any = None) -> Examples:
        data = np.asarray(x)
        if not jnp.issubdtype(data.dtype, jnp.floating):
            raise ValueError(
                f"x is of {data.dtype}: give floating-point numbers in the scale of the score, or "
                "integers to bits_per_dim"
            )
        self._check_shape(data)
        data = data.astype(dtype or jnp.result_type(float))
        lost = np.flatnonzero(~np.isfinite(data).reshape(len(data), -1).all(axis=1))
        if len(lost):
            raise ValueError(
                f"{len(lost)} of {len(data)} examples have values that are NaN, infinite or too "
                f"large for {data.dtype}: leave them out. Their indices are {_some(lost)}"
            )
        return data

    def _integers(self, pixels: Any) -> tuple[Examples, int]:
        data = np.asarray(pixels)
        if self.levels is None:
            raise ValueError(
                "levels=None: bits/dim are defined for integers only; give Density the number of "
                "their levels"
            )
        bits.check_pixels(data, self.levels)
        self._check_shape(data)
        return data, self.levels

    def _check_shape(self, data: np.ndarray) -> None:
        if data.ndim == 0 or data.shape[1:] != self.shape or not len(data):
            expected = "".join(f", {size}" for size in self.shape)
            raise ValueError(f"data of shape {data.shape}: give (n{expected}) with n at least 1")

    def measurement(
        self,
        estimator: Estimator,
        target: Target,
        data: Examples,
        condition: Any = None,
        params: Any = None,
    ) -> Measurement:
        """The measurement of ``data (n, *shape)`` by an estimator.

        Args:
          estimator, target: what is estimated; the target's SDE is that of the density.
          data: examples in the scale of the score, or integers if the target has levels.
          condition: one for all examples, or one for each.
          params: the parameters of the target's dequantizer.
        """
        n, conditions = len(data), self._conditions(condition, (len(data),))
        compiled = self._compiled(_terms, conditions, "target")
        size = self.batch_size

        def compute(estimator: Estimator, batch: Rows, u: Any) -> dict[str, Any]:
            return compiled(params, batch, u, estimator, target=target)

        return Measurement(
            estimator=estimator,
            target=target,
            data=data,
            ids=np.arange(n),
            subset=np.linspace(0, n - 1, min(n, self.subset)).astype(int),
            compute=compute,
            condition=jax.tree.map(np.asarray, conditions),
            seed=self.seed,
            batch_size=min(size, exact_batch(self.dims)) if estimator.exact else size,
        )

    def _by_ode(self, data: Examples, target: Target, condition: Any) -> Measurement:
        # A solve with a tenth of the tolerances measures the solver's error.
        ode.check_tolerances(self.solver, jnp.result_type(float), "solver.", factor=10)
        # The program of the adjoint "reverse" takes longer to trace, and gives the same numbers.
        solver = dataclasses.replace(self.solver, adjoint="forward")
        kind = WithLatent if target.levels is None else ode_estimator.Estimator
        first = jax.tree.map(lambda leaf: leaf[0], self._conditions(condition, (len(data),)))
        return dataclasses.replace(
            self.measurement(kind(self._trace, solver=solver), target, data, condition),
            budget=self.budget * (self.dims if target.levels is None else 1),
            last=ode.last_time(conditioned(self.score, first), self.sde),
        )

    def reduction(
        self,
        data: Examples,
        condition: Any = None,
        control: GaussianControl | None = None,
        bins: int = 32,
    ) -> Reduction:
        """Coefficients of the ``control`` and a density of the times for the bound on ``data``, by
        ``bound.pilot`` on at most ``PILOT`` of its examples, in the scale of the score."""
        if control is not None:
            control = jax.tree.map(lambda a: jnp.asarray(a, data.dtype), control)
        chosen = np.linspace(0, len(data) - 1, min(len(data), PILOT)).astype(int)
        conditions = self._conditions(condition, (len(data),))
        rows = jax.tree.map(lambda leaf: leaf[chosen], conditions)
        run = self._compiled(_pilot, conditions, "sde", "eps", "bins")
        key = stream(jax.random.key(self.seed), "pilot")
        x = jnp.asarray(data[chosen])
        found: Reduction = run(x, key, control, rows, sde=self.sde, eps=self._eps, bins=bins)
        return found

    def _solved(self, x: Examples, condition: Any, t0: float, t1: float) -> Examples:
        """x(t1) of the ODE from ``x (n, *shape)`` at ``t0``, in batches."""
        conditions, size = self._conditions(condition, (len(x),)), min(self.batch_size, len(x))

        def batch(ids: np.ndarray) -> Array:
            given = jax.tree.map(lambda leaf: leaf[ids], conditions)
            found: Array = self._each(_flow, (x[ids],), given, ends=(t0, t1))
            return found

        batches = pytrees.in_batches(batch, np.arange(len(x)), size)
        return np.concatenate([rows for _, rows in batches]).astype(np.float64)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(n, int) and n >= 1 for n in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(leaf, int | float | np.number) for leaf in jax.tree.leaves(value)
    )


def _array(condition: Any) -> Any:
    """``condition`` with lists of numbers as arrays, because JAX takes them for pytrees."""

    def each(part: Any) -> Any:
        try:
            return np.asarray(part) if _is_numbers(part) else part
        except ValueError:
            raise ValueError(f"condition is {shown(part)}: give lists of one length") from None

    return jax.tree.map(each, condition, is_leaf=_is_numbers)


def _flatten(density: Density) -> tuple[tuple[Any, ...], Any]:
    """The arrays of the score and of the transform, and everything else."""
    if (flat := vars(density).get("_flat")) is not None:
        return flat
    arrays, rest = arguments.split((density.score, density.transform))
    shapes = jax.tree.flatten(density.condition_shape, is_leaf=_is_shape)
    apart = "score", "transform", "condition_shape"
    names = [f.name for f in dataclasses.fields(density) if f.name not in apart]
    fields = tuple((name, getattr(density, name)) for name in names)
    return arrays, (rest, (tuple(shapes[0]), shapes[1]), fields)


def _unflatten(static: Any, arrays: Any) -> Density:
    rest, (shapes, tree), fields = static
    score, transform = arguments.joined(arrays, rest)
    density: Density = object.__new__(Density)
    whole = {"score": score, "transform": transform}
    whole["condition_shape"] = jax.tree.unflatten(tree, shapes)
    # JAX also puts other objects in the place of the arrays, such as None: a copy keeps them apart.
    for name, value in (*whole.items(), *fields, ("_flat", (tuple(arrays), static))):
        object.__setattr__(density, name, value)
    return density


jax.tree_util.register_pytree_node(Density, _flatten, _unflatten)


@dataclasses.dataclass(frozen=True)
class WithLatent(ode_estimator.Estimator):
    """The likelihood of continuous data, and the solution of the ODE at T."""

    columns: ClassVar[tuple[str, ...]] = ("latent",)

    def one(self, score: Score, params: Any, data: Any, key: Key, u: Any, target: Target) -> Any:
        terms, found = self.solved(score, params, data, key, target)
        zero = jnp.zeros(())
        return {**terms, "importance": zero, "latent": found.z}, found.stats.nfe


def _check_times(off: Any) -> None:
    if not off <= 1e-4:  # This is more than their rounding.
        raise ValueError(
            "path.times are not those of its sampler for this density's sde and eps: give the path "
            "to the density that drew it, or to one with the same sde and eps"
        )


def _check_samples(n: int, solver: Solver, lost: Any) -> None:
    if lost:
        raise ValueError(
            f"{int(lost)} of {n} samples are not finite, with solver={solver}: give a solver "
            "with larger max_steps, or with another tolerance"
        )


def _count(conditions: Any) -> int:
    """The number of conditions along the leading axis of a pytree."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(conditions)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(conditions)]
        raise ValueError(
            f"conditions of shapes {shapes}: give arrays with the conditions along a leading axis "
            "of one size, at least 1"
        )
    return int(sizes.pop()[0])


def _differ(one: Any, other: Any) -> bool:
    """Whether two pytrees of arrays differ."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(bool(jnp.any(a != b)) for a, b in pairs)


def _prior(prior: Any, count: int) -> np.ndarray:
    if prior is None:
        return np.full(count, 1 / count)
    found = np.asarray(prior, float)
    if found.shape != (count,) or not np.all(found > 0) or not np.isclose(found.sum(), 1):
        raise ValueError(f"prior={prior}: give {count} positive probabilities whose sum is 1")
    return found


def _some(indices: np.ndarray) -> str:
    """The first ten of ``indices`` as text."""
    shown = ", ".join(map(str, indices[:10]))
    return shown + (", ..." if len(indices) > 10 else "")


_jit = functools.cache(arguments.compiled)


def _terms(
    score: Score, params: Any, batch: Rows, u: Any, estimator: Estimator, *, target: Target
) -> dict[str, Any]:
    one = jax.tree.map(lambda leaf: leaf[0], batch.condition)
    estimator.check(conditioned(score, one), target.sde, batch.data.shape[1:])
    return rows(estimator, target, score, params, batch, u)


def _each(f: Callable[..., Any], rows: Any, size: int) -> Any:
    """``f`` of every row, at most ``size`` of them at once.

    The batches have one size, filled up with the last row, so that the program has ``f`` once.
    """
    n = len(jax.tree.leaves(rows)[0])
    batches = -(-n // size)
    if batches <= 1:
        return jax.vmap(f)(rows)
    places = np.minimum(np.arange(batches * -(-n // batches)), n - 1).reshape(batches, -1)
    found = jax.lax.map(jax.vmap(f), jax.tree.map(lambda leaf: leaf[places], rows))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:n], found)


def _walk(log_target: Callable[..., Any], step: Array, start: tuple[Array, Key]) -> Any:
    """The end of a random walk whose stationary density is exp(u), and its u (Metropolis)."""

    def u(x: Array) -> Array:
        return jnp.asarray(log_target(x), x.dtype)

    def move(state: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], None]:
        of_step, of_test = jax.random.split(key)
        y = state[0] + step * jax.random.normal(of_step, step.shape, step.dtype)
        proposed = y, u(y)
        accepted = jnp.log(jax.random.uniform(of_test)) < proposed[1] - state[1]
        return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, state), None

    x, key = start
    return jax.lax.scan(move, (x, u(x)), jax.random.split(key, WALK))[0]


class _How(NamedTuple):
    """The constants of a function of one example."""

    sde: SDE
    eps: float
    shape: tuple[int, ...]
    trace: Trace
    denoise: bool = False
    ends: tuple[float, ...] = ()
    sampler: Any = None


def _of_rows(
    score: Score,
    rows: tuple[Any, ...],
    conditions: Any,
    solver: Solver,
    *,
    f: Callable[..., Any],
    how: _How,
    size: int,
) -> Any:
    """``f`` of every row under its condition, at most ``size`` of them at once."""

    def one(row: Any) -> Any:
        own, condition = row
        return f(conditioned(score, condition), *own, solver, how)

    return _each(one, (rows, conditions), size)


def _log_prob(score: Score, x: Example, key: Key | None, solver: Solver, how: _How) -> Array:
    if how.sampler is not None:
        of_map: Array = how.sampler.logp(score, how.sde, x, eps=how.eps).logp
        return of_map
    estimator = ode_estimator.Estimator(how.trace, solver=solver)
    estimator.check(score, how.sde, how.shape)
    found: Array = estimator.solved(score, None, x, key, Target(how.sde, how.eps))[1].logp
    return found


def _sample(score: Score, key: Key, solver: Solver, how: _How) -> Example:
    return samplers.ode_sample(
        score, how.sde, how.shape, key, eps=how.eps, solver=solver, denoise_last=how.denoise
    )[0]


def _sample_and_log_prob(score: Score, key: Key, solver: Solver, how: _How) -> tuple[Example, Any]:
    ode.check_precision(score, how.sde, how.shape)
    z, probes = how.sde.prior_sample(key, how.shape), stream(key, "probes")
    if how.sampler is not None:
        drawn: tuple[Example, Any] = how.sampler.sample_logp(score, how.sde, z, eps=how.eps)
        return drawn
    x, found = likelihood.sample_logp(
        score, how.sde, z, probes, eps=how.eps, trace=how.trace, solver=solver
    )
    return x, found.logp


def _sample_path(score: Score, key: Key, solver: Solver, how: _How) -> tuple[Path, PathLogProb]:
    ode.check_precision(score, how.sde, how.shape)
    z, noise = how.sde.prior_sample(stream(key, "latent"), how.shape), stream(key, "sampler")
    found: tuple[Path, PathLogProb] = how.sampler.sample_path(score, how.sde, z, noise, eps=how.eps)
    return found


def _path_log_prob(score: Score, x: Array, solver: Solver, how: _How) -> PathLogProb:
    ode.check_precision(score, how.sde, how.shape)
    path = Path(x, how.sampler.known_times(how.sde, how.eps), how.sampler)
    found: PathLogProb = how.sampler.path_log_prob(score, how.sde, path)
    return found


def _flow(score: Score, x: Example, solver: Solver, how: _How) -> Example:
    t0, t1 = how.ends
    return ode.flow(score, how.sde, x, t0, t1, solver).x


def _pilot(
    score: Score,
    x: Array,
    key: Key,
    control: GaussianControl | None,
    condition: Any,
    *,
    sde: SDE,
    eps: float,
    bins: int,
) -> Reduction:
    return pilot(score, sde, x, key, eps=eps, control=control, bins=bins, condition=condition)
