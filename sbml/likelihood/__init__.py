"""-log p(x) by the probability-flow ODE, and evidence bounds on it, of one example.

    flow         log p by the ODE: its terms         ode, quadrature   its solver, its integral
    bound        the evidence bound on -log p(x)     discrete          and on -log P(k) of integers

May import: core, losses, score, sdes, statistics.
"""

from sbml.likelihood.flow import TERMS as TERMS
from sbml.likelihood.flow import Likelihood as Likelihood
from sbml.likelihood.flow import PriorError as PriorError
from sbml.likelihood.flow import ode_logp as ode_logp
from sbml.likelihood.flow import prior_error as prior_error
from sbml.likelihood.flow import sample_logp as sample_logp
