"""The density of what a sampler draws in its finite number of steps.

*Deterministic samplers.* A step is a map y_(k+1) = F_k(y_k), and y_0 = z / S with z from the prior
pi and S = ``sde.stretch``. The density of the sample y_n is exact, whatever the steps are:

    log p(y_n) = log pi(z) + d log S - sum_k log |det dF_k/dy|       nats

A step's Jacobian comes from d tangents, and its determinant is taken step by step: the product of
the Jacobians would lose its small singular values in float32. The formula needs injective steps,
whose determinants have one sign at all y. So a step with both signs at the samples, or with a
determinant of 0, folds space, and the density is not known. Of a step with one sign,
:func:`check_folds` knows:

    affine        its Jacobian J is the same at all samples, so it is injective
    no fold seen  v^T J v > 0 for all v != 0 at all samples; if so at all y, it is injective
    may fold      all others: J turns a direction by 90 degrees or more, which needs no fold

The inverse of a chain gives the density of a sampler at any x (``Chain.logp``). Each step is
inverted by Newton's method, whose step is halved until |F(y) - x| decreases. If F is injective, has
no determinant of 0 and reaches x, this converges from any start. Otherwise x may be no image of the
chain, so that its density is 0. A few steps of a solver from data to noise are no such inverse, and
fold much more often.

*Stochastic samplers.* A step is a draw from N(mu_k(y_k), s_k^2 I), and a path y_0, ..., y_n has

    log p(path) = log N(y_0; 0, (sigma_T / S)^2 I) + sum_k log N(y_(k+1); mu_k(y_k), s_k^2 I)

Its gradients with respect to the parameters of the score are those that policy gradients need.

*Not included.* The last denoising E[x_0 | x_eps] and rounding to integers are further maps, which
can map several points to one: the densities are those of x at eps. The step of a corrector is not
normal given x if its size depends on x, so a sampler with a corrector has no density. A multistep
sampler is a map of x together with its earlier predictions, and not of x alone.
"""

import abc
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sbml.core.door import checked
from sbml.core.pytrees import when_known
from sbml.core.scalars import Number
from sbml.core.types import Array, Example, Key, Scalar, Score, in_full_precision
from sbml.likelihood.ode import Stats
from sbml.sdes import SDE

Times = Float[Array, " points"]

NEWTON = 30  # the largest number of iterations for the inverse of a step


class Transition(NamedTuple):
    """The distribution N(mean, std^2 I) of x at the end of a step, given x at its beginning.

    Attributes:
      mean: ``(*s)``.
      std: a scalar; 0 for a step without noise.
    """

    mean: Example
    std: Scalar


class MapLogProb(NamedTuple):
    """The density of a sample of a deterministic sampler: scalars, in nats.

    Attributes:
      prior: the log density of the latent under the prior.
      log_det: the sum over the steps of log |det dF/dy|, minus d log S.
      signs: the sign of det dF/dy of each step, ``(steps,)``; not 1 or -1 if it is 0 or not finite.
      positive: whether v^T J v > 0 for the Jacobian J of each step and all v != 0, ``(steps,)``.
      forms: u^T J v of each step for fixed vectors u and v, ``(steps,)``. If it is the same at two
        random points, so is J, except for a set of u and v of probability 0.
    """

    prior: Array
    log_det: Array
    signs: Array
    positive: Array
    forms: Array

    @property
    def logp(self) -> Array:
        """log p of the sample, if the steps are injective (:func:`check_folds`)."""
        return self.prior - self.log_det


class PathLogProb(NamedTuple):
    """The log density of a path in nats, as a sum over dimensions.

    Attributes:
      prior: that of the first point, a scalar.
      steps: that of each step given the point before it, ``(steps,)``.
      transform: the log-determinant of a change of variables at the last point, a scalar.
    """

    prior: Array
    steps: Array
    transform: Array | float = 0.0

    @property
    def total(self) -> Array:
        """That of the whole path."""
        return self.prior + self.steps.sum(axis=-1) + self.transform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """A path of a stochastic sampler, or several along leading axes.

    Attributes:
      x: its points ``(steps + 1, *s)``, from T to the smallest time.
      times: their times ``(steps + 1,)``.
      sampler: the sampler that drew it.
    """

    x: Array
    times: Array
    sampler: "Chain" = dataclasses.field(metadata={"static": True})


