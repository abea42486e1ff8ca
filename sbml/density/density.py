"""The density of data under a score: log p, samples, gradients, and measurements with error bars.

    density = Density(score, sde, shape=(32, 32, 3))

*A distribution.* These are pure functions of JAX arrays, for ``jit``, ``vmap``, ``scan`` and
``grad``, with respect to x, to the condition and to the arrays in the score:

    density.log_prob(x)                     log p_eps(x) in nats, by the probability-flow ODE
    density.sample(key, n)                  n samples by the ODE, or by a ``sampler``
    density.sample_and_log_prob(key, n)     samples and their log p, by the same solve
    density.sample_path(key, n, sampler=s)  paths of a stochastic sampler, and their log density
    density.path_log_prob(path)             the log density of paths

*Measurements.* These take and return NumPy arrays, and work in batches. The first four return a
number for each example and its mean with error bars (:class:`~sbml.density.estimate.Estimate`):

    density.logp(x)                 log p_eps(x) of continuous data in nats, by the ODE
    density.bits_per_dim(pixels)    of integers, by the ODE and a dequantization
    density.evaluate(data)          the one of these two that fits the type of the data
    density.bound(x)                the evidence bound on -log p(x) in nats, of integers in bits/dim
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
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core import bits, pytrees
from sbml.core.door import checked, typed
from sbml.core.progress import over
from sbml.core.scalars import Count, Draws, Steps, Sweeps, between
from sbml.core.streams import stream
from sbml.core.types import Array, Example, Key, Score, conditioned
from sbml.density import checks, transforms
from sbml.density.checks import Examples
from sbml.density.distribution import Distribution, How, vectorised
from sbml.density.estimate import Estimate, reference
from sbml.density.estimators import bound
from sbml.density.estimators import ode as ode_estimator
from sbml.density.estimators.base import Estimator, Rows, Target, rows
from sbml.density.measurement import Measurement
from sbml.density.posterior import Importance, Posterior, effective_size
from sbml.dequantizers import decoders, truncated_normal, uniform
from sbml.likelihood import discrete, ode
from sbml.likelihood.bound import GaussianControl, Reduction, pilot
from sbml.likelihood.ode import Solver
from sbml.samplers import Chain
from sbml.score import NetworkScore
from sbml.score.divergence import Trace, exact_batch

PILOT = 256  # examples from which the density of a bound's times is estimated
# in the line of a number
UNIFORM, DECODER = " by uniform dequantization", " by its decoder"
TRUNCATED_NORMAL = " by truncated-normal dequantization"
WALK = 100  # Metropolis steps from a sample to a draw of the target of ``importance``


@typed
@dataclasses.dataclass(frozen=True, repr=False)
class Density(Distribution):
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

    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    budget: Annotated[float, between(0, 1)] = 1e-3  # With infinity, any error would pass.
    subset: Count = 32
    classes: tuple[str, ...] = ()

    without_effect: ClassVar = ("batch_size", "budget")  # on any number (``sbml.fingerprint``)

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := [c for i, c in enumerate(self.classes) if c in self.classes[:i]]:
            raise ValueError(f"classes has {twice[0]!r} twice: give each class a name of its own")

    def evaluate(self, data: Any, condition: Any = None, **options: Any) -> Estimate:
        """:meth:`bits_per_dim` of integers, and :meth:`logp` of continuous data, by their type.

        ``options`` are those of the two methods.
        """
        number = self.bits_per_dim if _are_integers(data) else self.logp
        return number(data, condition, **options)

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
        """Bits/dim of integers ``pixels (n, *shape)``, by the ODE and a dequantization.

        The score must belong to data x = 2 (k + u) / L - 1, where k is a pixel, L = ``levels`` and
        u is uniform in [0, 1). For an example of d dimensions

            bits/dim = (-log p_eps(x) + log q(u) + d log(L / 2)) / (d log 2),

        see ``sbml.bits``; the density q(u) of the uniform dequantization is 1. For a network of
        sbml that was trained on bin centres, x and its smallest time are those of truncated-normal
        noise (``sbml.dequantizers.truncated_normal``). The terms are those of the estimator
        ``ode``, see ``sbml.estimators``. The other arguments are those of :meth:`logp`.

        Raises:
          ValueError: if ``pixels`` are not integers 0 .. levels - 1 of that shape, ``levels`` is
            None, or the score computes in half precision, as for ``logp``.
        """
        k, target, by = self._integers(pixels)
        run, title = self._by_ode(k, target, condition), "bits/dim" if progress else ""
        found = dataclasses.replace(run, check=check, progress=title).estimate()
        return dataclasses.replace(found, dequantization=by)

    @checked
    def bound(
        self,
        x: Any,
        condition: Any = None,
        *,
        sweeps: Sweeps = 8,
        times_each: Draws = 2,
        steps: Steps | None = None,
        reduce: bool = True,
        fit: Any = None,
        progress: bool = False,
    ) -> Estimate:
        """The evidence bound on -log p(x) of ``x (n, *shape)``, in nats; of integers, in bits/dim.

        The terms are ``prior``, ``diffusion`` and ``reconstruction``, see ``sbml.bound``, and
        ``transform`` with a change of variables. Integers are dequantized uniformly, or coded by
        the learned decoder of an integer denoiser of bin centres.

        Args:
          x: continuous data, or integers if there are ``levels``.
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
          ValueError: if ``x`` are neither floating-point numbers nor integers of that shape.
        """

        def in_scale(x: Any) -> tuple[Examples, np.ndarray]:
            if not _are_integers(x):
                return self._model_data(x)
            k, levels = checks.integers(x, self.shape, self.levels)
            return np.asarray(bits.to_model(jnp.asarray(k), 0.5, levels)), np.zeros(len(k))

        data, log_det = in_scale(x)
        measured, target, by = data, Target(self.sde, self._eps), ""
        if _are_integers(x):
            has_decoder = isinstance(self.score, NetworkScore) and self.score.decoder_nats
            model, by = (decoders.Learned(), DECODER) if has_decoder else (uniform.Model(), UNIFORM)
            measured, target = np.asarray(x), Target(self.sde, self._eps, self.levels, model)
        reduction = Reduction()
        if reduce:
            fitted = data if fit is None else in_scale(fit)[0]
            # This added variance does not change the expectation. Without it, the control would be
            # far off in directions without variance, such as those of constant pixels.
            noise = 0.02 * float(np.var(fitted))
            control = GaussianControl.fit(fitted, noise_variance=noise)
            reduction = self.reduction(data, condition, control)
        estimator = bound.Estimator(times_each, reduction=reduction)
        if steps is not None:
            estimator = bound.InSteps(times_each, reduction=reduction, steps=steps)
        run = dataclasses.replace(
            self.measurement(estimator, target, measured, condition),
            sweeps=sweeps,
            progress="bound" if progress else "",
            shown=lambda ids, values: values - log_det[ids],
        )
        found = dataclasses.replace(run.estimate(), dequantization=by)
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
            data, target, _ = self._integers(x)
            log_det, nats = np.zeros(len(data)), self.dims * math.log(2)
        conditions = checks.as_arrays(conditions)
        count = checks.count(conditions)
        log_prior = np.log(checks.probabilities(prior, count))

        def one(c: int) -> Any:
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[c], conditions)

        tables: list[tuple[np.ndarray, ...]] = []
        name = f"log p of {len(data)} examples" if progress else ""
        for c in over(range(count), name, "condition", count):
            run = self._by_ode(data, target, one(c))
            (_, values, strict, again), subset = run.solves(), run.subset
            assert strict is not None
            again = values[subset] if again is None else again
            tables.append((-nats * values, -nats * strict, -nats * again))
            alike = c == 1 and np.array_equal(tables[0][0], tables[1][0])
            if alike and not all(jax.tree.leaves(jax.tree.map(np.array_equal, one(0), one(1)))):
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
        target_ess: Count | None = None,
        max_samples: Count | None = None,
        sampler: Chain | None = None,
        max_dims: Count = 100,
        progress: bool = False,
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
          target_ess: the effective sample size at which to stop. Until it is reached, ``n`` more
            samples follow, at most ``max_samples`` in all. None for ``n`` samples.
          max_samples: None for 100 times ``n``.
          sampler, max_dims: as in :meth:`sample_and_log_prob`. With a sampler, p is its density,
            so there is no solver's error.
          progress: whether to show a progress bar of these parts of ``n`` samples.

        Raises:
          ValueError: the trace is not exact, so the weights would be biased; or ``max_samples`` is
            below ``n``, or has no effect.
        """
        self._check_exact()
        transforms.check_spacing(self.transform, self.shape)
        conditions = self._conditions(condition, (n,))

        def draw(key: Key) -> tuple[np.ndarray, ...]:
            """``n`` samples, their log p, and their u."""
            x, p = self.sample_and_log_prob(key, n, condition, sampler=sampler, max_dims=max_dims)
            u = np.asarray(pytrees.mapped(log_target, x, self.batch_size), float)
            if u.shape != (n,):
                raise ValueError(
                    f"log_target returned shape {u.shape[1:]} for one example: return a scalar"
                )
            return np.asarray(x), np.asarray(p, float), u

        if max_samples is not None and (target_ess is None or max_samples < n):
            raise ValueError(
                f"max_samples={max_samples} with target_ess={target_ess}, n={n}: give a "
                "target_ess, and at least n samples"
            )
        rounds = 1 if target_ess is None else (max_samples or 100 * n) // n
        parts: list[tuple[np.ndarray, ...]] = []
        for i in over(range(rounds), f"samples, {n} each" if progress else "", "part", rounds):
            parts.append(draw(jax.random.fold_in(key, i) if i else key))
            x, logp, u = (np.concatenate(each) for each in zip(*parts, strict=True))
            weights = u - logp
            if target_ess and effective_size(weights) >= target_ess:
                break
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
            error = log_prob(strict, x, few) - logp[:few]
        count = min(n, 4 * few)
        keys = jax.random.split(stream(key, "target"), count)
        # The first step is best for a normal target of this scale (Roberts & Rosenthal 2001).
        step = 2.4 / math.sqrt(self.dims) * jnp.std(x, axis=0)
        walk = functools.partial(_walk, log_target, step)
        y, u_y = pytrees.mapped(walk, (x[:count], keys), self.batch_size)
        of_target = np.asarray(u_y, float) - log_prob(self, y, count)
        evaluations = None if sampler is None else sampler.nfe
        return Importance.of(x, weights, error, of_target, evaluations, target_ess or 0)

    @checked
    def joint(self, conditions: Any, log_prior: Callable[..., Any]) -> Callable[[Array], Array]:
        """The log density of x given all ``conditions`` together, up to a constant (``posterior``):

            u(x) = sum_i log p(x | c_i) - (n - 1) log_prior(x),      -inf where log_prior is -inf

        It is a function of one example for :meth:`importance`, with one of the conditions for the
        samples, and for Markov chains. The conditions, such as observations, are independent given
        x, and each p(x | c) was learned with the same prior.

        Args:
          conditions: a pytree of arrays ``(n, ...)``.
          log_prior: log pi in nats, a function of one example.

        Raises:
          ValueError: the trace is not exact.
        """
        self._check_exact()
        conditions = jax.tree.map(jnp.asarray, checks.as_arrays(conditions))
        n = checks.count(conditions)

        def u(x: Array) -> Array:
            prior = jnp.asarray(log_prior(x), x.dtype)
            each = self.log_prob(jnp.broadcast_to(x, (n, *self.shape)), condition=conditions)
            inside = prior > -jnp.inf
            return jnp.where(inside, each.sum() - (n - 1) * jnp.where(inside, prior, 0), -jnp.inf)

        return u

    def _check_exact(self) -> None:
        if self._trace.kind != "exact":
            raise ValueError(
                f"trace={self._trace}: the noise of probes biases importance weights; give "
                "Density(trace=Trace('exact'))"
            )

    @checked
    def gap(
        self, key: Key, n: Count, condition: Any = None, *, sampler: Chain, max_dims: Count = 100
    ) -> Estimate:
        """KL(p_N || p) in nats: how far the density p_N of a ``sampler`` with few steps is from
        that of the ODE.

            KL = E[log p_N(x) - log p(x)] = E[r - 1 - log r],      x from p_N,  r = p(x) / p_N(x)

        The values are -log r, the sum of the negative terms of :meth:`logp` of the ``n`` samples
        and of ``sampler``, which is log p_N. The mean is that of r - 1 - log r, which is never
        negative and is small where r is near 1, if this at least halves the interval. Both
        densities begin with the prior, so its error is not in the difference. Both have the exact
        trace, because the noise of random probes would be larger than the gap. The arguments and
        errors are those of :meth:`sample_and_log_prob`.
        """
        x, logp = self.sample_and_log_prob(key, n, condition, sampler=sampler, max_dims=max_dims)
        exact = dataclasses.replace(self, trace=Trace("exact"))
        of_ode = dataclasses.replace(-exact.logp(np.asarray(x), condition), prior_error=None)
        found = of_ode.with_term("sampler", np.asarray(logp, float))
        return found.with_control(np.expm1(np.minimum(-found.values, 200)))  # Cubes are finite.

    def latent(self, x: Any, condition: Any = None) -> Examples:
        """The latents ``(n, *shape)``: the ODE's solutions at T from ``x`` at t = eps."""
        return self._solved(self._model_data(x)[0], condition, self._eps, self.sde.T)

    def decode(self, z: Any, condition: Any = None) -> Examples:
        """The data ``(n, *shape)`` at t = eps of latents ``z`` at T: the inverse of ``latent``."""
        x = self._solved(checks.continuous(z, self.shape), condition, self.sde.T, self._eps)
        return transforms.in_float64(transforms.forward, self.transform, x)

    def _model_data(self, x: Any) -> tuple[Examples, np.ndarray]:
        """The data in the scale of the score, and log |det df^-1/dy| ``(n,)``."""
        if self.transform is None:
            y = checks.continuous(x, self.shape)
            return y, np.zeros(len(y))
        y = checks.continuous(x, self.shape, np.float64)
        found, log_det = transforms.in_float64(transforms.inverse, self.transform, y)
        if len(lost := np.flatnonzero(~np.isfinite(log_det))):
            raise ValueError(
                f"transform={type(self.transform).__name__}: log |det df^-1/dy| is not finite for "
                f"the examples {checks.some(lost)}, but {log_det[lost[0]]}. Where it is -inf, the "
                "density is 0 and log p is -inf, so the mean would be -inf; without these examples "
                "it would be too good: give a transform whose range contains all data"
            )
        return checks.continuous(found, self.shape), log_det

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

    def _integers(self, pixels: Any) -> tuple[np.ndarray, Target, str]:
        """The integers ``pixels``, what the ODE estimates of them, and its dequantization."""
        k, levels = checks.integers(pixels, self.shape, self.levels)
        centres = isinstance(self.score, NetworkScore) and self.score.how.data == "centre"
        eps = discrete.smallest_time(self.sde, levels, self._eps) if centres else self._eps
        # Under noise wider than half a bin, the density of bin centres is smooth over the bins.
        if centres and (tau := discrete.tau(self.sde, levels, eps)) > 1:
            model = truncated_normal.Model(float(tau))
            return k, Target(self.sde, float(eps), levels, model), TRUNCATED_NORMAL
        return k, Target(self.sde, self._eps, levels, uniform.Model()), UNIFORM

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
        run = self._compiled(pilot, conditions, "sde", "eps", "bins")
        found: Reduction = run(
            sde=self.sde,
            x=jnp.asarray(data[chosen]),
            key=stream(jax.random.key(self.seed), "pilot"),
            eps=self._eps,
            control=control,
            bins=bins,
            condition=rows,
        )
        return found

    def _solved(self, x: Examples, condition: Any, t0: float, t1: float) -> Examples:
        """x(t1) of the ODE from ``x (n, *shape)`` at ``t0``, in batches."""
        conditions, size = self._conditions(condition, (len(x),)), min(self.batch_size, len(x))

        def batch(ids: np.ndarray) -> Array:
            given = jax.tree.map(lambda leaf: leaf[ids], conditions)
            found: Array = _flow(self, x[ids], condition=given, ends=(t0, t1))
            return found

        batches = pytrees.in_batches(batch, np.arange(len(x)), size)
        return np.concatenate([rows for _, rows in batches]).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class WithLatent(ode_estimator.Estimator):
    """The likelihood of continuous data, and the solution of the ODE at T."""

    columns: ClassVar[tuple[str, ...]] = ("latent",)

    def one(self, score: Score, params: Any, data: Any, key: Key, u: Any, target: Target) -> Any:
        terms, found = self.solved(score, params, data, key, target)
        zero = jnp.zeros(())
        return {**terms, "importance": zero, "latent": found.z}, found.stats.nfe


