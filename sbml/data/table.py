"""Rows of numbers from a CSV, Parquet or NumPy file, in whitened coordinates.

    z = L^-1 (g(y) - m),      log p(y) = log p(z) + sum_j log |g'_j(y_j)| - log det L

y is a row in the units of the file. g_j is the identity, log or logit, for each column. m is the
mean of g(y) over the training rows, and L L^T their covariance D ((1 - a) R + a I) D, where D has
the standard deviations and R is the correlation matrix. The shrinkage a is the one with the largest
likelihood in a cross-validation of the training rows. N(0, I) in z is therefore a Gaussian that is
fitted to y, and what a model of z learns is the rest. All of this is computed in float64: in
float32 a column such as a date in seconds would lose the digits in which its values differ.

*Rounded columns.* A model of rounded numbers can have any density, because it can put narrow peaks
on the few values that occur. If more than 5% of the values of a column occur more than once, each
of its values y becomes y + h (u - 1/2) with u uniform in [0, 1), where h is the smallest
difference between two of its values. Then E log p(y + h (u - 1/2)) <= log P(y) - log h, where P is
the probability of the rounded value, so the numbers cannot grow without bound. A column with few
different values, or with a single value in many rows, has no density and is refused. So is a column
that is a linear function of others: given these, its log p would only be that of the shrinkage.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from scipy.linalg import lapack, solve_triangular

from sbml.core import pytrees
from sbml.core.door import brief
from sbml.core.scalars import notation
from sbml.data._examples import Examples, Options, Source, copies

LEAST_ROWS, LEAST_VALUES = 100, 10
MOST_COLUMNS = 1_000  # With more, the eigenvectors of their covariances take minutes.
MOST_TIES = 0.05  # the largest share of repeated values in a column that counts as not rounded
# One value in a share q of the rows, at least 1%, has the density q / h; that of a Gaussian of the
# same deviation is about 0.4 / sd. A column is refused if q sd / h is larger than this.
POINT_MASS = 20.0
SHRINKAGES = np.geomspace(1e-6, 0.5, 20)

Function = Callable[[Any], Any]  # of an array of NumPy or of JAX


class Link(NamedTuple):
    """A function g of one column.

    Attributes:
      of: y -> g(y).
      inverse: g(y) -> y.
      log_slope: y -> log |g'(y)|.
      interval: the ends of the open interval of y.
    """

    of: Function
    inverse: Function
    log_slope: Function
    interval: tuple[float, float]


def _of(y: Any) -> Any:
    """The module of functions of the array ``y``: NumPy, or ``jax.numpy``."""
    return y.__array_namespace__()


LINKS = {
    "": Link(lambda y: y, lambda g: g, lambda y: 0 * y, (-np.inf, np.inf)),
    "log": Link(
        lambda y: _of(y).log(y), lambda g: _of(g).exp(g), lambda y: -_of(y).log(y), (0.0, np.inf)
    ),
    "logit": Link(
        lambda y: _of(y).log(y) - _of(y).log1p(-y),
        lambda g: 1 / (1 + _of(g).exp(-g)),
        lambda y: -_of(y).log(y) - _of(y).log1p(-y),
        (0.0, 1.0),
    ),
}


@pytrees.register
@dataclass(frozen=True, eq=False)
class Whitening:
    """The map y = f(z) between rows y and z, a transform of a ``Density``.

    Its methods take one row ``(d,)`` or several ``(n, d)``, of NumPy or of JAX.

    Attributes:
      links: the name of g for each column.
      mean: m, ``(d,)``.
      factor: L, a lower triangular matrix ``(d, d)``.
    """

    links: tuple[str, ...]
    mean: np.ndarray
    factor: np.ndarray

    @classmethod
    def fit(cls, y: np.ndarray, links: tuple[str, ...]) -> "Whitening":
        """The whitening of the rows ``y (n, d)``."""
        from sklearn.model_selection import KFold  # here, because that takes a second

        g = _each((LINKS[name].of for name in links), y)
        sd = g.std(axis=0)
        u, loss = (g - g.mean(axis=0)) / sd, np.zeros(len(SHRINKAGES))
        for fitted, rest in KFold(5, shuffle=True, random_state=0).split(u):
            # The eigenvectors of the covariance are those of every shrunk one.
            values, vectors = np.linalg.eigh(np.cov(u[fitted].T, bias=True).reshape(2 * [len(sd)]))
            squares = np.mean(((u[rest] - u[fitted].mean(axis=0)) @ vectors) ** 2, axis=0)
            shrunk = values + SHRINKAGES[:, None] * (values.mean() - values)
            loss += np.sum(np.log(shrunk) + squares / shrunk, axis=1)
        a = SHRINKAGES[np.argmin(loss)]
        correlation = (1 - a) * u.T @ u / len(u) + a * np.eye(len(sd))
        return cls(links, g.mean(axis=0), sd[:, None] * np.linalg.cholesky(correlation))

    def forward(self, z: Any) -> Any:
        """The rows y of ``z (*n, d)``."""
        return _each((LINKS[name].inverse for name in self.links), self.mean + z @ self.factor.T)

    def inverse_and_log_det(self, y: Any) -> tuple[Any, Any]:
        """z of the rows ``y (*n, d)``, and ``log |det dz/dy|``, ``(*n,)``."""
        g = _each((LINKS[name].of for name in self.links), y) - self.mean
        slopes = _each((LINKS[name].log_slope for name in self.links), y)
        log_det = slopes.sum(axis=-1) - _of(y).log(_of(y).diagonal(self.factor)).sum()
        solve = solve_triangular if isinstance(y, np.ndarray) else jax.scipy.linalg.solve_triangular
        return solve(self.factor, g.T, lower=True).T, log_det


def _each(functions: Iterable[Function], y: Any) -> Any:
    """One function for each column of ``y (*n, d)``."""
    columns = (y[..., i] for i in range(y.shape[-1]))
    return _of(y).stack([f(c) for f, c in zip(functions, columns, strict=True)], axis=-1)


@dataclass(frozen=True, eq=False)
class Rows(Examples):
    """Rows of a table.

    Attributes:
      array: the rows z in whitened coordinates, float32 ``(n, d)``.
      columns: the names of the columns.
      whitening: the map from the units of the file to z.
      rounded: h of each column, 0 if its values are not rounded.
    """

    unit: ClassVar[str] = "row"

    columns: tuple[str, ...]
    whitening: Whitening = field(repr=False)
    rounded: tuple[float, ...]

    @cached_property
    def values(self) -> np.ndarray:
        """The rows in the units of the file, float64 ``(n, d)``."""
        return self.whitening.forward(self.array.astype(np.float64))

    @cached_property
    def log_det(self) -> np.ndarray:
        """``log |det dz/dy|`` of each row, ``(n,)``."""
        return self.whitening.inverse_and_log_det(self.values)[1]


@dataclass(frozen=True)
class Table(Source):
    """A file of numbers, ``data.path``, whose columns have names.

    A random ``test_fraction`` of the rows, which ``split_seed`` decides, is the split "test".

    Attributes:
      drop_columns: columns that are left out.
      log_columns: columns of positive numbers, which are modelled by their logarithm.
      logit_columns: columns of numbers between 0 and 1, which are modelled by log(y / (1 - y)).
    """

    reads = ("path", "test_fraction", "seed")
    modes: ClassVar[tuple[str, ...]] = ("table",)

    drop_columns: tuple[str, ...] = ()
    log_columns: tuple[str, ...] = ()
    logit_columns: tuple[str, ...] = ()

    def load(self, split: str, options: Options) -> Rows:
        """The rows of ``split``, whitened by those of "train"."""
        names, y, rounded = self._numbers(options.path)
        links = self._links(names)
        rng = np.random.default_rng(options.seed)
        order, noise = rng.permutation(len(y)), rng.uniform(-0.5, 0.5, y.shape)
        for name, link, column, h in zip(names, links, y.T, rounded, strict=True):
            low, high = LINKS[link].interval
            if len(outside := np.flatnonzero((column - h / 2 <= low) | (column + h / 2 >= high))):
                raise ValueError(
                    f"{link}_columns={name}: row {outside[0] + 1} has the value "
                    f"{column[outside[0]]:.6g}, and {link} needs values above {low:g}"
                    + (f" and below {high:g}" if high < np.inf else "")
                    + (f", with the noise of +-{h / 2:.2g} for rounded numbers" if h else "")
                )
        _refuse(_dependent(names, links, y), self.drop_columns)
        count = round(options.test_fraction * len(y))
        if not 2 <= count <= len(y) - 2:
            raise ValueError(
                f"test_fraction={options.test_fraction:g} of {len(y)} rows are {count} rows: "
                "hold out two at least, and leave two to train on"
            )
        test, train = np.sort(order[:count]), np.sort(order[count:])
        cautions = [copies(y[test], y[train], "test rows") if split == "test" else ""]
        cautions += [_mark(name, column) for name, column in zip(names, y.T, strict=True)]
        y = y + noise * rounded
        whitening = Whitening.fit(y[train], links)
        chosen = test if split == "test" else train
        return Rows(
            "table",
            Path(str(options.path)).name,
            split,
            whitening.inverse_and_log_det(y[chosen])[0].astype(np.float32),
            ids=tuple(f"row {i + 1}" for i in chosen),
            columns=names,
            whitening=whitening,
            rounded=rounded,
            caution="; ".join(filter(None, cautions)),
        )

    def _links(self, names: tuple[str, ...]) -> tuple[str, ...]:
        given = {"log": self.log_columns, "logit": self.logit_columns}
        for link, columns in given.items():
            for name in columns:
                if name not in names or (link == "log" and name in self.logit_columns):
                    twice = "it is also in logit_columns" if name in names else "no such column"
                    raise ValueError(f"{link}_columns={name}: {twice}; they are {', '.join(names)}")
        return tuple(next((k for k, v in given.items() if n in v), "") for n in names)

    def _numbers(self, path: Any) -> tuple[tuple[str, ...], np.ndarray, tuple[float, ...]]:
        """The names of the columns, the rows in float64 ``(n, d)``, and h of each column."""
        columns = _read(path)
        if unknown := [name for name in self.drop_columns if name not in columns]:
            raise ValueError(
                f"drop_columns={unknown[0]}: no such column; they are {', '.join(columns)}"
            )
        used = {n: c for n, c in columns.items() if n not in self.drop_columns}
        if not used:
            raise ValueError(f"path={path}: no column is left; drop fewer columns")
        if len(used) > MOST_COLUMNS:
            raise ValueError(
                f"path={path} has {len(used)} columns: a table may have {MOST_COLUMNS} at most, so "
                "leave some out, or replace them by fewer, such as principal components"
            )
        if (count := len(next(iter(used.values())))) < LEAST_ROWS:
            raise ValueError(
                f"path={path} has {count} rows: a held-out likelihood of a trained model needs "
                f"{LEAST_ROWS} rows at least"
            )
        found, wrong = [], {}
        for name, column in used.items():
            try:
                y = _floats(column)
                found.append((y, _rounding(y)))
            except ValueError as error:
                wrong[name] = f"column {name}{error}"
        _refuse(wrong, self.drop_columns)
        y, rounded = zip(*found, strict=True)
        return tuple(used), np.stack(y, axis=1), rounded


def _refuse(wrong: dict[str, str], dropped: tuple[str, ...]) -> None:
    """Raise an error if there is a message about a column. It names all of them, and the flag that
    leaves them out together with the columns that are dropped already."""
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong.values())}. Leave {'it' if len(wrong) == 1 else 'them'} out by "
            f"--config.data.drop_columns={','.join([*dropped, *wrong])}"
        )


def _dependent(names: tuple[str, ...], links: tuple[str, ...], y: np.ndarray) -> dict[str, str]:
    """A message for each column g(y) that is a linear function of others: the variance that they
    leave is below the least shrinkage, relative to its own. If float64 does not have the variance
    of a column, the messages are about these columns."""
    n, d = y.shape
    g = _each((LINKS[name].of for name in links), y)
    of = [f"{link} {name}".strip() for link, name in zip(links, names, strict=True)]
    wrong = {
        names[j]: f"column {of[j]} has values that differ by up to {notation(float(size), '.2g')}: "
        "give it in another unit, in which their variance is within the range of float64"
        for j, size in enumerate(np.ptp(g, axis=0))
        if not 1e-150 < size < 1e150
    }
    if wrong:
        return wrong
    correlation = np.corrcoef(g.T).reshape(d, d)
    if n <= d + 10:  # Any column is a linear function of so many, so only pairs tell anything.
        close = np.triu(1 - correlation**2 < SHRINKAGES[0], 1)
        found = {int(j): np.flatnonzero(close[:, j]) for j in np.flatnonzero(close.any(axis=0))}
    else:
        # Pivoted Cholesky: each step takes the column of which the earlier ones leave most.
        factor, order, rank, _ = lapack.dpstrf(correlation, tol=SHRINKAGES[0], lower=1)
        first, rest = order[:rank] - 1, order[rank:] - 1
        weights = solve_triangular(
            factor[:rank, :rank], factor[rank:, :rank].T, trans=1, lower=True
        )
        found = {int(j): first[np.abs(w) > 1e-3] for j, w in zip(rest, weights.T, strict=True)}
    for j, those in sorted(found.items()):
        others = ", ".join(of[i] for i in sorted(those))
        wrong[names[j]] = f"column {of[j]} is a linear function of {others}, so it has no density"
    return wrong


def _read(path: Any) -> dict[str, np.ndarray]:
    """The columns of a file by their names; missing values are NaN."""
    if path is None:
        raise ValueError("path= names no file: give --config.data.path=FILE")
    file = Path(str(path)).expanduser()
    if not file.is_file():
        what = "it is no file of data, but a folder or a pipe" if file.exists() else ""
        raise ValueError(f"path={path}: {what or 'there is no such file'}")
    if file.suffix in (".csv", ".gz") and (wrong := _not_plain(file.read_bytes())):
        raise ValueError(f"path={path}: {wrong}")
    if file.suffix not in (".csv", ".parquet", ".npz"):
        raise ValueError(f"path={path}: give a file whose name ends in .csv, .parquet or .npz")
    try:
        names, columns = _npz(file) if file.suffix == ".npz" else _arrow(file)
    except Exception as error:  # Each library has errors of its own for a damaged file.
        reason = " ".join(str(error).split())
        remedy = ": give lines with one value for each name of the first line"
        raise ValueError(
            f"path={path} cannot be read: {type(error).__name__}: {reason}"
            f"{remedy * (file.suffix == '.csv')}"
        ) from error
    if len(names) == 1 and (found := re.search("[;\t]", names[0])):
        mark = ";" if found[0] == ";" else "tabs"
        raise ValueError(
            f"path={path}: the columns of a CSV file are separated by commas, not {mark}"
        )
    counts = Counter(names)
    bad = (n.splitlines() != [n] or _is_number(n) or counts[n] > 1 for n in names)
    if (i := next((i for i, is_bad in enumerate(bad) if is_bad), None)) is not None:
        raise ValueError(
            f"path={path}: column {i + 1} has the name {brief(names[i])}: the first line must name "
            "each column, with different names of one line that are no numbers"
        )
    return dict(zip(names, columns, strict=True))


def _not_plain(content: bytes) -> str:
    """Why the ``content`` of a file is not plain text in UTF-8 without comments, and the remedy; ""
    if it is."""
    if content.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip: unpack it, as by gunzip"
    if b"\0" in content:
        return "it is not text in UTF-8, but perhaps in UTF-16: convert it, as by iconv -f UTF-16"
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return (
            f"line {line} is not text in UTF-8, but perhaps in Latin-1: convert the file, as by "
            "iconv -f LATIN1"
        )
    if (comment := re.search("^#", text, re.M)) is None:
        return ""
    line = text.count("\n", 0, comment.start()) + 1
    return f"line {line} begins with #: remove lines of comments, and a # before the names"


def _npz(file: Path) -> tuple[list[str], list[np.ndarray]]:
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    if len(arrays) == 1 and (only := next(iter(arrays.values()))).ndim == 2:
        return [f"column_{i + 1}" for i in range(only.shape[1])], list(only.T)
    found = {array.shape for array in arrays.values()}
    if len(found) != 1 or len(found.pop()) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"it has {shapes}: give one array (n, d), or several of one shape (n,)")
    return list(arrays), list(arrays.values())


def _arrow(file: Path) -> tuple[list[str], list[np.ndarray]]:
    from pyarrow import csv, parquet  # here: other sources do not need them

    table = csv.read_csv(file) if file.suffix == ".csv" else parquet.read_table(file)
    return table.column_names, [c.to_numpy(zero_copy_only=False) for c in table.columns]


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


def _floats(column: np.ndarray) -> np.ndarray:
    """A column in float64. A column of anything but finite numbers is refused; the message goes on
    after the name of the column, as that of :func:`_rounding` does."""
    if column.dtype.kind in "fiu" and column.ndim == 1:
        y = column.astype(np.float64)
    else:
        present = [(i, value) for i, value in enumerate(column) if value is not None]
        if not all(isinstance(value, Decimal) for _, value in present):
            # Unlike Python, a file's reader does not take "1_000" for a number.
            texts = ((i, v) for i, v in present if not _is_number(v) or "_" in str(v))
            row, value = next(texts, present[0])
            raise ValueError(
                f", row {row + 1}: {str(value)[:40]!r} is of type {type(value).__name__}, and not "
                "a number"
            )
        y = np.array([np.nan if v is None else float(v) for v in column], np.float64)
    for what, wrong in (("missing", np.isnan(y)), ("infinite", np.isinf(y))):
        if wrong.any():
            raise ValueError(
                f", row {np.flatnonzero(wrong)[0] + 1}: the value is {what} ({wrong.sum()} of "
                f"{len(y)} rows, which you can also remove or fill in)"
            )
    return y


def _spread(y: np.ndarray) -> tuple[float, float]:
    """The median, and the distance between the quartiles."""
    low, median, high = np.quantile(y, (0.25, 0.5, 0.75))
    return float(median), float(high - low)


def _mark(name: str, y: np.ndarray) -> str:
    """A caution about a far value of several rows of the column ``name``; "" without one."""
    median, spread = _spread(y)
    for value in (y.min(), y.max()):
        if (count := int(np.sum(y == value))) > 1 and abs(value - median) > 20 * spread > 0:
            return (
                f"column {name} has the value {value:.6g} in {count} rows, far from all others: if "
                "it stands for a missing value, remove these rows"
            )
    return ""


def _rounding(y: np.ndarray) -> float:
    """The h of a column, 0 if it is not rounded; a column without a density is refused."""
    if not np.ptp(y):
        raise ValueError(f" is constant, {y[0]:g} in every row")
    # Differences below this are rounding errors of a file. One huge value does not change it.
    unit = 1e-9 * (_spread(y)[1] or np.ptp(y))
    with np.errstate(over="ignore"):  # The distance of a huge value is infinite.
        rounded = np.rint((y - y.min()) / unit)
    values, counts = np.unique(rounded, return_counts=True)
    if len(values) < LEAST_VALUES:
        raise ValueError(f" has {len(values)} different values, so it has no density")
    h = float(np.min(np.diff(values))) * unit
    most = counts.max()
    if most >= 0.01 * len(y) and most > 2 and most / len(y) * y.std() / h > POINT_MASS:
        value = np.median(y[rounded == values[counts.argmax()]])  # one that is in the file
        raise ValueError(
            f" has the value {value:.6g} in {most} of {len(y)} rows, while other values differ by "
            f"as little as {h:.2g}, so it has no density (you can also remove these rows)"
        )
    return h if counts[counts > 1].sum() > MOST_TIES * len(y) else 0.0
