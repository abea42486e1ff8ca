"""``--mode=report``: the report of what is there, while another process trains there."""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny

from sbml import data
from sbml.core.files import json_line
from sbml.program.modes import report
from sbml.program.report import summary
from sbml.program.report.pictures import png
from sbml.program.report.stored import Stored
from sbml.program.runtime import history, lock, metrics
from sbml.program.runtime.lock import BusyError
from sbml.program.runtime.trees import table_crc32
from sbml.program.runtime.workdir import EVALUATION, PER_IMAGE, SAMPLES, Workdir

HOLD = """
import sys
from sbml.program.runtime.workdir import Workdir

with Workdir(sys.argv[1]).lock("train"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Path]:
    """A work directory that another process trains in: its lock, and three rows of metrics."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        log(tmp_path, 3)
        yield tmp_path
        process.communicate()


def log(workdir: Path, steps: int) -> None:
    """Rows of metrics up to the step ``steps``, and a line that is not complete yet."""
    rows = [{"step": s, "loss": 4 / s, "seconds": 60.0 * s} for s in range(1, steps + 1)]
    text = "".join(map(json_line, rows)) + json_line(rows[-1])[:9]
    (workdir / metrics.FILE).write_text(text)


def evaluated(workdir: Path, checkpoint: dict[str, int]) -> float:
    """Write an evaluation of the digits, and return its bits/dim."""
    images = data.load("digits", "test", data.Options())
    bits = np.linspace(1, 3, len(images))
    evaluation = {
        "title": workdir.name,
        "results": [runs.result(bits)],
        "warnings": [],
        "checkpoint": checkpoint,
        "config": {"training": {"batch_size": 16}},
        "model": {"name": "mlp", "parameters": 8480},
        "data": {"test": images.fingerprint},
    }
    Workdir(workdir).write(EVALUATION, evaluation)
    columns = {"id": np.arange(len(bits)), "ode_uniform_bits_per_dim": bits}
    Workdir(workdir).write(PER_IMAGE, columns)
    return float(bits.mean())


def samples(workdir: Path, step: int) -> None:
    images = np.full((4, 8, 8, 1), 3, np.uint8)
    columns = {"images": images, "nfe": np.full(4, 50), "failed": np.zeros(4, bool)}
    origin = {"step": step, "parameters_crc32": 7, "sampler": "ODE()"}
    arrays = {name: np.asarray(value) for name, value in origin.items()}
    Workdir(workdir).write(SAMPLES, {**columns, **arrays})


def shown(workdir: Path) -> tuple[dict[str, Any], str]:
    """``report.json``, and the text of the page."""
    html = (workdir / "report.html").read_text()
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)
    return json.loads((workdir / "report.json").read_text()), re.sub(r"\s+", " ", text)


