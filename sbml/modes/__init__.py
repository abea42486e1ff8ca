"""The modes of the program (``--mode``): one file for each mode, which exports

    run(config, workdir)      executes the mode with a config and a ``runtime.workdir.Workdir``
    FLAGS                     optional: names of flags that ``run`` takes as keyword arguments
    NEEDS_CONFIG              optional: False if ``run`` does not depend on a config. If it is False
                              for all modes of a command, config is None and workdir is the value of
                              ``--workdir``, a string or None.

Files whose names begin with an underscore are parts that several modes share.
"""
