"""ImageNet 32x32 is two data sets: both are read from archives of their layout, and never mixed."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import pixels
from PIL import Image

from sbml import data
from sbml.data import imagenet32
from sbml.program.config import compatibility

IMAGES = np.stack([pixels(32, 32, seed=i) for i in range(5)])


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Options:
    """A folder with both versions' archives of five images, and options that read them."""
    monkeypatch.setattr(
        imagenet32, "COUNTS", {v: dict.fromkeys(data.SPLITS, 5) for v in ("old", "new")}
    )
    for split, folder in (("train", "train_32x32"), ("test", "valid_32x32")):
        with tarfile.open(tmp_path / f"{folder}.tar", "w") as tar:
            directory = tarfile.TarInfo(folder)
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
            for i, image in enumerate(IMAGES):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                member = tarfile.TarInfo(f"{folder}/{i:07d}.png")
                member.size = len(png.getvalue())
                tar.addfile(member, io.BytesIO(png.getvalue()))
        planes = IMAGES.transpose(0, 3, 1, 2).reshape(5, -1)
        with zipfile.ZipFile(tmp_path / imagenet32.ARCHIVES["new"][split], "w") as files:
            for name, rows in (("a.npz", planes[:3]), ("b.npz", planes[3:])):
                packed = io.BytesIO()
                np.savez(packed, data=rows, labels=np.arange(len(rows)))
                files.writestr(name, packed.getvalue())
    return data.Options(cache_dir=tmp_path / "cache", manual_dir=tmp_path)


@pytest.mark.parametrize("version", ["old", "new"])
@pytest.mark.parametrize("split", data.SPLITS)
def test_every_image_of_the_archive_is_read(
    version: str, split: str, archives: data.Options
) -> None:
    images = data.load(f"imagenet32:{version}", split, archives)
    np.testing.assert_array_equal(images.images, IMAGES)
    assert images.fingerprint["name"] == f"imagenet32:{version}"


def test_an_archive_that_lacks_images_is_refused(
    archives: data.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet32, "COUNTS", {"old": {"test": 6}})
    with pytest.raises(ValueError, match="holds 5 images instead of 6"):
        data.load("imagenet32:old", "test", archives)
    assert not list(Path(archives.cache).rglob("*.npy"))


def test_the_error_for_a_missing_archive_names_it_and_the_remedy(tmp_path: Path) -> None:
    empty = data.Options(cache_dir=tmp_path, manual_dir=tmp_path)
    with pytest.raises(ValueError, match=r"Imagenet32_val_npz.zip.*data.manual_dir.*not there"):
        data.load("imagenet32:new", "test", empty)
    with pytest.raises(ValueError, match="imagenet32:older is unknown: choose imagenet32:old or"):
        data.load("imagenet32:older", "test", empty)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("imagenet32:old", "imagenet32:new"),
        ("tfds:downsampled_imagenet/32x32", "imagenet32:new"),
        ("tfds:imagenet_resized/32x32", "tfds:downsampled_imagenet/32x32"),
        ("tfds:imagenet_resized/32x32:0.1.0", "tfds:downsampled_imagenet:2.0.0"),
    ],
)
def test_the_two_are_never_compared(one: str, other: str, archives: data.Options) -> None:
    with pytest.raises(ValueError, match="imagenet32:new and imagenet32:old"):
        imagenet32.check_comparable(one, "digits", other)
    images = data.load("imagenet32:new", "test", archives)
    with pytest.raises(ValueError, match="must not be compared"):
        compatibility.other_data(
            {"data": {"name": "imagenet32:old", "sha256": ""}}, {"data": images.fingerprint}
        )


def test_names_of_the_same_data_set_may_be_compared() -> None:
    imagenet32.check_comparable("imagenet32:old", "tfds:downsampled_imagenet/32x32", "tfds:cifar10")
    imagenet32.check_comparable("tfds:imagenet_resized/32x32", "imagenet32:new")


@pytest.mark.parametrize("version", ["old", "new"])
def test_a_damaged_archive_is_named(version: str, archives: data.Options) -> None:
    path = Path(archives.manual_dir) / imagenet32.ARCHIVES[version]["test"]
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} (is damaged|holds . images)"):
            data.load(f"imagenet32:{version}", "test", archives)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (PermissionError("[Errno 13] Permission denied"), PermissionError, "Permission denied"),
        (MemoryError(), ValueError, "is damaged, or this machine has too little memory"),
    ],
)
def test_an_error_of_the_machine_is_not_called_damage(
    error: Exception,
    raised: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(archive: Path) -> None:
        raise error

    monkeypatch.setattr(zipfile, "ZipFile", fails)
    with pytest.raises(raised, match=message):
        list(imagenet32._images(tmp_path / "rows.zip"))


def test_changed_pixels_of_the_older_archive_are_refused(archives: data.Options) -> None:
    """A tar has no checksum of its members' bytes; the PNGs in it have."""
    path = Path(archives.manual_dir) / imagenet32.ARCHIVES["old"]["test"]
    whole = path.read_bytes()
    place = whole.index(b"IDAT") + 12
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        data.load("imagenet32:old", "test", archives)


def test_an_array_that_claims_too_much_is_refused(archives: data.Options) -> None:
    file, packed = io.BytesIO(), io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (9 * 10**12, 3072)}
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(packed, "w") as arrays:
        arrays.writestr("data.npy", file.getvalue() + b"pixels")
    path = Path(archives.manual_dir) / imagenet32.ARCHIVES["new"]["test"]
    with zipfile.ZipFile(path, "w") as files:
        files.writestr("a.npz", packed.getvalue())
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        data.load("imagenet32:new", "test", archives)
