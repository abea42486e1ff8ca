"""Training survives kills bitwise, and does not depend on how many devices or processes it has."""

import itertools
import json
import math
import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
import runs
import tiny
from etils import epath
from flax import linen as nn
from jax.experimental import multihost_utils

from configs import digits_vp
from sbml.networks import mlp
from sbml.program.config import build, compatibility
from sbml.program.evaluation import samples
from sbml.program.modes import train
from sbml.program.runtime import metrics, preemption
from sbml.program.runtime.checkpoint import Checkpoints, OtherModelError
from sbml.program.runtime.lock import BusyError
from sbml.program.runtime.workdir import Workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The work directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    runs.run(workdir, "--mode=train")
    return workdir


@pytest.fixture(scope="module")
def trained(digits_model, tmp_path_factory):
    """A work directory with the checkpoints of a training, which commands may write to."""
    workdir = tmp_path_factory.mktemp("trained")
    shutil.copytree(digits_model / "checkpoints", workdir / "checkpoints")
    return workdir


def losses(workdir):
    return {row["step"]: row["loss"] for row in metrics.read(workdir)}


def assert_same_steps(some, whole):
    """The first ten steps of two work directories have the same gradients and losses, up to
    rounding. Near the smallest time, sigma is a thousandth of x, so that three digits of the noise
    in x, and of the loss of such a row, are lost; its gradient is small."""
    found, expected = ({row["step"]: row for row in metrics.read(w)} for w in (some, whole))
    for step in range(1, 11):
        row = found[step]
        assert row["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-5)
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=3e-5)


def assert_same_state(one, other):
    """Bitwise equality of the newest checkpoints of two work directories."""
    config = tiny.get_config()
    a, b = runs.state(config, one), runs.state(config, other)
    assert a.step == b.step and a.state.statistics[0].sum() > 0
    jax.tree.map(np.testing.assert_array_equal, a.state, b.state)


def wait_for(process, happened):
    """Poll until ``happened()`` or the process ends; whether it happened."""
    while process.poll() is None:
        if happened():
            return True
        time.sleep(0.003)  # Polling more often would slow the process down.
    return False


@pytest.mark.slow
def test_an_image_is_counted_once_if_an_antithetic_pair_takes_two_rows(digits_model):
    rows = metrics.read(digits_model)
    seconds = np.diff([row["seconds"] for row in rows])
    images = [row["images_per_s"] for row in rows[1:]] * seconds
    np.testing.assert_allclose(images, 32, rtol=1e-6)


