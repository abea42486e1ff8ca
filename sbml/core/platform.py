"""The platform that a computation is compiled for.

All code that depends on the platform calls one of these functions.

By default the platform is JAX's default backend with all of its devices. Code that compiles ahead
of time for other devices declares them with :func:`compiling_for`, since JAX's default backend is
then not the platform that will run the program.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Platform(NamedTuple):
    """JAX's name of a platform ("cpu", "gpu", "tpu") and the number of devices of a program."""

    name: str
    devices: int


_declared: contextvars.ContextVar[Platform | None] = contextvars.ContextVar(
    "declared", default=None
)


def platform() -> Platform:
    """The declared platform, or JAX's default backend if none is declared."""
    return _declared.get() or Platform(jax.default_backend(), jax.device_count())


@contextlib.contextmanager
def compiling_for(name: str, devices: int) -> Iterator[None]:
    """Declare the platform of everything that is traced in this context.

    JAX's caches of traced functions do not depend on the declaration, so they are cleared on entry
    and on exit.
    """
    jax.clear_caches()
    token = _declared.set(Platform(name, devices))
    try:
        yield
    finally:
        _declared.reset(token)
        jax.clear_caches()


def one_cpu() -> bool:
    """Whether one CPU device computes everything (used by ``networks._layers``)."""
    return platform() == ("cpu", 1)


def compiler_options(level: int = 2) -> dict[str, int]:
    """Options of ``jit``: LLVM's level of optimization on CPU, and none elsewhere.

    The default level is for a training step. Level 3 takes a third more time to compile the step
    and does not make it faster (benchmarks/training_step.py).
    """
    return {"xla_backend_optimization_level": level} if platform().name == "cpu" else {}
