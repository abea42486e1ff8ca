"""A sample depends only on (seed, id), not on batches, devices or interruptions."""

import re
import signal
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import made_up
import numpy as np
import pytest
import runs
import tiny
from ml_collections import ConfigDict
from PIL import Image

from sbml import samplers
from sbml.core import bits
from sbml.core.files import read_json, read_npz
from sbml.program.config import build, objective
from sbml.program.config.trained import Trained
from sbml.program.evaluation import samples
from sbml.program.modes import sample
from sbml.program.runtime.checkpoint import Restored
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import SAMPLES, Workdir
from sbml.samplers import DDIM, Ancestral
from sbml.sdes import VE

STOCHASTIC = ("--config.sampling.sampler.name=ancestral", "--config.sampling.sampler.steps=20")


@pytest.fixture(scope="module")
def trained(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    (workdir / "checkpoints").symlink_to(digits_model / "checkpoints")
    return workdir


ANCESTRAL = {"name": "ancestral", "steps": 20}


def images(workdir: Path, sampler: object = ANCESTRAL, **options: object) -> np.ndarray:
    config = tiny.get_config()
    config.sampling.update(num_images=20, batch_size=20)
    config.sampling.sampler = ConfigDict(sampler)
    config.sampling.update(options)
    return samples.stored(of(build.Experiment(config), workdir), Preemption()).images


def of(experiment: build.Experiment, workdir: Path, restored: Restored | None = None) -> Trained:
    """The model of ``workdir``, with another checkpoint if one is given."""
    return Trained(experiment, restored or experiment.restore(workdir), Workdir(workdir))


def fresh(workdir: Path) -> Path:
    """Remove the samples of ``workdir`` and keep its checkpoint."""
    for part in workdir.glob("sampling/*/*"):
        part.unlink()
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [ANCESTRAL, {"name": "ode"}], ids=["ancestral", "ode"])
def test_an_image_does_not_depend_on_its_batch(trained: Path, sampler: object) -> None:
    whole = images(fresh(trained), sampler)
    assert len({image.tobytes() for image in whole}) == 20
    single = images(fresh(trained), sampler, batch_size=3)
    # Batches may sum in another order, and rounding may then give the neighbouring level.
    assert np.abs(whole.astype(int) - single).max() <= 1 and (whole != single).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_samples_of_each_kind_of_data_are_the_levels_that_were_trained_on(levels: int) -> None:
    k, noise = np.arange(levels), np.random.default_rng(0).uniform(-0.45, 0.45, (50, levels))
    for kind in ("none", "centre", "uniform"):
        x = objective.dequantize(k.astype(np.uint8), jax.random.key(0), kind, levels)
        how = samples.Recipe(VE(), (1,), levels, 1e-3, samplers.DDIM(steps=3), False, kind)
        np.testing.assert_array_equal(how.pixels(jnp.asarray(x)), k)
        if kind != "uniform":  # The other kinds lie in the middle of a level's interval.
            moved = x + noise * 2 / levels
            np.testing.assert_array_equal(how.pixels(jnp.asarray(moved)), np.tile(k, (50, 1)))


