"""Every config builds, and every wrong field is named before any work."""

import importlib.util
import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from configs import digits_vp
from sbml.core import fingerprint
from sbml.main import run_name
from sbml.program.config import build
from sbml.program.config.compatibility import unseen_times
from sbml.program.modes import MODES
from sbml.score import LABELS
from sbml.score.divergence import Trace
from sbml.sdes import times

CONFIGS = sorted((runs.ROOT / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


COUNTS = {}


def parameter_count(path):
    """The number of parameters of the config's network. Counting takes seconds, so equal networks
    share one count."""
    experiment = build.Experiment(load(path))
    network = experiment.adapter.model, experiment.shape
    if network not in COUNTS:
        COUNTS[network] = experiment.parameter_count()
    return COUNTS[network]


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_says_how_to_run_it(path):
    assert parameter_count(path) > 1e5
    assert f"--config=configs/{path.name}" in pathlib.Path(path).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["cifar10", "imagenet32"])
@pytest.mark.parametrize("sde", ["vp", "subvp"])
@pytest.mark.parametrize("size, count", [("", 61_804_419), ("_deep", 106_632_579)])
def test_papers_settings(data, sde, size, count):
    path = runs.ROOT / "configs" / f"{data}_{sde}{size}.py"
    assert parameter_count(path) == count
    config = load(path)
    experiment = build.Experiment(config)
    assert experiment.trained_adapter == experiment.adapter
    assert config.training.num_steps == (950_000 if size else 1_300_000)
    imagenet = data == "imagenet32"
    assert experiment.adapter.eps == (1e-2 if sde == "subvp" else 5e-5 if imagenet else 1e-5)
    assert config.model.dropout == (0.0 if imagenet else 0.1)
    assert config.data.flip == (not imagenet)
    assert config.training.batch_size == 128
    assert (config.optim.lr, config.optim.warmup, config.optim.grad_clip) == (2e-4, 5_000, 1.0)
    assert config.optim.ema == 0.9999
    config.training.importance_sampling = False
    assert build.Experiment(config).adapter.eps == (1e-2 if sde == "subvp" else 1e-5)


def test_the_papers_variants_change_what_they_are_named_after() -> None:
    get_config = runpy.run_path(str(runs.ROOT / "configs" / "paper.py"))["get_config"]
    plain = get_config("cifar10_vp").to_dict()
    changes = {
        "noflip": {"data.flip": False},
        "original": {
            "training.likelihood_weighting": False,
            "training.importance_sampling": False,
        },
        "weighted": {"training.importance_sampling": False},
        "deep": {"model.num_res_blocks": 8, "training.num_steps": 950_000},
    }
    for word, expected in changes.items():
        other = get_config(f"cifar10_vp_{word}").to_dict()
        found = {
            f"{section}.{field}": value
            for section, fields in other.items()
            if isinstance(fields, dict)
            for field, value in fields.items()
            if value != plain[section][field]
        }
        assert found == expected
    assert get_config("imagenet32_subvp_flip").data.flip
    for wrong in ("cifar", "cifar10", "cifar10_ve", "cifar10_vp_shallow", "vp_cifar10"):
        with pytest.raises(ValueError, match=f"paper:{wrong}: no such model; give cifar10"):
            get_config(wrong)
    for wrong, both in (("flip_noflip", "flip and noflip"), ("weighted_original", "original and")):
        with pytest.raises(ValueError, match=f"_{wrong}: give only one of {both}"):
            get_config(f"cifar10_vp_{wrong}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, network, count",
    [
        ("cifar10", {"name": "vdm", "width": 128, "fourier": (64.0, 128.0)}, 30_626_605),
        ("imagenet32", {"name": "vdm", "width": 256, "fourier": (64.0, 128.0)}, 122_234_413),
        ("fashion_mnist", {"name": "ncsnpp", "nf": 128, "fourier": ()}, 43_638_415),
    ],
)
def test_best_recipes_are_integer_denoisers_with_their_own_decoder(name, network, count) -> None:
    get_config = runpy.run_path(str(runs.ROOT / "configs" / "best.py"))["get_config"]
    config = get_config(name)
    experiment = build.Experiment(config)
    assert experiment.parameter_count() == count
    assert network.items() <= config.model.to_dict().items()
    assert f"{count / 1e6:.1f} M" in (runs.ROOT / "configs" / "best.py").read_text()
    # The draws are this package's.
    draws = config.training.times, config.training.noises, config.training.proposal_bins
    assert draws == ("lattice", "antithetic", 32)
    assert {c.name: bool(c.reason_undefined) for c in experiment.config.eval.cells()} == {
        "bound_learned": False,
        "bound_truncated_normal": False,
        "ode_learned": True,
        "ode_truncated_normal": False,
    }
    # Half a bin holds three standard deviations of the first noise, in training and evaluation.
    eps = jnp.asarray(experiment.adapter.eps)
    rho = experiment.sde.std(eps) / experiment.sde.mean_coef(eps)
    assert 1 / 256 / rho == pytest.approx(3, rel=2e-3)
    assert experiment.adapter.eps <= experiment.discrete_eps
    # At small noise the network sees x / d, where a bin repeats at the frequency 256 d.
    if config.model.fourier:
        assert config.model.fourier[-1] == 256 * config.score.data_std
    config.score.parameterization = "noise"
    with pytest.raises(ValueError, match="learned with score.parameterization=noise, data"):
        build.Experiment(config)
    config.score.parameterization = "levels"
    config.data.dequantization = "uniform"
    with pytest.raises(ValueError, match="parameterization=levels, data.dequantization=uniform"):
        build.Experiment(config)
    with pytest.raises(ValueError, match="best:cifar: no such recipe; choose from cifar10, image"):
        get_config("cifar")


def test_the_digits_have_the_dequantizer_that_fits_their_training() -> None:
    for name, noise, eps in (("centre", "truncated_normal", 0.00297), ("uniform", "uniform", 1e-5)):
        experiment = build.Experiment(digits_vp.get_config(name))
        assert experiment.config.data.dequantization == name
        assert experiment.config.eval.dequantizers == (noise,)
        assert experiment.eval_eps == pytest.approx(eps, rel=1e-2)
    assert digits_vp.get_config() == digits_vp.get_config("centre")
    with pytest.raises(ValueError, match="digits_vp:none: choose from centre, uniform"):
        digits_vp.get_config("none")


def test_importance_sampling_names_the_proposal_of_times() -> None:
    config = tiny.get_config()
    for sampling, proposal in ((True, times.Importance), (False, times.Uniform)):
        config.training.importance_sampling = sampling
        experiment = build.Experiment(config)
        assert type(experiment.proposal) is proposal
        assert experiment.proposal.eps == experiment.adapter.eps
    assert experiment.config.eval.bound.proposal_name == "importance"
    config.eval.bound.update(importance_sampling=False, proposal_bins=0)
    assert build.Experiment(config).config.eval.bound.proposal_name == "uniform"


def test_the_table_of_an_evaluation():
    """Estimator x dequantizer x K, as the command line gives them; undefined cells say why."""
    config = tiny.get_config()
    config.eval.dequantizers = ("uniform,categorical",)  # A flag gives the names in one string.
    config.eval.num_importance = (1, 20)
    cells = {
        cell.name: cell.reason_undefined for cell in build.Experiment(config).config.eval.cells()
    }
    assert list(cells)[:2] == ["ode_uniform", "ode_uniform_k20"]
    assert [name for name, reason in cells.items() if not reason] == [
        "ode_uniform", "ode_uniform_k20", "bound_uniform", "bound_categorical",
    ]  # fmt: skip
    twice = build.Experiment(config).config.eval.cells()
    config.eval.update(estimators=("ode", "bound,ode"), num_importance=(1, 20, 1))
    assert build.Experiment(config).config.eval.cells() == twice
    assert "expectation" in cells["bound_uniform_k20"] and "density" in cells["ode_categorical"]
    config.eval.update(estimators=("ode",), num_importance=(1,))
    config.eval.bound.target_se = 1e-3
    with pytest.raises(ValueError, match=r"eval.bound.target_se=0.001: only a bound is swept"):
        build.Experiment(config)
    config.eval.update(estimators=("bound",), num_importance=(20,))
    config.eval.bound.target_se = 0.0
    with pytest.raises(ValueError, match="no number to compute: bound_uniform_k20"):
        build.Experiment(config)


def test_hutchinson_with_several_samples_is_refused_with_the_reason():
    config = tiny.get_config()
    config.eval.num_importance = (1, 20)
    assert build.Experiment(config).config.eval.ode.divergence(20).kind == "exact"
    assert build.Experiment(config).config.eval.ode.divergence(1) == Trace("rademacher", 2)
    before = build.Experiment(config).config.eval.ode.divergence(20)
    config.eval.ode.probes = 3  # An exact trace has no probes, so its rows are the same.
    assert build.Experiment(config).config.eval.ode.divergence(20) == before
    config.eval.ode.trace = "rademacher"
    with pytest.raises(ValueError, match="would make the model look better than it is"):
        build.Experiment(config)


@pytest.mark.parametrize("label", ["time", "sigma"])
def test_the_logarithm_of_a_label_that_is_positive_is_no_mistake(label: str) -> None:
    config = tiny.get_config()
    config.score.update(label=label, log_snr_range=(-5.0, 13.3))
    config.model.embedding_type = "fourier"
    config.training.smallest_time = 1e-6
    build.Experiment(config).check()


@pytest.mark.slow
def test_unknown_fields_modes_and_arguments_list_the_choices(tmp_path):
    for flag, expected in [
        ("--config.optim.learning_rate=1", "beta1, beta2, ema, eps, grad_clip, lr"),
        (
            "--config.optimizer.lr=1",
            "did you mean optim? It has codec, data, dequantizer, ",
        ),
        ("--mode=trian", "convert, decompress, eval, latents, quality, report, sample, stats"),
        ("--config.mode=train,evil", "unknown mode 'evil'"),
        ("--config.eval.estimator=ode", "did you mean eval.estimators?"),
        ("--wokdir=a", "unknown flag --wokdir: did you mean --workdir?"),
        ("--process_id=1", "--process_id=1: several processes need all three"),
        ("lr=1", "set fields as --config.field=value"),
    ]:
        err = runs.run(tmp_path, flag, expect=1)
        assert expected in err, err


def test_discrete_levels_are_trained_and_the_sde_is_evaluated() -> None:
    config = load(CONFIGS[0].with_name("cifar10_vp.py"))
    config.training.discrete_levels = 1000
    with pytest.raises(ValueError, match="training.likelihood_weighting=False"):
        build.Experiment(config)
    config.training.update(likelihood_weighting=False, importance_sampling=False)
    experiment = build.Experiment(config)
    assert experiment.trained_adapter.sde == experiment.sde.levels(1000)
    assert experiment.adapter.sde == experiment.sde
    # A noise level has the same label in training and evaluation, although its times differ.
    levels, i = experiment.trained_kernel, jnp.asarray([0.0, 1.0, 10.0, 500.0, 999.0]) / 999
    t = experiment.sde.time(levels.log_snr(i))
    assert not np.allclose(i, t, atol=1e-4)
    # DDPM's first level has the variance beta_min / 1000. There is no training below it.
    first = 0.0009164769655  # beta_min t + (beta_max - beta_min) t^2 / 2 = -log(1 - 1e-4)
    assert experiment.eval_eps == pytest.approx(first) and experiment.sampling_eps == 1e-3
    metadata = {"config": config.to_dict(), "smallest_time": experiment.eps}
    assert not unseen_times(metadata, experiment.sde, experiment.eval_eps)
    (warning,) = unseen_times(metadata, experiment.sde, 1e-5)
    assert warning.startswith("eval: ") and "--config.eval.smallest_time=0.000916" in warning
    for label in LABELS:
        config.score.label = label
        experiment = build.Experiment(config)
        trained, evaluated = (
            experiment.trained_adapter.time_label(i),
            experiment.adapter.time_label(t),
        )
        np.testing.assert_allclose(trained, evaluated, rtol=1e-5, atol=1e-4)
    config.sde.name = "subvp"
    with pytest.raises(ValueError, match="limit of no discrete-time model"):
        build.Experiment(config).check()


def test_every_mode_is_a_function() -> None:
    assert {"train", "eval", "sample", "verify"} < set(MODES)
    assert all(callable(mode) for mode in MODES.values())


def test_parity_changes_any_config_to_the_authors() -> None:
    get_config = runpy.run_path(str(CONFIGS[0].with_name("parity.py")))["get_config"]
    config = get_config("cifar10_subvp_deep")
    assert config.training.to_dict() == {
        **load(CONFIGS[0].with_name("cifar10_subvp_deep.py")).training.to_dict(),
        "times": "iid",
        "noises": "independent",
        "proposal_bins": 0,
    }
    assert (config.score.label, config.score.parameterization) == ("time", "noise")
    assert (
        config.eval.bound.control,
        config.eval.bound.proposal_bins,
        config.eval.bound.n_times,
    ) == (False, 0, 1)
    assert config.data.dequantization == "none" and config.eval.max_images == 9_216
    assert not config.eval.in_order
    assert (config.eval.bound.times, config.eval.bound.sweeps, config.eval.ode.probes) == (
        "iid",
        5,
        1,
    )
    assert config.dequantizer.model.clipped
    for path in CONFIGS:
        if path.stem not in ("parity", "best", "cifar10_vdm"):
            build.Experiment(get_config(path.stem))
    for name in ("cifar", "best", "cifar10_vdm"):
        with pytest.raises(
            ValueError, match=f"parity:{name}: no such config; choose from cifar10_subvp"
        ):
            get_config(name)


@pytest.mark.slow
def test_a_config_with_an_argument_has_its_own_run_and_fields(tmp_path: pathlib.Path) -> None:
    assert run_name("configs/parity.py:digits_vp") == "parity_digits_vp"
    assert run_name("configs/digits_vp.py") == "digits_vp"
    assert run_name("configs/mine.py:/data/cats") == "mine_data_cats"
    flag = "--config.optim.learning_rate=1"
    err = runs.run(tmp_path, flag, config="configs/parity.py:digits_vp", expect=1)
    assert "beta1, beta2, ema, eps, grad_clip, lr" in err


def test_bfloat16_networks_are_evaluated_in_float32():
    """Otherwise the step control would see their rounding errors as errors of the solver."""
    given, config = build.Experiment(tiny.get_config()), tiny.get_config()
    config.model.dtype = "bfloat16"
    rounded = build.Experiment(config)
    assert rounded.adapter.model.dtype == "bfloat16"
    assert rounded.exact_adapter.model == given.adapter.model
    assert fingerprint.of(rounded.exact_adapter) == fingerprint.of(given.exact_adapter)