def _are_integers(data: Any) -> bool:
    return bool(jnp.issubdtype(np.asarray(data).dtype, jnp.integer))


def _terms(
    score: Score, params: Any, batch: Rows, u: Any, estimator: Estimator, *, target: Target
) -> dict[str, Any]:
    one = jax.tree.map(lambda leaf: leaf[0], batch.condition)
    estimator.check(conditioned(score, one), target.sde, batch.data.shape[1:])
    return rows(estimator, target, score, params, batch, u)


def _walk(log_target: Callable[..., Any], step: Array, start: tuple[Array, Key]) -> Any:
    """The end of a random walk whose stationary density is exp(u), and its u (Metropolis). Its
    step is scaled until 23% of the moves are accepted (Andrieu & Thoms, Stat Comput 2008)."""

    def u(x: Array) -> Array:
        return jnp.asarray(log_target(x), x.dtype)

    def move(state: tuple[Any, Array], of_move: tuple[Key, Array]) -> tuple[Any, None]:
        (x, log_scale), (key, gain) = state, of_move
        of_step, of_test = jax.random.split(key)
        y = x[0] + jnp.exp(log_scale) * step * jax.random.normal(of_step, step.shape, step.dtype)
        proposed = y, u(y)
        accepted = jnp.log(jax.random.uniform(of_test)) < proposed[1] - x[1]
        x = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, x)
        return (x, log_scale + gain * (accepted - 0.234)), None

    x, key = start
    moves = jax.random.split(key, WALK), jnp.arange(1, WALK + 1, dtype=step.dtype) ** -0.6
    return jax.lax.scan(move, ((x, u(x)), jnp.zeros((), step.dtype)), moves)[0][0]


@vectorised
def _flow(score: Score, x: Example, solver: Solver, how: How) -> Example:
    t0, t1 = how.ends
    return ode.flow(score, how.sde, x, t0, t1, solver).x
