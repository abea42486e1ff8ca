"""One SDE of each family, for code that sees an SDE only through its coefficients.

The coefficients of all SDEs have tests of their own (``test_sdes``, ``test_schedules``,
``test_times``). The estimators are compared with the truth for every SDE by ``--mode=verify``, and
one sampler for every SDE by ``test_samplers``.
"""

import jax
import pytest

from sbml.core.types import Array
from sbml.sdes import SDE, SDES

# In VE the signal is constant and the noise grows; in VP the signal decays; in the rectified flow
# it is 0 at T.
FAMILIES = ("ve", "vp", "rectified_flow")
# The same as parameters of tests, for functions that take long to compile: VE is slow.
FAMILIES_VE_SLOW = ("vp", "rectified_flow", pytest.param("ve", marks=pytest.mark.slow))
# All SDEs as parameters of tests: those that are not in FAMILIES are slow.
EVERY_SDE = tuple(
    name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in SDES
)


@jax.jit
def coefficients(sde: SDE, t: Array) -> tuple[Array, Array, Array]:
    """alpha, sigma and the log-SNR."""
    return sde.mean_coef(t), sde.std(t), sde.log_snr(t)
