"""Class-conditional models: their loss, evaluation, classifier and samples."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from PIL import Image
from scipy import special

import sbml
from sbml import data, losses
from sbml.core.types import Array, Key
from sbml.data import Options
from sbml.density import Density
from sbml.density.posterior import Posterior
from sbml.networks import NETWORKS
from sbml.program.config import build, objective
from sbml.program.evaluation import classifier, samples
from sbml.program.modes import eval as evaluate
from sbml.program.modes import latents, sample, train, train_dequantizer
from sbml.program.runtime.workdir import EVALUATION, Workdir
from sbml.samplers import DDIM
from sbml.statistics.intervals import Interval

VP = sbml.VP()


def config():
    made = tiny.get_config()
    made.model.classes = 10
    made.eval.update(max_images=12, classifier_images=8, batch_size=16)
    made.eval.ode.subset = 4
    made.eval.bound.sweeps = 2
    made.eval.bound.update(control=False, proposal_bins=0)
    made.sampling.num_images = 20
    made.sampling.sampler.update(name="ddim", steps=3)
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with a trained model, its evaluation and its samples."""
    workdir = tmp_path_factory.mktemp("classes")
    for mode in (train, evaluate, sample):
        runs.mode(mode.run, config(), workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_reads_the_class_of_each_example(name: str) -> None:
    small = {
        "mlp": {"width": 8, "depth": 1},
        "ncsnpp": {"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": (4,)},
        "vdm": {"width": 8, "depth": 1},
        "unet2d": {
            "block_out_channels": (8,),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",),
        },
    }[name]
    x, label = jnp.ones((3, 4, 4, 1)), jnp.full(3, 0.5)
    model = NETWORKS[name](**small, classes=4)

    def output(params, classes):
        return model.apply(params, x, label, train=False, condition=jnp.asarray(classes))

    # The initialisers are slow to compile, and give the last layers weights of 0.
    init = partial(jax.eval_shape, partial(model.init, train=False), jax.random.key(0), x, label)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype),
        init(condition=jnp.zeros(3)),
    )
    output = jax.jit(output)
    one, other = output(params, [0, 1, 1]), output(params, [1, 1, 3])
    assert np.array_equal(one[1], other[1]) and not np.allclose(one[0], other[0], atol=1e-6)
    np.testing.assert_allclose(one[1], one[2], rtol=1e-6)
    assert not np.allclose(one[2], other[2], atol=1e-6)
    with pytest.raises(ValueError, match="classes=4 and got no class: give the score a condition"):
        init()
    plain = partial(dataclasses.replace(model, classes=0).init, train=False)
    assert "classes" not in jax.eval_shape(plain, jax.random.key(0), x, label)["params"]


