"""Codes images in a file about as long as their bound: ``--mode=compress [--source=FOLDER]``."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

from sbml.codec import CodedFileError, bits_back, file
from sbml.core.progress import Bar
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.evaluation import coding
from sbml.program.evaluation.cells import Evaluation
from sbml.program.runtime.parts import Resumable
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.workdir import CODEC, IMAGES, Workdir


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the model has no classes, the coder is installed, and there is one process, which
    works on the stacks of all lanes."""
    experiment.refuse_classes("compress")
    bits_back.constriction()
    if jax.process_count() > 1:
        raise ValueError("a codec works in one process: leave out --coordinator")


def run(trained: Trained, preemption: Preemption, source: str = "") -> Workdir:
    """Code images of ``eval.split``, or all images of the folder ``source``, in ``images.sbml``.

    A decoder needs the same model. A killed run continues from its last stored state. Writes
    ``codec.json`` with the lengths in bits/dim. A file ``images.sbml`` of other images is not
    overwritten.
    """
    if source and not Path(source).is_dir():
        raise ValueError(f"--source={source} is no folder: give a folder of images")
    experiment, workdir, start = trained.experiment, trained.workdir, time.perf_counter()
    config = experiment.config
    evaluation = Evaluation.of_split(trained, config.eval.split, preemption)
    if source:
        pixels = coding.read_folder(Path(source), experiment.shape, experiment.levels)
    else:
        pixels = evaluation.images.images[evaluation.ids(config.codec.num_images)]
    chain = coding.encoder_chain(evaluation)
    lanes = min(config.codec.lanes, len(pixels))
    codec = coding.codec_of(trained, chain, lanes)
    first = bits_back.first_state(codec)
    header, _ = file.packed(codec, pixels, first)
    if workdir.has(IMAGES):  # The file could be the only copy of other images.
        try:
            there = file.from_bytes((workdir / IMAGES).read_bytes())[0].pixels_crc32
        except CodedFileError:
            there = None
        if there != header.pixels_crc32:
            raise ValueError(
                f"{workdir / IMAGES} holds other images, or is damaged, and would be overwritten: "
                "move it to another folder, or remove it"
            )
    resumable = Resumable(workdir / "codec", "encode", header.model_dump(), preemption)
    state = first._replace(**resumable.load())
    initial, done = 32 * codec.initial_words * lanes, min(state.number * lanes, len(pixels))
    with Bar("compress", "image", len(pixels), done) as bar:
        for after in bits_back.encode(codec, pixels, state):
            state, done = after, min(after.number * lanes, len(pixels))
            net = (32 * state.words.size - initial) / (done * pixels[0].size)
            bar.update(done - bar.n, f"net {net:.3f} bits/dim")
            resumable.store(state._asdict())
    header, content = file.packed(codec, pixels, state)
    workdir.write_bytes(IMAGES, content)
    lengths = coding.lengths(codec, state.words.size, len(content), pixels.size)
    bound = coding.bound_of(evaluation, codec, pixels).estimate()
    error = bound.this_set
    bounds = {"bound": bound.mean, "bound_stderr": error.stderr, "bound_ci95": error.ci95}
    warnings = [f"bound: {each}" for each in bound.warnings("eval.bound.")]
    counts = {"count": len(pixels), "bytes": len(content), "steps": chain.steps, "lanes": lanes}
    crc32s = {"parameters_crc32": trained.parameters_crc32, "pixels_crc32": header.pixels_crc32}
    record = {**counts, "restored": 0, **lengths, **bounds, **crc32s, "warnings": warnings}
    workdir.write(CODEC, record)
    resumable.remove()
    print(
        f"compressed: {len(pixels)} of {len(pixels)} images to {workdir / IMAGES}\n"
        f"  on disk  {lengths['disk']:.4f} bits/dim, {len(content):,} bytes: net "
        f"{lengths['net']:.4f}, initial bits of {lanes} lanes {lengths['initial']:.4f}, header "
        f"{lengths['header']:.4f}\n"
        f"  bound    {bound.mean:.4f} +- {error.ci95:.4f} bits/dim in {chain.steps} steps "
        "for these images"
    )
    for warning in warnings:
        logging.warning(warning)
    print(f"compressed in {time.perf_counter() - start:.0f} s")
    return workdir
