"""The report shows the right numbers, in one page that needs no other file."""

import ast
import base64
import csv
import io
import json
import math
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sbml.program.report import comparison, pictures, plots, result, table
from sbml.program.report import page as report_page
from sbml.program.report.result import ROWS
from sbml.program.runtime.workdir import Workdir
from sbml.statistics.intervals import Interval

N, LEVELS = 40, 17
ATTACK = '<script>alert("x")</script> $\\frac{'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, warnings, links and images of a page; every tag must close where it should."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.images: dict[str, np.ndarray] = {}
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.links += re.findall(r"url\(([^)]*)\)", values.get("style", ""))
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            png = base64.b64decode(values["src"].removeprefix("data:image/png;base64,"))
            self.images[values["alt"]] = np.asarray(Image.open(io.BytesIO(png)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


def numbers(**changes: Any) -> dict[str, Any]:
    result = {
        "estimator": "ode",
        "dequantizer": "uniform",
        "num_importance": 1,
        "split": "test",
        "n": N,
        "bits_per_dim": 1.9804,
        "stderr": 0.0122,
        "ci95": 0.0239,
        "interval": [1.9567, 2.0043],
        "nonfinite": 0,
        "smallest_time": 1e-5,
        "nfe_mean": 50.25,
        "nfe_max": np.int64(86),
        "terms": {"prior": 1.125},
    }
    return {
        "title": "digits_vp",
        "results": [result],
        "baselines": [
            {"name": "full-covariance Gaussian", "bits_per_dim": 2.94, "interval": [2.91, 2.97]},
            {"name": "per-pixel histogram", "bits_per_dim": 2.3904, "interval": [2.37, 2.41]},
        ],
        "warnings": [],
        "model": {"name": "ncsnpp", "parameters": 1_030_000},
        "checkpoint": {"step": 3000},
        "config": {"optim": {"lr": 1e-5}, "model": {"ch_mult": (1, 2)}},
        "versions": {"jax": "0.10.2"},
        "command": "python -m sbml.main",
        **changes,
    }


def pixels(count: int = N, size: int = 8, channels: int = 1) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, LEVELS, (count, size, size, channels), dtype=np.uint8)


def columns(bits: np.ndarray | None = None) -> dict[str, np.ndarray]:
    bits = np.linspace(1, 3, N) if bits is None else bits
    return {"id": np.arange(N), "bits_per_dim": bits, "nfe": np.full(N, 50)}


def write(directory: Path, numbers: dict[str, Any], **changes: Any) -> Page:
    given = {
        "table": columns(),
        "images": pixels(),
        "levels": LEVELS,
        "curves": [
            {"step": s, "loss": 9 / s, "images_per_s": 1234.0, "seconds": 5.0 * s}
            for s in range(1, 50)
        ],
        "samples": pixels(20),
    }
    report_page.write(directory, numbers, **{**given, **changes})
    return Page((directory / "report.html").read_text())


def not_a_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_json_is_strict_and_reads_back(tmp_path: Path) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 0.5])
    write(tmp_path, numbers(timing={"values": values, "n": np.int32(3), "none": None}))
    text = (tmp_path / "report.json").read_text()
    read = json.loads(text, parse_constant=not_a_constant)
    np.testing.assert_array_equal([float(v) for v in read["timing"]["values"]], values)
    assert read["timing"]["n"] == 3
    assert read["timing"]["none"] is None
    expected = numbers()
    assert read["config"] == {"optim": {"lr": 1e-5}, "model": {"ch_mult": [1, 2]}}
    assert {k: read[k] for k in ("results", "baselines", "title")} == {
        k: expected[k] for k in ("results", "baselines", "title")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_page_stands_alone(tmp_path: Path) -> None:
    page = write(tmp_path, numbers())
    html = (tmp_path / "report.html").read_text()
    assert page.links
    outside = {link for link in page.links if not link.startswith(("data:image/png;base64,", "#"))}
    assert len(outside) > 5 and all(link.startswith(report_page.DOCS) for link in outside)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "default-src 'none'" in html
    targets = {link.removeprefix("#") for link in page.links if link.startswith("#")}
    assert targets <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_each_term_is_linked_to_a_heading_of_the_documentation(tmp_path: Path) -> None:
    docs = Path(__file__).parents[1] / "docs"
    if not docs.exists():
        pytest.skip("the documentation is in the checkout only")
    every = numbers()
    every["results"][0] |= {key: 1.0 for key in ROWS if key not in every["results"][0]}
    every["results"][0]["terms"] |= {"divergence": 1.0}
    bound = {**every["results"][0], "estimator": "bound", "terms": {"diffusion": 1.0}}
    page = write(tmp_path, numbers(results=[every["results"][0], bound]))
    linked = {link.removeprefix(report_page.DOCS) for link in page.links if "://" in link}
    assert {"bits.html#the-terms-of-the-ode", "bits.html#the-terms-of-the-bound"} <= {
        link.removeprefix("explanations/") for link in linked
    }
    for link in linked:
        name, _, anchor = link.partition("#")
        text = (docs / name).with_suffix(".md").read_text()
        headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
        slugs = {re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") for heading in headings}
        assert not anchor or anchor in slugs, link


def test_the_rows_to_copy_have_the_number_of_the_result() -> None:
    results = [RESULT | {"bits_per_dim": 1.98765, "interval": [1.8, 2.2]}]
    results.append(RESULT | {"dequantizer": "truncated_normal", "num_importance": 20})
    rows = report_page.copied("a_run, 2|", results)
    assert rows["Markdown"].split("\n")[2] == (
        r"| a_run, 2\| | ode | uniform | 1.988 | 1.800 to 2.200 | 40 | 0.001 |"
    )
    first, second = rows["LaTeX"].split("\n")
    assert first == (
        r"a\_run, 2| & ode & uniform & $1.988$ & $[1.800, 2.200]$ & 40 & $1 \times 10^{-3}$ \\"
    )
    assert r"& truncated\_normal, K = 20 & $2.000$ &" in second
    read = list(csv.DictReader(io.StringIO(rows["CSV"])))
    assert [float(row["bits_per_dim"]) for row in read] == [1.98765, 2.0]
    assert read[0]["run"] == "a_run, 2|" and read[1]["K"] == "20" and float(read[1]["eps"]) == 1e-3


def test_the_area_below_the_losses_of_all_noise_levels_is_the_term(tmp_path: Path) -> None:
    edges = [6.0, 2.0, 1.0]
    found = {"edges": edges, "split": [0.5, 0.1], "train": [0.25, 0.1], "linear": [0.5, 1.0]}
    found |= {"images": 1280}
    found |= {"split_stderr": [0.01, 0.01], "train_stderr": [0.01, 0.01]}
    text = write(tmp_path, numbers(noise_levels=found)).text
    areas = "test images 2.10, training images 1.10, best linear 3.00."
    assert f"{areas} These values are measured on 1,280 images of each kind with other" in text


def test_a_noise_level_with_one_draw_has_a_loss_without_a_spread(tmp_path: Path) -> None:
    found = {"edges": [6.0, 2.0, 1.0], "split": [0.5, 0.1], "train": [0.25, 0.1], "images": 9}
    found |= {"split_stderr": ["NaN", 0.01], "train_stderr": ["NaN", "NaN"]}
    text = write(tmp_path, numbers(noise_levels=found)).text
    assert "test images 2.10, training images 1.10." in text


def test_page_shows_the_numbers(tmp_path: Path) -> None:
    text = write(tmp_path, numbers(remark="a random sample of 40 of 360 images")).text
    for shown in (
        "1.980 bits/dim",
        "A random sample of 40 of 360 images.",
        "95% confidence interval 1.957 to 2.004",
        "All 40 images finite.",
        f"probability-flow ODE, uniform dequantization ; test, {N} images, smallest time t = 1e-5.",
        "0.410 bits/dim below the best baseline, per-pixel histogram.",
        "1,030,000",
        "50.2",
        "terms.prior 1.125",
        "optim.lr 1e-05",
        "model.ch_mult [1, 2]",
        f"{N} images: mean 2, from 1 to 3.",
        "Median speed 1,234 images/s. Training time 0:04:05.",
        "python -m sbml.main",
    ):
        assert shown in text
    assert "warning" not in text


def test_best_and_worst_are_the_extremes_enlarged(tmp_path: Path) -> None:
    bits = np.linspace(1, 3, N)[::-1].copy()
    bits[7], bits[9] = np.nan, np.inf
    images = pixels()
    page = write(tmp_path, numbers(), table=columns(bits), images=images)
    captions = [alt for alt in page.images if alt.startswith("Image")]
    ids = [int(re.findall(r"\d+", alt)[0]) for alt in captions]
    assert ids[:10] == list(range(39, 29, -1))
    assert set(ids[10:12]) == {7, 9}
    assert ids[12:] == [0, 1, 2, 3, 4, 5, 6, 8]
    shown = page.images["Image 39, 1.000 bits/dim"]
    expected = np.rint(images[39, :, :, 0] * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(shown, np.kron(expected, np.ones((12, 12), np.uint8)))


def test_what_is_not_finite_is_counted_and_shown(tmp_path: Path) -> None:
    bits = np.linspace(1, 3, N)
    bits[[1, 2, 3]] = np.nan, np.inf, -np.inf
    bits[4] = 1e9
    broken = numbers(warnings=["other data"])
    broken["results"][0] |= {"bits_per_dim": math.nan, "interval": [math.nan, math.nan]}
    losses = [{"step": s, "loss": math.nan if s == 3 else 1.0} for s in range(1, 9)]
    text = write(tmp_path, broken, table=columns(bits), curves=losses).text
    assert "2 warnings: read before using these numbers" in text
    assert "other data" in text
    assert "3 bits/dim in the per-image table are not finite; the results count 0." in text
    assert "NaN bits/dim" in text
    assert "3 of 40 not finite" in text
    assert "1 further right, up to 1e+09" in text
    assert "1 of 8 losses not finite" in text


def test_a_report_without_any_finite_value(tmp_path: Path) -> None:
    text = write(
        tmp_path,
        numbers(baselines=[{"name": "none", "bits_per_dim": np.nan, "interval": [np.nan] * 2}]),
        table=columns(np.full(N, np.inf)),
        curves=[{"step": 1, "loss": "NaN"}, {"step": 2, "loss": None}],
    ).text
    assert "40 images, none finite." in text
    assert "2 of 2 losses not finite" in text


def test_everything_is_escaped(tmp_path: Path) -> None:
    attacked = numbers(
        title=ATTACK, warnings=[ATTACK], command=ATTACK, config={ATTACK: {"name": ATTACK}}
    )
    attacked["results"][0]["estimator"] = ATTACK
    attacked["baselines"][0]["name"] = ATTACK
    table = columns() | {f"{ATTACK}/bits_per_dim": np.ones(N)}
    page = write(tmp_path, attacked, table=table)
    assert "script" not in page.tags
    assert page.text.count(ATTACK) >= 8


def test_missing_parts_are_said_to_be_missing(tmp_path: Path) -> None:
    bare = {"results": [RESULT]}
    page = write(tmp_path, bare, curves=[{"step": 3, "eval": 1.0}], samples=None)
    assert "No training curve" in page.text
    assert "No samples were drawn." in page.text


def test_one_image(tmp_path: Path) -> None:
    one = {name: column[:1] for name, column in columns().items()}
    assert "Image 0, 1.000 bits/dim" in write(tmp_path, numbers(), table=one).images


def test_several_results_have_their_own_figures(tmp_path: Path) -> None:
    table = {"id": np.arange(N)} | {
        f"{name}/bits_per_dim": np.linspace(1, 3, N) + shift
        for name, shift in (("ode", 0), ("bound", 1))
    }
    text = write(tmp_path, numbers(), table=table).text
    assert "40 images: mean 2, from 1 to 3." in text
    assert "bound. 40 images: mean 3, from 2 to 4." in text


def test_long_runs_and_large_images_stay_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=100_000)
    big = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    curves = [{"step": s, "loss": 5 + float(z)} for s, z in enumerate(noise)]
    samples = np.tile(big, (7, 1, 1, 1))
    write(tmp_path, numbers(), images=big, levels=256, curves=curves, samples=samples)
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 16}, "levels=16, but the greatest pixel is 16"),
        ({"numbers": numbers(config={"a": [object()]})}, r"report\.config\.a\[0\] is <object"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **({"numbers": numbers()} | changes))
    assert list(tmp_path.iterdir()) == []


