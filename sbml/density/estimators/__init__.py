"""Estimators of a model's bits/dim, by name.

    ode         -log p_eps(x) by the probability-flow ODE:  prior + divergence + correction
    bound       the evidence bound on -log p(x):            prior + diffusion + reconstruction
    bound_ssm   the same bound, its diffusion term by sliced or exact score matching

For integers k of L levels, x = 2 (k + u) / L - 1, and there are more terms: ``dequantization``,
log q of u, and ``scale``, the change of variables. ``scale`` is log2(L / 2) bits/dim, or for a
dequantizer with ``at_noise`` log2(L / (2 alpha(eps))). These two terms of a bound are 0 if the
dequantizer has its own bound. The ODE also has the term ``importance``, which is not 0 if several
draws of u are averaged (``sbml.estimators.ode``). The sum of the terms is the bits/dim of the
integers.

An estimator is a frozen dataclass derived from ``sbml.estimators.base.Estimator``, whose docstring
says what to define.
"""

import dataclasses

from sbml.core.registry import Registry, subclass
from sbml.density.estimators.base import Estimator
from sbml.dequantizers import DEQUANTIZERS

ESTIMATORS = Registry(
    "estimator",
    {
        "bound": "sbml.density.estimators.bound:Estimator",
        "bound_ssm": "sbml.density.estimators.bound:ScoreMatching",
        "ode": "sbml.density.estimators.ode:Estimator",
    },
    subclass(Estimator),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the results table: the names of an estimator and of a dequantizer, and the
    number K of draws of the dequantizer in one logarithm."""

    estimator: str
    dequantizer: str
    num_importance: int = 1

    @property
    def name(self) -> str:
        """The cell's name, used in columns."""
        draws = f"_k{self.num_importance}" if self.num_importance > 1 else ""
        parts = (name.rpartition(":")[2] for name in (self.estimator, self.dequantizer))
        return f"{'_'.join(parts)}{draws}"

    @property
    def title(self) -> str:
        """The cell's name in progress bars and messages."""
        draws = f" K={self.num_importance}" if self.num_importance > 1 else ""
        return f"{self.estimator} {self.dequantizer}{draws}"

    @property
    def kind(self) -> type[Estimator]:
        """The estimator's class."""
        kind: type[Estimator] = ESTIMATORS[self.estimator]
        return kind

    @property
    def reason_undefined(self) -> str:
        """The reason why this number does not exist, or an empty string if it exists."""
        return self.kind.reason_undefined(DEQUANTIZERS[self.dequantizer], self.num_importance)
