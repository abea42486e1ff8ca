"""The checks of shapes and types while tests run: jaxtyping's, by beartype.

``conftest`` installs them for the modules below before anything imports these. Programs that a test
starts run without them, as users do.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

CHECKED = (
    "sbml.core.bits",
    "sbml.core.streams",
    "sbml.core.types",
    "sbml.density.checks",
    "sbml.density.density",
    "sbml.density.distribution",
    "sbml.density.estimate",
    "sbml.density.estimators",
    "sbml.density.posterior",
    "sbml.dequantizers.base",
    "sbml.dequantizers.decoders",
    "sbml.dequantizers.truncated_normal",
    "sbml.dequantizers.uniform",
    "sbml.dequantizers.variational",
    "sbml.likelihood",
    "sbml.losses",
    "sbml.samplers",
    "sbml.score.divergence",
    "sbml.score.integers",
    "sbml.score.prediction",
    "sbml.sdes",
    "sbml.statistics.distances",
    "sbml.statistics.intervals",
)

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # An int is a float, as for mypy.
_checks: dict[Any, Callable[..., Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, checked at every call.

    jaxtyping gives functions whose bodies follow from their names and signatures, and a function
    inside another is given again at every call of the other. So each check is made once.
    """
    key = (function.__module__, function.__qualname__, inspect.signature(function))
    try:
        if key not in _checks:
            _checks[key] = _beartype(function)
    except TypeError:  # A default has no hash.
        return _beartype(function)
    return _checks[key]
