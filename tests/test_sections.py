"""Every field of a config is checked when the config is read, and an error names it."""

import dataclasses
import importlib
import json
import math
import typing
from typing import Annotated, Any

import numpy as np
import pytest
import runs
import tiny
from ml_collections import ConfigDict

from sbml import dequantizers, networks, samplers, sdes
from sbml.core.scalars import notation
from sbml.program.config import build, compatibility, reference
from sbml.program.config.config import Config, default, with_overrides
from sbml.program.config.dequantizer import Dequantizer
from sbml.program.config.fields import Override, Section
from sbml.program.config.optim import DequantizerOptim
from sbml.program.config.score import Network, Process
from sbml.program.config.training import DequantizerTraining, Training

OWNED_ELSEWHERE = ("model", "dequantizer.model")  # Their fields are a network's or a dequantizer's.


def parts_of(kind: Any) -> set[Any]:
    """The types that an annotation such as ``tuple[int, ...] | None`` is made of."""
    return set().union(*map(parts_of, typing.get_args(kind))) or {kind}


# The types of every field, from the annotations of its class. So a new field is tested too.
FIELDS: dict[str, set[Any]] = {
    section.name_of(name): parts_of(typing.get_type_hints(type(section))[name])
    for _, section in reference.sections()
    for name in type(section).model_fields
    if not isinstance(getattr(section, name), Section) and section.section not in OWNED_ELSEWHERE
}
NUMBERS = [name for name, kinds in FIELDS.items() if kinds & {int, float}]
SEVERAL = {
    "data.shape": (8, 8, 1),
    "eval.num_importance": (1,),
    "score.log_snr_range": (-5.0, 13.3),
}


