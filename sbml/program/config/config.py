"""The whole config: a ``ConfigDict`` that users change, and the ``Config`` that the program reads.

A config file calls :func:`default` and sets the fields that differ; the command line sets further
fields, as in ``--config.optim.lr=1e-4`` (:func:`with_overrides`). From both, one :class:`Config` is
made. It is frozen and checked, and its fields hold plain values only; ``build`` makes objects from
them. Each section has a file beside this one, which has the fields with their defaults and ranges.
"""

import math
import os
import pathlib
import runpy
import traceback
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from sbml import data, dequantizers
from sbml.core import registry
from sbml.core.door import brief
from sbml.core.registry import hint, listed
from sbml.core.scalars import notation
from sbml.core.types import Json
from sbml.density.estimators import Cell
from sbml.dequantizers import DEQUANTIZERS
from sbml.program.config.data import PATHS, Data
from sbml.program.config.dequantizer import Dequantizer
from sbml.program.config.evaluation import Eval
from sbml.program.config.fields import Override, Section, Seed, as_tuples, errors_of, field, unknown
from sbml.program.config.optim import Optim
from sbml.program.config.sampling import Coding, CorrectorChoice, Latents, SamplerChoice, Sampling
from sbml.program.config.score import Network, Process, Score
from sbml.program.config.training import Training
from sbml.program.runtime import refusals
from sbml.program.runtime.workdir import Workdir

_PACKAGE = pathlib.Path(__file__).parents[2]
# The sections that take the fields of another class than the one which they name by default.
OPEN = ("sde", "data", "sampling.sampler", "sampling.corrector")


class Config(Section):
    """All settings of a run. The defaults train the paper's model for CIFAR-10 and the SDE VP, with
    likelihood weighting and importance sampling. Times and noises are drawn with less variance than
    in the paper (``configs/paper.py``)."""

    seed: Seed = field(0, "seed of training")
    mode: tuple[str, ...] = field(
        ("train",), "modes to run, in order, without the flag --mode", min_length=1
    )
    data: Data = Data()
    sde: Process = Process()
    model: Network = Network()
    score: Score = Score()
    training: Training = Training()
    optim: Optim = Optim()
    eval: Eval = Eval()
    dequantizer: Dequantizer = Dequantizer()
    sampling: Sampling = Sampling()
    latents: Latents = Latents()
    codec: Coding = Coding()

    def check(self) -> None:
        """Check that the split to evaluate exists, and that the dequantizers of the evaluation can
        be trained with this config and fit the images."""
        if self.eval.split == data.VALIDATION and not self.data.validation:
            raise ValueError(data.NO_VALIDATION.format(f"eval.split={self.eval.split}"))
        for name in self.eval.dequantizers:
            if dequantizers.is_trained(DEQUANTIZERS[name]) and name != self.dequantizer.name:
                raise ValueError(
                    f"eval.dequantizers={name}, but the dequantizer that is trained is "
                    f"dequantizer.name={self.dequantizer.name}: begin the config with "
                    f"sbml.program.config.config.default({self.model.name!r}, dequantizer={name!r})"
                )
            self.check_dequantizer("eval.dequantizers", name)

    def validation_cell(self) -> Cell:
        """The number that ``training.validate_every`` computes during training: the first bound of
        the evaluation whose dequantizer is not trained."""
        name = f"training.validate_every={self.training.validate_every}"
        if not self.data.validation:
            raise ValueError(
                f"{name} with data.validation=0: no training images are held out; set "
                "--config.data.validation=0.1 for a tenth"
            )
        for cell in self.eval.cells():
            usual = cell.num_importance == 1 and cell.kind.is_bound and not cell.reason_undefined
            if usual and not dequantizers.is_trained(DEQUANTIZERS[cell.dequantizer]):
                return cell
        raise ValueError(
            f"{name}: the curve is that of a bound with a dequantizer that is not trained; set "
            "--config.eval.estimators=ode,bound and --config.eval.dequantizers=uniform"
        )

    def check_learned(self) -> None:
        """Check that the loss of a learned SDE is the whole bound. A config for a conversion need
        not fulfil this: no converted SDE is learned."""
        if not self.sde.learned:
            return
        if not jax.tree.leaves(self.sde.build()):
            raise ValueError(
                f"sde.learned with sde.name={self.sde.name}: it has no numbers to learn"
            )
        needed = {
            "data.dequantization": "centre",  # The bound has a decoder.
            "training.likelihood_weighting": True,
            "training.discrete_levels": 0,
        }
        ours = flatten_dict(self.plain(), sep=".")
        wrong = [name for name, value in needed.items() if ours[name] != value]
        if wrong:
            given = ", ".join(f"{name}={ours[name]}" for name in wrong)
            flags = " ".join(f"--config.{name}={needed[name]}" for name in wrong)
            raise ValueError(f"sde.learned with {given}: the loss is no bound; set {flags}")

    def check_dequantizer(self, field_name: str, name: str) -> None:
        """Check that the dequantizer ``name``, a value of this field, fits images and score."""
        settings = self.data.shape, self.score.parameterization, self.data.dequantization
        if reason := DEQUANTIZERS[name].misfit(*settings):
            raise ValueError(f"{field_name}={name} with {reason}")