def test_several_processes_agree_to_stop_with_any_steps_per_dispatch(monkeypatch, caplog):
    """JAX's service says yes at one count only: one more than the largest count of any process."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.Preemption, "_asked", 0)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 3)
    with preemption.Preemption() as asked:
        assert [asked.requested() for _ in range(2)] == [False, False]
    later = preemption.Preemption()  # Another mode: the count goes on.
    with pytest.raises(SystemExit) as left:
        later.leave_if_requested("half is stored")
    assert left.value.code == 143 and later.requested()
    assert "SIGTERM: half is stored" in caplog.text


def test_a_second_training_in_a_work_directory_is_refused(tmp_path):
    with Workdir(tmp_path).lock("train"), pytest.raises(BusyError, match="does --mode=train here"):
        runs.mode(train.run, tiny.get_config(), tmp_path)
    assert {*tmp_path.rglob("*")} <= {tmp_path / ".train.lock"}


def test_a_training_that_lost_its_checkpoints_warns_and_restarts(tmp_path, caplog):
    config = tiny.get_config()
    config.training.update(num_steps=4)
    runs.mode(train.run, config, tmp_path)
    assert "begins again" not in caplog.text
    shutil.rmtree(tmp_path / "checkpoints")
    earlier = (tmp_path / metrics.FILE).read_bytes()
    runs.mode(train.run, config, tmp_path)
    assert "has no checkpoint, but metrics.jsonl reaches step 4: training begins" in caplog.text
    assert (tmp_path / metrics.EARLIER).read_bytes() == earlier
    later = (tmp_path / metrics.FILE).read_bytes()
    metrics.Log(tmp_path, 0, 1).close()  # It begins again once more.
    assert (tmp_path / metrics.EARLIER).read_bytes() == earlier + later


@pytest.mark.slow
def test_kills_change_nothing(whole, tmp_path):
    """SIGKILL in the middle of a save, then at a later step: the end is bitwise the same."""
    checkpoints = tmp_path / "checkpoints"

    def saving():
        return any(checkpoints.glob("*orbax-checkpoint-tmp*"))

    for _ in range(10):
        process = runs.start(tmp_path, "--mode=train")
        assert wait_for(process, saving), runs.finish(process)
        process.kill()
        process.communicate()
        if saving():  # The save was left unfinished on disk.
            break
    else:
        pytest.fail("no kill fell into a save")

    process = runs.start(tmp_path, "--mode=train")
    assert wait_for(process, lambda: max(losses(tmp_path), default=0) >= 25)
    process.kill()
    process.communicate()
    runs.run(tmp_path, "--mode=train")

    assert_same_state(whole, tmp_path)
    assert losses(whole) == losses(tmp_path)
    assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, 41))


@pytest.mark.slow
def test_a_request_to_stop_saves_and_leaves(whole, tmp_path):
    """Both signals have one handler; ``test_evaluate`` sends the other one."""
    process = runs.start(tmp_path, "--mode=train,eval")
    assert wait_for(process, lambda: max(losses(tmp_path), default=0) >= 5)
    process.send_signal(signal.SIGTERM)
    runs.finish(process, expect=143)
    saved = runs.state(tiny.get_config(), tmp_path).step
    assert saved >= 5 and saved == max(losses(tmp_path))
    assert not (tmp_path / "report.html").exists()  # The modes that follow did not run.
    runs.run(tmp_path, "--mode=train")
    assert_same_state(whole, tmp_path)


def test_a_row_that_a_stop_cuts_short_is_logged(tmp_path, monkeypatch):
    requested = preemption.Preemption.requested
    calls = itertools.count(1)

    def stopped(self):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(self)

    config = tiny.get_config()
    config.training.update(num_steps=6, log_every=4)
    monkeypatch.setattr(preemption.Preemption, "requested", stopped)
    with pytest.raises(SystemExit):
        runs.mode(train.run, config, tmp_path)
    monkeypatch.undo()
    runs.mode(train.run, config, tmp_path)
    rows = metrics.read(tmp_path)
    assert [row["step"] for row in rows] == [3, 4, 6]
    batch = config.training.batch_size / 2  # antithetic pairs
    images = [row["images_per_s"] for row in rows] * np.diff([0, *(r["seconds"] for r in rows)])
    np.testing.assert_allclose(images, batch * np.array([3, 1, 2]), rtol=1e-6)


def test_sigterm_in_the_last_save_ends_the_program_after_it(tmp_path, monkeypatch):
    """No step follows. The save must still be completed, and the next mode must not begin."""
    closed = Checkpoints.close

    def close(self):
        if self._writer is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        closed(self)

    monkeypatch.setattr(Checkpoints, "close", close)
    config = tiny.get_config()
    config.training.num_steps = 4
    with pytest.raises(SystemExit) as left:
        runs.mode(train.run, config, tmp_path)
    assert left.value.code == 143
    assert runs.state(config, tmp_path).step == 4


@pytest.mark.slow
def test_changed_settings_of_a_continued_training_are_logged(tmp_path, caplog):
    config = tiny.get_config()
    config.training.num_steps = 4
    runs.mode(train.run, config, tmp_path)
    assert "training continues" not in caplog.text
    config.update({"seed": 3, "optim": {"lr": 1e-5}, "training": {"num_steps": 8, "log_every": 2}})
    config.model.dtype = "bfloat16"
    runs.mode(train.run, config, tmp_path)
    (said,) = [r.getMessage() for r in caplog.records if "training continues" in r.getMessage()]
    lr = tiny.get_config().optim.lr
    changes = f"seed 0 -> 3, model.dtype float32 -> bfloat16, optim.lr {lr} -> 1e-5"
    assert said.endswith(f"began with: {changes}")
    config.training.num_steps = 6
    runs.mode(train.run, config, tmp_path)
    text = "nothing is trained: step 8 is stored, and training.num_steps="
    assert f"{text}6. Changed: nothing else" in caplog.text
    config.training.update(num_steps=8, times="iid")
    runs.mode(train.run, config, tmp_path)
    assert f"{text}8. Changed: training.times lattice -> iid" in caplog.text


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps_change_a_training_with_a_cosine_schedule(schedule):
    """At the step where the learning rate was zero, it is near its peak if there are more steps."""
    told = []
    for steps in (40, 400):
        config = tiny.get_config()
        config.update({"optim": {"schedule": schedule}, "training": {"num_steps": steps}})
        told.append({"config": build.Experiment(config).config.plain()})
    expected = ["training.num_steps 40 -> 400"] if schedule == "cosine" else []
    assert compatibility.changed_settings(*told, "") == expected


class Block(nn.Module):
    """The small MLP as a block of a network, so that Muon changes its kernels."""

    @nn.compact
    def __call__(self, x, label, *, train):
        return mlp.Model(width=8, depth=1, name="Block_0")(x, label, train=train)


@pytest.mark.slow
def test_a_run_with_muon_continues_bitwise(tmp_path):
    """A config of Adam can evaluate its checkpoints, but not continue its training."""
    config = tiny.get_config()
    with config.unlocked():
        config.model = {"name": "test_train:Block"}
    config.update({"optim": {"name": "muon"}, "score": {"parameterization": "noise"}})
    for workdir, numbers in (("whole", (4,)), ("parts", (2, 4))):
        for config.training.num_steps in numbers:
            runs.mode(train.run, config, tmp_path / workdir)
    whole, parts = (runs.state(config, tmp_path / name).state for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    config.optim.name = "adam"
    evaluated = build.Experiment(config).restore(tmp_path / "whole").state
    jax.tree.map(np.testing.assert_array_equal, evaluated, whole)
    with pytest.raises(OtherModelError, match=r"optim\.name is adam, the checkpoint's is muon"):
        runs.mode(train.run, config, tmp_path / "whole")


@pytest.mark.slow
def test_a_dispatch_of_many_steps_has_one_speed(tmp_path):
    config = tiny.get_config()
    config.training.update(num_steps=24, steps_per_dispatch=8, log_every=2)
    runs.mode(train.run, config, tmp_path)
    rows = metrics.read(tmp_path)
    assert [row["step"] for row in rows] == [8, 16, 24]


@pytest.mark.slow
def test_eight_devices_give_the_same_losses(whole, tmp_path):
    runs.run(tmp_path, "--mode=train", "--config.training.num_steps=10", devices=8)
    assert_same_steps(tmp_path, whole)


def two_processes(workdir, *flags, other=None, second=()):
    """The program, running as processes 0 and 1 of two, the second perhaps in ``other`` and with
    the flags ``second`` too."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = (*flags, "--num_processes=2", f"--coordinator=127.0.0.1:{port}")
    folders = (workdir, other or workdir)
    own = ((), second)
    return [runs.start(w, *common, *own[i], f"--process_id={i}") for i, w in enumerate(folders)]


