"""Feature extractors for the metrics of sample quality, by name.

    extractor = EXTRACTORS[name](weights="...", sha256="...", levels=..., cache=...)
    features, probabilities = extractor(images)       uint8 (n, h, w, c) -> (n, d), (n, classes)

``inception`` gives FID, KID and the Inception Score. ``digits_classifier`` is fitted here, in about
a second, to the digits of scikit-learn; its distances have other names, because they are not
comparable with FID and KID.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from sbml.core.door import condition
from sbml.core.registry import Registry

# uint8 images (n, h, w, c) -> features (n, d) and class probabilities (n, classes)
Look = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A function from images to features, with the names of the metrics that use it.

    Attributes:
      identity: a string that is different for extractors with different features.
      names: names of three metrics: the Frechet distance and the kernel distance between features,
        and the score of the class probabilities.
      look: the function from images to features and class probabilities.
    """

    identity: str
    names: tuple[str, str, str]
    look: Look

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.look(images)


def _makes(function: Any) -> bool:
    try:
        inspect.signature(function).bind(weights="", sha256="", levels=0, cache="")
    except (TypeError, ValueError):  # A function of C can have no signature.
        return False
    return True


EXTRACTORS = Registry(
    "feature extractor",
    {
        "inception": "sbml.program.features.inception:extractor",
        "digits_classifier": "sbml.program.features.digits_classifier:extractor",
    },
    Annotated[Callable, condition("of weights, sha256, levels and cache", _makes)],
)
