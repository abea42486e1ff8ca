"""The grid of the paper's claim: its runs, the choice of settings, its lines, and its intervals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from experiments import claims, grid, loss_noise
from sbml import losses, sdes
from sbml.program.config.build import Experiment
from sbml.program.modes.train import NonFiniteLoss
from sbml.sdes import SDE, times

STEPS = {"digits": (4, 8)}
SETTINGS = ((1e-3, 1.0), (2e-3, 1.0))


def plan(folder: Path, trainings: tuple[str, ...], seeds: int = 1) -> claims.Plan:
    """A grid of the tiny network of tests."""
    runs = tuple(claims.Run(training=n, seed=s) for s in range(seeds) for n in trainings)
    return claims.Plan(folder / "claims.jsonl", ((runs, ()),), STEPS, SETTINGS, optimizer="adam")


@pytest.fixture(autouse=True)
def tiny_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(claims.DATA, "digits", (tiny.__file__, ""))


def test_trainings_differ_in_their_loss_and_draws_only(tmp_path: Path) -> None:
    def fields(training: str) -> dict:
        config = plan(tmp_path, ()).config(claims.Run(training=training), 8, SETTINGS[0])
        return flatten_dict(Experiment(config).config.plain(), sep=".")

    found = {name: fields(name) for name in claims.TRAININGS}
    changed = [
        {k for k in one if found[a][k] != found[b][k]}
        for (a, one), b in zip(list(found.items())[:-1], list(found)[1:], strict=True)
    ]
    draws = {"training.times", "training.noises", "training.proposal_bins"}
    assert changed == [
        {"training.likelihood_weighting"},
        {"training.importance_sampling"},
        draws,
        {"score.parameterization"},
    ]


def test_the_steps_of_a_run_do_not_depend_on_their_number(tmp_path: Path) -> None:
    """So one run has the numbers of all budgets."""
    two = [plan(tmp_path, ()).config(claims.Run(), steps, SETTINGS[0]) for steps in (4, 8)]
    rates = [Experiment(config).config.optim.rate(config.training.num_steps) for config in two]
    assert [float(rates[0](n)) for n in range(8)] == [float(rates[1](n)) for n in range(8)]
    two[1].training.num_steps = 4
    assert grid.identity(two[0]) == grid.identity(two[1])


def test_the_whole_grid_begins_with_the_choices_and_has_every_axis(tmp_path: Path) -> None:
    found = tuple(claims.groups(tuple(claims.TRAININGS), 3))
    runs = {run for group, _ in found for run in group}
    for axis, values in (
        ("data", claims.DATA),
        ("process", claims.PROCESSES),
        ("network", claims.NETWORKS),
        ("training", claims.TRAININGS),
        ("seed", range(3)),
    ):
        assert {getattr(run, axis) for run in runs} == set(values)
    assert all(run._replace(training="original") in runs for run in runs)


def test_one_noise_for_all_processes(tmp_path: Path) -> None:
    for process in claims.PROCESSES:
        config = plan(tmp_path, ()).config(claims.Run(process=process), 8, SETTINGS[0])
        config = claims.with_measure(plan(tmp_path, ()), config, "ode_same_noise")
        experiment = Experiment(config)
        sde, t = experiment.sde, np.float32(experiment.eval_eps)
        np.testing.assert_allclose(sde.std(t) / sde.mean_coef(t), claims.SAME_NOISE, rtol=1e-4)


def test_the_best_setting_is_used_and_nothing_is_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake training whose number is 2 + 1000 lr / steps + seed / 100, and .5 more with likelihood
    weighting. With that weighting, 8 steps fail."""
    done = []

    def fit(plan, config, workdir):
        steps = config.training.num_steps
        done.append((config.optim.lr, steps, config.eval.split))
        weighted = config.training.likelihood_weighting
        if weighted and not config.training.importance_sampling and steps == 8:
            raise NonFiniteLoss("step 7: loss nan")
        return 0.25

    def measured(plan, config, workdir, measure):
        value = 2 + 1000 * config.optim.lr / config.training.num_steps + 0.01 * config.seed
        return {"values": [value + 0.5 * config.training.likelihood_weighting] * 3}

    monkeypatch.setattr(claims, "fit", fit)
    monkeypatch.setattr(claims, "measured", measured)
    monkeypatch.setattr(loss_noise, "draw", lambda path: path.touch())
    of = plan(tmp_path, ("original", "weighted"), seeds=2)
    with pytest.raises(grid.BusyError):
        claims.choose(of, claims.Run())
    grid.shared(claims.tasks(of), pause=0.0)
    assert claims.choose(of, claims.Run()) == SETTINGS[0]
    assert {split for lr, _, split in done if lr == SETTINGS[1][0]} == {"validation"}
    count = len(done)
    grid.shared(claims.tasks(of), pause=0.0)
    assert len(done) == count
    forest = {"id": "forest", "measure": "exact", "data": "digits", "network": "forest"}
    forest |= {"process": "", "training": "autoregressive", "seed": 0, "split": "test"}
    grid.append(of.out, {**forest, "steps": 0, "optimizer": "", "values": [1.0, 2.0, 3.0]})
    claims.write(of)
    rows = json.loads((tmp_path / "claims.json").read_text())
    places = {(row["training"], row["steps"]) for row in rows}
    assert places == {("original", 4), ("original", 8), ("weighted", 4)}
    row = next(r for r in rows if r["training"] == "weighted" and r["measure"] == "ode")
    assert row["seeds"] == [0, 1] and row["mean"] == pytest.approx(2.755)
    assert (row["difference"], row["difference_ci95"]) == pytest.approx((0.5, 0.0))
    text = (tmp_path / "claims.md").read_text()
    assert "| DDPM++, weighted, 4 steps | vp | 2.755 ±" in text
    assert "| weighted | vp | DDPM++ | 4 | +0.500 ± 0.000 | +0.500 ± 0.000 | —" in text
    assert "| forest | 2.000 ±" in text and "| forest |  | DDPM++, weighted, vp, 4, ode |" in text
    assert (tmp_path / "claims.tex").exists() and (tmp_path / "claims.png").exists()
    assert (tmp_path / "claims_noise.png").exists()


