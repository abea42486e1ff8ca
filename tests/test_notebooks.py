"""Every notebook runs from its first cell to its last, at a reduced scale."""

import os
import re
import textwrap
import types
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "experiments").glob("*.ipynb"))

TINY = (
    "--config.data.source=photos --config.model.nf=8 --config.model.ch_mult=1,1 "
    "--config.model.num_res_blocks=1 --config.training.batch_size=8 --config.eval.max_images=2 "
    "--config.eval.batch_size=2 --config.eval.bound.sweeps=2 "
    "--config.eval.estimators=bound --config.sampling.num_images=2 --config.sampling.frames=1 "
    "--config.sampling.sampler.name=dpm_solver --config.sampling.sampler.steps=4 "
    "--config.score.parameterization=preconditioned --config.score.label=log_snr"
)


def reduced(name: str, folder: Path) -> dict[str, Any]:
    """The parameters for the test: a cell with them is inserted after the notebook's own ones."""
    return {
        "quickstart": {
            "STEPS": 20,
            "IMAGES": 12,
            "WORKDIR": str(folder),
            "NETWORK": {"nf": 8, "ch_mult": (1, 1), "num_res_blocks": 1},
        },
        "losses_in_your_code": {"STEPS": 20},
        "policy_gradient": {
            "REPEATS": 2,
            "UPDATES": 5,
            "STEPS": 20,
            "TUNING": 5,
            "PATHS": 16,
            "DRAWS": 200,
            "GRID": 101,
        },
        "boltzmann": {"CHAINS": 50, "KEPT": 2, "STEPS": 20, "SAMPLES": 200},
        "posterior_of_a_simulator": {"SIMULATIONS": 500, "STEPS": 20, "EXAMPLES": 8, "DRAWS": 2},
        "cifar10_tpu": {"STEPS": 2, "WORKDIR": str(folder), "FLAGS": TINY},
    }[name]


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    [where] = [
        i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])
    ]
    lines = [f"{name} = {value!r}" for name, value in reduced(path.stem, tmp_path).items()]
    notebook.cells.insert(where + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    context = {"metadata": {"path": str(path.parent)}}
    done = NotebookClient(notebook, timeout=300, resources=context).execute()
    shell = [
        o for c in done.cells for o in c.get("outputs", []) if "Traceback" in o.get("text", "")
    ]
    assert not shell, shell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_colab_keeps_jax_and_its_plugin_at_one_version(path: Path) -> None:
    """The requirement names the extra of the plug-in that is installed: jax pins it there."""
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    cell = nbformat.read(path, as_version=4).cells[1].source
    code = textwrap.dedent(re.search(r"^    plugins = .*?(?=^ +%pip)", cell, re.M | re.S)[0])
    assert '%pip install -q -e "{target}"' in cell
    for plugin, target in {
        "jax-cuda12-plugin": ".[cuda12]",
        "jax-cuda13-plugin": ".[cuda13]",
        "libtpu": ".[tpu]",
        "numpy": ".",
    }.items():
        found = [types.SimpleNamespace(name=name) for name in ("jax", plugin)]
        names: dict[str, Any] = {"distributions": lambda found=found: found}
        exec(code, names)
        assert names["target"] == target
        for extra in names["extras"]:
            assert setup["options.extras_require"][extra] == f"jax[{extra}]"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small_and_names_its_address(path: Path) -> None:
    """The badge and the first code cell contain the address in setup.cfg; outputs are small."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    url = setup["metadata"]["url"]
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    repository = url.removeprefix("https://github.com/")
    colab = (
        f"https://colab.research.google.com/github/{repository}/blob/main/experiments/{path.name}"
    )
    assert f"({colab})" in notebook.cells[0].source
    assert re.search(rf"git clone --depth 1 {re.escape(url)}$", notebook.cells[1].source, re.M)
    assert path.stat().st_size < 200_000
    assert not any(o.output_type == "error" for c in notebook.cells for o in c.get("outputs", []))
