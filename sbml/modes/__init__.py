"""What the program can be asked to do: one file for each mode, which exports

    run(config, workdir)      and may have FLAGS, names of flags that ``run`` takes as keywords, and
                              NEEDS_CONFIG, False where no config changes it

A file whose name starts with an underscore is a part of others.
"""