def test_other_numbers_do_not_change_the_number_of_seeds_and_images() -> None:
    row = {"data": "digits", "process": "vp", "network": "DDPM++", "training": "original"}
    row |= {"steps": 8, "seeds": [0], "ci95": 0.1}
    ode = {**row, "measure": "ode", "mean": 2.0, "images": 72, "seeds": [0, 1]}
    others = [(claims.FEATURES, 1), ("ode_same_noise", 72)]
    rest = [{**row, "measure": name, "mean": 1.5, "images": images} for name, images in others]
    _, shown = claims.tables([ode, *rest])["digits"]
    assert shown[2] == "2.000 ± 0.100" and shown[-2:] == ["1.500 ± 0.100", "2 seeds x 72"]


def test_equal_time_is_that_of_the_cheapest_training(tmp_path: Path) -> None:
    """The integer denoiser costs 1.5 times as much: it makes 8 / 1.5 steps in the time of 8. The
    first measurement of a cost has the compilation too."""
    of = plan(tmp_path, ("original", "levels"), seeds=2)
    values = {("original", 4): 3.0, ("original", 8): 2.5, ("levels", 4): 2.0, ("levels", 8): 1.5}
    for (training, steps), value in values.items():
        for seed in range(2):
            about = {**claims.Run(training=training, seed=seed)._asdict(), "steps": steps}
            about |= {"split": "test", "optimizer": "adam"}
            cost = (0.3 if training == "levels" else 0.2) + (1.0 if steps == 4 else 0.0)
            training_line = {"measure": "training", "cpu_per_step": cost}
            images = [value, value + 1.0 + 0.1 * seed]
            for line in (training_line, {"measure": "ode", "values": images}):
                name = f"{line['measure']} {training} {steps} {seed}"
                grid.append(of.out, {"id": name, **about, **line})
    found = claims.equal_time(of, claims.gathered(of))
    _, original, levels = found["digits, at equal time"]
    assert original[3:6] == ["0.200", "2", "8"] and levels[3:6] == ["0.300", "2", "5"]
    assert original[6].startswith("3.025 ±") and original[7:] == ["—", "—", "—", "2"]
    part = np.log(8 / 1.5 / 4) / np.log(2)
    assert levels[7].startswith(f"{2 - 0.5 * part - 2.5:+.3f} ±")


