"""How a program uses a CPU, to be settled before its first computation.

jax hands a computation to a thread of its own, and its block of intermediate results is that
thread's. glibc gives such a block back to the system as soon as it is free, and the system clears
every page of it anew for the next call: 149,000 pages a training step of ``configs/photos_vp.py``.
In the calling thread, and from memory that is kept, that step takes 1.05 s for 1.16, one of
``configs/digits_vp.py`` .101 for .117 (2 cores); neither alone does it for both.

Python's collector looks for cycles after every few hundred new objects, and through all there are
now and then: a quarter of the time that tracing and lowering a network's step takes.
"""

import ctypes
import gc
import sys

import jax

from sbml.platform import platform

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def settle() -> None:
    """Compute in the calling thread, keep freed memory, and look for cycles less often.

    The process never gets smaller. To be called once jax knows of all processes. Memory and the
    collector are left alone where an accelerator computes or the C library is not glibc.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if platform().name != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        mallopt(M_MMAP_MAX, 0)  # Every block from the heap,
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # whose free end stays, however long.
