"""An evaluation counts every image once, does not depend on batches, and resumes after a kill."""

import dataclasses
import json
import math
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
import tiny
from cell_runs import BOUND, ODE, cell_run, numbers
from scipy import stats

from experiments import table2
from sbml import data
from sbml.core.files import read_json, read_npz, write_json, write_npz
from sbml.density.estimate import Estimate
from sbml.density.estimators import Cell, ode
from sbml.density.estimators import bound as bounds
from sbml.likelihood import bound
from sbml.likelihood.ode import Solver
from sbml.program.config import build
from sbml.program.evaluation import baselines
from sbml.program.evaluation.cells import Dequantization, check_first_batch
from sbml.program.evaluation.table import cautions, contradictions, remark
from sbml.program.modes import eval as evaluate
from sbml.program.modes import report as report_mode
from sbml.program.report import summary
from sbml.program.runtime import history, metrics
from sbml.program.runtime.trees import tree_crc32
from sbml.program.runtime.workdir import (
    EVALUATION,
    NEIGHBOURS,
    PER_IMAGE,
    QUALITY,
    SAMPLES,
    Workdir,
)
from sbml.statistics.intervals import mean_interval


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory after all three modes."""
    workdir = tmp_path_factory.mktemp("trained")
    runs.run(workdir)
    return workdir


@pytest.fixture(scope="module")
def table(trained):
    return read_npz(trained / PER_IMAGE)


def test_every_image_counts_once(trained, table):
    report = json.loads((trained / "report.json").read_text())
    np.testing.assert_array_equal(table["id"], np.arange(360))
    for result, name in zip(report["results"], ("ode", "bound"), strict=True):
        assert (result["estimator"], result["n"]) == (name, 360)
        assert result["bits_per_dim"] == pytest.approx(table[f"{name}_uniform_bits_per_dim"].mean())
    assert report["samples"]["count"] == 4
    pixels, train = (data.load("digits", split).images for split in ("test", "train"))
    simple, _ = baselines.all_of(train, pixels, 17)
    for row in report["baselines"]:
        gap = table["ode_uniform_bits_per_dim"] - simple[row["name"]]
        expected = stats.t.interval(0.95, 359, gap.mean(), stats.sem(gap))
        np.testing.assert_allclose(row["difference_interval"], expected)
    assert report["data"]["test"]["count"] == 360


@pytest.mark.slow
def test_the_gap_to_training_images_is_in_the_report(trained, tmp_path):
    """And so is the loss at each noise level, whose integral is the diffusion term."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    config = tiny.get_config()
    config.eval.update(max_images=40, estimators=("bound",))
    config.eval.bound.update(sweeps=2, level_images=64)
    config.eval.bound.proposal_bins = 0
    runs.mode(evaluate.run, config, tmp_path)
    before = read_json(tmp_path / EVALUATION)
    assert (
        "--config.eval.split=train --config.eval.max_images=40"
        in (json.loads((tmp_path / "report.json").read_text())["gap"]["command"])
    )
    levels, width = before["noise_levels"], -np.diff(before["noise_levels"]["edges"])
    stderr = np.sqrt(np.sum((width * levels["split_stderr"]) ** 2))
    diffusion = before["results"][0]["terms"]["diffusion"]
    assert width.min() > 0 and abs(width @ levels["split"] - diffusion) < 5 * stderr < 1.5
    below = np.array(levels["floor"]) - levels["train"]
    assert np.all(below < 3 * np.array(levels["train_stderr"])) and width @ below < 0
    assert levels["images"] == 40  # of 64 allowed ones, because there are no more test images
    config.eval.update(split="train", max_images=30)
    config.eval.bound.level_images = 0
    runs.mode(evaluate.run, config, tmp_path)
    assert read_json(tmp_path / EVALUATION) == before
    (row,) = json.loads((tmp_path / "report.json").read_text())["gap"]["rows"]
    both = [read_npz(folder / PER_IMAGE) for folder in (tmp_path, tmp_path / "train")]
    expected = stats.ttest_ind(*(t["bound_uniform_bits_per_dim"] for t in both), equal_var=False)
    np.testing.assert_allclose(row["interval"], expected.confidence_interval(0.95))
    assert (row["held_out_images"], row["train_images"]) == (40, 30)
    noted = [(row["mode"], row["split"]) for row in metrics.read(tmp_path, history.FILE)]
    assert noted == [("eval", "test"), ("eval", "train")]


