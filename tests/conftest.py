"""What the tests share: float64 and strict ranks for the mathematics."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """float64, and an error wherever a rank would be broadcast, for a whole test module.

    A module asks for it once: ``pytestmark = pytest.mark.usefixtures("x64")``. The other modules
    run in float32, as the networks do.
    """
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield
