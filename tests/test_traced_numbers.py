"""Numbers that a user may want to differentiate or vary can be tracers, as their types say."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import EPS, FEATURES, KEY, PIXELS, VP, X, score

from sbml import sdes
from sbml.dequantizers import truncated_normal
from sbml.likelihood import bound, discrete
from sbml.samplers import DDIM
from sbml.sdes import times

SCALE, BATCH = jnp.asarray([1.0, 2.0, 0.5]), jnp.asarray(X)[None]

CASES: dict[str, tuple[Callable[[Any], Any], tuple[float, ...]]] = {
    "smallest_time eps": (lambda eps: discrete.smallest_time(VP, 17, eps), (EPS, 0.01)),
    "smallest_time tau": (lambda tau: discrete.smallest_time(VP, 17, EPS, tau), (3.0, math.inf)),
    "smallest_time sde": (lambda b: discrete.smallest_time(sdes.VP(b, 20.0), 17, EPS), (0.1, 0.2)),
    "bin_log_snr tau": (lambda tau: discrete.bin_log_snr(17, tau), (2.0, 3.0)),
    "tau eps": (lambda eps: discrete.tau(VP, 17, eps), (EPS, 0.01)),
    "edge_constant tau": (lambda tau: discrete.edge_constant(VP, EPS, tau), (2.0, 3.0)),
    "truncated_normal tau": (lambda tau: discrete.truncated_normal(X, tau), (2.0, 3.0)),
    "dequantizer tau": (
        lambda tau: truncated_normal.Model(tau).sample({}, PIXELS, KEY),
        (2.0, 3.0),
    ),
    "with_floor floor": (lambda floor: times.with_floor(SCALE, floor), (0.1, 1.0)),
    "pilot floor": (
        lambda floor: bound.pilot(
            score, VP, jnp.asarray(X)[None], KEY, eps=EPS, bins=2, floor=floor
        ),
        (0.1, 1.0),
    ),
    "control noise_variance": (
        lambda v: bound.GaussianControl.fit(FEATURES, noise_variance=v).variances,
        (0.0, 0.1),
    ),
    "ddim eta": (lambda eta: DDIM(2, eta=eta)(score, VP, X, KEY, eps=EPS)[0], (0.0, 0.7)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_traced_number_gives_the_result_of_a_float(case: str) -> None:
    function, values = CASES[case]
    compiled = jax.jit(function)
    for value in values:
        found, expected = (jax.tree.leaves(f(value)) for f in (compiled, function))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sdes.SDES)
def test_an_infinite_tau_leaves_the_smallest_time_as_it_is(name: str) -> None:
    sde = sdes.SDES[name]()
    assert discrete.smallest_time(sde, 17, sde.smallest_time, math.inf) == sde.smallest_time
