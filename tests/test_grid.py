"""The file of a grid's results: what it keeps, what it leaves out, and how processes share it."""

import errno
import os
from pathlib import Path

import pytest

from experiments import grid


def once(out: Path, key: str) -> grid.Line:
    return grid.compute_once(out, key, lambda: {"value": [0.1, 1e-17], "of": key})


def test_what_is_stored_is_read_and_not_computed_again(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "lines.jsonl"
    lines = [once(out, key) for key in ("a", "b c")]
    assert [once(out, key) for key in ("a", "b c")] == lines == list(grid.read(out).values())
    assert out.read_bytes().count(b"\n") == 2


def test_damaged_lines_and_those_of_other_versions_stay_and_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines.jsonl"
    now = grid.packages()
    with monkeypatch.context() as patch:
        patch.setattr(grid, "packages", lambda: {**now, "jax": "0.0"})
        once(out, "other")
    for key in ("a", "b", "c"):
        once(out, key)
    # A number of the second line changes, and a kill has cut off the last line.
    other, first, second, third = out.read_bytes().splitlines()
    damaged = [other, first, second.replace(b"0.1", b"0.2"), third[:20]]
    out.write_bytes(b"\n".join(damaged))
    assert list(grid.read(out)) == ["a"] == list(grid.read(out))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "1 lines are of other versions than" in said[0]
    assert (
        "line 3 is damaged (it fails its CRC32, or has none)" in said[1]
        and "line 4 is damaged" in said[2]
    )
    for key in ("b", "c", "other"):
        once(out, key)
    assert list(grid.read(out)) == ["a", "b", "c", "other"]
    assert out.read_bytes().splitlines()[:4] == damaged


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "lines.jsonl", os.write
    once(out, "a")
    before, room = out.read_bytes(), [30, 0]

    def full(file: int, content: bytes) -> int:
        if not (size := room.pop(0)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content[:size])

    with monkeypatch.context() as patch:
        patch.setattr(grid.os, "write", full)
        with pytest.raises(OSError, match="No space left.*lines.jsonl"):
            once(out, "b")
    assert out.read_bytes() == before and list(grid.read(out)) == ["a"]
    once(out, "b")
    assert list(grid.read(out)) == ["a", "b"]


def test_what_another_process_computes_is_left_for_later(tmp_path: Path) -> None:
    out, order, other = tmp_path / "lines.jsonl", [], grid.claimed(tmp_path / "lines.jsonl", "a")
    other.__enter__()

    def task(key: str) -> grid.Line:
        order.append(key)
        if order == ["a", "b"]:
            other.__exit__(None, None, None)
        return once(out, key)

    found = grid.shared([lambda: task("a"), lambda: task("b")], pause=0.0)
    assert order == ["a", "b", "a"] and [line["of"] for line in found] == ["a", "b"]
