"""The command line: flags, the config of a work directory, and messages of refusals."""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from absl import flags

from sbml import bits, divergence, main, report
from sbml.experiment import stored
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.modes import train
from sbml.ode import Solver
from sbml.runtime import refusals
from sbml.runtime.checkpoint import Checkpoints
from sbml.runtime.preemption import Preemption

CONFIG = "--config=tests/tiny.py"
CHATTER = "Matplotlib is building the font cache; this may take a moment."


def test_the_last_value_of_a_repeated_field_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """absl would join the values of a tuple, such as two shapes to one shape of six numbers."""
    monkeypatch.setattr(main.app, "parse_flags_with_usage", lambda arguments: arguments)
    once = [
        "main",
        f"--config={runs.ROOT / CONFIG.partition('=')[2]}",
        "--config.data.shape=8,8,1",
        "--mode=eval",
    ]
    twice = [*once, "--config.eval.seed=3", "--config.data.shape=32,32,3", "--noconfig.data.flip"]
    assert main.parse(twice) == [a for a in twice if a != "--config.data.shape=8,8,1"]
    assert main.parse(once) == once
    # A name and its value in two arguments stay: without the name, its value would be left over.
    apart = ["main", "--config.data.source", "digits", "--config.data.source", "photos"]
    assert main.parse(apart) == apart


def test_the_config_of_a_trained_run_is_read_from_its_work_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(main.app, "parse_flags_with_usage", lambda arguments: arguments)
    assert main.parse(["main", f"--workdir={tmp_path}"]) == ["main", f"--workdir={tmp_path}"]
    config = tiny.get_config()
    config.training.update(num_steps=2)
    train.run(config, tmp_path)
    for workdir in (["--workdir", str(tmp_path)], [f"--workdir={tmp_path}"]):
        arguments = main.parse(["main", *workdir, "--config.eval.seed=3"])
        config_flag = f"--config={stored.__file__}:{tmp_path}"
        assert arguments == ["main", config_flag, *workdir, "--config.eval.seed=3"]
    _, twice, *_ = main.parse(["main", f"--workdir={tmp_path}", f"--workdir={tmp_path / 'new'}"])
    assert twice == f"--workdir={tmp_path}"  # The last counts, which has no checkpoint.
    assert Config.read(stored.get_config(str(tmp_path))) == Config.read(config)
    with_config = ["main", CONFIG, f"--workdir={tmp_path}"]
    assert main.parse(with_config) == with_config


def test_fields_that_a_checkpoint_lacks_have_their_defaults_and_unknown_ones_are_named(monkeypatch):
    trained = Config.read(tiny.get_config()).plain()
    del trained["eval"]["n_times"]
    monkeypatch.setattr(Checkpoints, "metadata", lambda self: {"config": trained})
    expected = Config.read(tiny.get_config())
    default = dataclasses.replace(expected.eval, n_times=type(expected.eval)().n_times)
    config = Config.read(stored.get_config("run"))
    assert config == dataclasses.replace(expected, eval=default)
    trained["eval"]["later"] = 1
    with pytest.raises(ValueError, match=r"has a field config\.eval\.later.*install the version"):
        stored.get_config("run")
    monkeypatch.setattr(Checkpoints, "metadata", lambda self: None)
    with pytest.raises(ValueError, match=r"no checkpoint in .*: give --config"):
        stored.get_config("run")


def test_a_field_is_unset_by_none(refusal, tmp_path, monkeypatch):
    text = Path(tiny.__file__).read_text()
    line = '    config.sampling.update(sampler="ddim", steps=5)\n'
    (tmp_path / "mine.py").write_text(text.replace("    return", f"{line}    return"))
    none = [f"--config.{f}=None" for f in ("sampling.steps", "eval.trace", "eval.smallest_time")]
    arguments = ["main", f"--config={tmp_path / 'mine.py'}", "--config.sampling.sampler=ode", *none]
    monkeypatch.setattr(sys, "argv", arguments)
    flags.FLAGS.unparse_flags()
    assert main.parse(arguments) == ["main"]
    config = Config.read(main.CONFIG.value)
    assert config.sampling.steps is config.eval.trace is config.eval.smallest_time is None
    assert config.sampling.sampler == "ode"
    (tmp_path / "own.py").write_text("from ml_collections import ConfigDict as get_config\n")
    said = refusal(f"--config={tmp_path / 'own.py'}", "--config.sampling.steps=None")
    assert "unknown field config.sampling.steps" in said


