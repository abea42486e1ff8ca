"""The density of what a sampler draws in its finite number of steps.

*Deterministic samplers.* A step is a map y_(k+1) = F_k(y_k), and y_0 = z / S with z from the prior
pi and S = ``sde.stretch``. The density of the sample y_n is exact, whatever the steps are:

    log p(y_n) = log pi(z) + d log S - sum_k log |det dF_k/dy|       nats

A step's Jacobian comes from d tangents, and its determinant is taken step by step: the product of
the Jacobians would lose its small singular values in float32. The formula needs injective steps. A
step is injective if v^T J v > 0 for all v != 0 and at all y, where J is its Jacobian. Where this is
not true at a sample's y_k, we say that the step folds space, and the density is NaN. Such a J may
have a positive determinant: two directions that change their sign, or a rotation by 90 degrees or
more, which would need no fold. Data are not evaluated in this way, because the steps from data to
noise fold much more often.

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
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sbml.core.door import checked
from sbml.core.pytrees import when_known
from sbml.core.scalars import Number
from sbml.core.types import Array, Example, Key, Scalar, Score, in_full_precision
from sbml.sdes import SDE

Times = Float[Array, " points"]


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
      folds: whether v^T J v <= 0 for a step's Jacobian J and a vector v, so that the density is not
        known.
    """

    prior: Array
    log_det: Array
    folds: Array

    @property
    def logp(self) -> Array:
        """log p of the sample; NaN if a step folds."""
        return jnp.where(self.folds, jnp.nan, self.prior - self.log_det)


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


class Chain(abc.ABC):
    """A sampler that is a chain of steps, given by :meth:`times` and :meth:`transition`."""

    own_obstacle: ClassVar[str] = ""  # why the steps are not normal given x alone

    @property
    @abc.abstractmethod
    def deterministic(self) -> bool:
        """Whether all steps have standard deviation 0."""

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

    @abc.abstractmethod
    def path(
        self, score: Score, sde: SDE, z: Example, key: Key, *, eps: Number, frames: int
    ) -> tuple[Array, Times]:
        """``frames`` points on the way of the latent ``z (*s)``, from z on, and their times."""

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

        def one(state: Any, ends: tuple[Scalar, Scalar]) -> tuple[Any, None]:
            x, log_det, folds = state

            def mapped(flat: Array) -> tuple[Array, Array]:
                mean = self.transition(score, sde, flat.reshape(z.shape), *ends).mean.ravel()
                return mean, mean

            jacobian, mean = jax.jacfwd(mapped, has_aux=True)(x.ravel())
            log_det += jnp.linalg.slogdet(jacobian)[1]
            # The Cholesky factor is NaN if the symmetric part of J is not positive definite.
            folds |= jnp.isnan(jnp.linalg.cholesky(jacobian + jacobian.T)).any()
            return (mean.reshape(z.shape), log_det, folds), None

        stretch = jnp.asarray(self.stretch(sde), z.dtype)
        start = z / stretch, -z.size * jnp.log(stretch), jnp.asarray(False)
        (x, log_det, folds), _ = jax.lax.scan(one, start, (times[:-1], times[1:]))
        return x, MapLogProb(sde.prior_logp(z), log_det, folds)

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
                    "and DDIM(eta=1) do"
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
        self._check_noise(sde, x[0], path.times)

        def one(x: Example, after: Example, s: Scalar, t: Scalar) -> Scalar:
            mean, std = self.transition(score, sde, x, s, t)
            return jnp.sum(jax.scipy.stats.norm.logpdf(after, mean, std))

        steps = jax.lax.map(lambda a: one(*a), (x[:-1], x[1:], path.times[:-1], path.times[1:]))
        stretch = jnp.asarray(self.stretch(sde), x.dtype)
        prior = sde.prior_logp(x[0] * stretch) + x[0].size * jnp.log(stretch)
        return PathLogProb(prior, steps)
