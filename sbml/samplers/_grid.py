"""The base of samplers with a fixed number of steps: the grid of times, and the loop over it; and
what a score predicts at one time, from which each step is made.

    t_0 > t_1 > ... > t_n = eps,      x_{i+1} = step(x_i, t_i, t_{i+1}, z_i),  z_i ~ N(0, I)

The first time t_0 is the SDE's ``largest_time``, which is before T if the signal vanishes at T,
because the drift is infinite there. From there to T, x is scaled by ``sde.stretch``.

Given x, a step is normal: its mean and its standard deviation are the sampler's ``transition``.
From them follow the densities of what is drawn (``sbml.samplers.density``).

The spacing of the times is ``time``, even in t (Song et al., ICLR 2021), ``quadratic``, even in
sqrt(t), or ``log_snr``, even in log-SNR, which suits samplers with few steps.
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sbml.core.door import checked, typed
from sbml.core.scalars import Count, Number, Steps, one_of
from sbml.core.streams import stream
from sbml.core.types import (
    Array,
    Example,
    Key,
    PyTree,
    Scalar,
    Score,
    deterministic,
    in_full_precision,
    predictor,
)
from sbml.likelihood.ode import Stats
from sbml.samplers.corrector import Corrector, NoCorrector
from sbml.samplers.density import Chain
from sbml.sdes import SDE

Frames = Float[Array, "frames *s"]
Times = Float[Array, "frames"]
Triple = Float[Array, "3"]

SPACINGS = ("time", "quadratic", "log_snr")
Spacing = Annotated[str, one_of(*SPACINGS)]


@checked
def grid(sde: SDE, eps: Number, steps: Count, spacing: Spacing) -> Times:
    """``(steps + 1,)`` times from ``sde.largest_time`` down to ``eps``."""
    ends = jnp.asarray([sde.largest_time, eps], float)
    if spacing == "time":
        times = jnp.linspace(ends[0], ends[1], steps + 1)
    elif spacing == "quadratic":
        times = jnp.linspace(sde.largest_time**0.5, eps**0.5, steps + 1) ** 2
    else:
        least, largest = jax.vmap(sde.log_snr)(ends)
        times = sde.time(jnp.linspace(least, largest, steps + 1))
    return times.at[0].set(ends[0]).at[-1].set(ends[1])  # Exact, without rounding.


def denoise(score: Score, sde: SDE, x: Example, t: Scalar) -> Example:
    """Tweedie's E[x_0 | x_t] = (x_t + sigma^2 s(x_t, t)) / alpha, shape ``(*s)``."""
    return predictions(score, sde, x, t)[0]


@checked
def predictions(score: Score, sde: SDE, x: Example, t: Scalar) -> tuple[Example, Example]:
    """E[x_0 | x_t] and E[z | x_t] = -sigma s(x_t, t) for x_t = alpha x_0 + sigma z.

    Both have shape ``(*s)``; the score is called once.
    """
    both = predictor(score)
    if both is not None:
        return both(x, t)
    noise = -sde.std(t) * deterministic(score, x, t)
    return (x - sde.std(t) * noise) / sde.mean_coef(t), noise


def frames_of(
    z: Example, path: Float[Array, " steps *s"], times: Float[Array, " steps+1"], frames: int
) -> tuple[Frames, Times]:
    """``frames`` evenly spaced points of z followed by ``path (n, *s)``, and their times."""
    index = jnp.round(jnp.linspace(0, len(path), frames)).astype(int)
    return jnp.concatenate([z[None], path])[index], times[index]


