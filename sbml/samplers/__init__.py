"""Samplers, by name: from a latent to a sample, for any score and any linear SDE.

    x, stats = sampler(score, sde, z, key, eps=eps)        z (*s) ~ prior, x (*s); vmap over both

``ode`` solves the probability-flow ODE, by default with step control. The others take a fixed
number of steps from t = T down to eps, on a grid of times; each step is one formula, ``step``. All
are frozen dataclasses and hashable, so they can be static under ``jit``.

``decode`` and ``ode_sample`` solve the same ODE as functions. ``predictions`` computes E[x_0 | x_t]
and E[z | x_t] from a score, and ``denoise`` the first of them only.

``SAMPLERS`` has the names in configs. The file ``_grid`` has what all samplers with fixed steps
share, ``one_step`` and ``multistep`` have the formulas, ``flow_map`` has those of a network that
jumps from one time to another, and ``corrector`` has the correctors that can follow each step.

May import: core, likelihood, sdes.
"""

from sbml.core.registry import Registry, subclass
from sbml.samplers._grid import SPACINGS as SPACINGS
from sbml.samplers._grid import FixedSteps as FixedSteps
from sbml.samplers._grid import denoise as denoise
from sbml.samplers._grid import predictions as predictions
from sbml.samplers.corrector import CORRECTORS as CORRECTORS
from sbml.samplers.corrector import AnnealedLangevin as AnnealedLangevin
from sbml.samplers.corrector import Langevin as Langevin
from sbml.samplers.density import Chain as Chain
from sbml.samplers.density import Path as Path
from sbml.samplers.density import PathLogProb as PathLogProb
from sbml.samplers.density import Sampler as Sampler
from sbml.samplers.density import Transition as Transition
from sbml.samplers.flow_map import Map as Map
from sbml.samplers.multistep import DPMSolver as DPMSolver
from sbml.samplers.one_step import DDIM as DDIM
from sbml.samplers.one_step import Ancestral as Ancestral
from sbml.samplers.one_step import EulerMaruyama as EulerMaruyama
from sbml.samplers.one_step import FlowPolicy as FlowPolicy
from sbml.samplers.one_step import Midpoint as Midpoint
from sbml.samplers.one_step import ReverseDiffusion as ReverseDiffusion
from sbml.samplers.probability_flow import ODE as ODE
from sbml.samplers.probability_flow import decode as decode
from sbml.samplers.probability_flow import ode_sample as ode_sample

SAMPLERS = Registry(
    "sampler",
    {
        "dpm_solver": "sbml.samplers.multistep:DPMSolver",
        "euler_maruyama": "sbml.samplers.one_step:EulerMaruyama",
        "reverse_diffusion": "sbml.samplers.one_step:ReverseDiffusion",
        "ancestral": "sbml.samplers.one_step:Ancestral",
        "ddim": "sbml.samplers.one_step:DDIM",
        "midpoint": "sbml.samplers.one_step:Midpoint",
        "ode": "sbml.samplers.probability_flow:ODE",
    },
    subclass(Sampler),
)
