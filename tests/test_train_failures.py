"""Losses that are not finite, and full disks: the last good checkpoint is kept and named."""

import errno

import jax
import numpy as np
import optax
import pytest
import runs
import tiny

from sbml.program.config import build
from sbml.program.config.optim import Optim
from sbml.program.modes import train
from sbml.program.runtime import checkpoint, metrics
from sbml.program.runtime.checkpoint import Checkpoints, UnsavedCheckpointError


def diverge(monkeypatch):
    """Train at a learning rate that no config may have, from the first step."""
    rate = optax.constant_schedule(1e30)
    monkeypatch.setattr(Optim, "rate", lambda *given: rate)


def test_a_non_finite_loss_read_late_is_named_and_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_in_flight", lambda: 2)
    diverge(monkeypatch)
    config = tiny.get_config()
    config.optim.grad_clip = 0.0
    config.training.checkpoint_every = 4
    with pytest.raises(train.NonFiniteLoss, match=r"step 1: loss .*goes on from the start"):
        runs.mode(train.run, config, tmp_path)


def test_non_finite_loss_stops_and_names_the_last_checkpoint(tmp_path, monkeypatch):
    diverge(monkeypatch)
    config = tiny.get_config()
    config.optim.grad_clip = 0.0
    config.training.checkpoint_every = 1
    with pytest.raises(train.NonFiniteLoss, match=r"step \d+: loss ") as raised:
        runs.mode(train.run, config, tmp_path)
    restored = build.Experiment(config).restore(tmp_path)
    assert f"goes on from the newest checkpoint, {tmp_path}" in str(raised.value)
    assert f"checkpoints/{restored.step}, with the same batches" in str(raised.value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state.params))


def test_a_loss_that_is_not_finite_is_the_error_even_if_no_checkpoint_was_saved(
    tmp_path, monkeypatch, caplog
):
    diverge(monkeypatch)
    config = tiny.get_config()
    config.optim.grad_clip = 0.0
    config.training.checkpoint_every = 1
    monkeypatch.setattr(checkpoint, "shortage", lambda *_: "full")
    with pytest.raises(train.NonFiniteLoss, match="from the start"):
        runs.mode(train.run, config, tmp_path)
    assert "Remove the cause and run the same command again" in caplog.text


def test_the_rows_after_a_kill_are_means_over_all_of_their_steps(tmp_path, monkeypatch):
    """A checkpoint between two rows starts a new row."""
    config = tiny.get_config()
    config.training.update(num_steps=24, log_every=8, checkpoint_every=12)
    runs.mode(train.run, config, tmp_path / "whole")
    saved = Checkpoints.save

    def killed(self, *given):
        saved(self, *given)
        self.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.mode(train.run, config, tmp_path / "killed")
    runs.mode(train.run, config, tmp_path / "killed")
    whole, ours = (metrics.read(tmp_path / name) for name in ("whole", "killed"))
    assert [row["step"] for row in whole] == [8, 12, 16, 24]
    assert [(r["step"], r["loss"]) for r in ours] == [(r["step"], r["loss"]) for r in whole]


@pytest.mark.slow
def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch, caplog):
    """Steps 8 to 31 save no checkpoint. The last state is that of a run with a free disk."""
    config = tiny.get_config()
    runs.mode(train.run, config, tmp_path / "free")
    write = metrics._Board.write

    def written(self, step, *summaries):
        if step in (9, 10):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, step, *summaries)

    steps = iter(range(4, 44, 4))
    monkeypatch.setattr(metrics._Board, "write", written)
    monkeypatch.setattr(checkpoint, "shortage", lambda *_: "full" if 8 <= next(steps) < 32 else "")
    runs.mode(train.run, config, tmp_path / "full")
    states = [runs.state(config, tmp_path / name) for name in ("free", "full")]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *(s.state for s in states))))
    said = [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert [line for line in said if "not saved" in line] == [
        f"The checkpoint of step 8 was not saved in {tmp_path / 'full' / 'checkpoints'}: full. "
        "Training goes on, and tries again to save at each later checkpoint"
    ]
    assert sum("goes on without this file" in line for line in said) == 1
    rows = metrics.read(tmp_path / "full")
    assert [row["step"] for row in rows] == [*range(1, 41)]


def test_pictures_of_steps_that_this_run_did_not_make_are_set_aside(tmp_path):
    config = tiny.get_config()
    config.training.update(num_steps=1)
    (tmp_path / "samples").mkdir()
    for name in ("step_00000000.png", "step_00000020.png", "mine.png"):
        (tmp_path / "samples" / name).write_text(name)
    runs.mode(train.run, config, tmp_path)
    kept = {path.name: path.read_text() for path in (tmp_path / "samples").iterdir()}
    assert kept == {
        "step_00000000.png": "step_00000000.png",
        "step_00000020.png.earlier": "step_00000020.png",
        "mine.png": "mine.png",
    }


def test_a_disk_without_room_for_the_last_checkpoint_is_an_error(tmp_path, monkeypatch):
    config = tiny.get_config()
    config.training.num_steps = 8
    steps = iter((4, 8))
    monkeypatch.setattr(checkpoint, "shortage", lambda *_: "full" if next(steps) == 8 else "")
    with pytest.raises(
        UnsavedCheckpointError, match=r"step 8 .*: full\. Remove .* checkpoint, .*4$"
    ):
        runs.mode(train.run, config, tmp_path)
    assert runs.state(config, tmp_path).step == 4
