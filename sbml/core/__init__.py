"""What every folder uses: types, checks of arguments, registries, streams, files, progress bars.

May import: nothing else of the package.
"""
