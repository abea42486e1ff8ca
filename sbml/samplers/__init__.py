"""From a latent to a sample, by name: samplers of one interface, for any score and any linear SDE.

    x, stats = sampler(score, sde, z, key, eps=eps)        z (*s) ~ prior, x (*s); vmap over both

``ode`` is the probability-flow ODE with step control. The others take a fixed number of steps from
t = T down to eps, on a grid of times; each step is one formula, ``step``. All are frozen
dataclasses, hashable, so static under ``jit``.

A new sampler is a new file here that exports ``SAMPLERS``, the names by which configs know its
classes; all of one family share a file. The file ``_grid`` holds what all with fixed steps share,
``one_step`` and ``multistep`` the formulas, ``corrector`` what can follow each step.
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
    for found in iter_modules(__path__)
    for name, kind in getattr(import_module(f"{__name__}.{found.name}"), "SAMPLERS", {}).items()
}
