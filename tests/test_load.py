"""``sbml.load``: the density of a trained model, from its work directory."""

from pathlib import Path

import cell_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

import sbml
from sbml.networks import unet2d
from sbml.program.config.config import Config
from sbml.program.convert.load import load
from sbml.program.runtime import checkpoint
from sbml.program.runtime.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def density(digits_model: Path) -> sbml.Density:
    assert sbml.load is load
    return load(digits_model)


@pytest.mark.slow
def test_the_numbers_are_those_of_an_evaluation(
    density: sbml.Density, digits_model: Path, tmp_path: Path
) -> None:
    run = cell_runs.cell_run(digits_model, tmp_path, cell_runs.ODE, max_images=4, in_order=True)
    images = run.evaluation.images.images[:4]
    found = density.bits_per_dim(images, check=False)
    np.testing.assert_allclose(found.values, cell_runs.numbers(run, np.arange(4)), rtol=1e-6)


def test_samples_are_integers_of_the_levels(density: sbml.Density) -> None:
    drawn = density.sample(jax.random.key(0), 2)
    assert drawn.shape == (2, 8, 8, 1) and drawn.dtype == jnp.uint8 and drawn.max() < 17


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in .*: give the work directory of a run"):
        load(tmp_path)


FLAT = flatten_dict(Config(**tiny.get_config().to_dict()).plain(), sep=".")
SECTIONS = ("data", "sde", "eval.ode", "sampling", "sampling.sampler", "dequantizer")
SOME = sorted(FLAT)[::3]  # of the fields


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("wrong", "value"), [("x\ny", "x\\ny"), (1.5, "1.5"), ([7] * 5000, "7")])
@pytest.mark.parametrize("names", [SOME, SECTIONS], ids=["fields", "sections"])
def test_a_value_of_a_wrong_type_in_a_checkpoint_is_named_with_its_folder(
    names: list[str], wrong: object, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that fits is refused later: this checkpoint has no arrays."""
    folder, found = tmp_path / "run", 0
    (folder / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(Checkpoints, "steps", lambda self: [1])
    for name in names:
        fields = {k: v for k, v in FLAT.items() if not k.startswith(f"{name}.")} | {name: wrong}
        stored = {"config": unflatten_dict(fields, sep="."), "data": None, "smallest_time": 1e-5}
        monkeypatch.setattr(
            checkpoint, "_manifest", lambda _, m=stored: {"metadata": m, "leaves": []}
        )
        with pytest.raises(ValueError) as caught:
            load(folder)
        said = str(caught.value)
        assert "\n" not in said and len(said) < 1000 and str(folder) in said, (name, said)
        if "of another model" in said:
            continue
        # A value is named by the field, or by a field of the section that it replaces.
        section, _, field = name.rpartition(".")
        named = (f"{name}.", f"{name}=", f"config.{section}: {field} is ")
        assert any(words in said for words in named), (name, said)
        assert value in said and "install the version of sbml that wrote it" in said, (name, said)
        found += 1
    assert found > len(names) / 2


@pytest.mark.usefixtures("unchecked")
def test_values_in_a_checkpoint_that_do_not_fit_together_are_named_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = unflatten_dict(FLAT | {"sde.learned": True, "data.dequantization": "uniform"}, sep=".")
    manifest = {"metadata": {"config": config, "data": None}, "leaves": []}
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(Checkpoints, "steps", lambda self: [1])
    monkeypatch.setattr(checkpoint, "_manifest", lambda _: manifest)
    with pytest.raises(
        ValueError, match="^the config of the checkpoint in .*: sde.learned"
    ) as told:
        load(tmp_path)
    assert str(tmp_path) in str(told.value)


def test_a_message_about_a_network_of_many_levels_is_short() -> None:
    many = {"down_block_types": ("DownBlock2D",) * 5000, "up_block_types": ("UpBlock2D",)}
    with pytest.raises(ValueError, match=r"\(5000\) and up_block_types.*one of each per") as caught:
        unet2d.Model(**many)
    assert len(str(caught.value)) < 400