def run_program(
    workdir: Path, *arguments: str, config: str = "tests/tiny.py"
) -> tuple[int, list[str]]:
    """Run the program in a new process: its exit status and the lines of its standard error."""
    process = runs.start(workdir, *arguments, config=config)
    _, err = process.communicate(timeout=300)
    return process.returncode, err.strip().splitlines()


def test_a_refusal_is_one_line_and_the_flag_traceback_shows_more(tmp_path: Path) -> None:
    wrong = (tmp_path, "--mode=train", "--config.optim.lr=0")
    line = "ValueError: optim.lr=0.0: need a number above 0 and at most 1"
    assert run_program(*wrong) == (1, [line])
    status, lines = run_program(*wrong, "--traceback")
    assert status == 1 and lines[-1] == line
    assert any(text.startswith("Traceback") for text in lines)


def test_the_start_shows_warnings_and_no_chatter_of_other_packages(tmp_path: Path) -> None:
    """JAX tells which backends it lacks, and matplotlib that it lists the fonts."""
    text = Path(tiny.__file__).read_text()
    lines = f"""
import logging
logging.getLogger("matplotlib.font_manager").warning("{CHATTER}")
logging.getLogger("matplotlib.font_manager").warning("findfont: no such font")
logging.getLogger("jax").warning("a real warning")
"""
    (tmp_path / "mine.py").write_text(text + lines)
    environment = {"JAX_PLATFORMS": "", "MPLCONFIGDIR": str(tmp_path / "no fonts listed yet")}
    process = runs.start(
        *(tmp_path, "--mode=train", "--config.optim.lr=0"),
        config=tmp_path / "mine.py",
        env=environment,
    )
    shown = runs.finish(process, expect=1).strip().splitlines()
    assert shown[-1].startswith("ValueError: optim.lr=0.0: need")
    # absl's first line says that the config, which logs here, is read before the flags are parsed.
    texts = {line.partition("] ")[2] for line in shown[1:-1]}
    assert texts == {"findfont: no such font", "a real warning"}, shown


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The message with which the program refuses a command line, without starting a process.

    If it does not refuse the command line, the test fails before any mode runs.
    """
    monkeypatch.setattr(main.cpu, "settle", lambda: pytest.fail("nothing was refused"))

    def run(*arguments: str) -> str:
        flags.FLAGS.unparse_flags()
        monkeypatch.setattr(sys, "argv", ["main", *arguments])  # absl looks for overrides there.
        with pytest.raises(SystemExit) as caught:
            main.main(main.parse(["main", *arguments]))
        return str(caught.value.code)

    yield run
    flags.FLAGS.unparse_flags()
    processes = ("coordinator", "num_processes", "process_id")
    for name in ("config", "mode", "workdir", "source", "runs", *processes):
        flags.FLAGS[name].unparse()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=configs",), "--config=configs: configs is a folder; give a file such as"),
        (("--config=", "--mode=train"), "--config= names no config: give one"),
        (("--config=nowhere.py",), "--config=nowhere.py: nowhere.py is not there; give a file"),
        (
            (CONFIG, "--mode="),
            "UsageError: --mode= names no mode: choose from compare, convert, eval",
        ),
        (
            (CONFIG, "--mode=trian"),
            "UsageError: unknown mode ['trian']; choose from compare, convert",
        ),
        ((CONFIG, "--config.mode=5"), "UsageError: unknown mode ['5']; choose from compare"),
        (("--config=paper:",), "ValueError: paper:: no such model; give cifar10"),
        ((CONFIG, "--workdir="), "UsageError: --workdir= names no folder: give one, or leave"),
        (
            ("--workdir=foo://a/b", "--mode=eval"),
            "foo://a/b is no folder of a known kind: set --workdir to a local path, or to gs://",
        ),
        (
            (CONFIG, "--mode=train,eval", "--source=there"),
            "UsageError: --source is for --mode=convert, not for train, eval",
        ),
        # These modes need no config.
        (
            ("--mode=verify", "--runs=a"),
            "UsageError: --runs is for --mode=compare, not for verify",
        ),
        (
            ("--mode=compare", "--runs=a,b", "--source=c"),
            "UsageError: --source is for --mode=convert, not for compare",
        ),
        (
            (CONFIG, "--mode=verify"),
            "UsageError: --mode=verify does not use --config: leave it out",
        ),
        (
            ("--mode=verify", "--workdir=runs/a"),
            "UsageError: --mode=verify does not use --workdir: leave it out",
        ),
        (
            ("--mode=compare", "--runs=a,b", "--coordinator=auto"),
            "UsageError: --mode=compare does not use --coordinator: leave it out",
        ),
        ((CONFIG, "--coordinator=foo"), "several processes need all three flags, and process_id"),
        (
            (CONFIG, "--coordinator=foo", "--num_processes=2", "--process_id=1"),
            "UsageError: --coordinator=foo: give HOST:PORT of process 0, or auto",
        ),
        (
            (CONFIG, "--coordinator=a:1", "--num_processes=2", "--process_id=2"),
            "--process_id=2: several processes need all three",
        ),
        ((CONFIG, "--num_processes=2", "--process_id=1"), "UsageError: --coordinator=: give HOST"),
    ],
)
def test_flags_that_name_nothing_or_would_be_ignored_are_refused(
    refusal: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refusal(*arguments)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "c = default('mlp')\n    c.training.stepz = 3\n    return c",
            ", line 4: AttributeError: ",
        ),
        ("return {'mode': 'train'}", "get_config() returned dict; return a ConfigDict"),
        ("return default('foo')", "ValueError: Unknown network 'foo'"),
    ],
)
def test_a_wrong_config_file_is_named_with_its_line(
    refusal: Callable[..., str], tmp_path: Path, code: str, message: str
) -> None:
    text = f"from sbml.experiment.config import default\ndef get_config():\n    {code}\n"
    (tmp_path / "wrong.py").write_text(text)
    said = refusal(f"--config={tmp_path / 'wrong.py'}")
    assert message in said and "\n" not in said


def test_a_work_directory_that_lost_its_checkpoints_is_refused_in_one_line(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    said = refusal(f"--workdir={tmp_path}", "--mode=eval")
    assert said.startswith("ValueError: no checkpoint in ") and said.endswith("give --config")
    assert "\n" not in said


@pytest.mark.parametrize(
    "field",
    ["data.shape.x", "eval.estimators.0", "data.shape[0]", "data.source.x", "sampling.steps.a"]
    + ["data.", ".seed", ""],
)
def test_a_field_that_does_not_exist_is_named_in_one_line(
    refusal: Callable[..., str], field: str
) -> None:
    said = refusal(CONFIG, f"--config.{field}=1")
    assert said.startswith(f"unknown field config.{field}: config") and "\n" not in said


def test_a_work_directory_that_is_too_deep_is_refused_in_one_line(tmp_path: Path) -> None:
    """Python's own errors would be a RecursionError, or one with all of the path in it."""
    for depth in (600, 3000):
        deep = tmp_path / "/".join(["d"] * depth)
        status, (line,) = run_program(deep, "--mode=train")
        assert status == 1 and re.match(
            r"ValueError: the path of the work directory, /.* bytes: give", line
        )
        assert len(line) < 300


