"""The command ``sbml``: what a config describes, in a work directory, with a report.

    config       the sections of a config, and the objects that they describe
    convert      checkpoints of other codes as work directories; ``sbml.load``
    evaluation   the numbers, samples and codes of a trained model, in files that can continue
    features     extractors of features, for distances between images
    modes        what ``--mode`` can do; each mode is a function
    report       what the numbers look like: terminal, page, plots
    runtime      work directory, checkpoints, locks, preemption, devices
    verify       ``--mode=verify``: this package against closed forms

Nothing of the library imports this folder.

May import: audit, codec, core, data, density, dequantizers, likelihood, losses, networks, samplers,
score, sdes, statistics.
"""
