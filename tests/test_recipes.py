"""The search for recipes: their changes, pairs of equal seeds, and which runs are repeated."""

import pathlib

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from recipe_table import difference, table
from scipy import stats

from benchmarks import recipes
from experiments import grid
from sbml.program.config import build
from sbml.program.config.config import default
from sbml.program.runtime import metrics


def plan(tmp_path: pathlib.Path) -> recipes.Plan:
    def config(steps: int) -> ConfigDict:
        return recipes.with_steps(tiny.get_config(), steps)

    return recipes.Plan(config, 40, tmp_path / "deep" / "rows.jsonl")


def test_a_recipe_changes_its_fields_and_no_other() -> None:
    config = default()
    found = recipes.with_recipe(
        config, "levels+centre+model.nf=8+model.ch_mult=(1,2)+optim.ema=0.5"
    )
    expected = config.copy_and_resolve_references()
    expected.score.parameterization, expected.data.dequantization = "levels", "centre"
    expected.model.update(nf=8, ch_mult=(1, 2))
    expected.optim.ema = 0.5
    assert found.to_json(sort_keys=True) == expected.to_json(sort_keys=True)
    assert recipes.with_recipe(config, "").to_dict() == config.to_dict() == default().to_dict()


def test_every_recipe_makes_an_experiment() -> None:
    for name in grid.RECIPES:
        config = default()
        config.data.validation = 0.1
        build.Experiment(recipes.with_recipe(config, name))
    # The size of VDM's network follows from that of the network that it replaces.
    config = default()
    config.model.update(nf=32, ch_mult=(1, 2), num_res_blocks=2, dropout=0.25, fourier=(4.0,))
    model = recipes.with_recipe(config, "vdm+model.groups=8").model
    assert (model.name, model.width, model.depth, model.groups) == ("vdm", 48, 8, 8)
    assert (model.dropout, model.fourier) == (0.25, (4.0,))
    # A part changes what the parts before it have made.
    model = recipes.with_recipe(config, "model.nf=64+fourier+model.dropout=0.5+vdm").model
    assert (model.width, model.dropout) == (96, 0.5)
    assert model.fourier == recipes.with_recipe(config, "fourier").model.fourier != (4.0,)


def test_commas_in_a_tuple_do_not_separate_recipes() -> None:
    names = recipes.names_in("centre+model.ch_mult=(1,2),noise,model.fourier=(8.5,17.0)")
    assert names == ["centre+model.ch_mult=(1,2)", "noise", "model.fourier=(8.5,17.0)"]
    assert recipes.with_recipe(default(), names[0]).model.ch_mult == (1, 2)


def test_runs_without_a_column_or_seed_are_refused(tmp_path: pathlib.Path) -> None:
    recipes.check_recipes(plan(tmp_path), ["", "centre"])
    with pytest.raises(ValueError, match="data.dequantization=none has no column"):
        recipes.check_recipes(plan(tmp_path), ["data.dequantization=none"])
    assert recipes.seeds("0,12") == [0, 12]
    with pytest.raises(ValueError, match=r"--seeds=0,a: 'a' is no integer"):
        recipes.seeds("0,a")


def line(seed: int, **values: list[float]) -> dict:
    return {"seed": seed, "steps": 7, "bits_per_dim": values}


def test_differences_are_paired_by_seed() -> None:
    """The interval is Student's of the differences of the seeds' means."""
    rng = np.random.default_rng(0)
    seeds, images = rng.normal(2, 1, 3), rng.normal(size=5)
    base = seeds[:, None] + images
    other = base - 0.1 + 0.01 * rng.normal(size=(3, 5))
    gap = (other - base).mean(1)
    half = stats.t.ppf(0.975, 2) * gap.std(ddof=1) / np.sqrt(3)
    text = difference(other, base)
    assert text == f"{other.mean():.4f} ({gap.mean():+.4f} ± {half:.4f})"
    rows = {
        "": [line(i, ode_uniform=v.tolist(), bound_uniform=[9.0] * 5) for i, v in enumerate(base)],
        "b": [
            line(i, bound_learned=v.tolist(), ode_uniform=[8.0] * 5) for i, v in enumerate(other)
        ],
        "c": [line(0, ode_uniform=[1.0] * 5), {"seed": 1, "steps": 7, "failed": "inf"}],
    }
    head, _, first, second, third = table(rows).splitlines()
    assert head == "| recipe | steps | ode_uniform | bound_uniform | bound_learned | best |"
    zero = f"{base.mean():.4f} (+0.0000 ± 0.0000)"
    assert first == f"| base | 7 | {zero} | 9.0000 (+0.0000 ± 0.0000) |  | {zero} |"
    # The base has no bound_learned, so that of ``b`` is compared with the best column of the base.
    cells = [cell.strip() for cell in second.strip("|").split("|")]
    assert cells[:2] == ["b", "7"] and cells[3:] == ["", text, text]
    assert cells[2].startswith(f"8.0000 (+{8 - base.mean():.4f} ± ")
    assert third == "| c | 7 | 1 failed | | | |"
    with pytest.raises(ValueError, match="the base failed.*inf"):
        table({"": rows["c"]})


