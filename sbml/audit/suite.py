"""Does a function that estimates -log P of images bound it, and can its error bar be trusted?

The function is called with the exact denoisers of worlds whose probabilities P are known
(``sbml.audit.worlds``). With the mean over images of the world, and over all draws of the function,

    excess = E[nats + log P(k)] / (d log 2) bits/dim

is at least 0 for an upper bound, whatever the denoiser is. The checks are:

    complete      one finite number for every image
    repeatable    the same seed gives the same numbers, bit by bit
    precise       the numbers have more than the eight significant bits of bfloat16
    independent   the mean number of an image is the same alone, among extreme images, and if the
                  order of the images is reversed
    bound         the excess is not below 0
    tight         the excess is not above what the function claims (``Estimator.within``)
    normalised    sum over all images of exp(-E nats) is at most 1, where all can be listed. It
                  implies ``bound``, and also sees improbable images whose numbers are too small,
                  which hardly count in a mean over the world
    coverage      the t interval of a mean over images contains the expectation of this mean as
                  often as that of the exact -log P does, which is 95% if images are many
    error bar     the standard error that the function itself gives for the draws (``Numbers``) is
                  the standard deviation of its mean over calls with the same images, and its
                  intervals contain the mean of all calls in 95% of them

*Errors.* A number of ``bound``, ``tight``, ``normalised`` and ``independent`` is a mean over calls
with different seeds, whose spread gives its standard error. So draws that all images of a call
share are part of the error. A check fails if its number is outside of its limit by more than a
tolerance, the standard error times the one-sided quantile of Student's t for the probability
``ALPHA``. All of these checks but ``tight`` also allow ``SOLVER``, the error of an ODE solver that
an evaluation accepts. An audit compares about twenty numbers with such limits, so it fails a
correct function with a probability of about 2e-5. A check whose tolerance is above
``COARSE`` or ``COARSE_SUM`` is unclear: the function needs more draws, or the audit more calls.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import special

from sbml.audit import worlds as known
from sbml.audit.worlds import Denoiser, Images, World
from sbml.core import bits
from sbml.core.door import checked
from sbml.core.scalars import Count, at_least
from sbml.core.types import Array, Json, Real
from sbml.score import integers
from sbml.sdes import SDE, SDES
from sbml.statistics import intervals

CHECKS = (
    "complete",
    "repeatable",
    "precise",
    "independent",
    "bound",
    "tight",
    "normalised",
    "coverage",
    "error bar",
)
PASS, NOTE, UNCLEAR, FAIL = "pass", "note", "unclear", "FAIL"

ALPHA = 1e-6  # the probability that one check fails a correct function
SOLVER = 1e-3  # bits/dim
COARSE, COARSE_SUM = 0.2, 0.5  # bits/dim, and of the sum of all probabilities

_GAUSSIAN = 0.5 * 0.8 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
WORLDS: dict[str, World] = {
    "gaussian": known.gaussian(np.full(4, 0.1), _GAUSSIAN, 3, (1, 4, 1)),
    "random": known.random(0, 3, (1, 4, 1)),
    "chain": known.chain(8, (2, 4, 1), 1.5),
    "uniform": known.uniform(256, (1, 1, 3)),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """x_t = alpha(t) x_0 + sigma(t) z for t in (0, 1], and what x_0 is.

    Attributes:
      sde: the forward process, for estimators that use this library.
      levels: the number L of levels of the pixels k.
      data: ``centre`` if x_0 = (2 k + 1) / L - 1, or ``uniform`` if x_0 = 2 (k + u) / L - 1 with u
        uniform in [0, 1).
    """

    sde: SDE
    levels: int
    data: str

    def alpha(self, t: Real | float) -> Array:
        """alpha(t), of the shape of ``t``."""
        return self.sde.mean_coef(jnp.asarray(t, float))

    def sigma(self, t: Real | float) -> Array:
        """sigma(t), of the shape of ``t``."""
        return self.sde.std(jnp.asarray(t, float))


class Numbers(NamedTuple):
    """Numbers with an error bar.

    Attributes:
      values: a number in nats for each image, ``(n,)``.
      stderr: the standard error of their mean, for these images: that of the random draws.
      ci95: the half-width of its 95% interval. If it is not given, 1.96 ``stderr`` must contain the
        mean in 70% of the calls, as it does if ``stderr`` is that of two draws.
    """

    values: Array | np.ndarray
    stderr: float
    ci95: float | None = None


# A function of the denoiser, the schedule, the images (n, h, w, c) and the seed (``Estimator``).
Nats = Callable[[Denoiser, Schedule, Images, int], Numbers | Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A function that estimates -log P(k), and what it claims.

    Attributes:
      name: for reports.
      nats: a function of (denoiser, schedule, pixels ``(n, h, w, c)``, seed) that gives a number in
        nats for each image, ``(n,)``, as an array of JAX or NumPy. ``denoiser(x_t, t)`` is
        E[x_0 | x_t] (``sbml.audit.worlds.Denoiser``), ``schedule`` a :class:`Schedule`, ``pixels``
        are uint8, and ``seed`` is an integer from which all random draws must follow. It may also
        return :class:`Numbers`, whose error bar is checked then.
      data: the x_0 for which it needs the denoiser, ``centre`` or ``uniform``.
      within: the largest excess in bits/dim that it claims for an exact denoiser; infinity for a
        bound that does not claim to be tight.
    """

    name: str
    nats: Nats
    data: integers.Kind = "uniform"
    within: float = math.inf


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check in one world.

    Attributes:
      check: one of ``CHECKS``.
      world: the name of the world.
      verdict: ``pass``, ``note`` (worth to know, and no failure), ``unclear`` or ``FAIL``.
      value: the number that is checked; NaN if there is none.
      tolerance: by how much it may miss its limit by chance.
      words: the number in words.
    """

    check: str
    world: str
    verdict: str
    value: float
    tolerance: float
    words: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings about one estimator; ``str`` shows them as a table."""

    estimator: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def failed(self) -> frozenset[str]:
        """The checks that failed in a world."""
        return frozenset(f.check for f in self.findings if f.verdict == FAIL)

    @property
    def passed(self) -> bool:
        """Whether all checks passed in all worlds; an unclear check has not passed."""
        return all(f.verdict in (PASS, NOTE) for f in self.findings)

    @property
    def excess(self) -> dict[str, float]:
        """The excess in bits/dim in each world in which it is known."""
        return {f.world: f.value for f in self.findings if f.check == "bound"}

    def as_dict(self) -> Json:
        """The report as plain values, for JSON."""
        return dataclasses.asdict(self) | {"failed": sorted(self.failed), "passed": self.passed}

    def __str__(self) -> str:
        ends = f"{self.estimator}: {'passed' if self.passed else 'NOT PASSED'}"
        width = max((len(f.world) for f in self.findings), default=0)
        lines = [
            f"{f.check:11}  {f.world:{width}}  {f.verdict:7}  {f.words}" for f in self.findings
        ]
        return "\n".join([*lines, f"{ends}, in {self.seconds:.1f} s"])