def test_a_store_that_cannot_be_reached_is_refused_in_one_line(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for arguments in (
        ("--workdir=gs://bucket/run", "--mode=eval"),
        ("--mode=compare", "--runs=gs://bucket/a,gs://bucket/b"),
    ):
        said = refusal(*arguments)
        assert re.search(r"gs://bucket/\w+ cannot be reached: .*gcsfs.*pip install gcsfs", said)
        assert "\n" not in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"sampling.method": "euler"},
            r"config\.sampling: euler has no error estimate: set fixed_steps",
        ),
        (
            {"sde.name": "linear_ve", "eval.tau": 1e-6},
            r"eval\.tau=1e-06 gives smallest time eps=1176\.\d+: must lie in \(0, 1\.0\)",
        ),
        (
            {"sde.name": "linear_ve", "eval.tau": 1e-6, "data.dequantization": "centre"},
            r"eval\.tau=1e-06 gives smallest time eps=1176\.\d+: must lie in \(0, 1\.0\)",
        ),
    ],
)
def test_a_message_names_the_field_once(overrides: dict[str, object], message: str) -> None:
    config = tiny.get_config()
    config.update_from_flattened_dict(overrides)
    with pytest.raises(ValueError, match=f"^{message}"):
        Experiment(config)


def test_a_config_without_the_function_get_config_is_refused(tmp_path: Path) -> None:
    """This needs a new process: in this one, absl's loader would find the function of the config
    that it loaded before."""
    (tmp_path / "empty.py").write_text("x = 1\n")
    status, (line,) = run_program(tmp_path, config=str(tmp_path / "empty.py"))
    assert status == 1
    assert line.startswith(f"--config={tmp_path / 'empty.py'} has no function get_config(): begin")


