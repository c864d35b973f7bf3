#!/usr/bin/env python3
"""Prints every public header under the given include folders, one a line, as one includes it."""

import os
import sys

for folder in sys.argv[1:]:
    found = []
    for place, _, names in os.walk(os.path.join(folder, 'varve')):
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names if name.endswith('.hpp')]
    print('\n'.join(sorted(found)), end='\n' if found else '')
