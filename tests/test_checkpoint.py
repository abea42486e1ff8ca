"""Checkpoints come back bit for bit, or are named as damaged. Kills are real."""

import functools
import logging
import resource
import socket
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    BROKEN_READS,
    abstract,
    make_state,
    restore,
    same_bits,
    save_steps,
    truncate_data,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import FRESH

from sbml.program.runtime import checkpoint
from sbml.program.runtime.checkpoint import Checkpoints, UnsavedCheckpointError

# When one read of a broken checkpoint fails, orbax drops the others, and their errors are lost.
pytestmark = pytest.mark.filterwarnings(*BROKEN_READS)


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=FRESH) as pool:
        return pool.submit(function, *arguments).result(timeout=120)


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    metadata = {"config": {"sde": {"name": "vp", "eps": 1e-5}, "ch_mult": [1, 2]}, "data": None}
    state = make_state(3)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(7, state, metadata)
        restored = restore(checkpoints, state)
    assert restored is not None
    assert restored.step == 7
    assert restored.metadata == metadata
    assert same_bits(restored.state, state)
    again = restore(Checkpoints(tmp_path / "run"), abstract(state))
    assert again is not None and same_bits(again.state, state)


def test_without_a_checkpoint_nothing_is_read_or_made(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert restore(checkpoints, make_state(0)) is None
        assert checkpoints.steps() == []
    assert list(tmp_path.iterdir()) == []


def test_relative_directories_are_made_absolute_and_object_stores_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(Checkpoints("run").directory) == str(tmp_path / "run")
    assert str(Checkpoints("gs://bucket/run").directory) == "gs://bucket/run"


def test_keeps_the_last_and_every_mth(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, 5, 6, 7, keep_last=2, keep_every=3)
    assert Checkpoints(tmp_path).steps() == [3, 6, 7]
    save_steps(tmp_path, 8, keep_last=1)
    assert Checkpoints(tmp_path).steps() == [8]


def test_keeps_the_first_past_each_multiple_where_saves_miss_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4, 5, 8, 9, 12, 13, keep_last=1, keep_every=3)
    assert Checkpoints(tmp_path).steps() == [4, 8, 9, 12, 13]


def test_state_may_be_donated_while_it_is_being_saved(tmp_path: Path) -> None:
    state = {"a": jax.random.normal(jax.random.key(0), (2048, 1024)), "b": jnp.arange(99)}
    expected = jax.tree.map(np.array, state)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda a: 1 - a, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(spoil(state))
        restored = restore(checkpoints, abstract(expected))
    assert restored is not None and same_bits(restored.state, expected)


def test_a_step_that_is_not_beyond_the_newest_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    checkpoints = Checkpoints(tmp_path)
    for step in (15, 20):
        with pytest.raises(ValueError, match=f"step {step} is not beyond step 20"):
            checkpoints.save(step, make_state(0), {})
    assert checkpoints.steps() == [10, 20]


