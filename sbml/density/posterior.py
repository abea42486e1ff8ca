"""Results of ``Density``: the posterior of a condition, and importance weights.

*Bayes' rule.* For conditions c with probabilities pi_c,

    p(c | x) = pi_c p(x | c) / sum_c' pi_c' p(x | c').

Every log p(x | c) has the error of the prior in place of p_T (``sbml.likelihood``). Its standard
deviation s_c = sqrt(2 KL_c) belongs to the examples of c, that is, to all examples with weights
p(c | x). The errors of two conditions may have opposite signs, as for means m and -m, so
p(c | x) changes by about 2 max_c(s_c) p(c | x) (1 - p(c | x)).

*Importance weights.* For x_i from p, and a target density exp(u(x)) / Z,

    log w_i = u(x_i) - log p(x_i),      log Z = log mean w,      ESS = (sum w)^2 / sum w^2.

By the delta method the standard error of log Z is sd(w) / (mean(w) sqrt(n)). The weights of a
target with heavier tails than p are dominated by few samples, and neither number can be trusted if
Pareto's k of the largest weights is above 0.7 (Vehtari et al., JMLR 2024).

*What the samples miss.* Samples without large weights give both a small log Z and a small k. So
the target itself is asked. For draws y of exp(u) / Z and the largest weight c of the samples,

    E[max(0, 1 - c / w(y))] = E_p[max(0, w - c)] / Z

is the share of Z that lies in weights above c, of which the samples have none. The draws y are the
ends of random walks (Metropolis) from samples. Where no walk leads, such as to a mode far from all
samples, neither the weights nor the walks show anything.

*Forecast.* ESS / n falls with n if the weights have heavy tails, so few samples do not show that of
many. :meth:`Importance.forecast` draws n weights, the largest of them from a generalised Pareto
distribution that is fitted to those of the samples.

*Several observations.* If theta has the prior pi and the observations x_i are independent,

    p(theta | x_1, ..., x_n) = exp(u(theta)) / Z,
    u(theta) = sum_i log p(theta | x_i) - (n - 1) log pi(theta),
    Z = p(x_1, ..., x_n) / (p(x_1) ... p(x_n)),

see ``Density.joint``. Z is the factor by which the evidence of all observations together is larger
than the product of those of each.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import scipy
from jaxtyping import Float
from numpy.typing import ArrayLike

from sbml.core.door import checked
from sbml.core.scalars import between, notation
from sbml.statistics import intervals
from sbml.statistics.intervals import Interval

Table = Float[np.ndarray, "n C"]
Part = Float[np.ndarray, "m C"]  # of a subset of the examples

REPEATS = 200  # bootstrap samples of a forecast
LEAST = 5 * intervals.LEAST_TAIL  # samples, for a forecast


@dataclasses.dataclass(frozen=True, repr=False)
class Posterior:
    """log p(x | c) for every condition c, and the posterior p(c | x).

    Attributes:
      log_prob: log p(x | c) in nats, ``(n, C)``.
      log_probabilities: log p(c | x), ``(n, C)``; NaN for an example with a log p that is not
        finite, because the solver gave up.
      log_prob_error: the solver's error of log p, as the difference from a stricter solve: the
        largest absolute value over the conditions, averaged over a subset of the examples, with its
        95% interval.
      log_prob_noise: the same for the difference between two random draws.
      solver_error, noise: the same two numbers for p(c | x).
      log_prob_prior, prior: about the error of log p(x | c) of one example, and the mean error of
        p(c | x), that come from the prior in place of p_T, for the condition where it is largest.
      changed: the share of the examples of the subset whose most probable condition is another one
        by the stricter solve, or with the other draws.
      subset, strict: the places of the examples of the subset, ``(m,)``, and their log p by the
        stricter solve, ``(m, C)``.
    """

    log_prob: Table
    log_probabilities: Table
    log_prob_error: Interval
    log_prob_noise: Interval
    solver_error: Interval
    noise: Interval
    log_prob_prior: float
    prior: float
    changed: float
    subset: np.ndarray
    strict: Part

    @classmethod
    def of(
        cls,
        logp: Table,
        log_det: np.ndarray,
        log_prior: np.ndarray,
        subset: np.ndarray,
        strict: Part,
        again: Part,
        prior_error: Callable[[np.ndarray], float],
    ) -> "Posterior":
        """The posterior from log p ``(n, C)`` and the conditions' log probabilities ``(C,)``.

        ``strict`` and ``again`` are log p of the subset by a stricter solver and with other draws.
        All three leave out ``log_det (n,)``, the log-determinant of a change of variables.
        ``prior_error`` gives sqrt(2 KL) in nats of the examples with weights ``(n,)``.
        """
        lost = ~np.isfinite(logp).all(axis=1)
        tables = [scipy.special.log_softmax(t + log_prior, axis=1) for t in (logp, strict, again)]
        tables[0][lost] = np.nan
        first, *others = tables[0][subset], *tables[1:]
        mean = intervals.mean_interval
        of_logp = tuple(mean(np.abs(t - logp[subset]).max(axis=1)) for t in (strict, again))
        differences = tuple(np.abs(np.exp(t) - np.exp(first)).max(axis=1) for t in others)
        best = np.stack([t.argmax(axis=1) for t in others]) != first.argmax(axis=1)
        changed = float(np.mean(best.any(axis=0)))
        weights = np.where(lost[:, None], -np.inf, tables[0])
        each = [prior_error(np.exp(w - w.max())) for w in weights.T] if not lost.all() else []
        prior, spread = max(each, default=math.nan), np.exp(weights) * -np.expm1(weights)
        return cls(
            logp + log_det[:, None],
            tables[0],
            log_prob_error=of_logp[0],
            log_prob_noise=of_logp[1],
            solver_error=mean(differences[0]),
            noise=mean(differences[1]),
            log_prob_prior=prior,
            prior=2 * prior * float(np.mean(spread[~lost].max(axis=1))) if each else math.nan,
            changed=changed,
            subset=subset,
            strict=strict + log_det[subset, None],
        )

    @property
    def probabilities(self) -> Table:
        """p(c | x), ``(n, C)``."""
        return np.exp(self.log_probabilities)

    @property
    def lost(self) -> np.ndarray:
        """The places of the examples whose posterior is not known."""
        return np.flatnonzero(np.isnan(self.log_probabilities).any(axis=1))

    @property
    def predicted(self) -> np.ndarray:
        """The place of the most probable condition of each example, ``(n,)``; -1 if it is lost."""
        best = self.log_probabilities.argmax(axis=1)
        best[self.lost] = -1
        return best

    def accuracy(self, labels: ArrayLike) -> Interval:
        """The share of the examples whose most probable condition is ``labels (n,)``, with its 95%
        interval for the population. A lost example counts as wrong."""
        return intervals.mean_interval((np.asarray(labels) == self.predicted).astype(float))

    def log_score(self, labels: ArrayLike) -> Interval:
        """The mean of -log p(c | x) in nats for the true ``labels (n,)``, with its interval."""
        rows = np.arange(len(self.log_probabilities))
        return intervals.mean_interval(-self.log_probabilities[rows, np.asarray(labels)])

    def calibration(self, labels: ArrayLike, bins: int = 10) -> np.ndarray:
        """A reliability table ``(bins, 3)``, one row for each of the equal ``bins`` of [0, 1].

        For the examples whose largest probability lies in the bin, a row has the mean of this
        probability, the accuracy, and their number. The first two are NaN in an empty bin. Lost
        examples are in no bin.
        """
        confidence = self.probabilities.max(axis=1)
        right = np.asarray(labels) == self.predicted
        which = np.ceil(confidence * bins).clip(1) - 1
        rows = []
        for i in range(bins):
            chosen = which == i
            of = confidence[chosen], right[chosen]
            means = [float(np.mean(v)) if chosen.any() else np.nan for v in of]
            rows.append((*means, chosen.sum()))
        return np.array(rows)

    def calibration_error(self, labels: ArrayLike, bins: int = 10) -> float:
        """The mean over the examples of |confidence - accuracy| of their bin."""
        table = self.calibration(labels, bins)
        share = table[:, 2] / table[:, 2].sum()
        return float(np.nansum(share * np.abs(table[:, 0] - table[:, 1])))

    def __repr__(self) -> str:
        n, count = self.log_prob.shape
        text = (
            f"posterior of {count} conditions for {n} examples; on {self.noise.n} of them, the "
            f"error of log p is {notation(self.log_prob_error.mean, '.2g')} nats by the solver and "
            f"{notation(self.log_prob_noise.mean, '.2g')} by the draws, that of a probability "
            f"{notation(self.solver_error.mean, '.2g')} and {notation(self.noise.mean, '.2g')}, "
            f"and {self.changed:.1%} of the decisions change; the prior in place of p_T changes "
            f"log p by about {notation(self.log_prob_prior, '.2g')} nats, and a probability by "
            f"about {notation(self.prior, '.2g')}"
        )
        if len(self.lost):
            text += f"; the solver gave up for {len(self.lost)} examples"
        return text


@dataclasses.dataclass(frozen=True, repr=False)
class Importance:
    """Samples of a density with weights for another one.

    Attributes:
      x: the samples, ``(n, *s)``.
      log_weights: log w, ``(n,)``, in nats.
      log_z: log Z with its 95% interval, which contains the noise of the samples only.
      solver_error: the error of log w by the solver, from a stricter solve for some samples: its
        mean, by which log Z is wrong to first order, with its 95% interval.
      effective: the effective sample size, from 1 to n.
      tail: Pareto's k of the largest weights (``intervals.pareto_k``).
      missing: the share of Z in weights above the largest one of the samples, from 0 to 1.
      evaluations: the number of evaluations of the score for a sample of a sampler with fixed
        steps; None for the ODE.
      target_ess: the effective sample size that was asked for; 0 for none.
    """

    x: np.ndarray
    log_weights: np.ndarray
    log_z: Interval
    solver_error: Interval
    effective: float
    tail: float
    missing: float
    evaluations: int | None = None
    target_ess: int = 0

    @classmethod
    def of(
        cls,
        x: np.ndarray,
        log_weights: np.ndarray,
        error: np.ndarray,
        of_target: np.ndarray,
        evaluations: int | None = None,
        target_ess: int = 0,
    ) -> "Importance":
        """The result for samples ``x (n, *s)``, their ``log_weights (n,)``, and the ``error`` of
        log p of some of them; ``of_target (m,)`` are log weights of draws of the target.

        log Z is NaN if a weight is NaN or infinite. A draw of the target whose weight is NaN is
        missing, because the solver gave up there, or no latent of a sampler leads there.
        """
        n, largest = len(log_weights), np.max(log_weights)
        lost = int(np.sum(np.isnan(log_weights) | (log_weights == np.inf)))
        with np.errstate(invalid="ignore"):
            weights = np.exp(log_weights - largest)
            excess = of_target - largest
            excess = np.where(np.isnan(excess), np.inf, excess)
        mean = float(np.mean(weights))
        stderr = float(np.std(weights, ddof=1)) / (mean * math.sqrt(n)) if n > 1 else math.inf
        log_z = float(largest) + (math.log(mean) if mean > 0 else math.nan)
        half = intervals.half_width(stderr, n - 1)
        effective = effective_size(log_weights)
        of_z = Interval(log_z, stderr, half, n, lost)
        solver_error = intervals.mean_interval(-error)
        tail, missing = intervals.pareto_k(weights), float(np.mean(-np.expm1(-excess.clip(0))))
        found = solver_error, effective, tail, missing, evaluations, target_ess
        return cls(x, log_weights, of_z, *found)

    @property
    def heavy_tailed(self) -> bool:
        """Whether so few samples have most of the weight that log Z cannot be trusted: k is above
        ``intervals.HEAVY``, ``missing`` is above a quarter of log Z's error bar and above 1e-4, the
        last digit that is printed, or log Z is NaN. A shift by a quarter leaves 92% coverage."""
        allowed = max(0.25 * self.log_z.ci95, 1e-4)  # NaN if the first is.
        return self.tail > intervals.HEAVY or not self.missing <= allowed

    @checked
    def forecast(self, n: Annotated[int, between(1, 10**7)]) -> tuple[float, float]:
        """The 95% interval of the effective sample size that ``n`` samples would have.

        It is that of ``REPEATS`` bootstrap samples of the weights. In each, the largest weights are
        draws of a generalised Pareto distribution, which is fitted to its own largest weights.

        Raises:
          ValueError: the weights are ``heavy_tailed``, so the largest ones are not known, or there
            are fewer than ``LEAST`` samples.
        """
        if self.heavy_tailed or len(self.x) < LEAST:
            known = str(self) if self.heavy_tailed else f"take at least {LEAST}"
            raise ValueError(f"{len(self.x)} samples allow no forecast of n={n}: {known}")
        weights = np.sort(np.exp(self.log_weights - self.log_weights.max()))
        size, draws = len(weights), np.random.default_rng(0)
        # Weights without a tail are bounded: all are drawn again.
        m = 0 if math.isnan(self.tail) else intervals.tail_size(size)
        body, tail = weights[: size - m], weights[size - m :]
        found = []
        for _ in range(REPEATS):
            part, count = draws.choice(body, size - m), int(draws.binomial(n, m / size))
            largest = np.zeros(count)
            if count:
                excess = np.sort(draws.choice(tail, m)) - body[-1]
                k, scale = intervals.generalised_pareto(excess)
                largest = body[-1] + scale * np.expm1(k * draws.exponential(size=count)) / k
            total = (n - count) * np.mean(part) + np.sum(largest)
            squares = (n - count) * np.mean(part**2) + np.sum(largest**2)
            found.append(total**2 / squares)
        low, high = np.quantile(found, [0.025, 0.975])
        return float(low), float(high)

    def __repr__(self) -> str:
        text = (
            f"log Z = {self.log_z.mean:z.4f} +- {self.log_z.ci95:.4f} nats (95%), effective sample "
            f"size {self.effective:.0f} of {len(self.log_weights)}, "
        )
        if self.evaluations is None:
            error, half = self.solver_error.mean, self.solver_error.ci95
            text += f"error by the solver {notation(error, '.1g')} +- {notation(half, '.1g')}"
        else:
            text += f"{self.evaluations} evaluations for a sample"
        if self.heavy_tailed:
            known = f"about {self.missing:.2g} of Z lies in weights above those of all samples"
            if self.tail > intervals.HEAVY:
                known = intervals.about_tail(self.tail, "weights")
            text += (
                f", HEAVY TAILS: {known}, so neither number can be trusted; take more samples, or "
                "a density closer to this target"
            )
        elif self.effective < self.target_ess and len(self.x) >= LEAST:
            n = min(math.ceil(len(self.x) * self.target_ess / self.effective), 10**7)
            low, high = self.forecast(n)
            text += (
                f", below target_ess={self.target_ess}: with {n} samples it would be between "
                f"{low:.0f} and {high:.0f} (95%)"
            )
        return text


def effective_size(log_weights: np.ndarray) -> float:
    """The effective sample size (sum w)^2 / sum w^2 of ``log_weights (n,)``."""
    with np.errstate(invalid="ignore"):
        weights = np.exp(log_weights - np.max(log_weights))
    return float(np.sum(weights) ** 2 / np.sum(weights**2))
