"""Statistics of a data set are stored under its fingerprint, and samples are compared with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from ml_collections import ConfigDict

from sbml import data
from sbml.core.files import read_json, write_npz
from sbml.program.features import digits_classifier
from sbml.program.modes import quality, stats
from sbml.program.modes.quality import memorisation
from sbml.program.report import summary
from sbml.program.report.pictures import png
from sbml.program.runtime.checkpoint import Checkpoints
from sbml.program.runtime.workdir import (
    EVALUATION,
    NEIGHBOURS,
    PER_IMAGE,
    QUALITY,
    SAMPLES,
    Workdir,
)
from sbml.statistics import distances

CHECKPOINT = {"step": 3, "parameters_crc32": 7}
MODEL = {"model": {"name": "mlp", "parameters": 8480}, "config": {"training": {"batch_size": 16}}}


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    chosen = tiny.get_config()
    chosen.data.cache_dir = str(tmp_path / "cache")
    chosen.eval.quality.features = "digits_classifier"
    return chosen


def samples(workdir: Path, images: np.ndarray) -> Path:
    workdir.mkdir(exist_ok=True)
    n = len(images)
    columns = {"images": images, "nfe": np.ones(n), "failed": np.zeros(n, bool)}
    columns |= {name: np.asarray(value) for name, value in CHECKPOINT.items()}
    write_npz(workdir / SAMPLES, {**columns, "sampler": np.asarray("s")})
    return workdir


def values(config: ConfigDict, workdir: Path) -> dict[str, float]:
    runs.mode(quality.run, config, workdir)
    numbers = read_json(workdir / QUALITY)
    assert numbers["step"] == 3
    return numbers["values"]


def test_real_images_are_near_and_noise_is_far(config: ConfigDict, tmp_path: Path) -> None:
    real = data.load("digits", "test").images
    noise = np.random.default_rng(0).integers(0, 17, real.shape, np.uint8)
    near = values(config, samples(tmp_path / "real", real))
    far = values(config, samples(tmp_path / "noise", noise))
    assert near.keys() == far.keys()
    distance, kernel, score, nearest, usual = near
    assert "n=360" in distance and "digits classifier" in distance and "FID" not in distance
    assert near[distance] < far[distance] / 10 and near[kernel] < far[kernel] / 10
    assert near[score] > 5 and near[score] > far[score]
    assert near[nearest] == near[usual] and far[nearest] > 2 * far[usual]
    assert (tmp_path / "real" / NEIGHBOURS).exists()


def test_the_numbers_are_those_of_the_features(config: ConfigDict, tmp_path: Path) -> None:
    real = data.load("digits", "test").images[:50]
    numbers = values(config, samples(tmp_path / "w", real))
    extract = digits_classifier.extractor(weights="", sha256="", levels=17, cache=None)
    training, _ = extract(data.load("digits", "train").images)
    features, probabilities = extract(real)
    moments = [distances.Moments.of(f) for f in (features, training)]
    expected = [
        distances.frechet(*moments),
        distances.kernel(features, training),
        distances.inception_score(probabilities),
    ]
    np.testing.assert_allclose(list(numbers.values())[:3], expected, rtol=1e-4)


def test_copies_of_training_images_have_distance_zero(config: ConfigDict, tmp_path: Path) -> None:
    copies = data.load("digits", "train").images[:40]
    numbers = list(values(config, samples(tmp_path / "w", copies)).values())
    assert numbers[3] == 0 < numbers[4]


def test_mirrored_copies_have_distance_zero_if_training_flips(
    config: ConfigDict, tmp_path: Path
) -> None:
    mirrored = data.load("digits", "train").images[:40, :, ::-1]
    for flip in (True, False):
        config.data.flip = flip
        numbers = list(values(config, samples(tmp_path / str(flip), mirrored)).values())
        assert (numbers[3] == 0) == flip and numbers[4] > 0


def test_held_out_images_come_from_the_whole_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first images would not be a random sample: files may be sorted by class or by photo."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    queries = []
    nearest = distances.nearest
    monkeypatch.setattr(distances, "nearest", lambda x, y: queries.append(x) or nearest(x, y))
    memorisation(test.images[:5], train, test, flip=False)
    np.testing.assert_array_equal(queries[1][[0, -1]], test.images[[0, -1]])
    assert len(queries[1]) == 100


def test_statistics_are_computed_once_for_each_fingerprint(
    config: ConfigDict, tmp_path: Path
) -> None:
    runs.mode(stats.run, config, tmp_path)
    [kept] = (tmp_path / "cache" / "stats").iterdir()
    identity = data.load("digits", "train").fingerprint["id"]
    extract = digits_classifier.extractor(weights="", sha256="", levels=17, cache=None)
    assert kept.name == f"{extract.identity}-{identity}.npz"
    written = kept.stat().st_mtime_ns
    values(config, samples(tmp_path / "w", data.load("digits", "test").images[:9]))
    assert kept.stat().st_mtime_ns == written


def test_samples_of_an_earlier_checkpoint_warn(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir = samples(tmp_path / "w", data.load("digits", "test").images[:20])
    for steps, warned in (([3], False), ([3, 7], True)):
        monkeypatch.setattr(Checkpoints, "steps", lambda _, steps=steps: steps)
        values(config, workdir)
        assert ("of step 3, but the newest checkpoint is of step 7" in caplog.text) == warned
    assert "20 samples of step 3\n" in capsys.readouterr().out


def test_other_training_images_warn(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flips are those of the training, whatever the config says."""
    train, flips = data.load("digits", "train"), []
    stored = {"data": {**train.fingerprint, "sha256": "other"}, "config": {"data": {"flip": True}}}
    monkeypatch.setattr(Checkpoints, "metadata", lambda _: stored)

    def nearest(images, train, test, flip):
        flips.append(flip)
        return memorisation(images, train, test, flip)

    monkeypatch.setattr(quality, "memorisation", nearest)
    workdir = samples(tmp_path / "w", data.load("digits", "test").images[:20])
    values(config, workdir)
    numbers = read_json(workdir / QUALITY)
    assert numbers["data"] == train.fingerprint and flips == [True]
    assert "was trained on other data than this" in numbers["warnings"][0]


