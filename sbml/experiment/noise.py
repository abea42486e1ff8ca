"""The smallest time of a training, and the unit of its loss."""

import jax.numpy as jnp

from sbml import discrete, times
from sbml.data import imagenet32
from sbml.experiment.data import Data
from sbml.experiment.training import Training
from sbml.scalars import Number
from sbml.sdes import SDE


def smallest_time(sde: SDE, training: Training, data: Data, tau: float) -> float:
    """The smallest time of a training: ``training.smallest_time``, or if it is None, the paper's.

    The paper's smallest time is the SDE's ``smallest_time``. On ImageNet with likelihood weighting
    and importance sampling it is at least 5e-5. For training on bin centres it is replaced by the
    time at which half a bin is ``tau`` standard deviations of the noise wide, if this is later
    (``discrete.smallest_time``): the evaluation of such a model needs no earlier time.
    """
    if training.smallest_time is not None:
        return sde.check_time(training.smallest_time, training.name_of("smallest_time"))
    both = training.likelihood_weighting and training.importance_sampling
    imagenet = imagenet32.version(data.source) is not None
    eps = max(sde.smallest_time, 5e-5 if imagenet and both else 0.0)
    if data.dequantization != "centre":
        return eps
    return float(discrete_time(sde, data.levels, eps, tau))


def discrete_time(sde: SDE, levels: int, eps: Number, tau: float) -> Number:
    """``discrete.smallest_time`` for ``eval.tau``.

    Raises:
      ValueError: it is not before T, because ``tau`` is too small.
    """
    found = discrete.smallest_time(sde, levels, eps, tau)
    return sde.check_time(found, f"eval.tau={tau} gives smallest time eps")


def smallest_trained_time(sde: SDE, training: Training, eps: float) -> float:
    """The smallest time t at which the network sees images in training.

    In continuous time it is ``eps``. In discrete time it is the time with the log-SNR of the first
    noise level, or ``eps`` if that is later.
    """
    levels = training.discrete_levels
    if not levels:
        return eps
    return max(eps, float(sde.time(sde.levels(levels).log_snr(jnp.zeros(())))))


def loss_unit(sde: SDE, training: Training, eps: float) -> float:
    """The value of the loss of this package, in nats/dim, when the loss of the paper is 1.

    The paper's loss is a mean over times and dimensions of weighted squared errors of the
    prediction. With likelihood weighting and importance sampling the weights are 1 and the loss
    here is Z / 2 times the paper's, where Z is the normaliser of the proposal. Otherwise it is half
    the paper's; the length T - eps of the interval of times, 1 to within 1%, is neglected.
    """
    proposal = training.proposal(sde, eps)
    if not (training.likelihood_weighting and isinstance(proposal, times.Importance)):
        return 0.5
    return float(proposal.normaliser) / 2
