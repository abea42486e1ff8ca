"""An error names each damaged checkpoint, and the newest undamaged one is used."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from checkpoints import (
    BROKEN_READS,
    State,
    abstract,
    data_files,
    make_state,
    restore,
    same_bits,
    save_steps,
    truncate_data,
)
from orbax.checkpoint import v1 as ocp

from sbml.program.runtime import checkpoint
from sbml.program.runtime.checkpoint import Checkpoints, DamagedCheckpointError, OtherModelError

# When one read of a damaged checkpoint fails, Orbax drops the others, and nobody retrieves their
# errors.
pytestmark = pytest.mark.filterwarnings(*BROKEN_READS)


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was logged as an error."""
    said: list[str] = []
    monkeypatch.setattr(logging, "error", lambda text, *values: said.append(text % values))
    return said


# Each of these functions damages a checkpoint as a failing disk or a mistake of a user would.


def overwrite_bytes(checkpoint: Path) -> None:
    """Flip one bit of ``params/noise`` in the file in which Orbax stores it."""
    needle = np.asarray(make_state(int(checkpoint.name)).params["noise"]).tobytes()[:64]
    hits = [(f, at) for f in data_files(checkpoint) if (at := f.read_bytes().find(needle)) >= 0]
    assert hits, "the noise's bytes are not in any data file: look for another place to break"
    for file, at in hits:
        content = bytearray(file.read_bytes())
        content[at + 5] ^= 1
        file.write_bytes(content)


def delete_data(checkpoint: Path) -> None:
    for file in data_files(checkpoint):
        file.unlink()


def delete_index(checkpoint: Path) -> None:
    (checkpoint / "state" / "manifest.ocdbt").unlink()


def delete_metadata(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


def garble_metadata(checkpoint: Path) -> None:
    file = checkpoint / "_CHECKPOINT_METADATA"
    file.write_bytes(b"\x00\xff" + file.read_bytes()[:-20])


def alter_metadata(checkpoint: Path) -> None:
    """Write another shape. If it were believed, this would be a checkpoint of another model."""
    file = checkpoint / "_CHECKPOINT_METADATA"
    text = file.read_text()
    assert text.count("[64, 33]") > 0
    file.write_text(text.replace("[64, 33]", "[64, 35]"))


def forget_manifest(checkpoint: Path) -> None:
    file = checkpoint / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {}}))


BREAKAGES = [
    overwrite_bytes,
    truncate_data,
    delete_data,
    delete_index,
    delete_metadata,
    garble_metadata,
    alter_metadata,
    forget_manifest,
]


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_damage_is_reported_and_the_previous_checkpoint_is_used(
    breakage: Any, tmp_path: Path, errors: list[str]
) -> None:
    run = tmp_path / "run"
    save_steps(run, 1, 2)
    breakage(run / "2")
    files = sorted(run.rglob("*"))
    with Checkpoints(run) as checkpoints:
        restored = restore(checkpoints, abstract(make_state(0)))
        assert restored is not None and restored.step == 1
        assert same_bits(restored.state, make_state(1))
        ours = [text for text in errors if text.startswith("Damaged checkpoint")]
        assert len(ours) == 1 and str(run) in ours[0] and "step 2: " in ours[0]
        assert sorted(run.rglob("*")) == files, "reading must change nothing"
        # A run that goes on from step 1 reaches step 2 again.
        checkpoints.save(2, make_state(2), {})
        again = restore(checkpoints, abstract(make_state(0)))
        assert again is not None and again.step == 2 and same_bits(again.state, make_state(2))
    assert checkpoints.steps() == [1, 2]
    (aside,) = (tmp_path / "run.damaged").iterdir()
    assert aside.name.startswith("2-") and (aside / "state").is_dir()


