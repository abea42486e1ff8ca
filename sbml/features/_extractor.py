"""What every extractor is."""

import dataclasses
from collections.abc import Callable

import numpy as np

# uint8 images (n, h, w, c) -> features (n, d) and class probabilities (n, classes)
Look = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Features of images, and what the metrics made of them are called.

    Attributes:
      identity: changes with anything that changes the features.
      names: of the Frechet and the kernel distance and the score of probabilities.
      look: the features themselves.
    """

    identity: str
    names: tuple[str, str, str]
    look: Look

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.look(images)
