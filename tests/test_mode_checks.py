"""If one of several modes is sure to fail, there is an error before the first one runs."""

from pathlib import Path

import pytest
import runs
import tiny
from ml_collections import ConfigDict

from sbml import dequantizers
from sbml.program.config import build
from sbml.program.config.compatibility import check_dequantizer
from sbml.program.modes import eval as evaluate
from sbml.program.modes import quality, train_dequantizer
from sbml.program.modes._runner import Command
from sbml.program.report import summary
from sbml.program.runtime.workdir import SAMPLES, Workdir


@pytest.fixture
def config() -> ConfigDict:
    chosen = tiny.get_config()
    chosen.eval.quality.features = "digits_classifier"
    return chosen


def test_quality_needs_samples(config: ConfigDict, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    with pytest.raises(ValueError, match=r"no samples.npz in .*--mode=sample,quality"):
        quality.check(build.Experiment(config), workdir, ["train", "eval"])
    quality.check(build.Experiment(config), workdir, ["train", "sample"])
    (tmp_path / SAMPLES).touch()
    quality.check(build.Experiment(config), workdir, [])


def test_an_evaluation_needs_the_dequantizer(config: ConfigDict, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    evaluate.check(build.Experiment(config), workdir, ["train"])
    config.eval.dequantizers = ("uniform,variational",)
    with pytest.raises(ValueError, match=r"=variational: no dequantizer in .*--mode=train_deq"):
        evaluate.check(build.Experiment(config), workdir, ["train"])
    evaluate.check(build.Experiment(config), workdir, ["train", "train_dequantizer"])
    evaluate.check(
        build.Experiment(config), workdir, ["convert"]
    )  # It may write a dequantizer too.
    (tmp_path / "dequantizer" / "checkpoints" / "12").mkdir(parents=True)
    evaluate.check(build.Experiment(config), workdir, [])


def test_a_dequantizer_draws_no_samples_and_splits_even_widths(config: ConfigDict) -> None:
    config.data.shape = (8, 7, 1)
    build.Experiment(config)  # The score alone can be trained.
    with pytest.raises(ValueError, match=r"dequantizer.name=variational .*\(8, 7, 1\).* even"):
        train_dequantizer.check(build.Experiment(config), Workdir("unused"), ["train"])
    config.data.shape = (8, 8, 1)
    train_dequantizer.check(build.Experiment(config), Workdir("unused"), ["train"])
    config.dequantizer.training.sample_every = 5
    with pytest.raises(ValueError, match=r"sample_every=5: a dequantizer draws no samples; set"):
        train_dequantizer.check(build.Experiment(config), Workdir("unused"), ["train"])


def test_only_the_dequantizer_that_is_trained_is_evaluated(
    config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = dequantizers.DEQUANTIZERS.places
    monkeypatch.setitem(places, "another", places["variational"])
    config.eval.dequantizers = ("another",)
    with pytest.raises(ValueError, match=r"eval.dequantizers=another, but .*name=variational"):
        build.Experiment(config)
    config.eval.dequantizers = ("variational",)
    checked = build.Experiment(config).config
    metadata = {"config": checked.plain()}
    check_dequantizer(checked, metadata)
    metadata["config"]["dequantizer"]["name"] = "another"
    with pytest.raises(ValueError, match="dequantizer.name is .* the checkpoint's is another"):
        check_dequantizer(checked, metadata)


def test_the_report_is_written_once_also_if_a_later_mode_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    monkeypatch.setattr(summary, "write", lambda folder, load: written.append(folder.path))

    def done(workdir: Workdir) -> Workdir:
        return workdir  # Its report shows what this mode found.

    def without(workdir: Workdir) -> None:
        pass

    def fails(workdir: Workdir) -> None:
        raise ValueError("stopped")

    command = Command(runs.checked(tiny.get_config()), Workdir(tmp_path), {})
    command.execute({"mine": without})
    assert not written
    with pytest.raises(ValueError, match="stopped"):
        command.execute({"one": done, "other": done, "last": fails})
    assert written == [Workdir(tmp_path).path]
