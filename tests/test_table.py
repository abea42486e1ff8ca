"""--mode=table against densities in closed form, and tables that must be refused."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import runs
from ml_collections import ConfigDict
from pyarrow import parquet
from scipy import stats
from scipy.special import logsumexp

import sbml
from sbml import data
from sbml.core.scalars import notation
from sbml.data.table import SHRINKAGES, Rows, Whitening
from sbml.likelihood import prior_error
from sbml.program.config import config as configs
from sbml.program.config.config import Config
from sbml.program.evaluation import densities
from sbml.program.modes import table
from sbml.sdes import VP

RNG = np.random.default_rng(0)
N = 400


@pytest.fixture(autouse=True)
def _the_draws_of_a_test_do_not_depend_on_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the seed of the split, which would then depend on the values.
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(1))


def bimodal() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns a > 0 and b, and log p of each row: log a is a mixture, b is normal given log a."""
    g = RNG.choice([-1.5, 1.5], N) + 0.4 * RNG.normal(size=N)
    b = 1e3 + 20 * g + 10 * RNG.normal(size=N)
    of_g = logsumexp(stats.norm.logpdf(g[:, None], [-1.5, 1.5], 0.4), axis=1) - np.log(2)
    return {"a": np.exp(g), "b": b}, of_g - g + stats.norm.logpdf(b, 1e3 + 20 * g, 10)


def csv(path: Path, columns: dict[str, Any]) -> Path:
    rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([",".join(columns), *rows]) + "\n")
    return path


def load(path: Any, split: str = "train", **own: Any) -> Rows:
    rows: Rows = data.load("table", split, data.Options(path=path, test_fraction=0.3), **own)
    return rows


def small(path: Path, **training: Any) -> ConfigDict:
    config = configs.load("table")
    config.data.update(path=str(path), log_columns=("a",), test_fraction=0.3)
    config.model.update(width=32, depth=1, dropout=0.0)
    config.training.update(batch_size=128, log_every=10, **training)
    config.optim.update(lr=3e-3, warmup=0, ema=0.9, schedule="constant")
    config.eval.batch_size = 32  # One shape is compiled.
    config.eval.ode.subset = 32
    config.sampling.update(num_images=50)
    return config


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], np.ndarray]:
    """The folder of a run on a table with a known density, its columns, and log p of its rows."""
    folder, (columns, truth) = tmp_path_factory.mktemp("known"), bimodal()
    path = csv(folder / "a.csv", columns)
    runs.mode(table.run, small(path, num_steps=150, checkpoint_every=75), folder / "run")
    return folder, columns, truth


def test_the_number_is_that_of_a_known_density(known: tuple) -> None:
    folder, columns, truth = known
    found = json.loads((folder / "run/table.json").read_text())
    rows = np.load(folder / "run/table.npz")
    test = load(folder / "a.csv", "test", log_columns=("a",))
    places = [int(name.removeprefix("row ")) - 1 for name in rows["row"]]
    np.testing.assert_allclose(test.values, np.stack([*columns.values()], 1)[places], rtol=1e-6)
    model, gaussian = found["results"][:2]
    half = (model["interval"][1] - model["interval"][0]) / 2
    assert abs(model["log_p"] - truth[places].mean()) < half
    # The Gaussian of the training rows, by its formula in the units of log a and b.
    train = np.stack([np.log(columns["a"]), columns["b"]], 1)[~np.isin(np.arange(N), places)]
    a, b = (columns[name][places] for name in "ab")
    known = stats.multivariate_normal(train.mean(axis=0), np.cov(train.T, bias=True))
    expected = (known.logpdf(np.stack([np.log(a), b], 1)) - np.log(a)).mean()
    assert gaussian["log_p"] == pytest.approx(expected, abs=1e-2)  # up to the shrinkage
    assert gaussian["difference_interval"][0] > 0.05  # A Gaussian cannot have two modes.
    assert rows["samples"].shape == (50, 2) and (rows["samples"][:, 0] > 0).all()
    page = (folder / "run/report.html").read_text()
    assert found["verdict"] in page and "NaN" not in page
    assert "95% intervals of each mean." in page
    # A pair is drawn twice in the same range: the rows, and as many samples, beside each other.
    low, high = test.values.min(axis=0), test.values.max(axis=0)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    few = np.any((rows["samples"] < low) | (rows["samples"] > high), axis=1).sum()
    assert f"{len(test.values)} held-out rows." in page
    assert f"50 samples{f', {few} of them outside' if few else ''}." in page


