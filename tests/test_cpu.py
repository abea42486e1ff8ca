"""Settings for the CPU: in processes of their own, because they cannot be undone."""

import subprocess
import sys

import pytest

# Both calls need 128 MiB, which is more than glibc keeps without the settings.
PRODUCT = "compute(x).block_until_ready()"
ARRAY = "np.ones(2**24)"
PROGRAM = """
import resource
import jax
import jax.numpy as jnp
import numpy as np

if {settled}:
    from sbml.program.runtime import cpu
    cpu.settle()
x = jnp.ones((1024, 16))
compute = jax.jit(lambda x: jnp.sum(jnp.maximum(jnp.tile(x, (8, 1)) @ jnp.tile(x.T, (1, 4)), 0)))
{call}
counts = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    {call}
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))
"""


def new_pages(call: str, *, settled: bool) -> int:
    """The number of new pages of a call after the first one. It is the least of six calls, since
    the other threads of the process take some pages at any time."""
    command = [sys.executable, "-c", PROGRAM.format(call=call, settled=settled)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_intermediate_results_take_no_new_pages():
    assert new_pages(PRODUCT, settled=True) < 32
    assert new_pages(ARRAY, settled=True) < 32
    # Without the settings, the test must find new pages. They are of 4 KiB or, at most, 2 MiB.
    # The newest versions of JAX keep the memory of a product by themselves, but NumPy does not.
    assert new_pages(ARRAY, settled=False) >= 2**27 / 2**21