@runtime_checkable
class Sampler(Protocol):
    """The interface of every sampler."""

    @abc.abstractmethod
    def __call__(
        self, score: Score, sde: SDE, z: Example, key: Key, *, eps: Number
    ) -> tuple[Example, Stats]:
        """The sample ``(*s)`` at time ``eps`` from the latent ``z (*s)`` at T, and its cost.

        If ``z`` has less than JAX's default precision, the sample has the default precision.
        """

    @abc.abstractmethod
    def path(
        self, score: Score, sde: SDE, z: Example, key: Key, *, eps: Number, frames: int
    ) -> tuple[Array, Times]:
        """x ``(frames, *s)`` at times ``(frames,)`` from T to ``eps``; the first is the latent."""


class Chain(Sampler, abc.ABC):
    """A sampler that is a chain of steps, given by :meth:`times` and :meth:`transition`."""

    own_obstacle: ClassVar[str] = ""  # why the steps are not normal given x alone

    @property
    def deterministic(self) -> bool:
        """Whether all steps have standard deviation 0."""
        return False

    def stretch(self, sde: SDE) -> Number:
        """S, the factor from y_0 to the latent."""
        return sde.stretch

    @property
    @abc.abstractmethod
    def nfe(self) -> int:
        """The number of network evaluations for one sample."""

    @abc.abstractmethod
    def times(self, sde: SDE, eps: Number) -> Times:
        """The times of the steps, from that of y_0 = z / S down to ``eps``."""

    def transition(self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar) -> Transition:
        """The distribution of x at time ``t`` given ``x (*s)`` at time ``s`` > ``t``."""
        raise NotImplementedError

    def obstacle(self, deterministic: bool) -> str:
        """Why the sampler has no density of samples or, if not ``deterministic``, of paths; empty
        if it has one."""
        corrector = getattr(self, "corrector", None)
        if type(self).transition is Chain.transition:
            why = self.own_obstacle or "its class has no method transition"
            return f"{type(self).__name__} has no density, because {why}: use DDIM or Midpoint"
        if getattr(corrector, "nfe", 0):
            return (
                f"corrector={corrector}: a sampler with a corrector has no density, because its "
                "steps are not normal given x; leave the corrector out"
            )
        if deterministic and not self.deterministic:
            return (
                f"{self} is not a chain of fixed steps without noise, so its samples have no "
                "density in closed form: use DDIM(eta=0), Midpoint or "
                "ODE(Solver('heun', fixed_steps=10)), or the log density of paths"
            )
        if not deterministic and self.deterministic:
            return (
                f"{self} draws no noise, so the variance of its steps is 0 and a path has no "
                "density: use Ancestral or DDIM(eta=1), or log p of its samples"
            )
        return ""

    def check_density(self, deterministic: bool) -> None:
        """Raise a ValueError if there is an :meth:`obstacle`."""
        if reason := self.obstacle(deterministic):
            raise ValueError(reason)

    @checked
    def sample_logp(
        self, score: Score, sde: SDE, z: Example, *, eps: Number
    ) -> tuple[Example, MapLogProb]:
        """The sample ``(*s)`` at ``eps`` of the latent ``z (*s)``, and its exact log density.

        Each evaluation of the score takes d tangents, and each step two decompositions of a d x d
        matrix.

        Raises:
          ValueError: the sampler is not deterministic, or it has a corrector.
        """
        self.check_density(deterministic=True)
        sde.check_time(eps)
        z = in_full_precision(z)
        times = self.times(sde, eps).astype(z.dtype)

        def one(x: Example, ends: tuple[Scalar, Scalar]) -> tuple[Example, Any]:
            mean, jacobian = self._linearised(score, sde, x, ends)
            return mean, _of_step(jacobian)

        start = z / jnp.asarray(self.stretch(sde), z.dtype)
        x, steps = jax.lax.scan(one, start, (times[:-1], times[1:]))
        return x, self._map_logp(sde, z, steps)

    @checked
    def logp(self, score: Score, sde: SDE, x: Example, *, eps: Number) -> MapLogProb:
        """The density of the sampler at ``x (*s)``, by the inverse of its steps.

        It is NaN if no y with F(y) = x is found within ``NEWTON`` iterations of a step. It costs a
        few times as much as :meth:`sample_logp`, whose errors it has.
        """
        self.check_density(deterministic=True)
        sde.check_time(eps)
        x = in_full_precision(x)
        times = self.times(sde, eps).astype(x.dtype)

        def one(x: Example, ends: tuple[Scalar, Scalar]) -> tuple[Example, Any]:
            y, jacobian = _inverse(lambda y: self._linearised(score, sde, y, ends), x)
            return y, _of_step(jacobian)

        y, steps = jax.lax.scan(one, x, (times[:-1], times[1:]), reverse=True)
        return self._map_logp(sde, y * jnp.asarray(self.stretch(sde), y.dtype), steps)

    def _linearised(
        self, score: Score, sde: SDE, x: Example, ends: tuple[Scalar, Scalar]
    ) -> tuple[Example, Array]:
        """F(x) of a step ``(*s)``, and its Jacobian ``(d, d)``."""

        def mapped(flat: Array) -> tuple[Array, Array]:
            mean = self.transition(score, sde, flat.reshape(x.shape), *ends).mean.ravel()
            return mean, mean

        jacobian, mean = jax.jacfwd(mapped, has_aux=True)(x.ravel())
        return mean.reshape(x.shape), jacobian

    def _map_logp(self, sde: SDE, z: Example, steps: tuple[Array, ...]) -> MapLogProb:
        log_dets, *rest = steps
        stretch = jnp.asarray(self.stretch(sde), z.dtype)
        log_det = jnp.sum(log_dets) - z.size * jnp.log(stretch)
        return MapLogProb(sde.prior_logp(z), log_det, *rest)

    def known_times(self, sde: SDE, eps: Number) -> Times:
        """:meth:`times`, as numbers also inside ``jit`` if ``sde`` and ``eps`` are numbers."""
        with jax.ensure_compile_time_eval():
            return self.times(sde, eps)

    def _check_noise(self, sde: SDE, x: Example, times: Times) -> None:
        """Raise a ValueError if a step has no noise, or so little that rounding removes it."""

        def noise(s: Scalar, t: Scalar) -> Scalar:
            # The noise of our samplers does not depend on the score: 0 saves an evaluation.
            step = self.transition(lambda x, t, key: jnp.zeros_like(x), sde, x, s, t)
            return step.std / sde.std(t)

        def check(found: Array) -> None:
            lost = np.flatnonzero(~(np.asarray(found) > jnp.finfo(x.dtype).eps))
            if len(lost):
                raise ValueError(
                    f"step {lost[0] + 1} of {len(found)} of {self} has no noise, or less than the "
                    "rounding of x, so a path has no density: give every step noise, as Ancestral "
                    "and DDIM(eta=1) do, or leave it out of the sampler's window(first, last)"
                )

        with jax.ensure_compile_time_eval():
            found = jax.vmap(noise)(times[:-1], times[1:])
        when_known(check, found)

    @checked
    def sample_path(
        self, score: Score, sde: SDE, z: Example, key: Key, *, eps: Number
    ) -> tuple[Path, PathLogProb]:
        """A path from the latent ``z (*s)`` to ``eps``, and its log density. Its last point is the
        sample that the sampler draws with ``key``.

        Raises:
          ValueError: a step has no noise, or the sampler has a corrector.
        """
        self.check_density(deterministic=False)
        times = self.known_times(sde, eps)
        points, _ = self.path(score, sde, z, key, eps=eps, frames=len(times))
        path = Path(points.at[0].divide(self.stretch(sde)), times, self)
        return path, self.path_log_prob(score, sde, path)

    @checked
    def path_log_prob(self, score: Score, sde: SDE, path: Path) -> PathLogProb:
        """The log density of ``path``, a function of the parameters of the score.

        Raises:
          ValueError: another sampler drew the path, or a step has no noise.
        """
        self.check_density(deterministic=False)
        if path.sampler != self:
            raise ValueError(
                f"path of {path.sampler}, but the sampler is {self}: give the sampler of the path"
            )
        x = in_full_precision(path.x)
        steps = self._log_steps(score, sde, x, path.times)
        stretch = jnp.asarray(self.stretch(sde), x.dtype)
        prior = sde.prior_logp(x[0] * stretch) + x[0].size * jnp.log(stretch)
        return PathLogProb(prior, steps)

    def _log_steps(self, score: Score, sde: SDE, x: Array, times: Times) -> Array:
        """The log density of each step ``(n,)`` between points ``x (n + 1, *s)``."""
        self._check_noise(sde, x[0], times)

        def one(x: Example, after: Example, s: Scalar, t: Scalar) -> Scalar:
            mean, std = self.transition(score, sde, x, s, t)
            return jnp.sum(jax.scipy.stats.norm.logpdf(after, mean, std))

        return jax.lax.map(lambda a: one(*a), (x[:-1], x[1:], times[:-1], times[1:]))


