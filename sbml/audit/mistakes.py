"""Mistakes of published likelihoods, as estimators that must fail.

Each is one of our own estimators with one mistake in it. Its docstring says how the mistake changes
the number.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml.audit import ours, suite
from sbml.audit.suite import Estimator, Nats, Schedule
from sbml.audit.worlds import Denoiser, Images
from sbml.core.types import Array, Key, PyTree, Scalar, Score
from sbml.density.estimators import bound, ode
from sbml.density.estimators.base import Evaluations, OneExample, Target
from sbml.likelihood import discrete, ode_logp
from sbml.likelihood.bound import Reduction, Steps
from sbml.sdes.times import Importance

Numbers = np.ndarray | Array
TOO_SMALL = "bound, normalised"


# The estimators with a mistake, each with the names of the checks that must fail; all others must
# not. The name of an estimator says what is wrong, and the docstring of its function says why.
MISTAKES: dict[Estimator, frozenset[str]] = {}


def _mistake(
    name: str, fails: str, data: str = "uniform", within: float = math.inf
) -> Callable[[Nats], Nats]:
    def add(nats: Nats) -> Nats:
        MISTAKES[Estimator(name, nats, data, within)] = frozenset(fails.split(", "))
        return nats

    return add


def _once(right: ours.Evaluation) -> Callable[[Denoiser, Schedule, Images, int], suite.Numbers]:
    """``right``, whose numbers are computed once: several mistakes change the same ones."""
    one_at_a_time, known = threading.Lock(), dict[Any, suite.Numbers]()

    def nats(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> suite.Numbers:
        call = denoiser.world, schedule, pixels.shape, pixels.tobytes(), seed
        with one_at_a_time:
            if call not in known:
                known[call] = right.with_error_bar(denoiser, schedule, pixels, seed)
        return known[call]

    return nats


_bound = _once(ours.BOUND)
_ode = _once(ours.ODE)


def _by_ode(*call: Any) -> np.ndarray:
    return np.asarray(_ode(*call).values)


@_mistake("the entropy of dequantization left out", TOO_SMALL, "centre")
def no_entropy(*call: Any) -> Numbers:
    """Noise u from q(u | k) gives -log P(k) <= E[-log p(k + u) + log q(u | k)]. The mean of log q
    is 0 for uniform noise and positive for any other noise on the bin: 0.56 bits/dim for normal
    noise of a sixth of the bin. Without it, a model is rewarded for the density that the narrow
    noise itself has piled up around the centres of the bins. Every number is too small by the same
    amount, so that comparisons within one paper look right."""
    without = ("dequantization",)
    return ours.Evaluation(ours.by_ode(ours.EXACT), ours.NORMAL, without=without)(*call)


@_mistake("log K dropped", TOO_SMALL)
def no_log_k(*call: Any) -> Numbers:
    """The bound from K draws of the dequantization is -log (1/K) sum_i w_i. A log-sum-exp without
    the 1/K is smaller by log K nats for every image, and falls with every further draw, which looks
    like the tightening that more draws bring. In bits/dim this is log2(K) / d, for large images as
    small as the gains that are reported: 0.0014 for 20 draws and 3,072 dimensions."""
    return ours.Evaluation(ours.by_ode(ours.EXACT, 2), ours.UNIFORM)(*call) - math.log(2)


@_mistake("the logarithm of a mean of noisy traces", TOO_SMALL)
def noisy_traces(*call: Any) -> Numbers:
    """One random probe gives log p without bias, with noise of variance v. Its exponential is then
    too large by the factor exp(v / 2) in the mean, and the logarithm of a mean of K of them tends
    to log p + v / 2. So noise that averages out of a mean of logarithms is counted as likelihood,
    and worse probes give better numbers. The exact trace has no such bias."""
    denoiser, schedule, pixels, seed = call
    noisy, draws = ours.Evaluation(ours.by_ode(ours.ONE_PROBE), ours.UNIFORM), 4
    seeds = range(draws * seed, draws * (seed + 1))
    nats = np.array([noisy(denoiser, schedule, pixels, each) for each in seeds])
    return math.log(draws) - np.logaddexp.reduce(-nats, axis=0)


@_mistake("an integral cut without reconstruction", TOO_SMALL, "centre")
def no_reconstruction(*call: Any) -> Numbers:
    """The integral from eps to T says how many nats it takes to describe x_eps, the noisy image.
    What is missing is the step from x_eps to the integers, -log P(k | x_eps): the price of the
    levels that the noise at eps hides, which is nearly 0 only if this noise is far narrower than a
    bin. So the number falls as eps grows. Here half a bin is one standard deviation of the noise at
    eps."""
    of = replace(
        ours.BOUND, dequantizer=ours.DECODER, sweeps=1, tau=1.0, without=("reconstruction",)
    )
    return of(*call)


class _Vanishing(bound.Estimator):
    """The bound, whose diffusion term at t has the wrong factor sigma(t)^2."""

    def one(
        self, score: Score, params: PyTree, data: OneExample, key: Key, u: Any, target: Target
    ) -> tuple[dict[str, Scalar], Evaluations]:
        sde, right = target.sde, super().one

        def at(u: Scalar, key: Key) -> dict[str, Scalar]:
            terms, _ = right(score, params, data, key, u[None], target)
            factor = sde.std(Importance(sde, target.eps).at(u)[0]) ** 2
            return {**terms, "diffusion": factor * terms["diffusion"]}

        each = jax.vmap(at)(u, jax.random.split(key, len(u)))
        return jax.tree.map(jnp.mean, each), len(u)


@_mistake("weights that vanish at the signal", TOO_SMALL, "centre")
def vanishing_weights(*call: Any) -> Numbers:
    """The bound weights the squared error of the noise by g^2 / (2 sigma^2) dt. Losses that are
    made for good samples give small noise less weight, here by the further factor sigma^2. But
    small noise is where the last levels of the pixels are decided, so most of the nats of an image
    lie there. A loss with such a weight bounds nothing, even if it is called nats."""
    return ours.Evaluation(_Vanishing(64), ours.DECODER, batch=ours.BATCH_WITHOUT_TRACE)(*call)


@_mistake("times drawn evenly", "coverage")
def uniform_times(*call: Any) -> Numbers:
    """In t the integrand grows like 1 / t towards the smallest time. In the first world of the
    audit, half of the integral from t = 1e-5 on lies below t = 0.003, where 3 of 1,000 even draws
    fall. The estimate is unbiased, but a usual evaluation has few or none of these rare draws. Then
    both its mean and the spread that gives its error bar are too small, so that half of the
    intervals exclude the truth."""
    evenly = bound.Estimator(16, reduction=Reduction(proposal="uniform"))
    return ours.Evaluation(evenly, ours.UNIFORM, batch=ours.BATCH_WITHOUT_TRACE)(*call)


@_mistake("few steps read as continuous", "tight", "centre", ours.WITHIN)
def few_steps(*call: Any) -> Numbers:
    """A chain of N steps weights the error at each step by (SNR_{i-1} / SNR_i - 1) / 2, which
    exceeds the integral over the step. So its bound is valid and looser, by an amount that depends
    on N and on the spacing of the steps and not on the model. Models whose bounds have different N
    cannot be compared. The estimator fails by its claim to be within 0.02 bits/dim of the truth,
    not as a bound."""
    n, sde = 20, call[1].sde
    eps = discrete.smallest_time(sde, call[1].levels, ours.EPS)
    times = Importance(sde, eps).at(jnp.linspace(0, 1, n + 1))[0]
    steps = Steps((float(eps), *times[1:-1].tolist(), float(sde.largest_time)), (1.0,) * n)
    in_steps = bound.InSteps(64, steps=steps)
    return ours.Evaluation(in_steps, ours.DECODER, batch=ours.BATCH_WITHOUT_TRACE)(*call)


@_mistake("outliers trimmed", "complete")
def trimmed(*call: Any) -> Numbers:
    """The largest tenth of the numbers is left out of the mean. A large part of -E log P is due to
    the images that a model finds least probable, so the mean of the rest makes a model with
    outliers look better than it is. An infinite number is a result as well: the model excludes an
    image that exists."""
    nats = np.asarray(_bound(*call).values)
    return nats[nats <= np.quantile(nats, 0.9)]


@_mistake("test images dropped", "complete")
def dropped(*call: Any) -> Numbers:
    """A loader for training keeps only full batches. In an evaluation, the images that remain then
    depend on the batch size and on the order, so that two runs average over different images. If
    the images are sorted, those of the last, incomplete batch are not a random part. Here a batch
    has four images."""
    return np.asarray(_bound(*call).values)[: len(call[2]) // 4 * 4]


@_mistake("log p clipped at a fixed value", TOO_SMALL)
def clipped(*call: Any) -> Numbers:
    """A floor under log p, here 4 nats, keeps an image that the solver or the network cannot handle
    from deciding the mean. But such an image is where the model is worst, and the floor replaces
    its number by one that was chosen by hand. The probabilities of all images then add up to more
    than 1, so the numbers belong to no model."""
    return np.minimum(_by_ode(*call), 4.0)


@_mistake("outliers replaced by the median", "independent, normalised")
def medians(*call: Any) -> Numbers:
    """The largest tenth of the numbers is set to the median of all. Every image has a finite
    number, so that no count shows it, and the images that a model finds least probable are counted
    as typical ones. The number of an image also depends on which other images are evaluated with
    it."""
    nats = _by_ode(*call)
    return np.where(nats > np.quantile(nats, 0.9), np.median(nats), nats)


@_mistake("a total in bfloat16", "precise")
def half_precision(*call: Any) -> Numbers:
    """bfloat16 has eight significant bits. A network may compute in it without harm, but a sum of
    thousands of nats that is kept in it is rounded to steps of tens of nats: for 3,072 dimensions
    and 3 bits/dim a step is 32 nats, or 0.015 bits/dim. In a mean over images with different
    numbers this looks like noise, so only the numbers themselves show it."""
    return jnp.asarray(_by_ode(*call), jnp.bfloat16)


@_mistake("0.01 bits/dim below the truth", TOO_SMALL)
def too_small(*call: Any) -> Numbers:
    """This is less than the differences that papers report between models, and it can come from any
    small term that is left out: a Jacobian near 1, the noise that is left at the smallest time, a
    solver whose error has one sign. A bound can be too large by such an amount, but nothing that is
    computed correctly can be smaller than the entropy on average."""
    return _by_ode(*call) - 0.01 * math.log(2) * math.prod(call[2].shape[1:])


class _OneProbe(ode.Estimator):
    """The ODE, whose probe depends on the seed only; ``points`` brings it to every image."""

    terms = "divergence", "scale"

    def points(self, seed: int, sweep: int, n: int) -> np.ndarray:
        return np.full((n, 1), seed)

    def one(
        self, score: Score, params: PyTree, data: OneExample, key: Key, u: Any, target: Target
    ) -> tuple[dict[str, Scalar], Evaluations]:
        probe = jax.random.key(u[0].astype(int))
        x, _ = target.sample(params, data, key)
        how: dict[str, Any] = {"trace": self.trace, "solver": self.solver}
        found = ode_logp(score, target.sde, x, probe, eps=target.eps, **how)
        return {"divergence": -found.logp}, found.stats.nfe


@_mistake("one fixed probe for all images", "coverage")
def fixed_probe(*call: Any) -> Numbers:
    """With a probe of its own for every image, the noise of the traces averages out over the
    images, and the spread of their numbers contains it. With one probe for all, the part of the
    noise that the images have in common stays in the mean, however many images there are. The
    spread does not show it, so the error bar is too narrow."""
    return ours.Evaluation(_OneProbe(ours.ONE_PROBE, solver=ours.SOLVER), ours.UNIFORM)(*call)


@_mistake("an error bar that is right only on average", "error bar")
def lucky_bars(*call: Any) -> suite.Numbers:
    """If rare draws decide a mean, the spread of the draws is much too small in most calls, and
    much too large in those that have a rare draw. Over many calls the mean square of the standard
    error is right, but a reader sees one call, and its interval hardly ever contains the mean.
    Student's quantile does not help, because such draws are not normal. Here three of four calls
    claim a twentieth of the true error, and the others twice as much."""
    found = _bound(*call)
    factor = 2.0 if np.random.default_rng(call[3]).random() < 0.25 else 0.05
    return suite.Numbers(found.values, factor * found.stderr, factor * (found.ci95 or 0.0))