def test_grid_is_pixel_exact() -> None:
    images = np.array([[[[0], [3]]], [[[1], [2]]], [[[3], [3]]]], np.uint8)  # (3, 1, 2, 1)
    grid = pictures.image_grid(images, levels=4, columns=2, scale=2, gap=1)
    g = 128
    expected = [
        [0, 0, 255, 255, g, 85, 85, 170, 170],
        [0, 0, 255, 255, g, 85, 85, 170, 170],
        [g, g, g, g, g, g, g, g, g],
        [255, 255, 255, 255, g, g, g, g, g],
        [255, 255, 255, 255, g, g, g, g, g],
    ]
    np.testing.assert_array_equal(grid[..., 0], expected)
    tight = pictures.image_grid(images, levels=4, columns=3, scale=1, gap=0)
    np.testing.assert_array_equal(tight[..., 0], [[0, 255, 85, 170, 255, 255]])


def test_grid_of_neither_grey_nor_coloured_images_shows_the_first_channel() -> None:
    images = np.arange(16, dtype=np.uint8).reshape(2, 2, 2, 2)
    grids = [pictures.image_grid(some, levels=16) for some in (images, images[..., :1])]
    np.testing.assert_array_equal(*grids)


def test_grid_shows_every_level_of_256_as_it_is() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(pictures.image_grid(image, 256, columns=1), image[0])


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_png_round_trip(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    read = np.asarray(Image.open(io.BytesIO(pictures.png(array))))
    np.testing.assert_array_equal(read.reshape(shape), array)


def test_running_mean_against_its_definition() -> None:
    values = np.random.default_rng(0).normal(size=11)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(11)]
    np.testing.assert_allclose(plots.running_mean(values, 5), expected, rtol=1e-12)
    np.testing.assert_array_equal(plots.running_mean(values, 1), values)


