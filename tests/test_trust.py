"""Names of parts of other packages: a file of a work directory cannot make the program import them.

To import a module is to run it. So only what the user names is imported.
"""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from sbml import data, main
from sbml.core import registry
from sbml.program.config import compatibility
from sbml.program.config.config import Config, default, of_checkpoint
from sbml.program.modes import MODES
from sbml.program.runtime import checkpoint
from sbml.program.runtime.checkpoint import Checkpoints
from sbml.program.runtime.workdir import ARCHITECTURE, Workdir
from sbml.sdes import SDES

NAME = "evil.part:Mine"
REFUSED = f"{NAME} is not imported: a file of the work directory names it, but you did not"
# The fields that name a part, with values that name one of another package.
FIELDS: dict[str, Any] = {
    "mode": ["report", NAME],
    "sde.name": NAME,
    "model.name": NAME,
    "score.parameterization": NAME,
    "data.source": NAME,
    "eval.estimators": ["ode", NAME],
    "eval.dequantizers": ["uniform", NAME],
    "eval.quality.features": NAME,
    "dequantizer.name": NAME,
    "sampling.sampler.name": NAME,
}
PART = """
import dataclasses
from sbml.sdes.linear_beta import VP

@dataclasses.dataclass(frozen=True)
class Mine(VP):
    pass
"""


class Run:
    """A work directory beside a package ``evil``; its checkpoint has a config, but no arrays."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.workdir, self._patch = folder / "run", patch
        (self.workdir / "checkpoints").mkdir(parents=True)
        (folder / "evil").mkdir()
        (folder / "evil" / "part.py").write_text(PART)
        patch.syspath_prepend(str(folder))
        patch.setattr(main.cpu, "settle", lambda: None)
        patch.setattr(Checkpoints, "steps", lambda self: [1])
        self.holds()

    def holds(self, **fields: Any) -> None:
        """Let the checkpoint's config have these fields."""
        config = flatten_dict(Config(**tiny.get_config().to_dict()).plain(), sep=".")
        stored = {"config": unflatten_dict({**config, **fields}, sep="."), "data": None}
        manifest = {"metadata": {**stored, "smallest_time": 1e-5}, "leaves": []}
        self._patch.setattr(checkpoint, "_manifest", lambda path: manifest)

    def says(self, *arguments: str) -> str:
        """The line with which the program ends, or nothing."""
        try:
            main.main(main.parse(["main", *arguments, f"--workdir={self.workdir}"]))
        except SystemExit as ended:
            return str(ended.code)
        return ""

    @property
    def imported(self) -> bool:
        """Whether the module was imported since this was asked last."""
        return any([sys.modules.pop(name, None) for name in ("evil.part", "evil")])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    made = Run(tmp_path, monkeypatch)
    yield made
    assert not made.imported


@pytest.mark.parametrize("field", FIELDS)
def test_a_part_that_only_the_checkpoint_names_is_not_imported(run: Run, field: str) -> None:
    """Without ``--config``, in every mode; one line says what to give."""
    run.holds(**{field: FIELDS[field]})
    for given in [()] if field == "mode" else [(), *((f"--mode={mode}",) for mode in MODES)]:
        said = run.says(*given)
        assert REFUSED in said and "\n" not in said, (given, said)
        assert "give --trust=evil.part:Mine, or --trust=evil for the whole" in said, (given, said)
        assert not run.imported, given


@pytest.mark.parametrize(("mode", "end"), [("report", ""), ("sample", "another model")])
def test_with_a_config_the_source_of_the_training_data_is_not_imported(
    run: Run, mode: str, end: str
) -> None:
    """The other names in the checkpoint are only compared with those of ``--config``."""
    run.holds(**{"data.source": NAME})
    said = run.says("--config=tests/tiny.py", f"--mode={mode}")
    assert end in said and not run.imported and bool(end) == bool(said)


@pytest.mark.parametrize("section", ["sde", "model"])
def test_a_part_that_only_architecture_json_names_is_not_imported(run: Run, section: str) -> None:
    """The file replaces fields of ``--config``; in Python too, a name there is not the caller's."""
    Workdir(run.workdir).write(ARCHITECTURE, {section: {"name": NAME}})
    for config in ((), ("--config=tests/tiny.py",)):
        assert REFUSED in run.says(*config, "--mode=report") and not run.imported
    hidden = Config(**tiny.get_config().to_dict()).replace(mode=(NAME,))
    with pytest.raises(PermissionError, match=REFUSED):
        compatibility.of_workdir(hidden, Workdir(run.workdir))
    assert not run.imported
    Workdir(run.workdir).write(ARCHITECTURE, {section: {"name": "tfds:cifar10"}})
    named = "--config.data.source=tfds:cifar10"  # It names an image set, and no part of a module.
    assert "tfds:cifar10 is not imported" in run.says("--config=tests/tiny.py", named)


