"""The platform that computes, and what depends on it: all such code asks one of these functions."""

import jax


def on_cpu() -> bool:
    """Whether JAX's default backend is the CPU."""
    return jax.default_backend() == "cpu"


def one_cpu() -> bool:
    """Whether one CPU device computes everything (used by ``networks._layers``)."""
    return on_cpu() and jax.device_count() == 1


def compiler_options(level: int = 2) -> dict[str, int]:
    """Options of ``jit``: LLVM's level of optimization on CPU, and none elsewhere.

    The default level is for a training step. Level 3 takes a third more time to compile the step
    and does not make it faster (benchmarks/training_step.py).
    """
    return {"xla_backend_optimization_level": level} if on_cpu() else {}
