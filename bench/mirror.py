#!/usr/bin/env python3
"""Makes the folder TO equal to the source tree FROM, leaving every file alone whose bytes are the same.

Usage: mirror.py FROM TO. So a build folder for TO stays incremental where the times of the files in FROM say nothing.
"""

import filecmp
import os
import re
import shutil
import sys

IGNORED = re.compile(r'^(\.git|\.gpu|\.venv|\.cache|results|build.*|__pycache__)$')


def files(root):
    found = set()
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not IGNORED.match(f)]
        found |= {os.path.relpath(os.path.join(folder, name), root) for name in names}
    return found


def main():
    source, target = sys.argv[1:3]
    wanted = files(source)
    os.makedirs(target, exist_ok=True)
    for path in files(target) - wanted:
        os.remove(os.path.join(target, path))
    for path in wanted:
        there, here = os.path.join(source, path), os.path.join(target, path)
        if os.path.isfile(here) and filecmp.cmp(there, here, shallow=False):
            continue
        os.makedirs(os.path.dirname(here), exist_ok=True)
        shutil.copyfile(there, here)
        shutil.copymode(there, here)


if __name__ == '__main__':
    main()
