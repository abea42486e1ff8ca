"""The command line."""

import dataclasses

import pytest
import tiny

from sbml import main
from sbml.experiment import stored
from sbml.experiment.config import Config
from sbml.modes import train
from sbml.runtime.checkpoint import Checkpoints


def test_of_a_field_given_twice_the_last_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """absl makes one tuple of two: estimators of both, a shape of six numbers."""
    monkeypatch.setattr(main.app, "parse_flags_with_usage", lambda arguments: arguments)
    given = ["main", "--config=a.py", "--config.data.shape=8,8,1", "--mode=eval"]
    again = [*given, "--config.eval.seed=3", "--config.data.shape=32,32,3", "--noconfig.data.flip"]
    assert main.parse(again) == [a for a in again if a != "--config.data.shape=8,8,1"]
    assert main.parse(given) == given
    apart = ["main", "--config.data.source", "digits", "--config.data.source", "photos"]
    assert main.parse(apart) == apart  # A name without its value would be left.


def test_of_a_run_with_a_checkpoint_the_work_directory_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(main.app, "parse_flags_with_usage", lambda arguments: arguments)
    assert main.parse(["main", f"--workdir={tmp_path}"]) == ["main", f"--workdir={tmp_path}"]
    config = tiny.get_config()
    config.training.update(num_steps=2)
    train.run(config, tmp_path)
    for given in (["--workdir", str(tmp_path)], [f"--workdir={tmp_path}"]):
        parsed = main.parse(["main", *given, "--config.eval.seed=3"])
        config_flag = f"--config={stored.__file__}:{tmp_path}"
        assert parsed == ["main", config_flag, *given, "--config.eval.seed=3"]
    assert Config.read(stored.get_config(str(tmp_path))) == Config.read(config)
    with_one = ["main", "--config=a.py", f"--workdir={tmp_path}"]
    assert main.parse(with_one) == with_one


def test_fields_that_a_checkpoint_lacks_have_their_defaults_and_unknown_ones_are_named(monkeypatch):
    trained = Config.read(tiny.get_config()).plain()
    del trained["eval"]["n_times"]
    monkeypatch.setattr(Checkpoints, "metadata", lambda self: {"config": trained})
    expected = Config.read(tiny.get_config())
    default = dataclasses.replace(expected.eval, n_times=type(expected.eval)().n_times)
    found = Config.read(stored.get_config("run"))
    assert found == dataclasses.replace(expected, eval=default)
    trained["eval"]["later"] = 1
    with pytest.raises(ValueError, match=r"has a field config\.eval\.later.*update sbml"):
        stored.get_config("run")
    monkeypatch.setattr(Checkpoints, "metadata", lambda self: None)
    with pytest.raises(ValueError, match=r"no checkpoint in .*: give --config"):
        stored.get_config("run")
