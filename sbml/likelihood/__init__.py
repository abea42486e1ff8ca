"""-log p(x) by the probability-flow ODE, and evidence bounds on it, of one example.

    flow         log p by the ODE: its terms         ode, quadrature   its solver, its integral
    bound        the evidence bound on -log p(x)     discrete          and on -log P(k) of integers

May import: core, losses, score, sdes, statistics.
"""

from sbml.likelihood.flow import (
    TERMS,
    Likelihood,
    PriorError,
    ode_logp,
    prior_error,
    sample_logp,
)

__all__ = ["TERMS", "Likelihood", "PriorError", "ode_logp", "prior_error", "sample_logp"]
