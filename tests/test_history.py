"""``history.jsonl`` keeps the row of each mode, unless the row itself was cut off."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sbml.program.runtime import history, metrics


def modes(workdir: Path) -> list[str]:
    return [row["mode"] for row in metrics.read(workdir, history.FILE)]


def test_modes_that_end_at_once_each_have_a_row(tmp_path: Path) -> None:
    names = [f"mode {i}" for i in range(64)]

    def run(name: str) -> None:
        with history.noted(tmp_path, name):
            pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, names))
    assert sorted(modes(tmp_path)) == sorted(names)


def test_a_row_that_was_cut_off_damages_no_other_row(tmp_path: Path) -> None:
    for name in ("train", "eval"):
        with history.noted(tmp_path, name):
            pass
    path = tmp_path / history.FILE
    path.write_bytes(path.read_bytes()[:-20])
    with history.noted(tmp_path, "sample"):
        pass
    assert modes(tmp_path) == ["train", "sample"]


def test_a_mode_that_fails_has_a_row(tmp_path: Path) -> None:
    with pytest.raises(KeyError), history.noted(tmp_path, "train"):
        raise KeyError
    assert modes(tmp_path) == ["train"]


def test_a_file_that_cannot_be_written_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / history.FILE).mkdir()
    with caplog.at_level(logging.WARNING), history.noted(tmp_path, "train"):
        pass
    assert f"{tmp_path / history.FILE} cannot be written" in caplog.text