def test_the_report_says_what_code_made_it_and_what_it_cost(trained):
    found = json.loads((trained / "report.json").read_text())["provenance"]
    assert found["training"]["network evaluations"].startswith("2,560")
    for made in found.values():
        assert made["code"].startswith("sbml ") and "CPU-hours" in made["cost"]
        assert (made["code"], made["hardware"]) == tuple(history.origin().values())[:2]


@pytest.mark.parametrize("cell", [ODE, BOUND], ids=lambda c: c.name)
def test_terms_add_up(table, cell):
    """The terms in the file add up to the total; ``test_estimators`` tests the terms themselves."""
    total = sum(table[f"{cell.name}_{term}"] for term in cell.kind.terms)
    np.testing.assert_allclose(total, table[f"{cell.name}_bits_per_dim"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(table[f"{cell.name}_scale"], math.log2(17 / 2))


def test_evaluations_of_all_sweeps_count(table):
    """Eight sweeps of two times, and one for the reconstruction in each."""
    np.testing.assert_array_equal(table["bound_uniform_nfe"], 8 * (2 + 1))


@pytest.mark.slow
def test_bound_without_control_or_lattice_has_the_same_mean(trained, table, tmp_path):
    """Independent times and no control variate estimate the same expectation, less precisely."""
    bound = {"control": False, "proposal_bins": 0, "times": "iid", "n_times": 64}
    run = cell_run(trained, tmp_path, BOUND, seed=1, bound=bound)
    gap = numbers(run, np.arange(360), 0) - table["bound_uniform_bits_per_dim"]
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))
    assert abs(gap.mean()) < 0.1


