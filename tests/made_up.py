"""Estimates of rows that are made up, so that nothing is computed."""

import dataclasses

import numpy as np

from sbml.density.estimators import base
from sbml.density.estimators.base import Target
from sbml.density.measurement import Measurement
from sbml.likelihood.bound import Reduction
from sbml.likelihood.ode import Solver
from sbml.sdes import VP


@dataclasses.dataclass(frozen=True)
class OneTerm(base.Estimator):
    """An estimator of one term."""

    terms = ("prior",)
    is_bound = False

    solver: Solver = Solver()
    reduction: Reduction = Reduction()

    def one(self, *_):
        raise NotImplementedError

    def tail(self, target):
        return self.reduction.tail(target.sde, target.eps)


class MadeUp(Measurement):
    """The measurement of ``n`` examples with one term, ``prior``, of which ``m`` are the subset.

    ``found(ids, sweep, solver)`` gives the term.
    """

    def __init__(
        self,
        n,
        m,
        found=None,
        *,
        target=None,
        nfe=1,
        estimator=OneTerm(),
        **fields,
    ):
        super().__init__(
            estimator=estimator,
            target=target or Target(VP(), 1e-5),
            data=np.random.default_rng(0).normal(size=(n, 2)),
            ids=np.arange(n),
            subset=np.arange(m),
            compute=dict,
            **fields,
        )
        self.found, self.nfe = found, nfe

    def rows(self, ids, sweep=0, solver=None):
        found = np.asarray(self.found(ids, sweep, solver or self.solver), np.float64)
        return {"prior": found, "nfe": np.full(len(ids), self.nfe)}


def bound(draws, **fields):
    """The estimate of a bound from the values ``draws (sweeps, n)``."""
    tables = [{"prior": each, "nfe": np.ones(len(each))} for each in np.asarray(draws)]
    return MadeUp(len(draws[0]), 1, **fields).of_sweeps(tables)