def _of_step(jacobian: Array) -> tuple[Array, ...]:
    """log |det J| of a step, and its three numbers in :class:`MapLogProb`."""
    sign, log_det = jnp.linalg.slogdet(jacobian)
    sign = jnp.where(jnp.isfinite(log_det), sign, jnp.nan)  # Some versions of JAX give 1.
    # The Cholesky factor is NaN if the symmetric part of J is not positive definite.
    positive = ~jnp.isnan(jnp.linalg.cholesky(jacobian + jacobian.T)).any()
    u, v = jax.random.normal(jax.random.key(0), (2, len(jacobian)), jacobian.dtype)
    return log_det, sign, positive, u @ jacobian @ v


def _inverse(f: Callable[[Example], tuple[Example, Array]], x: Example) -> tuple[Example, Array]:
    """y with f(y) = x, and the Jacobian there; ``f`` gives both. NaN if none is found."""
    small = jnp.finfo(x.dtype).eps ** 0.5  # The last step squares an error of this size.

    def unsolved(state: Any) -> Array:
        i, y, error, *_ = state
        return (error > small * (jnp.linalg.norm(x) + jnp.linalg.norm(y))) & (i < NEWTON)

    def iterate(state: Any) -> Any:
        i, y, error, step, share = state
        tried = y + share * step
        image, jacobian = f(tried)
        rest = x - image
        size = jnp.linalg.norm(rest)
        newton = jnp.linalg.solve(jacobian, rest.ravel()).reshape(x.shape)
        nearer = tried, size, newton, jnp.ones_like(share)
        kept = y, error, step, 0.5 * share
        return i + 1, *jax.tree.map(lambda a, b: jnp.where(size < error, a, b), nearer, kept)

    start = (
        jnp.asarray(0),
        x,
        jnp.asarray(jnp.inf, x.dtype),
        jnp.zeros_like(x),
        jnp.ones((), x.dtype),
    )
    _, y, error, step, _ = state = jax.lax.while_loop(unsolved, iterate, start)
    y = jnp.where(unsolved((0, *state[1:])) | ~jnp.isfinite(error), jnp.nan, y + step)
    return y, f(y)[1]