@pytest.mark.slow
def test_the_data_of_the_training_decide_the_levels_of_samples(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of a conversion may say otherwise."""
    experiment = build.Experiment(tiny.get_config())
    restored = experiment.restore(trained)
    assert experiment.with_dequantization_of(restored) is experiment
    restored.metadata["config"]["data"]["dequantization"] = "none"
    other = experiment.with_dequantization_of(restored)
    assert samples.Recipe.of(other).dequantization == "none"
    one, two = (samples.identity(of(e, tmp_path, restored)) for e in (experiment, other))
    assert one["recipe"].pop("dequantization") != two["recipe"].pop("dequantization")
    assert one == two
    assert other.adapter == experiment.adapter
    with monkeypatch.context() as patch:
        patch.setattr(build.Experiment, "restore", lambda self, workdir: restored)
        config = tiny.get_config()
        config.sampling.sampler.update(name="ddim", steps=2)
        runs.mode(sample.run, config, tmp_path)
    [stored] = tmp_path.glob("sampling/*/identity.json")
    assert read_json(stored)["recipe"]["dequantization"] == "none"


def test_samples_that_are_not_finite_are_counted(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the count they would look like ordinary white images."""
    config = tiny.get_config()
    count = config.sampling.num_images = 2 * jax.device_count()
    config.sampling.sampler.update(name="ancestral", steps=3)
    experiment = build.Experiment(config)
    restored = experiment.restore(trained)
    params = restored.state.ema_params
    drawn = samples.draw(experiment, params, np.arange(count))
    assert not drawn.failed.any()
    broken = restored._replace(
        state=restored.state.replace(ema_params=jax.tree.map(lambda a: a * np.nan, params))
    )
    drawn = samples.stored(of(experiment, trained / "broken", broken), Preemption())
    assert drawn.failed.all() and f"{count} of {count} samples are not finite" in caplog.text


def test_a_gap_is_said_in_bits_per_dimension() -> None:
    found = -made_up.MadeUp(2, 1, lambda ids, *_: 8 * ids - 12.0).estimate()
    assert samples.from_model(found, (2, 4)).startswith(f"{8 / (8 * np.log(2)):.4f} +- ")


@pytest.mark.slow
def test_the_gap_of_a_sampler_with_few_steps_is_said(trained: Path) -> None:
    """More steps are nearer to the model, and a sampler with noise has no such number."""
    config, gaps = tiny.get_config(), []
    few = of(build.Experiment(config), trained)
    assert "would cost more than the samples" in sample.gap(few, DDIM(4))
    config.sampling.num_images = sample.COMPARED * 65
    model = of(build.Experiment(config), trained)
    for steps in (4, 16):
        said = re.search(rf"{steps} steps of ode: ([\d.]+) \+-", sample.gap(model, DDIM(steps)))
        assert said is not None
        gaps.append(float(said[1]))
    assert 0 < gaps[1] < 0.5 * gaps[0]
    assert not sample.gap(model, Ancestral(4))


@pytest.mark.slow
def test_more_images_are_added_to_the_stored_ones(trained: Path) -> None:
    few = images(fresh(trained), num_images=7)
    before = {p: p.stat().st_mtime_ns for p in trained.glob("sampling/*/part_*")}
    more = images(trained, num_images=20)
    np.testing.assert_array_equal(more[:7], few)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    np.testing.assert_array_equal(images(trained, num_images=5), few[:5])


@pytest.mark.slow
def test_more_images_than_memory_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    many = ("--config.sampling.num_images=2147483647", "--config.data.shape=4096,4096,3")
    said = runs.run(tmp_path, "--mode=train,sample", *many, expect=1)
    assert said.startswith("ValueError: sampling.num_images=2147483647: the samples need 432,")
    assert len(said.splitlines()) == 1 and not (tmp_path / "checkpoints").exists()


def test_the_memory_that_samples_need_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, batch = 50_000, 1000
    config = tiny.get_config()
    config.sampling.update(num_images=n, batch_size=batch)
    experiment, workdir = build.Experiment(config), Workdir(tmp_path)
    shapes = {np.uint8: (batch, *experiment.shape), np.int32: batch, bool: batch}
    drawn = samples.Samples(*(np.zeros(shape, kind) for kind, shape in shapes.items()))
    monkeypatch.setattr(samples, "draw", lambda *given: drawn)
    monkeypatch.setattr(samples, "identity", lambda *given: {})
    restored = Restored(1, SimpleNamespace(ema_params={}), {})
    tracemalloc.start()
    drawn = samples.stored(of(experiment, tmp_path, restored), Preemption())
    workdir.write(SAMPLES, drawn._asdict())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    needed = sample.memory_needed(experiment.config)
    assert needed / 2 < peak < needed
    monkeypatch.setattr(sample, "memory", lambda: needed)
    sample.check(experiment, workdir, ())
    monkeypatch.setattr(sample, "memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=f"num_images={n}: .* draw at most {n - 1}"):
        sample.check(experiment, workdir, ())


@pytest.mark.slow
def test_another_seed_or_sampler_is_another_set(trained: Path) -> None:
    one = images(fresh(trained))
    assert (images(trained, seed=1) != one).mean() > 0.1
    assert (images(trained, sampler={"name": "ddim"}) != one).mean() > 0.1
    np.testing.assert_array_equal(images(trained), one)


@pytest.mark.slow
def test_killed_and_on_eight_devices_the_images_are_the_same(trained: Path) -> None:
    whole = images(fresh(trained), num_images=48, batch_size=8)
    flags = (*STOCHASTIC, "--mode=sample", "--config.sampling.num_images=48")
    flags = (*flags, "--config.sampling.batch_size=8")
    process = runs.start(fresh(trained), *flags)
    while not list(trained.glob("sampling/*/part_*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    runs.run(trained, *flags, devices=8)
    done = read_npz(trained / "samples.npz")
    assert np.abs(done["images"].astype(int) - whole).max() <= 1
    assert (done["images"] != whole).mean() < 1e-3
    assert np.all(done["nfe"] == 21)  # 20 steps and the denoising step
    strip = np.asarray(Image.open(trained / "samples_strip.png"))
    assert strip.shape == (4 * 66 - 2, 8 * 66 - 2)
    # From noise to image: the last frame of a row is the sample, enlarged eight times.
    last = strip[:64, 7 * 66 : 7 * 66 + 64][::8, ::8]
    shown = np.rint(done["images"][0, ..., 0] * (255 / 16))
    assert np.abs(last - shown).max() <= 16


def test_the_frames_of_a_strip_have_the_datas_range() -> None:
    """x_t of a variance-exploding process reaches 50; unscaled frames would only show its sign."""
    how = samples.Recipe(VE(), (8, 8, 1), 17, 1e-3, samplers.DDIM(steps=3), False)
    score = jax.tree_util.Partial(lambda x, t, key: -x / (1 + VE().std(t) ** 2))
    frames = samples.paths(score, np.arange(1), np.uint32(0), how, 2)
    z, _ = samples._latent(np.uint32(0), np.int32(0), how)
    shown = bits.to_pixels(z / np.hypot(1, 50), 17)
    np.testing.assert_array_equal(frames[0, 0], shown)
    assert len(np.unique(shown)) > 10


@pytest.mark.slow
def test_a_strip_goes_with_its_samples(
    trained: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples without a strip remove the strip of earlier samples; times before those of training
    give a warning. A signal is not held back while the gap is computed."""
    handlers: list[object] = []
    monkeypatch.setattr(sample, "gap", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    (trained / "samples_strip.png").touch()
    config = tiny.get_config()
    config.sampling.update(num_images=2, batch_size=2, frames=1, smallest_time=1e-9)
    config.sampling.sampler.update(name="ddim", steps=2)
    runs.mode(sample.run, config, trained)
    assert not (trained / "samples_strip.png").exists() and (trained / "samples.png").exists()
    assert "--config.sampling.smallest_time=" in caplog.text
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.slow
def test_every_sampler_can_be_chosen(trained: Path) -> None:
    config = tiny.get_config()
    config.sampling.num_images = 2
    config.sampling.corrector.name = "annealed_langevin"
    config.sampling.sampler.steps = 3
    for name in ("euler_maruyama", "reverse_diffusion", "ancestral", "ddim", "dpm_solver"):
        config.sampling.sampler.name = name
        experiment = build.Experiment(config)
        built = experiment.config.sampling.build()
        assert type(built) is samplers.SAMPLERS[name] and built.nfe == 6
    params = experiment.restore(trained).state.ema_params
    assert samples.preview(experiment, params, 2).images.shape == (2, 8, 8, 1)
