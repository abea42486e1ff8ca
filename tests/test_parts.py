"""Tables in parts, and arrays that are computed once: damaged files are reported."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from sbml.program.runtime import versions
from sbml.program.runtime.parts import Parts, compute_once


def rows(sweep, ids):
    return {"sweep": np.full(len(ids), sweep), "id": ids, "value": np.zeros(len(ids))}


def test_parts_report_damage_and_a_repeated_row(tmp_path, caplog):
    parts = Parts(tmp_path, {"step": 1})
    parts.write(rows(0, np.arange(3)))
    parts.write(rows(0, np.arange(3, 5)))
    parts.write(rows(1, np.arange(2)))
    (parts.directory / "part_0000_00000000.npz").write_bytes(b"not a table")
    np.testing.assert_array_equal(parts.read()["id"], [3, 4, 0, 1])
    np.testing.assert_array_equal(parts.read()["sweep"], [0, 0, 1, 1])
    assert "part_0000_00000000.npz is damaged" in caplog.text
    other = Parts(tmp_path, {"step": 2})
    assert other.directory != parts.directory and not other.read()
    parts.write(rows(0, np.arange(4)))
    with pytest.raises(ValueError, match="an image twice"):
        parts.read()


def test_rows_of_other_versions_are_reported(tmp_path, monkeypatch, caplog):
    """Another number of devices is not reported, because no result depends on it."""
    parts = Parts(tmp_path, {"step": 1})
    present = versions.versions()
    devices = f"7 x {present['devices'].split(' x ')[1]}"
    parts.write(rows(0, np.arange(2)))
    for old in ({**present, "devices": devices}, {**present, "jax": "0.1", "numpy": "1.0"}):
        monkeypatch.setattr(versions, "versions", lambda old=old: old)
        Parts(tmp_path, {"step": 1}).write(rows(1, np.arange(2)))
    assert len(list(parts.directory.glob("versions_*.json"))) == 3
    monkeypatch.setattr(versions, "versions", lambda: present)
    jax, numpy = (f"{name} {old}, now {present[name]}" for name, old in
                  (("jax", "0.1"), ("numpy", "1.0")))  # fmt: skip
    assert parts.other_versions() == [f"{jax}; {numpy}"]
    for path in parts.directory.glob("versions_*.json"):
        path.write_text("damaged")
    assert not parts.other_versions() and "the versions of some rows are unknown" in caplog.text
    other = {**present, "jaxlib": "0.1", "xla": "of jaxlib 0.1", "devices": "1 x TPU v5 lite"}
    names = [change.split()[0] for change in versions.changes(other, present)]
    assert names == ["jaxlib", "devices"]


def test_several_processes_may_set_up_the_same_table_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for i in range(50):
            list(pool.map(lambda _, i=i: Parts(tmp_path / str(i), {"step": 1}), range(8)))
    assert not list(tmp_path.rglob("*.partial"))


CALLS = []


def scaled(values, scale):
    CALLS.append(scale)
    return {"a": scale * values}


def test_arrays_are_computed_once_and_then_read(tmp_path, caplog):
    def once(*arguments):
        return compute_once(tmp_path, "x", scaled, *arguments)["a"]

    ones = np.ones(2)
    for _ in range(2):
        np.testing.assert_array_equal(once(ones, 1.5), [1.5, 1.5])
    np.testing.assert_array_equal(once(ones, 2.5), [2.5, 2.5])
    np.testing.assert_array_equal(once(2 * ones, 2.5), [5, 5])
    with jax.default_matmul_precision("high"):
        once(ones, 1.5)
    assert CALLS == [1.5, 2.5, 2.5, 1.5]
    for path in tmp_path.iterdir():
        path.write_bytes(b"not arrays")
    np.testing.assert_array_equal(once(ones, 1.5), [1.5, 1.5])
    assert len(CALLS) == 5 and "is damaged" in caplog.text
