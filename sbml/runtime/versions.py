"""What made a number: versions of the packages and of XLA, and the machine."""

import importlib.metadata
import platform

import jax

from sbml import __version__, compiler

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "diffrax"),
    *("orbax-checkpoint", "grain", "numpy"),
)


def versions() -> dict[str, str]:
    """Versions of the packages that take part in a number, of Python, and the device kind.

    ``xla`` says what compiled the number and, on CPU, that its sums were checked.
    """
    found = {"sbml": __version__}
    found.update({name: importlib.metadata.version(name) for name in PACKAGES})
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    backend = jax.devices()[0].client.platform_version.split()
    xla = f"of jaxlib {found['jaxlib']}, for {' '.join(backend) or jax.default_backend()}"
    if compiler.check():
        xla += ", its sums agree with NumPy's"
    return {**found, "xla": xla, "python": platform.python_version(), "devices": devices}
