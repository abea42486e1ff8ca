"""Settings for fast computation on a CPU, made before the first computation.

By default jax computes in a thread of its own, which allocates a block for intermediate results.
glibc returns this block to the system as soon as it is free, and the system must clear all its
pages again for the next call: 149,000 pages in a training step of ``configs/photos_vp.py``. If the
calling thread computes and freed memory is kept, this step takes 1.05 s instead of 1.16 s, and a
step of ``configs/digits_vp.py`` 0.101 s instead of 0.117 s (2 cores). Neither setting alone speeds
up both configs.

Python's garbage collector searches for reference cycles after every few hundred new objects, and
from time to time among all objects. This takes a quarter of the time of tracing and lowering a
network's training step.
"""

import ctypes
import gc
import sys

import jax

from sbml.core.platform import on_cpu

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def settle() -> None:
    """Compute in the calling thread, keep freed memory, and collect garbage less often.

    The memory of the process then never shrinks. Call this after ``jax.distributed`` is
    initialised. The settings of memory and garbage collection are not changed if an accelerator
    computes or the C library is not glibc.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not on_cpu() or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        mallopt(M_MMAP_MAX, 0)  # Allocate every block from the heap,
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # and do not return the heap's free end.
