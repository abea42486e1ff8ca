"""Where the noise of a training begins, and the unit of its loss: of sde, training and data."""

import jax.numpy as jnp

from sbml import discrete, times
from sbml.data import imagenet32
from sbml.experiment.data import Data
from sbml.experiment.training import Training
from sbml.sdes import SDE


def smallest_time(sde: SDE, training: Training, data: Data, tau: float) -> float:
    """The paper's, unless ``training.smallest_time`` says otherwise; of bin centres a later one.

    The paper's is the SDE's own, but for VP on ImageNet with likelihood weighting and importance
    sampling, of either kind, 5e-5. Bin centres are evaluated from where ``tau`` standard deviations
    of the noise fill half a bin, if that is later (``discrete.smallest_time``). They are trained
    from there on, for earlier noise is never evaluated.
    """
    if training.smallest_time is not None:
        return training.smallest_time
    both = training.likelihood_weighting and training.importance_sampling
    imagenet = imagenet32.version(data.source) is not None
    papers = max(sde.smallest_time, 5e-5 if imagenet and both else 0.0)
    if data.dequantization != "centre":
        return papers
    return float(discrete.smallest_time(sde, data.levels, papers, tau))


def smallest_trained_time(sde: SDE, training: Training, eps: float) -> float:
    """The smallest time whose noise a training from ``eps`` on shows: in discrete time, that of the
    first level."""
    levels = training.discrete_levels
    if not levels:
        return eps
    return max(eps, float(sde.time(sde.levels(levels).log_snr(jnp.zeros(())))))


def loss_unit(sde: SDE, training: Training, eps: float) -> float:
    """Our loss, nats/dim, where the paper's is 1: it leaves constants out, mean |z - F|^2.

    Z / 2 where importance sampling makes the likelihood's weights equal, those of the noise's or of
    the velocity's error; else 1 / 2.
    """
    proposal = training.proposal(sde, eps)
    if not (training.likelihood_weighting and isinstance(proposal, times.Importance)):
        return 0.5
    return float(proposal.normaliser) / 2
