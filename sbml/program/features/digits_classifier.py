"""A small classifier of scikit-learn's digits; its hidden layer gives the features.

It is scikit-learn's multilayer perceptron, fitted to the 1,437 training digits with a fixed seed,
which takes about a second. Distances between its features only compare models of these digits with
each other.
"""

import functools
import warnings
from typing import TYPE_CHECKING

import numpy as np

from sbml.data import digits
from sbml.program.features import Extractor
from sbml.program.runtime.trees import tree_crc32

if TYPE_CHECKING:
    from sklearn.neural_network import MLPClassifier

HIDDEN = 64


def extractor(*, weights: str, sha256: str, levels: int, cache: str | None) -> Extractor:
    """The extractor with the classifier, fitted here; ``weights`` and ``cache`` are not used."""
    if levels != digits.LEVELS:
        raise ValueError(
            f"the digits classifier is for {digits.LEVELS} grey levels, but these images have "
            f"{levels}: set eval.quality.features=inception"
        )
    model, accuracy = _fitted()

    def look(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if images.shape[1:] != (8, 8, 1):
            raise ValueError(
                f"images of shape {images.shape[1:]}: the digits classifier needs (8, 8, 1); set "
                "eval.quality.features=inception"
            )
        flat = images.reshape(len(images), -1) / (digits.LEVELS - 1)
        hidden = np.maximum(flat @ model.coefs_[0] + model.intercepts_[0], 0)
        return hidden, model.predict_proba(flat)

    names = ("feature distance", "feature kernel distance", "class score")
    labels = tuple(f"{name} (digits classifier, {accuracy:.0%} right)" for name in names)
    # Other versions of the libraries may fit other weights.
    identity = f"digits_classifier_{HIDDEN}_{tree_crc32((model.coefs_, model.intercepts_)):08x}"
    return Extractor(identity, labels, look)  # type: ignore[arg-type]


@functools.cache
def _fitted() -> tuple["MLPClassifier", float]:
    """The classifier, and its accuracy on the test digits.

    The fit runs on one thread: the matrix products are too small to gain from more, and two
    processes with two threads each took ten times as long on two cores.
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
        warnings.simplefilter("ignore", ConvergenceWarning)  # The fit need not be exact.
        model.fit(x[:count], labels[:count])
    return model, model.score(x[count:], labels[count:])
