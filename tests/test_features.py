"""Inception-v3 with random weights, compared with pytorch-fid; the other extractor.

The outputs of PyTorch are stored in a file, which ``data/make_inception.py`` writes.
"""

import functools
import hashlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import inception_weights
import numpy as np
import pytest
from inception_weights import random_weights, write_state_dict

from sbml import data
from sbml.program.features import EXTRACTORS, digits_classifier, inception
from sbml.program.runtime import weights as files

DATA = Path(__file__).parent / "data"
with np.load(DATA / "inception.npz") as stored:
    STORED = dict(stored)
SHAPES = json.loads(str(STORED["shapes"]))
IMAGES = STORED["images"]


read_state_dict = functools.partial(files.read, kind="PyTorch state dict")


@functools.cache
def weights(of: str) -> dict[str, np.ndarray]:
    return random_weights(SHAPES[of])


@pytest.mark.slow
def test_features_and_probabilities_are_pytorchs() -> None:
    params = inception.from_state_dict(weights("pytorch_fid"))
    features, probabilities = inception.look(params, IMAGES, inception.Model())
    assert np.abs(features).max() > 1
    np.testing.assert_allclose(features, STORED["pytorch_fid_features"], atol=1e-4)
    np.testing.assert_allclose(probabilities, STORED["pytorch_fid_probabilities"], atol=1e-6)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_weights_are_read_without_pytorch(kind: str) -> None:
    state = {
        "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "a.transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.ones(2),
        "count": np.array(7),
    }
    state["shared"] = state["a.weight"][1]
    arrays = read_state_dict(DATA / f"state_{kind}.pth")
    assert arrays.keys() == state.keys()
    for name, value in state.items():
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(arrays[name], value)


def test_nothing_in_a_weights_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("zip", "legacy"):
        with pytest.raises(ValueError, match=r"be read as a PyTorch state dict \(it refers to"):
            read_state_dict(DATA / f"malicious_{kind}.pth")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ValueError, match="cannot be read as a PyTorch state dict"):
        read_state_dict(tmp_path / "text.pth")


def test_ordinary_pickle_runs_the_code_in_the_malicious_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would show nothing."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(DATA / "malicious_zip.pth") as archive:
        pickle.loads(archive.read("malicious_zip/data.pkl"))
    (tmp_path / "harm").unlink()
    with (DATA / "malicious_legacy.pth").open("rb") as file:
        for _ in range(4):  # Magic number, protocol, description of the system, state dict.
            pickle.load(file)
    assert (tmp_path / "harm").exists()


@pytest.mark.slow
def test_the_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "BATCH", 2)
    file = tmp_path / "weights.pth"
    write_state_dict(file, weights("pytorch_fid"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    options = {"weights": str(file), "levels": 256, "cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, not 6726825d"):
        EXTRACTORS["inception"](sha256="6726825d", **options)
    extractor = EXTRACTORS["inception"](sha256=digest[:8], **options)
    # With other weights than the published ones, the name of the score says so.
    assert extractor.names[0] == f"FID (weights {digest[:8]})"
    features, probabilities = extractor(IMAGES)
    assert features.shape == (2, 2048) and probabilities.shape == (2, 1008)
    alone, _ = extractor(IMAGES[1:])  # one image and padding
    np.testing.assert_allclose(alone, features[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["", "nowhere.pth"])
def test_without_weights_the_error_says_what_to_do(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"download pt_inception-2015.*inception_weights"):
        EXTRACTORS["inception"](weights=weights, sha256="", levels=256, cache=str(tmp_path))


@pytest.mark.slow
def test_leaves_of_unsuitable_weights_are_named(tmp_path: Path) -> None:
    state = dict(weights("pytorch_fid"))
    state["fc.bias"] = np.zeros(3, np.float32)
    state.pop("Mixed_7c.branch_pool.conv.weight")
    write_state_dict(tmp_path / "w.pth", state)
    with pytest.raises(
        ValueError, match=r"missing: Mixed_7c/branch_pool/kernel \(1, 1, 2048, 192\)"
    ):
        inception.extractor(
            weights=str(tmp_path / "w.pth"), sha256="", levels=256, cache=str(tmp_path)
        )


def test_the_digits_classifier_classifies() -> None:
    extract = digits_classifier.extractor(weights="", sha256="", levels=17, cache=None)
    images = data.load("digits", "test").images
    features, probabilities = extract(images)
    assert features.shape == (360, digits_classifier.HIDDEN) and (features >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert not any(name.startswith(("FID", "KID", "IS")) for name in extract.names)
    assert "% right" in extract.names[0]
    with pytest.raises(ValueError, match="eval.quality.features=inception"):
        digits_classifier.extractor(weights="", sha256="", levels=256, cache=None)
    with pytest.raises(ValueError, match=r"images of shape \(28, 28, 1\)"):
        extract(np.zeros((1, 28, 28, 1), np.uint8))


def test_pickles_that_are_no_state_dict(tmp_path: Path) -> None:
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]) * 5)
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    for name in ("list.pkl", "arrays.npz"):
        with pytest.raises(ValueError, match="cannot be read as a PyTorch state dict"):
            read_state_dict(tmp_path / name)


def test_a_changed_value_in_a_zip_is_refused(tmp_path: Path) -> None:
    """The members have CRC32s. The legacy format has none, so it is compared with a SHA-256."""
    content = (DATA / "state_zip.pth").read_bytes()
    value = np.float32(0.5).tobytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename and m.file_size]
        starts = [content.index(archive.read(member)) for member in members]
    path = tmp_path / "state.pth"
    for start in starts:
        path.write_bytes(content[:start] + value + content[start + len(value) :])
        with pytest.raises(ValueError, match=r"state\.pth cannot be read as .* \(Bad CRC-32"):
            read_state_dict(path)


