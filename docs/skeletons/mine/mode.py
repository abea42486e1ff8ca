"""A mode, ``--mode=mine.mode:count``: its parameters say what it uses."""


def count(experiment, workdir, file="count.txt"):
    (workdir / file).write_text(str(experiment.parameter_count()))
