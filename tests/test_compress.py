"""``--mode=compress`` and ``--mode=decompress``: files of a trained model."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import runs
import tiny
from PIL import ExifTags, Image

from sbml import data
from sbml.codec import CodedFileError
from sbml.core.files import read_json, read_npz
from sbml.program.config import build
from sbml.program.evaluation import coding
from sbml.program.modes import compress, decompress, report, train
from sbml.program.report.stored import Stored
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import CODEC, IMAGES, RESTORED, Workdir


def config(**codec: int):
    chosen = tiny.get_config()
    chosen.codec.update({"num_images": 20, "steps": 6, "lanes": 3, **codec})
    return chosen


@pytest.fixture(scope="module")
def trained(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    (workdir / "checkpoints").symlink_to(digits_model / "checkpoints")
    return workdir


@pytest.fixture(scope="module")
def coded(trained: Path) -> Path:
    runs.mode(compress.run, config(), trained)
    return trained


def of_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def test_the_images_of_a_split_come_back_and_the_parts_of_the_length_add_up(
    coded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.mode(decompress.run, config(), coded)
    assert "compressed and restored: 20 of 20 images, " in capsys.readouterr().out
    restored, digits = read_npz(coded / RESTORED), data.load("digits", "test").images
    ids = np.sort(np.random.RandomState(0).permutation(len(digits))[:20])
    np.testing.assert_array_equal(restored["images"], digits[ids])
    said, size = read_json(coded / CODEC, ""), (coded / IMAGES).stat().st_size
    assert said["bytes"] == size and said["restored"] == 20
    assert said["disk"] == 8 * size / (20 * 64)
    parts = said["net"] + said["initial"] + said["header"]
    assert parts == pytest.approx(said["disk"], rel=1e-12)
    # The noise of 20 paths: the variance of a log-ratio is about twice its mean, in nats.
    noise = np.sqrt(2 * said["bound"] * 64 * np.log(2) / 20) / (64 * np.log(2))
    words = 32 * 3 / (20 * 64)  # A stack ends with a whole word.
    assert abs(said["net"] - said["bound"]) < 4 * np.hypot(noise, said["bound_stderr"]) + words


def test_the_report_says_what_was_restored(coded: Path) -> None:
    runs.mode(decompress.run, config(), coded)
    runs.mode(report.run, config(), coded)
    page = (coded / "report.html").read_text()
    disk = read_json(coded / CODEC, "")["disk"]
    assert f"Compressed and restored: 20 of 20 images, {disk:.4f} bits/dim on disk." in page
    assert Stored(Workdir(coded)).codec({"parameters_crc32": 1}) is None


@pytest.mark.slow
def test_a_folder_of_images_goes_to_a_file_and_back(coded: Path, tmp_path: Path) -> None:
    for workdir in ("a", "b"):
        (tmp_path / workdir).mkdir()
        (tmp_path / workdir / "checkpoints").symlink_to(coded / "checkpoints")
    first = tmp_path / "first"
    runs.mode(decompress.run, config(), tmp_path / "a", source=str(coded / IMAGES), to=str(first))
    assert [path.name for path in sorted(first.iterdir())][:2] == ["00.png", "01.png"]
    restored = of_folder(first)
    with Image.open(first / "00.png") as shown:  # Level 16 of 17 is shown white.
        assert shown.getpalette()[16 * 3 : 17 * 3] == [255] * 3
    runs.mode(compress.run, config(), tmp_path / "b", source=str(first))
    runs.mode(decompress.run, config(), tmp_path / "b")
    images = read_npz(tmp_path / "b" / RESTORED)["images"]
    np.testing.assert_array_equal(images[..., 0], restored)
    with pytest.raises(ValueError, match=r"00.png exists, and would be overwritten"):
        runs.mode(decompress.run, config(), tmp_path / "b", to=str(first))
    (first / "00.png").unlink()
    with pytest.raises(ValueError, match=r"images.sbml holds other images.*move it"):
        runs.mode(compress.run, config(), tmp_path / "b", source=str(first))


def test_the_source_of_images_is_a_folder() -> None:
    unused: Any = None
    with pytest.raises(ValueError, match=r"--source=.*\.py is no folder: give a folder of images"):
        compress.run(unused, unused, source=__file__)


def picture(path: Path, *, channels: int = 3, **options: Any) -> None:
    Image.fromarray(pictures.pixels(8, 8, channels)).save(path, **options)


def transparent(path: Path) -> None:
    picture(path, channels=1, transparency=int(pictures.pixels(8, 8, 1)[0, 0]))


def palette(path: Path) -> None:
    image = Image.frombytes("P", (8, 8), bytes(range(16)) * 4)
    image.putpalette([200, 0, 0] * 16)
    image.save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(path, exif=exif)


def deep(path: Path) -> None:
    pictures.save_deep(path, np.full((8, 8, 3), 2**15, np.uint16))


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}


@pytest.mark.parametrize(
    ("name", "make", "channels", "levels", "reason"),
    [
        ("a.png", lambda path: Image.new("RGB", (9, 8)).save(path), 3, 256, r"shape \(8, 9, 3\)"),
        ("a.png", picture, 1, 256, "mode RGB"),
        ("a.png", lambda path: picture(path, channels=1), 1, 17, "mode L"),
        ("a.png", deep, 3, 256, "16 bits"),
        ("a.tif", deep, 3, 256, "16 bits"),
        ("a.ppm", deep, 3, 256, "the format PPM"),
        ("a.png", lambda path: picture(path, **FRAMES), 3, 256, "2 frames"),
        ("a.webp", lambda path: picture(path, **FRAMES), 3, 256, "2 frames"),
        ("a.tif", lambda path: picture(path, **FRAMES), 3, 256, "2 frames"),
        ("a.gif", lambda path: picture(path, channels=1, **FRAMES), 1, 256, "2 frames"),
        ("a.png", palette, 1, 16, "palette"),
        ("a.png", transparent, 1, 256, "transparent"),
        ("a.png", turned, 3, 256, "orientation"),
        ("a.png", lambda path: path.write_text("no image"), 3, 256, "cannot identify"),
        ("a.png", lambda path: path.symlink_to("nowhere"), 3, 256, "No such file"),
        ("a.png", os.mkfifo, 3, 256, "FIFO"),
        ("a", Path.mkdir, 3, 256, "folder"),
    ],
)
def test_what_the_codec_could_not_restore_is_refused_by_name(
    tmp_path: Path, name: str, make: Any, channels: int, levels: int, reason: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"/{name} cannot be coded without loss.*{reason}"):
        coding.read_folder(tmp_path, (8, 8, channels), levels)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_what_the_codec_restores_is_accepted(tmp_path: Path, name: str) -> None:
    picture(tmp_path / name)
    (found,) = coding.read_folder(tmp_path, (8, 8, 3), 256)
    np.testing.assert_array_equal(found, pictures.pixels(8, 8))


def test_a_damaged_file_gives_back_the_images_of_the_other_lanes(
    coded: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(coded / "checkpoints")
    content = bytearray((coded / IMAGES).read_bytes())
    content[-5] ^= 1
    (tmp_path / IMAGES).write_bytes(content)
    with pytest.raises(CodedFileError, match="lanes 2 of 3.*14 of 20 images were restored"):
        runs.mode(decompress.run, config(), tmp_path)
    found, whole = read_npz(tmp_path / RESTORED), np.flatnonzero(np.arange(20) % 3 != 2)
    np.testing.assert_array_equal(found["id"], whole)
    runs.mode(decompress.run, config(), coded)
    images = read_npz(coded / RESTORED)["images"]
    np.testing.assert_array_equal(found["images"], images[whole])
    with pytest.raises(CodedFileError):
        runs.mode(decompress.run, config(), tmp_path, to=str(tmp_path / "pictures"))
    names = [path.name for path in sorted((tmp_path / "pictures").iterdir())]
    assert names == [f"{number:02d}.png" for number in whole]
    np.testing.assert_array_equal(of_folder(tmp_path / "pictures"), images[whole, ..., 0])


@pytest.mark.slow
def test_a_model_of_bin_centres_without_a_decoder_is_coded_by_the_categorical_one(
    tmp_path: Path,
) -> None:
    centres = config(num_images=6)
    centres.data.dequantization = "centre"
    for mode in (train, compress, decompress):
        runs.mode(mode.run, centres, tmp_path)
    said = read_json(tmp_path / CODEC, "")
    assert said["restored"] == 6
    # A path has a noise of its own: the variance of a log-ratio is about twice its mean, in nats.
    noise = np.sqrt(2 * said["bound"] * 64 * np.log(2) / 6) / (64 * np.log(2))
    assert abs(said["net"] - said["bound"]) < 4 * np.hypot(noise, said["bound_stderr"])


@pytest.mark.slow
def test_another_checkpoint_is_refused(coded: Path, tmp_path: Path) -> None:
    other = config()
    other.training.num_steps = 1
    runs.mode(train.run, other, tmp_path)
    with pytest.raises(
        CodedFileError, match=r"weights \w+, here \w+;.*only be decoded by the same"
    ):
        runs.mode(decompress.run, other, tmp_path, source=str(coded / IMAGES))
    with pytest.raises(ValueError, match=r"no file .*--mode=compress"):
        runs.mode(decompress.run, other, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "last"), [(compress, IMAGES), (decompress, RESTORED)])
def test_a_stopped_run_continues_to_the_same_file(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, last: str
) -> None:
    (tmp_path / "checkpoints").symlink_to(coded / "checkpoints")
    shutil.copy(coded / IMAGES, tmp_path / IMAGES)  # of the same images, so it may be overwritten
    runs.mode(decompress.run, config(), coded)
    calls: list[int] = []

    def third(preemption: Preemption) -> bool:
        calls.append(1)
        preemption._received = signal.SIGTERM if len(calls) >= 3 else None
        return len(calls) >= 3

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Preemption, "requested", third)
        runs.mode(mode.run, config(), tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    (stored,) = (tmp_path / "codec").iterdir()
    number = int(read_npz(stored)["number"])
    assert number == (2 if mode is compress else 5)
    runs.mode(mode.run, config(), tmp_path)
    assert not list((tmp_path / "codec").iterdir())
    assert (tmp_path / last).read_bytes() == (coded / last).read_bytes()


def test_what_cannot_be_coded_is_refused_first(tmp_path: Path) -> None:
    classes = config()
    classes.model.classes = 10
    with pytest.raises(ValueError, match="--mode=compress with model.classes=10"):
        compress.check(build.Experiment(classes), Workdir(tmp_path), [])
