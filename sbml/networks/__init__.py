"""Registry of the networks that can learn a score: one file in this folder for each name.

To add a network, add a file here that exports a Linen module ``Model``. Its dataclass fields are
plain values with defaults, and its call is

    Model(**fields)(x, label, *, train) -> Array (n, *s), float32

for ``x (n, *s)`` in [-1, 1] and ``label (n,)``, one number per example that gives its noise level.
Dropout draws from the rng collection "dropout", only if ``train``. Files whose names begin with an
underscore hold parts of networks and are not in the registry.
"""

from importlib import import_module
from pkgutil import iter_modules

from flax import linen as nn

from sbml.networks._fourier import frequencies as frequencies

NETWORKS: dict[str, type[nn.Module]] = {
    file.name: import_module(f"{__name__}.{file.name}").Model
    for file in iter_modules(__path__)
    if not file.name.startswith("_")
}


def get(name: str) -> type[nn.Module]:
    """The ``Model`` of the network called ``name``.

    Raises:
      ValueError: there is no network of this name; the message lists the names.
    """
    if name not in NETWORKS:
        raise ValueError(f"Unknown network {name!r}: choose one of {', '.join(sorted(NETWORKS))}.")
    return NETWORKS[name]
