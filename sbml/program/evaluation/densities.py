"""Baselines for whitened rows z ``(n, d)`` (``sbml.data.table``): a Gaussian, a mixture, kernels.

    Gaussian            N(0, I): the Gaussian of the mean and the covariance that whiten the rows;
                        they were fitted to all training rows
    Gaussian mixture    sum_k w_k N(m_k, C_k), by EM; k and the number added to the diagonals of
                        the C_k are those with the largest log p on validation rows
    kernel density      1/n sum_i N(z; z_i, b^2 I); b is chosen in the same way

Once its settings are chosen, each is fitted to all training rows, those for validation included,
by scikit-learn.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from sbml.data.table import Rows

COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
ADDED = (1e-6, 1e-3, 1e-2, 1e-1)
BANDWIDTHS = tuple(float(b) for b in np.geomspace(0.05, 2, 24))


class Baseline(NamedTuple):
    """A fitted density.

    Attributes:
      name: its name.
      chosen: its settings, in words.
      logp: from rows ``(m, d)`` to log p ``(m,)`` in nats.
    """

    name: str
    chosen: str
    logp: Callable[[np.ndarray], np.ndarray]


def log_p(baselines: Sequence[Baseline], rows: Rows) -> dict[str, np.ndarray]:
    """log p(y) of the ``rows`` in the units of the file, ``(m,)`` by the name of each baseline."""
    z = rows.array.astype(np.float64)
    return {each.name: each.logp(z) + rows.log_det for each in baselines}


def fit(train: np.ndarray, validation: np.ndarray) -> list[Baseline]:
    """The baselines, fitted to the rows ``train (n, d)`` and ``validation (k, d)`` together. Their
    settings are those of the fit to ``train`` that has the largest log p on ``validation``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import KernelDensity
    from threadpoolctl import threadpool_limits

    every = np.concatenate([train, validation])

    def best(make: Callable[..., Any], settings: list[dict[str, Any]]) -> tuple[Any, Any]:
        scores = [make(**each).fit(train).score_samples(validation).mean() for each in settings]
        chosen = settings[int(np.argmax(scores))]
        return chosen, make(**chosen).fit(every)

    # On three of scikit-learn's data sets, EM from the centres of k-means++ had a larger log p on
    # the validation rows than EM from the result of k-means.
    em: Any = {"init_params": "k-means++", "max_iter": 300, "random_state": 0}
    possible = [k for k in COMPONENTS if k <= len(train)]
    mixtures = [{"n_components": k, "reg_covar": a, **em} for k in possible for a in ADDED]
    # On small matrices BLAS is several times faster with one thread.
    with warnings.catch_warnings(), threadpool_limits(1):
        # If EM stops early, its result is still a density, and the validation rows judge it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        of_mixture, mixture = best(GaussianMixture, mixtures)
        of_kernel, kernel = best(KernelDensity, [{"bandwidth": b} for b in BANDWIDTHS])
    count, added = of_mixture["n_components"], of_mixture["reg_covar"]
    components = f"{count} component{'s' * (count > 1)}, {added:g} added to the variances"
    return [
        Baseline("Gaussian", "nothing to choose", lambda z: stats.norm.logpdf(z).sum(axis=1)),
        Baseline("Gaussian mixture", components, mixture.score_samples),
        Baseline("kernel density", f"bandwidth {of_kernel['bandwidth']:.3g}", kernel.score_samples),
    ]
