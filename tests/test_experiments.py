"""The experiments run at a small scale, and their tables say what the reports say."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny

from experiments import samplers, schedule, table2, toy2d
from sbml.core.files import strict
from sbml.density.estimate import Estimate
from sbml.likelihood.ode import Solver
from sbml.networks import mlp
from sbml.statistics.intervals import Interval

FEATURES = '    config.eval.quality.features = "digits_classifier"\n'


def evaluation(
    folder: Path,
    data: str = "tfds:cifar10",
    *,
    interval: float = 0.0125,
    flip: bool = False,
    **results: float,
) -> Path:
    folder.mkdir()
    training = {"likelihood_weighting": True, "importance_sampling": False}
    same = Interval(0.0, interval / 1.96, interval, 10_000, 0)
    rows = []
    for name, value in results.items():
        estimator, dequantizer = name.split("_")
        interval_of = same._replace(mean=value)
        found = Estimate(
            values=np.full(10_000, value),
            terms={"prior": np.full(10_000, value)},
            unit="bits/dim",
            eps=1e-5,
            nfe=np.ones(10_000),
            population=interval_of,
            this_set=interval_of,
            solver_error=interval_of._replace(mean=0.0, ci95=0.0 if value < 3 else 1.0),
            budget=0.1,
            solver=Solver(),
        )
        origin = {"num_importance": 1, "data": data, "split": "test", "split_size": 10_000}
        origin |= {"trace": None, "dequantizer_step": None}
        kind = {"estimator": estimator, "dequantizer": dequantizer}
        rows.append({**kind, **origin, **found.row()})
    report = {
        "title": folder.name,
        "config": {"sde": {"name": "subvp"}, "training": training, "data": {"flip": flip}},
        "results": rows,
        "quality": {"FID n=50000": 2.5},
    }
    (folder / "report.json").write_text(json.dumps(strict(report)))
    return folder


def test_table2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluation(tmp_path / "deep_run", ode_uniform=2.9, bound_variational=3.1)
    other = evaluation(tmp_path / "fashion", "tfds:fashion_mnist", ode_variational=2.0)
    extra = tmp_path / "published.json"
    row = {"data": "tfds:cifar10", "model": "theirs", "sde": "vp", "bound uniform": 3.3}
    extra.write_text(json.dumps([row]))
    table2.main([str(one), str(other)], str(tmp_path / "out" / "table2"), str(extra))
    text = (tmp_path / "out" / "table2.md").read_text()
    assert (
        "| deep_run (LW) | subvp | 2.900 ± 0.013 | — | — | 3.100 ± 0.013 (not converged) "
        "| 2.50 (FID n=50000) | 10000 |" in text
    )
    assert "| best of Song et al. 2021 |  | — | 2.83 | — | — | — |  |" in text
    assert "| theirs | vp | — | — | 3.3 | — | — |  |" in text
    assert text.index("### tfds:cifar10") < text.index("### tfds:fashion_mnist")
    assert "2.83" not in text[text.index("fashion_mnist") :]
    tex = (tmp_path / "out" / "table2.tex").read_text()
    assert r"deep\_run (LW) & subvp & 2.900 $\pm$ 0.013 & -- &" in tex
    assert tex.count(r"\begin{tabular}{llrrrrrr}") == 2
    assert text in capsys.readouterr().out


def test_table2_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    old = evaluation(tmp_path / "old", "imagenet32:old", ode_uniform=3.8)
    new = evaluation(tmp_path / "new", "tfds:imagenet_resized/32x32", ode_uniform=3.5)
    with pytest.raises(ValueError, match="must not be compared"):
        table2.main([str(old), str(new)], str(tmp_path / "t"), None)
    with pytest.raises(ValueError, match="--mode=eval"):
        table2.read(tmp_path)
    path = new / "report.json"
    path.write_text(path.read_text().replace('"split": "test"', '"split": "train"'))
    with pytest.raises(ValueError, match="is of train images.*--config.eval.split=test"):
        table2.read(new)


def test_table2_names_what_it_cannot_read(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a|b_$", ode_uniform=2.9)
    report = json.loads((folder / "report.json").read_text())
    report["results"][0]["bits_per_dim"] = float("nan")
    (folder / "report.json").write_text(json.dumps(strict(report)))
    found = table2.tables([table2.read(folder)], [])
    assert r"| a\|b_$ (LW) | subvp | not finite |" in table2.markdown(found)
    assert r"a|b\_\$ (LW) & subvp & not finite &" in table2.latex(found)
    (folder / "report.json").write_text(json.dumps({**report, "results": []}))
    with pytest.raises(ValueError, match="has no results"):
        table2.read(folder)
    (folder / "report.json").write_text("{")
    with pytest.raises(
        ValueError, match="is not a JSON file .*: check that the whole file was copied"
    ):
        table2.read(folder)
    one_image = evaluation(tmp_path / "one_image", ode_uniform=2.9, interval=np.inf, flip=True)
    row = table2.read(one_image)
    assert row["NLL uniform"] == "2.900" and row["model"] == "one_image (LW + flip)"
    (tmp_path / "p.json").write_text(json.dumps([{"data": "x", "NLL": 3.0}]))
    with pytest.raises(ValueError, match=r"lacks \['model'\] and has the unknown names \['NLL'\]"):
        table2.published_rows(tmp_path / "p.json")


@pytest.mark.parametrize("name", schedule.NAMES)
def test_schedule(name: str) -> None:
    c = schedule.curves(name)
    np.testing.assert_allclose(np.trapezoid(c["density"], c["t"]), 1, rtol=1e-3)
    uniform = c["density"] / c["likelihood"]
    np.testing.assert_allclose(uniform, 1 / (c["log_snr"][0] - c["log_snr"][-1]), rtol=1e-9)


@pytest.mark.slow
def test_toy2d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy2d, "DRAWS", 4)
    smaller = dataclasses.replace(toy2d.ADAPTER, model=mlp.Model(width=32, depth=2))
    monkeypatch.setattr(toy2d, "ADAPTER", smaller)
    rows = toy2d.main(steps=60, points=64, resolution=8, out=str(tmp_path / "toy.png"))
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    first, last = rows[0], rows[-1]
    assert last.step == 60 and last.exact < first.exact - 0.1 and last.bound < first.bound
    # No model has a better mean likelihood than the data's own, up to the noise of 64 points.
    assert all(row.exact > row.data - 0.2 for row in rows)
    assert all(row.bound > row.data - 3 * row.gap_se - 0.2 for row in rows)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_settings_of_a_configs_own_sampler_are_not_those_of_others(name: str) -> None:
    config = tiny.get_config()
    config.sampling.sampler.update(name="ddim", steps=1000, eta=0.5, spacing="log_snr")
    changed = samplers.with_changes(runs.checked(config), samplers.changes(name, 20))
    sampler = changed.sampling.build()
    assert sampler.solver.fixed_steps == 10 if name == "ode_heun" else sampler.nfe == 20


@pytest.mark.slow
def test_samplers(digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sampler of each kind: with noise and a corrector, with neither, and the ODE."""
    few = ("reverse_diffusion_corrected", "dpm_solver", "ode_heun")
    monkeypatch.setattr(samplers, "SAMPLERS", {name: samplers.SAMPLERS[name] for name in few})
    monkeypatch.setattr(samplers, "TOLERANCES", (1e-1,))
    path = tmp_path / "config.py"
    text = Path(tiny.__file__).read_text()
    path.write_text(text.replace("    return config", FEATURES + "    return config"))
    points = samplers.main(str(path), str(digits_model), str(tmp_path / "out"), 30, [4])
    assert {p.name for p in points} == {*samplers.SAMPLERS, "ode", samplers.TEST}
    # Each has the 4 evaluations that were asked for, and one for the final denoising step.
    assert all(p.nfe == 5 for p in points if p.name in samplers.SAMPLERS)
    assert all(p.feature > 0 and p.pixel > 0 for p in points)
    drawn = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert drawn == sorted(["distance.png", *(f"{name}.png" for name in samplers.SAMPLERS)])