def check_folds(sampler: Chain, found: MapLogProb) -> None:
    """Check the steps of the samples whose densities are ``found``, with a leading axis ``(n,)``.

    Raises:
      ValueError: a step folds space. If a step may fold, a warning says so.
    """
    n = len(found.signs)
    spread = jnp.ptp(found.forms, axis=0)
    size = jnp.max(jnp.abs(found.forms), axis=0)
    affine = (spread <= jnp.finfo(spread.dtype).eps ** 0.5 * size) & (n > 1)
    turned = jnp.where(affine, 0, jnp.sum(~found.positive, axis=0))
    signs = [jnp.sum(found.signs == sign, axis=0) for sign in (-1, 1)]

    def check(counts: Array) -> None:
        minus, plus, turned = np.asarray(counts)
        folds = np.flatnonzero((minus > 0) & (plus > 0) | (minus + plus < n))
        about = f"of {len(minus)} of {type(sampler).__name__}"
        if len(folds):
            k = folds[0]
            raise ValueError(
                f"the density of {n} samples is not known: step {k + 1} {about} folds space, or is "
                f"not finite. The determinant of its Jacobian is positive at {plus[k]} samples, "
                f"negative at {minus[k]}, and 0 or not finite at {n - plus[k] - minus[k]}; take "
                "more steps, or another sampler"
            )
        if turned.any():
            k = int(np.argmax(turned))
            warnings.warn(
                f"step {k + 1} {about} may fold space: it turns a direction by 90 degrees or more "
                f"at {turned[k]} of {n} samples. Its determinant has one sign at all of them; the "
                "densities are exact if it has this sign everywhere",
                stacklevel=2,
            )

    when_known(check, jnp.stack([*signs, turned]))
