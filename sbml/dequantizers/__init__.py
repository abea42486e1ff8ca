"""How integers become continuous, by name: one file each, found from this folder.

A new dequantizer is a new file here that exports a frozen dataclass ``Model``, hashable, with

    init(key, pixels (n, *s)) -> params           {} where there is nothing to learn
    sample(params, pixels (*s), key) -> u, log_q  u (*s) in [0, 1), log q(u | pixels) in nats
    at_noise: bool                                what pixels + u are a sample of

where x = 2 (pixels + u) / L - 1 is data, which the density model sees as it is (``at_noise``
False), or alpha(eps) x is already a sample of the diffusion at its smallest time eps (True).
For any density p of x, -log P(pixels) <= E_q [-log p(x) + log q(u | pixels)] + d log(L / 2).

One with something to learn also has ``sample_batch``, the same for a batch, and ``dropout``.

Files that open with an underscore are parts.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

DEQUANTIZERS: dict[str, type[Any]] = {
    found.name: import_module(f"{__name__}.{found.name}").Model
    for found in iter_modules(__path__)
    if not found.name.startswith("_")
}


def get(name: str) -> type[Any]:
    """The ``Model`` of the dequantizer called ``name``.

    Raises:
      ValueError: no such dequantizer; the message lists those there are.
    """
    if name not in DEQUANTIZERS:
        known = ", ".join(sorted(DEQUANTIZERS))
        raise ValueError(f"Unknown dequantizer {name!r}: choose one of {known}.")
    return DEQUANTIZERS[name]


def is_trained(model: Any) -> bool:
    """Whether ``model``, or a model of that type, has parameters to train (``sample_batch``)."""
    return hasattr(model, "sample_batch")
