"""The paper's table 2 from work directories: likelihood, bound and FID, with 95% intervals.

    python -m experiments.table2 runs/a runs/b ... [--out=runs/table2] [--published=FILE.json]

Evaluate every work directory with
``--config.eval.estimators=ode,bound --config.eval.dequantizers=uniform,variational``; a cell that
was not evaluated is a dash. There is one table for each data set, as Markdown and as LaTeX. Below
the models are the best published values, and those in FILE: a list of
{"data", "model", "sde", and any column: value}.

The two versions of ImageNet 32x32 cannot be compared, so both together are an error.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from sbml.data import imagenet32
from sbml.density.estimators import Cell
from sbml.program.report import result

COLUMNS = {
    "NLL uniform": ("ode", "uniform"),
    "NLL variational": ("ode", "variational"),
    "bound uniform": ("bound", "uniform"),
    "bound variational": ("bound", "variational"),
}
FID = "FID"
# Song et al., NeurIPS 2021, abstract: the best of their models, without data augmentation. The
# abstract does not name the dequantization; it is assumed to be variational. Other cells of the
# paper's table can be added by --published.
PUBLISHED = [
    {"data": "tfds:cifar10", "model": "best of Song et al. 2021", "NLL variational": 2.83},
    {"data": "imagenet32:old", "model": "best of Song et al. 2021", "NLL variational": 3.76},
]
ESCAPED = {c: rf"\{c}" for c in "_&%#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}
Row = dict[str, Any]


def read(workdir: str | pathlib.Path) -> Row:
    """One row from a work directory's report.

    Raises:
      ValueError: it was not evaluated, or not on test images, or the file is not one that
        --mode=eval wrote.
    """
    path = pathlib.Path(workdir) / "report.json"
    if not path.exists():
        raise ValueError(f"{workdir} has no report.json: run --mode=eval there first")
    report = _loaded(path)
    config, results = report["config"], result.read(report["results"])
    if not results:
        raise ValueError(f"{path} has no results: run --mode=eval there again")
    if (split := results[0]["split"]) != "test":
        raise ValueError(
            f"{path} is of {split} images, and the table is of test images: run --mode=eval there "
            "with --config.eval.split=test"
        )
    row: Row = {
        "data": results[0]["data"],
        "model": _variant(config, report["title"]),
        "sde": config["sde"]["name"],
        "n": results[0]["n"],
    }
    for column, (estimator, dequantizer) in COLUMNS.items():
        for found in results:
            if result.cell(found) == Cell(estimator, dequantizer):
                row[column] = _cell(found)
    for name, value in report.get("quality", {}).items():
        if name.startswith("FID"):
            row[FID] = f"{float(value):.2f} ({name})"
    return row


def _loaded(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a JSON file ({error}): check that the whole file was copied"
        ) from error


def published_rows(path: str | pathlib.Path) -> list[Row]:
    """The rows of a file of published values.

    Raises:
      ValueError: a row has no data or model, or a name that is not a column.
    """
    names = {"data", "model", "sde", "n", FID, *COLUMNS}
    rows = _loaded(pathlib.Path(path))
    for row in rows:
        lacking, unknown = {"data", "model"} - set(row), set(row) - names
        if lacking or unknown:
            raise ValueError(
                f"{path}: the row {row} lacks {sorted(lacking)} and has the unknown names "
                f"{sorted(unknown)}; a row has data, model and any of {sorted(names)}"
            )
    return rows


def _variant(config: dict[str, Any], title: str) -> str:
    """The title with the training options in which the rows of the paper's table differ."""
    training = config["training"]
    flags = {"likelihood_weighting": "LW", "importance_sampling": "IS"}
    words = [word for flag, word in flags.items() if training[flag]]
    words += ["flip"] if config["data"]["flip"] else []  # The best published models have none.
    return f"{title} ({' + '.join(words) or 'baseline'})"


def _cell(found: Row) -> str:
    """The mean ± half the width of its 95% interval, marked if it has not converged."""
    value, half = found["bits_per_dim"], found["ci95"]
    if not math.isfinite(value):
        return "not finite"
    mark = " (not converged)" if found.get("converged") is False else ""
    return f"{value:.3f} ± {half:.3f}{mark}" if math.isfinite(half) else f"{value:.3f}{mark}"


def tables(rows: Sequence[Row], published: Sequence[Row]) -> dict[str, list[list[str]]]:
    """For each data set, a header and rows of text.

    Raises:
      ValueError: there are rows of both versions of ImageNet 32x32.
    """
    imagenet32.check_comparable(*(row["data"] for row in rows))
    result: dict[str, list[list[str]]] = {}
    header = ["model", "SDE", *COLUMNS, FID, "n"]
    for name in dict.fromkeys(row["data"] for row in rows):
        same = {name, imagenet32.version(name)}
        shown = [r for r in (*rows, *published) if r["data"] in same]
        cells = [[r["model"], r.get("sde", ""), *_values(r), str(r.get("n", ""))] for r in shown]
        result[name] = [header, *cells]
    return result


def _values(row: Row) -> list[str]:
    return [str(row.get(column, "—")) for column in (*COLUMNS, FID)]


def markdown(found: dict[str, list[list[str]]]) -> str:
    """The tables for a README."""
    parts = []
    for name, (header, *rows) in found.items():
        lines = [f"### {name}, bits/dim", "", "| " + " | ".join(header) + " |"]
        lines.append("|---|---|" + "---:|" * (len(header) - 2))
        parts.append("\n".join(lines + [_line(row) for row in rows]))
    return "\n\n".join(parts) + "\n"


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", r"\|") for text in row) + " |"


def latex(found: dict[str, list[list[str]]]) -> str:
    """The tables for a paper (package booktabs)."""
    parts = []
    for name, (header, *rows) in found.items():
        body = [" & ".join(map(_tex, row)) + r" \\" for row in rows]
        parts.append(
            "\n".join(
                [
                    f"% {name}, bits/dim; intervals are 95% for the population",
                    rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
                    r"\toprule",
                    " & ".join(map(_tex, header)) + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    text = "".join(ESCAPED.get(c, c) for c in text)
    return text.replace(" ± ", r" $\pm$ ").replace("—", "--")


def main(workdirs: Sequence[str], out: str, published: str | None) -> None:
    """Write ``out``.md and ``out``.tex, and print the Markdown."""
    extra = published_rows(published) if published else []
    found = tables([read(workdir) for workdir in workdirs], [*PUBLISHED, *extra])
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".md", markdown(found)), (".tex", latex(found))):
        pathlib.Path(out + suffix).write_text(text)
        print(f"table: {out}{suffix}")
    print(markdown(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--out", default="runs/table2")
    parser.add_argument("--published")
    arguments = parser.parse_args()
    main(arguments.workdirs, arguments.out, arguments.published)
