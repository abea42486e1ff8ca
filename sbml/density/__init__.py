"""The density of a model: log p, samples, and measurements with error bars.

May import: core, dequantizers, likelihood, samplers, score, sdes, statistics.
"""

from sbml.density.density import PILOT, Density, Sweeps, WithLatent
from sbml.density.estimate import Estimate as Estimate

__all__ = ["PILOT", "Density", "Sweeps", "WithLatent"]