def default(network: str = "ncsnpp", dequantizer: str = "variational") -> ConfigDict:
    """A config for users to change: the defaults of :class:`Config`, of the network called
    ``network``, and of the dequantizer to train called ``dequantizer``.

    The sections whose fields depend on a choice, such as ``sde``, take further fields, those of
    another class.
    """

    def editable(section: Section) -> Json:
        return {k: editable(v) if isinstance(v, Section) else v for k, v in section}

    chosen = Config(model=Network(name=network), dequantizer=Dequantizer(name=dequantizer))
    config = ConfigDict(editable(chosen)).lock()
    for section in OPEN:
        node_of(config, f"{section}.name")[0].unlock()
    return config


def named() -> dict[str, pathlib.Path]:
    """The files of ``configs/`` by their names; in a checkout it is beside the package."""
    folder = _PACKAGE / "configs"
    folder = folder if folder.is_dir() else _PACKAGE.with_name("configs")
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def path_of(config: str) -> pathlib.Path:
    """The file of a config, which may be given by its name: ``digits_vp`` is the file
    ``configs/digits_vp.py``.
    """
    path = pathlib.Path(config).expanduser()
    if os.path.isfile(path):  # ``is_file`` raises an OSError for a name that is too long.
        return path
    known = named()
    if config in known:
        return known[config]
    if os.path.isdir(path) or config != path.stem:
        what = "a folder" if os.path.isdir(path) else "no file"
        beside = map(str, path.parent.glob("*.py") if os.path.isdir(path.parent) else [])
        raise ValueError(
            f"--config={config} is {what}: "
            + hint(config, beside, "give a file such as configs/digits_vp.py")
        )
    remedy = f"choose from {listed(config, known)}, or give the path of a file"
    raise ValueError(f"--config={config}: no config has this name; {hint(config, known, remedy)}")


def load(config: str) -> ConfigDict:
    """What the function ``get_config`` of a config file returns. ``config`` is the file or its
    name; after a colon stands an argument of the function.

    Any error in the file becomes a ValueError of one line.
    """
    name, colon, argument = config.partition(":")
    path = str(path_of(name))
    try:
        get_config = runpy.run_path(path).get("get_config")
        found = get_config and (get_config(argument) if colon else get_config())
    except Exception as error:
        if refused := refusals.line(error):
            raise ValueError(refused.partition(": ")[2]) from error
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"--config={path}, line {lines[-1]}" if lines else f"--config={path}"
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    if get_config is None:
        raise ValueError(
            f"--config={path} has no function get_config(): begin with a copy of a file of configs/"
        )
    if not isinstance(found, ConfigDict):
        raise ValueError(
            f"--config={path}: get_config() returned {type(found).__name__}; return a ConfigDict"
        )
    return found


def parts_in(*values: object) -> set[str]:
    """The names of parts of other packages in ``values``, nested containers of texts. An image set
    such as ``tfds:cifar10`` is none."""
    names = registry.OUTSIDE.findall(repr(values))
    return {name for name in names if name.partition(":")[0] not in data.SOURCES}


def paths_in(fields: Mapping[str, object]) -> set[str]:
    """The absolute paths that ``fields`` have, values by the names of fields ("data.path")."""
    names = [*map(Data.name_of, PATHS), "eval.quality.inception_weights"]
    return {registry.absolute(str(fields[name])) for name in names if fields.get(name)}