def node_of(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The innermost mapping of ``values`` that field ``name`` is in, and its own name."""
    *path, field = name.split(".")
    for part in path:
        values = values[part]
    assert field in values
    return values, field


def changed(name: str, value: Any) -> dict[str, Any]:
    """The values of a config with field ``name`` set to ``value``, whatever its type."""
    values = tiny.get_config().to_dict()
    node, field = node_of(values, name)
    node[field] = value
    return values


def refused(name: str, value: Any) -> str:
    """The error of a config with field ``name`` set to ``value``."""
    with pytest.raises(ValueError) as caught:
        Config(**changed(name, value))
    return str(caught.value)


@dataclasses.dataclass(frozen=True)
class Needing(sdes.VP):
    a: float = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Arrays(sdes.VP):
    a: np.ndarray = None


@dataclasses.dataclass(frozen=True)
class Odd(sdes.VP):
    a: dict = None


OF_EITHER_SIGN = ("sde.gamma_0", "sde.gamma_1", "score.log_snr_range")  # log-SNRs


def test_the_page_of_all_fields_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """``python docs/_extensions/fields.py > docs/fields.md`` writes it."""
    monkeypatch.syspath_prepend(runs.ROOT / "docs" / "_extensions")
    page = importlib.import_module("fields").markdown()
    assert (runs.ROOT / "docs" / "fields.md").read_text() == page
    assert all(
        row.meaning for _, section in reference.sections() for row in reference.rows(section)
    )


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (1e-05, "", "1e-5"),
        (1e16, "", "1e16"),
        (2.5e-10, "", "2.5e-10"),
        (np.float64(0.0002), "", "0.0002"),
        (0.00012345, ".2g", "0.00012"),
        (1.2345e-05, ".2g", "1.2e-5"),
        (-1e-05, ".4f", "0.0000"),
        (-1e-05, "+.4f", "+0.0000"),
        (-1e-05, ".2g", "-1e-5"),
        (-0.0, ".2g", "0"),
        ((8, 8, 1), "", "8,8,1"),
        (["ode", "bound"], "", "ode,bound"),
        ((1e-05, 2.0), "", "1e-5,2.0"),
        (True, "", "True"),
        (None, "", "None"),
    ],
)
def test_values_are_shown_as_on_the_command_line(value: Any, form: str, text: str) -> None:
    assert notation(value, form) == text


def test_no_limit_of_a_field_is_replaced_by_that_of_its_type() -> None:
    for _, section in reference.sections():
        for name, field in type(section).model_fields.items():
            limits = [type(limit) for limit in field.metadata]
            assert len(limits) == len(set(limits)), name


def test_the_table_has_all_numbers() -> None:
    assert len(NUMBERS) > 60
    for name in ("seed", "optim.lr", "dequantizer.optim.ema", "eval.ode.rtol", "latents.snr"):
        assert name in NUMBERS
    assert {name for name in NUMBERS if tuple in FIELDS[name]} <= set(SEVERAL) | {Ellipsis}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1, 10**30, True, "1"], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_finite_and_within_its_range(name: str, bad: Any) -> None:
    if bad == -1 and name in OF_EITHER_SIGN:
        bad = -1e3
    value = (*SEVERAL[name][:-1], bad) if name in SEVERAL else bad
    assert refused(name, value).startswith(f"{name}={notation(value)}: give ")


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_a_value_of_another_type(name: str) -> None:
    for bad in (object(), (object(),), {"a": 1}):
        assert refused(name, bad).startswith(f"{name}={notation(bad)}: give ")


@pytest.mark.parametrize("name", [name for name, kinds in FIELDS.items() if type(None) in kinds])
def test_fields_whose_default_is_none_also_take_values(name: str) -> None:
    config = default("mlp")
    node, field = node_of(config, name)
    assert node[field] is None
    assert refused(name, (1, "2")).startswith(f"{name}=1,2: give ")
    if float in FIELDS[name]:
        node[field] = 0.5
        assert Config(**config.to_dict()).plain() != Config(**default("mlp").to_dict()).plain()


def test_an_empty_choice_is_refused() -> None:
    for name in (
        "sde.name",
        "data.crop",
        "training.noises",
        "eval.ode.trace",
        "sampling.corrector.name",
        "dequantizer.name",
    ):
        said = refused(name, "")
        assert said.startswith(f"{name}=: give one of ") and ";" not in said  # of this field alone


@pytest.mark.parametrize(
    ("name", "fits", "too_much"),
    [
        ("seed", 2**32 - 1, 2**32),
        ("data.levels", 256, 257),
        ("data.levels", 2, 1),
        ("data.test_fraction", 0.99, 1.0),
        ("score.data_std", 1.0, 1.01),
        ("training.num_steps", 2**31 - 1, 2**31),
        ("training.smallest_time", 0.5, 1.0),
        ("optim.lr", 1.0, 1.01),
        ("optim.lr", 1e-12, 0.0),
        ("optim.beta1", 0.0, 1.0),
        ("optim.ema", 0.999999, 1.0),
        ("optim.grad_clip", 0.0, -0.1),
        ("optim.grad_clip", 1e-4, 9e-5),
        ("optim.lr", 1e-30, 1e-320),
        ("score.data_std", 1e-30, 1e-320),
        ("sde.beta_min", 1e-30, 1e-39),
        ("eval.ode.rtol", 0.1, 0.11),
        ("eval.ode.atol", 1e-6, 0.0),
        ("eval.ode.rtol", 1e-6, 9e-7),
        ("sampling.solver.rtol", 1e-6, 1e-30),
        ("eval.bound.sweeps", 1, 0),
        ("eval.ode.solver_budget", 0.0, 1.1),
        ("latents.snr", 1.0, 0.0),
        ("latents.count", 2, 1),
        ("latents.steps", 10_000, 2**16 - 1),
        ("codec.steps", 10_000, 2**16 - 1),
        ("latents.corrector_steps", 1_000, 2**31 - 1),
        ("eval.bound.sweeps", 10_000, 2**31 - 1),
        ("eval.bound.max_sweeps", 10_000, 10_001),
        ("eval.bound.n_times", 4_096, 2**16 - 1),
        ("eval.bound.proposal_bins", 4_096, 2**16 - 1),
        ("eval.ode.fixed_steps", 10_000, 2**16 - 1),
        ("sampling.frames", 1_000, 2**16 - 1),
        ("training.validation_images", 100_000, 2**31 - 1),
        ("codec.lanes", 1, 0),
        ("dequantizer.training.keep_last", 1, 0),
    ],
)
def test_the_ends_of_ranges(name: str, fits: float, too_much: float) -> None:
    values = Config(**changed(name, fits)).plain()
    node, field = node_of(values, name)
    assert node[field] == fits
    assert refused(name, too_much).startswith(f"{name}={notation(too_much)}: give ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "optim.grad_clip",
            1e-320,
            "optim.grad_clip=1e-320: give a number of at least 0 and at most 1e9, in float32, "
            "whose range is 1.2e-38 to 3.4e38",
        ),
        (
            "optim.grad_clip",
            Override("1e-400"),
            "grad_clip=1e-400: give a number of at least 0 and at most 1e9, in float32",
        ),
        ("optim.grad_clip", 1e-30, "give 0, which is off, or at least 1e4 * optim.eps"),
        ("score.log_snr_range", (1e-320, 1.0), "at most 60, in float32, whose range is 1.2e-38"),
        ("eval.num_importance", (), "eval.num_importance=: give one or more integers of at"),
        ("eval.num_importance", ("a",), "eval.num_importance=a: give one or more integers"),
        ("eval.estimators", (), "eval.estimators=: give one or more of bound, bound_ssm, ode"),
        ("eval.dequantizers", (" ",), "eval.dequantizers= : give one or more of categorical"),
        ("mode", (), "mode=: give one or more names"),
        ("data.shape", (8, 8), "data.shape=8,8: give 3 integers of at least 1 and below 2^16"),
        ("data.crop", "left", "data.crop=left: give one of center, random, squash"),
        ("data.crop", Override("Centre"), "crop=Centre: did you mean center? Give one of center, "),
        (
            "eval.ode.trace",
            "exakt",
            "did you mean exact? Give one of exact, gaussian, rademacher, ",
        ),
        ("data.flip", 1, "data.flip=1: give True or False"),
        ("eval.ode.trace", "none", "give one of exact, gaussian, rademacher, or None"),
        (
            "eval.quality.features",
            "vgg",
            "eval.quality.features=vgg: give one of digits_classifier, inception",
        ),
        ("eval.bound.importance_sampling", False, "set --config.eval.bound.proposal_bins=0"),
        ("dequantizer.name", "uniform", "dequantizer.name=uniform has no parameters to train"),
        ("sde.name", "os:system", "sde.name: SDE os:system is <built-in function system> (builtin"),
        ("sde.name", "os:Missing", "SDE os:Missing: the module os has no attribute Missing: give"),
        ("sde.name", "test_sections:Needing", "test_sections.Needing has a field a without a de"),
        ("sde.name", "test_sections:Arrays", "a field a whose type a config has no values for (<c"),
        (
            "sde.name",
            "test_sections:Odd",
            "a whose type a config has no values for (<class 'dict'>)",
        ),
        (
            "model.name",
            "math:pi",
            "model.name: network math:pi is 3.141592653589793 (float): give a class derived from f",
        ),
        (
            "dequantizer.name",
            "math:pi",
            "dequantizer.name: dequantizer math:pi is 3.14159265358979",
        ),
        ("data.source", "builtins:int", "<class 'int'> (type): give a class derived from sbml.da"),
        (
            "sampling.sampler.name",
            "math:pi",
            "sampling.sampler.name: sampler math:pi is 3.141592653589793 (float): give a class der",
        ),
        ("eval.estimators", ("ode", "math:pi"), "eval.estimators: estimator math:pi is 3.1415"),
        ("eval.estimators", ("os:Missing",), "the module os has no attribute Missing"),
        ("eval.dequantizers", ("builtins:object",), "that is a dataclass and defines all abstra"),
        (
            "eval.quality.features",
            "os:system",
            "give a function of weights, sha256, levels and cache",
        ),
        (
            "score.parameterization",
            "math:pi",
            "(float): give an object of the class sbml.score.prediction",
        ),
    ],
)
def test_what_a_message_says(name: str, value: Any, message: str) -> None:
    assert message in refused(name, value)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=repr)
@pytest.mark.parametrize("section", OWNED_ELSEWHERE)
def test_numbers_of_networks_and_dequantizers_are_finite(section: str, bad: float) -> None:
    node, name = node_of(tiny.get_config().to_dict(), section)
    fields = [field for field, value in node[name].items() if type(value) in (int, float)]
    assert len(fields) > 3
    for field in fields:
        message = refused(f"{section}.{field}", bad)
        assert message.startswith(f"{section}.{field}={notation(bad)}: give ")


OWNERS = {f"model {name}": networks.NETWORKS[name] for name in networks.NETWORKS}
OWNERS |= {"dequantizer.model variational": dequantizers.DEQUANTIZERS["variational"]}
NO_INTEGER = (math.nan, math.inf, -math.inf, -1, 10**30, True, "1", 2.5, None, object())
NO_VALUES = {
    int: NO_INTEGER,
    float: (math.nan, math.inf, -math.inf, -1, -1e-9, 1e30, True, "1", None, object()),
    bool: (math.nan, 0, 1, "True", None, object()),
    str: (math.nan, 1, True, "", "nothing", None, object()),
    tuple: (math.nan, 1, True, "1", None, object(), *((bad,) for bad in NO_INTEGER)),
}


def owned_fields() -> list[tuple[str, str, Any]]:
    """Section, its owner's name, and the field, of all networks and of the dequantizer."""
    found = []
    for owner, kind in OWNERS.items():
        section, name = owner.split()
        known = Network(name=name).own if section == "model" else dict(Dequantizer(name=name).model)
        found += [(section, name, f) for f in dataclasses.fields(kind) if f.name in known]
    return found


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("section", "name", "field"), owned_fields(), ids=lambda a: getattr(a, "name", a)
)
def test_fields_of_networks_and_dequantizers_refuse_unsuitable_values(
    section: str, name: str, field: Any
) -> None:
    """The error names the field, and comes before any parameter is made."""
    kind = field.type
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    for bad in NO_VALUES[typing.get_origin(kind) or kind]:
        if typing.get_args(kind)[:1] == (float,) and bad == (2.5,):
            continue
        values = tiny.get_config().to_dict()
        if section == "model":
            values["model"] = dict(Network(name=name))
        node, last = node_of(values, f"{section}.{field.name}")
        node[last] = bad
        with pytest.raises(ValueError) as caught:
            read = Config(**values)
            read.model.build()
            read.dequantizer.build("variational", levels=17, tau=3.0)
        message = str(caught.value)
        wrong = f"config.{section}: {field.name}"
        named = (f"{section}.{field.name}=", f"{wrong}=", f"{wrong} is ")
        assert message.startswith(named), message