@checked
def audit(
    estimator: Estimator,
    worlds: Mapping[str, World] | None = None,
    *,
    sde: SDE | None = None,
    calls: Annotated[int, at_least(8)] = 64,
    repetitions: int = 500,
    images: Count = 9,
    seed: int = 0,
) -> Report:
    """Check an estimator.

    Args:
      estimator: the function and its claims.
      worlds: worlds by name; None for ``WORLDS``. The checks ``repeatable``, ``independent`` and
        ``coverage`` use the first one only.
      sde: the forward process; None for VP.
      calls: the number of calls, at least 8, over which each mean is taken. Where all images can be
        listed, each call has all of them, and otherwise ``images`` new ones.
      repetitions: the number of intervals whose coverage is counted, each of one call with
        ``images`` new images; 0 to leave this check out.
      images: see above; an odd number, so that incomplete batches occur.
      seed: the first seed; the calls have different ones.

    Raises:
      ValueError: the estimator returns no number for each image.
    """
    start = time.perf_counter()
    process = SDES["vp"]() if sde is None else sde
    named = WORLDS if worlds is None else worlds
    trials = [_Trial(name, world, estimator, process) for name, world in named.items()]
    first = trials[0]
    small = [first.world.sample(seed, n) for n in (1, images)]
    in_small_batches = first.complete([first.nats(pixels, seed) for pixels in small], small)
    findings = [in_small_batches, *first.repeatable(images, seed)]
    for trial in trials:
        findings += trial.in_the_mean(calls, images, seed)
    if all(f.verdict != FAIL for f in findings if f.check == "complete"):
        findings.append(first.independent(calls, images, seed))
        if repetitions:
            findings.append(first.coverage(repetitions, images, seed))
            findings += first.error_bar(repetitions, images, seed)
    findings.sort(key=lambda f: CHECKS.index(f.check))
    return Report(estimator.name, tuple(findings), time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """One estimator in one world."""

    name: str
    world: World
    estimator: Estimator
    sde: SDE

    @functools.cached_property
    def given(self) -> tuple[Denoiser, Schedule]:
        """One denoiser and one schedule for all calls, so that they can be static under ``jit``."""
        data, levels = self.estimator.data, self.world.levels
        return self.world.denoiser(self.sde, data), Schedule(self.sde, levels, data)

    def nats(self, pixels: Images, seed: int) -> np.ndarray:
        """The estimator's numbers, as many as it returns."""
        return np.asarray(self.numbers(pixels, seed).values)

    def numbers(self, pixels: Images, seed: int) -> Numbers:
        """The numbers with their error bar; it is NaN if there is none."""
        given = self.estimator.nats(*self.given, pixels, seed)
        of = given if isinstance(given, Numbers) else Numbers(given, math.nan)
        found = np.asarray(of.values, np.float64)
        if found.ndim != 1:
            raise ValueError(
                f"{self.estimator.name} returned shape {found.shape} for {len(pixels)} images: "
                "return one number for each image, (n,)"
            )
        return of._replace(values=found)

    def finding(
        self, check: str, ok: bool, value: float, tolerance: float, words: str, coarse: float
    ) -> Finding:
        verdict = (UNCLEAR if tolerance > coarse else PASS) if ok else FAIL
        return Finding(check, self.name, verdict, float(value), float(tolerance), words)

    def complete(self, numbers: list[np.ndarray], given: list[Images]) -> Finding:
        total, finite = sum(map(len, given)), sum(int(np.isfinite(x).sum()) for x in numbers)
        lost = total - finite
        words = f"{lost} of {total} numbers are missing or not finite"
        return self.finding("complete", not lost, lost / total, 0, words, math.inf)

    def in_the_mean(self, calls: int, images: int, seed: int) -> Iterator[Finding]:
        """``complete``, ``bound``, ``tight`` and ``normalised``."""
        world, every = self.world, self.world.images
        given = [world.sample(seed + i, images) if every is None else every for i in range(calls)]
        numbers = [self.nats(pixels, seed + i) for i, pixels in enumerate(given)]
        complete = self.complete(numbers, given)
        yield complete
        if complete.verdict == FAIL:
            return
        values = np.stack(numbers)
        log_p = np.stack([world.log_prob(pixels) for pixels in given])
        weights = 1 / images if every is None else np.exp(log_p)
        excess = np.sum(weights * (values + log_p), axis=1) / (world.dims * bits.LOG2)
        mean, tolerance = _mean(excess)
        words = f"excess {mean:+z.4f} +- {tolerance:.4f} bits/dim"
        ok = mean >= -(tolerance + SOLVER)
        yield self.finding("bound", ok, mean, tolerance, words, COARSE)
        within = self.estimator.within
        if within < math.inf:
            words += f", claimed at most {within:g}"
            ok = mean <= within + tolerance
            yield self.finding("tight", ok, mean, tolerance, words, COARSE)
        if every is not None:
            total, stderr = jackknife(values)
            tolerance = limit(stderr, calls)
            words = f"the probabilities add up to {total:.4g} +- {tolerance:.2g}"
            ok = total <= math.exp(world.dims * bits.LOG2 * SOLVER) + tolerance
            yield self.finding("normalised", ok, total, tolerance, words, COARSE_SUM)

    def repeatable(self, images: int, seed: int) -> Iterator[Finding]:
        """``repeatable`` and ``precise``."""
        pixels = self.world.sample(seed, images)
        one, other = (self.nats(pixels, seed) for _ in range(2))
        ok = one.tobytes() == other.tobytes()
        words = f"two calls with one seed {'agree' if ok else 'differ'}"
        yield self.finding("repeatable", ok, math.nan, 0, words, math.inf)
        rounded = int(np.sum(np.float64(one.astype(jnp.bfloat16)) == one))
        words = f"{rounded} of {len(one)} numbers have eight significant bits or fewer"
        yield self.finding("precise", 2 * rounded <= len(one), rounded, 0, words, math.inf)

    def independent(self, calls: int, images: int, seed: int) -> Finding:
        """The largest difference of the first image's mean number, relative to its tolerance."""
        world = self.world
        pixels = world.sample(seed, images)
        extreme = pixels.copy()
        extreme[1::2], extreme[2::2] = 0, world.levels - 1
        places = {"alone": (pixels[:1], 0), "among extreme images": (extreme, 0)}
        places["in reversed order"] = (pixels[::-1], -1)
        usual = np.array([self.nats(pixels, seed + i)[0] for i in range(calls)])
        found = []
        for place, (batch, j) in places.items():
            again = np.array([self.nats(batch, seed + i)[j] for i in range(calls)])
            gap = (again - usual) / (world.dims * bits.LOG2)
            mean, tolerance = _mean(gap)
            found.append((abs(mean), tolerance, place))
        gap, tolerance, place = max(found, key=lambda each: each[0] / (each[1] + SOLVER))
        words = f"{place}, an image's number differs by {gap:z.4f} +- {tolerance:.4f} bits/dim"
        ok = gap <= tolerance + SOLVER
        return self.finding("independent", ok, gap, tolerance, words, math.inf)

    def coverage(self, repetitions: int, images: int, seed: int) -> Finding:
        """The coverage of the estimator's intervals, compared with that of the exact numbers."""
        world = self.world
        pixels = [world.sample(seed + i, images) for i in range(repetitions)]
        values = np.stack([self.nats(each, seed + i) for i, each in enumerate(pixels)])
        exact = -np.stack([world.log_prob(each) for each in pixels])
        share, best = _covered(values, values.mean()), _covered(exact, world.entropy)
        upper = np.array([intervals.mean_interval(each).bounds[1] for each in values])
        stderr = math.sqrt(2 * 0.95 * 0.05 / repetitions)
        tolerance = -float(special.ndtri(ALPHA)) * stderr
        words = (
            f"{share:.1%} of {repetitions} intervals contain the expectation, {best:.1%} with the "
            f"exact numbers; {np.mean(upper >= world.entropy):.1%} end above the entropy"
        )
        return self.finding("coverage", share >= best - tolerance, share, tolerance, words, COARSE)

    def error_bar(self, repetitions: int, images: int, seed: int) -> Iterator[Finding]:
        """The root mean square of the estimator's standard errors, relative to the spread of its
        means, of one set of images, and the coverage of its intervals; nothing if it gives no
        standard error."""
        pixels = self.world.sample(seed, images)
        if math.isnan(self.numbers(pixels, seed).stderr):
            return
        found = [self.numbers(pixels, seed + i) for i in range(repetitions)]
        means = np.array([np.mean(each.values) for each in found])
        spread = float(np.std(means, ddof=1))
        claimed = math.sqrt(np.mean([each.stderr**2 for each in found]))
        # The variance of each of the two has about the relative error sqrt(2 / repetitions).
        tolerance = -float(special.ndtri(ALPHA)) / math.sqrt(repetitions)
        gap = abs(math.log(claimed / spread)) if min(claimed, spread) > 0 else math.inf
        halves = [1.96 * each.stderr if each.ci95 is None else each.ci95 for each in found]
        share = float(np.mean(np.abs(means - np.mean(means)) <= halves))
        least = 0.95 if all(each.ci95 is not None for each in found) else 0.7
        below = -float(special.ndtri(ALPHA)) * math.sqrt(least * (1 - least) / repetitions)
        words = (
            f"the standard error {claimed:.3g} nats is claimed, and {spread:.3g} is found; "
            f"{share:.1%} of {repetitions} intervals contain the mean"
        )
        right = gap <= tolerance and share >= least - below
        ok = right or max(claimed, spread) < 1e-9
        yield self.finding("error bar", ok, claimed / spread, tolerance, words, COARSE_SUM)


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of ``values (n,)``, and its tolerance."""
    mean, stderr, *_ = intervals.mean_interval(values)
    return mean, limit(stderr, len(values))


def limit(stderr: float, n: int) -> float:
    """The one-sided quantile of Student's t for ``ALPHA`` times ``stderr``, of ``n`` values."""
    return -float(special.stdtrit(n - 1, ALPHA)) * stderr


def _covered(values: np.ndarray, truth: float) -> float:
    """The share of the t intervals of the rows of ``values`` that contain ``truth``.

    Differences of the size of rounding errors are ignored, because numbers may have no spread.
    """
    each, slack = map(intervals.mean_interval, values), 1e-5 * (1 + abs(truth))
    return float(np.mean([abs(i.mean - truth) <= i.ci95 + slack for i in each]))


def jackknife(values: np.ndarray) -> tuple[float, float]:
    """sum_k exp(-E nats_k) and its standard error, from ``values (calls, m)``.

    The exponential of a noisy mean is too large on average. The jackknife over the calls removes
    this bias to first order, and its standard error includes noise that the images of a call share.
    """
    r = len(values)
    mean = values.mean(0)
    whole = np.exp(-mean).sum()
    without = np.exp(-(r * mean - values) / (r - 1)).sum(1)
    variance = (r - 1) * np.var(without)
    return float(r * whole - (r - 1) * without.mean()), math.sqrt(variance)
