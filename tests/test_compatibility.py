"""The config of a checkpoint, compared with that of the present run; a run without a checkpoint."""

from pathlib import Path

import jax.numpy as jnp
import pytest
import runs
import tiny

from sbml.core import fingerprint
from sbml.program.config import build, compatibility
from sbml.program.config.compatibility import (
    changed_settings,
    check_score,
    check_training,
    unseen_times,
)
from sbml.program.evaluation import cells
from sbml.program.modes import eval as evaluate


@pytest.mark.parametrize("sde", ["vp", "subvp", "ve", "linear_gamma"])
@pytest.mark.parametrize("tau", [0.0, 1.0, 3.0, 20.0])
def test_bin_centres_are_trained_from_where_they_are_evaluated(sde: str, tau: float) -> None:
    """At the first time, half a bin holds tau standard deviations of the noise. If the paper's
    smallest time is later, it is the first."""
    config = tiny.get_config()
    config.sde.name, config.eval.tau = sde, tau
    spread = build.Experiment(config)
    config.data.dequantization = "centre"
    centred = build.Experiment(config)
    eps, papers = centred.adapter.eps, spread.sde.smallest_time
    assert spread.adapter.eps == papers <= eps
    if tau:
        alpha, sigma = (float(f(jnp.asarray(eps))) for f in (spread.sde.mean_coef, spread.sde.std))
        width = alpha / sigma / 17
        assert eps == papers and width < tau or width == pytest.approx(tau, rel=1e-3)
    else:
        assert eps == papers
    # The evaluation begins there, and training draws its times from there on.
    assert centred.discrete_eps == centred.eval_eps == eps == centred.proposal.eps
    assert spread.discrete_eps == pytest.approx(eps)
    metadata = centred.provenance(centred.images("train"))
    assert not unseen_times(metadata, centred.sde, centred.discrete_eps)
    config.training.smallest_time = 1e-3
    assert build.Experiment(config).adapter.eps == 1e-3


def test_a_checkpoint_is_read_with_the_smallest_time_it_was_trained_with() -> None:
    config = tiny.get_config()
    config.data.dequantization = "centre"
    experiment = build.Experiment(config)
    now = experiment.provenance(experiment.images("train"))
    check_score(experiment.config, now)
    config.eval.tau = 1.0
    with pytest.raises(
        ValueError, match=r"smallest_time is 0.0\d*, .* is 0.00296\d*\. .*set --config.training"
    ):
        check_score(build.Experiment(config).config, now)
    # The last digit depends on the device that computed it.
    check_score(experiment.config, {**now, "smallest_time": now["smallest_time"] * (1 + 1e-6)})
    with pytest.raises(ValueError, match="training.smallest_time is"):
        check_score(experiment.config, {**now, "smallest_time": now["smallest_time"] * (1 + 1e-4)})
    papers = {**now, "smallest_time": 1e-5}
    with pytest.raises(ValueError, match=r"set --config.training.smallest_time=1e-5"):
        check_score(experiment.config, papers)
    assert not unseen_times(papers, experiment.sde, 1e-5)
    assert unseen_times(now, experiment.sde, 1e-5)
    config.training.smallest_time = 1e-5
    check_score(build.Experiment(config).config, papers)


def test_an_integer_denoiser_is_read_with_the_data_it_was_trained_on() -> None:
    """Its score depends on the data. That of other models does not, so they are not refused."""
    config = tiny.get_config()
    config.score.parameterization = "levels"
    config.training.smallest_time = 1e-3
    experiment = build.Experiment(config)
    now = experiment.provenance(experiment.images("train"))
    check_score(experiment.config, now)
    for field, value, before in (("dequantization", "centre", "uniform"), ("levels", 32, 17)):
        other = config.copy_and_resolve_references()
        other.data[field] = value
        asked = build.Experiment(other)
        with pytest.raises(
            ValueError, match=f"data.{field} is {value}, .*set --config.data.{field}={before}"
        ):
            check_score(asked.config, now)
        assert fingerprint.of(asked.exact_adapter) != fingerprint.of(experiment.exact_adapter)
        other.score.parameterization = config.score.parameterization = "noise"
        plain = build.Experiment(config)
        check_score(build.Experiment(other).config, plain.provenance(plain.images("train")))
        config.score.parameterization = "levels"


def test_a_checkpoint_with_other_bins_of_times_or_optimizer_is_named_by_the_field() -> None:
    config = tiny.get_config()
    experiment = build.Experiment(config)
    metadata = experiment.provenance(experiment.images("train"))
    config.training.proposal_bins = 16
    with pytest.raises(ValueError, match=r"training\.proposal_bins is 16, the checkpoint's is 32"):
        check_training(build.Experiment(config).config, metadata)
    config.training.proposal_bins, config.optim.name = 32, "muon"
    with pytest.raises(ValueError, match=r"optim\.name is muon, the checkpoint's is adam"):
        check_training(build.Experiment(config).config, metadata)
    metadata["config"]["model"]["width"] = [1] * 3000
    with pytest.raises(ValueError, match=r"'s is 1,1,1.*1\.\.\.\. Use .* training$") as said:
        check_training(build.Experiment(config).config, metadata)
    images, long = experiment.images("train"), "a" * 3000
    metadata["config"]["optim"]["name"] = long
    metadata["data"] = {**metadata["data"], "sha256": long}
    ours = experiment.provenance(images)
    told = compatibility.other_data(metadata, ours)
    told += [*changed_settings(metadata, ours, ""), str(said.value)]
    assert len(told) == 3 and max(map(len, told)) < 250, told


def test_other_times_are_changed_settings_of_a_dequantizer():
    told = []
    for change in ({}, {"training": {"times": "iid"}, "eval": {"smallest_time": 0.1}}):
        config = tiny.get_config()
        config.update(change)
        told.append({"config": build.Experiment(config).config.plain()})
    changed = changed_settings(*told, "dequantizer.")
    assert changed == ["training.times lattice -> iid", "eval.smallest_time None -> 0.1"]


def test_evaluating_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in .*train first"):
        runs.mode(evaluate.run, tiny.get_config(), tmp_path)


@pytest.mark.slow
def test_warnings_are_logged_before_the_images_are_evaluated(
    digits_model, tmp_path, monkeypatch, caplog, capsys
):
    config = tiny.get_config()
    (tmp_path / "checkpoints").symlink_to(digits_model / "checkpoints")
    config.eval.update(max_images=2, estimators=("ode",), smallest_time=1e-9)
    config.eval.ode.subset = 2

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells.Run, "number", property(stop))
    with pytest.raises(KeyboardInterrupt):
        runs.mode(evaluate.run, config, tmp_path)
    assert "a random sample of 2 of 360 images" in capsys.readouterr().out
    assert "random sample" not in caplog.text  # The user chose it, so it is no warning.
    assert "eval: times begin at t=1e-9" in caplog.text
