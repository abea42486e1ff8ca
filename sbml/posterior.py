"""Results of ``Density``: the posterior of a condition, and importance weights.

*Bayes' rule.* For conditions c with probabilities pi_c,

    p(c | x) = pi_c p(x | c) / sum_c' pi_c' p(x | c').

*Importance weights.* For x_i from p, and a target density exp(u(x)) / Z,

    log w_i = u(x_i) - log p(x_i),      log Z = log mean w,      ESS = (sum w)^2 / sum w^2.

By the delta method the standard error of log Z is sd(w) / (mean(w) sqrt(n)). The weights of a
target with heavier tails than p are dominated by few samples, and neither number can be trusted if
Pareto's k of the largest weights is above 0.7 (Vehtari et al., JMLR 2024).
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from sbml import intervals
from sbml.intervals import Interval

Table = Float[np.ndarray, "n C"]


@dataclasses.dataclass(frozen=True)
class Posterior:
    """log p(x | c) for every condition c, and the posterior p(c | x).

    Attributes:
      log_prob: log p(x | c) in nats, ``(n, C)``.
      probabilities: p(c | x), ``(n, C)``.
      solver_error: the error of ``probabilities`` by the solver: the mean over a subset of the
        examples of the largest difference from a stricter solve, with its 95% interval.
      noise: the same for the random draws, as the difference between two draws.
      changed: the share of the examples of the subset whose most probable condition is another one
        in either of the two.
    """

    log_prob: Table
    probabilities: Table
    solver_error: Interval
    noise: Interval
    changed: float

    @classmethod
    def of(
        cls,
        log_prob: Table,
        log_prior: np.ndarray,
        subset: np.ndarray,
        first: Table,
        strict: Table,
        again: Table,
    ) -> "Posterior":
        """The posterior from log p ``(n, C)``, the conditions' log probabilities ``(C,)``, and log
        p without the change of variables: of all examples, and of the subset by a stricter solver
        and with other draws."""
        found, by_strict, by_again = (
            special.softmax(t + log_prior, axis=1) for t in (first, strict, again)
        )
        some = found[subset]
        solver_error, noise = (
            intervals.mean_interval(np.abs(other - some).max(axis=1))
            for other in (by_strict, by_again)
        )
        others = np.stack([by_strict.argmax(axis=1), by_again.argmax(axis=1)])
        changed = float(np.mean(np.any(others != some.argmax(axis=1), axis=0)))
        return cls(log_prob, found, solver_error, noise, changed)

    @property
    def predicted(self) -> np.ndarray:
        """The place of the most probable condition of each example, ``(n,)``."""
        return self.probabilities.argmax(axis=1)

    def accuracy(self, labels: Any) -> Interval:
        """The share of the examples whose most probable condition is ``labels (n,)``, with its 95%
        interval for the population."""
        return intervals.mean_interval((np.asarray(labels) == self.predicted).astype(float))

    def log_score(self, labels: Any) -> Interval:
        """The mean of -log p(c | x) in nats for the true ``labels (n,)``, with its interval."""
        rows = np.arange(len(self.probabilities))
        logs = special.log_softmax(np.log(self.probabilities), axis=1)
        return intervals.mean_interval(-logs[rows, np.asarray(labels)])

    def calibration(self, labels: Any, bins: int = 10) -> np.ndarray:
        """A reliability table ``(bins, 3)``, one row for each of the equal ``bins`` of [0, 1].

        For the examples whose largest probability lies in the bin, a row has the mean of this
        probability, the accuracy, and their number. The first two are NaN in an empty bin.
        """
        confidence = self.probabilities.max(axis=1)
        right = np.asarray(labels) == self.predicted
        which = np.minimum((confidence * bins).astype(int), bins - 1)
        rows = []
        for i in range(bins):
            chosen = which == i
            means = (
                (confidence[chosen].mean(), right[chosen].mean()) if chosen.any() else (np.nan,) * 2
            )
            rows.append((*means, chosen.sum()))
        return np.array(rows)

    def calibration_error(self, labels: Any, bins: int = 10) -> float:
        """The mean over the examples of |confidence - accuracy| of their bin."""
        table = self.calibration(labels, bins)
        share = table[:, 2] / table[:, 2].sum()
        return float(np.nansum(share * np.abs(table[:, 0] - table[:, 1])))

    def __str__(self) -> str:
        n, count = self.probabilities.shape
        return (
            f"posterior of {count} conditions for {n} examples; on {self.solver_error.n} of them, "
            f"the largest error of a probability is on average {self.solver_error.mean:.2g} by the "
            f"solver and {self.noise.mean:.2g} by the draws, and {self.changed:.1%} of the "
            "decisions change"
        )


@dataclasses.dataclass(frozen=True)
class Importance:
    """Samples of a density with weights for another one.

    Attributes:
      x: the samples, ``(n, *s)``.
      log_weights: log w, ``(n,)``, in nats.
      log_z: log Z with its 95% interval.
      effective: the effective sample size, from 1 to n.
      tail: Pareto's k of the largest weights (``intervals.pareto_k``).
    """

    x: np.ndarray
    log_weights: np.ndarray
    log_z: Interval
    effective: float
    tail: float

    @classmethod
    def of(cls, x: np.ndarray, log_weights: np.ndarray) -> "Importance":
        """The result for samples ``x (n, *s)`` and their ``log_weights (n,)``.

        A weight that is not finite, other than 0, makes log Z NaN.
        """
        n, largest = len(log_weights), np.max(log_weights)
        with np.errstate(invalid="ignore"):
            weights = np.exp(log_weights - largest)
        mean = float(np.mean(weights))
        stderr = float(np.std(weights, ddof=1)) / (mean * math.sqrt(n)) if n > 1 else math.inf
        log_z = float(largest) + (math.log(mean) if mean > 0 else math.nan)
        lost = int(np.sum(np.isnan(weights)))
        half = intervals.half_width(stderr, n - 1)
        effective = float(np.sum(weights) ** 2 / np.sum(weights**2))
        tail = intervals.pareto_k(weights)
        return cls(x, log_weights, Interval(log_z, stderr, half, n, lost), effective, tail)

    @property
    def heavy_tailed(self) -> bool:
        """Whether so few samples have most of the weight that log Z cannot be trusted."""
        return self.tail > intervals.HEAVY

    def __str__(self) -> str:
        text = (
            f"log Z = {self.log_z.mean:.4f} +- {self.log_z.ci95:.4f} nats (95%), effective sample "
            f"size {self.effective:.0f} of {len(self.log_weights)}"
        )
        if self.heavy_tailed:
            text += (
                f", HEAVY TAILS: Pareto's k of the weights is {self.tail:.2f}, above "
                f"{intervals.HEAVY:g}, so neither number can be trusted; the density is too narrow "
                "for this target"
            )
        return text