def _fill_the_disk(directory: Path) -> None:
    import resource  # files of this process may not grow beyond 100 kB: writing fails for real

    state = {"a": jax.random.normal(jax.random.key(0), (256, 1024))}
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    with pytest.raises(Exception, match="File too large"):
        checkpoints.save(2, state, {})
        checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state, {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_a_failed_save_is_raised_and_leaves_the_others(tmp_path: Path) -> None:
    in_fresh_process(_fill_the_disk, tmp_path)


def _reshard(directory: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    across, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    values = {"w": jax.random.normal(jax.random.key(0), (16, 24)), "step": jnp.asarray(3)}
    layouts = [
        {"w": across, "step": everywhere},
        {"w": everywhere, "step": everywhere},
        {"w": NamedSharding(mesh, P(None, "data")), "step": everywhere},
        jax.tree.map(lambda leaf: leaf.sharding, values),
    ]
    with Checkpoints(directory) as checkpoints:
        for step, layout in enumerate(layouts):
            checkpoints.save(step, jax.device_put(values, layout), {})
            for other in layouts:
                template = jax.tree.map(
                    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
                    values,
                    other,
                )
                restored = restore(checkpoints, template)
                assert restored is not None and restored.step == step
                assert same_bits(restored.state, values)
                assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == other


def test_any_sharding_is_restored_to_any_other(tmp_path: Path) -> None:
    in_fresh_process(_reshard, tmp_path)


def _one_of_two(process: int, address: str, directory: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = {"across": NamedSharding(mesh, P("data")), "same": NamedSharding(mesh, P())}

    @functools.partial(jax.jit, out_shardings=layout)
    def values(seed: jax.Array) -> dict[str, jax.Array]:
        return {"across": jax.random.normal(jax.random.key(seed), (64, 33)), "same": seed}

    with Checkpoints(directory / "run") as checkpoints:
        for seed in (1, 2):
            checkpoints.save(seed, values(seed), {"seed": seed})
        checkpoints.wait()
        if process == 0:
            truncate_data(directory / "run" / "2")
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        restored = restore(checkpoints, values(0))
        assert restored is not None and restored.step == 1 and restored.metadata == {"seed": 1}
        local = [jax.tree.map(lambda a: a.addressable_data(0), t) for t in (restored[1], values(1))]
        assert same_bits(*local)
        checkpoints.save(2, values(5), {})
        again = restore(checkpoints, values(0))
        assert again is not None and again.step == 2 and int(again.state["same"]) == 5
    jax.distributed.shutdown()


@pytest.mark.slow
def test_two_processes_save_and_agree_on_damage(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with ProcessPoolExecutor(2, mp_context=FRESH) as pool:
        both = [pool.submit(_one_of_two, process, address, tmp_path) for process in range(2)]
        for one in both:
            one.result(timeout=120)
    assert [path.name[:2] for path in (tmp_path / "run.damaged").iterdir()] == ["2-"]


def _large_state(step: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(step), 4)
    return {f"w{i}": jax.random.normal(key, (1024, 1024)) for i, key in enumerate(keys)}


def _train(directory: Path, progress: Any) -> None:
    """Check the newest checkpoint, save the next step completely, and start to save another."""
    with Checkpoints(directory) as checkpoints:
        restored = restore(checkpoints, _large_state(0))
        start = 0 if restored is None else restored.step
        assert restored is None or same_bits(restored.state, _large_state(start))
        checkpoints.save(start + 1, _large_state(start + 1), {})
        following = _large_state(start + 2)
        checkpoints.wait()
        checkpoints.save(start + 2, following, {})
        progress.send((start, sorted(path.name for path in directory.iterdir())))
        time.sleep(60)


def _killed_after(delay: float, run: Path) -> tuple[int, list[str]]:
    """Where a training process started, and what its directory held when its last save began."""
    receive, send = FRESH.Pipe(duplex=False)
    child = FRESH.Process(target=_train, args=(run, send))
    child.start()
    send.close()
    try:
        said = receive.recv()  # EOFError if the child failed; its traceback is above
        time.sleep(delay)
        return said
    finally:
        child.kill()
        child.join()


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_loses_only_that_save(tmp_path: Path) -> None:
    run, newest, halves = tmp_path / "run", 0, 0
    for delay in (0.0, 0.03, 0.1, 0.3):
        start, found = _killed_after(delay, run)
        assert start == newest, "the newest whole checkpoint was not the one used"
        left_over = [n for n in found if "tmp" in n and not n.startswith(f"{start + 2}.")]
        assert left_over == [], "what an earlier kill left behind is still there"
        newest = Checkpoints(run).steps()[-1]
        assert newest in (start + 1, start + 2)
        halves += any("tmp" in path.name for path in run.iterdir())
    assert halves > 0, "no kill fell into a save: the state is too small for this disk"
    restored = restore(Checkpoints(run), abstract(_large_state(0)))
    assert restored is not None and same_bits(restored.state, _large_state(newest))
    assert not (tmp_path / "run.damaged").exists()


def _limited(size: int) -> None:
    """Files of this process cannot grow beyond ``size``: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _full_for_a_while(directory: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        _limited(1000)
        for step in range(2, 7):
            assert checkpoints.save(step, make_state(step), {})
        with pytest.raises(Exception, match="File too large"):
            checkpoints.wait()
        _limited(unlimited)
        # Threads of Orbax that still write may make the folder of the last failed save once more.
        assert {p.name.split(".")[0] for p in directory.iterdir()} in ({"1"}, {"1", "6"})
        checkpoints.save(7, make_state(7), {})
        checkpoints.wait()
        assert sorted(p.name for p in directory.iterdir()) == ["1", "7"], [*directory.rglob("*")]
        restored = restore(checkpoints, abstract(make_state(0)))
    assert restored is not None and same_bits(restored.state, make_state(7))
    # Orbax logs too: some of its versions have a message about a save that is being renamed.
    ours = [line for line in said if line.startswith(("The checkpoint of step", "Saving works"))]
    assert len(ours) == 2 and len(said) < 5, said
    assert ours[0].startswith(f"The checkpoint of step 2 was not saved in {directory}: ")
    assert "File too large" in ours[0]
    assert ours[1] == f"Saving works again: step 7 is saved in {directory}"


def test_a_disk_that_is_full_for_a_while_is_named_once(tmp_path: Path) -> None:
    """What failed saves have written is removed, and the first after them is whole."""
    in_fresh_process(_full_for_a_while, tmp_path)


def _fail_with_many_arrays(directory: Path) -> None:
    shown: list[str] = []
    sys.unraisablehook = lambda error: shown.append(str(error.exc_value))
    state = {str(i): jnp.zeros((64, 64)) for i in range(60)}
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    _limited(1000)
    for step in range(2, 6):
        assert checkpoints.save(step, state, {})
    with pytest.raises(UnsavedCheckpointError, match="step 5 .* File too large"):
        checkpoints.close()
    time.sleep(0.5)  # for writes that are still in progress
    assert not shown
    sys.unraisablehook(SimpleNamespace(exc_value=ValueError("another")))  # type: ignore[arg-type]
    assert shown == ["another"]


def test_a_save_that_fails_shows_no_tracebacks_of_its_other_arrays(tmp_path: Path) -> None:
    in_fresh_process(_fail_with_many_arrays, tmp_path)


def test_a_save_whose_folder_cannot_be_made_has_failed(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    """A disk without inodes has free bytes, and fails when the writer makes its folder."""
    made = checkpoint.ocp.training.Checkpointer
    errors = iter([OSError(28, "No space left on device")])

    def checkpointer(*given: Any, **options: Any) -> Any:
        for error in errors:
            raise error
        return made(*given, **options)

    monkeypatch.setattr(checkpoint.ocp.training, "Checkpointer", checkpointer)
    checkpoints = Checkpoints(tmp_path / "run")
    assert not checkpoints.save(1, make_state(1), {}) and "No space left" in caplog.text
    assert checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert checkpoints.steps() == [2] and "Saving works again: step 2" in caplog.text
    errors = iter([PermissionError(13, "Permission denied")])  # A permanent error.
    with pytest.raises(UnsavedCheckpointError, match="Permission denied"), checkpoints:
        checkpoints.save(3, make_state(3), {})


def test_without_room_nothing_is_written(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    free = [10**9]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.save(1, make_state(1), {})
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(make_state(1)))
    free[0] = size + checkpoint.OVERHEAD - 1
    assert not checkpoints.save(2, make_state(2), {}) and not checkpoints.save(3, make_state(3), {})
    checkpoints.wait()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["1"]
    (said,) = [r.getMessage() for r in caplog.records if "was not saved" in r.getMessage()]
    assert f"the disk of {tmp_path / 'run'} is full: 1.1 MB are free, 1.1 needed" in said
    assert "step 2" in said and "Training goes on" in said
    with pytest.raises(
        UnsavedCheckpointError, match=r"step 3 .* is full.* goes on .*checkpoint, .*1$"
    ):
        checkpoints.close()
    free[0] += 1
    assert checkpoints.save(4, make_state(4), {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]


def _save_many_times(directory: Path) -> None:
    state = {"a": jnp.zeros(3)}
    with Checkpoints(directory, keep_last=1) as checkpoints:
        checkpoints.save(0, state, {})
        checkpoints.wait()
        threads = threading.active_count()
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        for step in range(1, 101):
            assert checkpoints.save(step, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [100]
        # The last thread may still be about to end; one that stays does not end at all.
        deadline = time.monotonic() + 10
        while threading.active_count() > threads and time.monotonic() < deadline:
            time.sleep(0.05)
        assert threading.active_count() <= threads


@pytest.mark.slow
def test_a_save_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    in_fresh_process(_save_many_times, tmp_path / "run")


def test_a_folder_that_cannot_be_written_at_first_ends_the_run_and_is_named(
    tmp_path: Path, caplog: Any
) -> None:
    """No message says that the step is saved, or that saving is tried again."""
    (tmp_path / "run").write_text("a file in the folder's place")
    named = r"checkpoint of step 3 .*File exists: .*run.* from the start$"
    with pytest.raises(UnsavedCheckpointError, match=named), Checkpoints(tmp_path / "run") as run:
        run.save(3, make_state(3), {})
    assert not [r for r in caplog.records if str(tmp_path) in r.getMessage()]


@pytest.mark.parametrize("begun", [True, False])
def test_a_folder_that_cannot_be_written_for_a_while_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, begun: bool
) -> None:
    directory, reasons = tmp_path / "run", iter(["" if begun else "full", "", "", ""])
    monkeypatch.setattr(checkpoint, "shortage", lambda *_: next(reasons))
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.save(1, make_state(1), {}) == begun
        checkpoints.wait()
        if begun:
            directory.rename(tmp_path / "away")
        directory.write_text("a file in the folder's place")
        assert not checkpoints.save(2, make_state(2), {})
        assert not checkpoints.save(3, make_state(3), {})
        directory.unlink()
        assert checkpoints.save(4, make_state(4), {})
    assert checkpoints.steps() == [4]
    said = [r.getMessage() for r in caplog.records if str(directory) in r.getMessage()]
    assert len(said) == 2 and said[1].startswith("Saving works again: step 4")
    assert said[0].startswith(f"The checkpoint of step {2 if begun else 1} was not saved in")
