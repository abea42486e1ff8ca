"""Interface of the feature extractors: images -> features and class probabilities."""

import dataclasses
from collections.abc import Callable

import numpy as np

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
