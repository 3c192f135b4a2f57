"""Transformers' own test modules as a package: stand-ins from this folder, everything else from the fetched sources.

Upstream's package is called `tests`, as is a folder of this repository. Its modules import each other relatively, so
they work under another name; and a package with two folders needs no copying of stand-ins.
"""

from upstream_sources import unpacked_tests


__path__.append(str(unpacked_tests()))
