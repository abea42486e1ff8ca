"""The loss at each noise level: the score of training images that are known by heart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sbml import VP
from sbml.program.evaluation import levels

pytestmark = pytest.mark.usefixtures("x64")

KNOWN = np.array([[0, 3], [1, 1], [2, 3]], np.uint8)  # three images of two pixels, of four levels


@pytest.mark.parametrize("t", [0.02, 0.1, 0.8])
@pytest.mark.parametrize("data", ["centre", "uniform"])
def test_the_floor_is_that_of_bayes_rule(data: str, t: float) -> None:
    """Tweedie's formula, alpha E[x_0 | x_t] = x_t + sigma^2 score, by SciPy's distributions."""
    sde, x = VP(), np.array([-0.4, 0.3])
    alpha, sigma = (float(f(jnp.asarray(t))) for f in (sde.mean_coef, sde.std))
    noise, edges = stats.norm(x / alpha, sigma / alpha), np.linspace(-1, 1, 5)
    if data == "centre":
        means = np.broadcast_to((2 * KNOWN + 1) / 4 - 1, KNOWN.shape)
        likelihood = noise.pdf(means)
    else:
        low, high = edges[KNOWN], edges[KNOWN + 1]
        likelihood = noise.cdf(high) - noise.cdf(low)
        a, b = ((end - x / alpha) / (sigma / alpha) for end in (low, high))
        means = stats.truncnorm(a, b, x / alpha, sigma / alpha).mean()
    weight = likelihood.prod(1) / likelihood.prod(1).sum()
    expected = (alpha * weight @ means - x) / sigma**2
    score = jax.jit(levels._best_score(KNOWN, 4, sde, data))
    np.testing.assert_allclose(score(x, jnp.asarray(t), None), expected, rtol=1e-6)
