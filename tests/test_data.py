"""Image sets have the properties that they state, and arrays on disk are complete or absent."""

import dataclasses
import gzip
import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import runs
from pictures import numbered, pixels, save
from PIL import Image

from sbml import data
from sbml.data import _cache, imagenet32, photos

# All sources of images
IMAGES = [name for name, source in data.SOURCES.items() if not source.modes]


@pytest.fixture
def options(tmp_path: Path) -> data.Options:
    """Options with which every source of the registry loads."""
    for i in range(12):
        save(tmp_path / "folder" / f"{i}.png", pixels(6, 6, seed=i))
    for name in (full_name(k) for k, source in data.SOURCES.items() if source.collection):
        for split in data.SPLITS:
            path = tmp_path / "cache" / name.replace(":", "/") / f"{split}.npy"
            notes = {"version": "1.0.0", "split": split}
            _cache.load_or_build(path, lambda add, notes=notes: add(pixels(6, 6)) or notes)
    return data.Options(
        cache_dir=tmp_path / "cache", path=tmp_path / "folder", image_size=6, test_fraction=0.4
    )


def full_name(source: str) -> str:
    found = data.SOURCES[source]
    name = next(iter(imagenet32.ARCHIVES)) if source == "imagenet32" else "tiny"
    return f"{source}:{name}" if found.collection else source


@pytest.mark.parametrize("source", IMAGES)
def test_contract(source: str, options: data.Options) -> None:
    for split in data.SPLITS:
        images = data.load(full_name(source), split, options)
        assert images.name == full_name(source)
        assert images.split == split
        assert images.images.dtype == np.uint8
        assert images.images.shape == (len(images), *images.shape)
        assert images.images.max() < images.levels
        again = data.load(full_name(source), split, options)
        assert again.fingerprint == images.fingerprint
        assert json.loads(json.dumps(images.fingerprint)) == images.fingerprint
        batch = data.train_batches(images, 1, seed=0)[0]
        assert batch.shape == (1, *images.shape)


@pytest.mark.parametrize("source", IMAGES)
def test_unknown_split_lists_the_choices(source: str, options: data.Options) -> None:
    with pytest.raises(ValueError, match=r"'valid'.*train, test"):
        data.load(full_name(source), "valid", options)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SBML_CACHE", raising=False)
    assert data.Options().cache == Path.home() / ".cache" / "sbml"
    monkeypatch.setenv("SBML_CACHE", str(tmp_path / "variable"))
    assert data.Options().cache == tmp_path / "variable"
    assert data.Options(cache_dir=tmp_path / "given").cache == tmp_path / "given"


# ImageSet


def test_fingerprint_is_pinned() -> None:
    """If it changed, every stored checkpoint would warn that its data are others."""
    images = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    assert data.ImageSet("set", "1.0", "train", images, 32).fingerprint == {
        "name": "set",
        "version": "1.0",
        "split": "train",
        "count": 2,
        "shape": [3, 4, 1],
        "levels": 32,
        "sha256": hashlib.sha256(bytes(range(24))).hexdigest(),
        "id": "169d8b5b4d76",
    }


def test_fingerprint_tells_sets_apart() -> None:
    images = numbered(700, shape=(16, 16, 3))
    one_byte = images.images.copy()
    one_byte[-1, -1, -1, -1] ^= 1
    others = [dataclasses.replace(images, array=one_byte), dataclasses.replace(images, levels=255)]
    others += [dataclasses.replace(images, **{k: "x"}) for k in ("name", "version", "split")]
    ids = [s.fingerprint["id"] for s in (images, *others)]
    assert len(set(ids)) == len(ids)
    assert others[0].fingerprint["sha256"] != images.fingerprint["sha256"]


def test_fingerprint_reads_every_chunk_and_any_memory_layout(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (40, 700, 1000, 1), dtype=np.uint8)
    np.save(tmp_path / "x.npy", whole)  # 28 MB: two chunks
    expected = hashlib.sha256(whole.tobytes()).hexdigest()
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for images in (whole, mapped, np.asfortranarray(whole)):
        assert data.ImageSet("s", "1", "train", images).fingerprint["sha256"] == expected


# Prepared arrays


