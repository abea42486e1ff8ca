"""The table of --mode=verify: one test for each row of two SDEs, and wrong values make rows fail.

CI runs the command as well, which computes the rows of all SDEs, and compares their number with
``EVERY``.
"""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from sbml.dequantizers import DEQUANTIZERS, has_density, uniform
from sbml.modes import verify
from sbml.sdes import SDES
from sbml.types import Array, Key
from sbml.verify import continuous, integers, oracle
from sbml.verify.table import Row, bounding, row

pytestmark = pytest.mark.oracle

OF_THE_PRIOR = [f"prior KL, {kind}" for kind in ("Gaussian", "mixture")]
OF_THE_SCORE = [
    *("one Rademacher probe, diagonal", "ODE log p, Gaussian", "ODE log p, mixture"),
    *(
        f"{name}, {kind}"
        for kind in ("Gaussian", "mixture")
        for name in (
            *("bound, dsm", "bound, ssm", "gap of a wrong score", "epsilon-correction"),
            *("loss's slope, likelihood", "loss's slope, original"),
        )
    ),
]
OF_INTEGERS = [
    *("uniform, by quadrature", "uniform, by quadrature >= -log P"),
    *("truncated_normal, evidence bound", "truncated_normal, evidence bound >= -log P"),
    *("categorical, evidence bound", "learned, evidence bound"),
    *(
        f"{dequantizer}, {name}"
        for dequantizer in filter(lambda name: has_density(DEQUANTIZERS[name]), DEQUANTIZERS)
        for name in (
            "log of the mean weight",
            *("1 sample >= -log P", "4 samples >= -log P", "16 samples >= -log P"),
        )
    ),
]
NAMES = OF_THE_PRIOR + OF_THE_SCORE + OF_INTEGERS
CHECKED = ("ve", "vp")
# The noise of VE and of VDM's schedule is never small enough for this correction.
ABSENT = {
    (f"epsilon-correction, {kind}", name)
    for kind in ("Gaussian", "mixture")
    for name in ("ve", "linear_gamma")
}
EVERY = set(itertools.product(NAMES, SDES)) - ABSENT
EVERY |= {("bits of a coded image, and its bound", next(iter(SDES)))}


@functools.cache
def rows() -> dict[tuple[str, str], Row]:
    """Rows by their names. The session is in float32; the table sets float64 by itself."""
    results = verify.checks(CHECKED)
    assert len(results) == len({(row.name, row.sde) for row in results})
    return {(row.name, row.sde): row for row in results}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sde"), [pair for pair in itertools.product(NAMES, CHECKED) if pair in EVERY]
)
def test_row(name: str, sde: str) -> None:
    assert rows()[name, sde].ok, rows()[name, sde]


@pytest.mark.slow
def test_no_row_is_left_out() -> None:
    assert set(rows()) == {pair for pair in EVERY if pair[1] in CHECKED}


@pytest.mark.usefixtures("x64")
def test_a_wrong_score_fails_every_row_that_depends_on_the_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = oracle.Gaussian.score

    def wrong(self: oracle.Gaussian, x: Array, t: Array, key: Key | None = None) -> Array:
        return 1.1 * true(self, x, t)

    monkeypatch.setattr(oracle.Gaussian, "score", wrong)
    # With the SDE of the table, functions compiled with the true score would be used again.
    results = list(continuous.continuous_checks("some", SDES["vp"](beta_max=19.0)))
    assert {row.name for row in results if not row.ok} == set(OF_THE_SCORE)
    assert {row.name for row in results if row.ok} == set(OF_THE_PRIOR)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("error", "failing"),
    [
        (0.04, {"log of the mean weight"}),
        (-0.04, {"log of the mean weight", "16 samples >= -log P"}),
    ],
)
def test_a_wrong_log_q_fails(error: float, failing: set[str]) -> None:
    u, log_q = integers._samples(uniform.Model(), {}, integers._pixels(), jax.random.key(0))
    results = integers.weight_rows("vp", SDES["vp"](), "any", uniform.Model(), u, log_q + error)
    assert {row.name.removeprefix("any, ") for row in results if not row.ok} == failing


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_learned_decoder_with_other_logits_fails(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = integers.integers.decoder_nats

    def other(out: Array, *rest: Any) -> Array:
        return true(share * out, *rest)

    monkeypatch.setattr(integers.integers, "decoder_nats", other)
    # With the SDE of the table, functions compiled with the true decoder would be used again.
    results = list(integers.decoder_rows("some", SDES["vp"](beta_max=19.0 + share)))
    assert [row.name for row in results if not row.ok] == ["learned, evidence bound"]


def test_a_row_is_its_worst_entry() -> None:
    assert row("", "vp", [1.0, 5.0, 1e3], [1.0, 4.0, 1.1e3], 0.2) == Row(
        "", "vp", 5.0, 4.0, 0.25, 0.2, False
    )
    assert row("", "vp", np.arange(3), 1.0, 1.0).ok
    assert not row("", "vp", [1.0, np.nan, 9.0], 1.0, 100.0).ok


@pytest.mark.parametrize(
    ("got", "looser", "error"),
    [(2.1, np.inf, 0.0), (2.1, 2.0, 0.05), (1.5, 3.0, 0.25), (np.nan, 3.0, np.nan)],
)
def test_a_bound_lies_between_the_truth_and_a_looser_bound(
    got: float, looser: float, error: float
) -> None:
    comparison = bounding("", "vp", got, 2.0, looser, 0.01)
    np.testing.assert_allclose(comparison.error, error)
    assert comparison.ok == (error == 0)


def test_a_failing_row_ends_the_run_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = row("this", "vp", 1.0, 1.0, 0.1), row("that", "ve", 1.0, 2.0, 0.1)
    monkeypatch.setattr(verify, "checks", lambda: [good])
    verify.run()
    assert "1 of 1 rows agree with the truth" in capsys.readouterr().out
    monkeypatch.setattr(verify, "checks", lambda: [good, bad])
    with pytest.raises(SystemExit) as ended:
        verify.run()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "1 of 2 rows agree" in printed and printed.endswith("failed: that (ve)\n")
    assert [line.split()[0] for line in printed.splitlines() if "FAILS" in line] == ["that"]
