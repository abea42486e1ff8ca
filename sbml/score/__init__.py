"""From what a network predicts to a score, its divergence, and the denoiser of integers.

May import: core, sdes.
"""

from sbml.score.prediction import (
    FOREIGN,
    KIND,
    KINDS,
    LABELS,
    LEVELS,
    PARAMETERIZATIONS,
    PREDICTIONS,
    Adapter,
    Condition,
    Foreign,
    LogSnrRange,
    Network,
    NetworkScore,
    OfData,
    Prediction,
    from_prediction,
)

__all__ = [
    "FOREIGN",
    "KIND",
    "KINDS",
    "LABELS",
    "LEVELS",
    "PARAMETERIZATIONS",
    "PREDICTIONS",
    "Adapter",
    "Condition",
    "Foreign",
    "LogSnrRange",
    "Network",
    "NetworkScore",
    "OfData",
    "Prediction",
    "from_prediction",
]
