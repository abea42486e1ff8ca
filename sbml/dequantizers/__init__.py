"""How integers become continuous, by name: one file each, found from this folder.

A new dequantizer is a new file here that exports a frozen dataclass ``Model``, hashable, with

    init(key, pixels (n, *s)) -> params           {} where there is nothing to learn
    at_noise: bool                                what x is a sample of, see below

and one of the next two methods, or both:

    sample(params, pixels (*s), key) -> u, log_q  u (*s) in [0, 1), log q(u | pixels) in nats
    bound(params, score, sde, pixels (*s), key, levels, *, eps, u, reduction) -> bound.Bound
                                                  its own bound on -log P(pixels)

With ``sample``, x = 2 (pixels + u) / L - 1 is data, which the density model sees as it is
(``at_noise`` False), or alpha(eps) x is already a sample of the diffusion at its smallest time eps
(True). For any density p of x, -log P(pixels) <= E_q [-log p(x) + log q(u | pixels)] + d log(L/2).
The ODE estimator needs it.

With ``bound``, the evidence bound is that of the integers themselves: it returns the three terms of
``sbml.bound.Bound`` in nats, and ``calls`` says how many evaluations of the score it needs beside
the one for each time in ``u``. A dequantizer at noise has an evidence bound by this method only.

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


def has_density(model: Any) -> bool:
    """Whether ``model``, or a model of that type, makes integers numbers with a density."""
    return hasattr(model, "sample")


def has_bound(model: Any) -> bool:
    """Whether ``model``, or a model of that type, has a bound of its own for the integers."""
    return hasattr(model, "bound")


def is_trained(model: Any) -> bool:
    """Whether ``model``, or a model of that type, has parameters to train (``sample_batch``)."""
    return hasattr(model, "sample_batch")