def test_an_extractor_that_cannot_be_made_stops_before_the_training(tmp_path: Path) -> None:
    err = runs.run(tmp_path, "--mode=train,quality", expect=1)
    assert "no samples.npz" in err and not (tmp_path / "checkpoints").exists()
    modes, features = "--mode=train,sample,quality", "--config.eval.quality.features=inception"
    err = runs.run(tmp_path, modes, features, expect=1)
    assert "download pt_inception" in err and not (tmp_path / "checkpoints").exists()


def test_what_is_missing_is_named(config: ConfigDict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no samples.npz in .*--mode=sample"):
        runs.mode(quality.run, config, tmp_path)
    samples(tmp_path, data.load("digits", "test", data.Options()).images[:1])
    with pytest.raises(ValueError, match="samples.npz has one image: .*sampling.num_images"):
        runs.mode(quality.run, config, tmp_path)
    config.eval.quality.features = "inception"
    with pytest.raises(ValueError, match="download pt_inception"):
        runs.mode(stats.run, config, tmp_path)
    config.eval.quality.features = "vgg"
    with pytest.raises(
        ValueError, match="eval.quality.features=vgg: give one of digits_classifier"
    ):
        runs.mode(stats.run, config, tmp_path)


def test_the_report_shows_the_quality_of_its_own_samples(
    config: ConfigDict, tmp_path: Path
) -> None:
    """New samples have no quality in the report until it is computed for them."""
    real = data.load("digits", "test")
    workdir = samples(tmp_path / "w", real.images[:20])
    evaluation = {"title": "w", "results": [runs.result(np.ones(2))], "checkpoint": CHECKPOINT}
    evaluation |= {"data": {"test": real.fingerprint}, "warnings": [], **MODEL}
    evaluation |= {"command": "eval"}
    Workdir(workdir).write(EVALUATION, evaluation)
    columns = {"id": np.arange(2), "bits_per_dim": np.ones(2), "nfe": np.ones(2)}
    write_npz(workdir / PER_IMAGE, columns)
    numbers = values(config, workdir)
    assert json.loads((workdir / "report.json").read_text())["quality"] == numbers
    shown = (workdir / "report.html").read_text()
    assert summary.NEIGHBOURS_CAPTION in shown
    for change in (lambda path: path.write_bytes(png(real.images[0])), Path.unlink):
        change(workdir / NEIGHBOURS)  # A picture of other samples, and none.
        summary.write(Workdir(workdir), lambda split: real)
        assert json.loads((workdir / "report.json").read_text())["quality"] == numbers
        assert summary.NEIGHBOURS_CAPTION not in (workdir / "report.html").read_text()
    summary.write(Workdir(samples(workdir, real.images[20:40])), lambda split: real)
    assert "quality" not in json.loads((workdir / "report.json").read_text())


def test_a_report_is_never_shown_with_the_images_of_another_split(
    config: ConfigDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The evaluation stores its split, so the config of a later mode cannot change it."""
    sets = {split: data.load("digits", split) for split in ("train", "test")}
    results = [runs.result(np.ones(1), split="train")]
    evaluation = {"title": "w", "results": results, "checkpoint": CHECKPOINT}
    evaluation |= {"data": {"train": sets["train"].fingerprint}, "warnings": [], **MODEL}
    Workdir(tmp_path).write(EVALUATION, evaluation)
    columns = {"id": np.array([1400]), "bits_per_dim": np.ones(1), "nfe": np.ones(1)}
    write_npz(tmp_path / PER_IMAGE, columns)
    summary.write(Workdir(tmp_path), lambda split: sets["test"])
    assert "the report stays as it is" in caplog.text
    assert not (tmp_path / "report.html").exists()
    summary.write(Workdir(tmp_path), sets.__getitem__)  # The test set has no image 1400.
    assert (tmp_path / "report.html").exists()