def test_thinned_curve_keeps_every_peak() -> None:
    loss = np.random.default_rng(0).normal(size=5000)
    step, kept = plots._thin(np.arange(5000), loss, buckets=50)
    np.testing.assert_array_equal(loss[step], kept)
    buckets = loss.reshape(50, 100)
    assert step.size <= 100
    assert set(buckets.max(axis=1)) | set(buckets.min(axis=1)) == set(kept)


def test_a_value_outside_of_a_histogram_is_no_alarm() -> None:
    axes = Figure().add_subplot()
    plots.histogram(axes, np.array([*range(9), 1e9, -1e9, math.nan]), "bits/dim")
    colours = {
        text.get_text(): text.get_color() for text in axes.texts if text.get_text() != "mean"
    }
    assert [*colours.values()] == [plots.INK, plots.INK, plots.WARN], colours


def test_each_value_falls_in_a_bin() -> None:
    for values in (np.arange(38, 90, 6), np.full(5, 2.5), np.array([3]), np.linspace(0, 1, 300)):
        edges = plots._bins(values)
        assert np.histogram(values, edges)[0].sum() == values.size


def test_images_are_called_by_their_files(tmp_path: Path) -> None:
    names = np.array([f"train/{i}.png" for i in range(N)])
    page = write(tmp_path, numbers(), table={**columns(), "name": names})
    shown = [alt for alt in page.images if alt.startswith("Image ")]
    assert len(shown) == 20 and all(alt.startswith("Image train/") for alt in shown)