@pytest.mark.slow
def test_a_run_is_loaded_with_its_whitening(known: tuple, tmp_path: Path) -> None:
    folder, _, _ = known
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    test = load(folder / "a.csv", "test", log_columns=("a",))
    rows = np.load(folder / "run/table.npz")
    density = sbml.load(tmp_path / "run")
    stored = density.logp(test.values[:32], check=False)
    np.testing.assert_allclose(stored.values, rows["model"][:32], rtol=1e-6)
    assert density.log_prob(np.array([-1.0, 0.0], np.float32)) == -np.inf
    (tmp_path / "run" / "whitening.npz").unlink()
    with pytest.raises(ValueError, match="no whitening.npz in .*make it first .--mode=table"):
        sbml.load(tmp_path / "run")


@pytest.mark.slow
def test_a_resumed_run_and_the_gaussian_at_step_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = bimodal()[0]
    path = csv(tmp_path / "a.csv", columns)
    (outlier, *_) = data.load("table", "test", data.Options(path=path, test_fraction=0.3)).ids or ()
    columns["b"][int(outlier.removeprefix("row ")) - 1] += 800.0
    csv(path, columns)
    config = small(path, num_steps=4, checkpoint_every=2)
    config.optim.lr = 1e-7  # The network stays at its start, where the model is the Gaussian.
    runs.mode(table.run, config, tmp_path / "run")
    first = json.loads((tmp_path / "run/table.json").read_text())
    assert [point["step"] for point in first["validation"]] == [0, 2, 4]
    said = capsys.readouterr()
    assert (
        "log p of 56 validation rows" in said.err and "image" not in said.err
    )  # the progress bars
    assert ", model minus Gaussian +0.00" in said.out or "Gaussian -0.00" in said.out
    # The model's line has the smallest time, the prior's error has a line, the outlier a warning.
    model, prior, *_, last = said.out.splitlines()
    assert last.startswith("next: ") and f"sbml.load('{tmp_path / 'run'}')" in last
    assert model.startswith(f"model: log p {first['results'][0]['log_p']:.4f} nats per row at t=")
    assert f" at t={notation(first['results'][0]['smallest_time'], '.3g')}, 95% interval [" in model
    z, sde = load(path, "test", log_columns=("a",)).array.astype(float), VP()
    error = prior_error(sde, z.mean(axis=0), z.var(axis=0))
    assert prior == error.line("nats").removeprefix("\n")
    (warning,) = [each for each in first["warnings"] if "standard deviations" in each]
    assert f": {outlier} (-" in warning and "without them it is" in warning
    page = (tmp_path / "run/report.html").read_text()
    assert "Smallest time t = 1e-5." in page and warning in page
    assert first["results"][1]["difference"] == pytest.approx(0, abs=2e-3)
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    runs.mode(table.run, config, tmp_path / "run")
    again = json.loads((tmp_path / "run/table.json").read_text())
    assert again["results"] == first["results"] and again["validation"] == first["validation"]
    config.data.split_seed = 1  # Rows that were trained on would be test rows.
    with pytest.raises(ValueError, match="trained on other rows.*use another --workdir"):
        runs.mode(table.run, config, tmp_path / "run")


def test_the_change_of_variables_is_exact() -> None:
    with jax.enable_x64(True):
        y = np.stack([RNG.lognormal(size=60), RNG.uniform(size=60), RNG.normal(size=60)], 1)
        whitening = Whitening.fit(y, ("log", "logit", ""))
        z, log_det = whitening.inverse_and_log_det(y)
        np.testing.assert_allclose(whitening.forward(z), y, rtol=1e-12)

        def forward(z: jax.Array) -> jax.Array:
            g = whitening.mean + whitening.factor @ z
            return jnp.stack([jnp.exp(g[0]), jax.nn.sigmoid(g[1]), g[2]])

        jacobians = jax.vmap(jax.jacfwd(forward))(jnp.asarray(z))
        np.testing.assert_allclose(log_det, -jnp.linalg.slogdet(jacobians)[1], rtol=1e-10)


