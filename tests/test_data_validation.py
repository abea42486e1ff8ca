"""Training images held out for validation: neither the rest nor the test set contains them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from pictures import numbered, pixels, save
from test_data import full_name

from sbml import data
from sbml.data import _cache
from sbml.data._examples import held_out, part
from sbml.program.config import build, compatibility
from sbml.program.modes import train

IMAGES = 20


@pytest.fixture
def options(tmp_path: Path) -> data.Options:
    """Options with which every source loads, a fraction of its training images held out."""
    for i in range(IMAGES):
        save(tmp_path / "folder" / f"{i}.png", pixels(6, 6, seed=i))
    for name in (full_name(k) for k, source in data.SOURCES.items() if source.collection):
        for seed, split in enumerate(data.SPLITS):
            path = tmp_path / "cache" / name.replace(":", "/") / f"{split}.npy"
            rows = np.random.default_rng(seed).integers(0, 256, (IMAGES, 6, 6, 3), np.uint8)

            def build_set(add: _cache.Add, rows: np.ndarray = rows, split: str = split) -> dict:
                for row in rows:
                    add(row)
                return {"version": "1.0.0", "split": split}

            _cache.load_or_build(path, build_set)
    return data.Options(
        cache_dir=tmp_path / "cache", path=tmp_path / "folder", image_size=6, validation=0.2
    )


def rows_of(images: data.ImageSet) -> list[bytes]:
    return [image.tobytes() for image in images.images]


@pytest.mark.parametrize("source", [k for k, s in data.SOURCES.items() if not s.modes])
def test_every_source_has_a_validation_split(source: str, options: data.Options) -> None:
    """The two parts are the training set, in its order; the test set stays as it was."""
    name, plain = full_name(source), dataclasses.replace(options, validation=0.0)
    whole, test = data.load(name, "train", plain), data.load(name, "test", plain)
    held, rest = data.load(name, data.VALIDATION, options), data.load(name, "train", options)
    mask = held_out(whole, options.validation)
    assert len(held) == mask.sum() >= 0.2 * len(whole) - 0.5 and len(held) + len(rest) == len(whole)
    for found, chosen in ((held, mask), (rest, ~mask)):
        np.testing.assert_array_equal(found.images, whole.images[chosen])
        assert (found.name, found.version, found.levels) == (name, whole.version, whole.levels)
        for names, all_names in ((found.ids, whole.ids), (found.scenes, whole.scenes)):
            expected = all_names and tuple(np.asarray(all_names)[chosen])
            assert names == expected
    assert not set(rows_of(held)) & set(rows_of(test))
    assert not set(rows_of(held)) & set(rows_of(rest))
    assert data.load(name, "test", options).fingerprint == test.fingerprint
    prints = [images.fingerprint for images in (whole, test, held, rest)]
    assert len({p["id"] for p in prints}) == len({p["sha256"] for p in prints}) == 4


def test_the_order_is_pinned() -> None:
    """Another order would hold out images that a stored model was trained on."""
    mask = held_out(numbered(10), 3)
    np.testing.assert_array_equal(np.flatnonzero(mask), [2, 4, 8])
    for more in range(4, 10):  # A larger part contains a smaller one.
        assert held_out(numbered(10), more)[mask].all()
        assert held_out(numbered(10), more).sum() == more
    np.testing.assert_array_equal(held_out(numbered(10), 0.3), mask)


def test_scenes_are_held_out_whole() -> None:
    """No more scenes are held out than are needed, and crops of one photo are in one part."""
    scenes = tuple("aaaabbccd")
    images = dataclasses.replace(numbered(9), scenes=scenes)
    for size in range(1, 9):
        try:
            held = part(images, size, held=True)
        except ValueError as error:
            assert "9 training images of 4 scenes" in str(error)
            continue
        rest = part(images, size, held=False)
        assert held.scenes and rest.scenes and not set(held.scenes) & set(rest.scenes)
        assert len(held) >= size and len(held) + len(rest) == 9
        order = np.random.RandomState(0).permutation(4)
        expected = {"abcd"[i] for i in order[: len(set(held.scenes))]}
        assert set(held.scenes) == expected
        last = "abcd"[order[len(expected) - 1]]
        assert len(held) - scenes.count(last) < size


def test_both_views_of_a_photo_are_in_one_part() -> None:
    for size in (0.1, 0.2, 0.5):
        options = data.Options(validation=size)
        held = data.load("photos", data.VALIDATION, options)
        rest = data.load("photos", "train", options)
        assert (
            held.ids and rest.ids and held.caution.startswith(f"{len(set(held.scenes or ()))} of 5")
        )
        views = ["motorcycle" in found for found in (str(set(held.ids)), str(set(rest.ids)))]
        assert views.count(True) == 1


@pytest.mark.parametrize("size", [1437.0, 2000.0, 0.9999, 1e-9])
def test_a_part_that_leaves_nothing_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match=f"data.validation={size:g}: digits has 1437 training"):
        data.load("digits", "train", data.Options(validation=size))


def test_without_images_held_out_there_is_no_such_split() -> None:
    with pytest.raises(ValueError, match=r"of digits with data.validation=0: .*set --config.data"):
        data.load("digits", data.VALIDATION)


def test_a_checkpoint_knows_what_was_held_out(caplog: pytest.LogCaptureFixture) -> None:
    """A model that saw the validation images is not evaluated on them without a warning."""
    config = tiny.get_config()
    seen = build.Experiment(config)
    metadata = seen.provenance(seen.images("train"))
    config.data.validation = 100
    experiment = build.Experiment(config)
    rest = experiment.images("train")
    assert (len(rest), len(experiment.images(data.VALIDATION))) == (1337, 100)
    ours = experiment.provenance(rest)
    assert compatibility.other_data(ours, ours) == []
    (warning,) = compatibility.other_data(metadata, ours)
    assert warning.endswith(
        "other data than this: data.validation is 100.0, in training it was 0.0"
    )
    # A checkpoint of these images was first trained on all: its config does not tell of these.
    first = {**ours, "earlier_data": [metadata["data"]]}
    (warning,) = compatibility.other_data(first, ours)
    assert "was first trained" in warning and "count is 1337, in training it was 1437" in warning


@pytest.mark.slow
def test_a_checkpoint_knows_on_what_it_was_trained_first(tmp_path: Path) -> None:
    """If images are held out only when a training continues, the network has seen them."""
    config = tiny.get_config()
    config.training.num_steps = 1
    runs.mode(train.run, config, tmp_path)
    for steps, validation, count in ((2, 100, 1), (3, 100, 1), (4, 0, 1), (5, 200, 2)):
        config.training.num_steps, config.data.validation = steps, validation
        runs.mode(train.run, config, tmp_path)
        experiment = build.Experiment(config)
        metadata = experiment.restore(tmp_path).metadata
        warnings = compatibility.other_data(
            metadata, experiment.provenance(experiment.images("train"))
        )
        assert len(warnings) == count, warnings
        assert all("other data" in warning for warning in warnings)
