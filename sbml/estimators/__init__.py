"""Estimators of a model's bits/dim, by name: one file each, found from this folder.

    ode         -log p_eps(x) by the probability-flow ODE:  prior + divergence + correction
    bound       the evidence bound on -log p(x):            prior + diffusion + reconstruction
    bound_ssm   the same bound, its diffusion term by sliced or exact score matching

For integers k of L levels, x = 2 (k + u) / L - 1, and there are two more terms: ``dequantization``
(log q of u) and ``scale`` (log2(L / 2), the change of variables). The terms add up to the bits/dim
of the integers.

A new estimator is a new file here that exports a frozen dataclass ``Estimator``, derived from
``sbml.estimators.base.Estimator``, which says what to define. Files that open with an underscore
are parts.
"""

import dataclasses
from importlib import import_module
from pkgutil import iter_modules

from sbml import dequantizers
from sbml.bound import Reduction as Reduction
from sbml.estimators import base
from sbml.estimators.base import Rows as Rows
from sbml.estimators.base import Target as Target
from sbml.estimators.base import rows as rows

ESTIMATORS: dict[str, type[base.Estimator]] = {
    found.name: import_module(f"{__name__}.{found.name}").Estimator
    for found in iter_modules(__path__)
    if not found.name.startswith("_") and found.name != "base"
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the table: an estimator, a dequantizer and K draws of it, by their names."""

    estimator: str
    dequantizer: str
    num_importance: int = 1

    @property
    def name(self) -> str:
        """The name in columns and progress bars."""
        draws = f"_k{self.num_importance}" if self.num_importance > 1 else ""
        return f"{self.estimator}_{self.dequantizer}{draws}"

    @property
    def kind(self) -> type[base.Estimator]:
        """The estimator's class."""
        return ESTIMATORS[self.estimator]

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms of its bits/dim."""
        return self.kind.terms

    @property
    def is_bound(self) -> bool:
        """Whether it is an expectation over times, which sweeps estimate."""
        return self.kind.is_bound

    @property
    def undefined(self) -> str:
        """Why there is no such number; empty if there is."""
        return self.kind.undefined(dequantizers.get(self.dequantizer), self.num_importance)