@pytest.mark.slow
def test_eight_devices_change_nothing(trained, table, tmp_path):
    """Nor do batches of 100 in place of 120, the last of which is padded."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    runs.run(tmp_path, "--mode=eval", "--config.eval.batch_size=100", devices=8)
    got = read_npz(tmp_path / PER_IMAGE)
    np.testing.assert_array_equal(got["id"], np.arange(360))
    for column in ("ode_uniform_bits_per_dim", "bound_uniform_bits_per_dim"):
        np.testing.assert_allclose(got[column], table[column], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_killed_evaluation_ends_in_the_same_bytes(trained, tmp_path):
    """Ctrl-C ends one evaluation after a batch, and SIGKILL another, which is then continued."""

    def parts():
        return sorted((workdir / "eval").glob("*/part_*.npz"))

    for number in (signal.SIGINT, signal.SIGKILL):
        workdir = tmp_path / number.name
        workdir.mkdir()
        (workdir / "checkpoints").symlink_to(trained / "checkpoints")
        process = runs.start(workdir, "--mode=eval")
        while process.poll() is None and not parts():
            time.sleep(0.003)
        process.send_signal(number)
        err = process.communicate()[1]
        if number == signal.SIGINT:
            assert process.returncode == 130 and "Traceback" not in err, err
            assert "SIGINT: the images so far are stored; the same command continues" in err
    before = {path: path.stat().st_mtime_ns for path in parts()}
    assert 0 < len(before) < 20
    runs.run(workdir, "--mode=eval", config=None)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    assert (workdir / PER_IMAGE).read_bytes() == (trained / PER_IMAGE).read_bytes()
    written = [read_json(path / EVALUATION) for path in (workdir, trained)]
    for report in written:
        del report["title"], report["command"]  # They name the work directory.
    assert written[0] == written[1]


def test_rows_of_another_version_are_used_with_a_warning(trained, tmp_path):
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    shutil.copytree(trained / "eval", tmp_path / "eval")
    for path in tmp_path.glob("eval/*/versions_*.json"):
        write_json(path, {**read_json(path), "jax": "0.1"})
    runs.run(tmp_path, "--mode=eval")
    assert (tmp_path / PER_IMAGE).read_bytes() == (trained / PER_IMAGE).read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    phrase = f"some of the rows with other versions: jax 0.1, now {jax.__version__} ("
    found = [w.split(":")[0] for w in report["warnings"] if phrase in w]
    assert found == ["ode uniform", "bound uniform"]


@pytest.mark.parametrize(
    ("name", "trained_on", "eps", "phrase"),
    [
        ("truncated_normal", "uniform", None, "around bin centres"),
        ("uniform", "centre", None, "in the whole bins"),
        ("uniform", "centre", 0.013, "in the whole bins"),
        ("uniform", "centre", 0.015, ""),  # The standard deviation 0.061 is more than half a bin.
        ("uniform", "uniform", None, ""),
        ("truncated_normal", "centre", None, ""),
    ],
)
def test_a_dequantizer_that_does_not_fit_the_training_gives_a_warning(
    trained, tmp_path, name, trained_on, eps, phrase
):
    shared = cell_run(trained, tmp_path, ODE, smallest_time=eps).evaluation
    shared.trained.restored.metadata["config"]["data"]["dequantization"] = trained_on
    dequantizer = Dequantization(shared.experiment.dequantizer(name), {})
    warnings = [w for w in cautions(shared, {name: dequantizer}) if w.startswith(name)]
    assert [phrase in w for w in warnings] == ([True] if phrase else [])


@pytest.mark.parametrize(("above", "said"), [(0.3, 1), (0.05, 0), (-0.3, 0), (-0.5, 1)])
def test_a_bound_far_from_the_ode_gives_a_warning(above, said):
    """The noise of the images is common to both, so the difference is paired."""
    bound = np.random.default_rng(0).normal(3, 1, 50)
    ids = SimpleNamespace(ids=np.arange(50))
    usual = mean_interval(bound)
    numbers = [
        Estimate(bound + more, {}, "bits/dim", 1e-3, bound, usual, usual, solver=solver)
        for more, solver in ((above, Solver()), (0.0, None))
    ]
    kinds = ((ODE, ode.Estimator), (BOUND, bounds.Estimator))
    found = contradictions(
        [
            SimpleNamespace(
                cell=cell,
                measurement=SimpleNamespace(**vars(ids), estimator=kind()),
                number=number,
            )
            for (cell, kind), number in zip(kinds, numbers, strict=True)
        ]
    )
    larger = "number of the ODE" if above > 0 else "bound"
    start = f"ode uniform against bound uniform: the {larger} is {abs(above):.3f} +- "
    assert [each.startswith(start) for each in found] == [True] * said


def test_files_that_are_not_used_are_named_once_for_each_split(trained, tmp_path):
    shared = cell_run(trained, tmp_path, ODE).evaluation
    train = dataclasses.replace(shared.experiment.images("train"), skipped=("a.png: cut off",))
    test = dataclasses.replace(train, split="test", skipped=("b.png: empty", "c.png: empty"))
    of_train = "1 train file is not used: a.png: cut off"
    of_test = "2 test files are not used: b.png: empty; c.png: empty"
    for images, expected in ((train, [of_train]), (test, [of_test, of_train])):
        warnings = cautions(dataclasses.replace(shared, images=images, train=train), {})
        assert [w for w in warnings if ".png" in w] == expected


def test_chosen_images_are_a_remark_and_no_warning(trained, tmp_path):
    for count, said in ((72, "a random sample of 72 of 360 images (eval.max_images)"), (0, "")):
        shared = cell_run(trained, tmp_path, ODE, max_images=count).evaluation
        assert remark(shared) == said
        assert not [w for w in cautions(shared, {}) if "max_images" in w]


def test_evaluated_images_that_the_training_had_give_a_warning(trained, tmp_path):
    shared = cell_run(trained, tmp_path, ODE).evaluation
    pixels, train = shared.images.images.copy(), shared.train.images
    for count in (0, 2):
        pixels[:count] = train[7]
        images = dataclasses.replace(shared.images, array=pixels)
        warnings = cautions(dataclasses.replace(shared, images=images), {})
        found = [w for w in warnings if "among those of the training" in w]
        assert [w.split(" are ")[0] for w in found] == [f"2 of {len(images)} images (test)"][:count]


def test_rows_of_other_terms_are_not_taken(trained, tmp_path, monkeypatch):
    ids = np.arange(2)
    fresh = cell_run(trained, tmp_path / "fresh", ODE).measurement.rows(ids)
    with monkeypatch.context() as older:
        terms = tuple(name for name in ODE.kind.terms if name != "correction")
        older.setattr(ODE.kind, "terms", terms)
        kept = cell_run(trained, tmp_path / "rows", ODE).measurement.rows(ids)
    assert "correction" not in kept
    again = cell_run(trained, tmp_path / "rows", ODE).measurement.rows(ids)
    np.testing.assert_array_equal(again["correction"], fresh["correction"])


def test_the_config_chooses_the_distribution_of_times(trained, tmp_path):
    """``test_bound`` and ``test_times`` show that each leaves the expectation as it is."""
    for fields, proposal in (
        ({}, "importance"),
        ({"importance_sampling": False}, "uniform"),
    ):
        bound = {"control": False, "proposal_bins": 0, **fields}
        run = cell_run(trained, tmp_path, BOUND, bound=bound)
        assert run.measurement.estimator.reduction.proposal == proposal
    with pytest.raises(
        ValueError, match="importance_sampling=False with eval.bound.proposal_bins=32"
    ):
        cell_run(trained, tmp_path, BOUND, bound={"importance_sampling": False})


def test_fewer_images_are_a_random_sample_and_part_of_any_larger_one(trained, tmp_path):
    def ids(count, cell=ODE, **fields):
        return cell_run(trained, tmp_path, cell, max_images=count, **fields).measurement.ids

    np.testing.assert_array_equal(ids(0), np.arange(360))
    few, more = ids(20), ids(100)
    assert len(few) == 20 and np.all(np.diff(few) > 0) and set(few) < set(more)
    np.testing.assert_array_equal(few, ids(20, seed=5))
    uniform = stats.kstest(more / 360, "uniform").pvalue
    assert uniform > 0.01
    np.testing.assert_array_equal(ids(20, in_order=True), np.arange(20))
    fewer = ids(100, Cell("ode", "uniform", 2), importance_images=20)
    np.testing.assert_array_equal(fewer, few)


def test_control_and_density_are_stored_with_the_evaluation(trained, tmp_path, monkeypatch):
    first = cell_run(trained, tmp_path, BOUND)
    assert len(list((tmp_path / "eval").glob("control_*"))) == 1
    assert len(list((tmp_path / "eval").glob("pilot_*"))) == 1
    monkeypatch.setattr(bound.GaussianControl, "fit", None)
    monkeypatch.setattr("sbml.density.density.pilot", None)
    again = cell_run(trained, tmp_path, BOUND)
    densities = (run.measurement.estimator.reduction.density for run in (first, again))
    np.testing.assert_array_equal(*densities)
    for name in ("mean", "variances", "basis"):
        ours, theirs = (getattr(run.evaluation.control, name) for run in (first, again))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_bound_without_a_control_variate_fits_none(trained, tmp_path):
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    config = tiny.get_config()
    config.eval.update(max_images=2, estimators=("bound_ssm",))
    config.eval.bound.sweeps = 1
    runs.mode(evaluate.run, config, tmp_path)
    assert not list((tmp_path / "eval").glob("control_*"))
    assert not list((tmp_path / "eval").glob("pilot_*"))
    [result] = json.loads((tmp_path / "report.json").read_text())["results"]
    assert result["trace"] == {"kind": "rademacher", "probes": 2}


def test_integers_that_are_not_dequantized_are_refused(trained, tmp_path):
    run = cell_run(trained, tmp_path, ODE)

    class Nothing:
        at_noise = False

        def sample(self, params, pixels, key):
            return np.zeros(pixels.shape, np.float32), np.zeros((), np.float32)

    with pytest.raises(ValueError, match="dequantize them before a density"):
        check_first_batch(run.evaluation, Dequantization(Nothing(), {}))
    check_first_batch(run.evaluation, run.dequantization)


@pytest.mark.slow
def test_the_report_tells_how_its_model_was_trained(trained, tmp_path):
    """The report shows the checkpoint's training settings, not those in the evaluation's config; it
    leaves out samples of another model."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    samples = read_npz(trained / "samples.npz")
    write_npz(tmp_path / "samples.npz", {**samples, "parameters_crc32": np.asarray(1)})
    # A file of an earlier evaluation, which is removed.
    write_npz(tmp_path / "per_image_ode_uniform_k3.npz", {"id": np.arange(2)})
    config = tiny.get_config()
    config.training.update(likelihood_weighting=False, importance_sampling=False)
    config.update({"optim": {"lr": 1.0}, "data": {"dequantization": "none"}})
    config.eval.update(max_images=2, estimators=("bound",))
    config.eval.ode.subset = 2
    config.eval.bound.sweeps = 1
    runs.mode(evaluate.run, config, tmp_path)
    report, ours = json.loads((tmp_path / "report.json").read_text()), tiny.get_config()
    stored = report["config"]
    assert stored["training"]["likelihood_weighting"] and stored["optim"]["lr"] == ours.optim.lr
    assert stored["data"]["dequantization"] == "uniform" and stored["eval"]["max_images"] == 2
    assert "samples" not in report
    assert [path.name for path in tmp_path.glob("per_image*")] == [PER_IMAGE]
    assert table2.read(tmp_path)["model"].endswith("(LW + IS)")


