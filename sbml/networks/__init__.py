"""The networks that can learn a score, by name: one file each, found from this folder.

A new network is a new file here that exports a Linen module ``Model``: its dataclass fields are
plain values with defaults, and its call is

    Model(**fields)(x, label, *, train) -> Array (n, *s), float32

for ``x (n, *s)`` in [-1, 1] and one number ``label (n,)`` that tells the noise level. Dropout draws
from the rng collection "dropout", only if ``train``. Files that open with an underscore are parts.
"""

from importlib import import_module
from pkgutil import iter_modules

from flax import linen as nn

from sbml.networks._fourier import frequencies as frequencies

NETWORKS: dict[str, type[nn.Module]] = {
    found.name: import_module(f"{__name__}.{found.name}").Model
    for found in iter_modules(__path__)
    if not found.name.startswith("_")
}


def get(name: str) -> type[nn.Module]:
    """The ``Model`` of the network called ``name``.

    Raises:
      ValueError: no such network; the message lists those there are.
    """
    if name not in NETWORKS:
        raise ValueError(f"Unknown network {name!r}: choose one of {', '.join(sorted(NETWORKS))}.")
    return NETWORKS[name]