def test_a_run_in_training_is_reported_by_its_progress_and_commands_for_the_rest(
    training: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (training / ".train.json").read_text()
    runs.mode(report.run, tiny.get_config(), training)
    line = "training in progress, step 3 of 40, last loss 1.3333"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{line}\nreport: ") and "next:" not in printed  # no checkpoint
    numbers, text = shown(training)
    assert line.capitalize() in text and "Loss at 3 logged steps." in text and "0:03:00" in text
    assert numbers["training"]["line"] == line and numbers["training"]["checkpoint"] is None
    assert numbers["model"]["parameters"] > 1000 and numbers["results"] == []
    assert "There is no checkpoint yet, and these commands need one" in text
    for name, modes in (("results", "eval"), ("samples", "sample"), ("quality", "sample,quality")):
        command = f"python -m sbml.main --workdir={training} --mode={modes}"
        assert numbers["missing"][name] == command and f"{name} {command}" in text
    assert "bits/dim" not in text.replace("95%", "") and "Best and worst" not in text
    # The other process still holds the lock, and nothing else was left in its folder.
    assert (training / ".train.json").read_text() == before
    with pytest.raises(BusyError), Workdir(training).lock("train"):
        pass
    left = {path.name for path in training.iterdir()}
    assert left == {".train.json", ".train.lock", metrics.FILE, "report.json", "report.html"}


def test_pictures_and_samples_of_an_earlier_step_are_shown(training: Path) -> None:
    (training / "samples").mkdir()
    for step in (2, 10):
        grid = np.full((8, 8), step, np.uint8)
        (training / "samples" / f"step_{step:08d}.png").write_bytes(png(grid))
    runs.mode(report.run, tiny.get_config(), training)
    assert "Samples during the training, at step 10." in shown(training)[1]
    samples(training, 2)
    runs.mode(report.run, tiny.get_config(), training)
    numbers, text = shown(training)
    assert "4 samples from the model, not selected." in text and "during the training" not in text
    assert numbers["samples"]["step"] == 2 and set(numbers["missing"]) == {"results", "quality"}
    assert numbers["missing"]["quality"].endswith("--mode=quality")


def test_an_evaluation_is_shown_with_the_progress(
    training: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = evaluated(training, {"step": 2, "parameters_crc32": 7})
    samples(training, 2)
    runs.mode(report.run, tiny.get_config(), training)
    printed = capsys.readouterr().out
    assert f"ode uniform              {bits:.4f} bits/dim" in printed
    numbers, text = shown(training)
    assert f"{bits:.3f} bits/dim" in text and "Training in progress, step 3 of 40" in text
    assert "Best and worst images" in text and "4 samples from the model" in text
    assert numbers["checkpoint"]["step"] == 2 and set(numbers["missing"]) == {"quality"}
    samples(training, 1)  # These are of another model than the results.
    runs.mode(report.run, tiny.get_config(), training)
    assert set(shown(training)[0]["missing"]) == {"samples", "quality"}


def test_a_part_that_a_mode_is_making_is_not_missing(tmp_path: Path) -> None:
    log(tmp_path, 3)
    for modes, missing in (
        (["eval", "sample"], {"quality"}),
        (["quality"], {"results", "samples"}),
    ):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(Workdir(tmp_path).lock(mode))
            runs.mode(report.run, tiny.get_config(), tmp_path)
        numbers, text = shown(tmp_path)
        assert set(numbers["missing"]) == missing and set(numbers["running"]) == {*modes}
        assert all(f"--mode={mode} is running: process {os.getpid()} on" in text for mode in modes)
        assert ("The samples are being drawn." in text) == ("sample" in modes)


def test_what_the_losses_tell_of_the_gap_is_shown_with_a_command_for_the_rest(
    tmp_path: Path,
) -> None:
    """Each flag is in the command once, and only if the evaluation depends on it."""
    evaluated(tmp_path, {"step": 2, "parameters_crc32": 7})
    levels = {"edges": [6.0, 2.0, 1.0], "split": [0.5, 0.1], "train": [0.25, 0.1]}
    levels |= {"split_stderr": [0.3, 0.0], "train_stderr": [0.4, 0.0], "images": 128}
    command = (
        "python -m sbml.main --config=x.py --mode=train,eval --config.eval.max_images=9 --trust me "
        "--config.training.num_steps=9 --config.eval.batch_size=1 --config.eval.batch_size=7"
    )
    stored = {**Workdir(tmp_path).read(EVALUATION), "noise_levels": levels, "command": command}
    Workdir(tmp_path).write(EVALUATION, stored)
    assert summary.write(Workdir(tmp_path), lambda split: data.load("digits", split))
    numbers, text = shown(tmp_path)
    assert numbers["gap"]["command"] == (
        f"python -m sbml.main --workdir={tmp_path} --mode=eval --config.eval.split=train "
        "--config.eval.max_images=360 --trust=me --config.eval.batch_size=7"
    )
    assert numbers["gap"]["diffusion"] == pytest.approx(
        {"held_out": 2.1, "train": 1.1, "gap": 1.0, "ci95": 1.96 * 4 * 0.5}
    )
    assert "2.10 bits/dim for the held-out images and 1.10 for the training images" in text
    assert "the difference is +1.000 ± 3.9," in text and "not known" not in text
    said = "95% interval. These values are measured on 128 images of each kind with other draws"
    assert said in text


def test_costs_are_those_of_the_training_that_made_the_checkpoint(tmp_path: Path) -> None:
    """They are not those of an earlier training, nor those of evaluations of other images."""
    about = {"hardware": "CPU, 2 cores", "devices": 0, "cpu_seconds": 1800.0}
    rows = [
        {"mode": "train", "first": 0, "code": "old", "seconds": 1e6},
        {"mode": "train", "first": 0, "code": "new", "seconds": 60.0},
        {"mode": "train", "first": 1, "code": "new, modified", "seconds": 61.0},
        {"mode": "eval", "step": 2, "split": "train", "code": "new", "seconds": 1e6},
        {"mode": "eval", "step": 2, "split": "test", "code": "new", "seconds": 7.0}
        | {"hardware": "2 x GPU, CPU, 2 cores", "devices": 2},
    ]
    rows = [{**about, "start": "day 1", "end": f"day {i}", **row} for i, row in enumerate(rows)]
    (tmp_path / history.FILE).write_text("".join(map(json_line, rows)))
    log(tmp_path, 2)
    evaluated(tmp_path, {"step": 2, "parameters_crc32": 7})
    runs.mode(report.run, tiny.get_config(), tmp_path)
    numbers, text = shown(tmp_path)
    assert numbers["provenance"] == {
        "training": {
            "code": "new; new, modified",
            "hardware": "CPU, 2 cores",
            "date (UTC)": "day 1 to day 2",
            "duration": "0:02:01",
            "cost": "1 CPU-hours",
            "network evaluations": "32, with gradients",
        },
        "evaluation": {
            "code": "new",
            "hardware": "2 x GPU, CPU, 2 cores",
            "date (UTC)": "day 1 to day 4",
            "duration": "0:00:07",
            "cost": "0.0039 device-hours",
            "network evaluations": f"{360 * 70:,}",
        },
    }
    assert "new; new, modified" in text


def test_without_a_process_the_training_has_stopped_or_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no metrics, no checkpoint and no evaluation to report"):
        runs.mode(report.run, tiny.get_config(), tmp_path)
    for steps, end in ((39, ""), (40, ", no checkpoint")):
        log(tmp_path, steps)
        runs.mode(report.run, tiny.get_config(), tmp_path)
        line = f"training stopped, step {steps} of 40{end}, last loss {4 / steps:.4f}"
        assert line in capsys.readouterr().out and line.capitalize() in shown(tmp_path)[1]
    killed = tmp_path / ".train.json"  # A process that is killed leaves it.
    killed.write_text("{}")
    (tmp_path / ".train.lock").touch()
    assert Workdir(tmp_path).owner("train") is None


def test_a_training_is_complete_once_its_last_step_is_saved() -> None:
    for (owner, checkpoint), line in {
        (None, 40): "training complete, step 40 of 40, last loss 0.5000",
        (None, 36): "training stopped, step 40 of 40, saved up to step 36, last loss 0.5000",
        ("process 1", 36): "training in progress, step 40 of 40, last loss 0.5000",
    }.items():
        assert report.progress(owner, 40, 40, 0.5, checkpoint)["line"] == line


def test_an_evaluation_of_an_earlier_checkpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated(tmp_path, {"step": 2, "parameters_crc32": 7})
    samples(tmp_path, 3)
    log(tmp_path, 3)
    progress = report.progress(None, 3, 3, 0.5, checkpoint=3)
    monkeypatch.setattr(report, "progress", lambda *_: progress)
    runs.mode(report.run, tiny.get_config(), tmp_path)
    warning = "the results are those of step 2, but the newest checkpoint is of step 3: evaluate"
    numbers, text = shown(tmp_path)
    assert warning in caplog.text and warning in text
    of_samples = "the samples are of another checkpoint (step 3) than the results (step 2)"
    assert of_samples in text
    assert summary.write(
        Workdir(tmp_path), lambda split: data.load("digits", split)
    )  # As after sampling.
    assert of_samples in shown(tmp_path)[1]
    modes = {name: command.rpartition("=")[2] for name, command in numbers["missing"].items()}
    assert modes == {"results": "eval", "samples": "eval,sample", "quality": "eval,sample,quality"}


@pytest.mark.parametrize("failing", ["table", "images"])
def test_a_report_that_cannot_be_made_stays_as_it_is(
    failing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Either a later evaluation was interrupted after it wrote its table, or images are gone."""
    evaluated(tmp_path, {"step": 2, "parameters_crc32": 7})
    workdir, images = Workdir(tmp_path), data.load("digits", "test", data.Options())
    evaluation, columns = workdir.read(EVALUATION), workdir.read(PER_IMAGE)
    workdir.write(EVALUATION, {**evaluation, "tables": {PER_IMAGE: table_crc32(columns)}})

    def load(split: str) -> data.ImageSet:
        if failing == "images":
            raise ValueError("no such folder")
        return images

    if failing == "table":
        assert summary.write(workdir, load)
        bits = columns["ode_uniform_bits_per_dim"]
        workdir.write(PER_IMAGE, {**columns, "ode_uniform_bits_per_dim": bits + 1e-9})
        with pytest.raises(ValueError, match="a later evaluation was interrupted.*--mode=eval"):
            Stored(workdir).table()
    assert not summary.write(workdir, load)
    assert "the report stays as it is" in caplog.text


def test_a_config_of_fewer_steps_than_were_trained_claims_no_total() -> None:
    longer = report.progress("process 1", 50, 40, 0.5, 40)
    assert longer["line"] == "training in progress, step 50, last loss 0.5000"
    begun = report.progress("process 1", None, 40, None, None)
    assert begun["line"] == "training in progress, no loss logged yet"


def test_asking_for_the_owner_does_not_keep_a_training_from_starting(tmp_path: Path) -> None:
    """Asking takes a shared lock for an instant. A training waits longer than that for the lock."""
    path = tmp_path / ".train.lock"
    with path.open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert not lock._is_held(path)  # Two may ask at a time.
        release = threading.Timer(0.06, fcntl.flock, (asking, fcntl.LOCK_UN))
        release.start()
        with Workdir(tmp_path).lock("train"):
            assert lock._is_held(path)
        release.join()
    assert not lock._is_held(path)
