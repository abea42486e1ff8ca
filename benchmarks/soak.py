"""Kills a run at random, damages its files at random, and compares its results with a whole run's.

    python benchmarks/soak.py [--trials=20] [--seed=0] [--kills=2] [--damages=1] [--store=FILE]

A trial trains, evaluates and samples with the config ``tests/tiny.py``. The process is killed
(SIGKILL) at random moments, and after each kill random files of the work directory are damaged: a
bit is changed, the end is cut off, or the file is emptied. The same command is repeated until it
succeeds. If it stops with an error, the file that the message names is removed, as the message
says. The result of a trial is one of these:

    same        the parameters, per-image table and samples are those of an undisturbed run, bit for
                bit
    refused     the same, after one or more errors that named the damaged file
    unclear     an error did not name the damaged file, or six attempts failed
    different   the run succeeded with other numbers, that is, damage was not noticed
    hung        the run did not end within ten minutes

A line is printed for each trial, and then the number of trials with each result. The exit status is
1 if any result was not "same" or "refused". With ``--store`` the lines are also added to that file,
as JSON.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "sbml.main", "--config=tests/tiny.py"]
FAST = ("--config.eval.max_images=60", "--config.eval.ode.subset=12", "--config.eval.batch_size=12")
HANG = 600  # seconds


def start(workdir: pathlib.Path) -> subprocess.Popen[str]:
    """Start the whole run on ``workdir`` in the background."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [*COMMAND, *FAST, f"--workdir={workdir}"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def files(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The files to damage: all except locks and those that the program never reads again."""
    ignored = {".html", ".png", ".lock"}
    paths = [p for p in workdir.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    return sorted(p for p in paths if p.suffix not in ignored and p.name != "report.json")


def damage(path: pathlib.Path, rng: np.random.Generator) -> str:
    """Change a bit of ``path``, cut off its end, or empty it; returns which of them."""
    content = bytearray(path.read_bytes())
    kind = str(rng.choice(["bit", "cut", "empty"], p=[0.6, 0.25, 0.15])) if content else "empty"
    if kind == "bit":
        place = int(rng.integers(8 * len(content)))
        content[place // 8] ^= 1 << place % 8
    else:
        del content[0 if kind == "empty" else int(rng.integers(len(content))) :]
    path.write_bytes(bytes(content))
    return kind


def ending(workdir: pathlib.Path) -> dict[str, bytes]:
    """The final results of a run: per-image table, samples, and the evaluated checkpoint's step and
    checksum."""
    tables = {name: (workdir / name).read_bytes() for name in ("per_image.npz", "samples.npz")}
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    return {**tables, "checkpoint": json.dumps(evaluation["checkpoint"]).encode()}


def remedy(workdir: pathlib.Path, message: str, damaged: set[str]) -> str | None:
    """Remove the file or folder of ``workdir`` that ``message`` names, and return its name.

    None if the message names no file or folder of ``workdir`` that is, or contains, one of the
    files ``damaged``.
    """
    for name in re.findall(rf"{re.escape(str(workdir))}/([\w./-]*\w)", message):
        target = workdir / name
        if not any(path == name or path.startswith(f"{name}/") for path in damaged):
            continue
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()
        else:
            continue
        return name
    return None


def trial(workdir: pathlib.Path, seconds: float, args: argparse.Namespace, seed: int) -> dict:
    """One run that is killed and damaged; returns its result and the events."""
    rng = np.random.default_rng(seed)
    done: list[str] = []
    damaged: set[str] = set()
    for _ in range(args.kills):
        process = start(workdir)
        try:
            process.communicate(timeout=float(rng.uniform(0.1, 1.0)) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done.append("killed")
        for path in rng.permutation(np.asarray(files(workdir), object))[: args.damages]:
            name = path.relative_to(workdir).as_posix()
            done.append(f"{damage(path, rng)} {name}")
            damaged.add(name)
    result = "same"
    for _ in range(6):
        process = start(workdir)
        try:
            _, err = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            process.kill()
            return {"result": "hung", "done": done}
        if process.returncode == 0:
            return {"result": result, "done": done}
        # Warnings, and other errors, may stand before the last error.
        last = re.split(r"(?m)^(?=\w+Error: )", err.strip())[-1] or f"{process.returncode}"
        removed = remedy(workdir, last, damaged)
        if removed is None:
            return {"result": "unclear", "done": done, "message": last[-300:]}
        done.append(f"removed {removed}")
        result = "refused"
    return {"result": "unclear", "done": done, "message": last[-300:]}


def main() -> None:
    """Print each trial and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--damages", type=int, default=1, help="damaged files after each kill")
    parser.add_argument("--store", type=pathlib.Path)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole = pathlib.Path(scratch) / "whole"
        start_time = time.monotonic()
        _, err = (process := start(whole)).communicate()
        assert process.returncode == 0, err
        seconds, expected = time.monotonic() - start_time, ending(whole)
        for number in range(args.trials):
            workdir = pathlib.Path(scratch) / f"trial{number}"
            record = trial(workdir, seconds, args, args.seed + number)
            if record["result"] in ("same", "refused") and ending(workdir) != expected:
                record["result"] = "different"
            counts[record["result"]] += 1
            line = json.dumps({"seed": args.seed + number, **record})
            print(line, flush=True)
            if args.store:
                with args.store.open("a") as store:
                    store.write(line + "\n")
            shutil.rmtree(workdir, ignore_errors=True)
    print(", ".join(f"{name} {count}" for name, count in counts.most_common()))
    sys.exit(bool({*counts} - {"same", "refused"}))


if __name__ == "__main__":
    main()