def test_a_number_that_rounds_to_0_has_no_minus_sign(tmp_path: Path) -> None:
    """Neither on the page nor in a terminal."""
    tiny = RESULT | {"bits_per_dim": -1e-9, "interval": [-2e-9, 0.0], "terms": {"prior": -1e-9}}
    zero = {"name": "b", "bits_per_dim": -0.0, "interval": [-0.0, 0.0]}
    page = write(tmp_path, numbers(results=[tiny], baselines=[zero]))
    row = {"name": "b", "log_p": -1e-9, "interval": [-1e-9, 0.0], "n": 9, "chosen": ""}
    gap = {"difference": -1e-9, "difference_interval": [-1e-9, -0.0]}
    shown = page.text.partition("Every number of the results")[0]
    shown += comparison.difference_row({"run": "b", "verdict": "unclear", **gap}).text
    shown += result.line(tiny) + table.line(row | gap) + table.verdict(row | gap)
    assert "-" in shown and not re.search(r"(?<![+e])-0\.0+(?![0-9])", shown)


def test_the_next_step_can_be_copied() -> None:
    said = result.next_steps(Workdir("runs/it's"))
    assert ast.literal_eval(re.findall(r"sbml\.load\((.*?)\)", said)[0]) == "runs/it's"


def test_a_line_of_a_table_says_what_cannot_be_trusted() -> None:
    row = {"name": "model", "log_p": 0.5, "interval": [0.3, 0.7], "n": 9, "chosen": "step 3"}
    measured = {"this_set_ci95": 0.01, "converged": False}
    said = "model: log p 0.5000 nats per row"
    rest = ", 95% interval [0.3000, 0.7000], for these rows +-0.0100, n=9, step 3"
    assert table.line({**row, **measured}) == f"{said} NOT CONVERGED{rest}"
    assert table.line({**row, **measured, "converged": True}) == f"{said}{rest}"
    lost = {**row, "difference": np.nan, "difference_interval": [np.nan, np.nan]}
    assert table.verdict(lost).endswith("log p of some rows is not finite.")


