"""A user's folder: every file is used once, or named with the reason."""

import dataclasses
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pictures import pixels, save, save_deep
from PIL import Image

from sbml import data
from sbml.data import image_folder


def folder_options(home: Path, **changes: object) -> data.Options:
    options = data.Options(cache_dir=home / "cache", path=home / "images", image_size=8)
    return dataclasses.replace(options, **changes)


def load_split(home: Path, split: str = "train", **changes: object) -> data.ImageSet:
    return data.load("image_folder", split, folder_options(home, **changes))


@pytest.fixture
def two_splits(tmp_path: Path) -> Path:
    """``images/train`` to put files into, and a test image that makes the splits explicit."""
    save(tmp_path / "images" / "test" / "t.png", pixels(8, 8))
    (tmp_path / "images" / "train").mkdir()
    return tmp_path


def test_own_splits_recursive_and_sorted(
    two_splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = two_splits / "images" / "train"
    names = ["b/2.PNG", "a.tiff", "b/1.bmp", "c/d/e.gif", "f.webp"]
    for i, name in enumerate(names):
        options = {"lossless": True} if name.endswith("webp") else {}
        save(train / name, pixels(8, 8, 1, seed=i), **options)
    (train / "notes.txt").write_text("not an image")
    save(two_splits / "images" / "outside.png", pixels(8, 8))
    images = load_split(two_splits, channels=1)
    order = sorted(range(5), key=names.__getitem__)
    assert images.ids == tuple(f"train/{names[i]}" for i in order)
    expected = np.stack([pixels(8, 8, 1, seed=i) for i in order])[..., None]
    np.testing.assert_array_equal(images.images, expected)
    assert images.skipped == ()
    assert load_split(two_splits, "test").ids == ("test/t.png",)
    assert "1 images" in caplog.text and "outside train and test" in caplog.text


def test_unreadable_files_are_named_and_counted(
    two_splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = two_splits / "images" / "train"
    save(train / "good.png", pixels(8, 8))
    (train / "text.jpg").write_text("this is no image")
    (train / "empty.png").touch()
    save(train / "cut.png", pixels(64, 64))
    (train / "cut.png").write_bytes((train / "cut.png").read_bytes()[:2000])
    (train / "dangling.png").symlink_to(train / "nowhere.png")
    save(train / "clear.png", pixels(8, 8, 4))
    Image.new("F", (8, 8)).save(train / "float.tif")
    save(train / "twelve.png", 16 * pixels(8, 8)[..., 0].astype(np.uint16))
    bad = ["clear.png", "cut.png", "dangling.png", "empty.png", "float.tif", "text.jpg"]
    bad.append("twelve.png")
    for _ in range(2):  # The second result is cached, and warns again.
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            images = load_split(two_splits)
        assert images.ids == ("train/good.png",)
        assert [s.split(":")[0] for s in images.skipped] == [f"train/{name}" for name in bad]
        assert "transparent" in images.skipped[0] and "32-bit" in images.skipped[4]
        assert "16-bit pixels, none above" in images.skipped[6]
        assert "7 of 8 train files not used" in caplog.text
        assert all(name in caplog.text for name in bad)


def test_all_files_that_are_left_out_are_counted(
    two_splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other suffixes are counted, links are followed once, and any file name is accepted."""
    train, elsewhere = two_splits / "images" / "train", two_splits / "elsewhere"
    save(train / "a.png", pixels(8, 8))
    os.rename(train / "a.png", os.path.join(os.fsencode(train), b"caf\xe9.jfif"))
    save(elsewhere / "b.png", pixels(8, 8, seed=1))
    (train / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(train)
    for name in ("labels.csv", "x.heic", "y.heic", ".hidden.png"):
        (train / name).touch()
    assert load_split(two_splits).ids == ("train/caf\\xe9.jfif", "train/linked/b.png")
    assert "3 files" in caplog.text and ".csv (1), .heic (2)" in caplog.text
    assert "1 links" in caplog.text
    train.rename(train.with_name("Train"))
    with pytest.raises(ValueError, match="a subfolder Train: call it train"):
        load_split(two_splits)


def test_no_usable_image_is_an_error(two_splits: Path) -> None:
    with pytest.raises(ValueError, match="has 1 images, none of them for 'train'"):
        load_split(two_splits)
    (two_splits / "images" / "train" / "x.png").touch()
    with pytest.raises(ValueError, match=r"None of 1 images is usable. The first: train/x.png"):
        load_split(two_splits)


def test_a_link_gives_no_image_another_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another name could move an image to the other split."""
    root = tmp_path / "images"
    for i in range(20):
        save(root / "all" / "best" / f"{i}.png", pixels(8, 8, seed=i))
    before = [load_split(tmp_path, split).ids for split in ("train", "test")]
    assert all(before)
    (root / "a").symlink_to(root / "all" / "best")  # met earlier than the folder
    (root / "all" / "up").symlink_to(root)
    (root / "all" / "x.png").symlink_to(root / "all" / "best" / "3.png")
    assert [load_split(tmp_path, split).ids for split in ("train", "test")] == before
    assert "3 links" in caplog.text
    # Two links to a file outside are one image; a hidden file has no name but that of its link.
    save(tmp_path / "elsewhere.png", pixels(8, 8, seed=30))
    save(root / "all" / ".hidden.png", pixels(8, 8, seed=31))
    for name, target in (("y1", tmp_path / "elsewhere.png"), ("y2", tmp_path / "elsewhere.png")):
        (root / f"{name}.png").symlink_to(target)
    (root / "z.png").symlink_to(root / "all" / ".hidden.png")
    more = {i for split in ("train", "test") for i in load_split(tmp_path, split).ids or ()}
    assert more - {i for ids in before for i in ids or ()} == {"y1.png", "z.png"}


def test_splits_may_consist_of_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The links are to files and folders in a folder of all images."""
    root = tmp_path / "images"
    for i in range(4):
        save(root / "all" / ("cats" if i > 1 else "") / f"{i}.png", pixels(8, 8, seed=i))
    for split in ("train", "test"):
        (root / split).mkdir()
    (root / "train" / "0.png").symlink_to(root / "all" / "0.png")
    (root / "test" / "1.png").symlink_to(root / "all" / "1.png")
    (root / "train" / "cats").symlink_to(root / "all" / "cats")
    assert load_split(tmp_path).ids == ("train/0.png", "train/cats/2.png", "train/cats/3.png")
    assert load_split(tmp_path, "test").ids == ("test/1.png",)
    assert "links" not in caplog.text
    for name in ("x", "y"):
        (root / "train" / f"{name}.png").symlink_to(root / "nowhere.png")
    assert [s[:11] for s in load_split(tmp_path).skipped] == ["train/x.png", "train/y.png"]


@pytest.mark.parametrize(
    ("link", "target"),
    [("test/0.png", "all/0.png"), ("test/all", "all"), ("test/up", ""), ("test/up/more", "all")],
)
def test_an_image_that_links_put_into_both_splits_is_named(
    tmp_path: Path, link: str, target: str
) -> None:
    root = tmp_path / "images"
    save(root / "all" / "0.png", pixels(8, 8))
    for split in ("train", "test"):
        save(root / split / "own.png", pixels(8, 8))
    (root / "train" / "0.png").symlink_to(root / "all" / "0.png")
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to(root / target)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"train/0\.png and test/.*0\.png are one image"):
            load_split(tmp_path, split)


def test_a_link_moves_no_image_out_of_its_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "images"
    for name in ("train/1.png", "test/2.png", "test/cats/3.png"):
        save(root / name, pixels(8, 8))
    for name, target in {
        "train/up": root,
        "train/cats": root / "test" / "cats",
        "train/whole": root / "test",
        "train/2.png": root / "test" / "2.png",
        "test/again": root / "train",
        "elsewhere": root / "test",
    }.items():
        (root / name).symlink_to(target)
    assert load_split(tmp_path).ids == ("train/1.png",)
    assert load_split(tmp_path, "test").ids == ("test/2.png", "test/cats/3.png")
    assert "5 links" in caplog.text


@pytest.mark.parametrize(
    ("split", "place"), [("test", "train"), ("test", "train/a"), ("train", "")]
)
def test_splits_that_overlap_are_named(tmp_path: Path, split: str, place: str) -> None:
    root = tmp_path / "images"
    save(root / ("train" if split == "test" else "test") / "a" / "1.png", pixels(8, 8))
    (root / split).symlink_to(root / place)
    with pytest.raises(ValueError, match="lies in the folder of the other split"):
        load_split(tmp_path)


def test_hard_links_are_one_image(tmp_path: Path) -> None:
    """This holds whether a hash or folders split the images."""
    root = tmp_path / "images"
    for i in range(20):
        save(root / "a" / f"{i}.png", pixels(8, 8, seed=i))
    (root / "b").mkdir()
    for i in range(20):
        os.link(root / "a" / f"{i}.png", root / "b" / f"{i}.png")
    found = [load_split(tmp_path, split, test_fraction=0.5).ids for split in ("train", "test")]
    assert sum(map(len, found)) == len({Path(i).name for ids in found for i in ids}) == 20
    for name, split in (("a", "train"), ("b", "test")):
        (root / name).rename(root / split)
    with pytest.raises(ValueError, match=r"train/0\.png and test/0\.png are one image"):
        load_split(tmp_path)


def test_splits_may_be_links_to_other_folders_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for split in ("train", "test"):
        save(root / "a" / split / "1.png", pixels(8, 8))
        (root / split).symlink_to(root / "a" / split)
        assert root.joinpath(split, "1.png").exists()
    assert load_split(tmp_path).ids == ("train/1.png",)
    assert load_split(tmp_path, "test").ids == ("test/1.png",)


def test_pixel_formats(two_splits: Path) -> None:
    train = two_splits / "images" / "train"
    rgb = pixels(8, 8)
    deep = np.random.default_rng(1).integers(0, 2**16, (8, 8)).astype(np.uint16)
    save(train / "deep.png", deep)
    # Pillow opens these with another mode, and brings 12 bits to 16.
    twelve = deep >> 4
    for name, most, values in (("sixteen", 2**16 - 1, deep), ("twelve", 2**12 - 1, twelve)):
        header = f"P5 8 8 {most} ".encode()
        (train / f"{name}.pgm").write_bytes(header + values.astype(">u2").tobytes())
    save(train / "opaque.png", np.concatenate([rgb, np.full((8, 8, 1), 255, np.uint8)], -1))
    Image.fromarray(rgb).convert("CMYK").save(train / "ink.tif")
    Image.fromarray(rgb[..., 0]).save(train / "grey.png")
    Image.fromarray(rgb).quantize(256).save(train / "palette.png")
    images = load_split(two_splits)
    assert images.ids is not None
    by_name = dict(zip((Path(i).stem for i in images.ids), images.images, strict=True))
    np.testing.assert_array_equal(by_name["deep"], np.repeat(deep[..., None] // 256, 3, -1))
    np.testing.assert_array_equal(by_name["sixteen"], by_name["deep"])
    scaled = np.round(twelve * (65535 / 4095)).astype(int) // 256
    np.testing.assert_array_equal(by_name["twelve"], np.repeat(scaled[..., None], 3, -1))
    np.testing.assert_array_equal(by_name["opaque"], rgb)
    np.testing.assert_array_equal(by_name["grey"], np.repeat(rgb[..., :1], 3, -1))
    np.testing.assert_allclose(by_name["ink"], rgb, atol=1)
    np.testing.assert_array_equal(
        by_name["palette"], Image.fromarray(rgb).quantize(256).convert("RGB")
    )
    grey = load_split(two_splits, channels=1)
    assert grey.shape == (8, 8, 1)
    luma = rgb @ [0.299, 0.587, 0.114]  # ITU-R 601
    np.testing.assert_allclose(
        grey.images[images.ids.index("train/opaque.png"), ..., 0], luma, atol=1
    )


DEEP = ("rgb.png", "grey.png", "rgba.png", "rgb.tif", "rgba.tif", "rgb.ppm")


def test_16_bits_that_pillow_cuts_are_read_from_the_file(
    two_splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pillow keeps 8 bits of several channels. A camera's 12 bits would become nearly black."""
    train = two_splits / "images" / "train"
    deep = np.random.default_rng(1).integers(0, 2**16, (8, 8, 3)).astype(np.uint16)
    opaque = np.full((8, 8, 1), 2**16 - 1, np.uint16)
    few = {"camera": deep >> 4, "bytes": deep >> 8}
    for name in DEEP:
        for kind, values in {"full": deep, **few}.items():
            colours = values[..., :1] if name.startswith("grey") else values
            layers = [colours] if name.startswith("rgb.") else [colours, opaque]
            save_deep(train / f"{kind}-{name}", np.concatenate(layers, axis=-1))
    images = load_split(two_splits)
    assert images.ids == tuple(sorted(f"train/full-{name}" for name in DEEP))
    for name, image in zip(images.ids, images.images, strict=True):
        shown = np.broadcast_to(deep[..., :1], deep.shape) if "grey" in name else deep
        scaled = name.endswith("ppm")  # Pillow scales these, and rounds.
        np.testing.assert_array_equal(image, np.round(shown / 257) if scaled else shown >> 8)
    reasons = dict(s.split(": ", 1) for s in images.skipped)
    assert set(reasons) == {f"train/{kind}-{name}" for name in DEEP for kind in few}
    assert all(
        reason.startswith("16-bit pixels, none above 4")
        for name, reason in reasons.items()
        if "camera" in name
    )
    assert (
        "6 of 6 train images have more than 8 bits a channel: the upper 8 are used"
        in images.caution
    )
    assert images.caution in caplog.text


def test_jpeg_2000_of_16_bits(two_splits: Path) -> None:
    """The colours of ``deep_12.jp2`` and ``deep_16.jp2`` are a ramp up to 2^12 and 2^16 of 16 bits;
    each was written by imagecodecs.jpeg2k_encode."""
    train = two_splits / "images" / "train"
    for name in ("deep_12.jp2", "deep_16.jp2"):
        shutil.copy(Path(__file__).parent / "data" / name, train / name)
    images = load_split(two_splits)
    assert images.ids == ("train/deep_16.jp2",)
    np.testing.assert_allclose(images.images[0][..., 0], 4 * np.arange(64).reshape(8, 8), atol=1)
    (reason,) = images.skipped
    assert reason.startswith("train/deep_12.jp2: 16-bit pixels, none above ")
    assert "1 of 1 train images have more than 8 bits a channel" in images.caution


@pytest.mark.parametrize(("flags", "depth"), [(0x0C, 8), (0x4C, 10)])
def test_avif_of_more_than_8_bits_counts_as_deep(tmp_path: Path, flags: int, depth: int) -> None:
    """Pillow writes only 8 bits, so these are the first bytes of the box av1C alone."""
    (tmp_path / "a.avif").write_bytes(b"....av1C" + bytes([0x81, 0, flags, 0]))
    opened: Any = SimpleNamespace(format="AVIF")
    assert image_folder.depth_of(tmp_path / "a.avif", opened) == depth


def test_16_bit_planes_that_pillow_misreads_are_named(two_splits: Path) -> None:
    train = two_splits / "images" / "train"
    save(train / "good.png", pixels(8, 8))
    deep = np.random.default_rng(1).integers(0, 2**16, (8, 8, 3)).astype(np.uint16)
    save_deep(train / "planes.tif", deep, planes=True)
    images = load_split(two_splits)
    assert images.ids == ("train/good.png",)
    assert images.skipped[0].startswith("train/planes.tif: 16-bit planes")


def test_exif_orientation(two_splits: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to show
    save(two_splits / "images" / "train" / "x.png", pixels(8, 8), exif=exif)
    np.testing.assert_array_equal(load_split(two_splits).images[0], np.rot90(pixels(8, 8), -1))


def test_crops(two_splits: Path) -> None:
    train = two_splits / "images" / "train"
    wide = pixels(8, 20)
    save(train / "x.png", wide)
    for i in range(20):
        save(train / f"y{i}.png", wide)
    np.testing.assert_array_equal(load_split(two_splits).images[0], wide[:, 6:14])
    squashed = Image.fromarray(wide).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(load_split(two_splits, crop="squash").images[0], squashed)
    drawn, again, other = (load_split(two_splits, crop="random", seed=s).images for s in (0, 0, 1))
    np.testing.assert_array_equal(drawn, again)
    assert len(np.unique(drawn, axis=0)) == 21
    assert not np.array_equal(drawn, other)


def test_downscaling_averages(two_splits: Path) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (64, 64, 3))
    save(two_splits / "images" / "train" / "x.png", ramp)
    small = load_split(two_splits).images[0].astype(float)
    np.testing.assert_allclose(
        small[1:-1], ramp.reshape(8, 8, 8, 8, 3).mean((1, 3))[1:-1], atol=1.5
    )


def test_enlarged_images_are_counted(two_splits: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Interpolated pixels cost few bits, so bits/dim of such images are not those of photos."""
    for name, shape in (("a", (8, 8)), ("b", (9, 7)), ("c", (4, 30)), ("d", (20, 8))):
        save(two_splits / "images" / "train" / f"{name}.png", pixels(*shape))
    for _ in range(2):  # The second result is cached, and warns again.
        caplog.clear()
        assert load_split(two_splits).caution.startswith("2 of 4 train images are smaller")
        assert "2 of 4 train images are smaller" in caplog.text
    assert load_split(two_splits, "test").caution == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "set --config.data.path=DIR"),
        ({"path": "/nowhere/at/all"}, "/nowhere/at/all is not a folder"),
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 4}, "3 channels for RGB, or 1 for grey"),
        ({"crop": "middle"}, "crop is 'middle'.*center, random, squash"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
    ],
)
def test_wrong_folder_options(changes: dict, message: str, two_splits: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_split(two_splits, **changes)


def test_one_split_folder_alone_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "images" / "train" / "x.png", pixels(8, 8))
    with pytest.raises(ValueError, match="subfolder train only"):
        load_split(tmp_path)


def test_hashed_split_is_a_partition_that_new_files_do_not_move(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4000)]

    def held_out(seed: int) -> set[str]:
        return {n for n in names if image_folder._uniform("split", seed, n) < 0.2}

    held = held_out(0)
    assert abs(len(held) - 800) < 3 * math.sqrt(4000 * 0.2 * 0.8)
    assert held != held_out(1)

    for i in range(30):
        save(tmp_path / "images" / f"{i}.png", pixels(8, 8, seed=i))
    before = {s: set(load_split(tmp_path, s, test_fraction=0.2).ids or ()) for s in data.SPLITS}
    assert not before["train"] & before["test"]
    assert before["train"] | before["test"] == set(names[:30])
    assert before["test"] == held & set(names[:30])
    for i in range(30, 40):
        save(tmp_path / "images" / f"{i}.png", pixels(8, 8, seed=i))
    for split, ids in before.items():
        assert ids < set(load_split(tmp_path, split, test_fraction=0.2).ids or ())


def test_folder_is_decoded_once_per_content(
    two_splits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = two_splits / "images" / "train" / "x.png"
    save(file, pixels(8, 8, seed=0))
    first = load_split(two_splits)
    decoded = []
    decode = image_folder._decode
    monkeypatch.setattr(image_folder, "_decode", lambda *a: decoded.append(a) or decode(*a))
    assert load_split(two_splits).fingerprint == first.fingerprint
    assert not decoded
    save(file, pixels(8, 8, seed=1))
    changed = load_split(two_splits)
    assert len(decoded) == 1
    assert changed.version != first.version
    np.testing.assert_array_equal(changed.images[0], pixels(8, 8, seed=1))


def test_files_that_would_block_for_ever_are_named(
    two_splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This runs in its own process, because opening a FIFO without a writer would not return."""
    train = two_splits / "images" / "train"
    save(train / "good.png", pixels(8, 8))
    os.mkfifo(train / "pipe.png")
    (train / "zero.jpg").symlink_to("/dev/zero")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import pathlib, test_data_folder as t; "
        f"print(t.load_split(pathlib.Path({str(two_splits)!r})).skipped)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    reason = "a FIFO, device or socket: put the image itself there"
    assert f"('train/pipe.png: {reason}', 'train/zero.jpg: {reason}')" in found.stdout, found.stderr


def test_control_characters_in_names_are_escaped(
    two_splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = two_splits / "images" / "train"
    save(train / "a\x1b[2J\n.png", pixels(8, 8))
    (train / "b\x1b]0;owned\x07.png").write_text("no image")
    (train / "c.\x1b[31m").write_text("other")
    (train / os.fsdecode(b"d\xff\r.jpg")).write_text("no image")
    images = load_split(two_splits)
    assert images.ids == ("train/a\\x1b[2J\\n.png",)
    assert [s.partition(": ")[0] for s in images.skipped] == [
        "train/b\\x1b]0;owned\\x07.png",
        "train/d\\xff\\r.jpg",
    ]
    said = "".join(r.getMessage() for r in caplog.records)
    assert all(c.isprintable() or c == "\n" for c in said) and ".\\x1b[31m (1)" in said


def test_changed_colours_are_reported(two_splits: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, grey = two_splits / "images" / "train", pixels(8, 8, 1)
    save(train / "colour.png", pixels(8, 8))
    save(train / "grey.png", grey)
    save(train / "threefold.png", np.repeat(grey[..., None], 3, axis=2))
    as_colour = load_split(two_splits).caution
    assert as_colour.startswith("2 of 3 train images are grey and were made RGB")
    assert as_colour in caplog.text
    assert load_split(two_splits, channels=1).caution.startswith(
        "1 of 3 train images are in colour"
    )
    small = load_split(two_splits, image_size=16).caution
    assert "3 of 3 train images are smaller" in small and "; 2 of 3 train images are grey" in small
    (train / "grey.png").unlink()
    (train / "threefold.png").unlink()
    assert load_split(two_splits).caution == ""
