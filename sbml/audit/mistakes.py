"""Mistakes of published likelihoods, as estimators that must fail.

Each is one of our own estimators with one mistake in it, or a few lines where the mistake is the
estimator. Its docstring says how the mistake changes the number.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sbml import bits, discrete, pytrees
from sbml.audit.ours import (
    BATCH,
    BOUND,
    DECODER,
    EPS,
    EXACT,
    NORMAL,
    ODE,
    ONE_PROBE,
    SOLVER,
    UNIFORM,
    WITHIN,
    Evaluation,
)
from sbml.audit.suite import Estimator, Nats, Schedule
from sbml.audit.worlds import Denoiser, Images
from sbml.bound import prior_kl
from sbml.estimators import bound, ode
from sbml.integers import Kind
from sbml.likelihood import ode_logp
from sbml.score import from_prediction
from sbml.sdes import SDE
from sbml.times import Importance
from sbml.types import Array, Key

Numbers = np.ndarray | Array
DRAWS = 4
CLIP = 4.0  # nats


@dataclasses.dataclass(frozen=True)
class Mistake:
    """An estimator with a mistake, and the checks that must fail; all others must not.

    Attributes:
      estimator: its name says what is wrong, and the docstring of its function says why.
      fails: names of ``suite.CHECKS``.
    """

    estimator: Estimator
    fails: frozenset[str]


def no_entropy(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """The entropy of dequantization is left out.

    Noise u from q(u | k) gives -log P(k) <= E[-log p(k + u) + log q(u | k)]. The term log q is 0
    for uniform noise only. Its mean, which is minus the entropy of q, is positive for any other q
    on the unit bin: 0.56 bits/dim for normal noise of a sixth of the bin, truncated to the bin.
    Without it, a model is rewarded for the density that the narrow noise itself has piled up around
    the centres of the bins. Every number is too small by the same amount, so that comparisons among
    models of one paper look right, and those with other papers are wrong.
    """
    terms = Evaluation(ode.Estimator(EXACT), NORMAL, without=("dequantization",))
    return terms(denoiser, schedule, pixels, seed)


def no_log_k(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """log K is dropped from the average of K likelihoods.

    The bound from K draws of the dequantization is -log (1/K) sum_i w_i. A log-sum-exp without the
    1/K computes -log sum_i w_i, which is smaller by log K nats for every image. It also falls with
    every further draw, which looks like the tightening that more draws bring. The error is
    log2(K) / d bits/dim. For large images it is as small as the gains that are reported for more
    draws: 0.0014 bits/dim for 20 draws and 3,072 dimensions.
    """
    right = Evaluation(ode.Estimator(EXACT, 2), UNIFORM)
    return right(denoiser, schedule, pixels, seed) - math.log(2)


def noisy_traces(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """The likelihoods whose mean is taken have noisy traces.

    One random probe gives log p without bias, with noise of variance v. Its exponential is then too
    large by the factor exp(v / 2) in the mean, and the logarithm of a mean of K such exponentials
    approaches log p + v / 2 as K grows. So the noise that averages out of a mean of logarithms is
    counted as likelihood, and worse probes give better numbers. The exact trace, or a mean of the
    logarithms, has no such bias.
    """
    noisy = Evaluation(ode.Estimator(ONE_PROBE), UNIFORM)
    seeds = range(DRAWS * seed, DRAWS * (seed + 1))
    draws = np.array([noisy(denoiser, schedule, pixels, each) for each in seeds])
    return math.log(DRAWS) - np.logaddexp.reduce(-draws, axis=0)


def no_reconstruction(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """The integral over time is cut at eps, and nothing is added for what lies below.

    The diffusion term from eps to T says how many nats it takes to describe x_eps, the noisy image.
    What is missing is the step from x_eps to the integers, -log P(k | x_eps). It is nearly 0 if the
    noise at eps is far narrower than a bin. Otherwise it is the price of the levels that the noise
    has hidden, and the number falls as eps grows. Here half a bin is one standard deviation of the
    noise at eps.
    """
    cut = Evaluation(bound.Estimator(), DECODER, tau=1.0, control=True, without=("reconstruction",))
    return cut(denoiser, schedule, pixels, seed)


STEPS, TIMES = 20, 64


@functools.partial(jax.jit, static_argnames=("sde", "levels", "wrong"))
def _of_integers(
    denoiser: Denoiser, pixels: Array, key: Key, *, sde: SDE, levels: int, wrong: str
) -> Array:
    """The bound with the categorical decoder (``sbml.discrete``), times uniform in log-SNR, and the
    mistake ``wrong``, which is ``weight`` or ``steps``."""
    x, eps = bits.to_model(pixels, 0.5, levels), discrete.smallest_time(sde, levels, EPS)
    times, keys = Importance(sde, eps), jax.random.split(key, 3)
    u = jax.random.uniform(keys[0], (TIMES, len(x)))
    if wrong == "steps":
        u = jnp.ceil(u * STEPS) / STEPS  # the ends of the steps of a chain
    t, span = times.at(u)[0], times.normaliser
    z = jax.random.normal(keys[1], (TIMES, *x.shape))
    squares = jnp.sum((z - _noise(denoiser, sde, x[None], z, t)) ** 2, axis=(2, 3, 4))
    if wrong == "steps":
        weights = 0.5 * STEPS * jnp.expm1(span / STEPS) * jnp.ones_like(t)
    else:
        weights = 0.5 * span * sde.std(t) ** 2  # It should be span / 2.
    last = x + jnp.exp(-0.5 * sde.log_snr(jnp.asarray(eps))) * jax.random.normal(keys[2], x.shape)
    rho = jnp.exp(-0.5 * sde.log_snr(jnp.asarray(eps)))
    decoder = jax.vmap(lambda y, k: discrete.decoder_nats(y, k, levels, rho))(last, pixels)
    prior = jax.vmap(lambda x: prior_kl(sde, x))(x)
    return prior + jnp.mean(weights * squares, axis=0) + decoder


def _noise(denoiser: Denoiser, sde: SDE, x: Array, z: Array, t: Array) -> Array:
    """E[z | x_t] of x_t = alpha x + sigma z ``(m, n, h, w, c)`` at the times ``t (m, n)``."""
    alpha, sigma = (f(t)[..., None, None, None] for f in (sde.mean_coef, sde.std))
    x_t = alpha * x + sigma * z
    return (x_t - alpha * denoiser(x_t, t)) / sigma


def vanishing_weights(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """The weight of the loss vanishes at small noise.

    The bound weights the squared error of the noise by g^2 / (2 sigma^2) dt, which is half of the
    decrease of the log-SNR. Losses that are made for good samples give small noise less
    weight, here by the further factor sigma^2. But small noise is where the last levels of the
    pixels are decided, so most of the nats of an image lie there. A loss with such a weight bounds
    nothing, even if it is called nats.
    """
    sde, levels, key = schedule.sde, schedule.levels, jax.random.key(seed)
    return _of_integers(denoiser, pixels, key, sde=sde, levels=levels, wrong="weight")


def uniform_times(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """Times are drawn evenly, although much of the integral lies close to the smallest time.

    In t the integrand grows like 1 / t towards the smallest time. In the first world of the audit,
    half of the integral from t = 1e-5 on lies below t = 0.003, where 3 of 1,000 draws fall. The
    estimate is unbiased, but a usual evaluation has few or none of the rare draws with the large
    weights. Then both its mean and the spread that gives its error bar are too small, so that half
    of the intervals exclude the truth, and nothing in the numbers shows it.
    """
    evenly = Evaluation(bound.Estimator(), UNIFORM, proposal="uniform")
    return evenly(denoiser, schedule, pixels, seed)


def few_steps(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """A bound of a chain of a few steps is read as the continuous one.

    A chain of N steps weights the error at each step by (SNR_{i-1} / SNR_i - 1) / 2, which exceeds
    the integral over the step. So its bound is valid and looser, by an amount that depends on N and
    on the spacing of the steps and not on the model. Two models whose bounds have different N, or a
    chain and an ODE, cannot be compared. The estimator fails by its claim to be within 0.02
    bits/dim of the truth, not as a bound.
    """
    sde, levels, key = schedule.sde, schedule.levels, jax.random.key(seed)
    return _of_integers(denoiser, pixels, key, sde=sde, levels=levels, wrong="steps")


def trimmed(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """Outliers are trimmed.

    The largest tenth of the numbers is left out of the mean. A large part of -E log P is due to the
    images that a model finds least probable. So the mean of the rest makes a model with outliers
    look better than it is, most of all if its outliers are bad. An infinite number is a result as
    well: the model excludes an image that exists.
    """
    nats = BOUND(denoiser, schedule, pixels, seed)
    return nats[nats <= np.quantile(nats, 0.9)]


def dropped(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """The last, incomplete batch of the test images is dropped.

    A loader for training keeps only full batches. In an evaluation, the images that remain depend
    on the batch size and on the order, so that two runs average over different images. If the
    images are sorted, those that are missing are not a random part.
    """
    size = 4
    return BOUND(denoiser, schedule, pixels, seed)[: len(pixels) // size * size]


@functools.partial(jax.jit, static_argnames=("sde", "levels"))
def _one_probe(
    denoiser: Denoiser, pixels: Array, ids: Array, key: Key, *, sde: SDE, levels: int
) -> Array:
    score = from_prediction(denoiser, "x0", sde)

    def logp(pixels: Array, i: Array) -> Array:
        u = jax.random.uniform(jax.random.fold_in(key, i), pixels.shape)
        x = bits.to_model(pixels, u, levels)
        return ode_logp(score, sde, x, key, eps=EPS, trace=ONE_PROBE, solver=SOLVER).logp

    return bits.scale_nats(pixels.shape[1:], levels) - jax.vmap(logp)(pixels, ids)


def fixed_probe(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """One random probe serves all images.

    With a probe of its own for every image, the noise of the traces averages out over the images,
    and the spread of their numbers contains it. With one probe for all, the part of the noise that
    the images have in common stays in the mean, however many images there are. The spread does not
    show it, so the error bar is too narrow.
    """
    sde, levels, key = schedule.sde, schedule.levels, jax.random.key(seed)

    def of_batch(ids: np.ndarray) -> Array:
        return _one_probe(denoiser, pixels[ids], ids, key, sde=sde, levels=levels)

    batches = pytrees.in_batches(of_batch, np.arange(len(pixels)), BATCH)
    return np.concatenate([numbers for _, numbers in batches])


def clipped(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """log p is clipped at a fixed value.

    A floor under log p keeps one image that the solver or the network cannot handle from deciding
    the mean, and a table without infinities looks tidy. But such an image is where the model is
    worst, and the floor replaces its number by one that was chosen by hand. The probabilities of
    all images then add up to more than 1, so the numbers belong to no model.
    """
    return np.minimum(ODE(denoiser, schedule, pixels, seed), CLIP)


def medians(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """Outliers are replaced by the median.

    The largest tenth of the numbers is set to the median of all. Every image has a finite number,
    so that no count shows it, and the mean is as robust as it is wrong: the images that a model
    finds least probable are counted as typical ones. The number of an image also depends on which
    other images are evaluated with it.
    """
    nats = ODE(denoiser, schedule, pixels, seed)
    return np.where(nats > np.quantile(nats, 0.9), np.median(nats), nats)


def half_precision(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """The total is summed in bfloat16.

    bfloat16 has eight significant bits. A network may compute in it without harm, but a sum of
    thousands of nats that is kept in it is rounded to steps of tens of nats, and terms below such a
    step are lost one by one, all in the same direction. For 3,072 dimensions and 3 bits/dim a step
    is 32 nats, or 0.015 bits/dim. In a mean over images with different numbers this looks like
    noise, so only the numbers themselves show it.
    """
    return jnp.asarray(ODE(denoiser, schedule, pixels, seed), jnp.bfloat16)


def too_small(denoiser: Denoiser, schedule: Schedule, pixels: Images, seed: int) -> Numbers:
    """The numbers are 0.01 bits/dim below the truth.

    This is less than the differences that papers report between models, and it can come from any
    small term that is left out: a Jacobian near 1, the noise that is left at the smallest time, a
    solver whose error has one sign. A suite that does not see it cannot tell whether a difference
    of a hundredth of a bit is real. A bound can be too large by such an amount, but nothing that is
    computed correctly can be smaller than the entropy on average.
    """
    nats = ODE(denoiser, schedule, pixels, seed)
    return nats - 0.01 * math.log(2) * math.prod(pixels.shape[1:])


def _mistake(name: str, nats: Nats, data: Kind, fails: str, within: float = math.inf) -> Mistake:
    return Mistake(Estimator(name, nats, data, within), frozenset(fails.split()))


TOO_SMALL = "bound normalised"
MISTAKES = (
    _mistake("the entropy of dequantization left out", no_entropy, "centre", TOO_SMALL),
    _mistake("log K dropped", no_log_k, "uniform", TOO_SMALL),
    _mistake("the logarithm of a mean of noisy traces", noisy_traces, "uniform", TOO_SMALL),
    _mistake("an integral cut without reconstruction", no_reconstruction, "centre", TOO_SMALL),
    _mistake("weights that vanish at the signal", vanishing_weights, "centre", TOO_SMALL),
    _mistake("times drawn evenly", uniform_times, "uniform", "coverage"),
    _mistake("few steps read as continuous", few_steps, "centre", "tight", WITHIN),
    _mistake("outliers trimmed", trimmed, "uniform", "complete"),
    _mistake("test images dropped", dropped, "uniform", "complete"),
    _mistake("log p clipped at a fixed value", clipped, "uniform", TOO_SMALL),
    _mistake("outliers replaced by the median", medians, "uniform", "independent normalised"),
    _mistake("a total in bfloat16", half_precision, "uniform", "precise"),
    _mistake("0.01 bits/dim below the truth", too_small, "uniform", TOO_SMALL),
    _mistake("one fixed probe for all images", fixed_probe, "uniform", "coverage"),
)
