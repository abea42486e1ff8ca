"""The files, devices and processes of a run:

    workdir, checkpoint, parts    what a run writes, and what a killed run continues from
    metrics, history              rows of a training, and of what ran when and where
    lock, peers, preemption       other processes, lost ones, and requests to stop
    sharding, cpu                 devices
    state, trees, weights         parameters: in training, their checksums, in files of other codes
    refusals                      how the program shows an error

None of these knows a config.
"""