@typed
@dataclasses.dataclass(frozen=True)
class FixedSteps(Chain):
    """``steps`` steps with ``evaluations`` of the score each; ``corrector`` follows each step.

    A sampler has a ``transition``, from which its ``step`` and its densities follow. If its
    steps are not normal given x, it has a ``step`` of its own and no density.

    Attributes:
      steps: the number of steps.
      spacing: the spacing of their times, of ``SPACINGS``.
      corrector: one of ``CORRECTORS``, applied after each step.
    """

    evaluations: ClassVar[int] = 1

    steps: Steps = 500
    spacing: Spacing = "time"
    corrector: Corrector = NoCorrector()

    @property
    def nfe(self) -> int:
        return self.steps * (self.evaluations + self.corrector.nfe)

    def times(self, sde: SDE, eps: Number) -> Times:
        return grid(sde, eps, self.steps, self.spacing)

    @typed
    def window(self, first: int, last: int) -> "FixedSteps":
        """The sampler with noise in its steps ``first`` to ``last`` - 1 only, counted from 0.

        Raises:
          ValueError: there are no such steps, or they have no density.
        """
        self.check_density(deterministic=False)
        if not 0 <= first < last <= self.steps:
            raise ValueError(
                f"window({first}, {last}) of {self.steps} steps: give 0 <= first < last <= "
                f"{self.steps}, as in x[first:last]"
            )
        same = self.steps, self.spacing, self.corrector
        return Window(*same, sampler=self, first=first, last=last)

    def init(self, z: Example) -> PyTree:
        """The state that is passed from step to step together with x."""
        return ()

    def step(
        self, score: Score, sde: SDE, x: Example, carry: PyTree, times: Triple, z: Example
    ) -> tuple[Example, PyTree]:
        """x ``(*s)`` at ``times[2]`` from x at ``times[1]`` with noise ``z``, and the new state;
        ``times[0]`` is the time before."""
        mean, std = self.transition(score, sde, x, times[1], times[2])
        return mean + std * z, carry

    def _scan(
        self, score: Score, sde: SDE, z: Example, key: Key, eps: Number, keep: bool
    ) -> tuple[Example, PyTree, Times]:
        """The sample, the results of all steps ``(steps, *s)`` or without ``keep`` None, and the
        times."""
        sde.check_time(eps)
        z = in_full_precision(z)
        times = self.times(sde, eps)
        # No time precedes the first step. A fictitious one beyond T keeps all divisors nonzero.
        before = jnp.concatenate([2 * times[:1] - times[1:2], times[:-2]])
        triples = jnp.stack([before, times[:-1], times[1:]], axis=1)

        def one(
            state: tuple[Example, PyTree], inputs: tuple[Array, Triple]
        ) -> tuple[tuple[Example, PyTree], Example | None]:
            x, carry = state
            i, triple = inputs
            triple = triple.astype(x.dtype)
            step_key = jax.random.fold_in(key, i)
            noise = jax.random.normal(stream(step_key, "noise"), x.shape, x.dtype)
            x, carry = self.step(score, sde, x, carry, triple, noise)
            own_key = stream(step_key, "corrector")
            x = self.corrector(score, sde, x, triple[1], triple[2], own_key)
            return (x, carry), x if keep else None

        start = z / self.stretch(sde)  # The latent is at T, the first step may begin before it.
        inputs = jnp.arange(self.steps), triples
        (x, _), path = jax.lax.scan(one, (start, self.init(z)), inputs)
        return x, path, times

    @checked
    def __call__(
        self, score: Score, sde: SDE, z: Example, key: Key, *, eps: Number
    ) -> tuple[Example, Stats]:
        x, _, _ = self._scan(score, sde, z, key, eps, keep=False)
        finite = jnp.all(jnp.isfinite(x))
        return x, Stats(jnp.asarray(self.nfe), jnp.asarray(self.steps), jnp.asarray(0), finite)

    @checked
    def path(
        self, score: Score, sde: SDE, z: Example, key: Key, *, eps: Number, frames: Steps
    ) -> tuple[Frames, Times]:
        """See ``Sampler``; the frames are evenly spaced among the steps."""
        _, path, times = self._scan(score, sde, z, key, eps, keep=True)
        return frames_of(z, path, times, frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(FixedSteps):
    """Noise in the steps ``first``, ..., ``last`` - 1 only, as policies have that learn from few
    steps; all other steps are DDIM's without noise. Its state is the number of the step.

    A step without noise has no density. Its entry of ``PathLogProb.steps`` is 0, so a ratio of
    policies has the factor 1 there. Its dependence on the parameters is not in the policy gradient.
    """

    sampler: FixedSteps
    first: int
    last: int

    @property
    def nfe(self) -> int:
        return self.sampler.nfe

    def times(self, sde: SDE, eps: Number) -> Times:
        return self.sampler.times(sde, eps)

    def obstacle(self, deterministic: bool) -> str:
        same = dataclasses.replace(self.sampler, corrector=self.corrector)
        return same.obstacle(deterministic)

    def init(self, z: Example) -> Array:
        return jnp.asarray(0)

    def step(
        self, score: Score, sde: SDE, x: Example, carry: Array, times: Triple, z: Example
    ) -> tuple[Example, Array]:
        def quiet() -> Example:
            x_0, noise = predictions(score, sde, x, times[1])
            mean, std = sde.marginal(x_0, times[2])
            return mean + std * noise

        noisy = (self.first <= carry) & (carry < self.last)
        x = jax.lax.cond(noisy, lambda: self.sampler.step(score, sde, x, (), times, z)[0], quiet)
        return x, carry + 1

    def _log_steps(self, score: Score, sde: SDE, x: Array, times: Times) -> Array:
        inside = slice(self.first, self.last + 1)
        steps = self.sampler._log_steps(score, sde, x[inside], times[inside])
        return jnp.pad(steps, (self.first, self.steps - self.last))