def test_what_the_user_names_is_imported(run: Run, tmp_path: Path) -> None:
    """In the config, on the command line, or by the flag that trusts it or its package; another
    name is not enough."""
    run.holds(**{"sde.name": NAME})
    (tmp_path / "mine.py").write_text(
        "from tiny import get_config as other\n\n\ndef get_config():\n    config = other()\n"
        f"    config.sde.name = '{NAME}'\n    return config\n"
    )
    for given in (
        f"--config={tmp_path / 'mine.py'}",
        f"--config.sde.name={NAME}",
        f"--trust={NAME}",
        "--trust=other.part,evil",
        "--trust=evil.part",
    ):
        assert run.says("--mode=report", given) == "" and run.imported, given
        json.loads((run.workdir / "report.json").read_text())
    for wrong in ("evil.part:Other", "evil.par", "part", "evil:part"):
        assert REFUSED in run.says("--mode=report", f"--trust={wrong}"), wrong
        assert not run.imported
    run.holds(**{"sampling.sampler.name": NAME})
    assert (
        run.says("--mode=report", "--config.sampling.sampler.name=ode") == "" and not run.imported
    )


def test_python_imports_what_it_names_itself(run: Run) -> None:
    """A name in the caller's code is imported; one that ``of_checkpoint`` reads must be trusted."""
    run.holds(**{"sde.name": NAME})
    with pytest.raises(PermissionError, match=REFUSED):
        of_checkpoint(run.workdir)
    assert not run.imported
    trusting = of_checkpoint(run.workdir, {"eval.seed": "3"}, trust=["evil"])
    assert (trusting.sde.name, trusting.eval.seed) == (NAME, 3) and run.imported
    assert of_checkpoint(run.workdir, {"sde.name": "vp"}).sde.name == "vp" and not run.imported
    assert SDES[NAME].__name__ == "Mine" and run.imported
    config = default("mlp")
    config.sde.name = NAME
    assert Config(**config.to_dict()).sde.name == NAME and run.imported


def test_a_question_imports_nothing(run: Run) -> None:
    assert NAME in SDES and "vp" in SDES
    assert not any(wrong in SDES for wrong in ("evil:part:Mine", ".evil:Mine", "evil", None, {}))
    assert not run.imported
    with registry.only(["evil.part"]), registry.only([]):
        SDES[NAME]
    assert run.imported
    with registry.only([]), registry.only(["evil.part"]), pytest.raises(PermissionError):
        SDES[NAME]


def test_a_path_that_only_the_checkpoint_names_is_not_read(run: Run, tmp_path: Path) -> None:
    """TFDS imports a class that a file of ``cache_dir`` names, and a folder can be the whole disk.
    The command line, ``--config`` or ``--trust`` allows a path."""
    (tmp_path / "mine.py").write_text(
        "from tiny import get_config as other\n\n\ndef get_config():\n    config = other()\n"
        f"    config.data.cache_dir = '{tmp_path}/x'\n    return config\n"
    )
    old = "imagenet32:old"
    for field, source in (("path", "image_folder"), ("cache_dir", old), ("manual_dir", old)):
        path = f"{tmp_path}/x"
        run.holds(**{"data.source": source, "data.levels": 256, f"data.{field}": path})
        said = run.says("--mode=train")
        assert f"data.{field}={path} is not read: a file of the work directory names it" in said
        assert f"give --config.data.{field}={path}, or --trust={path}, or" in said
        assert "\n" not in said
        for given in (f"--config.data.{field}={path}", f"--trust=a,{path}/"):
            assert "is not read" not in run.says("--mode=train", given), (field, given)
        assert "is not read" in run.says("--mode=train", f"--trust={tmp_path}/y")
        assert "is not read" not in run.says("--mode=sample")  # It reads no images.
    assert "is not read" not in run.says("--mode=train", f"--config={tmp_path / 'mine.py'}")
    with registry.only([str(tmp_path)]), pytest.raises(PermissionError, match="is not read"):
        Config(**tiny.get_config().to_dict()).data.replace(path="/").options  # noqa: B018


def test_a_features_file_of_the_checkpoint_imports_nothing(run: Run, tmp_path: Path) -> None:
    """TFDS itself would import the class that ``features.json`` of ``cache_dir`` names."""
    home = tmp_path / "cache" / "tensorflow_datasets" / "mine" / "1.0.0"
    home.mkdir(parents=True)
    (home / "features.json").write_text('{"pythonClassName": "evil.part.Mine"}')
    info = {"name": "mine", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (home / "dataset_info.json").write_text(json.dumps(info))
    run.holds(**{"data.source": "tfds:mine", "data.cache_dir": str(tmp_path / "cache")})
    assert "is not read" in run.says("--mode=train")


def test_threads_do_not_share_trust(run: Run) -> None:
    """Two contexts overlap in two threads: neither sees the other's names, and afterwards all is as
    before. The thread that reads batches has the context of the one that started it."""
    inside, left = threading.Event(), threading.Event()

    def honest() -> None:
        with registry.only(["evil"]):
            inside.set()
            left.wait(10)

    other = threading.Thread(target=honest)
    other.start()
    inside.wait(10)
    with registry.only([]):
        with pytest.raises(PermissionError):
            SDES[NAME]
        left.set()
        other.join()
        with pytest.raises(PermissionError):
            list(data.prefetch(lambda step: SDES[NAME], stop=1))
    assert not run.imported
    assert SDES[NAME].__name__ == "Mine" and run.imported