@pytest.mark.slow
def test_two_processes_give_the_same_losses_and_a_lost_one_is_named(whole, tmp_path):
    """The error names the checkpoint from which all processes go on."""
    long = ("--config.training.num_steps=1000000", "--config.training.checkpoint_every=10")
    left, lost = two_processes(tmp_path, "--mode=train", *long)
    assert wait_for(left, lambda: (tmp_path / "checkpoints" / "10").exists())
    lost.kill()
    began = time.monotonic()
    err = runs.finish(left, expect=1)
    assert time.monotonic() - began < 40 and "Traceback" not in err
    newest = tmp_path / "checkpoints" / str(Checkpoints(tmp_path / "checkpoints").steps()[-1])
    assert err.splitlines()[-1] == (
        "LostProcessError: process 1 of the 2 processes is lost. Start the same command again in "
        f"all of them: it goes on from the newest checkpoint, {newest}"
    )
    assert_same_steps(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_validate_an_average_that_is_spread_over_them(tmp_path):
    flags = ("--config.training.num_steps=2", "--config.training.shard_state=True")
    flags += ("--config.data.validation=40", "--config.training.validate_every=2")
    for process in two_processes(tmp_path, "--mode=train", *flags):
        runs.finish(process)
    assert math.isfinite(metrics.read(tmp_path)[-1]["validation_bits_per_dim"])


@pytest.mark.slow
def test_processes_that_see_other_folders_are_refused(tmp_path):
    """They would hang at the first save, each waiting for what the other never writes."""
    for process in two_processes(tmp_path / "a", "--mode=train", other=tmp_path / "b"):
        err = runs.finish(process, expect=1)
        assert "processes [1] do not see what process 0 writes to" in err
    assert not [path for folder in "ab" for path in (tmp_path / folder).iterdir()]


@pytest.mark.slow
def test_processes_with_other_images_are_refused(tmp_path):
    """Each takes its rows of a batch from its own copy: images would be repeated and left out."""
    second = ("--config.data.validation=0.1",)
    for process in two_processes(tmp_path, "--mode=train", second=second):
        err = runs.finish(process, expect=1)
        assert "processes [1] have other train images than process 0" in err


@pytest.mark.slow
def test_two_processes_evaluate_and_sample(whole, tmp_path):
    """Only process 0 writes the report. It must not wait for the other process while it does so."""
    (tmp_path / "checkpoints").symlink_to(whole / "checkpoints")
    few = (
        "--config.eval.estimators=bound",
        "--config.eval.max_images=8",
        "--config.eval.bound.sweeps=2",
    )
    for process in two_processes(tmp_path, "--mode=eval,sample", *few):
        runs.finish(process)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["results"][0]["n"] == 8 and report["samples"]


@pytest.mark.slow
def test_sigterm_stops_an_evaluation_by_several_processes(whole, tmp_path):
    """JAX's service receives the signal, so an evaluation must ask it, as a training does."""
    (tmp_path / "checkpoints").symlink_to(whole / "checkpoints")
    long = ("--config.eval.estimators=bound", "--config.eval.bound.sweeps=2000")
    processes = two_processes(tmp_path, "--mode=eval,sample", *long)
    assert wait_for(processes[0], lambda: any(tmp_path.glob("eval/*/part_0003*")))
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        runs.finish(process, expect=143)
    assert not (tmp_path / "samples.npz").exists()


@pytest.mark.slow
def test_pictures_during_a_training_have_64_samples_at_most(tmp_path, monkeypatch):
    counts, preview = [], samples.preview

    def counted(experiment, params, count):
        counts.append(count)
        return preview(experiment, params, 2)

    monkeypatch.setattr(samples, "preview", counted)
    config = tiny.get_config()
    config.training.update(num_steps=2, sample_every=2)
    config.sampling.sampler.update(name="ddim", steps=2)
    for number in (65, 3):
        config.sampling.num_images = number
        runs.mode(train.run, config, tmp_path / str(number))
    assert counts == [64, 3]


@pytest.mark.slow
def test_losses_read_late_as_on_accelerators_change_nothing(tmp_path, monkeypatch):
    for late in (0, 2):
        monkeypatch.setattr(train, "_in_flight", lambda late=late: late)
        config = tiny.get_config()
        config.training.num_steps = 6
        runs.mode(train.run, config, tmp_path / str(late))
    assert losses(tmp_path / "0") == losses(tmp_path / "2")
    assert_same_state(tmp_path / "0", tmp_path / "2")


def test_wrong_batch_and_other_model_are_refused(trained, tmp_path, monkeypatch):
    config = tiny.get_config()
    config.training.batch_size = 63
    config.training.accumulate = 2
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        with pytest.raises(ValueError, match="training.batch_size=63 .* use 60 or 64"):
            runs.mode(train.run, config, tmp_path)
    config = tiny.get_config()
    config.model.width = 48
    message = "another model: config.model.width is 48, the checkpoint's is 32"
    with pytest.raises(ValueError, match=message):
        runs.mode(train.run, config, trained)
    with pytest.raises(ValueError, match=message):
        build.Experiment(config).restore(trained)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("sde", "beta_max", 2.0, r"config.sde.beta_max is 2.0, the checkpoint's is 20.0"),
        ("score", "parameterization", "noise", r"the checkpoint's is preconditioned"),
        ("score", "data_std", 0.1, r"config.score.data_std is 0.1, the checkpoint's is 0.7"),
        ("model", "fourier_scale", 2.0, r"config.model.fourier_scale is 2.0"),
        ("training", "smallest_time", 1e-3, r"set --config.training.smallest_time=1e-5"),
    ],
)
def test_a_checkpoint_of_the_same_shapes_and_another_meaning_is_refused(
    trained, section, field, value, message
):
    config = tiny.get_config()
    config[section][field] = value
    with pytest.raises(ValueError, match=message):
        build.Experiment(config).restore(trained)
    with pytest.raises(ValueError, match=message):
        runs.mode(train.run, config, trained)


