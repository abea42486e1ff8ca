"""Maximum likelihood training and exact likelihoods of score-based diffusion models.

The mathematics is for one example and a scalar time; callers ``vmap``. A score is any callable
s(x, t, key), see ``sbml.types``.

    load                        the density of a trained model, from its work directory
    Density                     likelihoods, bits/dim, samples and latents under any score
    Estimate                    results of these: values, terms, intervals
    sdes, times, divergence     forward processes; times and their weights; tr J
    losses, second_order        denoising score matching, of the score and of its divergence
    bound, discrete             evidence bounds on -log p(x), and on -log P(k) of integers
    ode, quadrature, likelihood the probability-flow ODE and its log-likelihood
    samplers                    from a latent to a sample
    bits, estimators            bits/dim and the numbers that an evaluation computes
    measurement, fingerprint    from an estimator, a density and data to a number with error bars
    estimate, intervals         error bars
    distances, moments          distances between sets of images, and their moments
    posterior                   results of ``Density``: posteriors and importance weights
    networks, score, pytorch    score networks; from what a network predicts to a score
    integers                    the denoiser of integers
    dequantizers, data          from integers to numbers; image sets
    codec                       images in a file as long as their bound
    audit                       a conformance suite for likelihood code
    compiler                    the check that XLA's sums are right

The command ``sbml`` trains, evaluates and samples as a config says: see the README.
"""

import importlib
from typing import Any

from sbml import compiler

__version__ = "0.1.0"

compiler.cure()

LIBRARY = tuple(
    """
    audit bits bound codec compiler data density dequantizers discrete distances divergence
    estimate estimators fingerprint integers intervals likelihood losses measurement moments
    networks ode posterior pytorch quadrature samplers score sdes second_order times transforms
    types
    """.split()
)


# Classes that are also attributes of ``sbml``, and their modules. VDM's ``LinearGamma`` and
# ``MonotoneGamma`` and the base classes are attributes of ``sbml.sdes`` only.
PROCESSES = tuple(
    """
    VP SubVP VE LinearVE EDM RectifiedFlow Cosine AlphaBarTable BetaSchedule Rescaled Schedule
    """.split()
)
NAMES = {
    "Density": "density",
    "Estimate": "estimate",
    "load": "convert.load",
    **dict.fromkeys(PROCESSES, "sdes"),
}


def __getattr__(name: str) -> Any:
    """A module or class of the library, imported when it is first asked for: ``sbml.losses``."""
    if name in NAMES:
        return getattr(importlib.import_module(f"sbml.{NAMES[name]}"), name)
    if name in LIBRARY:
        return importlib.import_module(f"sbml.{name}")
    choices = ", ".join((*NAMES, *LIBRARY))
    raise AttributeError(f"module 'sbml' has no attribute {name!r}; it has {choices}")


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES, *LIBRARY])