def test_products_have_full_precision_by_default(trained, tmp_path, monkeypatch):
    """Accelerators' default precision is TF32 or bfloat16; each precision has its own rows."""
    seen = []

    def stop(*_):
        seen.append(jax.config.jax_default_matmul_precision)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "Evaluation", SimpleNamespace(of_split=stop))
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    config = tiny.get_config()
    for precision in ("highest", "default"):
        config.eval.precision = precision
        with pytest.raises(KeyboardInterrupt):
            runs.mode(evaluate.run, config, tmp_path)
    assert seen == ["highest", "default"] and jax.config.jax_default_matmul_precision is None
    run, found = cell_run(trained, tmp_path, ODE).measurement, []
    for precision in seen:
        with jax.default_matmul_precision(precision):
            found.append(run.fingerprint())
    first, second = found
    assert {name for name in first if first[name] != second[name]} == {"precision"}
    config.eval.precision = "half"
    with pytest.raises(ValueError, match="eval.precision=half: give one of default, high, highest"):
        runs.mode(evaluate.run, config, tmp_path)


def test_an_exact_trace_takes_few_images_at_once(trained, tmp_path):
    """Each image has 64 directions, so a device has at most 32 images. Rows do not depend on it."""
    sizes = [
        cell_run(trained, tmp_path, cell, ode={"trace": trace}).measurement.batch_size
        for cell in (ODE, BOUND)
        for trace in ("exact", "rademacher")
    ]
    assert sizes == [min(32 * jax.device_count(), 120), 120, 120, 120]