def test_baselines_are_their_formulas() -> None:
    train, validation, z = (RNG.normal(size=(n, 2)) for n in (120, 40, 5))
    gaussian, mixture, kernel = densities.fit(train, validation)
    every = np.concatenate([train, validation])
    b = float(kernel.chosen.removeprefix("bandwidth "))
    kernels = stats.norm.logpdf(z[:, None], every, b).sum(axis=2)
    expected = logsumexp(kernels, axis=1) - np.log(len(every))
    np.testing.assert_allclose(kernel.logp(z), expected, rtol=5e-3)  # b has three digits.
    known = stats.multivariate_normal(np.zeros(2)).logpdf(z)
    np.testing.assert_allclose(gaussian.logp(z), known)
    x = np.linspace(-8, 8, 161)
    grid = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    assert np.exp(mixture.logp(grid)).sum() * 0.01 == pytest.approx(1, abs=1e-3)


def test_every_format_has_the_same_rows(tmp_path: Path) -> None:
    columns = {"u": RNG.normal(size=N), "v": RNG.normal(size=N)}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", **columns)
    np.savez(tmp_path / "b.npz", np.stack([*columns.values()], 1))
    names = [csv(tmp_path / "a.csv", columns), *(tmp_path / n for n in ("a.parquet", "a.npz"))]
    first, *others = [load(name) for name in (*names, tmp_path / "b.npz")]
    assert first.columns == ("u", "v") and others[-1].columns == ("column_1", "column_2")
    for other in others:
        np.testing.assert_array_equal(other.array, first.array)


def test_the_splits_share_no_row_and_the_training_rows_are_white(tmp_path: Path) -> None:
    u = RNG.normal(size=N)
    path = csv(tmp_path / "a.csv", {"u": u, "v": 3 * u + RNG.gamma(2, size=N)})
    train, test = load(path), load(path, "test")
    config = Config(data={"source": "table", "path": str(path)})
    with pytest.raises(ValueError, match="table gives Rows instead of an ImageSet: .*mode=table"):
        config.data.images("train")
    assert train.ids and test.ids and len({*train.ids, *test.ids}) == N and len(test) == 0.3 * N
    z = train.array.astype(float)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.05)  # up to the shrinkage


def test_rounded_values_get_noise_of_the_width_of_their_steps(tmp_path: Path) -> None:
    exact = np.rint(20 * RNG.normal(size=N)) / 4
    path = csv(tmp_path / "a.csv", {"u": exact, "v": RNG.normal(size=N)})
    rows = load(path)
    assert rows.rounded == (pytest.approx(0.25), 0.0) and rows.ids
    noise = rows.values[:, 0] - exact[[int(name[4:]) - 1 for name in rows.ids]]
    assert stats.kstest(noise, stats.uniform(-0.125, 0.25).cdf).pvalue > 1e-3


GOOD = {"u": RNG.normal(size=N), "v": RNG.uniform(0.01, 0.99, N)}


def changed(row: int, value: Any) -> dict[str, Any]:
    """GOOD with another value in a row of column v, counted from 1."""
    v = list(GOOD["v"])
    v[row - 1] = value
    return {**GOOD, "v": v}