def test_unknown_fields_are_named_and_missing_ones_have_their_defaults() -> None:
    for section in ("", "optim", "dequantizer.training", "dequantizer.model", "model", "sde"):
        values = tiny.get_config().to_dict()
        node, field = node_of(values, section) if section else ({"": values}, "")
        node[field]["nothing"] = 1
        where = f"config.{section}".rstrip(".")
        with pytest.raises(ValueError, match=f"^{where} has no field nothing: it has [a-z]"):
            Config(**values)
    values = tiny.get_config().to_dict()
    del values["latents"], values["optim"]["lr"]
    assert Config(**values).latents == Config().latents and Config(**values).optim.lr == 2e-4


def test_a_config_that_was_written_to_json_is_read_unchanged() -> None:
    """A checkpoint's metadata has the config as JSON, with the fields in the same order."""
    config = tiny.get_config()
    config.training.smallest_time = 1e-3
    expected = json.dumps(config.to_dict())
    assert json.dumps(Config(**config.to_dict()).plain()) == expected
    assert Config(**json.loads(expected)) == Config(**config.to_dict())
    with pytest.raises(ValueError, match="frozen"):
        Config(**config.to_dict()).seed = 1


def test_numbers_of_numpy_in_tuples_become_pythons() -> None:
    """Checkpoints store the config as JSON, which cannot hold NumPy's numbers."""
    config = tiny.get_config()
    config.data.shape = tuple(np.array([8, 8, 1]))
    config.eval.num_importance = (np.int64(1), np.int32(2))
    plain = json.dumps(Config(**config.to_dict()).plain())
    assert '"shape": [8, 8, 1]' in plain and '"num_importance": [1, 2]' in plain