def test_table2_reads_what_the_modes_wrote(trained, tmp_path):
    """Likelihood and FID of one work directory; the FID only if it belongs to its samples."""
    for name in (EVALUATION, PER_IMAGE, SAMPLES):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    images = read_npz(tmp_path / SAMPLES)["images"]
    (tmp_path / NEIGHBOURS).write_bytes((trained / "samples.png").read_bytes())
    for crc32, expected in ((tree_crc32(images), "12.50 (FID n=4)"), (1, None)):
        quality = {"step": 40, "images_crc32": crc32, "values": {"FID n=4": 12.5}}
        Workdir(tmp_path).write(QUALITY, quality)
        summary.write(Workdir(tmp_path), build.Experiment(tiny.get_config()).images)
        row = table2.read(tmp_path)
        assert row.get(table2.FID) == expected
    result = read_json(trained / EVALUATION)["results"][0]
    assert row["NLL uniform"] == f"{result['bits_per_dim']:.3f} ± {result['ci95']:.3f}"


def test_a_report_of_another_model_than_the_checkpoints_is_refused(trained):
    """Otherwise the page would show the other model's size beside this one's numbers."""
    config = tiny.get_config()
    config.model.width = 16
    before = (trained / "report.json").read_bytes()
    with pytest.raises(ValueError, match=r"model\.width"):
        runs.mode(report_mode.run, config, trained)
    assert (trained / "report.json").read_bytes() == before


@pytest.mark.slow
def test_every_cell_of_the_table_from_one_checkpoint(trained, tmp_path):
    """Two estimators with two dequantizers; the undefined cell is listed."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    config = tiny.get_config()
    config.eval.dequantizers = ("truncated_normal", "categorical")
    config.eval.max_images = 40
    config.eval.ode.subset = 8
    config.eval.bound.sweeps = 3
    runs.mode(evaluate.run, config, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    names = [(r["estimator"], r["dequantizer"]) for r in report["results"]]
    assert names == [
        ("ode", "truncated_normal"), ("bound", "truncated_normal"), ("bound", "categorical")
    ]  # fmt: skip
    assert list(report["undefined"]) == ["ode_categorical"]
    for result in report["results"]:
        assert result["bits_per_dim"] == pytest.approx(sum(result["terms"].values()), abs=1e-6)
        assert result["n"] == 40 and 0 < result["this_set_ci95"] < 1
    assert any("bin centres" in warning for warning in report["warnings"])
    with pytest.raises(ValueError, match="no dequantizer in .*--mode=train_dequantizer"):
        config.eval.dequantizers = ("variational",)
        runs.mode(evaluate.run, config, tmp_path)
