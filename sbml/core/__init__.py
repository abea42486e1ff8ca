"""What every folder uses: types, checks of arguments, registries, random streams, files.

May import: nothing else of the package.
"""