SUM = {"u": GOOD["u"], "v": GOOD["v"], "w": 3 * GOOD["u"] - 2 * GOOD["v"] + 7}
PRODUCT = {"u": np.exp(GOOD["u"]), "v": GOOD["v"], "w": np.exp(GOOD["u"]) * GOOD["v"] ** 2}
WIDE = {f"c{i}": RNG.normal(size=100) for i in range(95)}
MASS = np.where(np.arange(N) % 20 == 0, 0, np.sort(GOOD["v"]))
REFUSED = {
    "text": (changed(1, "x"), {}, r"column v, row 1: 'x' is of type str.*drop_columns=v"),
    "text below": (changed(7, "n/k"), {}, "column v, row 7: 'n/k'"),
    "yes or no": ({**GOOD, "w": np.arange(N) % 2 == 0}, {}, "column w, row 1: 'True'.*bool"),
    "missing": (changed(33, ""), {}, r"column v, row 33: the value is missing \(1 "),
    "all missing": ({**GOOD, "w": [""] * N}, {}, "column w, row 1: the value is missing"),
    "infinite": (changed(4, "-inf"), {}, "column v, row 4: the value is infinite"),
    "constant": ({**GOOD, "w": np.full(N, 3)}, {}, "column w is constant, 3 in every row"),
    "discrete": ({**GOOD, "w": np.arange(N) % 3}, {}, "column w has 3 different values"),
    "point mass": ({**GOOD, "w": MASS}, {}, "column w has the value 0 in 20 of 400 rows"),
    "two columns": (
        {**GOOD, "w": np.full(N, 3), "x": ["a"] * N, "y": ["b"] * N},
        {"drop_columns": ("y",)},
        "column w is constant.*; column x, row 1: 'a'.*Leave them out by .*drop_columns=y,w,x$",
    ),
    "equal": (
        {**GOOD, "w": GOOD["u"]},
        {"drop_columns": ("v",)},
        "column w is a linear function of u, so it has no density.*drop_columns=v,w$",
    ),
    "a sum": (SUM, {}, r"column (u is .* of v, w|v is .* of u, w|w is .* of u, v), so"),
    "a product": (
        PRODUCT,
        {"log_columns": ("u", "v", "w")},
        r"column log (u is .* of log v, log w|v is .* of log u, log w|w is .* of log u, log v), so",
    ),
    "equal in a wide table": ({**WIDE, "w": -WIDE["c3"]}, {}, "column w is .* of c3, so"),
    "many columns": ({f"c{i}": range(100) for i in range(1001)}, {}, "has 1001 columns.*1000 at"),
    "few rows": ({"u": GOOD["u"][:40]}, {}, "has 40 rows: .* needs 100 rows"),
    "no rows": ({"u": []}, {}, "has 0 rows"),
    "no names": ({"1.5": GOOD["u"], "2.5": GOOD["v"]}, {}, "column 1 has the name '1.5'"),
    "an index": ({"": GOOD["u"], "v": GOOD["v"]}, {}, "column 1 has the name ''"),
    "a name of two lines": (
        {'"u\nw"': GOOD["u"], "v": GOOD["v"]},
        {},
        r"column 1 has the name 'u\\nw'",
    ),
    "semicolons": ({"u;v": [f"{u};1" for u in GOOD["u"]]}, {}, "separated by commas"),
    "tabs": ({"u\tv": [f"{u}\t1" for u in GOOD["u"]]}, {}, "separated by commas, not tabs"),
    "an underscore": (changed(6, "1_000"), {}, "column v, row 6: '1_000'"),
    "zeros": (
        {**GOOD, "w": np.where(np.arange(N) < 90, 0, GOOD["u"] - 0.1)},
        {},
        "column w has the value 0 in 90 of 400 rows",
    ),
    "one huge value": ({**GOOD, "w": changed(6, 1e308)["v"]}, {}, r"column w .*e308: give it in"),
    "tiny": ({**GOOD, "w": 1e-200 * GOOD["u"][::-1]}, {}, r"column w .*e-200: give it in"),
    "huge": ({**GOOD, "w": 1e200 * GOOD["u"][::-1]}, {}, r"column w .*e200: give it in"),
    "negative": (GOOD, {"log_columns": ("u",)}, r"log_columns=u: row \d+ has .* above 0"),
    "not below 1": (changed(9, 1.5), {"logit_columns": ("v",)}, "logit_columns=v: row 9 .*below 1"),
    "unknown": (GOOD, {"log_columns": ("w",)}, r"log_columns=w: no such column; they are u, v"),
    "two transforms": (GOOD, {"log_columns": ("v",), "logit_columns": ("v",)}, "also in logit"),
    "unknown to drop": (GOOD, {"drop_columns": ("w",)}, "drop_columns=w: no such.* u, v"),
    "all dropped": (GOOD, {"drop_columns": ("u", "v")}, "no column is left"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_without_a_density_is_refused(case: str, tmp_path: Path) -> None:
    columns, own, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load(csv(tmp_path / "a.csv", columns), **own)


def test_a_far_value_is_accepted_and_a_mark_of_missing_values_is_cautioned(tmp_path: Path) -> None:
    assert load(csv(tmp_path / "a.csv", changed(6, 1e8))).caution == ""
    marked = changed(6, -9999)
    marked["v"][10] = marked["v"][40] = -9999
    caution = load(csv(tmp_path / "b.csv", marked)).caution
    assert caution.startswith("column v has the value -9999 in 3 rows, far from all others")


def test_columns_with_a_density_are_not_called_dependent(tmp_path: Path) -> None:
    """Neither a sum that was rounded to visible steps, nor few rows of many columns."""
    rounded = {**SUM, "w": np.round(SUM["w"], 1), "x": GOOD["u"] ** 2}
    assert load(csv(tmp_path / "a.csv", rounded)).columns == ("u", "v", "w", "x")
    assert len(load(csv(tmp_path / "b.csv", WIDE)).columns) == 95


def test_test_rows_that_the_training_had_give_a_warning(tmp_path: Path) -> None:
    """Also if noise is added to their values."""
    columns = {**GOOD, "w": np.round(20 * GOOD["u"] + RNG.normal(size=N))}
    path = csv(tmp_path / "a.csv", columns)
    assert load(path, "test").caution == ""
    test, train = ([int(i[4:]) - 1 for i in load(path, s).ids or ()] for s in ("test", "train"))
    columns = {name: column.copy() for name, column in columns.items()}
    for column in columns.values():
        column[test[1:3]] = column[train[5]]
    assert load(csv(path, columns), "test").caution.startswith("2 of 120 test rows are also among")
    assert load(path).caution == ""


def test_the_shrinkage_is_the_best_one_of_a_cross_validation() -> None:
    from sklearn.covariance import ShrunkCovariance
    from sklearn.model_selection import GridSearchCV, KFold

    y = RNG.normal(size=(120, 9)) @ RNG.normal(size=(9, 9))
    folds = KFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(ShrunkCovariance(), {"shrinkage": SHRINKAGES}, cv=folds)
    expected = search.fit(y / y.std(axis=0)).best_estimator_.covariance_
    factor = Whitening.fit(y, ("",) * 9).factor / y.std(axis=0)[:, None]
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-9)
    assert SHRINKAGES[0] < search.best_params_["shrinkage"] < SHRINKAGES[-1]


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet", "a.npz", "a.xlsx"):
        (tmp_path / name).write_bytes(b"\x00\xff,\n1\n")
    text = csv(tmp_path / "good.csv", GOOD).read_text()
    for name, content in {
        "gzip.csv": gzip.compress(text.encode()),
        "a.csv.gz": gzip.compress(text.encode()),
        "utf16.csv": text.encode("utf-16"),
        "utf16be.csv": text.encode("utf-16-be"),
        "latin1.csv": text.replace("u,v", "ü,v").encode("latin-1"),
        "latin1 below.csv": (text + "é,1\n").encode("latin-1"),
        "comment.csv": b"# of 2026\n" + text.encode(),
        "comment as wide.csv": b"# of May, 2026\n" + text.encode(),
        "comment below.csv": text.encode() + b"# the end\n",
        "ragged.csv": text.encode() + b"1,2,3\n",
        "empty.csv": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    np.savez(tmp_path / "b.npz", u=np.zeros(3), v=np.zeros(4))
    np.savez(tmp_path / "c.npz", u=np.array([{}, {}]))
    np.savez(tmp_path / "d.npz", u=1.0, v=2.0)
    for name, message in {
        "a.csv": "not text in UTF-8, but perhaps in UTF-16: convert it, as by iconv",
        "gzip.csv": "gzip.csv: it is compressed by gzip: unpack it, as by gunzip",
        "a.csv.gz": "a.csv.gz: it is compressed by gzip: unpack it, as by gunzip",
        "utf16.csv": "perhaps in UTF-16: convert it, as by iconv -f UTF-16",
        "utf16be.csv": "perhaps in UTF-16: convert it, as by iconv -f UTF-16",
        "latin1.csv": "line 1 is not .* perhaps in Latin-1: convert .* iconv -f LATIN1",
        "latin1 below.csv": f"line {N + 2} is not .* perhaps in Latin-1",
        "comment.csv": "line 1 begins with #: remove lines of comments",
        "comment as wide.csv": "line 1 begins with #: remove lines of comments",
        "comment below.csv": f"line {N + 2} begins with #: remove lines of comments",
        "ragged.csv": "cannot be read: .*got 3: 1,2,3: give lines with one value for each name",
        "empty.csv": "cannot be read: .*: give lines with one value for each name",
        "folder.csv": "no file of data, but a folder",
        "pipe.csv": "no file of data, but a folder or a pipe",
        "a.parquet": "cannot be read",
        "a.npz": "cannot be read",
        "b.npz": r"u \(3,\), v \(4,\): give one array",
        "c.npz": "cannot be read: ValueError: Object arrays",
        "d.npz": r"u \(\), v \(\): give one array",
        "a.xlsx": "ends in .csv, .parquet or .npz",
        "none.csv": "there is no such file",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)
    with pytest.raises(ValueError, match="--config.data.path=FILE"):
        load(None)
