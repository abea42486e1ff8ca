"""``sbml.load``: the density of a trained model, from its work directory."""

from pathlib import Path

import cell_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbml
from sbml.program.convert.load import load


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
