"""The command line: its flags, the config of a work directory, and the messages of refusals."""

import io
import os
import re
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from sbml import main
from sbml.core import bits
from sbml.likelihood.ode import Solver
from sbml.program.config import reference
from sbml.program.config.config import Config, load, of_checkpoint, path_of, with_overrides
from sbml.program.modes import MODES, train
from sbml.program.report import plots
from sbml.program.runtime import refusals, workdir
from sbml.program.runtime.checkpoint import Checkpoints
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import Workdir
from sbml.score import divergence
from sbml.sdes import SDES

CONFIG = "--config=tests/tiny.py"
CHATTER = "Matplotlib is building the font cache; this may take a moment."


def test_values_of_fields_and_flags() -> None:
    """The last value of a repeated name counts. A name and its value may be two arguments."""
    given = ["--config.data.shape=8,8,1", "--config.eval.seed", "3", "--config.data.shape=32,32,3"]
    options = main.parse(["main", *given, "--source=a=b", "--mode=train, eval", "--process_id=2"])
    assert options.fields == {"data.shape": "32,32,3", "eval.seed": "3"}
    assert options.own == {"source": "a=b"} and options.mode == ["train", "eval"]
    assert options.process_id == 2 and options.trust == [] and options.workdir is None
    for wrong, message in (
        (["lr=1"], "UsageError: unknown: lr=1; set fields as"),
        (["--runs"], "UsageError: --runs: expected one argument: give --runs=VALUE"),
    ):
        with pytest.raises(SystemExit, match=message):
            main.parse(["main", *wrong])


def test_text_of_the_command_line_is_read_by_the_type_of_the_field() -> None:
    fields = {
        "optim.lr": "1e-3",
        "optim.warmup": "7",
        "data.shape": "(8, 8,1)",
        "data.flip": "true",
        "eval.estimators": "ode, bound_ssm",
        "eval.num_importance": "1,20",
        "eval.ode.trace": "None",
        "eval.smallest_time": "1e-4",
        "data.path": "12",
        "sde.beta_max": "30",
        "model.width": "48",
        "dequantizer.model.clipped": "True",
    }
    config = with_overrides(tiny.get_config(), fields)
    assert (config.optim.lr, config.optim.warmup, config.data.shape) == (1e-3, 7, (8, 8, 1))
    assert (
        config.data.flip is True and config.data.path == "12" and config.sde.build().beta_max == 30
    )
    assert config.eval.estimators == ("ode", "bound_ssm") and config.eval.num_importance == (1, 20)
    assert config.eval.ode.trace is None and config.eval.smallest_time == 1e-4
    assert config.model.own["width"] == 48 and dict(config.dequantizer.model)["clipped"] is True
    for name, message in (
        (
            "optim.learning_rate",
            r"config.optim has no field learning_rate: did you mean optim.lr\? It has beta1, beta2",
        ),
        (
            "optimizer.lr",
            r"no field optimizer: did you mean optim\? It has codec, data",
        ),
        ("training.lr", r"no field lr: did you mean optim.lr or dequantizer.optim.lr\? It has ac"),
        ("dequantizer.training.lr", "did you mean dequantizer.optim.lr or optim.lr"),
        ("data.batch_size", r"did you mean eval.\S+ or training.batch_size or sampling.\S+\? It"),
        ("sampling.n", r"did you mean sampling.num_images\? It has"),
        ("ode.rtol", r"config has no field ode: did you mean eval.ode\? It has"),
        ("optim.lr.x", "config.optim.lr has no field x: it is a value"),
        ("optim", "config.optim is a section: set its fields, as in --config.optim."),
    ):
        with pytest.raises(ValueError, match=message):
            with_overrides(tiny.get_config(), {name: "1"})


def test_the_name_of_an_sde_can_be_changed_alone() -> None:
    """The fields of the earlier SDE need not be removed if they have their default values."""
    changed = with_overrides(tiny.get_config(), {"sde.name": "ve", "sde.sigma_max": "30"})
    assert changed.sde.build() == SDES["ve"](sigma_max=30.0)
    with pytest.raises(ValueError, match="config.sde has no field sigma_max: it has beta_max"):
        with_overrides(tiny.get_config(), {"sde.sigma_max": "30"})