def test_every_axis_has_a_name(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 9)
    draws = {
        "rows": partial(plots.rows, rows=[plots.Row("a", 1, 0, 2, "1")], unit="bits/dim"),
        "histogram": partial(plots.histogram, values=values, label="bits/dim"),
        "pair": partial(
            plots.pair, rows=values[:, None] + [0, 1], limits=np.eye(2), labels="xy", colour="k"
        ),
        "marginal": partial(plots.marginal, data=values, samples=values, label="x"),
        "training": partial(plots.training, step=values, loss=values, window=1),
        "validation": partial(
            plots.validation, step=values, values=values, half_width=values, label="bound"
        ),
        "levels": partial(plots.levels, edges=values, curves={"a": values[1:]}, bars={}),
    }
    for name, draw in draws.items():
        axes = Figure().add_subplot()
        draw(axes)
        assert axes.get_xlabel() and (axes.get_ylabel() or name == "rows"), name


def test_losses_of_training_and_of_other_images_differ_in_colour() -> None:
    values = np.linspace(0, 1, 9)
    axes, curves = Figure().add_subplot(), {"test": values[1:], "training": values[1:]}
    plots.levels(axes, values, curves, bars=curves)
    drawn = {patch.get_label(): patch.get_edgecolor() for patch in axes.patches}
    assert drawn["test"] != drawn["training"]


def test_a_chart_of_one_point_is_not_drawn(tmp_path: Path) -> None:
    """The page has no empty heading in its place either."""
    one = {"id": np.array([0]), "bits_per_dim": np.array([1.0])}
    curves = [{"step": 1, "loss": 2.0}]
    report = {**numbers(), "baselines": []}
    page = write(tmp_path, report, table=one, curves=curves)
    assert "svg" not in page.tags and "Distribution over the images" not in page.text
    assert "No training curve" in page.text
    two = {"id": np.arange(2), "bits_per_dim": np.array([1.0, 2.0])}
    page = write(tmp_path, numbers(), table=two, curves=[*curves, {"step": 2, "loss": 1.0}])
    assert "svg" in page.tags and "Distribution over the images" in page.text
    assert "2 logged steps" in page.text


