"""Estimates of rows that are made up, so that nothing is computed."""

import numpy as np

from sbml.estimators import base
from sbml.estimators.base import Target
from sbml.estimators.driver import Driver
from sbml.sdes import VP


class OneTerm(base.Estimator):
    """An estimator of one term."""

    terms = ("prior",)
    is_bound = False

    def one(self, *_):
        raise NotImplementedError


class MadeUp(Driver):
    """A driver of ``n`` examples with one term, ``prior``, of which ``m`` are the subset.

    ``found(ids, sweep, solver)`` gives the term.
    """

    def __init__(self, n, m, found=None, *, target=None, nfe=1, **fields):
        super().__init__(
            estimator=OneTerm(),
            target=target or Target(VP(), 1e-5),
            data=np.random.default_rng(0).normal(size=(n, 2)),
            ids=np.arange(n),
            subset=np.arange(m),
            compute=dict,
            **fields,
        )
        self.found, self.nfe = found, nfe

    def rows(self, ids, sweep, solver=None):
        found = np.asarray(self.found(ids, sweep, solver or self.solver), np.float64)
        return {"prior": found, "nfe": np.full(len(ids), self.nfe)}


def bound(draws, **fields):
    """The estimate of a bound from the values ``draws (sweeps, n)``."""
    tables = [{"prior": each, "nfe": np.ones(len(each))} for each in np.asarray(draws)]
    return MadeUp(len(draws[0]), 1, **fields).of_sweeps(tables)