def test_the_config_of_a_trained_run_is_read_from_its_work_directory(tmp_path: Path) -> None:
    config = tiny.get_config()
    config.training.update(num_steps=2)
    runs.mode(train.run, config, tmp_path)
    assert of_checkpoint(tmp_path) == Config(**config.to_dict())
    options = main.parse(["main", f"--workdir={tmp_path}", "--config.eval.seed=3"])
    read, workdir = main.read_config(options, None)
    expected = Config(**config.to_dict())
    assert read == expected.replace(eval=expected.eval.replace(seed=3))
    assert str(workdir) == str(tmp_path)
    options = main.parse(["main", f"--workdir={tmp_path / 'new'}"])
    assert main.read_config(options, None)[0] is None
    own = load("configs/digits_mlp.py")
    assert main.read_config(options, own)[0] == Config(**own.to_dict())


def test_fields_that_a_checkpoint_lacks_have_their_defaults_and_unknown_ones_are_named(monkeypatch):
    trained = Config(**tiny.get_config().to_dict()).plain()
    del trained["eval"]["bound"]["n_times"]
    monkeypatch.setattr(Checkpoints, "metadata", lambda self: {"config": trained})
    expected = Config(**tiny.get_config().to_dict())
    default = expected.eval.bound.replace(n_times=type(expected.eval.bound)().n_times)
    assert of_checkpoint("run") == expected.replace(eval=expected.eval.replace(bound=default))
    # A checkpoint may contain the fields of other SDEs.
    trained["sde"] |= {"sigma_min": 0.01, "sigma_max": 50.0, "gamma_0": -13.3, "gamma_1": 5.0}
    assert of_checkpoint("run").sde == expected.sde
    trained["eval"]["later"] = 1
    with pytest.raises(ValueError, match=r"config\.eval has no field later: .*install the version"):
        of_checkpoint("run")
    monkeypatch.setattr(Checkpoints, "metadata", lambda self: None)
    with pytest.raises(ValueError, match=r"no checkpoint in .*: give --config"):
        of_checkpoint("run")


def test_a_field_is_unset_by_none() -> None:
    config = tiny.get_config()
    config.sampling.sampler.update(name="ddim", steps=5)
    fields = {"sampling.sampler.name": "ode", "sampling.sampler.steps": "None"}
    assert with_overrides(config, fields).sampling == Config(**tiny.get_config().to_dict()).sampling


