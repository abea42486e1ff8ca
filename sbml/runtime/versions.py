"""What made a number: package versions and the machine."""

import importlib.metadata
import platform

import jax

PACKAGES = ("sbml", "jax", "flax", "optax", "diffrax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Versions of the packages that take part in a number, of Python, and the device kind."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {**found, "python": platform.python_version(), "devices": devices}
