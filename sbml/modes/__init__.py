"""The modes of the program (``--mode``): one file for each mode, which exports

    run(config, workdir)      executes the mode with a config and a ``runtime.workdir.Workdir``
    check(config, workdir, before)    optional: raises a ValueError if the mode cannot work after
                              the modes ``before``; it is called before the first mode runs
    FLAGS                     optional: names of flags that ``run`` takes as keyword arguments
    IGNORES                   optional: those of the flags "config", "workdir" and "coordinator" on
                              which ``run`` does not depend. The program refuses a flag that all
                              modes of a command ignore. If all ignore "config", it is None and
                              workdir is the value of ``--workdir``, a string or None.

Files whose names begin with an underscore are parts that several modes share.
"""
