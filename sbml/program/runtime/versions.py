"""Versions of the packages, XLA, Python and the devices that produced a result."""

import functools
import importlib.metadata
import platform

import jax

from sbml import __version__
from sbml.core import compiler

PACKAGES = tuple("jax jaxlib flax optax diffrax orbax-checkpoint grain numpy".split())


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, of Python, and the kind of device.

    ``xla`` names the compiler and, on CPU, says that its sums were checked.
    """
    packages = {"sbml": __version__}
    packages.update({name: importlib.metadata.version(name) for name in PACKAGES})
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    backend = jax.devices()[0].client.platform_version.split()
    xla = f"of jaxlib {packages['jaxlib']}, for {' '.join(backend) or jax.default_backend()}"
    if compiler.check():
        xla += ", its sums agree with NumPy's"
    return {**packages, "xla": xla, "python": platform.python_version(), "devices": devices}


def changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The entries of ``old`` with another value or none in ``new``, as "jax 0.11.2, now 0.12.0".

    The number of devices is left out, because no result depends on it.
    """
    kinds = [{**one, "devices": one.get("devices", "").split(" x ")[-1]} for one in (old, new)]
    names = [name for name in kinds[0] if kinds[0][name] != kinds[1].get(name)]
    if "jaxlib" in names and "xla" in names:
        names.remove("xla")  # The entry of jaxlib already shows this change.
    return [f"{name} {kinds[0][name]}, now {kinds[1].get(name, 'unknown')}" for name in names]