def test_the_interval_covers_other_seeds_and_other_images() -> None:
    """Crossed effects with known variances: the interval has at least its coverage, and is not much
    wider than it must be."""
    rng, hits, widths = np.random.default_rng(0), [], []
    for _ in range(400):
        seed, image = rng.normal(0, 0.02, (3, 1)), rng.normal(0, 0.3, (1, 100))
        found = claims.interval(seed + image + rng.normal(0, 0.1, (3, 100)))
        hits.append(abs(found.mean) < found.ci95)
        widths.append(found.stderr**2)
    assert np.mean(hits) > 0.93
    truth = 0.02**2 / 3 + 0.3**2 / 100 + 0.1**2 / 300
    assert truth < np.mean(widths) < 1.2 * truth
    one = claims.interval(np.array([[1.0, 2.0, 3.0]]))
    assert one.mean == 2 and one.ci95 == pytest.approx(4.302653 / np.sqrt(3))


VARIANCES = np.array([1.0, 0.1, 0.01])


@pytest.mark.parametrize(("training", "sde"), [("original", sdes.VP()), ("importance", sdes.VP())])
def test_the_noise_of_the_loss_is_that_of_draws(training: str, sde: SDE) -> None:
    """Losses of the exact score of Gaussian data at random times, and their mean and deviation."""
    found = loss_noise.noise(sde, 1e-2, VARIANCES, training)
    weighting, proposal = loss_noise.TRAININGS[training]
    variances, keys = jnp.asarray(VARIANCES), jax.random.split(jax.random.key(0), 40_000)
    t, weight = proposal(sde, 1e-2).at(times.iid(jax.random.key(1), len(keys))[:, 0])

    @jax.jit
    @jax.vmap
    def drawn(key, t):
        x = jnp.sqrt(variances) * jax.random.normal(key, (3,))

        def score(x, t, key):
            return -x / (sde.mean_coef(t) ** 2 * variances + sde.std(t) ** 2)

        return losses.dsm(score, sde, x, t, jax.random.fold_in(key, 1), weighting=weighting)

    values = np.asarray(weight * drawn(keys, t))
    np.testing.assert_allclose(values.mean(), found.mean, rtol=0.03)
    np.testing.assert_allclose(values.std() / values.mean(), found.relative, rtol=0.03)


def test_importance_sampling_keeps_the_mean_and_ve_has_one_training() -> None:
    vp, ve = (
        {name: loss_noise.noise(sde, 1e-3, VARIANCES, name) for name in loss_noise.TRAININGS}
        for sde in (sdes.VP(), sdes.VE())
    )
    assert vp["weighted"].mean == pytest.approx(vp["importance"].mean, rel=1e-4)
    assert vp["weighted"].relative > 3 * vp["importance"].relative
    for found in ve.values():
        np.testing.assert_allclose(found.rms, ve["original"].rms, rtol=1e-6)


@pytest.mark.slow
def test_the_figure_of_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss_noise.draw(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 10_000
    assert len(capsys.readouterr().out.splitlines()) == 3 * 3 + 1


@pytest.mark.slow
def test_the_numbers_of_a_short_budget_are_those_of_a_run_that_ends_there(tmp_path: Path) -> None:
    of = plan(tmp_path, ("original",))
    grid.shared(claims.tasks(of), pause=0.0)
    lines = list(grid.read(of.out).values())
    setting = claims.choose(of, claims.Run())
    config = of.config(claims.Run(), 4, setting)
    workdir = claims.Workdir(tmp_path / "alone")
    claims.fit(of, config, workdir)
    alone = claims.measured(of, config, workdir, "ode")
    place = {"measure": "ode", "split": "test", "steps": 4}
    (stored,) = [line for line in lines if place.items() <= line.items()]
    assert stored["values"] == alone["values"] and len(alone["values"]) == 360
