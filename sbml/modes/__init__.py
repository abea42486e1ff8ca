"""The modes of the program (``--mode``): one file for each mode, which exports

    run(config, workdir)      executes the mode
    FLAGS                     optional: names of flags that ``run`` takes as keyword arguments
    NEEDS_CONFIG              optional: False if ``run`` does not depend on a config

Files whose names begin with an underscore are shared parts of modes.
"""