def test_a_memo_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    """pickle would allocate 16 GB for these ten bytes."""
    path = tmp_path / "memo.pth"
    path.write_bytes(b"\x80\x02]r" + (2**30).to_bytes(4, "little") + b"0.")
    with pytest.raises(ValueError, match=r"memo.pth cannot .*byte 3 claims 1073741824 objects"):
        read_state_dict(path)


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    """Otherwise the memory behind the storage would be read."""
    storage = np.arange(6.0)
    np.testing.assert_array_equal(files._tensor(storage, 1, (2, 2), (3, 1)), [[1, 2], [4, 5]])
    assert files._tensor(storage, 6, (0, 4), (4, 1)).size == 0
    for offset, size, stride in (
        (2, (2, 2), (3, 1)),
        (0, (7,), (1,)),
        (3, (2,), (-1,)),
        (-1, (1,), (1,)),
    ):
        with pytest.raises(pickle.UnpicklingError, match="goes beyond its storage"):
            files._tensor(storage, offset, size, stride)


def _claims(kind: str, count: int, size: int, stride: int) -> bytes:
    """A state dict of one tensor, (size,) with this stride, in a storage of ``count`` numbers."""
    opcodes = inception_weights.tensor("0", count, (size,), (stride,))
    state = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
    state += inception_weights.text("a") + opcodes + pickle.SETITEMS + pickle.STOP
    if kind == "legacy":
        header = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
        data = struct.pack("<q", count) + bytes(16)
        return header + state + pickle.dumps(["0"], 2) + data
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w/data/0", bytes(16))
        archive.writestr("w/data.pkl", state)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_more_numbers_than_the_file_holds_are_refused(tmp_path: Path, kind: str) -> None:
    """The sizes that the file states are checked before any memory is allocated."""
    path, trillions = tmp_path / "w.pth", 10**13
    path.write_bytes(_claims(kind, 4, 4, 1))
    assert read_state_dict(path)["a"].tolist() == [0, 0, 0, 0]
    for count, size, stride in ((trillions, 4, 1), (trillions, trillions, 1), (4, trillions, 0)):
        path.write_bytes(_claims(kind, count, size, stride))
        with pytest.raises(ValueError, match=r"w\.pth cannot be read as .*(claims|more)"):
            read_state_dict(path)
    # A pickle of a string of 10^13 bytes, and one that stores a list at index 2^31 - 1 of its memo.
    for opcodes in (b"\x80\x04\x8e" + struct.pack("<Q", trillions), b"]r\xff\xff\xff\x7f."):
        path.write_bytes(opcodes)
        with pytest.raises(ValueError, match=r"w\.pth cannot be read as a PyTorch state dict"):
            read_state_dict(path)