def test_the_defaults_of_a_config_are_those_of_its_sections() -> None:
    assert Config(**default().to_dict()) == Config()
    assert default().is_locked
    assert DequantizerTraining().num_steps == 300_000 and DequantizerOptim().ema == 0.99
    assert default().dequantizer.training.num_steps == 300_000


def test_an_sde_has_the_numbers_of_its_class() -> None:
    """Their defaults are those of the class."""
    for name, kind in sdes.SDES.items():
        assert Process(name=name).own == {f.name: f.default for f in dataclasses.fields(kind)}
    process = Process(name="ve", sigma_min=0.02, sigma_max=np.float32(30)).build()
    assert process == sdes.SDES["ve"](sigma_min=0.02, sigma_max=30.0)
    # A number of another SDE that has its default is left out.
    everything = {"beta_min": 0.1, "beta_max": 20.0, "sigma_min": 0.01, "sigma_max": 50.0}
    assert Process(name="ve", **everything).own == {"sigma_min": 0.01, "sigma_max": 50.0}
    with pytest.raises(ValueError, match="config.sde has no field beta_max: it has .*sigma_max"):
        Process(name="ve", beta_max=10.0)
    with pytest.raises(ValueError, match=r"config.sde: beta_min=0.1, beta_max=1001.0: give"):
        Process(beta_max=1001.0)


