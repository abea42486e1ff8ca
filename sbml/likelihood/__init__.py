"""-log p(x) by the probability-flow ODE, and evidence bounds on it.

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
