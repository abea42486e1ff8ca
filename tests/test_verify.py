"""The table of --mode=verify: one test for each row of two SDEs, and wrong values make rows fail.

CI runs the command as well, which computes the rows of all SDEs, and compares their number with
``EVERY``.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import (
    bits,
    bound,
    discrete,
    divergence,
    intervals,
    likelihood,
    losses,
    ode,
    second_order,
    times,
)
from sbml.audit.program import continuous, draws, evaluation, integers, oracle
from sbml.audit.program.table import Row, bounding, row
from sbml.dequantizers import DEQUANTIZERS, has_density, truncated_normal, uniform
from sbml.estimators import ode as ode_estimator
from sbml.estimators.base import Target
from sbml.modes import verify
from sbml.sdes import SDE, SDES
from sbml.sdes.linear_beta import VP
from sbml.types import Array, Key

pytestmark = pytest.mark.oracle

OF_THE_PRIOR = [f"prior KL, {kind}" for kind in ("Gaussian", "mixture")]
OF_THE_PROPOSALS = [f"weights of the proposal {name}" for name in times.PROPOSALS]
OF_THE_SCORE = [
    *("one Rademacher probe, diagonal", "four Rademacher probes, correlated"),
    *("ODE log p, Gaussian", "ODE log p, mixture"),
    *(
        f"{name}, {kind}"
        for kind in ("Gaussian", "mixture")
        for name in (
            *("bound, dsm", "bound, ssm", "gap of a wrong score", "epsilon-correction"),
            *("loss of a wrong score, likelihood", "loss of a wrong score, original"),
            *("loss's slope, likelihood", "loss's slope, original"),
        )
    ),
]
OF_INTEGERS = [
    *("uniform, by quadrature", "uniform, by quadrature >= -log P"),
    *(
        f"truncated_normal{noise}, evidence bound{bounding}"
        for noise in ("", " at large noise")
        for bounding in ("", " >= -log P")
    ),
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
NAMES = OF_THE_PRIOR + OF_THE_PROPOSALS + OF_THE_SCORE + OF_INTEGERS
OF_ONE_SDE = [
    "bits of a coded image, and its bound",
    *("points of a lattice", "cells of a lattice", "points with a density"),
    *("truncated_normal, log q, tau=3", "truncated_normal, log q, tau=1"),
    *("noise of two draws", "coverage of the 95% interval of a mean"),
    *(f"loss of {order} order in units of its expectation" for order in ("first", "second")),
    *("Density.logp by Euler's steps", "Density.sample_and_log_prob by Euler's steps"),
    *(f"Density.bound, {term}" for term in ("prior", "diffusion", "reconstruction")),
    *("Density.bits_per_dim", "Density.bits_per_dim, standard error"),
    *("truncated_normal, ODE with 4 draws", "variational, bound_ssm"),
]
CHECKED = ("ve", "vp")
# The noise of VE, of VDM's schedule and of a table of levels is never small enough for this
# correction.
ABSENT = {
    (f"epsilon-correction, {kind}", name)
    for kind in ("Gaussian", "mixture")
    for name in ("ve", "linear_gamma", "beta_schedule")
}
EVERY = set(itertools.product(NAMES, SDES)) - ABSENT
EVERY |= {(name, next(iter(SDES))) for name in OF_ONE_SDE}


@functools.cache
def rows() -> dict[tuple[str, str], Row]:
    """Rows by their names. The tests run in float32; the table sets float64 by itself."""
    results = verify.checks(CHECKED)
    assert len(results) == len({(row.name, row.sde) for row in results})
    return {(row.name, row.sde): row for row in results}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sde"), sorted(pair for pair in EVERY if pair[1] in CHECKED))
def test_row(name: str, sde: str) -> None:
    assert rows()[name, sde].ok, rows()[name, sde]


@pytest.mark.slow
def test_no_row_is_left_out() -> None:
    assert set(rows()) == {pair for pair in EVERY if pair[1] in CHECKED}


@pytest.mark.slow
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
    assert {row.name for row in results if row.ok} == {*OF_THE_PRIOR, *OF_THE_PROPOSALS}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("error", "failing"),
    [
        (0.04, {"log of the mean weight"}),
        (-0.04, {"log of the mean weight", "16 samples >= -log P"}),
    ],
)
def test_a_wrong_log_q_fails(error: float, failing: set[str]) -> None:
    u, log_q = integers.samples(uniform.Model(), {}, integers.images(), jax.random.key(0))
    results = integers.weight_rows("vp", SDES["vp"](), "any", uniform.Model(), u, log_q + error)
    assert {row.name.removeprefix("any, ") for row in results if not row.ok} == failing


@pytest.mark.slow
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


class Mutation(NamedTuple):
    """A formula with an error, and the rows that fail then.

    Attributes:
      patches: the object, the attribute, and a function from its true value to a wrong one.
      rows: a function of the SDE. Each mutation has an SDE of its own, because functions that were
        compiled for the true formula would be used again with the same SDE.
      failing: the names of all rows of ``rows`` that fail.
    """

    patches: list[tuple[Any, str, Callable[[Any], Any]]]
    rows: Callable[[SDE], Iterable[Row]]
    failing: set[str]


def once(rows: Callable[..., Iterable[Row]]) -> Callable[[SDE], Iterable[Row]]:
    return lambda sde: rows("some")


def of(rows: Callable[..., Iterable[Row]]) -> Callable[[SDE], Iterable[Row]]:
    return lambda sde: rows("some", sde)


def after(change: Callable[..., Any]) -> Callable[[Any], Any]:
    """From a function f to the function whose value is ``change(f(*args), *args)``."""
    return lambda true: lambda *args, **kwargs: change(true(*args, **kwargs), *args)


OF_GAUSSIAN: Callable[[SDE], Iterable[Row]] = lambda sde: continuous.bound_rows(  # noqa: E731
    "some", sde, continuous.gaussian_case(sde)
)
ORDERS = [f"loss of {order} order in units of its expectation" for order in ("first", "second")]
PROBES = {"one Rademacher probe, diagonal", "four Rademacher probes, correlated"}
EULER = {"Density.logp by Euler's steps", "Density.sample_and_log_prob by Euler's steps"}
LOG_Q = {"truncated_normal, log q, tau=3", "truncated_normal, log q, tau=1"}
MUTATIONS = {
    "the likelihood weighting, halved": Mutation(
        [
            (
                losses,
                "weight",
                after(lambda w, sde, t, name: w * (0.5 if name == "likelihood" else 1)),
            )
        ],
        OF_GAUSSIAN,
        {"loss of a wrong score, likelihood, Gaussian"},
    ),
    "the likelihood weighting, times the std": Mutation(
        [(losses, "weight", after(lambda w, sde, t, name: w * sde.std(t)))],
        of(draws.loss_rows),
        {*ORDERS},
    ),
    "the importance weight, tilted": Mutation(
        [
            (
                times.Importance,
                "at",
                after(lambda found, self, u: (found[0], found[1] * (1.05 - 0.1 * u))),
            )
        ],
        of(draws.proposal_rows),
        {"weights of the proposal importance"},
    ),
    "the importance weight, times 1.05": Mutation(
        [(times.Importance, "at", after(lambda found, *_: (found[0], 1.05 * found[1])))],
        of(evaluation.bound_rows),
        {"Density.bound, diffusion"},
    ),
    "the sign of the correction": Mutation(
        [
            (
                likelihood,
                "_solve",
                after(lambda found, *_: ((*found[0][:2], -found[0][2]), found[1])),
            )
        ],
        of(evaluation.density_rows),
        EULER,
    ),
    "no correction": Mutation(
        [
            (
                likelihood,
                "_solve",
                after(lambda found, *_: ((*found[0][:2], 0 * found[0][2]), found[1])),
            )
        ],
        of(evaluation.density_rows),
        EULER,
    ),
    "the sign of log q": Mutation(
        [(truncated_normal.Model, "sample", after(lambda found, *_: (found[0], -found[1])))],
        once(draws.density_rows),
        LOG_Q,
    ),
    "the sign of the term dequantization": Mutation(
        [(Target, "sample", after(lambda found, *_: (found[0], -found[1])))],
        of(evaluation.importance_rows),
        {"truncated_normal, ODE with 4 draws"},
    ),
    "no log Z of the truncated normal": Mutation(
        [
            (
                truncated_normal.Model,
                "_log_normaliser",
                lambda true: property(lambda self: math.log(2 * self.tau / math.sqrt(2 * math.pi))),
            )
        ],
        once(draws.density_rows),
        LOG_Q,
    ),
    "no log Z in the bound of the truncated normal": Mutation(
        [
            (
                discrete,
                "edge_constant",
                after(lambda c, sde, eps, tau: c + jnp.log(jax.lax.erf(tau / math.sqrt(2)))),
            )
        ],
        of(integers.truncated_normal_rows),
        {
            "truncated_normal at large noise, evidence bound",
            "truncated_normal at large noise, evidence bound >= -log P",
        },
    ),
    "the probes, summed": Mutation(
        [(divergence.Trace, "combined", lambda true: lambda self, forms: jnp.sum(forms))],
        of(continuous.probe_rows),
        {"four Rademacher probes, correlated"},
    ),
    "the probes of the bound, summed": Mutation(
        [(divergence, "hutchinson", after(lambda found, f, x, vs: (found[0], len(vs) * found[1])))],
        of(continuous.probe_rows),
        {"four Rademacher probes, correlated"},
    ),
    "the weight of warp": Mutation(
        [(times, "warp", after(lambda found, *_: (found[0], jnp.ones_like(found[1]))))],
        once(draws.warp_rows),
        {"points with a density"},
    ),
    "no log K": Mutation(
        [
            (
                ode_estimator,
                "averaged",
                after(
                    lambda terms, each: {**terms, "importance": terms["importance"] - math.log(4)}
                ),
            )
        ],
        of(evaluation.importance_rows),
        {"truncated_normal, ODE with 4 draws"},
    ),
    "a sign of the second order": Mutation(
        [
            (
                second_order,
                "residuals",
                after(lambda r, sde, s, forms, t, z: 2 * sde.std(t) ** 2 * forms - r),
            )
        ],
        of(draws.loss_rows),
        {ORDERS[1]},
    ),
    "no reconstruction": Mutation(
        [(bound, "elbo", after(lambda found, *_: found._replace(reconstruction=jnp.zeros(()))))],
        of(evaluation.bound_rows),
        {"Density.bound, reconstruction"},
    ),
    "the noise of two draws, times sqrt(2)": Mutation(
        [
            (
                intervals,
                "repeated_stderr",
                after(lambda found, *_: (math.sqrt(2) * found[0], found[1])),
            )
        ],
        once(draws.interval_rows),
        {"noise of two draws"},
    ),
    "a shifted lattice": Mutation(
        [
            (
                times,
                "lattice",
                after(lambda u, key, n, draws=1: jnp.minimum(u + 0.5 / u[0].size / n, 1)),
            )
        ],
        once(draws.lattice_rows),
        {"points of a lattice", "cells of a lattice"},
    ),
    "the sign of the drift": Mutation(
        [(SDE, "drift", after(lambda f, *_: -f))], of(continuous.probe_rows), PROBES
    ),
    "g without its square": Mutation(
        [
            (
                ode,
                "velocity",
                lambda true: (
                    lambda score, sde, x, t: sde.drift(x, t) - 0.5 * sde.diffusion(t) * score(x, t)
                ),
            )
        ],
        of(continuous.probe_rows),
        PROBES,
    ),
    "the variance of the prior": Mutation(
        [(SDE, "prior_logp", lambda true: lambda self, z: true(self, 2 * z))],
        of(evaluation.density_rows),
        EULER,
    ),
    "half of the trace": Mutation(
        [(divergence, "quadratic_forms", after(lambda found, *_: (found[0], found[1] / 2)))],
        of(continuous.probe_rows),
        PROBES,
    ),
    "the loss without 1/2": Mutation(
        [(losses, "residual", after(lambda value, *_: 2 * value))],
        of(draws.loss_rows),
        {ORDERS[0]},
    ),
    "the inverse of log-SNR": Mutation(
        [(VP, "time", after(lambda t, *_: 0.99 * t))],
        of(draws.proposal_rows),
        {"weights of the proposal importance", "weights of the proposal velocity"},
    ),
    "the scale of bits/dim": Mutation(
        [
            (
                bits,
                "scale_nats",
                after(lambda nats, shape, levels: nats + math.prod(shape) * math.log(2)),
            )
        ],
        of(evaluation.bits_rows),
        {"Density.bits_per_dim"},
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, rows, failing = MUTATIONS[name]
    for place, attribute, wrong in patches:
        monkeypatch.setattr(place, attribute, wrong(getattr(place, attribute)))
    results = rows(SDES["vp"](beta_max=18.0 + 0.01 * list(MUTATIONS).index(name)))
    assert {row.name for row in results if not row.ok} == failing


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
