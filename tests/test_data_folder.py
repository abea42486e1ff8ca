"""A user's folder: every file is used once, or named with the reason."""

import dataclasses
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


DEEP = ("rgb.png", "grey.png", "rgba.png", "rgb.tif", "rgba.tif")  # of 16 bits a channel


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
    save(train / "clear.png", pixels(8, 8, 4))
    Image.new("F", (8, 8)).save(train / "float.tif")
    for name in DEEP:
        channels = {"rgb": 3, "rgba": 4, "grey": 2}[Path(name).stem]
        save_deep(train / name, np.full((8, 8, channels), 2**16 - 1, np.uint16))
    (train / "grey.pgm").write_bytes(b"P5 8 8 255 " + bytes(64))
    frames = [Image.fromarray(pixels(8, 8, seed=i)) for i in range(2)]
    frames[0].save(train / "moves.png", save_all=True, append_images=frames[1:])
    frames[0].save(train / "film.gif", save_all=True, append_images=frames[1:])  # the first is used
    bad = {
        "clear.png": "transparent pixels",
        "cut.png": "",
        "empty.png": "",
        "float.tif": "it has 32 bits a channel: save the image with 8",
        "grey.pgm": "a file of the format PPM: save it as PNG",
        "moves.png": "it has 2 frames: save each as an image of its own",
        "text.jpg": "",
        **dict.fromkeys(DEEP, "it has 16 bits a channel: save the image with 8"),
    }
    for _ in range(2):  # The second result is cached, and warns again.
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            images = load_split(two_splits)
        assert images.ids == ("train/film.gif", "train/good.png")
        expected = [f"train/{name}: {bad[name]}" for name in sorted(bad)]
        assert all(map(str.startswith, images.skipped, expected)), images.skipped
        assert len(images.skipped) == len(bad) and "12 of 14 train files not used" in caplog.text


def test_all_files_that_are_left_out_are_counted(
    two_splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other suffixes are counted, and any file name is accepted."""
    train = two_splits / "images" / "train"
    save(train / "a.png", pixels(8, 8))
    os.rename(train / "a.png", os.path.join(os.fsencode(train), b"caf\xe9.jfif"))
    for name in ("labels.csv", "x.txt", "y.txt", ".hidden.png"):
        (train / name).touch()
    assert load_split(two_splits).ids == ("train/caf\\xe9.jfif",)
    assert "3 files" in caplog.text and ".csv (1), .txt (2)" in caplog.text
    train.rename(train.with_name("Train"))
    with pytest.raises(ValueError, match="a subfolder Train: call it train"):
        load_split(two_splits)


def test_no_usable_image_is_an_error(two_splits: Path) -> None:
    with pytest.raises(ValueError, match="has 1 images, none of them for 'train'"):
        load_split(two_splits)
    (two_splits / "images" / "train" / "x.png").touch()
    with pytest.raises(ValueError, match=r"None of 1 images is usable. The first: train/x.png"):
        load_split(two_splits)


@pytest.mark.parametrize(
    ("link", "target"),
    [("train/0.png", "all/0.png"), ("train/all", "all"), ("test", "all"), ("x.png", "nowhere.png")],
)
def test_links_are_refused(tmp_path: Path, link: str, target: str) -> None:
    """With a link one image could be in both splits. The folder itself may be a link."""
    root = tmp_path / "images"
    for name in ("all/0.png", "train/own.png", "test/own.png"):
        save(tmp_path / "place" / name, pixels(8, 8))
    root.symlink_to(tmp_path / "place")
    assert load_split(tmp_path).ids == ("train/own.png",)
    (root / link).exists() and shutil.rmtree(root / link)
    (root / link).symlink_to(root / target)
    with pytest.raises(ValueError, match=f"images: {link} is a link: put the images themselves"):
        load_split(tmp_path)


def test_hard_links_are_refused(two_splits: Path) -> None:
    train = two_splits / "images" / "train"
    save(train / "a.png", pixels(8, 8))
    os.link(train / "a.png", train.with_name("test") / "b.png")
    with pytest.raises(ValueError, match=r"\.png is a hard link of t.*\.png: put the images"):
        load_split(two_splits)


def test_pixel_formats(two_splits: Path) -> None:
    train = two_splits / "images" / "train"
    rgb = pixels(8, 8)
    save(train / "opaque.png", np.concatenate([rgb, np.full((8, 8, 1), 255, np.uint8)], -1))
    Image.fromarray(rgb).convert("CMYK").save(train / "ink.tif")
    Image.fromarray(rgb[..., 0]).save(train / "grey.png")
    more = {"save_all": True, "append_images": [Image.fromarray(255 - rgb)]}
    Image.fromarray(rgb).save(train / "camera.jpg", format="MPO", quality=100, **more)
    Image.fromarray(rgb[..., 0]).save(train / "moves.gif", **more)
    Image.fromarray(rgb).quantize(256).save(train / "palette.png")
    images = load_split(two_splits)
    assert images.ids is not None
    by_name = dict(zip((Path(i).stem for i in images.ids), images.images, strict=True))
    np.testing.assert_array_equal(by_name["opaque"], rgb)
    np.testing.assert_array_equal(by_name["camera"], Image.open(train / "camera.jpg"))
    np.testing.assert_array_equal(by_name["moves"], by_name["grey"])
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
    assert f"('train/pipe.png: {reason}',)" in found.stdout, found.stderr


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
