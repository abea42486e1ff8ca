"""Maximum likelihood training and exact likelihoods of score-based diffusion models.

The mathematics is for one example and a scalar time; callers ``vmap``. A score is any callable
s(x, t, key), see ``sbml.types``.

    load                        the density of a trained model, from its work directory
    Density                     likelihoods, bits/dim, samples and latents under any score
    Estimate                    results of these: values, terms, intervals

The folders, from the bottom up; each may import those above it that its docstring names:

    core         types, checks of arguments, registries, streams of random numbers, files
    statistics   intervals, moments, distances
    sdes         forward processes; times and their weights
    networks     architectures in Flax
    data         image sets and tables
    score        from what a network predicts to a score; tr J; the denoiser of integers
    losses       denoising score matching
    likelihood   the probability-flow ODE and its log-likelihood; evidence bounds
    dequantizers from integers to numbers
    samplers     from a latent to a sample
    codec        images in a file as long as their bound
    density      what is measured: log p, samples, bits/dim, each with its error bars
    audit        a conformance suite for likelihood code
    program      the command ``sbml``: configs, modes, runs on disk, reports

The command ``sbml`` trains, evaluates and samples as a config says: see the README.
"""

import importlib
from typing import Any

from sbml.core import compiler

__version__ = "0.1.0"

compiler.cure()

# The public modules, by the folder that holds them. Each is an attribute of ``sbml``: ``sbml.ode``
# is ``sbml.likelihood.ode``.
MODULES = {
    "": "audit codec data density dequantizers likelihood losses networks samplers score sdes",
    ".core": "bits compiler fingerprint types",
    ".statistics": "distances intervals moments",
    ".sdes": "times",
    ".score": "divergence integers pytorch",
    ".likelihood": "bound discrete ode quadrature",
    ".density": "estimate estimators measurement posterior transforms",
}
# Classes and functions that are attributes of ``sbml``, by their modules. VDM's ``LinearGamma`` and
# ``MonotoneGamma`` and the base classes are attributes of ``sbml.sdes`` only.
OBJECTS = {
    ".density": "Density Estimate",
    ".program.convert.load": "load",
    ".sdes": "VP SubVP VE LinearVE EDM RectifiedFlow Cosine "
    "AlphaBarTable BetaSchedule Rescaled Schedule",
}
LIBRARY = {
    name: f"sbml{folder}.{name}" for folder, names in MODULES.items() for name in names.split()
}
NAMES = {name: f"sbml{module}" for module, names in OBJECTS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """A module or class of the library, imported when it is first asked for: ``sbml.losses``."""
    if name in NAMES:
        return getattr(importlib.import_module(NAMES[name]), name)
    if name in LIBRARY:
        return importlib.import_module(LIBRARY[name])
    choices = ", ".join((*NAMES, *LIBRARY))
    raise AttributeError(f"module 'sbml' has no attribute {name!r}; it has {choices}")


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES, *LIBRARY])
