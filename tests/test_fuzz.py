"""Damaged files of other programs: they are read, or a ValueError names the file.

Bits are flipped, files cut, emptied, or replaced by another kind of file, at random but from fixed
seeds. A damaged zip archive must never be read as other contents. The other formats have no
checksum: there we require only a ValueError or a result, no hang and no huge allocation.
SBML_FUZZ_ROUNDS=100000 looks for hours instead of seconds.
"""

import functools
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flax import serialization
from inception_weights import write_state_dict
from pictures import pixels
from PIL import Image

from sbml import data
from sbml.data import imagenet32
from sbml.program.runtime import weights

ROUNDS = int(os.environ.get("SBML_FUZZ_ROUNDS", "60"))  # of each kind of damage and file
DATA = Path(__file__).parent / "data"
STATE = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(2, np.float32)}


def damaged(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Versions of ``content``, each damaged in one way."""
    yield from (b"", b"\x00", b"text", content[:1], content + b"\x00" * 7, content * 2)
    yield pickle.dumps(list(range(5)))
    for _ in range(ROUNDS):
        yield content[: rng.integers(len(content))]
        flipped = bytearray(content)
        for place in rng.integers(len(content), size=rng.integers(1, 9)):
            flipped[place] ^= 1 << rng.integers(8)
        yield bytes(flipped)
        start, length = rng.integers(len(content)), rng.integers(1, 64)
        yield content[:start] + rng.bytes(length) + content[start + length :]
        yield content[:start] + b"\xff" * int(length) + content[start + length :]


def zipped_state(folder: Path) -> bytes:
    write_state_dict(folder / "state.pth", STATE)
    return (folder / "state.pth").read_bytes()


def legacy_state(folder: Path) -> bytes:
    return (DATA / "state_legacy.pth").read_bytes()


def safetensors_state(folder: Path) -> bytes:
    return safetensors.numpy.save(STATE)


def checkpoint(folder: Path) -> bytes:
    tree = {"step": 3, "params_ema": STATE, "optimizer": {"target": STATE, "state": {"step": 3}}}
    return serialization.msgpack_serialize(tree)


def tar(folder: Path) -> bytes:
    file, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels(32, 32)).save(png, "PNG")
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("valid_32x32/1.png")
        member.size = len(png.getvalue())
        archive.addfile(member, io.BytesIO(png.getvalue()))
    return file.getvalue()


def zipped_rows(folder: Path) -> bytes:
    file, rows = io.BytesIO(), io.BytesIO()
    np.savez(rows, data=np.stack([pixels(32, 32).transpose(2, 0, 1).reshape(-1)] * 2))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npz", rows.getvalue())
    return file.getvalue()


def images(path: Path) -> dict[str, Any]:
    return {str(i): image for i, image in enumerate(imagenet32._images(path))}


Read = Callable[[Path], dict[str, Any]]


def weights_of(kind: str) -> Read:
    return functools.partial(weights.read, kind=kind)


FILES: dict[str, tuple[Callable[[Path], bytes], Read, bool]] = {
    "zipped.pth": (zipped_state, weights_of("PyTorch state dict"), True),
    "legacy.pth": (legacy_state, weights_of("PyTorch state dict"), False),
    "unet.safetensors": (safetensors_state, weights_of("safetensors file"), False),
    "checkpoint_3": (checkpoint, weights_of("flax msgpack file"), False),
    "valid_32x32.tar": (tar, images, False),
    "rows.zip": (zipped_rows, images, True),
}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_named(name: str, tmp_path: Path) -> None:
    make, read, checksums = FILES[name]
    content, path = make(tmp_path), tmp_path / name
    path.write_bytes(content)
    whole, refused = read(path), 0
    assert whole
    for damage in damaged(content, np.random.default_rng(0)):
        path.write_bytes(damage)
        try:
            found = read(path)
        except ValueError as error:
            assert name in str(error)
            refused += 1
        else:
            assert isinstance(found, dict)
            # If the archive's index has lost a part, the smaller archive is valid too.
            assert not checksums or all(same({k: found[k]}, {k: whole[k]}) for k in found)
    assert refused > ROUNDS


def test_damaged_images_of_a_folder_are_listed(tmp_path: Path) -> None:
    """All are read at once: each is used or listed, and the undamaged one is unchanged."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    for split in data.SPLITS:
        (folder / split).mkdir(parents=True)
        Image.fromarray(pixels(8, 8)).save(folder / split / "good.png")
    count = 1
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm"):
        file = io.BytesIO()
        image = Image.fromarray(pixels(24, 24))
        image.save(file, {"jpg": "jpeg", "ppm": "ppm"}.get(suffix, suffix))
        for i, damage in enumerate(damaged(file.getvalue(), rng)):
            if i % 10 == 0:
                (folder / "train" / f"{suffix}{i}.{suffix}").write_bytes(damage)
                count += 1
    options = data.Options(cache_dir=tmp_path / "cache", path=folder, image_size=8)
    found = data.load("image_folder", "train", options)
    listed = {line.partition(":")[0] for line in found.skipped}
    assert len(listed) + len(found) == count and not listed & set(found.ids or ())
    assert len(listed) > count // 5
    np.testing.assert_array_equal(
        found.images[(found.ids or ()).index("train/good.png")], pixels(8, 8)
    )