def test_a_checkpoint_that_is_deleted_after_it_was_listed_is_not_called_damaged(
    tmp_path: Path, errors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation may list the checkpoints just before a training deletes one of them."""
    save_steps(tmp_path, 1, 2, keep_last=2)
    checkpoints = Checkpoints(tmp_path)
    present = checkpoints.steps

    def list_first(steps: list[int]) -> None:
        listed = iter([steps])
        monkeypatch.setattr(checkpoints, "steps", lambda: next(listed, None) or present())

    list_first([1, 3])
    assert checkpoints.metadata() == {"seed": 2}
    list_first([1, 3])
    restored = restore(checkpoints, abstract(make_state(0)))
    assert restored is not None and restored.step == 2 and not restored.damaged


def test_a_renamed_folder_is_not_taken_for_its_step(tmp_path: Path, errors: list[str]) -> None:
    save_steps(tmp_path, 1, 2, keep_last=2)
    (tmp_path / "2").rename(tmp_path / "9")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.metadata() == {"seed": 1} and "9" in errors[0]
    restored = restore(checkpoints, abstract(make_state(0)))
    assert restored is not None and restored.step == 1
    assert "it was saved as step 2" in restored.damaged[0]


def test_orbax_alone_does_not_notice_overwritten_bytes(tmp_path: Path) -> None:
    """This is why checkpoints have CRC32s. If it fails, Orbax notices, and ours are not needed."""
    save_steps(tmp_path, 2)
    overwrite_bytes(tmp_path / "2")
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        make_state(0),
    )
    assert not same_bits(ocp.load(tmp_path / "2", template), make_state(2))


def test_a_lack_of_memory_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    save_steps(tmp_path, 1, 2)
    monkeypatch.setattr(ocp, "load", no_memory)
    with pytest.raises(MemoryError):
        restore(Checkpoints(tmp_path), abstract(make_state(0)))


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_steps(run, 1, 2, 3, keep_last=3)
    truncate_data(run / "3")
    with Checkpoints(run, keep_last=2) as checkpoints:
        restored = restore(checkpoints, abstract(make_state(0)))
        assert restored is not None and restored.step == 2
        checkpoints.save(4, make_state(4), {})
    assert checkpoints.steps() == [2, 4]


def test_when_all_are_damaged_the_run_does_not_start_anew(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    truncate_data(tmp_path / "1")
    overwrite_bytes(tmp_path / "2")
    with pytest.raises(DamagedCheckpointError) as raised:
        restore(Checkpoints(tmp_path), abstract(make_state(0)))
    lines = str(raised.value).splitlines()
    assert lines[1].strip().startswith("step 2: ")
    assert lines[1].endswith("params/noise uint32[64, 33] fails its CRC32")
    assert lines[2].strip().startswith("step 1: ")
    assert "Put a copy back" in lines[3]
    assert Checkpoints(tmp_path).steps() == [1, 2]


def _without_bytes(state: State) -> State:
    return state._replace(params={k: v for k, v in state.params.items() if k != "bytes"})


@pytest.mark.parametrize(
    ("change", "stored", "expected"),
    [
        (
            lambda s: s._replace(params=s.params | {"kernel": jnp.zeros((5, 32))}),
            "params/kernel float32[5, 33]",
            "params/kernel float32[5, 32]",
        ),
        (
            lambda s: s._replace(step=s.step.astype(jnp.int16)),
            "step int32[]",
            "step int16[]",
        ),
        (_without_bytes, "params/bytes uint8[256]", "params/half bfloat16[33]"),
        (
            lambda s: s._replace(opt_state=(s.opt_state, {"more": jnp.zeros(3)})),
            "opt_state/1/0/count int32[]",
            "opt_state/0/1/0/count int32[]",
        ),
        (lambda s: s._replace(opt_state=()), "opt_state/1/0/count int32[]", "no further leaf"),
    ],
)
def test_another_model_is_named_by_its_first_leaf(
    change: Any, stored: str, expected: str, tmp_path: Path
) -> None:
    save_steps(tmp_path, 1)
    overwrite_bytes(tmp_path / "1")  # The error comes before the arrays are read.
    with pytest.raises(OtherModelError) as raised:
        restore(Checkpoints(tmp_path), abstract(change(make_state(0))))
    assert f"it holds {stored}, this model has {expected}." in str(raised.value)


@pytest.mark.parametrize(("saved", "said"), [(2, "format 2,"), (None, "format None,")])
def test_a_checkpoint_of_another_format_is_refused_and_not_called_damaged(
    saved: int | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1)
    with monkeypatch.context() as other:
        other.setattr(checkpoint, "FORMAT", saved)
        save_steps(tmp_path, 2)
    message = f"2 has the {said} and this version of sbml reads the format 1: install the version"
    with pytest.raises(OtherModelError, match=message):
        Checkpoints(tmp_path).metadata()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(OtherModelError, match=message):
        restore(checkpoints, abstract(make_state(0)))
