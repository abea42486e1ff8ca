"""Samplers, by name: from a latent to a sample, for any score and any linear SDE.

    x, stats = sampler(score, sde, z, key, eps=eps)        z (*s) ~ prior, x (*s); vmap over both

``ode`` is the probability-flow ODE with step control. The others take a fixed number of steps from
t = T down to eps, on a grid of times; each step is one formula, ``step``. All are frozen
dataclasses and hashable, so they can be static under ``jit``.

A new sampler is a new file in this folder that exports ``SAMPLERS``, a dictionary from the names in
configs to its classes; the samplers of one family share a file. The file ``_grid`` has what all
samplers with fixed steps share, ``one_step`` and ``multistep`` have the formulas, and ``corrector``
has the correctors that can follow each step.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from sbml.samplers._grid import SPACINGS, FixedSteps, Sampler
from sbml.samplers.corrector import CORRECTORS, AnnealedLangevin, Langevin
from sbml.samplers.multistep import DPMSolver
from sbml.samplers.one_step import DDIM, Ancestral, EulerMaruyama, ReverseDiffusion
from sbml.samplers.probability_flow import ODE

__all__ = [
    "CORRECTORS",
    "DDIM",
    "ODE",
    "SAMPLERS",
    "SPACINGS",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolver",
    "EulerMaruyama",
    "FixedSteps",
    "Langevin",
    "ReverseDiffusion",
    "Sampler",
]

SAMPLERS: dict[str, type[Any]] = {
    name: kind
    for module in iter_modules(__path__)
    for name, kind in getattr(import_module(f"{__name__}.{module.name}"), "SAMPLERS", {}).items()
}
