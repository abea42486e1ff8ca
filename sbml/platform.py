"""The platform that a computation is compiled for: every choice that depends on it asks here.

By default it is JAX's default backend with all of its devices. A compilation ahead of time for
other devices declares them with :func:`compiling_for`, since JAX's default backend is then not the
platform that will run the program.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Platform(NamedTuple):
    """``name`` as JAX has it ("cpu", "gpu", "tpu"), and the number of ``devices`` of a program."""

    name: str
    devices: int


_declared: contextvars.ContextVar[Platform | None] = contextvars.ContextVar(
    "declared", default=None
)


def platform() -> Platform:
    """What is compiled for now: the declared platform, or else JAX's default backend."""
    return _declared.get() or Platform(jax.default_backend(), jax.device_count())


@contextlib.contextmanager
def compiling_for(name: str, devices: int) -> Iterator[None]:
    """Declare the platform of everything that is traced in this context.

    JAX's caches of traced functions do not know of the declaration, so they are cleared on entry
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
    """Whether one CPU device computes everything (``networks._cpu`` asks it)."""
    return platform() == ("cpu", 1)


def compiler_options(level: int = 2) -> dict[str, int]:
    """Options of ``jit``: on CPU, LLVM's level of optimization, by default that of a training step.

    Level 3 takes a third more time to compile a step and makes it no faster
    (benchmarks/training_step.py).
    """
    return {"xla_backend_optimization_level": level} if platform().name == "cpu" else {}
