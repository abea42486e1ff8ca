"""--mode=verify: its rows, and that a failure ends it and is named.

CI runs the whole command, and compares the number of its rows with ``EVERY``.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from sbml.audit import mistakes, oracle, ours
from sbml.audit.suite import Report
from sbml.audit.table import Row, row
from sbml.core.types import Array, Key
from sbml.program.modes import verify
from sbml.program.verify import ways
from sbml.sdes import SDES

pytestmark = pytest.mark.oracle

OF_AN_SDE = {"logp, mixture", "bound, mixture", "bound, its term prior"}
KINDS = ("Gaussians", "heavy tails")
METHODS = ("log_prob", "logp", "sample_and_log_prob", "bound")
OF_ONE_SDE = {
    ways.class_rows: {
        *(f"{method}, class and transform, {kind}" for method in METHODS for kind in KINDS),
        "classify, prior 0.8 and 0.2",
    },
    ways.steps_rows: {f"bound in steps, {label} reduction" for label in ("with", "without")},
    ways.draws_rows: {
        "logp, one probe",
        "logp, noise of the probes, reported / true",
        "bound, each place",
        "bound, noise of the sweeps, reported / true",
    },
    ways.solver_rows: {
        "logp by Euler's steps",
        "sample_and_log_prob by Euler's steps",
        "logp, solver's error, reported / true",
    },
    ways.sampler_rows: {
        "sample_and_log_prob, DDIM",
        "path_log_prob",
        "E[P'/P] of paths",
        "gap",
        "gap, coverage",
        "gap, random probes",
        "gap in bits/dim",
    },
    ways.weights_rows: {
        *(
            f"importance, {label}, {number}"
            for label in ("ODE", "DDIM")
            for number in (
                "log Z",
                "standard error of log Z, reported / true",
                "sample size, reported / true",
                "marked",
            )
        ),
        "importance, wide, missing",
        "importance, wide, marked",
    },
    ways.prior_rows: {
        "logp, error of the prior",
        "classify, error of the prior, reported / true",
    },
    ways.interval_rows: {
        "difference of two means, coverage",
        "paired difference, standard error, reported / true",
    },
    ways.loss_rows: {"loss of training in units of its expectation"},
    ways.table_rows: {
        "table, log p of the rows",
        "table, log_prob of the rows",
        "table, log p of samples",
        "table, log p of the Gaussian",
    },
    ways.codec_rows: {"bits of a coded image, and its bound", "bits of a file"},
}
EVERY = {(name, sde) for name in OF_AN_SDE for sde in SDES}
EVERY |= {(name, "vp") for names in OF_ONE_SDE.values() for name in names}
EVERY |= {(each.name, "ours") for each in ours.OURS}
EVERY |= {(each.name, "mistake") for each in mistakes.MISTAKES}


# The rows of ``class_rows`` and ``draws_rows`` take longest. CI computes them, as all others.
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(rows, id=rows.__name__, marks=() if quick else pytest.mark.slow)
        for rows in OF_ONE_SDE
        for quick in [rows in (ways.loss_rows, ways.interval_rows)]
        if rows not in (ways.class_rows, ways.draws_rows)
    ],
)
def test_rows(rows: Any) -> None:
    found = verify.in_float64(rows, "vp")
    assert [row for row in found if not row.ok] == []
    assert len(found) == len(OF_ONE_SDE[rows]) and {row.name for row in found} == OF_ONE_SDE[rows]


def test_every_row_is_computed() -> None:
    assert set(ways.ONCE) == set(OF_ONE_SDE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "rectified_flow"])
def test_rows_of_an_sde(name: str) -> None:
    found = verify.in_float64(ways.sde_rows, name)
    assert [row for row in found if not row.ok] == []
    assert {row.name for row in found} == OF_AN_SDE


@pytest.mark.slow
def test_a_wrong_score_fails_every_row_that_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    true = oracle.Mixture.score

    def wrong(self: oracle.Mixture, x: Array, t: Array, key: Key | None = None) -> Array:
        return 1.3 * true(self, x, t)

    monkeypatch.setattr(oracle.Mixture, "score", wrong)
    # With the SDE of the table, functions compiled with the true score would be used again.
    with jax.enable_x64(True):
        found = list(ways.sde_rows("vp", SDES["vp"](beta_max=19.0)))
    assert {row.name for row in found if row.ok} == {"bound, its term prior"}


def test_a_row_is_its_worst_entry() -> None:
    assert row("", "vp", [1.0, 5.0, 1e3], [1.0, 4.0, 1.1e3], 0.2) == Row(
        "", "vp", 5.0, 4.0, 0.25, 0.2, False
    )
    assert row("", "vp", np.arange(3), 1.0, 1.0).ok
    assert not row("", "vp", [1.0, np.nan, 9.0], 1.0, 100.0).ok


def test_an_error_is_a_row_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> Iterator[Row]:
        yield row("this", name, 1.0, 1.0, 0.1)
        raise ValueError("the score ignores its condition")

    first, second = verify.in_float64(broken, "vp")
    assert first.ok and second.name == "broken" and not second.ok and math.isnan(second.error)
    assert "ValueError: the score ignores its condition" in capsys.readouterr().err


def test_a_failure_ends_the_run_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = row("this", "vp", 1.0, 1.0, 0.1), row("that", "ve", 1.0, 2.0, 0.1)
    first, fails = next(iter(mistakes.MISTAKES.items()))
    monkeypatch.setattr(verify, "MISTAKES", {first: frozenset()})
    passed = Report("ours", (), 0.0)
    monkeypatch.setattr(verify, "results", lambda: ([passed], [passed], [good]))
    verify.run()
    assert "3 of 3 rows agree with the truth" in capsys.readouterr().out
    monkeypatch.setattr(verify, "results", lambda: ([passed], [passed], [good, bad]))
    with pytest.raises(SystemExit) as ended:
        verify.run()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "3 of 4 rows agree" in printed and printed.endswith("failed: that (ve)\n")
    assert [line.split()[0] for line in printed.splitlines() if "FAILS" in line] == ["that"]
    monkeypatch.setattr(verify, "MISTAKES", {first: fails})
    with pytest.raises(SystemExit):
        verify.run()
    assert "NOT CAUGHT" in capsys.readouterr().out
