"""Files with checksums: reading returns what was written, or the error names the file."""

import errno
import io
import json
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from etils import epath
from pictures import pixels
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from sbml.core import files
from sbml.core.files import DamagedFileError
from sbml.data import _cache
from sbml.program.report.pictures import png
from sbml.program.runtime import metrics
from sbml.program.runtime.workdir import EVALUATION, SAMPLES, TABLE, Workdir

ARRAYS = {"id": np.arange(3), "value": np.array([1.5, np.nan, -np.inf]), "name": np.asarray("ä")}
VALUES = {"a": [1, 0.1, 1e-300], "b": {"c": None, "ä": "NaN"}}


def bit_flips(content: bytes, count: int = 400):
    """``count`` copies of ``content``, each with one bit changed. A fixed seed chooses the bits."""
    places = np.random.default_rng(0).integers(0, 8 * len(content), count)
    for place in map(int, places):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def damages(content: bytes):
    """Damaged versions of ``content``: cut short, empty, longer, of another format, or with one bit
    changed."""
    yield from (b"", content[:1], content[: len(content) // 2], content[:-1], content + b"\0")
    yield from (b"not arrays", b"[1]", b"{}", b"\xff\xfe", b"[" * 10_000)
    yield from bit_flips(content)


def test_arrays_come_back_bit_for_bit_and_numpy_reads_them(tmp_path):
    path = tmp_path / "x.npz"
    files.write_npz(path, ARRAYS)
    first = path.read_bytes()
    for arrays in (files.read_npz(path), dict(np.load(path))):
        assert arrays.keys() == ARRAYS.keys()
        assert all(arrays[name].tobytes() == value.tobytes() for name, value in ARRAYS.items())
    files.write_npz(path, ARRAYS)
    assert path.read_bytes() == first


def test_the_error_of_a_read_only_disk_names_the_file(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    path = tmp_path / "x.npz"
    for name in ("write_bytes", "unlink"):
        monkeypatch.setattr(type(epath.Path(path)), name, refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        files.write_npz(path, ARRAYS)
    assert caught.value.filename == str(path)


def test_the_error_for_a_folder_in_the_place_of_a_file_says_so(tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(IsADirectoryError, match=r"x\.npz is a directory") as caught:
        files.write_npz(tmp_path / "x.npz", ARRAYS)
    assert "None" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_every_damage_of_arrays_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "x.npz"
    files.write_npz(path, ARRAYS)
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"x\.npz is damaged .*: throw it away"):
            files.read_npz(path, "throw it away")
        assert files.intact_npz(path) is None


def with_comment(content: bytes) -> bytes:
    """The archive ``content`` with the comment that ``write_npz`` would give it."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"crc32=00000000"
    content = buffer.getvalue()
    return content[:-8] + f"{zlib.crc32(content):08x}".encode()


def test_a_file_that_unpacks_to_more_than_its_size_is_not_unpacked(tmp_path, monkeypatch):
    """Compressed zeros, and a header of a huge array."""
    path, buffer, entries = tmp_path / SAMPLES, io.BytesIO(), 10**6
    np.savez_compressed(buffer, images=np.zeros((entries, 8, 8, 1), np.uint8), failed=[False])
    path.write_bytes(with_comment(buffer.getvalue()))
    assert path.stat().st_size < 1e5
    message = r"samples\.npz is damaged .*: its \d+ bytes unpack to 64000\d+\): remove it, and make"
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *given: pytest.fail("unpacked"))
        with pytest.raises(DamagedFileError, match=message) as caught:
            Workdir(tmp_path).read(SAMPLES)
    assert "\n" not in str(caught.value)
    files.write_npz(path, {"images": np.zeros(1000, np.uint8)})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other := io.BytesIO(), "w") as huge:
        header = archive.read("images.npy").replace(
            b"(1000,), }          ", b"(10000000000000,), }"
        )
        huge.writestr("images.npy", header)
    path.write_bytes(with_comment(other.getvalue()))
    with pytest.raises(DamagedFileError, match="another program wrote it: "):
        files.read_npz(path)


def test_damaged_json_is_an_error_or_the_same_values(tmp_path):
    """If only a space or an escape sequence changes, the values can stay the same."""
    path = tmp_path / "x.json"
    files.write_json(path, VALUES)
    assert files.read_json(path) == VALUES
    assert {**json.loads(path.read_text())}.keys() == {*VALUES, "crc32"}
    refused = 0
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        try:
            assert files.read_json(path) == VALUES
        except DamagedFileError as error:
            assert "x.json is damaged" in str(error)
            refused += 1
    assert refused > 300


def test_a_damaged_picture_is_an_error_or_the_same_pixels(tmp_path):
    """A PNG file ends with an empty chunk. Damage to this chunk alone changes no pixel."""
    path = tmp_path / "neighbours.png"
    refused, intact = 0, png(grid := pixels(24, 24))
    for content in damages(intact):
        path.write_bytes(content)
        try:
            found = files.read_png(path, "draw it again")
        except DamagedFileError as error:
            assert str(path) in str(error) and str(error).endswith("draw it again")
            refused += 1
            continue
        np.testing.assert_array_equal(Image.open(io.BytesIO(found)), grid)
    assert refused > 390


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, VALUES)

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(files.epath.Path(path)), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {})
    assert files.read_json(path) == VALUES
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_work_directory_says_which_mode_makes_a_file(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    with pytest.raises(ValueError, match=r"no samples\.npz in .*--mode=sample"):
        workdir.read(SAMPLES)
    (tmp_path / EVALUATION).write_text("{}")
    with pytest.raises(DamagedFileError, match=r"evaluation\.json is damaged .*--mode=eval"):
        workdir.read(EVALUATION)
    workdir.write(TABLE, VALUES)
    assert workdir.read(TABLE) == VALUES and workdir.name == tmp_path.name
    files.write_json(tmp_path / TABLE, VALUES | {"format": 2})
    text = "has the format 2, and this version .* reads the format 1: remove it, .*--mode=table"
    with pytest.raises(ValueError, match=text):
        workdir.read(TABLE)
    monkeypatch.chdir(tmp_path)
    assert Workdir(".").name == Workdir("./").name == tmp_path.name
    assert Workdir("gs://bucket/run").name == "run"


def test_a_damaged_line_of_metrics_is_left_out_alone(tmp_path, caplog):
    path = tmp_path / metrics.FILE
    log = metrics.Log(tmp_path, 0, 1)
    for step in range(1, 6):
        log.add(1 / step, 0.0)
        log.row(step)
    log.close()
    lines = path.read_text().splitlines(keepends=True)
    third = metrics.read(tmp_path)[2]
    assert set(third) == {"step", "loss", "grad_norm", "images_per_s", "seconds"}
    assert (third["step"], third["loss"], third["grad_norm"]) == (3, 1 / 3, 0.0)
    assert third["seconds"] > metrics.read(tmp_path)[1]["seconds"] > 0
    lines[1] = lines[1].replace('"loss": 0.5', '"loss": 0.7')
    # The last line is incomplete, as after a kill.
    path.write_text("".join(lines) + '{"step": 6, "lo')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 3, 4, 5]
    assert f"line 2 of {path} is damaged" in caplog.text and "line 6" not in caplog.text
    log = metrics.Log(tmp_path, 4, 1)  # as in a run that resumes from step 4
    log.add(0.3, 0.0)
    log.row(5)
    log.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 3, 4, 5]
    assert metrics.read(tmp_path)[-1]["loss"] == 0.3
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == lines[1]


FULL_DISK = """
import resource, signal, sys
from sbml.program.runtime import metrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # A file that grows too large is an OSError.
most, free = 8000, resource.RLIM_INFINITY
log = metrics.Log(sys.argv[1], 0, 1)
for step in range(1, 121):
    resource.setrlimit(resource.RLIMIT_FSIZE, (free if step == 120 else most, free))
    log.add(float(step), float(step))
    log.row(step)
log.close()
assert log.failures > 20
"""


def event_steps(content):
    """The steps of the events in a file of TensorBoard, up to the first that is cut off."""
    while len(content) >= 8:
        size = int.from_bytes(content[:8], "little")  # A checksum follows.
        if len(content) < 16 + size:
            return
        yield Event.FromString(content[12 : 12 + size]).step
        content = content[16 + size :]


def test_metrics_that_found_no_room_are_written_once_there_is_room(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, 121))
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:]))
    assert len(files) > 1
    first, *later = ([*event_steps(path.read_bytes())] for path in files)
    steps = [step for of_file in later for step in of_file]
    assert 1 in first and steps[-1] == 120
    assert 1 not in steps  # Otherwise TensorBoard would drop the first file's steps.


def test_images_are_prepared_again_if_their_files_are_damaged(tmp_path, caplog):
    images, path = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), tmp_path / "train.npy"

    def prepare():
        return _cache.load_or_build(path, lambda add: [add(image) for image in images] and {"n": 3})

    for name in ("train.npy", "train.json"):
        whole = prepare()[0] is not None and (tmp_path / name).read_bytes()
        for content in (b"", whole[: len(whole) // 2], *bit_flips(whole, 40)):
            (tmp_path / name).write_bytes(content)
            arrays, notes = prepare()
            np.testing.assert_array_equal(arrays, images)
            assert notes == {"n": 3}
    assert "train.npy is damaged" in caplog.text and "train.json is damaged" in caplog.text