def test_the_loss_is_zero_for_a_score_that_knows_the_image_of_each_class(monkeypatch) -> None:
    """Class c is the image of the level c. For another class c' the loss is
    weight w(t) / 2 (alpha (m_c - m_c') / sigma)^2, where m_c is the centre of the bin of c."""
    made = config()
    made.data.dequantization = "centre"
    made.training.update(noises="independent", proposal_bins=0, times="iid")
    experiment = build.Experiment(made)
    sde = experiment.sde

    def centre(c):
        return 2 * (c + 0.5) / 17 - 1

    def given(c):
        def score(x, t, key):
            return jax.vmap(lambda x, t, c: (sde.mean_coef(t) * centre(c) - x) / sde.std(t) ** 2)(
                x, t, c
            )

        score.batch = score
        return score

    score = SimpleNamespace(given=given)
    monkeypatch.setattr(build.Experiment, "trained_score", lambda self, params: (score, sde))
    label, given = np.array([3, 1, 4, 1], np.int32), np.array([3, 1, 6, 0], np.int32)
    pixels = np.broadcast_to(label.astype(np.uint8).reshape(4, 1, 1, 1), (4, 8, 8, 1))

    @jax.jit
    def found_and_expected(batch, key):
        draws = objective.prepare_fn(experiment)(batch, key, ())
        away = (centre(label) - centre(given)) * sde.mean_coef(draws.t) / sde.std(draws.t)
        expected = draws.weight * sde.rate(draws.t) / 2 * away**2
        return objective.loss_fn(experiment)({}, draws, ()), expected

    found, expected = found_and_expected((pixels, given), jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert (expected == 0).tolist() == [True, True, False, False]


@pytest.mark.slow
def test_the_loss_of_an_image_is_that_of_its_class() -> None:
    experiment = build.Experiment(config())
    images = experiment.images("train")
    labels = experiment.labels(images)
    assert labels.tolist()[:10] == list(range(10)) and labels.dtype == np.int32
    params = experiment.init_state().params
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    batch = images.images[:4], labels[[3, 1, 4, 1]]
    draws = jax.jit(objective.prepare_fn(experiment))(batch, jax.random.key(1), jnp.ones((2, 32)))
    found = jax.jit(objective.loss_fn(experiment))(params, draws, ())

    @jax.jit
    def alone(row, label):
        score = experiment.adapter(params, label)
        return losses.dsm_batch(score, experiment.sde, row.x, row.t, row.keys, signs=row.signs)

    assert draws.label.tolist() == [3, 3, 1, 1, 4, 4, 1, 1]
    for i, label in enumerate(draws.label.tolist()):
        row = jax.tree.map(lambda a, i=i: a[i : i + 1], draws)
        expected = row.weight * row.inverse * alone(row, jnp.asarray(label)) / 64
        np.testing.assert_allclose(found[i], expected[0], rtol=1e-5)


@pytest.mark.slow
def test_an_evaluation_has_bits_per_dim_given_the_label_and_the_classifier(trained) -> None:
    """Against ``Density``, one class after the other, and Bayes' rule written out."""
    workdir, made = Workdir(trained), config()
    stored, table = workdir.read(EVALUATION), workdir.read("per_image.npz")
    experiment = build.Experiment(made)
    params = experiment.restore(trained).state.ema_params
    images, train_images = experiment.images("test"), experiment.images("train")
    labels = experiment.labels(images)
    density = Density(
        experiment.exact_adapter(params),
        experiment.sde,
        experiment.shape,
        levels=17,
        eps=experiment.eval_eps,
        solver=experiment.config.eval.ode.build(),
        trace=experiment.config.eval.ode.divergence(),
    )
    ids = np.sort(np.random.RandomState(0).permutation(360)[:8])
    assert set(ids) <= set(table["id"]) and len(table["id"]) == 12
    pixels, dims = images.images[ids], 64
    each = [density.bits_per_dim(pixels, np.int32(c), check=False).values for c in range(10)]
    logp = -dims * np.log(2) * np.stack(each, axis=1)
    prior = np.bincount(experiment.labels(train_images)) / len(train_images)
    joint = logp + np.log(prior)
    right = joint.argmax(axis=1) == labels[ids]
    classified = stored["classifier"]
    assert classified["images"] == 8 and classified["accuracy"]["mean"] == np.mean(right)
    assert classified[classifier.GUESS] == prior.max()
    mixture = -special.logsumexp(joint, axis=1) / (dims * np.log(2))
    found = classified["bits/dim of the mixture over classes"]["mean"]
    assert found == pytest.approx(mixture.mean(), abs=1e-5)
    given = classified["bits/dim given the label"]["mean"]
    own = [each[labels[i]][j] for j, i in enumerate(ids)]
    assert given == pytest.approx(np.mean(own), abs=1e-5)
    assert table["class"].tolist() == images.labels[table["id"]].tolist()
    assert stored["classes"] == [str(c) for c in range(10)]
    # The numbers of the table have other draws, because these images have other indexes in it.
    own = table["ode_uniform_bits_per_dim"]
    assert stored["results"][0]["bits_per_dim"] == pytest.approx(own.mean())
    assert abs(own[np.isin(table["id"], ids)].mean() - given) < 0.05


def test_the_numbers_of_a_classifier_are_those_of_bayes_rule(monkeypatch) -> None:
    """Two classes give four integers these probabilities, and one class is rarer."""
    table, prior = np.array([[0.1, 0.1, 0.3, 0.5], [0.4, 0.4, 0.1, 0.1]]), np.array([0.2, 0.8])

    def classify(self, pixels, conditions, given, progress):
        logp = np.log(table[conditions][:, pixels.ravel()]).T
        log_det, every = np.zeros(len(logp)), np.arange(len(logp))
        return Posterior.of(logp, log_det, np.log(given), every, logp, logp, lambda weights: 0.0)

    monkeypatch.setattr(Density, "classify", classify)
    density = Density(lambda x, t, key: -x, VP, (1, 1, 1), levels=4, eps=1e-3)
    k, truth = np.array([0, 1, 2, 3, 3]), np.array([1, 0, 1, 0, 1])
    pixels = k.astype(np.uint8).reshape(5, 1, 1, 1)
    found = classifier._numbers(density, pixels, truth, np.array([1, 0, 1, 1, 1]))
    given, mixture = table[truth, k], prior @ table[:, k]
    for name, share in (
        ("bits/dim of the mixture over classes", mixture),
        ("bits/dim given the label", given),
    ):
        assert found[name].mean == pytest.approx(-np.log2(share).mean())
    score = -np.log(prior[truth] * given / mixture).mean()
    assert found["-log p(c | k), nats"].mean == pytest.approx(score)
    assert found["accuracy"].mean == 0.6 and found[classifier.GUESS] == 0.8 and found["images"] == 5


@pytest.mark.parametrize("accuracy", [0.05, 0.1, 0.15])
def test_a_classifier_that_is_no_better_than_a_guess_gives_a_warning(accuracy: float) -> None:
    found = classifier.cautions(
        {"accuracy": Interval(accuracy, 0.1, 0.2, 8, 0), classifier.GUESS: 0.1}, 1e-3
    )
    assert len(found) == (accuracy <= 0.1)
    assert all(
        f"accuracy of {accuracy}, and guessing the most frequent class has 0.1" in f for f in found
    )
    assert classifier.cautions({}, 1e-3) == []


def test_a_classifier_whose_solver_failed_gives_a_warning() -> None:
    """The score is exact for N(m_c, 1) with m = 0, 1; the solver takes two steps of Euler. The
    score of the white image is NaN."""

    def score(x: Array, t: Array, key: Key | None, c: Array) -> Array:
        wrong = jnp.where(x.max() > 0.9, jnp.nan, 0.0)
        return VP.mean_coef(t) * c - x + wrong

    few = sbml.ode.Solver("euler", fixed_steps=2)
    density = sbml.Density(score, VP, (3,), levels=16, solver=few)
    pixels, truth = np.random.default_rng(0).integers(2, 12, (8, 3)), np.arange(8) % 2
    numbers = classifier._numbers(density, pixels, truth, truth)
    said = classifier.cautions(numbers, 1e-3)[0]
    assert said.startswith("NOT CONVERGED: the solver's error of the classifier's bits/dim is up")
    unknown = {
        name: value._replace(mean=np.nan)
        for name, value in numbers.items()
        if name.startswith("solver's")
    }
    assert "is up to nan, not within" in classifier.cautions({**numbers, **unknown}, 1e-3)[0]
    pixels[-1] = 15
    numbers = classifier._numbers(density, pixels, truth, truth)
    (said,) = classifier.cautions(numbers, 1e-3)
    assert said.startswith("the classifier's log p is not finite for 1 of 8 images")


def test_the_score_of_sample_i_is_that_of_class_i_modulo_their_number() -> None:
    def score(x, t, key, c):
        return c * x

    how = samples.Recipe(VP, (1,), 17, 1e-3, DDIM(steps=3), False, classes=3)
    found = [float(how.score(score, i)(2.0, 0.5, None)) for i in np.arange(7)]
    assert found == [0, 2, 4, 0, 2, 4, 0]
    plain = dataclasses.replace(how, classes=0)
    assert plain.score(score, np.int32(1)) is score


@pytest.mark.slow
def test_sample_i_has_class_i_modulo_the_number_of_classes(trained) -> None:
    experiment = build.Experiment(config())
    params = experiment.restore(trained).state.ema_params
    drawn = samples.draw(experiment, params, np.arange(12)).images
    assert np.array_equal(Workdir(trained).read("samples.npz")["images"][:12], drawn)
    recipe = dataclasses.replace(samples.Recipe.of(experiment), classes=0)
    for label in (0, 1, 7):
        score, seed = experiment.adapter(params, label), np.uint32(0)
        alone = samples._sample_batch(score, np.arange(12, dtype=np.int32), seed, recipe).images
        same = [i for i in range(12) if np.array_equal(alone[i], drawn[i])]
        assert {i for i in range(12) if i % 10 == label} <= set(same) and len(same) < 12


def test_labels_that_do_not_fit_are_refused(tmp_path) -> None:
    experiment = build.Experiment(config())
    digits = experiment.images("train")
    without = dataclasses.replace(digits, labels=None)
    few = dataclasses.replace(digits, labels=np.array(["a", "b"])[np.arange(len(digits)) % 2])
    for images, classes, message in (
        (without, (), "model.classes=10, but the images of digits .* have no labels"),
        (few, (), "has 2 classes, a, b: set --config.model.classes=2"),
        (few, tuple("bcdefghijk"), "of the class a, which the training did not see"),
    ):
        with pytest.raises(ValueError, match=message):
            experiment.labels(images, classes)
    original, renamed = experiment.images, np.char.add("n", digits.labels)
    experiment.images = lambda split: dataclasses.replace(
        original("train"), labels=digits.labels if split == "train" else renamed
    )
    with pytest.raises(ValueError, match="of the class n0, which the training did not see"):
        train.check(experiment, Workdir(tmp_path), ())
    for mode in (latents, train_dequantizer):
        with pytest.raises(ValueError, match="with model.classes=10: this mode is for models"):
            mode.check(experiment, Workdir(tmp_path), ())


@pytest.mark.slow
def test_training_does_not_continue_with_other_classes(trained, monkeypatch) -> None:
    original = build.Experiment.images

    def renamed(self, split):
        images = original(self, split)
        return dataclasses.replace(images, labels=np.char.add("n", images.labels))

    monkeypatch.setattr(build.Experiment, "images", renamed)
    longer = config()
    longer.training.num_steps += 4
    with pytest.raises(ValueError, match="classes are .*'9'.* those of the images"):
        runs.mode(train.run, longer, trained)
    with pytest.raises(ValueError, match="of the class n0, which the training did not see"):
        runs.mode(evaluate.run, config(), trained)


@pytest.mark.slow
def test_without_training_images_of_a_class_there_is_no_classifier(trained, monkeypatch) -> None:
    """A warning says so, and the other numbers do not change."""
    original = build.Experiment.images

    def fewer(self, split):
        images = original(self, split)
        if split != "train":
            return images
        kept = images.labels != "9"
        return dataclasses.replace(images, array=images.images[kept], labels=images.labels[kept])

    before = Workdir(trained).read(EVALUATION)
    monkeypatch.setattr(build.Experiment, "images", fewer)
    runs.mode(evaluate.run, config(), trained)
    after = Workdir(trained).read(EVALUATION)
    assert "classifier" in before and "classifier" not in after
    said = "no classifier: digits (train) has no image of the class 9, which the model was trained"
    assert any(warning.startswith(said) for warning in after["warnings"])
    assert after["results"][0]["bits_per_dim"] == before["results"][0]["bits_per_dim"]


def test_a_users_network_with_a_field_named_classes_is_not_class_conditional() -> None:
    class Own(NETWORKS["mlp"]):
        def __call__(self, x, label, *, train):
            return x

    experiment = build.Experiment(config())
    assert experiment.adapter.classes == 10
    assert dataclasses.replace(experiment.adapter, model=Own(classes=10)).classes == 0


def test_folders_name_the_classes(tmp_path) -> None:
    def save(*names: str) -> None:
        for i, name in enumerate(names):
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)

    def labels(split: str):
        options = Options(path=tmp_path / "images", cache_dir=tmp_path / "cache", image_size=8,
                          channels=1, test_fraction=0.3)  # fmt: skip
        found = data.load("image_folder", split, options).labels
        return None if found is None else found.tolist()

    save("train/dog/a.png", "train/cat/b.png", "train/cat/more/c.png", "test/cat/d.png")
    assert labels("train") == ["cat", "cat", "dog"] and labels("test") == ["cat"]
    save("train/dog/a.png", "train/e.png")
    assert labels("train") is None and labels("test") == ["cat"]
    for path in (tmp_path / "images").iterdir():
        path.rename(tmp_path / path.name)
    save(*(f"{name}/{i}.png" for name in ("x", "y") for i in range(20)))
    assert set(labels("train")) == {"x", "y"}