def test_the_ratio_of_step_times_is_measured_in_turns(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        """A step of the wide network takes 2.5 times as long; both are slower in some rounds."""

        rounds = 0

        def __init__(self, config) -> None:
            self.cost = 2.5 if config.model.width == 64 else 1.0

        def seconds(self, steps: int) -> float:
            slower = 1 + Fake.rounds // 2 % 3
            Fake.rounds += 1
            return self.cost * slower

    monkeypatch.setattr(recipes, "Steps", Fake)
    found = recipes.time_steps(plan(tmp_path), "model.width=64")
    assert found["ratio"] == pytest.approx(2.5)
    done = Fake.rounds
    assert recipes.time_steps(plan(tmp_path), "model.width=64") == found and Fake.rounds == done


def test_an_average_and_a_warmup_suit_the_steps_of_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe whose steps take longer has fewer of them at equal time."""
    settings = []
    monkeypatch.setattr(
        recipes.train,
        "run",
        lambda e, workdir: settings.append((e.config.optim.warmup, e.config.optim.ema)),
    )
    monkeypatch.setattr(recipes, "evaluate_run", lambda config, workdir: {"ode_uniform": [1.5]})
    for steps in (400, 40, 20):
        recipes.train_and_evaluate(plan(tmp_path), "", 0, steps)
    assert settings == [(10, 0.9), (4, 1 - 6.5 / 40), (2, 1 - 6.5 / 20)]
    recipes.train_and_evaluate(plan(tmp_path), "optim.ema=0.99+optim.warmup=7", 0, 20)
    assert settings[-1] == (7, 0.99)  # A recipe that sets them keeps its values.


def test_a_result_is_reused_only_for_the_same_first_steps(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps depend on the number of all steps, because the learning rate does."""
    begun = []
    monkeypatch.setattr(
        recipes, "copy_start", lambda plan, *_: begun.append(plan.start + plan.steps)
    )
    monkeypatch.setattr(recipes.train, "run", lambda config, workdir: None)
    monkeypatch.setattr(recipes, "evaluate_run", lambda config, workdir: {"ode_uniform": [1.5]})
    for steps in (2, 3, 2):
        later = plan(tmp_path)._replace(start=4, steps=steps)
        recipes.train_and_evaluate(later, "", 0, 3)
    assert begun == [6, 7]


@pytest.mark.slow
def test_runs_begin_with_the_training_of_the_base(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each seed the base is trained once. A recipe continues from the base's first steps. If it
    changes nothing, its losses are those of the base, bit by bit."""
    monkeypatch.setattr(recipes, "evaluate_run", lambda config, workdir: metrics.read(workdir.path))
    later = plan(tmp_path)._replace(start=4, steps=2)
    same = recipes.train_and_evaluate(later, "", 7, 2)["bits_per_dim"]
    other = recipes.train_and_evaluate(later, "training.times=iid", 7, 3)["bits_per_dim"]
    (whole,) = (metrics.read(path) for path in later.out.with_suffix("").glob("base_*"))
    losses = [[row["loss"] for row in rows] for rows in (whole, same, other)]
    assert losses[0] == losses[1] and len(losses[2]) == 7
    assert losses[2][:4] == losses[0][:4] and losses[2][4] != losses[0][4]


def test_a_recipe_that_cannot_continue_is_refused_before_any_training(
    tmp_path: pathlib.Path,
) -> None:
    later = plan(tmp_path)._replace(start=4)
    recipes.check_recipes(later, ["", "optim.lr=1e-3"])
    with pytest.raises(ValueError, match="model.width is 64, the checkpoint's is 32"):
        recipes.check_recipes(later, ["", "model.width=64"])
    recipes.check_recipes(plan(tmp_path), ["model.width=64"])


def test_an_unknown_budget_is_refused() -> None:
    assert recipes.budgets("time,evaluations") == ["time", "evaluations"]
    with pytest.raises(ValueError, match="--budgets=Time: no budget.*give evaluations or time"):
        recipes.budgets("Time")


def test_finished_runs_are_not_repeated(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run writes a line. After a kill while a line is written, only this run is repeated."""
    runs = []

    def run(experiment, workdir) -> None:
        config, width = experiment.config, experiment.config.model.own["width"]
        runs.append((config.seed, config.training.num_steps, width))
        if width == 64:
            raise recipes.train.NonFiniteLoss("step 3: loss inf")

    monkeypatch.setattr(recipes.train, "run", run)
    monkeypatch.setattr(recipes, "evaluate_run", lambda config, workdir: {"ode_uniform": [1.5]})
    rows = [recipes.train_and_evaluate(plan(tmp_path), "", seed, 40) for seed in (0, 1)]
    assert rows[0]["bits_per_dim"] == {"ode_uniform": [1.5]} and rows[0]["id"] != rows[1]["id"]
    failed = recipes.train_and_evaluate(plan(tmp_path), "model.width=64", 0, 40)
    assert "loss inf" in failed["failed"]
    assert runs == [(0, 40, 32), (1, 40, 32), (0, 40, 64)]
    again = [recipes.train_and_evaluate(plan(tmp_path), "", seed, 40) for seed in (0, 1)]
    assert again == rows and len(runs) == 3
    out = plan(tmp_path).out
    out.write_text(out.read_text()[:-10])  # The last line is cut off.
    recipes.train_and_evaluate(plan(tmp_path), "model.width=64", 0, 40)
    assert len(runs) == 4 and len(grid.read(out)) == 3
    recipes.train_and_evaluate(plan(tmp_path), "", 0, 41)
    assert len(runs) == 5 and len(grid.read(out)) == 4