def test_a_config_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["--config=~/a.py:b"], ["--config", "~/a.py:b"]):
        main._locate_configs(arguments)
        assert arguments[-1].removeprefix("--config=") == f"{tmp_path}/a.py:b"


def test_ctrl_c_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_main", interrupted)
    monkeypatch.setattr(main, "TRACEBACK", SimpleNamespace(value=False))
    with pytest.raises(SystemExit) as ended:
        main.main([])
    assert ended.value.code == 130 and "interrupted" in caplog.text
    monkeypatch.setattr(main, "TRACEBACK", SimpleNamespace(value=True))
    with pytest.raises(KeyboardInterrupt):
        main.main([])


def test_requests_to_stop_are_left_alone_in_another_thread() -> None:
    """Python handles signals in its main thread only."""

    def asked() -> bool:
        with Preemption() as preemption:
            return preemption.requested()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asked).result() is False


def error_of(function: Callable[[], object]) -> BaseException:
    """The error that ``function()`` raises."""
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def test_errors_of_this_package_and_missing_files_are_refusals(tmp_path: Path) -> None:
    """Refusals are shown in one line. Errors that a library raises are defects, and keep their
    traceback."""
    ours = error_of(lambda: Solver(rtol=-1.0))
    assert refusals.line(ours) == "ValueError: rtol=-1.0: must be positive and finite"
    traced = error_of(lambda: jax.jit(lambda x: divergence.exact(lambda x: x[:1], x))(jnp.ones(2)))
    assert str(refusals.line(traced)).startswith("ValueError: f(x) has shape (1,)")
    missing = error_of((tmp_path / "a\x1b[2Jb").read_text)
    assert "a\\x1b[2Jb" in str(refusals.line(missing))
    images = np.zeros((1, 2, 2, 3), np.uint8)
    for defect in (
        lambda: np.concatenate([np.zeros(2), np.zeros((2, 2))]),
        lambda: 1 / 0,
        lambda: bits.to_model(jnp.ones(3), jnp.ones(2), 4),  # jax refuses the shapes
        lambda: report.image_grid(images, 4, columns="a"),  # type: ignore[arg-type]
    ):
        assert refusals.line(error_of(defect)) is None
