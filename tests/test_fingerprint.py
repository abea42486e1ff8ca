"""A fingerprint changes with everything that changes a number, and with nothing else."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sbml import fingerprint
from sbml.bound import GaussianControl, Reduction
from sbml.dequantizers import truncated_normal, uniform
from sbml.divergence import Trace
from sbml.estimators import bound, ode
from sbml.estimators.base import Target
from sbml.networks import mlp
from sbml.ode import Solver
from sbml.score import Adapter
from sbml.sdes import VE, VP

CONTROL = GaussianControl(np.zeros(2), np.ones(2), None)
SOLVED = ode.Estimator(Trace("exact"), 1, Solver())
SWEPT = bound.Estimator(2, "lattice", Reduction(CONTROL, np.ones(4)))
TARGET = Target(VP(), 1e-5, 17, uniform.Model())
OWN = Adapter(mlp.Model(width=8), VP())
# Another value of every field, for objects of which numbers are made.
CHANGED = {
    SOLVED: {"trace": Trace(), "num_importance": 2, "solver": Solver(rtol=1e-5)},
    TARGET: {
        "sde": VP(beta_max=10.0),
        "eps": 1e-4,
        "levels": 16,
        "dequantizer": truncated_normal.Model(),
    },
    OWN: {
        "model": mlp.Model(width=16),
        "sde": VE(),
        "parameterization": "x0",
        "label": "log_snr",
        "data_std": 0.4,
        "eps": 1e-4,
        "labels": VP(),
        "log_snr_range": (-4.0, 13.3),
        "time_scale": 1.0,
        "levels": 3,
        "data": "centre",
    },
}


@pytest.mark.parametrize("value", CHANGED, ids=lambda value: type(value).__name__)
def test_each_field_changes_the_fingerprint(value):
    fields = {field.name for field in dataclasses.fields(value)}
    assert fields == set(CHANGED[value])
    for name, other in CHANGED[value].items():
        changed = dataclasses.replace(value, **{name: other})
        assert fingerprint.of(changed) != fingerprint.of(value), name


def test_arrays_count_by_their_bits():
    one = fingerprint.of(SWEPT)
    same = dataclasses.replace(SWEPT, reduction=Reduction(CONTROL, jnp.ones(4)))
    assert fingerprint.of(same)["reduction"]["control"] == one["reduction"]["control"]
    moved = dataclasses.replace(CONTROL, mean=np.array([0.0, 1e-300]))
    assert one != fingerprint.of(dataclasses.replace(SWEPT, reduction=Reduction(moved, np.ones(4))))


def test_what_changes_the_training_only_changes_no_fingerprint():
    other = dataclasses.replace(OWN, model=mlp.Model(width=8, dropout=0.3))
    assert fingerprint.of(other) == fingerprint.of(OWN)


def test_a_function_without_a_name_counts_by_its_code_and_by_what_it_reads():
    def made(scale):
        return lambda x: scale * x

    assert fingerprint.of(made(1.0)) == fingerprint.of(made(1.0)) != fingerprint.of(made(2.0))
    assert fingerprint.of(lambda x: x + 1) != fingerprint.of(lambda x: x + 2)
    assert fingerprint.of(lambda x: jnp.sin(x)) != fingerprint.of(lambda x: jnp.cos(x))
    assert fingerprint.of(lambda x, y=1: x + y) != fingerprint.of(lambda x, y=2: x + y)
    assert " at 0x" not in str(fingerprint.of(lambda x: map(lambda y: y + 1, x)))
    with pytest.raises(TypeError, match="has no fingerprint"):
        fingerprint.of(object())