@pytest.mark.parametrize(
    ("changes", "said", "good"),
    [
        ({"converged": True, "outliers": []}, "Converged, all 40 images finite, no outliers", True),
        ({"converged": False}, "NOT CONVERGED, all 40 images finite", False),
        ({"nonfinite": 3}, "3 of 40 images NOT FINITE", False),
        ({"tail": 0.3}, "All 40 images finite, no heavy tail", True),
        ({"tail": "Infinity"}, "HEAVY TAIL, Pareto's k inf, all 40 images finite", False),
        ({"outliers": [[3, 9.5]]}, "Outliers: 1, all 40 images finite", False),
        ({"nonfinite": None}, "", True),
    ],
)
def test_the_headline_says_what_is_known_of_a_number(
    changes: dict[str, Any], said: str, good: bool
) -> None:
    assert report_page.verdict({**numbers()["results"][0], **changes}) == (said, good)


def test_a_label_does_not_touch_an_interval() -> None:
    """The interval may be below the label or below the value, or have no width."""
    ends = ((0.0, 1.0), (0.0, 0.3), (0.95, 1.0), (0.5, 0.5))
    shown = [plots.Row("g" * 30, (low + high) / 2, low, high, "2.943") for low, high in ends]
    figure = Figure((plots.WIDTH, plots.ROWS_HEIGHT + 4 * plots.ROW_HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    with matplotlib.rc_context(plots.STYLE):
        plots.rows(axes, shown, "bits/dim", origin=0.2)
        figure.draw_without_rendering()
    # The first line of a row is the rule, whose ends lie below every label.
    drawn = [line.get_window_extent().padded(3) for line in axes.lines if line.get_linewidth() > 1]
    assert len(drawn) == 3 * len(shown)
    assert not any(text.get_window_extent().count_overlaps(drawn) for text in axes.texts)


def test_a_baseline_that_is_left_out_has_its_reason(tmp_path: Path) -> None:
    report = {**numbers(), "baselines_left_out": {"full-covariance Gaussian": "9 are too few"}}
    page = write(tmp_path, report)
    assert "Left out: full-covariance Gaussian, because 9 are too few." in page.text


@pytest.mark.parametrize(
    ("count", "columns", "said"),
    [
        (10, 10, "Each column has one class: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9."),
        (3, 15, "Each column has one class: c0, c1, c2, and these again."),
        (17, 16, "Sample i is of the class i modulo 17, counted from 0."),
        (0, 16, "samples from the model, not selected."),
    ],
)
def test_a_column_of_samples_has_one_class(
    tmp_path: Path, count: int, columns: int, said: str
) -> None:
    names = [f"c{c}" for c in range(count)]
    levels = np.arange(40) % (count or 40)  # The level of a sample is its class.
    samples = np.full((40, 8, 8, 1), levels[:, None, None, None], np.uint8)
    page = write(tmp_path, numbers(classes=names), samples=samples, levels=40)
    (alt,) = [alt for alt in page.images if alt.endswith(said)]
    grid = page.images[alt][::66, ::66]  # 8 pixels of 8 points each, and 2 points between
    assert grid.shape[1] == columns
    expected = np.rint(np.arange(columns) % (count or 40) * (255 / 39)).astype(np.uint8)
    np.testing.assert_array_equal(grid[0], expected)
    if 0 < count <= 16:
        assert (grid[:2] == expected).all()


def test_the_distance_from_the_best_baseline_has_its_paired_interval(tmp_path: Path) -> None:
    report = numbers()
    report["baselines"][1]["difference_interval"] = [-0.43, -0.39]
    said = "0.410 bits/dim below the best baseline, per-pixel histogram; 95% interval of the paired"
    assert f"{said} difference -0.430 to -0.390." in write(tmp_path, report).text


def test_samples_stand_beside_as_many_evaluated_images(tmp_path: Path) -> None:
    images, ids = pixels(), np.arange(5, N)
    table = {name: column[5:] for name, column in columns().items()}
    page = write(tmp_path, numbers(), images=images, table=table, samples=images[:3])
    expected = {"Samples of the model": images[:3], "Real images (test)": images[ids[:3]]}
    for alt, shown in expected.items():
        grid = pictures.image_grid(shown, LEVELS, columns=3, scale=6)
        np.testing.assert_array_equal(page.images[alt], grid[..., 0])
    page = write(tmp_path, {"results": []}, table=None, images=None)
    assert "Real images" not in page.text


def test_a_number_far_from_the_others_is_an_arrow(tmp_path: Path) -> None:
    """The others then have their usual places, as without it."""
    near = [plots.Row("a", 1.98, 1.95, 2.01, ""), plots.Row("b", 2.4, 2.3, 2.5, "")]
    near.append(plots.Row("c", 2.9, 2.8, 3.0, ""))
    ends = {}
    for far in (None, 900.0, -900.0):
        shown = near if far is None else [*near, plots.Row("d", far, far - 1, far + 1, "")]
        axes = Figure().add_subplot()
        plots.rows(axes, shown, "bits/dim")
        ends[far] = axes.get_xlim()
        markers = [line.get_marker() for line in axes.lines]
        assert markers.count("o") == 3
        assert (">" in markers, "<" in markers) == (far == 900.0, far == -900.0)
    assert len({*ends.values()}) == 1
    # An unbounded interval, as of one image, tells no width: those of the others are .03 and .1.
    near[1] = plots.Row("b", 2.4, -math.inf, math.inf, "")
    reach = 10 * (0.42 + 0.065)
    assert plots.limits(near) == pytest.approx((2.4 - reach, 2.4 + reach))
    report = numbers()
    report["baselines"][0] |= {"bits_per_dim": 900.0, "interval": [899.0, 901.0]}
    assert "900.000" in (text := write(tmp_path, report).text) and "An arrow: the number" in text


def test_the_classifier_and_the_classes_are_shown(tmp_path: Path) -> None:
    values = {
        "images": 64.0,
        "accuracy": Interval(0.9531, 0.0266, 0.05322, 64, 0),
        "-log p(c | k), nats": Interval(math.inf, math.nan, math.nan, 64, 1),
    }
    classes = np.array(["cat", "dog"])[np.arange(N) % 2]
    text = write(tmp_path, numbers(classifier=values), table={**columns(), "class": classes}).text
    assert "images 64 accuracy 0.9531 ± 0.053 -log p(c | k), nats inf ± nan" in text
    assert "1.000 id 0 class cat 1.051 id 1 class dog" in text


def test_an_error_that_is_too_large_is_marked(tmp_path: Path) -> None:
    for converged, marked in ((True, '<td class="number">yes'), (False, 'class="number bad">NO')):
        report = numbers()
        report["results"][0]["converged"] = converged
        write(tmp_path, report)
        assert marked in (tmp_path / "report.html").read_text()


RESULT: dict[str, Any] = {
    "estimator": "ode",
    "dequantizer": "uniform",
    "num_importance": 1,
    "data": "image_folder",
    "split": "test",
    "n": N,
    "split_size": N,
    "bits_per_dim": 2.0,
    "stderr": 0.1,
    "ci95": 0.2,
    "interval": [1.8, 2.2],
    "this_set_stderr": 0.0,
    "this_set_ci95": 0.0,
    "nonfinite": 0,
    "this_set_interval": [2.0, 2.0],
    "min": 1.0,
    "max": 9.5,
    "outliers": [],
    "terms": {},
    "smallest_time": 1e-3,
    "trace": None,
    "dequantizer_step": None,
    "nfe_mean": 9,
    "nfe_max": 9,
}
