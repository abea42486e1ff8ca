"""Lengths of coded images against the bound and against PNG, WebP and JPEG XL, and their speed.

    pip install '.[codec]' zopfli imagecodecs
    python -m sbml.main --config=configs/digits_vp.py:uniform
    python benchmarks/codec.py measure runs/digits_vp_uniform --results=codec.jsonl
    python benchmarks/codec.py show codec.jsonl --picture=docs/guides/compression.svg

``measure`` codes the first test images of a trained work directory in chains of several lengths,
decodes each file again, and writes one JSON line for each. ``show`` prints the table.
"""

import argparse
import dataclasses
import io
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from sbml.codec import bits_back, file
from sbml.codec.bits_back import Lanes
from sbml.density.estimators.bound import Estimator
from sbml.program.config import config as configs
from sbml.program.config.build import Experiment
from sbml.program.config.compatibility import of_workdir
from sbml.program.config.trained import Trained
from sbml.program.evaluation import coding
from sbml.program.evaluation.cells import Evaluation
from sbml.program.runtime.workdir import Workdir

SPENT: dict[str, float] = defaultdict(float)


def timed(function: Any, name: str) -> Any:
    """``function``, whose time is added to ``SPENT[name]``."""

    def inside(*of: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*of, **options)
        SPENT[name] += time.perf_counter() - start
        return result

    return inside


def others(pixels: np.ndarray) -> dict[str, int]:
    """Bytes of the images by other lossless codecs, each image alone and all as one sheet."""
    import imagecodecs
    import zopfli.png

    def png(image: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, "png", optimize=True)
        return len(zopfli.png.optimize(buffer.getvalue()))

    def webp(image: np.ndarray) -> int:
        buffer = io.BytesIO()
        picture = Image.fromarray(image.squeeze()).convert("RGB")
        picture.save(buffer, "webp", lossless=True, quality=100, method=6)
        return len(buffer.getvalue())

    def jpeg_xl(image: np.ndarray) -> int:
        return len(imagecodecs.jpegxl_encode(image.squeeze(), lossless=True, effort=9))

    n, h, w, c = pixels.shape
    rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
    sheet = pixels.reshape(rows, n // rows, h, w, c).swapaxes(1, 2).reshape(rows * h, -1, c)
    codecs = {"PNG": png, "WebP": webp, "JPEG XL": jpeg_xl}
    return {
        **{f"{name}, one by one": sum(map(of, pixels)) for name, of in codecs.items()},
        **{f"{name}, one sheet": of(sheet) for name, of in codecs.items()},
    }


def measure(workdir: Workdir, count: int, steps: list[int], lanes: int, results: Path) -> None:
    """Code the images in chains of these lengths; one line of ``results`` for each."""
    for number in steps:
        fields = {"codec.steps": str(number), "codec.lanes": str(lanes)}
        config = of_workdir(configs.of_checkpoint(workdir, fields), workdir, quiet=True)
        trained = Trained.of(Experiment(config), workdir)
        inputs = Evaluation.of_split(trained, "test")
        pixels = inputs.images.images[:count]
        chain = coding.encoder_chain(inputs)
        codec = coding.codec_of(trained, chain, lanes)
        assert codec.arithmetic  # The network is compiled before the time is measured.
        vars(codec)["_noise"] = timed(codec._noise, "network")
        SPENT.clear()
        start, state = time.perf_counter(), bits_back.first_state(codec)
        coder = ("pop", "push", "scramble")
        plain = {name: getattr(Lanes, name) for name in coder}
        for name, function in plain.items():
            setattr(Lanes, name, timed(function, "coder"))
        for after in bits_back.encode(codec, pixels, state):
            state = after
        for name, function in plain.items():
            setattr(Lanes, name, function)
        # This includes the time in which ``encode`` decodes the first round, as a check.
        seconds, parts = time.perf_counter() - start, dict(SPENT)
        header, content = file.packed(codec, pixels, state)
        start = time.perf_counter()
        ends = bits_back.last_state(codec, len(pixels), file.from_bytes(content)[1])
        for after in bits_back.decode(codec, len(pixels), ends):
            ends = after
        exact = np.array_equal(header.restored(codec, ends), pixels)
        decoding, dims = time.perf_counter() - start, pixels.size
        in_steps, limit = coding.bound_of(inputs, codec, pixels), None
        bound = in_steps.estimate()
        if number == steps[0]:
            how = in_steps.estimator
            assert isinstance(how, Estimator)
            plain_bound = Estimator(how.n_times, reduction=how.reduction)
            limit = dataclasses.replace(in_steps, estimator=plain_bound).estimate()
        initial, payload = 32 * codec.initial_words * lanes, 32 * state.words.size
        line = {
            "run": workdir.name,
            "images": len(pixels),
            "exact": exact,
            "steps": number,
            "lanes": lanes,
            "disk": 8 * len(content) / dims,
            "net": (payload - initial) / dims,
            "initial": initial / dims,
            "header": (8 * len(content) - payload) / dims,
            "bound": bound.mean,
            "bound_stderr": bound.this_set.stderr,
            **(
                {"continuous": limit.mean, "continuous_stderr": limit.this_set.stderr}
                if limit
                else {}
            ),
            "encoding_seconds": seconds,
            "decoding_seconds": decoding,
            **{f"{name}_share": spent / seconds for name, spent in parts.items()},
            **({"others": {k: 8 * v / dims for k, v in others(pixels).items()}} if limit else {}),
        }
        with results.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps(line, indent=1))


