"""Every image once, the same number whatever the batch, and nothing lost to a kill."""

import json
import math
import time

import numpy as np
import pytest
import runs
import tiny
from scipy import stats
from sklearn.datasets import load_digits

from sbml import baselines, build, estimators, evaluate, summary
from sbml.intervals import mean_interval
from sbml.runtime.parts import Parts, read_npz


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory after all three modes."""
    workdir = tmp_path_factory.mktemp("trained")
    runs.run(workdir)
    return workdir


@pytest.fixture(scope="module")
def table(trained):
    return read_npz(trained / summary.PER_IMAGE)


def rows(trained, directory, ids, batch_size):
    """The rows of ``ids`` computed anew in batches of ``batch_size``."""
    config = tiny.get_config()
    config.eval.batch_size = batch_size
    config.eval.max_images = len(ids)
    experiment = build.Experiment(config)
    images = experiment.images("test")
    restored = experiment.restore(trained)
    control = evaluate.control_variate(experiment, experiment.images("train"))
    return {
        "ode": evaluate.table(experiment, "ode", restored, images, None, directory),
        "bound": evaluate.table(experiment, "bound", restored, images, control, directory),
    }


def test_every_image_counts_once(trained, table):
    report = json.loads((trained / "report.json").read_text())
    np.testing.assert_array_equal(table["id"], np.arange(360))
    for result, name in zip(report["results"], ("ode", "bound"), strict=True):
        assert (result["estimator"], result["n"]) == (name, 360)
        assert result["bits_per_dim"] == pytest.approx(table[f"{name}_bits_per_dim"].mean())
    assert report["samples"]["count"] == 4
    assert report["data"]["test"]["count"] == 360


@pytest.mark.parametrize("name", ["ode", "bound"])
def test_terms_add_up(table, name):
    total = sum(table[f"{name}_{term}"] for term in estimators.TERMS[name])
    np.testing.assert_allclose(total, table[f"{name}_bits_per_dim"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(table[f"{name}_scale"], math.log2(17 / 2))


def test_bound_without_control_or_lattice_has_the_same_mean(trained, table, tmp_path):
    """Independent times and no control variate estimate the same expectation, less precisely."""
    config = tiny.get_config()
    config.eval.update(control=False, times="iid", n_times=64, seed=1)
    experiment = build.Experiment(config)
    images, restored = experiment.images("test"), experiment.restore(trained)
    plain = evaluate.table(experiment, "bound", restored, images, None, tmp_path)
    gap = plain["bits_per_dim"] - table["bound_bits_per_dim"]
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))
    assert abs(gap.mean()) < 0.1


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_batch_size_changes_nothing(trained, table, tmp_path, batch_size):
    ids = np.arange(16)
    got = rows(trained, tmp_path, ids, batch_size)
    for name, rows_of in got.items():
        np.testing.assert_array_equal(rows_of["id"], ids)
        expected = table[f"{name}_bits_per_dim"][ids]
        np.testing.assert_allclose(rows_of["bits_per_dim"], expected, rtol=0, atol=1e-4)


def test_eight_devices_change_nothing(trained, table, tmp_path):
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    runs.run(tmp_path, "--mode=eval", "--config.eval.batch_size=100", devices=8)
    got = read_npz(tmp_path / summary.PER_IMAGE)
    np.testing.assert_array_equal(got["id"], np.arange(360))
    for column in ("ode_bits_per_dim", "bound_bits_per_dim"):
        np.testing.assert_allclose(got[column], table[column], rtol=0, atol=1e-4)


def test_killed_evaluation_ends_in_the_same_bytes(trained, tmp_path):
    """SIGKILL once some parts are on disk; the second run makes only what is missing."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")

    def parts():
        return sorted((tmp_path / "eval").glob("*/part_*.npz"))

    process = runs.start(tmp_path, "--mode=eval")
    while process.poll() is None and not parts():
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in parts()}
    assert 0 < len(before) < 6
    runs.run(tmp_path, "--mode=eval")
    assert all(path.stat().st_mtime_ns == made for path, made in before.items())
    name = summary.PER_IMAGE
    assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_parts_report_damage_and_refuse_strangers(tmp_path, caplog):
    parts = Parts(tmp_path, {"step": 1})
    parts.write({"id": np.arange(3), "value": np.zeros(3)})
    parts.write({"id": np.arange(3, 5), "value": np.ones(2)})
    (tmp_path / "part_00000000.npz").write_bytes(b"not a table")
    np.testing.assert_array_equal(parts.read()["id"], [3, 4])
    assert "part_00000000.npz is damaged" in caplog.text
    with pytest.raises(ValueError, match="another computation"):
        Parts(tmp_path, {"step": 2})
    parts.write({"id": np.arange(4), "value": np.zeros(4)})
    with pytest.raises(ValueError, match="an image twice"):
        parts.read()


def test_evaluating_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in .*train first"):
        evaluate.run(tiny.get_config(), tmp_path)


def test_histogram_baseline_on_a_hand_count():
    """Two pixels, two levels, three training images: add-one probabilities by hand."""
    train = np.array([[0, 1], [0, 1], [0, 0]], np.uint8)
    test = np.array([[0, 1], [1, 0]], np.uint8)
    expected = -np.log2([[4 / 5, 3 / 5], [1 / 5, 2 / 5]]).mean(axis=1)
    np.testing.assert_allclose(baselines.histogram(train, test, 2), expected)


def test_gaussian_baseline_against_scipy():
    """The closed form over u against scipy's density averaged over a Sobol sequence."""
    digits = load_digits().images.astype(np.uint8)[:, 2:5, 2:4].reshape(-1, 6)
    train, test = digits[:1400], digits[1400:1410]
    model = stats.multivariate_normal(train.mean(0) + 0.5, np.cov(train.T) + np.eye(6) / 12)
    u = stats.qmc.Sobol(6, seed=0).random(2**14)[:, None]
    bits = -model.logpdf(test + u).mean(0) / 6 / math.log(2)
    np.testing.assert_allclose(baselines.gaussian(train, test), bits, atol=1e-4)


def test_interval_is_students():
    """Against scipy's own interval, and its coverage of the true mean."""
    values = np.random.default_rng(0).normal(2.0, 3.0, 12)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(mean_interval(values).bounds, (low, high))
    broken = mean_interval(np.array([1.0, np.nan]))
    assert broken.nonfinite == 1 and math.isnan(broken.mean)
    with pytest.raises(ValueError, match="no values"):
        mean_interval(np.array([]))
