"""The comparison of runs: paired differences of the images that both runs have, and the page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import runs
from scipy import stats

from sbml.core.files import json_line, strict
from sbml.program.modes import compare
from sbml.program.report import comparison
from sbml.program.report.comparison import Run
from sbml.program.report.result import read
from sbml.program.runtime.trees import table_crc32, tree_crc32
from sbml.program.runtime.workdir import EVALUATION, PER_IMAGE, QUALITY, SAMPLES, Workdir

IMAGES = {"name": "digits", "split": "test", "count": 50, "shape": [2, 2, 1], "levels": 17}
TRAINING = {"training": {"batch_size": 16}}
# What a comparison does not use.
UNREAD = {"nfe": np.ones(1), "failed": np.zeros(1, bool), "sampler": np.asarray("ode")}
# The bits/dim of each image, nearly the same for all models.
HARDNESS = np.random.default_rng(0).normal(2, 0.5, 50)


def result(bits: np.ndarray, **fields: object) -> dict:
    """A result of 50 images that has converged."""
    return runs.result(bits, split_size=50, **{"converged": True, **fields})


def write(path, ids: np.ndarray, bits: np.ndarray, sha: str = "a", **extra) -> Workdir:
    """An evaluated work directory."""
    workdir = Workdir(path)
    config = {"seed": len(path.name), "model": {"name": "mlp", "width": 32}, **TRAINING}
    about = {"model": {"name": "mlp", "parameters": 8480}}
    about["checkpoint"] = {"step": 40, "parameters_crc32": 7}
    data = {"test": {**IMAGES, "id": sha}}
    results = [result(bits)]
    columns = {"id": ids, "ode_uniform_bits_per_dim": bits}
    if extra.get("few") is not None:  # K = 3 has fewer images, so it has its own table.
        few = extra["few"]
        results.append(result(bits[few] - 0.1, num_importance=3))
        column = {"ode_uniform_k3_bits_per_dim": bits[few] - 0.1}
        workdir.write("per_image_ode_uniform_k3.npz", {"id": ids[few], **column})
    workdir.write(PER_IMAGE, columns)
    evaluation = {"results": results, "data": data, "config": config, "warnings": [], **about}
    workdir.write(EVALUATION, evaluation)
    return workdir


def samples(images: np.ndarray, step: int) -> dict:
    origin = {"step": np.asarray(step), "parameters_crc32": np.asarray(7)}
    return {"images": images, **origin, **UNREAD}


def test_differences_are_computed_from_the_images_that_both_runs_have(tmp_path):
    noise = np.random.default_rng(1).normal(0, 0.02, 50)
    few = np.arange(0, 40, 2)
    first = write(tmp_path / "first", np.arange(50), HARDNESS, few=few)
    second = write(tmp_path / "second", np.arange(10, 50), (HARDNESS + 0.03 + noise)[10:], few=few)
    numbers = comparison.compare([Run.read(first), Run.read(second)])
    assert [cell["name"] for cell in numbers["cells"]] == ["ode uniform", "ode uniform K=3"]
    row = numbers["cells"][0]["rows"][1]
    gap = 0.03 + noise[10:]
    expected = stats.t.interval(0.95, 39, gap.mean(), stats.sem(gap))
    assert row["pairs"] == 40 and row["difference"] == pytest.approx(gap.mean())
    np.testing.assert_allclose(row["difference_interval"], expected)
    assert np.diff(expected) < 0.1 * np.diff(row["interval"])  # This is why runs are paired.
    pairs = numbers["cells"][1]["rows"][1]["pairs"]
    assert pairs == len({*few} & {*(few + 10)})
    assert "difference" not in numbers["cells"][0]["rows"][0]
    assert numbers["lacking"] == {} and row["verdict"] == "worse"
    alone = write(tmp_path / "alone", np.arange(50), HARDNESS)
    evaluated = [Run.read(alone), Run.read(second)]
    numbers = comparison.compare(evaluated)
    assert numbers["lacking"] == {"alone": ["ode uniform K=3"]}
    assert "<b>alone</b> lacks ODE, uniform, K = 3." in comparison.render(evaluated, numbers)


def test_a_plotted_difference_shows_its_verdict_and_interval():
    rows = {"better": (-0.5, [-0.6, -0.4]), "worse": (0.5, [0.4, 0.6]), "unclear": (0.1, [-1, 1.2])}
    for verdict, (gap, ends) in rows.items():
        row = {"run": "b", "difference": gap, "difference_interval": ends, "verdict": verdict}
        drawn = comparison.difference_row(row)
        assert drawn.label == f"b: {verdict}" and (drawn.low, drawn.high) == tuple(ends)


def test_the_page_begins_with_the_verdict_on_the_best_of_the_other_runs(tmp_path):
    noise = np.random.default_rng(1).normal(0, 0.02, 50)
    numbers = {"a": HARDNESS, "b": HARDNESS + 0.03 + noise, "c": HARDNESS + noise - noise.mean()}
    runs = {n: Run.read(write(tmp_path / n, np.arange(50), bits)) for n, bits in numbers.items()}
    of = "bits/dim, 95% interval of the paired difference"
    for names, said in {
        "ab": "<b>a is better than b: by ODE, uniform, b minus a is +0.0",
        "ba": "<b>a is better than b: by ODE, uniform, a minus b is -0.0",
        "ac": "<b>It is unclear whether c is better than a: by ODE, uniform, c minus a is +0.0000 ",
        "bca": "<b>a is better than b, and a is the best of the other 2 runs: by ODE",
    }.items():
        shown = [runs[name] for name in names]
        page = comparison.render(shown, comparison.compare(shown))
        assert said in page and of in page


def test_warnings_of_the_runs_are_on_the_page(tmp_path):
    for name, warnings in (("a", []), ("b", ["two photos <only>", "a sample of 50"])):
        workdir = write(tmp_path / name, np.arange(50), HARDNESS)
        workdir.write(EVALUATION, {**workdir.read(EVALUATION), "warnings": warnings})
    evaluated = [Run.read(Workdir(tmp_path / name)) for name in ("a", "b")]
    numbers = comparison.compare(evaluated)
    assert [run["warnings"] for run in numbers["runs"]] == [[], warnings]
    page = comparison.render(evaluated, numbers)
    assert "b: two photos &lt;only&gt;" in page and "b: a sample of 50" in page
    with pytest.raises(ValueError, match="--runs=a,: one of the names is empty"):
        compare.run(runs="a,")


def test_the_mode_writes_a_page_and_its_numbers(tmp_path, capsys):
    for name in ("a", "bb"):
        workdir = write(tmp_path / name, np.arange(50), HARDNESS)
        images = np.full((5, 2, 2, 1), len(name), np.uint8)
        workdir.write(SAMPLES, samples(images, 40))
        values = {"feature distance": 0.625, f"only of {name}": 3.0}
        workdir.write(QUALITY, {"images_crc32": tree_crc32(images), "values": values})
    compare.run(Workdir(tmp_path / "out"), f"{tmp_path / 'a'},{tmp_path / 'bb'}")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Comparison of a, bb" in page and page.count("data:image/png") == 2
    assert '<th scope="row">seed</th><td>1</td><td>2</td>' in page
    assert "model.width" not in page  # Equal in both.
    assert '<th scope="row">feature distance</th><td>0.625</td><td>0.625</td>' in page
    assert '<th scope="row">only of bb</th><td>–</td><td>3</td>' in page
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers["cells"][0]["rows"][1]["difference"] == 0.0
    out = capsys.readouterr().out
    assert "bits/dim at t=1e-5, +0.0000 [+0.0000, +0.0000], n=50" in out
    assert page.count('<td class="number">1e-5</td>') == 2


def test_samples_of_another_checkpoint_are_not_shown(tmp_path):
    workdir = write(tmp_path / "run", np.arange(50), HARDNESS)
    images = np.zeros((5, 2, 2, 1), np.uint8)
    workdir.write(SAMPLES, samples(images, 39))
    workdir.write(QUALITY, {"images_crc32": tree_crc32(images), "values": {"distance": 0.5}})
    assert Run.read(workdir).samples is None and Run.read(workdir).quality == {}
    workdir.write(SAMPLES, samples(images + 1, 40))
    assert Run.read(workdir).samples.max() == 1 and Run.read(workdir).quality == {}


def test_tables_of_another_evaluation_are_refused_and_seconds_count_to_its_step(tmp_path):
    """The seconds of a run are the training time up to the step of the evaluated checkpoint."""
    few = np.arange(0, 40, 2)
    workdir = write(tmp_path / "run", np.arange(50), HARDNESS, few=few)
    name = "per_image_ode_uniform_k3.npz"
    tables = {n: table_crc32(workdir.read(n)) for n in (PER_IMAGE, name)}
    workdir.write(EVALUATION, {**workdir.read(EVALUATION), "tables": tables})
    rows = [{"step": step, "loss": 1.0, "seconds": 10.0 * step} for step in (20, 40, 60)]
    (workdir / "metrics.jsonl").write_text("".join(map(json_line, rows)))
    assert Run.read(workdir).seconds == 400.0
    workdir.write(name, {**workdir.read(name), "id": few + 1})
    with pytest.raises(ValueError, match="k3.npz is not that of evaluation.json.*evaluate again"):
        Run.read(workdir)


def test_short_names_of_runs_are_unique():
    """Only two paths of the same folder have the same name."""

    def names(*paths: str) -> list[str]:
        return comparison.short_names([Workdir(path) for path in paths])

    assert names("runs/a", "runs/b/", "gs://bucket/runs/c/") == ["a", "b", "c"]
    assert names("x/digits", "y/digits", "x/z") == ["x/digits", "y/digits", "x/z"]
    assert names(".", "../b") == [Path.cwd().name, "b"]
    twice = names("x/a", "./x/a")
    assert twice[0] == twice[1]


def test_what_cannot_be_compared_is_refused(tmp_path):
    first = write(tmp_path / "first", np.arange(50), HARDNESS)
    other = write(tmp_path / "other", np.arange(50), HARDNESS, sha="b")
    with pytest.raises(ValueError, match="other was evaluated on other images than first"):
        comparison.compare([Run.read(first), Run.read(other)])
    with pytest.raises(ValueError, match="two evaluated runs at least"):
        comparison.compare([Run.read(first)])
    with pytest.raises(ValueError, match="two of the runs are the same"):
        comparison.compare([Run.read(first)] * 2)
    with pytest.raises(ValueError, match=r"no evaluation\.json in .*--mode=eval"):
        compare.run(runs=f"{tmp_path / 'first'},{tmp_path}")
    with pytest.raises(ValueError, match="--runs=DIR,DIR"):
        compare.run()
    bound = write(tmp_path / "bound", np.arange(50), HARDNESS)
    content = bound.read(EVALUATION)
    content["results"] = [result(HARDNESS, estimator="bound")]
    bound.write(EVALUATION, content)
    bound.write(PER_IMAGE, {"id": np.arange(50), "bound_uniform_bits_per_dim": HARDNESS})
    with pytest.raises(ValueError, match="no number in common: first has ode uniform; bound has"):
        comparison.compare([Run.read(first), Run.read(bound)])


def test_settings_that_differ_are_shown_as_in_the_file(tmp_path):
    runs = []
    for name, fields in {
        "one": {"shape": [8, 8, 1], "flip": False},
        "other": {"flip": True},
    }.items():
        workdir = write(tmp_path / name, np.arange(50), HARDNESS)
        content = workdir.read(EVALUATION)
        content["config"] = {"data": fields, "seed": 0, **TRAINING}
        workdir.write(EVALUATION, content)
        runs.append(Run.read(workdir))
    assert comparison.differing(runs) == {
        "data.shape": ["[8, 8, 1]", "–"],
        "data.flip": ["false", "true"],
    }


def test_a_result_with_numbers_that_are_not_finite_is_read_back() -> None:
    row = {**result(HARDNESS), "ci95": math.inf, "outliers": [[7, 9.5]]}
    row["terms"] = {"prior": math.nan, "scale": -math.inf}
    found = read(json.loads(json.dumps(strict(row))))
    assert found["ci95"] == math.inf and found["outliers"] == [[7, 9.5]]
    assert math.isnan(found["terms"]["prior"]) and found["terms"]["scale"] == -math.inf