def test_settings_of_training_may_change_if_a_model_is_only_evaluated(trained):
    config = tiny.get_config()
    config.training.update(proposal_bins=0, noises="independent", times="iid")
    config.optim.update(lr=1.0, schedule="cosine")
    assert build.Experiment(config).restore(trained).step == 40


def test_a_wrong_config_is_not_a_damaged_checkpoint(trained):
    config = digits_vp.get_config()
    config.model.attn_resolutions = (5,)
    with pytest.raises(ValueError, match="attn_resolutions"):
        build.Experiment(config).restore(trained)


def test_other_data_are_named(trained):
    experiment = build.Experiment(tiny.get_config())
    restored = experiment.restore(epath.Path(trained))
    ours, other = (experiment.provenance(experiment.images(name)) for name in ("train", "test"))
    assert compatibility.other_data(restored.metadata, ours) == []
    (warning,) = compatibility.other_data(restored.metadata, other)
    assert "split is test, in training it was train; count is" in warning and "sha256" in warning


def test_provenance_is_in_the_checkpoint(trained):
    experiment = build.Experiment(tiny.get_config())
    metadata = experiment.restore(trained).metadata
    assert metadata["config"] == json.loads(json.dumps(experiment.config.plain()))
    assert metadata["data"] == experiment.images("train").fingerprint
