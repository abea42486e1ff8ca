"""The density of a model: log p, samples, and measurements with error bars.

May import: core, dequantizers, likelihood, samplers, score, sdes, statistics.
"""

from sbml.density.density import PILOT as PILOT
from sbml.density.density import Density as Density
from sbml.density.density import Sweeps as Sweeps
from sbml.density.density import WithLatent as WithLatent
from sbml.density.estimate import Estimate as Estimate
