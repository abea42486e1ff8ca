"""What an installed package adds to a checkout: configs by name, the command, one version."""

import configparser
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import runs

import sbml
from sbml import main
from sbml.program.config import config
from sbml.program.runtime.versions import versions

CONFIGS = runs.ROOT / "configs"


def test_deprecations_in_every_file_of_ours_are_errors() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(runs.ROOT / "setup.cfg")
    filters = [
        line.split(":", 3)[3]
        for line in setup["tool:pytest"]["filterwarnings"].splitlines()
        if line.startswith("error::")
    ]
    assert len(filters) == 2
    helpers = [path.stem for path in (runs.ROOT / "tests").glob("*.py")]
    for module in (*helpers, "sbml.bits", "configs.best", "experiments.toy2d", "benchmarks.soak"):
        assert all(re.match(pattern, module) for pattern in filters), module


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_every_config_has_a_name(file: pathlib.Path) -> None:
    assert config.path_of(file.stem) == file


def test_a_file_comes_before_a_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_vp").touch()
    (tmp_path / "digits_mlp").mkdir()  # A work directory may have the name of its config.
    assert config.path_of("digits_vp") == pathlib.Path("digits_vp")
    assert config.path_of("digits_mlp") == CONFIGS / "digits_mlp.py"


def test_in_an_installed_package_the_configs_are_inside_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "_PACKAGE", tmp_path / "sbml")
    (tmp_path / "sbml" / "configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()  # Of another package in the same site-packages.
    (tmp_path / "configs" / "theirs.py").touch()
    (tmp_path / "sbml" / "configs" / "ours.py").touch()
    assert config.path_of("ours") == tmp_path / "sbml" / "configs" / "ours.py"
    with pytest.raises(ValueError, match="choose from ours,"):
        config.path_of("theirs")


def test_a_config_is_loaded_by_its_name() -> None:
    by_path = config.load(str(CONFIGS / "paper.py") + ":cifar10_vp_deep")
    assert config.load("paper:cifar10_vp_deep").to_dict() == by_path.to_dict()
    assert by_path.model.num_res_blocks == 8


@pytest.mark.slow
def test_the_command_runs_in_any_folder(tmp_path: pathlib.Path) -> None:
    """The error for a wrong field names the fields of its section."""
    setup = configparser.ConfigParser()
    setup.read(runs.ROOT / "setup.cfg")
    entry = setup["options.entry_points"]["console_scripts"]
    module, function = re.fullmatch(r"\s*sbml = (\S+):(\w+)", entry).groups()
    assert callable(getattr(importlib.import_module(module), function))

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sbml", *flags]
        env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)

    wrong = run("--config=paper:imagenet32_vp_deep", "--config.optim.learning_rate=1")
    assert wrong.returncode == 1 and "beta1, beta2, ema, eps, grad_clip, lr" in wrong.stderr
    shown = run("--help")
    assert main.__doc__ in shown.stdout and "--workdir" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_version_and_the_citation_have_one_place() -> None:
    setup = configparser.ConfigParser()
    setup.read(runs.ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: sbml.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", sbml.__version__)
    assert versions()["sbml"] == sbml.__version__
    citation = (runs.ROOT / "CITATION.cff").read_text()
    year = re.search(r"^date-released: (\d{4})-\d\d-\d\d$", citation, re.M)
    assert year and f"\nversion: {sbml.__version__}\n" in citation
    for page in ("README.md", "docs/index.md"):
        bibtex = (runs.ROOT / page).read_text()
        assert f"version = {{{sbml.__version__}}},\n  year = {{{year[1]}}}" in bibtex, page
    zenodo = json.loads((runs.ROOT / ".zenodo.json").read_text())
    names = [creator["name"] for creator in zenodo["creators"]]
    for value in (*names, *zenodo["keywords"], zenodo["title"], zenodo["license"]):
        assert value in citation