def show(results: Path, picture: Path | None) -> None:
    """Print the tables of the lines in ``results``, and draw lengths over steps."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        runs[line["run"]].append(line)
    head = ("steps", "net", "bound in the same steps", "net / bound", "on disk", "images/s")
    for name, rows in runs.items():
        first = rows[0]
        print(
            f"\n{name}: {first['images']} images, continuous bound {first['continuous']:.4f} "
            f"+- {1.96 * first['continuous_stderr']:.4f} bits/dim"
        )
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for r in rows:
            assert r["exact"]
            print(
                f"| {r['steps']} | {r['net']:.4f} | {r['bound']:.4f} +- "
                f"{1.96 * r['bound_stderr']:.4f} | {r['net'] / r['bound']:.4f} | {r['disk']:.4f} | "
                f"{r['images'] / r['encoding_seconds']:.2f}, coder {r['coder_share']:.0%} |"
            )
        best = min(first["others"], key=first["others"].get)
        for other, value in first["others"].items():
            mark = " (best)" if other == best else ""
            print(
                f"  {other}: {value:.3f} bits/dim{mark}; ratios "
                + ", ".join(f"{r['disk'] / value:.3f}" for r in rows)
            )
    if picture is None:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    grey = "#7d838c"  # readable on white and on black
    pyplot.rc("axes", edgecolor=grey, labelcolor=grey)
    pyplot.rc("text", color=grey)
    pyplot.rc("xtick", color=grey)
    pyplot.rc("ytick", color=grey)
    pyplot.rc("legend", frameon=False)
    figure, axes = pyplot.subplots(1, len(runs), figsize=(3.4 * len(runs), 3.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], runs.items(), strict=True):
        steps = [r["steps"] for r in rows]
        axis.axhline(
            rows[0]["continuous"], color="#888888", linestyle="--", label="bound, continuous"
        )
        axis.errorbar(
            steps,
            [r["bound"] for r in rows],
            [1.96 * r["bound_stderr"] for r in rows],
            color="#2f8fd8",
            marker="o",
            capsize=3,
            label="bound in N steps",
        )
        axis.plot(steps, [r["net"] for r in rows], "x", color="#e0662b", label="file, net")
        axis.set_xscale("log")
        axis.set_xticks(steps, [str(s) for s in steps])
        axis.minorticks_off()
        axis.set_title(f"{name}, {rows[0]['images']} images", fontsize=10)
        axis.set_xlabel("steps N")
    axes[0][0].set_ylabel("bits/dim")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, transparent=True)


def main() -> None:
    """Run the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("workdir")
    measuring.add_argument("--count", type=int, default=360)
    measuring.add_argument("--steps", type=int, nargs="+", default=[50, 100, 250, 1000])
    measuring.add_argument("--lanes", type=int, default=8)
    measuring.add_argument("--results", type=Path, default=Path("codec.jsonl"))
    showing = commands.add_parser("show")
    showing.add_argument("results", type=Path)
    showing.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.command == "show":
        show(given.results, given.picture)
        return
    with jax.default_matmul_precision("highest"):
        measure(Workdir(given.workdir), given.count, given.steps, given.lanes, given.results)


if __name__ == "__main__":
    main()
