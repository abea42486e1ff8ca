"""Sets of TensorFlow Datasets (TFDS): its builder prepares them once, then TFDS is not needed."""

import gzip
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbml import data
from sbml.data import _cache

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make the import of each module fail, as on a machine that lacks it."""
    for module in modules:
        monkeypatch.setitem(__import__("sys").modules, module, None)


@pytest.mark.parametrize("missing", ["tensorflow", "tensorflow_datasets"])
def test_preparing_without_tensorflow_names_the_remedy(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, missing)
    with pytest.raises(ImportError, match=r"pip install '\.\[tfds\]'"):
        data.load("tfds:cifar10", "train", data.Options(cache_dir=tmp_path))
    assert not list(tmp_path.rglob("*.npy"))


def test_a_prepared_set_needs_neither_tensorflow_nor_tfds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    notes = {"version": "2.0.0", "split": "validation"}
    path = tmp_path / "tfds" / "downsampled_imagenet" / "32x32" / "test.npy"
    _cache.load_or_build(path, lambda add: add(image) or notes)
    without(monkeypatch, "tensorflow", "tensorflow_datasets")
    options = data.Options(cache_dir=tmp_path)
    images = data.load("tfds:downsampled_imagenet/32x32", "test", options)
    np.testing.assert_array_equal(images.images, image[None])
    assert (images.version, images.split, images.levels) == ("2.0.0", "validation", 256)


def require_tfds(*, files: bool) -> None:
    """Skip where the extra or Debian's files are absent, but fail there in CI, which has both."""
    lacking = [m for m in ("tensorflow", "tensorflow_datasets") if find_spec(m) is None]
    if files and not DEBIAN.is_dir():
        lacking.append(str(DEBIAN))
    if lacking:
        reason = f"{' and '.join(lacking)} absent: pip install '.[tfds]', apt install "
        reason += "dataset-fashion-mnist"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def fashion_mnist(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[data.Options, dict[str, data.ImageSet]]:
    require_tfds(files=True)
    options = data.Options(cache_dir=tmp_path_factory.mktemp("tfds"), manual_dir=DEBIAN)
    return options, {s: data.load("tfds:fashion_mnist", s, options) for s in data.SPLITS}


# The names of the classes 0 .. 9, given by the data set's authors.
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def idx_images(file: str) -> np.ndarray:
    """An idx3 file read by its definition: magic, count, rows, columns, then bytes."""
    raw = gzip.decompress((DEBIAN / file).read_bytes())
    magic, *shape = np.frombuffer(raw, ">i4", 4)
    assert magic == 0x0803
    return np.frombuffer(raw, np.uint8, offset=16).reshape(*shape, 1)


@pytest.mark.tfds
@pytest.mark.parametrize(
    ("split", "file", "count"),
    [
        ("train", "train-images-idx3-ubyte.gz", 60_000),
        ("test", "t10k-images-idx3-ubyte.gz", 10_000),
    ],
)
def test_fashion_mnist_through_tfds(
    split: str, file: str, count: int, fashion_mnist: tuple[data.Options, dict[str, data.ImageSet]]
) -> None:
    images = fashion_mnist[1][split]
    assert images.images.shape == (count, 28, 28, 1)
    assert (images.name, images.version, images.split) == ("tfds:fashion_mnist", "3.0.1", split)
    file_of_labels = DEBIAN / file.replace("images-idx3", "labels-idx1")
    numbers = gzip.decompress(file_of_labels.read_bytes())[8:]  # after the magic and the count
    pairs = zip(idx_images(file), numbers, strict=True)
    theirs = sorted((image.tobytes(), CLASSES[number]) for image, number in pairs)
    ours = zip(images.images, images.labels, strict=True)
    # Both are sorted, because TFDS shuffles the images.
    assert sorted((image.tobytes(), str(label)) for image, label in ours) == theirs


@pytest.mark.tfds
def test_fashion_mnist_is_mapped_and_needs_no_tfds_again(
    fashion_mnist: tuple[data.Options, dict[str, data.ImageSet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, sets = fashion_mnist
    without(monkeypatch, "tensorflow", "tensorflow_datasets")
    for split, images in sets.items():
        again = data.load("tfds:fashion_mnist", split, options)
        assert isinstance(again.images, np.memmap)
        assert again.fingerprint == images.fingerprint
    assert not list(options.cache.rglob("*.part"))


@pytest.mark.tfds
@pytest.mark.parametrize("holds", [(), ("something.tar.gz",)])
def test_manual_dir_without_the_archives(holds: tuple[str, ...], tmp_path: Path) -> None:
    require_tfds(files=False)
    for file in holds:
        (tmp_path / file).touch()
    options = data.Options(cache_dir=tmp_path / "cache", manual_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"no archive of cifar10: put cifar-10-binary.tar.gz there"
    ):
        data.load("tfds:cifar10", "train", options)


@pytest.mark.tfds
def test_without_a_connection_the_archives_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require_tfds(files=False)
    import requests
    import tensorflow_datasets as tfds

    def unreachable(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", unreachable)
    message = "(?s)not be downloaded .ConnectionError.*manual_dir=DIR; .* cifar-10-binary.tar.gz"
    with pytest.raises(ValueError, match=message):
        data.load("tfds:cifar10", "train", data.Options(cache_dir=tmp_path))


@pytest.mark.tfds
def test_altered_archive_is_refused(tmp_path: Path) -> None:
    require_tfds(files=True)
    for file in DEBIAN.glob("*.gz"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-1] + b"x")
    options = data.Options(cache_dir=tmp_path / "cache", manual_dir=tmp_path)
    with pytest.raises(Exception, match="(?i)checksum"):
        data.load("tfds:fashion_mnist", "train", options)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.tfds
def test_unknown_tfds_set(tmp_path: Path) -> None:
    require_tfds(files=False)
    with pytest.raises(ValueError, match="no_such_set"):
        data.load("tfds:no_such_set", "train", data.Options(cache_dir=tmp_path))


@pytest.fixture(scope="module")
def tiny_builders() -> None:
    """Register three small sets with TFDS: one with the splits train and validation, one with
    images of two sizes, and one without images."""
    require_tfds(files=False)
    import tensorflow_datasets as tfds

    class Little(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.3")
        FEATURES: Any = {"image": tfds.features.Image(shape=(None, None, 3))}

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(self.FEATURES)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(0), "validation": self._generate_examples(10)}

        def _generate_examples(self, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(first, first + 5):
                yield i, {"image": np.full((4, 6, 3), i, np.uint8)}

    class LittleRagged(Little):
        def _generate_examples(self, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(first, first + 5):
                yield i, {"image": np.full((4, 6 + i % 2, 3), i, np.uint8)}

    class LittleSound(Little):
        FEATURES = {"pitch": np.int64}

        def _generate_examples(self, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(5):
                yield i, {"pitch": i}


@pytest.mark.tfds
@pytest.mark.usefixtures("tiny_builders")
def test_the_validation_split_is_used_if_there_is_no_test_split(tmp_path: Path) -> None:
    options = data.Options(cache_dir=tmp_path)
    train, test = (data.load("tfds:little:1.2.3", s, options) for s in data.SPLITS)
    assert (train.split, test.split, test.version) == ("train", "validation", "1.2.3")
    assert train.shape == test.shape == (4, 6, 3)
    assert sorted(train.images[:, 0, 0, 0]) == [0, 1, 2, 3, 4]
    assert sorted(test.images[:, 0, 0, 0]) == [10, 11, 12, 13, 14]


@pytest.mark.tfds
@pytest.mark.usefixtures("tiny_builders")
@pytest.mark.parametrize(
    ("name", "message"),
    [("little_ragged", "a set needs one size"), ("little_sound", "no feature 'image', only pitch")],
)
def test_unfit_sets_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(f"tfds:{name}", "train", data.Options(cache_dir=tmp_path))
    assert not [p for p in (tmp_path / "tfds").rglob("*") if p.suffix in (".npy", ".part")]