def test_the_fields_of_a_section_are_listed_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.parse(["main", "--help=optim"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--config.optim.lr=0.0002\n      largest learning rate (a number above 0" in shown
    assert "(a number above 0 and at most 1)" in shown and "--config.optim.eps=1e-8\n" in shown
    with pytest.raises(SystemExit) as ended:
        main.parse(["main", "--help=optimizer"])
    said = str(ended.value.code)
    assert said.startswith("UsageError: --help=optimizer: did you mean optim? Choose from optim, ")


def test_help_has_80_columns_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("--help", "--help=config"):
        with pytest.raises(SystemExit):
            main.parse(["main", given])
        shown = capsys.readouterr().out
        assert "`" not in shown and max(map(len, shown.splitlines())) <= 80
    roles = "See :func:`sbml.load`, ``x`` and :py:class:`~sbml.sdes.VP` for `y`."
    assert reference.plain(roles) == "See sbml.load, x and sbml.sdes.VP for y."
    words = " ".join(["word"] * 30)
    item = f"Attributes:\n  x: {words}\n    more.\n  y: it.\n\n    a = b\n    c = d"
    assert reference.filled(item, 2).splitlines() == [
        "  Attributes:",
        "    x:" + " word" * 14,
        "     " + " word" * 15,
        "      word more.",
        "    y: it.",
        "",
        "      a = b",
        "      c = d",
    ]


def test_a_reader_of_the_help_may_leave_early(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:  # To close it writes what is left.
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            main.parse(["main", "--help"])
    assert ended.value.code == 0


def test_a_line_in_a_terminal_is_wrapped_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = f"ValueError: config.optim has no field learning_rate: set --config.optim.lr {'y' * 50}"
    screen = io.StringIO()
    assert refusals.fitted(line, screen) == line  # for a file
    monkeypatch.setattr(screen, "isatty", lambda: True)
    assert refusals.fitted(f"{line}\n", screen).split("\n") == [
        "ValueError: config.optim has no field",
        "  learning_rate: set --config.optim.lr",
        "  " + "y" * 50,
        "",
    ]


def test_help_shows_the_text_of_a_class_and_its_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.parse(["main", "--help=sde"])
    shown = capsys.readouterr().out
    assert "--config.sde.beta_max=20.0\n      field of vp (a number)" in shown
    assert "Variance preserving: alpha^2 + sigma^2 = 1" in shown
    with pytest.raises(SystemExit):
        main.parse(["main", "--help=model"])
    assert "field of ncsnpp (a number in [0, 1))" in capsys.readouterr().out


def test_help_has_all_modes_sections_and_configs_in_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.parse(["main", "--mode=train", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    titles = [line for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles[0] == "What one needs first:" and len(titles) == 5
    assert all(f"  --mode={mode}" in shown for mode in MODES)
    assert "  --mode=train               Trains a score.\n" in shown
    assert "  --mode=decompress [--source=FILE] [--to=FOLDER]\n" in shown
    assert "  --help=dequantizer.optim   The optimizer" in shown and "digits_vp" in shown


def run_program(
    workdir: Path, *arguments: str, config: str = "tests/tiny.py"
) -> tuple[int, list[str]]:
    """Run the program in a new process: its exit status and the lines of its standard error."""
    process = runs.start(workdir, *arguments, config=config)
    _, err = process.communicate(timeout=300)
    return process.returncode, err.strip().splitlines()


def test_a_refusal_is_one_line_and_the_flag_traceback_shows_more(tmp_path: Path) -> None:
    wrong = (tmp_path, "--mode=train", "--config.optim.lr=0")
    line = "ValueError: optim.lr=0: give a number above 0 and at most 1"
    assert run_program(*wrong) == (1, [line])
    status, lines = run_program(*wrong, "--traceback")
    assert status == 1 and lines[-1] == line
    assert any(text.startswith("Traceback") for text in lines)


def test_the_start_shows_warnings_but_no_notes_of_other_packages(tmp_path: Path) -> None:
    """JAX notes which backends are missing, and matplotlib notes that it builds its font cache."""
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
        tmp_path,
        "--mode=train",
        "--config.optim.lr=0",
        config=tmp_path / "mine.py",
        env=environment,
    )
    shown = runs.finish(process, expect=1).strip().splitlines()
    assert shown[-1].startswith("ValueError: optim.lr=0: give")
    # Some versions of JAX have their own handler, which shows its warning a second time.
    expected = "findfont: no such font", "a real warning"
    assert all(line.endswith(expected) for line in shown[:-1]), shown
    assert all(any(line.endswith(text) for line in shown) for text in expected), shown


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message with which the program refuses a command line, without starting a process.

    If it does not refuse the command line, the test fails before any mode runs.
    """
    monkeypatch.setattr(main.cpu, "settle", lambda: pytest.fail("nothing was refused"))

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main.main(main.parse(["main", *arguments]))
        return str(caught.value.code)

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=configs",), "--config=configs is a folder: give a file such as"),
        (("--config=", "--mode=train"), "--config= names no config: give one"),
        (("--config=nowhere.py",), "--config=nowhere.py is no file: give a file such as"),
        (
            ("--config=digits_pv",),
            "has this name; did you mean digits_vp? Choose from digits_",
        ),
        (("--config=configs/digits_pv.py",), "is no file: did you mean configs/digits_vp.py? Give"),
        ((CONFIG, "--mode=eval", "--workdri=a"), "flag --workdri: did you mean --workdir? See"),
        ((CONFIG, "--tracebak"), "did you mean --traceback? Give --tracebak=VALUE"),
        ((CONFIG, "--config.data.source=digts"), "'digts': did you mean digits? Choose one of"),
        (("--mode=train",), "UsageError: --mode=train needs --config=configs/<name>.py"),
        (("--mode=evl",), "unknown mode 'evl': did you mean eval? Choose one of audit, "),
        ((CONFIG, "--mode=train", "--config.data=1"), "config.data is a section: set its fields"),
        (
            (CONFIG, "--mode="),
            "UsageError: --mode= names no mode: choose from train, train_dequantizer",
        ),
        (
            (CONFIG, "--mode=trian"),
            "ValueError: unknown mode 'trian': did you mean train? Choose one of audit, compare",
        ),
        ((CONFIG, "--config.mode=5"), "ValueError: unknown mode '5': choose one of audit"),
        (("--mode=builtins:dict",), "mode <class 'dict'>: give a function whose parameters Python"),
        (("--mode=builtins:print",), "UsageError: --mode=builtins:print needs --args=VALUE"),
        (
            (CONFIG, "--config.data.source=image_folder", "--config.data.shape=60000,60000,3"),
            "data.shape=60000,60000,3: give at most 2^26 numbers in one image",
        ),
        (("--config=paper:",), "ValueError: paper:: no such model; give cifar10"),
        ((CONFIG, "--workdir="), "UsageError: --workdir= names no folder: give one, or leave"),
        (
            ("--workdir=foo://a/b", "--mode=eval"),
            "--workdir: foo://a/b is no folder of a known kind: give a local path, or gs://",
        ),
        (
            (CONFIG, "--mode=train,eval", "--source=there"),
            "UsageError: --source is for --mode=convert or compress or decompress, not for train",
        ),
        # These modes need no config.
        (
            ("--mode=verify", "--runs=a"),
            "UsageError: --runs is for --mode=compare, not for verify",
        ),
        (
            ("--mode=compare", "--runs=a,b", "--source=c"),
            "UsageError: --source is for --mode=convert or compress or decompress, not for compare",
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
        ((CONFIG, f"--config.optim.lr={'a ' * 900}"), ": give a number above 0 and at most 1"),
        ((CONFIG, f"--num_processes={'a' * 1800}"), "aaa ... aaa"),
        ((CONFIG, "--config.optim.lr=\udcff"), "--config.optim.lr=\\udcff is not in UTF-8"),
        ((CONFIG, "--workdir=a\nb"), "--workdir=a\\nb is not in UTF-8 in one line"),
        ((CONFIG, f"--workdir={__file__}"), "ValueError: --workdir: "),
        ((CONFIG, f"--workdir={__file__}/sub"), "test_main.py is a file: give a folder"),
        (("--mode=compare", f"--runs=a,{__file__}"), "ValueError: --runs: "),
        ((f"--config={'a' * 5000}",), "aaa: no config has this name; choose from"),
        ((f"--config={'a/' * 2500}",), "/a/ is no file: give a file such as configs/digits_vp.py"),
    ],
)
def test_flags_that_name_nothing_or_would_be_ignored_are_refused(
    refusal: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    said = refusal(*arguments)
    assert message in said and len(said) < 1100


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "c = default('mlp')\n    c.training.stepz = 3\n    return c",
            ", line 4: AttributeError: ",
        ),
        (
            "c = default('mlp')\n    c.sampling.num_image = 3\n    return c",
            'Did you mean "num_images" instead of "num_image"?',
        ),
        ("return {'mode': 'train'}", "get_config() returned dict; return a ConfigDict"),
        (
            "return default('foo')",
            "ValueError: model.name=foo: give one of mlp, ncsnpp, unet2d, vdm",
        ),
    ],
)
def test_a_wrong_config_file_is_named_with_its_line(
    refusal: Callable[..., str], tmp_path: Path, code: str, message: str
) -> None:
    text = f"from sbml.program.config.config import default\ndef get_config():\n    {code}\n"
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
    [
        "data.shape.x",
        "eval.estimators.0",
        "data.shape[0]",
        "data.source.x",
        "sampling.sampler.steps.a",
    ]
    + ["data.", ".seed", ""],
)
def test_a_field_that_does_not_exist_is_named_in_one_line(
    refusal: Callable[..., str], field: str
) -> None:
    said = refusal(CONFIG, f"--config.{field}=1")
    assert re.match(r"ValueError: config[\w.]* has no field ", said) and "\n" not in said


@pytest.mark.parametrize(
    ("field", "of_section", "of_class"),
    [
        ("data.sourc", "source", ""),  # The class of the digits has no fields of its own.
        ("sde.lerned", "learned", "beta_max"),
        ("model.nam", "name", "width"),
    ],
)
def test_the_error_for_a_misspelt_field_lists_those_of_the_section_and_of_its_class(
    refusal: Callable[..., str], field: str, of_section: str, of_class: str
) -> None:
    said = refusal(CONFIG, f"--config.{field}=1")
    section = field.partition(".")[0]
    listed = said.partition(f": did you mean {section}.{of_section}? It has ")[2].split(", ")
    assert {of_section, of_class} - {""} <= set(listed)


@pytest.mark.parametrize("code", ["sys.exit(3)", "def run(source=''):\n    sys.exit(3)"])
def test_a_plug_in_that_ends_the_program_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """It ends it when it is imported, or when it runs."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quitting", raising=False)
    (tmp_path / "quitting.py").write_text(f"import sys\n{code}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(main.parse(["main", "--mode=quitting:run"]))
    assert str(ended.value.code) == (
        "SystemExit: quitting called sys.exit(3) in quitting.py: raise a ValueError there"
    )


def test_of_a_long_list_the_most_similar_names_are_shown(refusal: Callable[..., str]) -> None:
    assert refusal(CONFIG, "--config.training.batchsize=1") == (
        "ValueError: config.training has no field batchsize: did you mean training.batch_size? It "
        "has accumulate, batch_size, shard_state, steps_per_dispatch, times, validation_images "
        "and 13 more (--help)"
    )


def test_a_work_directory_that_is_too_deep_is_refused_in_one_line(tmp_path: Path) -> None:
    """Python itself would raise a RecursionError, or an error that contains the whole path."""
    for depth in (600, 3000):
        deep = tmp_path / "/".join(["d"] * depth)
        status, (line,) = run_program(deep, "--mode=train")
        assert status == 1 and re.match(
            r"ValueError: --workdir: the path of the work directory, /.* bytes: give", line
        )
        assert len(line) < 300


def test_a_store_that_cannot_be_reached_is_refused_in_one_line(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    offline = OSError(-2, "Name or service not known")
    for effect, reason in ((None, "gcsfs"), (offline, "Name or service not known")):
        connect = mock.Mock(side_effect=effect)
        monkeypatch.setattr(workdir.socket, "create_connection", connect)
        for arguments in (
            ("--workdir=gs://bucket/run", "--mode=eval"),
            ("--mode=compare", "--runs=gs://bucket/a,gs://bucket/b"),
        ):
            said = refusal(*arguments)
            match = rf"gs://bucket/\w+ cannot be reached: .*{reason}.*pip install gcsfs"
            assert re.search(match, said) and "\n" not in said


def test_a_config_without_the_function_get_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    status, (line,) = run_program(tmp_path, config=str(tmp_path / "empty.py"))
    assert status == 1
    assert f"--config={tmp_path / 'empty.py'} has no function get_config(): begin" in line


def test_a_config_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.py").touch()
    assert path_of("~/a.py") == tmp_path / "a.py"


def test_ctrl_c_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main.main(main.parse(["main"]))
    assert ended.value.code == 130 and "interrupted" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        main.main(main.parse(["main", "--traceback"]))


def test_outside_the_main_thread_no_signal_is_handled() -> None:
    """Python allows handlers of signals in its main thread only."""

    def asked() -> bool:
        with Preemption() as preemption:
            return preemption.requested()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asked).result() is False


def test_a_signal_ends_the_process_at_once_where_nothing_is_to_be_saved() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        handler = signal.getsignal(signal.SIGTERM)
        with preemption.suspended("done"):
            assert signal.getsignal(signal.SIGTERM) == before != handler
        assert signal.getsignal(signal.SIGTERM) == handler
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit), preemption.suspended("done"):
            pass


def error_of(function: Callable[[], object]) -> BaseException:
    """The error that ``function()`` raises."""
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def test_paths_are_shown_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text, shown in (
        (f"no file {tmp_path}/a/b: make it", "no file a/b: make it"),
        (f"--config={tmp_path}/a.py", "--config=a.py"),
        (f"/more{tmp_path}/a and {tmp_path}", f"/more{tmp_path}/a and {tmp_path}"),
    ):
        assert refusals.relative(text) == shown
    assert str(Workdir(tmp_path / "runs/a")) == "runs/a" and str(Workdir("runs/a")) == "runs/a"
    assert Workdir(tmp_path / "runs/a").absolute == str(tmp_path / "runs/a")
    assert str(Workdir(tmp_path.parent)) == str(tmp_path.parent)
    monkeypatch.chdir("/")
    assert refusals.relative("gs://bucket/run and /a/b") == "gs://bucket/run and /a/b"


def test_the_start_shows_the_fields_that_the_command_line_sets() -> None:
    config = with_overrides(
        tiny.get_config(), {"eval.ode.rtol": "0.00002", "data.shape": "(8, 8,1)"}
    )
    shown = ", with --config.eval.ode.rtol=2e-5 --config.data.shape=8,8,1"
    assert main.settings(config, ["eval.ode.rtol", "data.shape"]) == shown
    assert not main.settings(config, [])


@pytest.mark.usefixtures("unchecked")
def test_errors_of_this_package_and_missing_files_are_refusals(tmp_path: Path) -> None:
    """A refusal is shown in one line. An error that another library raises is a defect, so it is
    shown with its traceback."""
    ours = error_of(lambda: Solver(rtol=-1.0))
    assert str(refusals.line(ours)).startswith("ValueError: rtol is -1.0: give a number")
    traced = error_of(lambda: jax.jit(lambda x: divergence.exact(lambda x: x[:1], x))(jnp.ones(2)))
    assert str(refusals.line(traced)).startswith("ValueError: f(x) has shape (1,)")
    missing = error_of((tmp_path / "a\x1b[2Jb").read_text)
    assert str(refusals.line(missing)).endswith("a\\x1b[2Jb: No such file or directory")
    for defect in (
        lambda: np.concatenate([np.zeros(2), np.zeros((2, 2))]),
        lambda: 1 / 0,
        lambda: bits.to_model(jnp.ones(3), jnp.ones(2), 4),  # jax refuses the shapes
        lambda: plots.running_mean(None, 3),  # type: ignore[arg-type]
    ):
        assert refusals.line(error_of(defect)) is None