@pytest.mark.parametrize("name", ["learned", "name", "replace", "section"])
def test_a_field_that_a_section_would_hide_is_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = dataclasses.make_dataclass("Odd", [(name, float, 1.0)])
    monkeypatch.setitem(sdes.SDES.places, "odd", odd)
    with pytest.raises(ValueError, match=rf"config.sde: .*Odd has a field {name}, .*: rename"):
        Process(name="odd")


def test_checkpoints_of_other_versions_are_read_with_the_fields_they_have() -> None:
    stored = Config().plain()
    stored["sde"] = {"name": "vp", "beta_max": 20.0, "forgotten": 3}
    stored["training"] |= {"forgotten": [1]}
    metadata = {"config": stored, "smallest_time": 1e-5}
    compatibility.check_training(Config(), metadata)
    (warning,) = compatibility.unseen_times(metadata, sdes.VP(), 1e-6)
    assert "trained only from t=1e-5 on" in warning
    stored["sde"]["beta_max"] = 10.0
    with pytest.raises(ValueError, match="config.sde.beta_max is 20.0, the checkpoint's is 10.0"):
        compatibility.check_training(Config(), metadata)
    with pytest.raises(ValueError, match="config.training has no field forgotten: it has .* more"):
        Training(**stored["training"])


def test_an_experiment_ignores_later_changes_of_its_config() -> None:
    config: ConfigDict = tiny.get_config()
    experiment = build.Experiment(config)
    config.eval.seed = 7
    assert experiment.config.eval.seed == 0


def test_another_network_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    config, expected = default("mlp"), default("ncsnpp")
    config.model.depth, expected.model.nf = 7, 16
    given = with_overrides(config, {"model.nf": "16", "model.name": "ncsnpp"})
    assert given.model == Config(**expected.to_dict()).model
    assert "name=ncsnpp leaves out depth=7 of mlp" in capsys.readouterr().out


def test_the_fields_of_another_sampler_are_left_out_with_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny.get_config()
    config.sampling.sampler.update(name="ddim", steps=5, eta=0.5)
    changed = with_overrides(config, {"sampling.sampler.name": "ancestral"})
    assert changed.sampling.build() == samplers.Ancestral(steps=5)
    said = "config.sampling.sampler.name=ancestral leaves out eta=0.5 of ddim\n"
    assert capsys.readouterr().out == said
    config.sampling.corrector.update(name="langevin", snr=0.2)
    changed = with_overrides(config, {"sampling.corrector.name": "none"})
    assert changed.sampling.build() == samplers.DDIM(steps=5, eta=0.5)