def test_prepared_once_then_mapped(tmp_path: Path) -> None:
    rows = (
        pixels(3, 4, 3, seed=1)[None].repeat(5, 0)
        + np.arange(5, dtype=np.uint8)[:, None, None, None]
    )
    built = []

    def build(add: _cache.Add) -> dict:
        built.append(1)
        for row in rows:
            add(np.asfortranarray(row))
        return {"version": "7"}

    path = tmp_path / "deep" / "train.npy"
    for _ in range(2):
        images, notes = _cache.load_or_build(path, build)
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable
        np.testing.assert_array_equal(images, rows)
        assert notes == {"version": "7"}
    assert built == [1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)], r"image 1 .*\(2, 3, 3\)"),
        ([np.zeros((2, 2, 3), np.uint16)], "uint16"),
        ([np.zeros((2, 2), np.uint8)], r"\(2, 2\)"),
        ([], "no image"),
    ],
)
def test_failed_preparation_leaves_nothing(
    rows: list[np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        _cache.load_or_build(tmp_path / "train.npy", lambda add: [add(row) for row in rows] and {})
    assert {p.name for p in tmp_path.iterdir()} <= {".lock"}


HALF = """
import sys, time, numpy as np
from pathlib import Path
from sbml.data._cache import load_or_build

def build(add):
    for i in range(2000):
        add(np.full((32, 32, 3), 7, np.uint8))
    print("half", flush=True)
    time.sleep(60)

load_or_build(Path(sys.argv[1]), build)
"""


def test_killed_preparation_leaves_no_array(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    command = [sys.executable, "-c", HALF, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        assert path.with_suffix(".part").exists()
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    whole, _ = _cache.load_or_build(path, lambda add: add(np.zeros((2, 2, 1), np.uint8)) or {})
    np.testing.assert_array_equal(whole, np.zeros((1, 2, 2, 1)))
    assert {p.name for p in tmp_path.iterdir()} <= {".lock", "train.npy", "train.json"}


ALL_AT_ONCE = """
import os, sys, time
from pathlib import Path
import numpy as np
from sbml.data._cache import load_or_build

def build(add):
    with open(sys.argv[2], "a") as file:
        file.write("built")
    for i in range(200):
        add(np.full((8, 8, 1), i, np.uint8))
    return {}

there, go = Path(sys.argv[3], str(os.getpid())), Path(sys.argv[3], "go")
there.touch()
while not go.exists():
    time.sleep(0.001)
print(load_or_build(Path(sys.argv[1]), build)[0].sum())
"""


def test_one_process_prepares_and_the_others_wait(tmp_path: Path) -> None:
    built, ready = tmp_path / "built", tmp_path / "ready"
    ready.mkdir()
    arguments = [str(path) for path in (tmp_path / "train.npy", built, ready)]
    processes = [runs.python(ALL_AT_ONCE, *arguments) for _ in range(4)]
    while len([*ready.iterdir()]) < 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.001)
    (ready / "go").touch()
    sums = [int(runs.output(process)) for process in processes]
    assert built.read_text() == "built"
    assert sums == [64 * 199 * 200 // 2] * 4


def test_content_key_depends_on_bytes_order_and_choices(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    keys = [_cache.content_key(f, c) for f in ([a, b], [b, a], [a]) for c in (1, 2)]
    b.write_bytes(b"c")
    keys.append(_cache.content_key([a, b], 1))
    b.unlink()
    keys.append(_cache.content_key([a, b], 1))
    assert len(set(keys)) == len(keys)


# Digits and photos


def test_digits_are_scikit_learns_file() -> None:
    spec = find_spec("sklearn")
    assert spec and spec.origin
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")[:, :64].reshape(-1, 8, 8, 1)
    train, test = (data.load("digits", split) for split in data.SPLITS)
    assert (len(train), len(test), train.shape, train.levels) == (1437, 360, (8, 8, 1), 17)
    np.testing.assert_array_equal(np.concatenate([train.images, test.images]), table)


@pytest.fixture(scope="module")
def photo_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, data.ImageSet]:
    def offline(*args: object, **kwargs: object) -> None:
        raise AssertionError("photos must not open a connection")

    options = data.Options(cache_dir=tmp_path_factory.mktemp("photos"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", offline)
        return {split: data.load("photos", split, options) for split in data.SPLITS}


def photo_of(crop_id: str) -> str:
    return crop_id.rpartition("@")[0]


def test_whole_photos_are_held_out(photo_sets: dict[str, data.ImageSet]) -> None:
    train, test = photo_sets["train"], photo_sets["test"]
    assert train.ids and test.ids
    assert train.shape == test.shape == (32, 32, 3)
    assert 2000 < len(train) < 10_000 and 300 < len(test) < 2000
    assert train.version == test.version
    assert not {photo_of(i) for i in train.ids} & {photo_of(i) for i in test.ids}
    assert not {x.tobytes() for x in train.images} & {x.tobytes() for x in test.images}
    scenes = [{Path(n).stem.split("_")[0] for n in names} for names in photos.PHOTOS.values()]
    assert not scenes[0] & scenes[1]


@pytest.mark.parametrize("split", data.SPLITS)
def test_crops_are_means_over_their_windows(
    split: str, photo_sets: dict[str, data.ImageSet]
) -> None:
    images = photo_sets[split]
    assert images.ids and len(set(images.ids)) == len(images)
    whole = {n: np.asarray(Image.open(photos.photo_path(n)), float) for n in photos.PHOTOS[split]}
    seen = set()
    for crop_id, crop in list(zip(images.ids, images.images, strict=True))[::7]:
        where, _, scale = crop_id.rpartition("@")[2].partition("/")
        (top, left), side = map(int, where.split(",")), 32 * int(scale)
        window = whole[photo_of(crop_id)][top : top + side, left : left + side]
        mean = window.reshape(32, int(scale), 32, int(scale), 3).mean((1, 3))
        np.testing.assert_allclose(crop, mean, atol=0.5 + 1e-6)
        seen.add((photo_of(crop_id), scale))
    assert len(seen) == 3 * len(photos.PHOTOS[split])


def test_absent_photo_names_the_remedy() -> None:
    for name in ("skimage/data/nowhere.png", "nopackage/data/astronaut.png"):
        with pytest.raises(FileNotFoundError, match=f"{name}.*pip install"):
            photos.photo_path(name)
