"""What the tests of refusals share: good and bad arguments, and the tests of a table of cases."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from sbml import sdes
from sbml.likelihood import ode

# A function, its good arguments, and the bad values of some arguments by name. A name such as
# "vs|directions" is that of an argument, ``vs``, and other words by which an error may call it.
Cases = dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]

VP, EPS, KEY = sdes.VP(), 1e-3, jax.random.key(0)
FAST = ode.Solver(fixed_steps=3)
X, Z, T = np.full(3, 0.3, np.float32), np.full(3, -0.2, np.float32), np.float32(0.5)
U, PIXELS = np.array([0.1, 0.6], np.float32), np.array([1, 2, 3])
KEYS, PROBES = jax.random.split(KEY, 2), np.ones((2, 3), np.float32)
NAN, INFINITY = float("nan"), float("inf")
FEATURES = np.random.default_rng(0).normal(size=(9, 3))

TIMES: dict[str, Any] = {
    "t": (T[None], np.full(3, T), np.int32(1), np.array(True), "0.5", 1, -T, T * NAN)
}
UP_TO_END: dict[str, Any] = {"t": (*TIMES["t"], T + 1)}
EXAMPLES: dict[str, Any] = {"x": (X.astype(int), X > 0, X.tolist(), 0.3, None)}
LIKE_X: dict[str, Any] = {"z": (Z[None], Z[:1], Z[0], Z.astype(int), Z.tolist(), 0.1)}
OLD = jax.random.PRNGKey(0)
BAD_KEYS: dict[str, Any] = {"key": (OLD, np.asarray(OLD), KEYS, 0, None)}
MAYBE_KEYS: dict[str, Any] = {"key": BAD_KEYS["key"][:-1]}  # None is allowed.
# Values that are refused where one number is needed; the last one is 0 in float32.
NOT_A_NUMBER = ("a", [0.1], np.full(2, 0.1), None, 1e-320)
DISCRETE: dict[str, Any] = {"sde": (VP.levels(30), sdes.VP, "vp", None)}
EPSILONS: dict[str, Any] = {"eps": (0.0, 1.0, -1.0, NAN, INFINITY, *NOT_A_NUMBER)}
COUNTS = (0, -1, 2.5, NAN, True)


def score(x: Any, t: Any, key: Any = None) -> Any:
    return -x


def tests_of(cases: Cases) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two tests: good arguments give finite numbers, and every bad value is refused."""

    @pytest.mark.parametrize("case", cases)
    def accepted(case: str) -> None:
        function, good, _ = cases[case]
        found = jax.tree.leaves(function(**good))
        assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in found)

    @pytest.mark.parametrize(
        ("function", "good", "name", "bad"),
        [
            pytest.param(function, good, name, bad, id=f"{case}-{name}-{i}")
            for case, (function, good, values) in cases.items()
            for name, bads in values.items()
            for i, bad in enumerate(bads)
        ],
    )
    def refused(function: Callable[..., Any], good: dict[str, Any], name: str, bad: Any) -> None:
        argument = name.split("|")[0]
        with pytest.raises(ValueError, match=rf"\b({name})\b"):
            function(**{**good, argument: bad})

    return accepted, refused
