"""A small classifier of the embedded digits: the features are its hidden layer.

scikit-learn's multilayer perceptron, fitted to the 1,437 training digits with a fixed seed, in a
second or so. Distances in its features compare models of digits with each other, and nothing else.
"""

import functools
import warnings
from typing import Any

import numpy as np

from sbml.data import digits
from sbml.features._extractor import Extractor
from sbml.runtime.checkpoint import tree_crc32

HIDDEN = 64


def extractor(*, weights: str, sha256: str, levels: int, cache: str | None) -> Extractor:
    """The classifier, fitted now. ``weights`` and ``cache`` are not needed.

    Raises:
      ValueError: ``levels`` are not the digits'.
    """
    if levels != digits.LEVELS:
        raise ValueError(
            f"the digits classifier knows {digits.LEVELS} grey levels, these images have {levels}: "
            "set eval.features=inception"
        )
    model, accuracy = _fitted()

    def look(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if images.shape[1:] != (8, 8, 1):
            raise ValueError(f"images of shape {images.shape[1:]}: the digits' are (8, 8, 1)")
        flat = images.reshape(len(images), -1) / (digits.LEVELS - 1)
        hidden = np.maximum(flat @ model.coefs_[0] + model.intercepts_[0], 0)
        return hidden, model.predict_proba(flat)

    names = ("feature distance", "feature kernel distance", "class score")
    said = tuple(f"{name} (digits classifier, {accuracy:.0%} right)" for name in names)
    # Other libraries may fit another one.
    identity = f"digits_classifier_{HIDDEN}_{tree_crc32((model.coefs_, model.intercepts_)):08x}"
    return Extractor(identity, said, look)  # type: ignore[arg-type]


@functools.cache
def _fitted() -> tuple[Any, float]:
    """The classifier, and its accuracy on the test digits.

    On one thread: the products are too small to share out, and two processes that each did so on
    two cores took ten times as long.
    """
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    x, labels = load_digits(return_X_y=True)
    x = x / (digits.LEVELS - 1)
    count = len(x) - digits.TEST_COUNT
    model = MLPClassifier((HIDDEN,), alpha=1e-2, max_iter=300, random_state=0)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # It need not be the best one.
        model.fit(x[:count], labels[:count])
    return model, model.score(x[count:], labels[count:])
