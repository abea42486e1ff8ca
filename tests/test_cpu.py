"""Settings for the CPU: in processes of their own, for they cannot be undone."""

import subprocess
import sys

import pytest

# Its matrix product is 128 MiB: more than glibc keeps for a thread other than the first.
PROGRAM = """
import resource
import jax
import jax.numpy as jnp

if {settled}:
    from sbml.runtime import cpu
    cpu.settle()
x = jnp.ones((1024, 16))
compute = jax.jit(lambda x: jnp.sum(jnp.maximum(jnp.tile(x, (8, 1)) @ jnp.tile(x.T, (1, 4)), 0)))
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    compute(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(settled: bool) -> int:
    """How many a third call takes."""
    command = [sys.executable, "-c", PROGRAM.format(settled=settled)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_intermediate_results_take_no_new_pages():
    assert new_pages(settled=True) < 100
    # The test's own check: pages are of 4 KiB or, at most, 2 MiB.
    assert new_pages(settled=False) >= 2**27 / 2**21