def of_checkpoint(
    workdir: epath.PathLike,
    overrides: Mapping[str, str] = MappingProxyType({}),
    trust: Iterable[str] = (),
) -> Config:
    """The config in the newest checkpoint of ``workdir``, with ``overrides`` as in
    :func:`with_overrides`.

    A checkpoint can name parts of other packages. Their code runs only if you name the same parts
    in ``overrides``, or them or their packages in ``trust``.
    """
    checkpoints = Training().checkpoints(Workdir(workdir))
    metadata = checkpoints.metadata()
    if metadata is None:
        raise ValueError(f"no checkpoint in {checkpoints.directory} with a config: give --config")
    stored = flatten_dict(metadata["config"], sep=".")
    with registry.only({*trust, *parts_in(overrides)}):
        try:
            kinds = (("model.name", "ncsnpp"), ("dequantizer.name", "variational"))
            config = default(*(stored.get(name, usual) for name, usual in kinds)).to_dict()
            for name, value in stored.items():
                with errors_of(f"{notation(name)}={brief(value, notation)}"):
                    node, last = node_of(config, name)
                node[last] = as_tuples(value)
            return with_overrides(config, overrides)
        except ValueError as error:
            if any(name in str(error) for name in overrides):  # It is the user's own value.
                raise
            raise ValueError(
                f"the config of the checkpoint in {checkpoints.directory}: {error}. Restore the "
                "file, install the version of sbml that wrote it, or give --config"
            ) from error


def node_of(values: Any, name: str) -> tuple[Any, str]:
    """The section in ``values``, nested mappings, that has the field called ``name``
    ("optim.lr"), and the name of the field in it.
    """
    *path, last = name.split(".")
    section = ""
    for part in path:
        if part not in values:
            raise ValueError(unknown(section, part, list(values)))
        values, section = values[part], f"{section}.{part}".removeprefix(".")
        if not isinstance(values, Mapping | ConfigDict):
            raise ValueError(f"config.{section} has no field {last}: it is a value, not a section")
    if last in values and isinstance(values[last], Mapping | ConfigDict):
        first = next(iter(values[last]))
        raise ValueError(
            f"config.{name} is a section: set its fields, as in --config.{name}.{first}=VALUE"
        )
    return values, last


def with_overrides(config: ConfigDict | Json, overrides: Mapping[str, str]) -> Config:
    """The config with further values, given as text by the names of the fields ("optim.lr").

    With another ``model.name``, the fields of the model are the defaults of that network. With
    another sampler or corrector, the fields that it does not have are left out. A line says which
    fields of the config are left out.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    for kind in (Network, SamplerChoice, CorrectorChoice):
        node, _ = node_of(values, f"{kind.section}.name")
        before, name = {**node}, str(overrides.get(f"{kind.section}.name", node["name"]))
        if name == before["name"]:
            continue
        fields, usual = dict(kind(name=name)), {}
        if kind is Network:
            usual = dict(kind(name=before["name"]))
        else:
            fields |= {field: value for field, value in before.items() if field in fields}
        lost = {k: v for k, v in before.items() if v not in (usual.get(k), fields.get(k))}
        node.clear()
        node.update(fields)
        if lost:
            each = ", ".join(f"{field}={notation(value)}" for field, value in lost.items())
            print(f"config.{kind.section}.name={name} leaves out {each} of {before['name']}")
    fields = flatten_dict(values, sep=".")
    token = Section.known.set({*fields, *(name.rpartition(".")[0] for name in fields)})
    try:
        for name, text in overrides.items():
            node, last = node_of(values, name)
            node[last] = Override(text)
        return Config(**values)
    finally:
        Section.known.reset(token)


def small_dequantizer(config: ConfigDict, *, num_steps: int) -> None:
    """Set a Flow++ dequantizer in ``config`` that a CPU trains in minutes."""
    config.dequantizer.model.update(filters=32, components=8, blocks=1)
    config.dequantizer.training.update(
        batch_size=64, num_steps=num_steps, log_every=20, checkpoint_every=num_steps // 2
    )
    # The unit of grad_clip is nats, so this clips the gradient of the loss in nats/dim at 1.
    grad_clip = float(math.prod(config.data.shape))
    config.dequantizer.optim.update(lr=2e-3, warmup=50, grad_clip=grad_clip)
